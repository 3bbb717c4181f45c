"""The model card that goes beside an adapter."""

from __future__ import annotations

import json

from lorafit.peft_layout import Description


def model_card(description: Description) -> str:
    """README.md of an adapter: front matter as the hubs read it, what it is, and how to load it."""
    base = description.base_model
    front = ["---", "library_name: peft", "tags:", "- lora", "- lorafit"]
    if base is not None:
        front.insert(1, f"base_model: {json.dumps(base)}")
    settings = "\n".join(f"| {key} | {value} |" for key, value in description.method.settings().items())
    return f"""{chr(10).join(front)}
---

# {description.method.name} adapter

Adapts {len(description.sites)} layers of {f"`{base}`" if base else "its base model"}; trained with lorafit, in the
file layout of PEFT.

| setting | value |
|---|---|
{settings}

```python
import lorafit as lf
handle = lf.load(model, "this/folder")          # lorafit
```

```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "this/folder")   # PEFT
```
"""
