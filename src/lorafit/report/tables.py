"""The tables of the page: evaluations, settings, environment, history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from lorafit.report import columns, text
from lorafit.report.records import AGREEMENT, Process, Run
from lorafit.report.text import escape

_Reader = Callable[[Any], str]


def as_count(value: Any) -> str:
    """A whole number with its thousands apart; anything else as it is."""
    return text.count(value) if type(value) is int else text.plain(value)


def _as_size(value: Any) -> str:
    return text.size(value) if type(value) is int else text.plain(value)


def _as_share(value: Any) -> str:
    return text.percent(value) if isinstance(value, float) else text.plain(value)


_READERS: Final[Mapping[str, _Reader]] = {
    **dict.fromkeys(
        (
            "sites",
            "trainable",
            "total",
            "train_steps",
            "train_records",
            "eval_records",
            "train_tokens",
            "train_supervised_tokens",
            "eval_supervised_tokens",
            "longest",
            "longest_uncut",
            "repeated",
            "unrolled",
            "max_length",
        ),
        as_count,
    ),
    "memory_bytes": _as_size,
    "share": _as_share,
}
"""How the values of some keys are written; the others are written as they are."""

_LABELS: Final[Mapping[str, str]] = {
    "r": "rank r",
    "memory_bytes": "memory",
    "peft_layout": "PEFT layout",
    "share": "trained share",
    "trainable": "trained parameters",
    "total": "all parameters",
    "sites": "adapted modules",
    "longest": "longest record, tokens",
    "longest_uncut": "longest before cutting",
    "max_length": "limit, tokens",
    "rslora": "rsLoRA",
}


def facts(values: Mapping[str, Any]) -> str:
    """A table of labels and values, in the order of `values`."""
    return table((label(key), written(key, value)) for key, value in values.items())


def label(key: str) -> str:
    """The name of a key for readers, as HTML."""
    return escape(_LABELS.get(key, text.words(key)))


def written(key: str, value: Any) -> str:
    """The value of a key for readers, as HTML."""
    return escape(_READERS.get(key, text.plain)(value))


def table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of labels and values, both HTML."""
    body = "".join(f'<tr><th scope="row">{label}</th><td>{value}</td></tr>' for label, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def evaluations(run: Run) -> str:
    """The held-out measurements as numbers, folded."""
    if not run.evaluations:
        return ""
    is_classified = any(one.accuracy is not None for one in run.evaluations)
    is_regression = any(one.agreement for one in run.evaluations)
    head = ["step", "loss", *([] if is_regression else ["perplexity"]), *(["accuracy"] if is_classified else [])]
    head += ["mean absolute error", "Pearson", "Spearman"] if is_regression else []
    rows = [
        [
            f"{one.step:,}",
            text.loss(one.loss),
            *([] if is_regression else [text.rough(one.perplexity)]),
            *([text.percent(one.accuracy)] if is_classified else []),
            *([text.loss(one.agreement.get(name)) for name in AGREEMENT] if is_regression else []),
        ]
        for one in run.evaluations
    ]
    return f"""
<details><summary>Held-out measurements as numbers ({len(rows)})</summary>
{numbers(head, rows)}</details>"""


def numbers(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of columns with their names above, sorted on a click; all cells are HTML."""
    return columns.of_html(head, rows)


def _cells(values: Iterable[str], tag: str) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    return "".join(f"<{tag}{scope}>{value}</{tag}>" for value in values)


def settings(run: Run) -> str:
    """What the run was told, and what it made of it."""
    if not run.resolved and not run.config:
        return missing("Settings", "The run recorded no settings.")
    every = ""
    if run.config:
        every = f"""
<details><summary>All settings as given ({len(run.config)})</summary>{_exact(run.config)}</details>"""
    return section("Settings", (facts(run.resolved) if run.resolved else "") + every)


def _exact(values: Mapping[str, Any]) -> str:
    rows = ((f"<code>{escape(key)}</code>", escape(text.plain(value))) for key, value in values.items())
    return table(rows)


def environment(run: Run) -> str:
    """Where the run took place."""
    if not run.environment:
        return missing("Environment", "The run recorded nothing about its environment.")
    return section("Environment", facts(run.environment))


def history(run: Run) -> str:
    """The processes of the run and what they wrote."""
    rows = "".join(_process(process) for process in run.processes)
    last = run.saved[-1:] and run.saved[-1]
    adapter = None if run.end is None else run.end.adapter
    kept = ""
    if adapter is not None:
        kept = f"<p>The adapter is in <code>{escape(adapter)}</code>.</p>"
    elif last and last.path is not None:
        kept = f"<p>Last saved at step {last.step:,} in <code>{escape(last.path)}</code>.</p>"
    head = _cells(("began", "time", "steps", "end", "command"), "th")
    return section(
        "History",
        f'{kept}<div class="wide" tabindex="0"><table class="numbers history"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        kind="full",
    )


def _process(process: Process) -> str:
    began = text.NONE if process.began is None else f"{process.began:%Y-%m-%d %H:%M:%S}"
    end = "no end recorded" if process.end is None else process.end.status
    last = text.NONE if process.last_step is None else f"{process.last_step:,}"
    command = "" if process.command is None else f"<code>{escape(process.command)}</code>"
    span = f"{process.resumed_from_step:,} → {last}"
    return f"<tr>{_cells((began, text.duration(process.seconds), span, end, command), 'td')}</tr>"


def section(title: str, body: str, kind: str = "part") -> str:
    """A part of the page with its heading."""
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>'


def missing(title: str, why: str) -> str:
    """A part of the page of which nothing was recorded."""
    return section(title, f'<p class="fine">{why}</p>')
