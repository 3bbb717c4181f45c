"""The tables of the page: evaluations, data, settings, environment, history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from lorafit.report import text
from lorafit.report.records import Process, Run
from lorafit.report.text import escape

_Reader = Callable[[Any], str]


def _as_count(value: Any) -> str:
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
            "max_length",
            "dropped",
        ),
        _as_count,
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
    "max_length": "limit, tokens",
    "rslora": "rsLoRA",
}


def facts(values: Mapping[str, Any]) -> str:
    """A table of labels and values, in the order of `values`."""
    return _table((_label(key), escape(_READERS.get(key, text.plain)(value))) for key, value in values.items())


def _label(key: str) -> str:
    return escape(_LABELS.get(key, text.words(key)))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{label}</th><td>{value}</td></tr>' for label, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def evaluations(run: Run) -> str:
    """The held-out measurements as numbers, folded."""
    if not run.evaluations:
        return ""
    is_classified = any(one.accuracy is not None for one in run.evaluations)
    head = ["step", "loss", "perplexity", *(["accuracy"] if is_classified else [])]
    rows = [
        [
            f"{one.step:,}",
            text.loss(one.loss),
            text.rough(one.perplexity),
            *([text.percent(one.accuracy)] if is_classified else []),
        ]
        for one in run.evaluations
    ]
    return f"""
<details><summary>Held-out measurements as numbers ({len(rows)})</summary>
<div class="wide" tabindex="0"><table class="numbers"><thead><tr>{_cells(head, "th")}</tr></thead>
<tbody>{"".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)}</tbody></table></div></details>"""


def _cells(values: Iterable[str], tag: str) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    return "".join(f"<{tag}{scope}>{value}</{tag}>" for value in values)


def data(run: Run) -> str:
    """What was learned from; what was cut or left out is told in words."""
    if not run.data:
        return _missing("Data", "The run recorded nothing about its data.")
    values = dict(run.data)
    cut, dropped = values.pop("truncated", None), values.pop("dropped", None)
    rows = [(_label(key), escape(_READERS.get(key, text.plain)(value))) for key, value in values.items()]
    rows.append(("truncated", _cut(cut, values)))
    rows.append(("dropped", _mark(dropped, f"{_as_count(dropped)} records" if dropped != 1 else "1 record")))
    return _section("Data", _trained_tokens(values) + _table(rows))


def _cut(count: Any, values: Mapping[str, Any]) -> str:
    """How many records were cut, by which limit."""
    limit, longest = values.get("max_length"), values.get("longest")
    told = f"{_as_count(count)} {'record' if count == 1 else 'records'}"
    if limit is not None:
        told += f" cut to {_as_count(limit)} tokens"
    if longest is not None:
        told += f"; the longest has {_as_count(longest)}"
    return _mark(count, told)


def _mark(count: Any, told: str) -> str:
    """`told` with emphasis when `count` is not zero; nothing is made of a count that was not recorded."""
    if count is None:
        return "not recorded"
    return "none" if count == 0 else f'<strong class="warn">{escape(told)}</strong>'


def _trained_tokens(values: Mapping[str, Any]) -> str:
    trained, every = values.get("train_supervised_tokens"), values.get("train_tokens")
    if type(trained) is not int or type(every) is not int or not 0 <= trained <= every or every == 0:
        return ""
    share = trained / every
    return f"""
<div class="bar" aria-hidden="true"><span style="width:{100 * share:.2f}%"></span></div>
<p class="fine">The loss is computed on {text.percent(share)} of the training tokens:
{trained:,} of {every:,}.</p>"""


def settings(run: Run) -> str:
    """What the run was told, and what it made of it."""
    if not run.resolved and not run.config:
        return _missing("Settings", "The run recorded no settings.")
    every = ""
    if run.config:
        every = f"""
<details><summary>All settings as given ({len(run.config)})</summary>{_exact(run.config)}</details>"""
    return _section("Settings", (facts(run.resolved) if run.resolved else "") + every)


def _exact(values: Mapping[str, Any]) -> str:
    rows = ((f"<code>{escape(key)}</code>", escape(text.plain(value))) for key, value in values.items())
    return _table(rows)


def environment(run: Run) -> str:
    """Where the run took place."""
    if not run.environment:
        return _missing("Environment", "The run recorded nothing about its environment.")
    return _section("Environment", facts(run.environment))


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
    return _section(
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


def _section(title: str, body: str, kind: str = "part") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>'


def _missing(title: str, why: str) -> str:
    return _section(title, f'<p class="fine">{why}</p>')
