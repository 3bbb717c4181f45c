"""The model card that goes beside an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorafit.layouts import LORAFIT, PAIRS, layout_for
from lorafit.peft_layout import Description

UNKNOWN = "unknown"


def model_card(description: Description) -> str:
    """README.md of an adapter: front matter as the hubs read it, what it is, and how to load it."""
    return _card(
        base=description.base_model,
        tags=tuple(dict.fromkeys(("lora", "lorafit", description.method.name))),
        title=f"{description.method.name} adapter",
        sites=len(description.sites),
        settings=description.method.settings(),
        peft=layout_for(description) not in (LORAFIT, PAIRS),
    )


def plain_card(config: Mapping[str, Any]) -> str:
    """README.md of an adapter that was made plain LoRA, from its config; it says how far that is from the original."""
    names = ("r", "lora_alpha", "use_rslora", "lora_dropout")
    settings: dict[str, object] = {name: config.get(name) for name in names}
    converted = (config.get("lorafit") or {}).get("converted")
    if converted is not None:
        settings["made from"] = converted["from"].get("method", converted["from"].get("peft_type"))
        settings["relative error of the change"] = f"{converted['error']:.3g}"
    return _card(
        base=config.get("base_model_name_or_path"),
        tags=("lora", "lorafit"),
        title="lora adapter",
        sites=None,
        settings=settings,
        peft=True,
    )


def _card(
    *,
    base: str | None,
    tags: tuple[str, ...],
    title: str,
    sites: int | None,
    settings: Mapping[str, object],
    peft: bool,
) -> str:
    front = ["---", *([] if base is None else [f"base_model: {json.dumps(base)}"])]
    front += [f"library_name: {'peft' if peft else 'lorafit'}", "tags:", *(f"- {tag}" for tag in tags), "---"]
    layers = "layers" if sites is None else f"{sites} layers"
    layout = "in the file layout of PEFT" if peft else "in lorafit's own file layout, which PEFT does not read"
    rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    text = f"""{chr(10).join(front)}

# {title}

Adapts {layers} of {f"`{base}`" if base else "its base model"}; trained with lorafit, {layout}.

| setting | value |
|---|---|
{rows}

```python
import lorafit as lf
handle = lf.load(model, "this/folder")          # lorafit
```
"""
    if peft:
        text += """
```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "this/folder")   # PEFT
```
"""
    return text


def export_card(
    *,
    title: str,
    base: str | None,
    licence: str,
    tags: tuple[str, ...],
    facts: Mapping[str, object],
    settings: Mapping[str, object],
    scores: Mapping[str, object],
    use: str,
) -> str:
    """README.md of an export: where it comes from, what it scored, under which licences, and how it is used.

    Args:
        title: what it is.
        base: the base model's name, if it is known.
        licence: of the base, or "unknown".
        tags: for hubs.
        facts: base, data, and their licences.
        settings: of the run that made the adapter; empty where it is not known.
        scores: of that run.
        use: a command or a piece of Python.
    """
    front = ["---", *([] if base is None else [f"base_model: {json.dumps(base)}"])]
    front += [f"license: {licence}"] if licence != UNKNOWN else []
    front += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    parts = ["\n".join(front), f"# {title}", _rows("fact", facts)]
    for name, rows in (("setting", settings), ("score", scores)):
        parts.append(_rows(name, rows) if rows else f"The {name}s are unknown: the adapter lies in no run's folder.")
    return "\n\n".join([*parts, use]) + "\n"


def _rows(name: str, rows: Mapping[str, object]) -> str:
    cells = (f"| {key} | {str(value).replace('|', ' ').replace(chr(10), ' ')} |" for key, value in rows.items())
    return "\n".join([f"| {name} | |", "|---|---|", *cells])
