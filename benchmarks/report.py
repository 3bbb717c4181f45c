"""Writes docs/results/speed.md and its pictures from the stored measurements, and from nothing else."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import pictures, sections, stored
from benchmarks.bars import Documents
from benchmarks.machine import ROOT
from benchmarks.stored import say
from lorafit import files

NAME = "report"
HELP = "write docs/results/speed.md from the stored measurements"
PAGE = ROOT / "docs" / "results" / "speed.md"

HEAD = """# Speed and memory

What training with an adapter costs beside the model without one, beside PEFT, and whole runs beside TRL. This page is
written by a program from the stored measurements; nothing in it is typed by hand. To measure again:

```bash
python -m benchmarks all
python -m benchmarks report
```

`python -m benchmarks --help` lists the single measurements. Their raw figures, each round's among them, are in the JSON
files of `benchmarks/results`, with commit, versions, machine, seeds and command.
"""

METHOD = """## How it is measured

The floor is the same model, frozen, forward and backward to the embeddings' output: what an adapter on every layer
cannot go below. A step is forward, loss, backward, optimizer step and zero_grad. The variants take turns in one
process: in each round each takes one step on the same batch, in an order drawn anew, and its time is divided by the
floor's of the same round. Given are the median over the rounds and, in brackets, the quartiles. Every side uses
`torch.optim.AdamW`, fused unless the row says otherwise (PEFT's LoRA-FA is an optimizer of its own), rank 16 unless the
row says otherwise, alpha 2 r, on all linear layers but the head, and the model's own cross-entropy over all tokens,
unless the row says otherwise. Peak memory is the high-water mark of resident memory of a process that measures one
variant alone; it contains what the imports take. AdaLoRA prunes at every tenth step on both sides.
"""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--page", default=str(PAGE), help="the page to write; pictures go into its folder")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures as they are")


def run(options: Namespace) -> Path:
    """Writes the page."""
    documents = stored.read(Path(options.output))
    page = Path(options.page)
    page.parent.mkdir(parents=True, exist_ok=True)
    if "sweep" in documents and not options.no_pictures:
        pictures.draw(documents["sweep"], page.parent / "pictures")
    files.write_text(page, text(documents))
    say(f"{page}: written from {', '.join(documents) or 'no measurements'}")
    return page


def text(documents: Documents) -> str:
    """The page."""
    parts = [HEAD, sections.verdicts(documents), METHOD, *_parts(documents), where(documents)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _parts(documents: Documents) -> Iterator[str]:
    writers = {
        "steps-": sections.steps,
        "memory-": sections.memory,
        "sweep": sections.sweep,
        "io": sections.storing,
        "train": sections.train_runs,
        "plan": sections.planned,
        "billion": sections.billion,
    }
    for prefix, write in writers.items():
        for name, document in documents.items():
            if name.startswith(prefix):
                yield write(document)


def where(documents: Documents) -> str:
    """On which machine what was measured, by which command."""
    if not documents:
        return "## Machine\n\nNothing has been measured yet.\n"
    lines = ["## Machine", ""]
    header = ("file", "command", "date", "commit", "others running", "minutes")
    rows = []
    for name, one in documents.items():
        commit = (one["commit"]["hash"] or "unknown")[:9] + (", changed" if one["commit"]["changed"] else "")
        others = one["load"]["others"]
        load = "unknown" if others is None else str(others)
        rows.append((name, f"`{one['command']}`", one["date"], commit, load, f"{one['seconds'] / 60:.0f}"))
    lines.append(sections.table(header, rows))
    machines: dict[str, list[str]] = {}
    for name, one in documents.items():
        machines.setdefault(_machine(one), []).append(name)
    for said, names in machines.items():
        lines += ["", sections.wrapped(said if len(machines) == 1 else f"{', '.join(names)}: {said}")]
    warned = {warning for one in documents.values() for warning in one["warnings"]}
    lines += ["", *(sections.wrapped(f"Warning: {warning}.") for warning in sorted(warned))]
    return "\n".join(lines) + "\n"


def _machine(one: Mapping[str, Any]) -> str:
    at, versions = one["machine"], one["versions"]
    memory = "" if at["memory_bytes"] is None else f", {at['memory_bytes'] / 2**30:.0f} GiB"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{at['processor']} ({at['capability']}), {at['cores']} cores, {at['threads']} threads{memory}, "
        f"{at['platform']}; {packages}; seed {one['seed']}."
    )
