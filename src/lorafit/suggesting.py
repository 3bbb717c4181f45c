"""Which layers of a model to adapt, at which ranks, and why: `suggest`.

The rules, and where they are from:

- Every layer that multiplies is adapted. In Dettmers et al. 2023 (arXiv:2305.14314) this, and not the rank, decided
  whether LoRA came up to full fine-tuning; Biderman et al. 2024 (arXiv:2405.09673) and Schulman and Thinking Machines
  Lab, "LoRA Without Regret" (2025) found the same.
- r is 16, LoRA's default here, but at most a quarter of the largest rank that the weight of one group can have, rounded
  down to a power of two: an adapter then has at most half as many numbers as its weight, r (in + out) ≤ in · out / 2.
  With groups it is a multiple of them.
- An adapter that has as many numbers as its weight, as every one of a depthwise convolution has, is not worth it.
- α = 2 r everywhere, and 2 √r for rsLoRA: the scale, and so the rate, is the same for all ranks.
- A head that narrows to few outputs is trained in full, as PEFT does with the classifiers of its sequence models: the
  outputs of a new task are none of the old one's.
- The rate is 10⁻³ times the method's own factor: ten times 10⁻⁴, which is common in full fine-tuning by Adam. That
  LoRA's best rate is about ten times that of full fine-tuning, at all ranks, is from the last two of the sources above.

They make a start. What is best for a task is told by the loss on held-out records.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorafit.errors import ConfigError
from lorafit.looking import RANK, Chosen, Look, numbers
from lorafit.method import Batch, Method
from lorafit.methods import validate
from lorafit.plan import check_model
from lorafit.suggestion import Suggestion, few
from lorafit.targets import Targets


def suggest(
    model: nn.Module,
    budget: int | float | None = None,
    example: Batch = None,
    *,
    method: Method | None = None,
    r: int = RANK,
    heads: Sequence[str] | None = None,
    include: Targets = (),
    exclude: Targets = (),
) -> Suggestion:
    """Looks at a model's layers, and says which to adapt, at which ranks, and why. The model stays as it is.

    Args:
        model: any PyTorch model.
        budget: how many numbers may be trained at most: a count, or a share of the model's (a float below 1). Ranks
            are halved until they fit.
        example: a batch as the model takes it: a mapping of keyword arguments, a tuple of arguments, or one tensor. A
            forward pass on it shows which layers are called, and which one last. None: all, in their order.
        method: another method than LoRA. Its rank and α are set here if its layers can have ranks of their own.
        r: the highest rank.
        heads: suffixes of modules to train in full, none for (). None: the last layer, if it has few outputs.
        include: layers to adapt although the rules would leave them out.
        exclude: layers to leave as they are.

    Raises:
        ConfigError: the budget is too small, an argument is none, or two say different things of a layer.
        TargetError: a pattern that matches nothing, a layer to include that cannot be adapted, nothing is left to
            adapt, or a layer has no shape before the example.
    """
    check_model(model, shaped=example is not None)
    validate.rank("suggest.r", r)
    if method is not None and not isinstance(method, Method):
        raise ConfigError(
            "this is no method",
            where="suggest.method",
            found=repr(method),
            expected="an instance of a method",
            fix="method=DoRA()",
        )
    look = Look(model, method, heads, include, exclude, example)
    most, total = r, numbers(model)
    limit = _limit(budget, total)
    chosen = look.choose(most)
    while limit is not None and look.trained(chosen) > limit and most > 1:
        most //= 2
        chosen = look.choose(most)
    _check_budget(look, chosen, limit)
    return look.suggestion(chosen, total, limit)


def _limit(budget: object, total: int) -> int | None:
    if budget is None:
        return None
    share = isinstance(budget, float) and 0 < budget < 1
    if not share and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ConfigError(
            "this is no budget",
            where="suggest.budget",
            found=repr(budget),
            expected="how many numbers may be trained: a whole number, or a share of the model's between 0 and 1",
            fix="budget=0.01, or budget=100_000",
        )
    assert isinstance(budget, int | float)
    return int(budget * total) if share else int(budget)


def _check_budget(look: Look, chosen: Chosen, limit: int | None) -> None:
    least = look.trained(chosen)
    if limit is None or least <= limit:
        return
    full = sum(look.in_full().values())
    beside = f", {full:,} of them trained in full ({few(list(look.saved))})" if full else ""
    raise ConfigError(
        "the budget is too small for adapters in all these layers",
        where="suggest.budget",
        found=f"{limit:,} numbers",
        expected=f"at least {least:,}, at the least ranks{beside}",
        fix=f"budget={least}, exclude=[...] for fewer layers, or method=VeRA(r=64), which trains two vectors a layer",
    )
