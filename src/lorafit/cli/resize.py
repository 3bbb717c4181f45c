"""`lorafit resize`: a smaller adapter out of a trained one, with what it keeps beside what it costs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    import torch

    from lorafit.cli.adapters import Description, Loaded
    from lorafit.cli.heldout import HeldOut
    from lorafit.cli.screen import Screen
    from lorafit.resizing import Size, Source

SIZE = "Size"
ENERGIES = (0.99, 0.95, 0.9, 0.8, 0.5)
BESIDE = (
    "labels.json",
    "task.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
"""Files of an adapter's folder that its smaller one needs as well: on its head, and the tokenizer's."""
TRIED = "resized"
"""The name of a smaller adapter while it is measured."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for: one of the three."""

    ranks: tuple[int, ...] = ()
    energies: tuple[float, ...] = ()
    drops: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measured:
    """The base with an adapter on it, and records to measure on."""

    loaded: Loaded
    described: Description
    held: HeldOut
    batch_size: int
    whole: torch.Tensor
    """(records, 3) of the adapter as it is."""


def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", metavar="DIR", help="A new or empty directory.", show_default=False)
    ] = None,
    r: Annotated[
        str | None,
        typer.Option("--r", metavar="RANK", help="The rank of every layer, at most.", rich_help_panel=SIZE),
    ] = None,
    energy: Annotated[
        str | None,
        typer.Option(
            "--energy",
            metavar="SHARE",
            help="Of each layer the least rank that keeps this share of Σ σ²: 0.95.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    drop: Annotated[
        str | None,
        typer.Option(
            "--drop",
            metavar="SHARE",
            help="Leave out this share of the layers, those that count least on the data (LoRA-drop's importance).",
            rich_help_panel=SIZE,
        ),
    ] = None,
    scan: Annotated[
        bool,
        typer.Option(
            "--scan",
            help="Write nothing, show a table of several sizes: --r 16,8,4 or --drop 0.25,0.5. Default: ranks, halved.",
            rich_help_panel=SIZE,
        ),
    ] = False,
    data: options.Data = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out",
            help="Measure on the held-out records of the adapter's run.",
            rich_help_panel=options.DATA,
        ),
    ] = False,
    data_split: options.DataSplit = None,
    columns: options.Columns = None,
    limit: options.EvalLimit = None,
    max_length: options.MaxLength = None,
    model: options.BaseModel = None,
    labels: options.Labels = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Records in a batch.", rich_help_panel=options.RUN)
    ] = 16,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make a trained adapter smaller: fewer ranks, or fewer layers.

    The best approximation of that size, from the adapter's files alone. With --data or --held-out the base is loaded,
    too, and the score is shown beside the size.
    """
    from lorafit.cli.exits import usage
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.cli.values import mapping
    from lorafit.exporting.folder import check_free

    screen = Screen(as_json)
    with usage():
        asked = _asked(r, energy, drop, scan, output_dir, data is not None or held_out)
        roles = mapping(columns, "the command line: --columns") if columns else None
        if output_dir is not None:
            check_free(output_dir)
    quiet()
    from lorafit.cli.adapters import describe, load, run_storage
    from lorafit.cli.heldout import heldout, wanted
    from lorafit.resizing import opened

    measured = None
    if data is not None or held_out:
        described = describe(adapter, model, labels, screen.say)
        request = wanted(adapter, data, data_split, roles, limit, max_length, screen.say)
        held = heldout(request, described, 0, screen.say)
        loaded = load(described, None, run_storage(adapter), screen.say)
        measured = _whole(loaded, described, held, batch_size)
    source = opened(adapter, _plain_model(adapter, model, labels, screen))
    for note in source.notes:
        screen.say(note)
    sizes = _sizes(asked, source, measured, screen)
    rows = _table(sizes, source, measured, screen)
    if output_dir is None:
        screen.say("nothing was written: name one size and --output-dir")
        screen.result({"adapter": adapter, "sizes": rows})
        return
    worst = _written(adapter, source, sizes[-1][1], output_dir)
    screen.say(f"new adapter: {output_dir} (max difference of ΔW from what was to be written: {worst:.2g})", whole=True)
    screen.result({"adapter": adapter, "output_dir": output_dir, "difference": worst, "sizes": rows})


def _asked(r: str | None, energy: str | None, drop: str | None, scan: bool, output: Path | None, data: bool) -> Asked:
    from lorafit.errors import ConfigError

    given = [name for name, value in (("--r", r), ("--energy", energy), ("--drop", drop)) if value is not None]
    if len(given) > 1 or (not given and not scan):
        raise ConfigError(
            "it is not clear how small the adapter shall be",
            found=" and ".join(given) or "no size",
            expected="one of --r, --energy and --drop",
            fix="--r 8, --energy 0.95, or --scan to see what each size keeps",
        )
    asked = Asked(
        tuple(int(each) for each in _numbers("--r", r, whole=True)),
        tuple(_numbers("--energy", energy, whole=False)),
        tuple(_numbers("--drop", drop, whole=False, most=0.999)),
    )
    if scan == (output is not None):
        raise ConfigError(
            "--scan writes nothing, and needs no output directory" if scan else "there is no place for the new adapter",
            found="--scan and --output-dir" if scan else "no --output-dir",
            expected="one of the two",
            fix="leave one of them out" if scan else "--output-dir DIR, or --scan to see what each size keeps",
        )
    if not scan and len(asked.ranks + asked.energies + asked.drops) > 1:
        raise ConfigError(
            "one adapter has one size", where=given[0], found="several values", expected="one", fix="--scan shows all"
        )
    if asked.drops and not data:
        raise ConfigError(
            "which layers count is told on data",
            where="--drop",
            found="no data",
            expected="records that the model is run on",
            fix="--data FILE, or --held-out for those of the adapter's run",
        )
    return asked


def _numbers(name: str, text: str | None, *, whole: bool, most: float = 1.0) -> list[float]:
    from lorafit.errors import ConfigError

    found = []
    for part in (text or "").split(",") if text is not None else []:
        try:
            value = float(int(part) if whole else part)
        except ValueError:
            value = -1.0
        if not (value >= 1 if whole else 0 < value <= most):
            raise ConfigError(
                "this is no size",
                where=name,
                found=repr(part),
                expected="a rank from 1 on" if whole else f"a share, above 0 and at most {most:g}",
                fix=f"{name} {'8' if whole else '0.5'}",
            )
        found.append(value)
    return found


def _plain_model(adapter: Path, model: str | None, labels: str | None, screen: Screen) -> Any:
    """The base model where the adapter's file alone does not say what it changes, else None."""
    from lorafit import store
    from lorafit.cli.adapters import describe, load
    from lorafit.conversion import read_pairs

    if read_pairs(store.read(adapter)) is not None:
        return None
    screen.say("its file does not say by itself what it changes: the base is loaded, too")
    return load(replace(describe(adapter, model, labels, screen.say), adapter=None), "float32").model


def _sizes(asked: Asked, source: Source, measured: Measured | None, screen: Screen) -> list[tuple[str, Size]]:
    """What was asked for, each with its name in the table; the adapter as it is comes first."""
    from lorafit.resizing import by_energy, by_importance, by_rank, sized

    found = [("as it is", sized(source, {path: each.r for path, each in source.layers.items()}))]
    ranks = asked.ranks
    if not (asked.ranks or asked.energies or asked.drops):
        most = max(each.r for each in source.layers.values())
        ranks = tuple(most >> shift for shift in range(1, most.bit_length()))
        found += [(f"energy {each:g}", by_energy(source, each)) for each in ENERGIES]
    found += [(f"r {each}", by_rank(source, each)) for each in ranks]
    found += [(f"energy {each:g}", by_energy(source, each)) for each in asked.energies]
    if asked.drops:
        assert measured is not None
        scores = _importance(measured)
        least = min(scores, key=lambda path: scores[path])
        most_path = max(scores, key=lambda path: scores[path])
        screen.say(f"importance from {scores[least]:.2g} ({least}) to {scores[most_path]:.2g} ({most_path})")
        found += [(f"drop {each:g}", by_importance(source, scores, each)) for each in asked.drops]
    return found


def _importance(measured: Measured) -> dict[str, float]:
    from lorafit.cli.adapters import judged_by
    from lorafit.importance import importance
    from lorafit.training.batches import inputs_of

    collate: Any = judged_by(measured.loaded, measured.described)[1]
    records, size = sorted(measured.held.records, key=len), measured.batch_size
    batches = (inputs_of(collate(records[start : start + size])) for start in range(0, len(records), size))
    assert measured.loaded.handle is not None
    return importance(measured.loaded.handle, batches)


def _whole(loaded: Loaded, described: Description, held: HeldOut, batch_size: int) -> Measured:
    from lorafit.cli.eval import by_record

    return Measured(loaded, described, held, batch_size, by_record(loaded, held, described, batch_size))


def _table(
    sizes: Sequence[tuple[str, Size]], source: Source, measured: Measured | None, screen: Screen
) -> list[dict[str, Any]]:
    """Shows what each size keeps; with data also its score, and how far that is from the adapter's own."""
    rows: list[dict[str, Any]] = []
    shown: list[list[str]] = []
    for name, size in sizes:
        row: dict[str, Any] = {"size": name, **{key: value for key, value in vars(size).items() if key != "ranks"}}
        row |= {"layers": size.layers, "r": sorted({rank for rank in size.ranks.values() if rank})}
        ranks = row["r"]
        cells = [name, f"{size.layers:,}", f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])]
        cells += [f"{size.numbers:,}", f"{size.share:.1%}", f"{size.energy:.2%}", f"{size.error:.3g}"]
        if measured is not None:
            scored = _score(source, size, measured, first=not rows)
            row |= scored
            cells += [f"{scored['loss']:.4f}", f"{scored['change']:+.4f} ± {scored['margin']:.4f}" if rows else ""]
            cells += [f"{scored['accuracy']:.1%}"] if scored["accuracy"] is not None else []
        rows.append(row)
        shown.append(cells)
    header = ["", "layers", "rank", "numbers", "of all", "energy kept", "error"]
    header += ["loss", "change", "accuracy"][: len(shown[0]) - len(header)]
    screen.table(header, shown, right=range(1, len(header)))
    if measured is not None:
        screen.say("change: of the loss, record by record against the adapter as it is, with its 95 % interval")
    return rows


def _score(source: Source, size: Size, measured: Measured, *, first: bool) -> dict[str, Any]:
    """The score of a smaller adapter, written to a folder that goes again and read from there."""
    import lorafit
    from lorafit.cli.eval import by_record
    from lorafit.resizing import resize as write
    from lorafit.training.verdict import Evaluation, change

    found, own = measured.whole, measured.loaded.handle
    assert own is not None
    if not first:
        with tempfile.TemporaryDirectory() as folder:
            tried = lorafit.load(measured.loaded.model, write(source, size, Path(folder) / "adapter"), name=TRIED)
        found = by_record(measured.loaded, measured.held, measured.described, measured.batch_size)
        tried.detach()
        own.activate(own.name)
    before, after = (Evaluation(0, tuple(x[:, 0].tolist()), tuple(x[:, 1].tolist())) for x in (measured.whole, found))
    moved, correct = change(before, after), float(found[:, 2].sum())
    accuracy = None if correct < 0 else correct / float(found[:, 1].sum())
    return {"loss": after.mean, "change": moved.value, "margin": moved.margin, "accuracy": accuracy}


def _written(adapter: Path, source: Source, size: Size, output_dir: Path) -> float:
    """Writes the adapter and reads it back; how far its change is from what was to be written."""
    from lorafit import store
    from lorafit.errors import CheckpointError
    from lorafit.exporting.folder import fresh
    from lorafit.resizing import difference
    from lorafit.resizing import resize as write
    from lorafit.training.headed import Headed

    with fresh(output_dir) as folder:
        write(source, size, folder)
        for name in BESIDE:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
        head = Headed.read(folder)
        if head is not None:
            head.warn(folder)
    worst = difference(source, size, store.read(output_dir))
    largest = max(max(each.spectrum.values, default=0.0) for each in source.layers.values())
    if not worst <= 1e-4 * max(largest, 1e-30):
        raise CheckpointError(
            "what was written is not what was to be written; it is still there",
            where=output_dir,
            found=f"a change differs by {worst:.3g}",
            expected=f"at most {1e-4 * largest:.3g}",
            fix="look at the disk, and write it again",
        )
    return worst
