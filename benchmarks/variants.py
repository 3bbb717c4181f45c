"""What is compared: the model alone, each of our methods, and each that PEFT has, ready to take steps.

All adapters have alpha = 2 r and sit on the same layers; all but PEFT's LoRA-FA, which is an optimizer of its own, are
trained by `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.cases import SITES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    import lorafit as lf

RATE = 1e-4
RUN = 10_000
"""The steps that AdaLoRA is told the run has: it prunes at every tenth step from the first one on."""
NEVER = 10**9
QUARTER = 0.25

Batch = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        side: "base" (no adapter), "ours" or "peft".
        method: a name of the side's table.
        r: rank.
        dropout: on the adapter's input.
        sites: a name of `SITES`.
        fused: AdamW's fused kernel, or what the optimizer does by default.
        learnt: None for the model's own loss over all tokens; a share for lorafit's training loss with so many of
            the tokens learnt.
        together: layers that read the same input are computed as one (`Handle.fuse`), as `lorafit train` has them.
    """

    side: str
    method: str
    r: int = 16
    dropout: float = 0.0
    sites: str = "all"
    fused: bool = True
    learnt: float | None = None
    together: bool = True

    @property
    def targets(self) -> str | list[str]:
        """As both libraries take it."""
        return "all-linear" if self.sites == "all" else list(SITES[self.sites])


@dataclass
class Trainee:
    """A model that is ready to take steps.

    Attributes:
        model: what computes the loss.
        loss: of a batch.
        optimizer: None for the floor, which learns nothing.
        after: what the method wants after the optimizer's step.
    """

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer | None
    after: Callable[[], None] | None = None

    def step(self, batch: Batch) -> float:
        """Forward, loss, backward, optimizer, zero_grad; gives the loss."""
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            if self.after is not None:
                self.after()
            self.optimizer.zero_grad()
        return float(loss.detach())


def trainee(variant: Variant, model: nn.Module, seed: int) -> Trainee:
    """Puts what a variant says on a model of its own."""
    return SIDES[variant.side](variant, model, seed)


# Without adapters --------------------------------------------------------------


def _base(variant: Variant, model: nn.Module, seed: int) -> Trainee:
    return BASE[variant.method](variant, model)


def _floor(variant: Variant, model: nn.Module) -> Trainee:
    """Frozen, forward and the gradient of the input: what no adapter on every layer can go below."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    return Trainee(model, own_loss(model), None)


def _full(variant: Variant, model: nn.Module) -> Trainee:
    return Trainee(model, own_loss(model), adamw(model, variant))


BASE = {"floor": _floor, "full": _full}


def own_loss(model: nn.Module) -> Callable[[Batch], Tensor]:
    """The model's own: plain cross-entropy over every token."""
    return lambda batch: model(**batch).loss


def adamw(model: nn.Module, variant: Variant) -> torch.optim.Optimizer:
    """Over whatever is trained."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, **_fused(variant))


def _fused(variant: Variant) -> dict[str, Any]:
    return {"fused": True} if variant.fused else {}


# Ours ---------------------------------------------------------------------------


def _our_methods() -> dict[str, Callable[[Variant], lf.Method]]:
    import lorafit as lf

    return {
        "lora": lambda v: lf.LoRA(r=v.r, dropout=v.dropout),
        "lora-plus": lambda v: lf.LoRAPlus(r=v.r, dropout=v.dropout),
        "lora-fa": lambda v: lf.LoRAFA(r=v.r, dropout=v.dropout),
        "vera": lambda v: lf.VeRA(r=v.r, dropout=v.dropout),
        "adalora": lambda v: lf.AdaLoRA(
            init_r=v.r, target_r=_half(v.r), dropout=v.dropout, total_steps=RUN, warmup=0, final=1, interval=10
        ),
        "dora": lambda v: lf.DoRA(lf.LoRA(r=v.r, dropout=v.dropout)),
        "delta-lora": lambda v: lf.DeltaLoRA(r=v.r, start=1),
        "delta-lora waiting": lambda v: lf.DeltaLoRA(r=v.r, start=NEVER),
        "intrinsic": lambda v: lf.IntrinsicDimension(d=1000),
    }


def _half(r: int) -> int:
    return max(1, r // 2)


def _ours(variant: Variant, model: nn.Module, seed: int) -> Trainee:
    import torch

    import lorafit as lf

    loss = own_loss(model) if variant.learnt is None else train_loss(model, variant.learnt)
    method = _our_methods()[variant.method](variant)
    handle = lf.attach(model, method, targets=variant.targets, seed=seed)
    if variant.together:
        ids = torch.zeros(1, 8, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        handle.fuse(input_ids=ids)
    return Trainee(model, loss, handle.optimizer(torch.optim.AdamW, lr=RATE, **_fused(variant)))


def train_loss(model: nn.Module, learnt: float) -> Callable[[Batch], Tensor]:
    """What `lorafit train` minimises: logits for the learnt tokens alone, here the last share of each row."""
    from lorafit.training.loss import IGNORED, SupervisedLoss

    prepared = SupervisedLoss.prepare(model)

    def loss(batch: Batch) -> Tensor:
        labels = batch["labels"].clone()
        labels[:, : round(labels.shape[1] * (1 - learnt))] = IGNORED
        return prepared(model, {**batch, "labels": labels})

    return loss


# PEFT ---------------------------------------------------------------------------


def _their_configs() -> dict[str, Callable[[Variant, dict[str, Any]], Any]]:
    import peft

    def lora(v: Variant, common: dict[str, Any], **more: Any) -> Any:
        return peft.LoraConfig(r=v.r, lora_alpha=2 * v.r, lora_dropout=v.dropout, **common, **more)

    return {
        "lora": lora,
        "lora-fa": lora,
        "dora": lambda v, common: lora(v, common, use_dora=True),
        "vera": lambda v, common: peft.VeraConfig(r=v.r, vera_dropout=v.dropout, **common),
        "adalora": lambda v, common: peft.AdaLoraConfig(
            init_r=v.r,
            target_r=_half(v.r),
            lora_alpha=2 * v.r,
            lora_dropout=v.dropout,
            tinit=0,
            tfinal=1,
            deltaT=10,
            total_step=RUN,
            **common,
        ),
    }


def _theirs(variant: Variant, model: nn.Module, seed: int) -> Trainee:
    import peft
    import torch

    torch.manual_seed(seed)
    common = {"target_modules": variant.targets, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, _their_configs()[variant.method](variant, common))
    made = Trainee(wrapped, own_loss(wrapped), None)
    OPTIMIZERS.get(variant.method, _plainly)(made, wrapped, variant)
    return made


def _plainly(made: Trainee, wrapped: Any, variant: Variant) -> None:
    made.optimizer = adamw(wrapped, variant)


def _with_budget(made: Trainee, wrapped: Any, variant: Variant) -> None:
    """AdaLoRA: its budget is updated by a call after each step."""
    made.optimizer = adamw(wrapped, variant)
    steps = iter(range(RUN))
    made.after = lambda: wrapped.base_model.update_and_allocate(next(steps))


def _with_own_optimizer(made: Trainee, wrapped: Any, variant: Variant) -> None:
    """LoRA-FA: an optimizer of PEFT's own."""
    from peft.optimizers import create_lorafa_optimizer

    made.optimizer = create_lorafa_optimizer(wrapped, r=variant.r, lora_alpha=2 * variant.r, lr=RATE)


OPTIMIZERS = {"adalora": _with_budget, "lora-fa": _with_own_optimizer}
SIDES = {"base": _base, "ours": _ours, "peft": _theirs}

# Names ---------------------------------------------------------------------------

FLOOR = "floor"
PEFT = "peft "
"""What stands before the name of a variant that is PEFT's."""
ALIKE = ("lora", "lora-fa", "dora", "vera", "adalora")
"""The methods that both have."""
NO_DROPOUT = ("lora-fa",)


def _table() -> dict[str, Variant]:
    found = {FLOOR: Variant("base", "floor"), "full": Variant("base", "full")}
    methods = {
        "lora": Variant("ours", "lora"),
        "lora default optimizer": Variant("ours", "lora", fused=False),
        "lora dropout 0.05": Variant("ours", "lora", dropout=0.05),
        "lora dropout 0.1": Variant("ours", "lora", dropout=0.1),
        "lora-fa": Variant("ours", "lora-fa"),
        "dora": Variant("ours", "dora"),
        "dora dropout 0.05": Variant("ours", "dora", dropout=0.05),
        "vera r256": Variant("ours", "vera", r=256),
        "adalora": Variant("ours", "adalora"),
    }
    for name, ours in methods.items():
        found[name] = ours
        found[PEFT + name] = Variant("peft", ours.method, r=ours.r, dropout=ours.dropout, fused=ours.fused)
    found |= {
        "lora, each layer by itself": Variant("ours", "lora", together=False),
        "lora-plus": Variant("ours", "lora-plus"),
        "delta-lora waiting": Variant("ours", "delta-lora waiting"),
        "delta-lora": Variant("ours", "delta-lora"),
        "intrinsic": Variant("ours", "intrinsic"),
        "lora, lorafit train loss": Variant("ours", "lora", learnt=1.0),
        "lora, lorafit train loss, a quarter learnt": Variant("ours", "lora", learnt=QUARTER),
    }
    return found


VARIANTS = _table()
"""Name → variant, ours right before PEFT's."""
GROUPS = {
    "six": (tuple(name for name, each in VARIANTS.items() if each.learnt is None),),
    "smollm2": (
        ("full", "lora", "peft lora", "lora, lorafit train loss", "lora, lorafit train loss, a quarter learnt"),
        ("lora dropout 0.05", "peft lora dropout 0.05", "dora", "peft dora"),
        ("vera r256", "peft vera r256", "adalora", "peft adalora"),
        ("lora-fa", "peft lora-fa", "lora-plus", "delta-lora", "delta-lora waiting"),
    ),
    "tiny": (("full", "lora", "peft lora"),),
}
"""Case → the variants that share a process; the floor is in each."""
