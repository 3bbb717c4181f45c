"""What `suggest` says of models of all kinds, and that what it says can be attached and trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafit as lf
from lorafit.layers import Shape
from lorafit.looking import rank_for
from lorafit.suggestion import Fate


class Network(nn.Module):
    """Convolutions of all kinds, norms, and two linear layers; `early` is defined last and called first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.scale = nn.GroupNorm(4, 64)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)
        self.spare = nn.Linear(64, 64)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        x = F.relu(self.scale(self.grouped(self.depthwise(x)))).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


EXAMPLE = torch.zeros(2, 3, 8, 8)


def reasons(suggestion: lf.Suggestion, fate: Fate) -> dict[str, str]:
    return {path: row.why for row in suggestion.rows if row.fate is fate for path in row.paths}


def test_every_layer_has_its_fate_and_the_reason() -> None:
    suggestion = lf.suggest(Network(), example=EXAMPLE)
    assert suggestion.paths(Fate.ADAPTED) == ("stem", "grouped", "hidden")
    assert suggestion.paths(Fate.FULL) == ("head",)
    frozen = reasons(suggestion, Fate.FROZEN)
    assert frozen.keys() == {"norm", "depthwise", "scale", "spare"}
    assert "running statistics" in frozen["norm"] and "vectors" in frozen["scale"]
    assert "32, has 320 numbers, the weight itself 288" in frozen["depthwise"]
    assert "not called" in frozen["spare"]
    assert not suggestion.paths(Fate.REFUSED)


def test_ranks_are_within_the_weight_and_its_groups() -> None:
    suggestion = lf.suggest(Network(), example=EXAMPLE)
    # 32 × 27 has rank 27 at most, a quarter is 6; each group of 64 × 72 is 16 × 72, a quarter is 4, and 16 // 4 is too
    assert suggestion.method == lf.LoRA(r=16, alpha=32.0)
    assert suggestion.rank_pattern == {"^stem": 4}
    assert suggestion.alpha_pattern == {"^stem": 8.0}
    for out, inn, groups in [(8, 8, 1), (1, 4, 1), (64, 9, 64), (64, 72, 4), (10_000, 3, 1), (3, 10_000, 1)]:
        for most in (1, 3, 16, 64):
            rank = rank_for(Shape(out, inn, groups), most)
            assert rank % groups == 0 and 1 <= rank // groups <= min(out // groups, inn)
            assert rank <= max(most, groups)


@pytest.mark.parametrize(
    "method",
    [
        None,
        lf.LoRA(rslora=True),
        lf.DoRA(),
        lf.VeRA(r=32),
        lf.AdaLoRA(init_r=4, target_r=2),
        lf.LoRAFA(),
        lf.DeltaLoRA(),
    ],
    ids=["default", "rslora", "dora", "vera", "adalora", "lora-fa", "delta-lora"],
)
def test_what_is_suggested_is_attached_and_learns(method: lf.Method | None) -> None:
    model = Network()
    suggestion = lf.suggest(model, example=EXAMPLE, method=method)
    handle = suggestion.attach(model, seed=0)
    assert handle.num_trainable == suggestion.trained
    assert tuple(handle.sites) == suggestion.paths(Fate.ADAPTED) and tuple(handle.saved) == ("head",)
    assert suggestion.total == handle.num_total
    images, labels = torch.randn(40, 3, 8, 8), torch.arange(40) % 10
    optimizer = suggestion.optimizer(handle, torch.optim.AdamW, total_steps=8)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates <= {suggestion.rate, suggestion.full_rate} and suggestion.full_rate == 1e-3
    suggestion.train(model)
    before = model.norm.running_mean.clone()
    found = []
    for _ in range(8):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    assert torch.equal(model.norm.running_mean, before) and model.training and not model.norm.training


def test_a_suggestion_is_a_value_that_can_be_changed() -> None:
    model = Network()
    suggestion = dataclasses.replace(lf.suggest(model, example=EXAMPLE), modules_to_save=(), rate=1.0)
    handle = lf.attach(
        model, suggestion.method, suggestion.targets, rank_pattern=suggestion.rank_pattern, exclude=["hidden"]
    )
    assert tuple(handle.sites) == ("stem", "grouped") and handle.method_at("stem").r == 4


def test_the_table_can_be_read() -> None:
    text = str(lf.suggest(Network(), example=EXAMPLE))
    assert text.splitlines()[0].startswith("Network: ")
    header = text.splitlines()[2].split()
    assert header == ["layer", "weight", "layers", "what", "r", "trained", "why"]
    assert "64 × 72, 4 groups" in text and "32 × 27" in text
    assert "suggestion.train(model)" in text and "held-out loss decide" in text
    assert "no example" not in text and "no example was given" in str(lf.suggest(Network()))


def test_layers_alike_are_one_row() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    suggestion = lf.suggest(model)
    (row,) = suggestion.rows
    assert row.paths == tuple("012345") and row.rank == 8 and row.trained == 6 * 8 * 64


# Heads ------------------------------------------------------------------------


def test_the_head_is_the_last_to_be_called() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.into = nn.Linear(32, 4), nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.into(x))

    assert lf.suggest(Reversed()).modules_to_save == ()  # `into`, the last one, widens
    assert lf.suggest(Reversed(), example=torch.zeros(1, 16)).modules_to_save == ("out",)


@pytest.mark.parametrize(
    ("options", "saved"),
    [({}, ("head",)), ({"heads": ()}, ()), ({"heads": ["hidden"]}, ("hidden",)), ({"include": ["head"]}, ())],
    ids=["guessed", "none", "named", "adapted"],
)
def test_heads_can_be_overruled(options: dict[str, Any], saved: tuple[str, ...]) -> None:
    suggestion = lf.suggest(Network(), example=EXAMPLE, **options)
    assert suggestion.modules_to_save == saved
    handle = suggestion.attach(Network())
    assert tuple(handle.saved) == saved and handle.num_trainable == suggestion.trained


def test_a_head_that_cannot_be_named_alone_is_adapted() -> None:
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model = nn.Sequential(inner, nn.ReLU(), nn.Linear(32, 4))  # "2" is the end of "0.2", too
    suggestion = lf.suggest(model)
    assert suggestion.modules_to_save == ()
    assert set(suggestion.attach(model).sites) == {"0.0", "0.2", "2"}


def test_the_output_layer_of_a_language_model_and_embeddings_stay() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    suggestion = lf.suggest(model, example={"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    frozen = reasons(suggestion, Fate.FROZEN)
    assert "language model" in frozen["lm_head"] and "table of vectors" in frozen["model.embed_tokens"]
    assert set(suggestion.attach(model).sites) == set(lf.attach(model, lf.LoRA(r=2), name="all").sites)


# Budgets ----------------------------------------------------------------------


def test_a_budget_lowers_the_ranks() -> None:
    free = lf.suggest(Network(), example=EXAMPLE)
    head = 64 * 10 + 10
    for budget in (free.trained, free.trained - 1, (free.trained + head) // 2):
        suggestion = lf.suggest(Network(), budget, EXAMPLE)
        assert suggestion.trained <= budget
        assert suggestion.attach(Network()).num_trainable == suggestion.trained
    share = lf.suggest(Network(), 0.1, EXAMPLE)
    assert share.trained <= 0.1 * share.total
    assert f"at most {int(0.1 * share.total):,} numbers" in str(share)


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    with pytest.raises(lf.ConfigError, match="too small") as caught:
        lf.suggest(Network(), 100, EXAMPLE)
    least = int(str(caught.value.fix).partition("budget=")[2].partition(",")[0])
    assert "'head'" in str(caught.value.expected)
    assert lf.suggest(Network(), least, EXAMPLE).trained == least


@pytest.mark.parametrize("budget", [0, -1, True, 1.5, 0.0, "many"], ids=str)
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(lf.ConfigError, match="no budget"):
        lf.suggest(Network(), budget)


# What cannot be adapted, and wrong input ---------------------------------------


def test_what_cannot_be_adapted_is_told_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.recurrent = nn.LSTM(16, 16)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
            self.positions = nn.Parameter(torch.zeros(4, 16))
            self.plain = nn.Linear(16, 16)

    refused = reasons(lf.suggest(Odd()), Fate.REFUSED)
    assert "never calls its forward" in refused["attention.out_proj"]
    assert "no type that is known" in refused["recurrent"]
    assert "computed from other tensors" in refused["normed"]
    assert {"", "attention"} <= refused.keys()
    assert lf.suggest(Odd()).paths(Fate.ADAPTED) == ("plain",)


def test_included_layers_are_adapted_against_the_rules() -> None:
    suggestion = lf.suggest(Network(), example=EXAMPLE, include=["depthwise"])
    assert suggestion.rank_pattern["^depthwise"] == 32
    model = Network()
    assert suggestion.attach(model).method_at("depthwise").r == 32


def test_a_shared_weight_is_told() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    assert "another layer's" in str(lf.suggest(model))


def test_the_model_is_as_it_was() -> None:
    model = Network().train()
    model.head.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    model.hidden.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    lf.suggest(model, example=EXAMPLE)
    model.hidden._forward_hooks.clear()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training and not model.head.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: lf.suggest(Network(), example=torch.zeros(2, 5)), lf.ConfigError, "does not run on the example"),
        (lambda: lf.suggest(Network(), exclude=["stemm"]), lf.TargetError, "nearest:  stem"),
        (lambda: lf.suggest(Network(), heads=["haed"]), lf.TargetError, "modules_to_save"),
        (lambda: lf.suggest(Network(), r=0), lf.ConfigError, "out of range"),
        (lambda: lf.suggest(Network(), method=lf.LoRA), lf.ConfigError, "no method"),
        (lambda: lf.suggest(nn.Sequential(nn.ReLU())), lf.TargetError, "no layer is left"),
        (lambda: lf.suggest(torch.compile(nn.Linear(4, 4), backend="eager")), lf.TargetError, "compiled"),
    ],
    ids=["example", "exclude", "heads", "rank", "class", "nothing", "compiled"],
)
def test_wrong_input(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_why_no_layer_is_left_is_told_once_a_reason() -> None:
    with pytest.raises(lf.TargetError) as error:
        lf.suggest(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2))
    found = str(error.value.found)
    assert found.count("set_fastpath_enabled(False)") == found.count("never calls its forward") == 1
    assert "layers.1.linear1" in found


def test_an_adapted_model_can_get_another_suggestion() -> None:
    model = Network()
    lf.suggest(model, example=EXAMPLE, heads=()).attach(model, name="one")
    two = lf.suggest(model, example=EXAMPLE, heads=()).attach(model, name="two")
    assert two.active == ("two",)


def test_a_head_that_another_adapter_trains_is_counted_once() -> None:
    model = Network()
    lf.suggest(model, example=EXAMPLE).attach(model, name="one")
    suggestion = lf.suggest(model, example=EXAMPLE, heads=["head"])
    assert suggestion.attach(model, name="two").num_trainable == suggestion.trained


@pytest.mark.parametrize(
    "lazy", [nn.LazyLinear(32), nn.LazyBatchNorm1d(track_running_stats=False), nn.LazyBatchNorm1d()], ids=repr
)
def test_a_layer_without_a_shape_is_told(lazy: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(32, 32), lazy, nn.Linear(32, 32))
    suggestion = lf.suggest(model)
    assert suggestion.total == 2 * (32 * 32 + 32)
    if not isinstance(lazy, nn.LazyBatchNorm1d) or lazy.running_mean is None:
        assert "no shape yet" in reasons(suggestion, Fate.REFUSED)["1"]
    for call in (
        lambda: lf.suggest(model, example=torch.zeros(2, 32)),
        lambda: suggestion.attach(model),
        lambda: lf.attach(model, lf.LoRA(r=2), ["0"], exclude=["1"]),
    ):
        with pytest.raises(lf.TargetError, match="one example batch first"):
            call()
    assert all(parameter.requires_grad for parameter in model.parameters()) and type(model[1]) is type(lazy)
    model(torch.zeros(2, 32))
    assert lf.suggest(model, example=torch.zeros(2, 32)).attach(model).sites


class Odd(nn.Module):
    """Layers of many kinds that no rule adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.only = nn.Linear(16, 16), nn.Linear(16, 16)
        self.recurrent, self.norm = nn.LSTM(16, 16), nn.LayerNorm(16)
        self.box = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.only(self.plain(x)) if self.training else self.plain(x)


@pytest.mark.parametrize(
    ("include", "says"),
    [
        (["recurrent"], "no type that is known"),
        (["norm"], "vectors"),
        (["box"], "(?s)no weights of its own.*nearest:  box.0"),
        (["plain", "normed"], "(?s)computed from other tensors.*remove_parametrizations"),
        ("recurrent|plain", "no type that is known"),
        (["plane"], "nearest:  plain"),
    ],
    ids=["recurrent", "norm", "container", "weight-norm", "expression", "nothing"],
)
def test_what_is_included_must_be_a_layer_to_adapt(include: Any, says: str) -> None:
    with pytest.raises(lf.TargetError, match=says):
        lf.suggest(Odd(), include=include)


def test_what_is_included_must_suit_the_method() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv1d(6, 6, 1, groups=3))
    with pytest.raises(lf.TargetError, match="cannot be put on a layer to include"):
        lf.suggest(model, method=lf.AdaLoRA(init_r=4, target_r=2), include=["1"])
    assert lf.suggest(model, include=["1"]).paths(Fate.ADAPTED) == ("0", "1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"include": ["hidden"], "exclude": ["hidden"]}, "include and exclude"),
        ({"include": ["head"], "heads": ["head"]}, "include and heads"),
        ({"exclude": ["head"], "heads": ["head"]}, "heads and exclude"),
    ],
    ids=["exclude", "heads", "excluded-head"],
)
def test_contradictions_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(lf.ConfigError, match=f"(?s){says}.*'h(ead|idden)'"):
        lf.suggest(Network(), **options)


def test_what_is_called_in_training_alone_can_be_included() -> None:
    example = torch.zeros(2, 16)
    assert "in evaluation mode" in reasons(lf.suggest(Odd(), example=example), Fate.FROZEN)["only"]
    assert "only" in lf.suggest(Odd(), example=example, include=["only"]).paths(Fate.ADAPTED)


@pytest.mark.parametrize(
    ("model", "options", "fix"),
    [
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))), {}, "make it plain"),
        (nn.Sequential(nn.Linear(16, 16, device="meta")), {}, "load the weights"),
        (nn.Sequential(nn.Linear(16, 16).to(torch.float8_e4m3fn)), {}, "load the model in bfloat16"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), {}, r"include=\['0'\]"),
        (nn.Sequential(nn.Linear(16, 16)), {"exclude": ["0"]}, "a narrower exclude"),
        (nn.Sequential(nn.Linear(16, 16)), {"heads": ["0"]}, r"heads=\(\)"),
        (nn.Sequential(nn.ReLU()), {}, "a model with a layer"),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), {}, "call torch.backends.mha"),
    ],
    ids=["weight-norm", "meta", "float8", "depthwise", "excluded", "head", "nothing", "encoder"],
)
def test_why_no_layer_is_left_has_a_fix_that_holds(model: nn.Module, options: dict[str, Any], fix: str) -> None:
    with pytest.raises(lf.TargetError, match=f"(?s)no layer is left.*fix: +{fix}"):
        lf.suggest(model, **options)


@pytest.mark.parametrize("method", [lf.LoRA(rslora=True), lf.DoRA(lf.LoRA(rslora=True)), lf.LoRA()], ids=repr)
def test_all_ranks_have_one_scale(method: lf.Method) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 256), nn.Linear(256, 256))
    suggestion = lf.suggest(model, method=method, heads=())
    handle = suggestion.attach(model)
    ranks = {path: handle.method_at(path).settings()["r"] for path in handle.sites}
    assert len(set(ranks.values())) > 1
    assert all(handle.method_at(path).settings()["scale"] == pytest.approx(2.0) for path in handle.sites)
    times = "twice the square root" if method.settings()["rslora"] else "twice the rank"
    assert any(times in remark for remark in suggestion.remarks)
