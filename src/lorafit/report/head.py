"""The head of the page: what was trained, what came of it, what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from lorafit.report import document, text
from lorafit.report.records import Run
from lorafit.report.summary import Measure, Summary
from lorafit.report.text import escape

_STATUS: Final[Mapping[str, str]] = {
    "done": "done",
    "interrupted": "interrupted",
    "failed": "failed",
    "no end": "no end recorded",
}
AGREED: Final[Mapping[str, str]] = {
    "mean_absolute_error": "Mean absolute error",
    "pearson": "Pearson\N{RIGHT SINGLE QUOTATION MARK}s r",
    "spearman": "Spearman\N{RIGHT SINGLE QUOTATION MARK}s rho",
}
"""What is told of predicted numbers; each with its 95 % interval in brackets."""
_NOWHERE: Final = Measure(step=None, loss=None, perplexity=None, accuracy=None)


def told(values: Mapping[str, object], key: str) -> str | None:
    """The value of a settings mapping as text; None when it is null or missing."""
    value = values.get(key)
    return None if value is None else text.plain(value)


def title(run: Run) -> str:
    """A line that names the run, as plain text."""
    parts = [told(run.resolved, "model"), told(run.resolved, "method")]
    return " · ".join(part for part in parts if part) or "a run without settings"


def masthead(run: Run, summary: Summary) -> str:
    """Status, model, method, task and data."""
    kind = [told(run.resolved, "method"), told(run.resolved, "task"), told(run.data, "source")]
    return header(
        run,
        summary,
        over="lorafit training report",
        heading=told(run.resolved, "model") or "Model not recorded",
        kind=[part for part in kind if part],
        words=lead(run, summary),
    )


def header(run: Run, summary: Summary, *, over: str, heading: str, kind: Sequence[str], words: str) -> str:
    """The head of a run's page, with its status; all texts are plain.

    Args:
        run: the run.
        summary: its headline.
        over: what the page is.
        heading: what it is about.
        kind: what stands below that.
        words: the first paragraph.
    """
    status = _STATUS[summary.status]
    if summary.status != "done" and summary.last_step is not None:
        status += f" at step {summary.last_step:,}"
        if summary.planned_steps is not None:
            status += f" of {text.count(summary.planned_steps)}"
    began = run.processes[0].began
    moment = "" if began is None else f'<time datetime="{began.isoformat()}">{_moment(run)}</time>'
    message = None if run.end is None else run.end.message
    tone = summary.status.replace(" ", "-")
    return f"""
<header class="masthead">
  <p class="over">
    <span>{escape(over)}</span>{moment}<span class="status {tone}">{escape(status)}</span>
  </p>
  <h1>{escape(heading)}</h1>
  <p class="kind">{" · ".join(f"<span>{escape(part)}</span>" for part in kind)}</p>
  {document.lead(words)}
  {_message(message) if message else ""}
</header>"""


def lead(run: Run, summary: Summary) -> str:
    """What was trained on what, what it learnt, and the verdict, in plain language; empty for a run that tells nothing.

    What was not recorded is left out.
    """
    model, method = told(run.resolved, "model"), told(run.resolved, "method")
    sentences = []
    if model is not None:
        how = "" if method is None else f" by {method}"
        if summary.trainable is not None and summary.share is not None:
            how += f", which adjusts {text.percent(summary.share)} as many numbers as the model has"
        sentences.append(f"{model} was trained{_on(run, summary)}{how}.")
    if summary.before is not None and summary.after is not None and summary.change is not None:
        sentences.append(_learnt(run, summary))
    if run.verdict is not None:
        sentences.append(f"Verdict: {run.verdict.sentence.rstrip('.')}.")
    return " ".join(sentences)


def _on(run: Run, summary: Summary) -> str:
    """The data and the steps, as the end of "was trained"."""
    records, source = run.data.get("train_records"), told(run.data, "source")
    on = [f"{records:,} records" if type(records) is int else "", f"of {source}" if source is not None else ""]
    data = " ".join(part for part in on if part).removeprefix("of ")
    many = (
        "" if summary.last_step is None else f" for {summary.last_step:,} step{'' if summary.last_step == 1 else 's'}"
    )
    return (f" on {data}" if data else "") + many


def _learnt(run: Run, summary: Summary) -> str:
    """What became of the loss on records that were not trained on."""
    assert summary.before is not None and summary.after is not None and summary.change is not None
    records = run.data.get("eval_records")
    kept = f"On {records:,} records" if type(records) is int else "On records"
    before, after = text.loss(summary.before.loss), text.loss(summary.after.loss)
    if before == after:
        return f"{kept} that it was not trained on, the loss stayed at {after}."
    word = "fell" if summary.change < 0 else "rose"
    change = text.percent(abs(summary.change))
    sense = "it predicts them better than before" if summary.change < 0 else "it predicts them worse than before"
    return f"{kept} that it was not trained on, the loss {word} from {before} to {after}, by {change}: {sense}."


def _message(message: str) -> str:
    # Several lines are an error with aligned columns.
    kind = "message lines" if "\n" in message.strip() else "message"
    return f'<p class="{kind}">{escape(message)}</p>'


def _moment(run: Run) -> str:
    began = run.processes[0].began
    return "" if began is None else f"{began.day} {began:%B %Y, %H:%M} {began.tzname() or ''}".strip()


def remarks(run: Run) -> str:
    """What a reader should know of the records, if there is anything."""
    if not run.remarks:
        return ""
    rows = "".join(f"<li>{escape(remark)}</li>" for remark in run.remarks)
    return f'<aside class="remarks" aria-label="Remarks on the records"><ul>{rows}</ul></aside>'


def verdict(run: Run) -> str:
    """What became of the run, what to do about it, and which adapter was kept."""
    found = run.verdict
    if found is None:
        return ""
    kept = [] if found.kept is None else [f"The adapter of step {found.kept:,} was kept: its loss is the lowest."]
    rows = "".join(f"<li>{escape(each)}</li>" for each in [*map(_sentence, found.hints), *kept])
    return f"""
<section class="verdict" aria-label="Verdict" data-kind="{escape(found.kind)}">
  <h2>Verdict</h2>
  <p>{escape(_sentence(found.sentence))}</p>
  {f"<ul>{rows}</ul>" if rows else ""}
</section>"""


def _sentence(words: str) -> str:
    """Words that follow a label, as a sentence of their own."""
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith('.') else '.'}"


def headline(run: Run, summary: Summary) -> str:
    """The result in big numbers, and what it took."""
    time = []
    if summary.train_seconds is not None:
        time.append(f"{text.duration(summary.train_seconds)} of it training")
    if len(run.processes) > 1:
        time.append(f"{len(run.processes)} processes")
    trained = ""
    if summary.trainable is not None:
        trained = f"{text.count(summary.trainable)} of {text.count(summary.total)} parameters"
    return f"""
<section class="headline" aria-label="Result">
  {_result(summary)}
  <dl class="stats">
    {_stat("Time", text.duration(summary.seconds), ", ".join(time))}
    {_speed(summary)}
    {_memory(summary)}
    {_stat("Trained share", text.percent(summary.share), trained)}
  </dl>
</section>"""


def _memory(summary: Summary) -> str:
    """What was used at most where the run computed: of the accelerator, if it had one."""
    own = text.size(summary.peak_bytes)
    if summary.device_bytes is None:
        return _stat("Peak memory", own, "resident, whole process")
    beside = "" if summary.peak_bytes is None else f"; {own} resident"
    return _stat("Peak memory", text.size(summary.device_bytes), f"on the device{beside}")


def _speed(summary: Summary) -> str:
    """Tokens per second, or records where those were counted instead."""
    what, rate = "Tokens", summary.tokens_per_second
    if rate is None and summary.examples_per_second is not None:
        what, rate = "Examples", summary.examples_per_second
    return _stat(f"{what} per second", text.rough(rate), "median of the logged steps")


def _stat(label: str, value: str, fine: str) -> str:
    small = "" if value == text.NONE else f"<small>{escape(fine)}</small>"
    return f"<div><dt>{label}</dt><dd><b>{escape(value)}</b>{small}</dd></div>"


def _result(summary: Summary) -> str:
    if summary.before is None and summary.after is None:
        return """
<div class="result"><h2>Held-out loss</h2><p class="none">not measured</p>
<p class="fine">The run recorded no evaluation.</p></div>"""
    before, after = summary.before or _NOWHERE, summary.after or _NOWHERE
    change = ""
    if summary.change is not None:
        tone = "better" if summary.change < 0 else "worse" if summary.change > 0 else "same"
        change = f'<span class="change {tone}">{text.percent(summary.change, signed=True)}</span>'
    beside = ""
    if before.perplexity is not None or after.perplexity is not None:
        beside += _pair("Perplexity", text.rough(before.perplexity), text.rough(after.perplexity))
    if before.accuracy is not None or after.accuracy is not None:
        beside += _pair("Accuracy", text.percent(before.accuracy), text.percent(after.accuracy))
    for key, label in AGREED.items():
        if before.knows(key) or after.knows(key):
            beside += _pair(label, before.told(key), after.told(key))
    is_last = summary.status == "done"
    return f"""
<div class="result">
  <h2>Held-out loss {change}</h2>
  <p class="big">
    {_big(before, "before", "before")}
    <span class="arrow" aria-hidden="true">→</span>
    {_big(after, "after", "after" if is_last else "last measured")}
  </p>
  <dl class="beside">{beside}</dl>
</div>"""


def _big(measure: Measure, tone: str, label: str) -> str:
    if measure.loss is None:
        return f'<span class="end {tone}"><b>{text.NONE}</b><small>{label}: not measured</small></span>'
    step = "" if measure.step is None else f", step {measure.step:,}"
    return f'<span class="end {tone}"><b>{text.loss(measure.loss)}</b><small>{label}{step}</small></span>'


def _pair(label: str, before: str, after: str) -> str:
    arrow = '<span class="arrow" aria-label="to">→</span>'
    return f"<div><dt>{label}</dt><dd>{escape(before)} {arrow} {escape(after)}</dd></div>"
