"""The part of the page on the data; what was cut or left out is told in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafit.report import text
from lorafit.report.records import Run
from lorafit.report.tables import as_count, label, missing, section, table, written
from lorafit.report.text import escape

PLACES = "_at"
"""The ending of a key that lists places of what the key without it counts."""


def data(run: Run) -> str:
    """What was learned from, and what was not."""
    if not run.data:
        return missing("Data", "The run recorded nothing about its data.")
    values = dict(run.data)
    counted = [key for key in values if key + PLACES in values]
    lost = list(dict.fromkeys([*counted, "truncated", "dropped"]))
    rest = {key: value for key, value in values.items() if key.removesuffix(PLACES) not in lost}
    rows = [(label(key), written(key, value)) for key, value in rest.items()]
    rows += [(label(key), _lost(key, values)) for key in lost]
    return section("Data", _trained_tokens(values) + table(rows))


def _lost(key: str, values: Mapping[str, Any]) -> str:
    """How many records were lost, with emphasis, and where; nothing is made of a count that was not recorded."""
    count, places = values.get(key), values.get(key + PLACES) or []
    if count is None:
        return "not recorded"
    if count == 0 and not places:
        return "none"
    told = f"{as_count(count)} {'record' if count == 1 else 'records'}"
    if key == "truncated":
        told += _cut(values)
    where = f"<small>{_places(count, places)}</small>" if places else ""
    return f'<strong class="warn">{escape(told)}</strong>{where}'


def _cut(values: Mapping[str, Any]) -> str:
    limit, longest = values.get("max_length"), values.get("longest_uncut", values.get("longest"))
    if type(limit) is not int:
        return ""
    told = f" cut to {limit:,} tokens"
    return f"{told}; the longest has {longest:,}" if type(longest) is int and longest > limit else told


def _places(count: Any, places: Any) -> str:
    if not isinstance(places, list):
        return escape(text.plain(places))
    told = ", ".join(escape(text.plain(place)) for place in places)
    left = count - len(places) if type(count) is int else 0
    return f"{told} and {left:,} more" if left > 0 else told


def _trained_tokens(values: Mapping[str, Any]) -> str:
    trained, every = values.get("train_supervised_tokens"), values.get("train_tokens")
    if type(trained) is not int or type(every) is not int or not 0 <= trained <= every or every == 0:
        return ""
    share = trained / every
    return f"""
<div class="bar" aria-hidden="true"><span style="width:{100 * share:.2f}%"></span></div>
<p class="fine">The loss is computed on {text.percent(share)} of the training tokens:
{trained:,} of {every:,}.</p>"""
