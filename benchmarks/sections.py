"""The parts of the page, each from one file of measurements."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import forecast, pictures, train
from benchmarks.bars import OPEN, Documents, bars, beside_peft, setting
from benchmarks.statistic import Spread, ratios
from benchmarks.variants import ALIKE, FLOOR, PEFT

Document = Mapping[str, Any]
WIDTH = 120
MIB = 2**20
NOTHING = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)


def wrapped(text: str) -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def ratio(spread: Spread | None, digits: int = 3) -> str:
    """A median and its quartiles.

    >>> ratio(Spread(1.05, 1.04, 1.07), 2)
    '1.05 (1.04–1.07)'
    """
    if spread is None:
        return NOTHING
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def counted(number: int, one: str, several: str) -> str:
    """A number with its noun.

    >>> counted(1, "run", "runs"), counted(2, "run", "runs")
    ('1 run', '2 runs')
    """
    return f"{number} {one if number == 1 else several}"


def verdicts(documents: Documents) -> str:
    """The table of bars."""
    rows = []
    found = bars(documents)
    for bar in found:
        limit = f"{'<' if bar.strict else '≤'} {bar.limit:.2f}"
        rows.append((bar.what, limit, ratio(bar.measured), bar.verdict, bar.note if not bar.strict else ""))
    header = ("bar", "at most", "measured", "verdict", "where")
    counts = {verdict: sum(bar.verdict == verdict for bar in found) for verdict in ("passed", "missed", OPEN)}
    said = (
        f"Of {len(found)} bars {counts['passed']} are passed, {counts['missed']} missed, {counts[OPEN]} not measured."
    )
    return f"## The bars\n\n{wrapped(said)}\n\n{table(header, rows)}\n"


def steps(document: Document) -> str:
    """Step times of one case."""
    results = document["results"]
    case = results["case"]
    rows = []
    for group in results["groups"]:
        seconds = group["seconds"]
        floor = Spread.of(seconds[FLOOR]).median
        for name in seconds:
            if name == FLOOR and group is not results["groups"][0]:
                continue
            twin = PEFT + name
            beside = Spread.of(ratios(seconds, name, twin)) if twin in seconds else None
            middle = f"{Spread.of(seconds[name]).median * 1e3:.0f}"
            rows.append((name, ratio(Spread.of(ratios(seconds, name, FLOOR))), ratio(beside), middle))
    rate = Spread.of([group["gemm_rate"] for group in results["groups"]]).median
    added = _case(case).adapter_operations(16) / rate / floor
    processes = counted(len(results["groups"]), "process", "processes")
    limited = "" if results["instructions"] == "all" else f"Instructions up to {results['instructions']} alone. "
    most = max(len(group["seconds"]) for group in results["groups"])
    said = (
        f"The model: {case['about']}; {case['batch']} rows of {case['length']} tokens, {case['dtype']}. "
        f"{counted(results['rounds'], 'round', 'rounds')} after {results['warmup']} of warming-up, in {processes} with "
        f"up to {most} variants. {limited}A product of the size of a layer runs at {rate / 1e9:.0f} GFLOP/s here; at "
        f"that rate the operations of LoRA of rank 16 alone would come to {1 + added:.3f} of the floor."
    )
    header = ("variant", "step / floor", "step / PEFT's", "ms")
    title = case["name"] if results["instructions"] == "all" else f"{case['name']}-{results['instructions']}"
    return f"## Step times: {title}\n\n{wrapped(said)}\n\n{table(header, rows)}\n"


def _case(plain: Mapping[str, Any]) -> Any:
    from benchmarks.cases import Case

    return Case(**{key: value for key, value in plain.items() if key != "about"})


def memory(document: Document) -> str:
    """Peak memory of one case."""
    results = document["results"]
    peaks = results["peaks"]
    rows = []
    for name, found in peaks.items():
        middle = {key: Spread.of([one[key] for one in found]).median / MIB for key in ("peak", "built", "imported")}
        beside, without = NOTHING, NOTHING
        if PEFT + name in peaks:
            pairs = list(zip(found, peaks[PEFT + name], strict=True))
            beside = f"{Spread.of([own['peak'] / other['peak'] for own, other in pairs]).median:.3f}"
            without = f"{Spread.of([_net(own) / _net(other) for own, other in pairs]).median:.3f}"
        sizes = [f"{middle[key]:,.0f}" for key in ("peak", "built", "imported")]
        rows.append((name, *sizes, beside, without))
    case = results["case"]
    processes = counted(results["repeats"], "process", "processes")
    said = (
        f"The model: {case['about']}; {case['batch']} rows of {case['length']} tokens, {case['dtype']}. Peak of a "
        f"process that takes {results['steps']} steps, the median of {processes}; what was resident once the model was "
        "built, and once the packages were imported; the ratio of the peaks, and of what they are above the imports."
    )
    header = ("variant", "peak, MiB", "built", "imports", "peak / PEFT's", "without imports")
    return f"## Peak memory: {case['name']}\n\n{wrapped(said)}\n\n{table(header, rows)}\n"


def _net(one: Mapping[str, int]) -> int:
    return one["peak"] - one["imported"]


def sweep(document: Document) -> str:
    """Ratios over the settings, and the pictures."""
    results = document["results"]
    rows = []
    for point in results["points"]:
        seconds = point["seconds"]
        cells = [setting(point["point"]), f"{pictures.predicted(point):.3f}"]
        for name in ALIKE:
            if name not in seconds:
                cells.append(NOTHING)
                continue
            own = Spread.of(ratios(seconds, name, FLOOR)).median
            beside = Spread.of(ratios(seconds, name, PEFT + name)).median
            cells.append(f"{own:.2f}; {beside:.2f}")
        rows.append(cells)
    comparisons = beside_peft({"sweep": document})
    slower = [one for _, one in comparisons if one.median > 1]
    beyond = sum(one.low > 1 for one in slower)
    said = (
        f"Models of {results['layers']} layers, {results['rounds']} rounds at each setting. In each cell: step / "
        "floor; step / PEFT's. The formula: what LoRA's own floating-point operations would add to the floor at the "
        "rate of a product of the layer's size, each layer in the cheaper order. "
        f"Of {len(comparisons)} comparisons {len(slower)} are slower than PEFT, {beyond} by more than the spread "
        "of the rounds."
    )
    parts = [f"## Width, tokens, rank, sites, dropout\n\n{wrapped(said)}"]
    parts.append(table(("setting", "formula, LoRA", *ALIKE), rows))
    drawn = {"rank": "the rank", "sites": "the adapted layers", "tokens": "the tokens of a step"}
    parts += [f"![Step times against {what}](pictures/{pictures.NAMES[name]})" for name, what in drawn.items()]
    if results["memory"]:
        parts.append("Peak memory by PEFT's:")
        held = []
        for one in results["memory"]:
            peaks = one["peaks"]
            shares = {name: peaks[name]["peak"] / peaks[PEFT + name]["peak"] for name in ALIKE if name in peaks}
            held.append([setting(one["point"]), *(f"{shares[m]:.2f}" if m in shares else NOTHING for m in ALIKE)])
        parts.append(table(("setting", *ALIKE), held))
    return "\n\n".join(parts) + "\n"


def storing(document: Document) -> str:
    """Attach, save, load, and starts."""
    results = document["results"]
    rows = []
    for one in results["tables"]:
        for key, values in one["seconds"]["ours"].items():
            ours, theirs = Spread.of(values).median, Spread.of(one["seconds"]["peft"][key]).median
            rows.append(
                (f"{one['sites']:,}", key, f"{ours * 1e3:,.0f}", f"{theirs * 1e3:,.0f}", f"{ours / theirs:.2f}")
            )
    starts = [
        (f"`{name}`", NOTHING if seconds is None else f"{Spread.of(seconds).median * 1e3:,.0f}")
        for name, seconds in results["starts"].items()
    ]
    said = (
        f"Linear layers of {results['width']} × {results['width']}, rank 16; medians of processes of their own, "
        "the two libraries in turns. Imports are not counted."
    )
    return (
        f"## Attaching, saving, loading, starting\n\n{wrapped(said)}\n\n"
        f"{table(('sites', 'what', 'ours, ms', 'PEFT, ms', 'ours / PEFT'), rows)}\n\n"
        f"Whole processes, from start to end:\n\n{table(('what', 'ms'), starts)}\n"
    )


def train_runs(document: Document) -> str:
    """Whole runs beside TRL's."""
    results = document["results"]
    runs = results["runs"]
    loss = train.target(runs, list(runs))
    rows = []
    for name, made in runs.items():
        to = Spread.of([train.seconds_to(one, loss) for one in made]).median
        whole = Spread.of([one["ends"][-1] for one in made])
        rates = [one["tokens"] / one["ends"][-1] for one in made if one["tokens"]]
        rows.append(
            (
                name,
                results["about"][name],
                f"{to:.1f}",
                f"{whole.median:.1f}",
                f"{Spread.of([one['process'] for one in made]).median:.1f}",
                f"{Spread.of(rates).median:.0f}" if rates else NOTHING,
                f"{Spread.of([one['peak'] for one in made]).median / MIB:,.0f}",
                f"{Spread.of([one['losses'][-1][1] for one in made]).median:.4f}",
            )
        )
    repeats = counted(len(next(iter(runs.values()))), "run", "runs")
    said = (
        f"The embedded model learns from the embedded questions on Python: {results['steps']} steps of "
        f"{results['batch']} records, rank {results['r']}, learning rate {results['rate']:g}, falling to 0 in a "
        f"straight line; {repeats} of each, in turns. All of them reached a held-out loss of {loss:.4f}, the mean over "
        "the answers' tokens of the held-out records, which plain transformers computes for the adapters of both "
        "sides. TRL computes the head for the learnt tokens alone, too; its kernels by Liger need a GPU."
    )
    header = (
        "run",
        "what",
        "s to that loss",
        "s of all steps",
        "s of the process",
        "tokens/s",
        "peak, MiB",
        "last loss",
    )
    return f"## Whole runs\n\n{wrapped(said)}\n\n{table(header, rows)}\n"


def planned(document: Document) -> str:
    """Plans beside runs."""
    results = document["results"]
    rows = []
    for key in forecast.KEYS:
        took = Spread.of([one["took"][key] for one in results["pairs"]]).median
        said = f"{took / MIB:,.0f} MiB" if key.endswith("bytes") else f"{took:.1f} s"
        rows.append(
            (key.replace("_", " "), said, *(ratio(forecast.off(results, kind, key)) for kind in forecast.KINDS))
        )
    repeats = counted(len(results["pairs"]), "plan and run", "plans and runs")
    about = (
        f"`lorafit train {' '.join(results['flags'])}` on the embedded model and data, and `lorafit plan` for the same "
        f"before it, {repeats} in turns: what the run took, and what plan said by it."
    )
    header = ("what", "the run", "plan's formula / run", "plan's real steps / run")
    return f"## Plans\n\n{wrapped(about)}\n\n{table(header, rows)}\n"


def billion(document: Document) -> str:
    """A base of a billion parameters."""
    results = document["results"]
    rows = []
    for way, found in results["ways"].items():
        step = Spread.of(found["seconds_of_steps"][1:] or found["seconds_of_steps"]).median
        sizes = [f"{found[key] / MIB:,.0f}" for key in ("peak_bytes", "peak_bytes_with_the_base")]
        rows.append((way, f"{found['parameters'] / 1e9:.2f}", *sizes, f"{step:.2f}"))
    sizes = results["sizes"]
    about = (
        f"A Llama of random weights, hidden size {sizes['hidden']:,}, {sizes['layers']} layers, {sizes['steps']} steps "
        f"of {sizes['tokens']} tokens with LoRA of rank {sizes['r']} on all linear layers; one process for each way to "
        "hold the base."
    )
    header = ("base", "billion parameters", "peak, MiB", "with the base alone", "s a step")
    return f"## A billion parameters\n\n{wrapped(about)}\n\n{table(header, rows)}\n"
