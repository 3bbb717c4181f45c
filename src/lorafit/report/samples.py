"""The same prompts before and after the training, beside their references."""

from __future__ import annotations

from lorafit.report.records import Pair, Run
from lorafit.report.text import NONE, escape, visible


def samples(run: Run) -> str:
    """All samples of the run, one card each."""
    if not run.pairs:
        return """
<section class="full"><h2>Samples</h2>
<p class="fine">The run recorded no samples.</p></section>"""
    count = f'<span class="count">{len(run.pairs)}</span>'
    cards = "".join(_card(pair, number) for number, pair in enumerate(run.pairs, start=1))
    return f'<section class="full"><h2>Samples {count}</h2>{cards}</section>'


def _card(pair: Pair, number: int) -> str:
    columns = [
        _column("before", "Before", pair.before, pair.gold),
        _column("after", "After", pair.after, pair.gold),
    ]
    if pair.gold is not None:
        columns.append(_column("gold", "Reference", pair.gold, None))
    return f"""
<article class="sample" aria-label="Sample {number}">
  <div class="prompt"><h3>Prompt</h3>{_text(pair.prompt, "prompt")}</div>
  <div class="outputs of-{len(columns)}">{"".join(columns)}</div>
</article>"""


def _column(kind: str, label: str, output: str | None, gold: str | None) -> str:
    if output is None:
        return f'<div class="output {kind}"><h3>{label}</h3><p class="fine">{NONE} not recorded</p></div>'
    is_same = gold is not None and output.strip() == gold.strip()
    badge = '<span class="same">equals the reference</span>' if is_same else ""
    return f'<div class="output {kind}"><h3>{label} {badge}</h3>{_text(output, label.lower())}</div>'


def _text(value: str, label: str) -> str:
    if not visible(value):
        return '<p class="fine">(empty)</p>'
    # A long text scrolls in its box, so the box takes the keyboard's focus; `dir` lets a text run its way.
    return f'<div class="text" dir="auto" tabindex="0" role="group" aria-label="{label}">{escape(value)}</div>'
