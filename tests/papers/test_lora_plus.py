"""LoRA+, Hayou et al. 2024, arXiv:2402.12354: B's own learning rate, the law that explains it, and its compositions."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.methods.adalora import AdaLoRA
from lorafit.methods.delta_lora import DeltaLoRA
from lorafit.methods.dora import DoRA
from lorafit.methods.intrinsic import IntrinsicDimension
from lorafit.methods.lora import LoRA
from lorafit.methods.lora_drop import LoRADrop
from lorafit.methods.lora_fa import LoRAFA
from lorafit.methods.lora_plus import LoRAPlus
from lorafit.methods.vera import VeRA

TARGETS = ["one", "two"]
LR = 0.01


def network(*, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(one=nn.Linear(6, 8), act=nn.Tanh(), two=nn.Linear(8, 5), head=nn.Linear(5, 3)))
    return model.to(dtype)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8) -> None:
    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def rates(handle: lf.Handle, lr: float = LR) -> dict[str, float]:
    """Parameter → its learning rate, as the method's groups give it."""
    names = {id(parameter): name for name, parameter in handle.named_parameters()}
    return {names[id(p)]: group["lr"] for group in handle.param_groups(lr) for p in group["params"]}


# The law of Adam --------------------------------------------------------------


def trained(method: lf.Method, lr: float = LR, *, p: float = 1.0, q: float = 1.0, ratio: float = 1.0) -> list[Tensor]:
    """ΔW of two layers after Adam from p A₀, with p times the method's own rate for A and q ratio times that for B."""
    model = network()
    handle = lf.attach(model, method, TARGETS, seed=1)
    groups = handle.param_groups(lr)
    ups = {id(handle.adapter(path).B) for path in TARGETS}
    split = []
    for group in groups:
        for parameter in group["params"]:
            factor = q * ratio if id(parameter) in ups else p
            split.append({**group, "params": [parameter], "lr": group["lr"] * factor})
    with torch.no_grad():
        for path in TARGETS:
            handle.adapter(path).A.mul_(p)
    # eps is not 0: A's first gradient is.
    run(model, handle.bind(torch.optim.Adam(split, eps=1e-30)), steps=12)
    return [handle.delta(path) for path in TARGETS]


LAW = {
    # (α, A₀, η, 2 η) is the reference; the rest are the same by the law, for LoRA, LoRA+ and rsLoRA.
    "lora, p": (LoRA(r=4, alpha=4.0), {"p": 2.0, "ratio": 2.0}),
    "lora, q": (LoRA(r=4, alpha=2.0), {"q": 4.0, "ratio": 2.0}),
    "lora, p and q": (LoRA(r=4, alpha=2.0), {"p": 0.5, "q": 8.0, "ratio": 2.0}),
    "lora, from below": (LoRA(r=4, alpha=32.0), {"p": 0.5, "q": 0.5, "ratio": 2.0}),
    "lora+": (LoRAPlus(r=4, alpha=8.0, ratio=2.0), {}),
    "lora+, p": (LoRAPlus(r=4, alpha=4.0, ratio=2.0), {"p": 2.0}),
    "lora+, q is the ratio": (LoRAPlus(r=4, alpha=2.0, ratio=8.0), {}),
    "lora+, below 1": (LoRAPlus(r=4, alpha=32.0, ratio=0.5), {}),
    "rslora, the same scale": (LoRA(r=4, alpha=4.0, rslora=True), {"ratio": 2.0}),
    "rslora, p": (LoRA(r=4, alpha=2.0, rslora=True), {"p": 2.0, "ratio": 2.0}),
    "rslora in lora+": (LoRAPlus(r=4, alpha=8.0, rslora=True, ratio=1.0), {}),
}


@pytest.mark.parametrize("case", LAW)
def test_the_reparametrisation_law_of_adam(case):
    """With B₀ = 0, eps → 0, no decay, no clipping: (α, A₀, η_A, η_B) ≡ (α / (p q), p A₀, p η_A, q η_B)."""
    expected = trained(LoRA(r=4, alpha=8.0), ratio=2.0)
    method, options = LAW[case]
    for ours, theirs in zip(trained(method, **options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert expected[0].abs().max() > 1e-2


@pytest.mark.parametrize("ratio", [0.25, 2.0, 4.0, 16.0])
def test_lora_plus_is_lora_of_a_larger_alpha_under_adam(ratio):
    """LoRA+(α, η, λ η) ≡ LoRA(λ α, η, η)."""
    found = trained(LoRAPlus(r=4, alpha=3.0, ratio=ratio))
    for ours, theirs in zip(found, trained(LoRA(r=4, alpha=3.0 * ratio)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0], trained(LoRA(r=4, alpha=3.0))[0], rtol=1e-2)


# The groups -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_ratio_1_is_the_plain_optimizer_bit_for_bit(kind):
    results = []
    for method in (LoRA(r=4), LoRAPlus(r=4, ratio=1.0), LoRAPlus(inner=LoRA(r=4), ratio=1)):
        model = network(dtype=torch.float32)
        handle = lf.attach(model, method, TARGETS, seed=1)
        optimizer = handle.optimizer(kind, lr=LR)
        assert [len(group["params"]) for group in optimizer.param_groups] == [4]
        run(model, optimizer)
        results.append([parameter.detach() for parameter in handle.parameters()])
    for plain, *others in zip(*results, strict=True):
        assert all(torch.equal(plain, other) for other in others)


def test_a_ratio_other_than_1_trains_otherwise():
    results = []
    for method in (LoRA(r=4), LoRAPlus(r=4)):
        model = network()
        handle = lf.attach(model, method, TARGETS, seed=1)
        run(model, handle.optimizer(torch.optim.AdamW, lr=LR))
        results.append(handle.delta("two"))
    assert not torch.allclose(*results, rtol=1e-2)


def test_it_is_one_step_of_sgd_with_two_rates():
    model = network()
    handle = lf.attach(model, LoRAPlus(r=4, ratio=3.0), TARGETS, seed=1)
    with torch.no_grad():
        for path in TARGETS:
            handle.adapter(path).B.normal_()
    before = {name: parameter.detach().clone() for name, parameter in handle.named_parameters()}
    run(model, handle.optimizer(torch.optim.SGD, lr=LR), steps=1)
    for name, parameter in handle.named_parameters():
        rate = 3.0 * LR if name.endswith("B") else LR
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)
        assert parameter.grad.any()


COMPOSITIONS: dict[str, tuple[LoRAPlus, str, tuple[str, ...]]] = {
    "lora": (LoRAPlus(r=4), "B", ("A",)),
    "lora inside": (LoRAPlus(inner=LoRA(r=4)), "B", ("A",)),
    "rslora": (LoRAPlus(r=4, rslora=True), "B", ("A",)),
    "pissa": (LoRAPlus(r=4, init="pissa"), "B", ("A",)),
    "dora": (LoRAPlus(inner=DoRA(inner=LoRA(r=4))), "inner.B", ("inner.A", "m")),
    "adalora": (LoRAPlus(inner=AdaLoRA(init_r=4, target_r=2, total_steps=20)), "P", ("Q", "lam")),
    "delta-lora": (LoRAPlus(inner=DeltaLoRA(r=4, start=2)), "B", ("A",)),
    "lora-drop": (LoRAPlus(inner=LoRADrop(inner=LoRA(r=4), keep=("one",))), "B", ("A",)),
    "lora-drop around dora": (
        LoRAPlus(inner=LoRADrop(inner=DoRA(inner=LoRA(r=4)), keep=("one", "two"))),
        "inner.B",
        ("inner.A", "m"),
    ),
    "dora around adalora": (
        LoRAPlus(inner=DoRA(inner=AdaLoRA(init_r=4, target_r=2, total_steps=20))),
        "inner.P",
        ("inner.Q", "inner.lam", "m"),
    ),
}


@pytest.mark.parametrize("case", COMPOSITIONS)
def test_b_alone_is_faster_and_the_groups_partition_what_is_trained(case):
    method, fast, slow = COMPOSITIONS[case]
    handle = lf.attach(network(), method, TARGETS, seed=1)
    groups = handle.param_groups(LR)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(parameter) for parameter in handle.parameters()}
    assert [group["lr"] for group in groups] == [LR, 4.0 * LR] and all(group["params"] for group in groups)
    assert rates(handle) == {
        f"{path}.{key}": 4.0 * LR if key == fast else LR for path in TARGETS for key in (fast, *slow)
    }


@pytest.mark.parametrize("case", COMPOSITIONS)
def test_compositions_train_as_the_inner_method_with_two_rates(case):
    method, fast, _ = COMPOSITIONS[case]
    deltas, counts = [], []
    for outer in (method, method.within):
        model = network()
        handle = lf.attach(model, outer, TARGETS, seed=1)
        counts.append(handle.num_trainable)
        if outer is method:
            optimizer = handle.optimizer(torch.optim.AdamW, lr=LR)
        else:
            groups = [
                {"params": [parameter], "lr": 4.0 * LR if name.endswith(f".{fast}") else LR}
                for name, parameter in handle.named_parameters()
            ]
            optimizer = handle.bind(torch.optim.AdamW(groups))
        run(model, optimizer)
        deltas.append([handle.delta(path) for path in TARGETS])
    for ours, theirs in zip(*deltas, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert ours.any()
    assert counts[0] == counts[1]


def test_the_adapters_are_those_of_the_inner_method():
    for method in (LoRAPlus(r=4, ratio=9.0), LoRAPlus(inner=LoRA(r=4))):
        ours, theirs = (lf.attach(network(), each, TARGETS, seed=1) for each in (method, LoRA(r=4)))
        for (name, left), (other, right) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other and torch.equal(left, right)
        assert method.num_trainable(ours.shapes()) == LoRA(r=4).num_trainable(ours.shapes())
        assert method.adapter_settings() == LoRA(r=4).adapter_settings()


def test_schedules_are_the_inner_methods():
    assert LoRAPlus(r=4).schedule({}) is None
    for inner in (AdaLoRA(init_r=4, target_r=2, total_steps=20), DeltaLoRA(r=4, start=2)):
        handle = lf.attach(network(), LoRAPlus(inner=inner), TARGETS, seed=1)
        adapters = {path: handle.adapter(path) for path in TARGETS}
        assert type(LoRAPlus(inner=inner).schedule(adapters)) is type(inner.schedule(adapters)) is not type(None)


def test_what_is_trained_in_full_keeps_the_plain_rate():
    handle = lf.attach(network(), LoRAPlus(r=4), TARGETS, modules_to_save=["head"], seed=1)
    assert rates(handle) == {
        **{f"{path}.{key}": rate for path in TARGETS for key, rate in (("A", LR), ("B", 4 * LR))},
        **{f"head.{key}": LR for key in ("weight", "bias")},
    }


class Unluckily(nn.Module):
    """A head whose parameters have the names of factors."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B, self.P = (nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.A + self.B + self.P)


@pytest.mark.parametrize(
    "method",
    [LoRAPlus(r=4), LoRAPlus(inner=AdaLoRA(init_r=4, target_r=2, total_steps=20)), LoRAPlus(r=4, ratio=1.0), LoRA(r=4)],
    ids=["lora", "adalora", "ratio 1", "no ratio"],
)
def test_what_is_trained_in_full_keeps_the_plain_rate_whatever_it_is_called(method):
    model = network()
    model.head = Unluckily()
    handle = lf.attach(model, method, TARGETS, modules_to_save=["head"], seed=1)
    found = rates(handle)
    assert {found[f"head.{key}"] for key in "ABP"} == {LR}
    groups = handle.param_groups(LR)
    assert len(groups) == len(set(found.values()))
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(parameter) for parameter in handle.parameters()}
    if len(groups) == 1:
        assert held == [id(parameter) for parameter in handle.parameters()]  # in the order of the plain optimizer


def test_what_is_trained_in_full_shares_no_options_that_a_method_gives_its_own():
    handle = lf.attach(network(), Optioned(r=4), TARGETS, modules_to_save=["head"], seed=1)
    first, second = handle.param_groups(LR)
    assert first["weight_decay"] == 0.5 and len(first["params"]) == 4
    assert second == {"params": list(handle.copies["head"].parameters()), "lr": LR}


class Optioned(LoRA):
    """LoRA with an option of the optimizer of its own."""

    def param_groups(self, named: Any, lr: float) -> list[dict[str, Any]]:
        return [{**group, "weight_decay": 0.5} for group in super().param_groups(named, lr)]


class Grouped(lf.Method):
    """A method with two groups of its own, one of them without a rate, to see them split."""

    name, paper, trains = "grouped", "none", "A, B"

    def adapter(self, spot: Any, *, generator: Any = None) -> lf.Adapter:
        raise AssertionError

    def num_trainable(self, shapes: Any) -> int:
        raise AssertionError

    def at(self, *, r: Any = None, alpha: Any = None) -> lf.Method:
        return self

    def adapter_settings(self) -> tuple[object, ...]:
        return ()

    def ups(self) -> tuple[str, ...]:
        return ("B",)

    def param_groups(self, named: Any, lr: float) -> list[dict[str, Any]]:
        first, *rest = [parameter for _, parameter in named]
        return [{"params": [first], "lr": 7.0, "weight_decay": 0.5}, {"params": rest, "betas": (0.5, 0.5)}]


def test_each_group_of_the_inner_method_is_split_and_keeps_its_options():
    a, b, m = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    groups = LoRAPlus(inner=Grouped(), ratio=2.0).param_groups([("x.B", b), ("x.A", a), ("BB.m", m)], 3.0)
    assert groups == [
        {"params": [b], "lr": 14.0, "weight_decay": 0.5},
        {"params": [a, m], "lr": 3.0, "betas": (0.5, 0.5)},
    ]


# Published code ---------------------------------------------------------------


def test_published_code_and_where_this_one_deviates():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.one, self.head = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.one(self.table(x)))

    config = LoraConfig(r=2, use_dora=True, target_modules=["table", "one"], modules_to_save=["head"])
    theirs = get_peft_model(Model(), config)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=4.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    published = {name: rate[id(parameter)] for name, parameter in theirs.named_parameters() if parameter.requires_grad}

    def found(*parts: str) -> float:
        [value] = {value for name, value in published.items() if all(part in name for part in parts)}
        return value

    method = LoRAPlus(inner=DoRA(inner=LoRA(r=2)))
    ours = rates(lf.attach(Model(), method, ["table", "one"], modules_to_save=["head"], seed=1))
    # The same: A and B of ordinary layers, and matrices of modules trained in full.
    assert found("one", "lora_A") == ours["one.inner.A"] == LR
    assert found("one", "lora_B") == ours["one.inner.B"] == 4 * LR
    assert found("head", "weight") == ours["head.weight"] == LR
    # Deviations: one-dimensional parameters, and embeddings.
    assert found("one", "magnitude") == found("table", "magnitude") == found("head", "bias") == 4 * LR
    assert ours["one.m"] == ours["table.m"] == ours["head.bias"] == LR
    assert found("table", "embedding_A") == found("table", "embedding_B") == 1e-6
    assert ours["table.inner.A"] == LR and ours["table.inner.B"] == 4 * LR


# Settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "parts"),
    [
        ({"ratio": 0}, "LoRAPlus.ratio", ["0", "greater than 0"]),
        ({"ratio": -4.0}, "LoRAPlus.ratio", ["-4.0"]),
        ({"ratio": math.inf}, "LoRAPlus.ratio", ["inf", "finite"]),
        ({"ratio": math.nan}, "LoRAPlus.ratio", ["nan"]),
        ({"ratio": "4"}, "LoRAPlus.ratio", ["'4'"]),
        ({"ratio": True}, "LoRAPlus.ratio", ["True"]),
        ({"ratio": None}, "LoRAPlus.ratio", ["None"]),
        ({"r": 0}, "LoRAPlus.r", ["0", "at least 1"]),
        ({"alpha": -1}, "LoRAPlus.alpha", ["-1"]),
        ({"dropout": 1.0}, "LoRAPlus.dropout", ["1.0"]),
        ({"rslora": 1}, "LoRAPlus.rslora", ["1"]),
        ({"init": "gausian"}, "LoRAPlus.init", ["'gausian'", "gaussian"]),
        ({"r": 4, "inner": LoRA()}, "LoRAPlus.r", ["r=4", "inner=LoRA(", "one of the two"]),
        ({"rslora": True, "alpha": 2.0, "inner": LoRA()}, "LoRAPlus.alpha", ["alpha=2.0, rslora=True"]),
        ({"inner": "lora"}, "LoRAPlus.inner", ["'lora'", "no method"]),
        ({"inner": LoRA}, "LoRAPlus.inner", ["no method"]),
        ({"inner": VeRA()}, "LoRAPlus.inner", ["around VeRA", "trains no matrix B"]),
        ({"inner": DoRA(inner=VeRA())}, "LoRAPlus.inner", ["around DoRA", "trains no matrix B"]),
        ({"inner": IntrinsicDimension()}, "LoRAPlus.inner", ["IntrinsicDimension", "trains no matrix B"]),
        ({"inner": LoRAFA()}, "LoRAPlus.inner", ["around LoRAFA", "A is frozen", "rename the learning rate"]),
        ({"inner": DoRA(inner=LoRAFA())}, "LoRAPlus.inner", ["around DoRA", "A is frozen"]),
        ({"inner": LoRAPlus()}, "LoRAPlus.inner", ["around LoRAPlus", "two ratios would multiply"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_out_of_range(options, where, parts):
    with pytest.raises(lf.ConfigError) as caught:
        LoRAPlus(**options)
    assert caught.value.where == where and caught.value.fix
    for part in parts:
        assert part in str(caught.value)


def test_defaults():
    method = LoRAPlus()
    assert method.ratio == 4.0 and method.inner is None and method.within == LoRA()
    assert list(method.settings()) == ["ratio", *LoRA().settings()] and method.settings()["ratio"] == 4.0
    around = LoRAPlus(inner=DoRA(inner=LoRA(r=4)), ratio=2.0)
    assert list(around.settings().items())[:3] == [("ratio", 2.0), ("inner", "dora around lora"), ("r", 4)]
    assert method.ups() == ("B",) and method.rate([]) == 1.0
    assert LoRAPlus(inner=AdaLoRA()).ups() == AdaLoRA().ups() == ("P",)
    for each in (method, around):
        assert pickle.loads(pickle.dumps(each)) == each and hash(each) == hash(pickle.loads(pickle.dumps(each)))
    with pytest.raises(FrozenInstanceError):
        method.ratio = 2.0


def test_rank_and_alpha_of_one_site():
    assert LoRAPlus(r=4, ratio=2.0).at(r=8) == LoRAPlus(r=8, ratio=2.0)
    assert LoRAPlus(r=4, dropout=0.1).at(alpha=3.0) == LoRAPlus(r=4, dropout=0.1, alpha=3.0)
    assert LoRAPlus(inner=DoRA(inner=LoRA(r=4)), ratio=2.0).at(r=8) == LoRAPlus(inner=DoRA(inner=LoRA(r=8)), ratio=2.0)
    handle = lf.attach(network(), LoRAPlus(r=4), TARGETS, rank_pattern={"two": 2}, alpha_pattern={"one": 3.0}, seed=1)
    assert handle.adapter("two").A.shape[0] == 2 and handle.adapter("one").A.shape[0] == 4
    assert handle.adapter("one").scale == 3 / 4
    assert set(rates(handle).values()) == {LR, 4 * LR}


def test_around_keeps_the_ratio():
    method = LoRAPlus(r=4, ratio=2.0)
    assert method.around(LoRA(r=2, alpha=5.0)) == LoRAPlus(r=2, alpha=5.0, ratio=2.0)
    assert method.around(DoRA()) == LoRAPlus(inner=DoRA(), ratio=2.0)
    assert LoRAPlus(inner=LoRA(r=4)).around(LoRA(r=2)) == LoRAPlus(inner=LoRA(r=2))
    with pytest.raises(lf.ConfigError, match="trains no matrix B"):
        method.around(VeRA())


def test_objections_of_the_inner_method_stay():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=4))
    with pytest.raises(lf.ConfigError, match="does not divide into its 4 groups"):
        lf.attach(model, LoRAPlus(r=6), ["0"])
    with pytest.raises(lf.ConfigError, match="larger than the layer"):
        lf.attach(network(), LoRAPlus(inner=LoRA(r=64)), TARGETS)
