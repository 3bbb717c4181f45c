"""What `lorafit serve` serves: the base, and the adapters in the directories that were named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.cli.exits import WrongUsageError, usage
from lorafit.cli.listening import Place, Prepared, packages
from lorafit.errors import CheckpointError, ConfigError, LorafitError, some

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.serve.names import Folders
    from lorafit.training.models import Located

SPARE = 64
"""Connections beside those that have a request which runs or waits."""
TOKEN_BYTES = 16
"""Bytes of a body for each token of the context: what a token takes at most as text, or as a number with its comma."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; see its options."""

    adapters: tuple[str, ...]
    model: str | None
    name: str | None
    dtype: str | None
    quantise: str | None
    load: bool
    memory: str | None
    rows: int
    waiting: int
    cached: int
    context: int | None
    seconds: float | None
    place: Place

    def check(self) -> None:
        """Raises what is wrong with it before anything is read."""
        from lorafit.cli.adapters import check_dtype, check_quantise
        from lorafit.training.planning_machine import parse_memory

        packages()
        with usage():
            check_dtype(self.dtype)
            check_quantise(self.quantise)
            if self.memory is not None:
                parse_memory(self.memory)
            if self.load and not self.adapters:
                raise ConfigError(
                    "adapters are loaded from allowed directories, and none is named",
                    where="--allow-load",
                    fix="--adapters DIR, the directory in which they lie",
                )


def seconds(text: str | None) -> float | None:
    """Seconds of a time limit. Raises wrong usage for what is none."""
    from lorafit.training.spans import read_duration

    if text is None:
        return None
    try:
        return read_duration(text)
    except ConfigError as error:
        raise WrongUsageError(
            ConfigError(
                "this is no length of time",
                where="--timeout",
                found=repr(text),
                expected="60s, 5min",
                fix="--timeout 60s",
            )
        ) from error


def prepare(wanted: Wanted, screen: Screen) -> Prepared:
    """Loads the base, and finds the adapters.

    Raises:
        LorafitError: what was asked for cannot be served.
    """
    from lorafit.cli.adapters import computing_device
    from lorafit.serve.apart import apart
    from lorafit.serve.bank import AdapterBank
    from lorafit.serve.engine import Engine, Limits
    from lorafit.serve.http import Options, application
    from lorafit.serve.names import Folders
    from lorafit.serve.templates import Voices
    from lorafit.training.models import choose_dtype, load_tokenizer, locate
    from lorafit.training.planning_machine import parse_memory
    from lorafit.training.quantised import load_base

    allowed, named = _given(wanted.adapters)
    found = Folders(allowed, base="", named=named).found()
    if wanted.adapters and not found and not wanted.load:
        raise CheckpointError(
            "there is no adapter in these directories",
            where=", ".join(wanted.adapters),
            fix="give a run's folder or an adapter's, or --allow-load for what will be there later",
        )
    located = locate(wanted.model or _base_of(found), screen.say)
    base = wanted.name or _name_of(located)
    folders = Folders(allowed, base=base, named=named)
    device = computing_device()
    storage = _storage(found, wanted.quantise)
    dtype = choose_dtype(wanted.dtype or "auto", device)

    def loaded() -> tuple[Any, str]:
        model, told = load_base(storage, located, dtype)
        return model.to(device), told

    model, told = apart(loaded)
    if told:
        screen.say(told)
    tokenizer = load_tokenizer(located)
    bank = AdapterBank(model, limit=None if wanted.memory is None else parse_memory(wanted.memory))
    names = _register(folders, bank, screen)
    limits = Limits(
        rows=wanted.rows,
        waiting=wanted.waiting,
        cached=wanted.cached,
        context=wanted.context,
        seconds=wanted.seconds,
    )
    engine = Engine(model, bank, limits)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    voices = Voices(tokenizer, folders, ends=_ends(model), vocabulary=vocabulary)
    options = Options(
        base=base,
        key=wanted.place.key,
        load=wanted.load,
        hosts=wanted.place.hosts,
        body=max(2**20, TOKEN_BYTES * engine.context),
        seconds=wanted.seconds,
    )
    app = application(engine, bank, voices, folders, options)
    return Prepared(engine, app, wanted.place, base, names, wanted.rows + wanted.waiting + SPARE)


def _name_of(located: Located) -> str:
    """The hub name of a model, or the name of its directory: clients need not know where that lies."""
    path = Path(located.name)
    return path.resolve().name if path.is_dir() else located.name


def _given(adapters: Sequence[str]) -> tuple[list[Path], dict[str, Path]]:
    """The directories, and the adapters with a chosen name."""
    allowed: list[Path] = []
    named: dict[str, Path] = {}
    for text in adapters:
        name, equals, rest = text.partition("=")
        path = Path(text) if not equals or Path(text).exists() else Path(rest)
        if not path.is_dir():
            raise CheckpointError(
                "there is no such folder",
                where=f"--adapters {text}",
                expected="an adapter, or a directory of adapters",
                fix="--adapters runs, where lorafit train puts them",
            )
        if path == Path(text):
            allowed.append(path)
        elif named.setdefault(name, path) != path:
            raise ConfigError("two adapters have the same name", where=f"--adapters {text}", found=name)
    return allowed, named


def _base_of(found: Mapping[str, Path]) -> str | None:
    """The base that the adapters name; None where there are none.

    Raises:
        ConfigError: they name several, or none.
    """
    from lorafit import store

    bases: dict[str, list[str]] = {}
    for name, folder in found.items():
        try:
            base = store.peek(folder).config.get("base_model_name_or_path")
        except CheckpointError:
            continue  # said when it is to be served
        bases.setdefault(str(base or ""), []).append(name)
    if not bases:
        return None
    if len(bases) > 1 or "" in bases:
        told = "; ".join(f"{base or 'no base'}: {some(names, 3)}" for base, names in bases.items())
        raise ConfigError(
            "the adapters do not all name the same base",
            where="base_model_name_or_path",
            found=told,
            expected="one base model for all",
            fix="--model DIR|NAME says which; what does not fit it is refused",
        )
    return next(iter(bases))


def _storage(found: Mapping[str, Path], quantise: str | None) -> str:
    """How the base is to be kept: as the command says, or as all runs had it."""
    from lorafit.cli.adapters import PLAIN, run_storage

    if quantise is not None:
        return quantise
    kept = {name: run_storage(folder) for name, folder in found.items()}
    if len(set(kept.values())) > 1:
        raise ConfigError(
            "the adapters were trained over bases that were kept in different ways",
            found="; ".join(f"{name}: {way}" for name, way in list(kept.items())[:5]),
            fix="--quantise none takes the plain one for all",
        )
    return next(iter(kept.values()), PLAIN)


def _register(folders: Folders, bank: Any, screen: Screen) -> tuple[str, ...]:
    """Makes all adapters known; one that was named itself has to be served, others may be left out, which is said."""
    explicit = folders.explicit
    served: list[str] = []
    for name, folder in folders.found().items():
        try:
            bank.register(name, folders.resolve(str(folder)))
        except LorafitError as error:
            if folder in explicit:
                raise
            screen.say(f"not served: {name}: {error.message}")
            continue
        folders.keep(name, folder)
        served.append(name)
    return tuple(served)


def _ends(model: Any) -> tuple[int, ...]:
    ends = model.generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
