"""Less memory for some more work: what is computed again in the backward pass instead of being kept.

`cheap` recomputes outputs of norms and activations (`recompute_cheap`): near half of the memory of activations, for a
few hundredths more time. `blocks` recomputes whole decoder layers (the trainer's gradient checkpointing): less than a
tenth of that memory, for near half more time. It must not begin at the embeddings where nothing there is trained:
`FrozenInputs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, final

from transformers import PreTrainedModel, TrainerCallback

from lorafit.errors import ConfigError

Recompute = Literal["none", "cheap", "blocks"]

SWITCHES = ("activation_checkpointing", "gradient_checkpointing")
"""The trainer's switch for blocks: its new name, and the one that everybody knows."""
REENTRANT = "use_reentrant"


@final
class FrozenInputs(TrainerCallback):
    """Lets the backward pass end at the lowest adapter.

    With gradient checkpointing, transformers makes the embeddings' output require a gradient, for the reentrant kind of
    checkpoint, which sees nothing else. The other kind needs none, and then nothing is kept or differentiated below.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if isinstance(model, PreTrainedModel):
            model.disable_input_require_grads()


def checkpointing(recompute: Recompute, training: Mapping[str, Any], *, compiles: bool = False) -> dict[str, Any]:
    """The trainer's arguments with checkpoints as `recompute` wants them, never of the reentrant kind.

    Args:
        recompute: the setting.
        training: the trainer's arguments as given.
        compiles: whether layers are compiled.

    Raises:
        ConfigError: the settings contradict one another.
    """
    if recompute == "cheap" and compiles:
        raise ConfigError(
            "compiled layers recompute what is cheap by themselves",
            found="recompute='cheap' and compile=True",
            expected="one of them",
            fix="leave recompute out",
        )
    options = dict(training)
    given = next((name for name in SWITCHES if options.get(name) is not None), None)
    if given is not None and bool(options[given]) != (recompute == "blocks") and recompute != "none":
        raise ConfigError(
            f"recompute and {given} contradict one another",
            found=f"recompute={recompute!r}, {given}={options[given]!r}",
            expected=f"recompute alone; {given} is recompute='blocks'",
            fix=f"remove {given}",
        )
    if recompute == "blocks":
        options[given or SWITCHES[1]] = True
    for switch in SWITCHES:
        name = f"{switch}_kwargs"
        if options.get(switch) or options.get(name):
            options[name] = _not_reentrant(name, options.get(name))
    return options


def _not_reentrant(name: str, given: Any) -> Any:
    if isinstance(given, str):
        with suppress(json.JSONDecodeError):
            given = json.loads(given)
    if given is not None and not isinstance(given, Mapping):
        return given  # what the trainer will refuse
    if given and given.get(REENTRANT):
        raise ConfigError(
            "reentrant checkpoints do not go with adapters: they see no gradient where the inputs are frozen",
            where=f"{name}.{REENTRANT}",
            found=True,
            expected=False,
            fix=f"remove {REENTRANT}",
        )
    return {**(given or {}), REENTRANT: False}
