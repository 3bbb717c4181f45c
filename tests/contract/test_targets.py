"""From patterns to layers: what `attach` adapts, with which rank and alpha, and what it says when it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.up = Conv1D(16, 8)
        self.down = Conv1D(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(self.q_proj(x) * self.k_proj(x)))))


class Language(nn.Module):
    """A model that names its output layer as those of transformers do."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        # Contiguous: torch multiplies strided inputs in another order where a factor needs a gradient.
        x = self.conv(self.embed(ids).mT).mT.contiguous()
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


LINEAR = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "k_proj", "up", "down")]


def assert_untouched(model: nn.Module, keys: list[str]) -> None:
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not [module for module in model.modules() if "[" in type(module).__name__]
    assert "_lorafit" not in vars(model)


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", (), LINEAR),
        ("all-linear", ["up", "1.q_proj"], [p for p in LINEAR if not p.endswith(".up") and p != "layers.1.q_proj"]),
        ("all-linear", r"layers\.0\..*", LINEAR[4:]),
        (["q_proj"], (), ["layers.0.q_proj", "layers.1.q_proj"]),
        (["down", "embed"], (), ["embed", "layers.0.down", "layers.1.down"]),
        (["layers.1.up"], (), ["layers.1.up"]),
        (r".*_proj|head", (), [*[p for p in LINEAR if "_proj" in p], "head"]),
        (r"layers\.1.*", ["norm"], LINEAR[4:]),
        (["embed", "conv", "head"], (), ["embed", "conv", "head"]),
        ({"q_proj", "k_proj"}, (), [p for p in LINEAR if "_proj" in p]),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_what_is_adapted(targets, exclude, expected):
    handle = lf.attach(Language(), lf.LoRA(r=2), targets, exclude=exclude)
    assert list(handle.sites) == expected
    assert [path for path, module in handle.model.named_modules() if path and type(module).__name__[:5] == "Adapt"] == [
        path for path, _ in handle.model.named_modules() if path in expected
    ]


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"targets": ["q_prj"]}, lf.TargetError, ["targets matches no module", "'q_prj'", "q_proj"]),
        ({"targets": ["q_proj", "v_proj"]}, lf.TargetError, ["'v_proj'"]),
        ({"targets": "q_proj"}, lf.TargetError, ["whole path", "targets=['q_proj']"]),
        ({"targets": []}, lf.TargetError, ["no layer is left", "targets=[]"]),
        ({"targets": ["norm"]}, lf.TargetError, ["cannot be adapted", "LayerNorm", "layers.0.norm", "exclude="]),
        ({"exclude": ["norn"]}, lf.TargetError, ["exclude matches no module", "'norn'"]),
        ({"exclude": ".*"}, lf.TargetError, ["no layer is left", "exclude='.*'"]),
        ({"rank_pattern": {"v_proj": 1}}, lf.TargetError, ["rank_pattern matches no module", "'v_proj'", "k_proj"]),
        ({"rank_pattern": {"head": 1}}, lf.TargetError, ["rank_pattern matches no module", "'head'"]),
        ({"alpha_pattern": {"(": 1}}, lf.TargetError, ["alpha_pattern is not a regular expression", "'('"]),
        ({"rank_pattern": {"q_proj": 0}}, lf.ConfigError, ["rank", "0", "at least 1"]),
        (
            {"rank_pattern": {"q_proj": 9}},
            lf.ConfigError,
            ["layers.0.q_proj", "r = 9 is larger", "(8 × 8)", "rank_pat"],
        ),
        ({"rank_pattern": {0: 2}}, lf.ConfigError, ["key of rank_pattern must be text", "0 of type int", "={'0': 2}"]),
        ({"alpha_pattern": {None: 2}}, lf.ConfigError, ["key of alpha_pattern must be text", "NoneType"]),
        ({"alpha_pattern": {b"q_proj": 2}}, lf.ConfigError, ["key of alpha_pattern must be text", "bytes"]),
        ({"rank_pattern": [("q_proj", 2)]}, lf.ConfigError, ["rank_pattern must be a mapping", "path pattern"]),
        ({"alpha_pattern": {"q_proj": -1}}, lf.ConfigError, ["alpha", "-1", "greater than 0"]),
        ({"method": lf.LoRA(r=9)}, lf.ConfigError, ["layers.0.q_proj", "r = 9 is larger than the layer", "rank 8"]),
        ({"method": lf.LoRA}, lf.ConfigError, ["this is no method", "LoRA(r=16)"]),
        ({"method": "lora"}, lf.ConfigError, ["this is no method", "'lora'"]),
        ({"name": ""}, lf.ConfigError, ["cannot be an adapter's name", "''"]),
        ({"name": "a.b"}, lf.ConfigError, ["cannot be an adapter's name", "'a.b'"]),
        ({"name": "a/b"}, lf.ConfigError, ["cannot be an adapter's name", "'a/b'"]),
        ({"name": "a\0b"}, lf.ConfigError, ["cannot be an adapter's name", "printable"]),
        ({"name": " a"}, lf.ConfigError, ["cannot be an adapter's name", "' a'"]),
        ({"name": "-a"}, lf.ConfigError, ["cannot be an adapter's name", "'-a'"]),
        ({"name": 3}, lf.ConfigError, ["cannot be an adapter's name", "3"]),
        ({"name": "train"}, lf.ConfigError, ["cannot be an adapter's name", "'train'", "train_adapter"]),
        ({"name": "acting"}, lf.ConfigError, ["cannot be an adapter's name", "'acting'"]),
    ],
    ids=lambda value: (
        "-".join(f"{key}={getattr(item, 'r', item)}" for key, item in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_refusals_say_what_is_wrong_and_leave_the_model_alone(options, kind, parts):
    model = Language()
    keys, values = list(model.state_dict()), [value.clone() for value in model.state_dict().values()]
    options = dict(options)
    with pytest.raises(kind) as caught:
        lf.attach(model, options.pop("method", lf.LoRA(r=2)), **options)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.fix
    assert_untouched(model, keys)
    assert all(torch.equal(a, b) for a, b in zip(values, model.state_dict().values(), strict=True))


def test_a_refused_second_adapter_leaves_the_first_as_it_is(fill):
    model = Language().eval()
    handle = lf.attach(model, lf.LoRA(r=2))
    fill(handle)
    ids = torch.arange(10).view(2, 5)
    y, keys = model(ids), list(model.state_dict())
    for options in ({"name": "default"}, {"name": "b", "targets": ["nix"]}, {"name": "b", "rank_pattern": {"up": 99}}):
        with pytest.raises(lf.LorafitError) as caught:
            lf.attach(model, lf.LoRA(r=2), **options)
        assert caught.value.fix
    assert torch.equal(model(ids), y) and list(model.state_dict()) == keys and handle.active == ("default",)
    with pytest.raises(lf.ConfigError, match="has an adapter of this name already"):
        lf.attach(model, lf.LoRA(r=2))


def test_rank_and_alpha_patterns(fill, tmp_path):
    model = Language().eval()
    handle = lf.attach(
        model,
        lf.LoRA(r=2, alpha=6),
        rank_pattern={r"layers\.0\.q_proj": 4, "q_proj": 1, "up": 5},
        alpha_pattern={"1.q_proj": 3, "up": 2.5},
    )
    ranks = {path: handle.adapter(path).A.shape[0] for path in handle.sites}
    first = {"layers.0.q_proj": 4, "layers.1.q_proj": 1, "layers.0.up": 5, "layers.1.up": 5}
    assert ranks == {path: first.get(path, 2) for path in LINEAR}
    scales = {path: handle.adapter(path).scale for path in handle.sites}
    assert scales["layers.0.q_proj"] == 6 / 4  # alpha is the method's where no pattern says otherwise
    assert scales["layers.1.q_proj"] == 3 / 1
    assert scales["layers.0.up"] == scales["layers.1.up"] == 2.5 / 5
    assert scales["layers.0.k_proj"] == 6 / 2
    assert handle.method_at("layers.0.q_proj").r == 4
    assert handle.num_trainable == sum(
        handle.method_at(path).num_trainable([site.shape]) for path, site in handle.sites.items()
    )
    fill(handle)
    ids = torch.arange(10).view(2, 5)
    y = model(ids)
    handle.save(tmp_path)
    handle.detach()
    again = lf.load(model, tmp_path)
    assert torch.equal(model(ids), y)
    assert {path: again.adapter(path).scale for path in again.sites} == scales


def test_alpha_none_follows_the_rank_of_each_site(tmp_path):
    model = Language()
    handle = lf.attach(model, lf.LoRA(r=2, rslora=True), rank_pattern={"up": 4})
    assert handle.adapter("layers.0.up").scale == 8 / 2
    assert handle.adapter("layers.0.down").scale == 4 / 2**0.5
    handle.save(tmp_path)
    handle.detach()
    again = lf.load(model, tmp_path)
    assert again.adapter("layers.1.up").scale == 8 / 2
    assert again.adapter("layers.1.down").scale == 4 / 2**0.5


def test_patterns_that_would_hit_the_end_of_another_path_stay_exact(fill, tmp_path):
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "m": nn.ModuleDict({"q": nn.Linear(8, 8), "xq": nn.Linear(8, 8)})})
    handle = lf.attach(model, lf.LoRA(r=2), ".*q", rank_pattern={"^q": 3}, alpha_pattern={"m.q": 5})
    fill(handle)
    assert [handle.adapter(path).A.shape[0] for path in ("q", "m.q", "m.xq")] == [3, 2, 2]
    deltas = {path: handle.delta(path) for path in handle.sites}
    handle.save(tmp_path)
    handle.detach()
    again = lf.load(model, tmp_path)
    assert again.sites.keys() == deltas.keys()
    for path, delta in deltas.items():
        assert torch.equal(again.delta(path), delta), path


@pytest.mark.parametrize("site", ["q", "m.q"])
def test_a_single_site_whose_name_another_ends_with(fill, tmp_path, site):
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "m": nn.ModuleDict({"q": nn.Linear(8, 8)})})
    handle = lf.attach(model, lf.LoRA(r=2), site.replace(".", r"\."))
    fill(handle)
    assert list(handle.sites) == [site]
    handle.save(tmp_path)
    handle.detach()
    assert list(lf.load(model, tmp_path).sites) == [site]


@pytest.mark.parametrize("targets", ["all-linear", ["embed", "head", "q_proj"]], ids=["all-linear", "embeddings-too"])
def test_tied_weights_stay_tied_and_count_once(targets, fill):
    model = Language(tied=True)
    total = sum(parameter.numel() for parameter in model.parameters())
    handle = lf.attach(model, lf.LoRA(r=2), targets)
    assert model.head.weight is model.embed.weight
    assert handle.num_total == total
    handle.detach()
    assert model.head.weight is model.embed.weight and model.head.weight.requires_grad


def test_grouped_ranks_must_divide():
    model = nn.Sequential(nn.Conv2d(6, 12, 3, groups=3))
    with pytest.raises(lf.ConfigError, match="cannot be put on this layer") as caught:
        lf.attach(model, lf.LoRA(r=4), ["0"])
    assert "3 groups" in caught.value.found and "6" in caught.value.found and caught.value.where == "0"
    handle = lf.attach(model, lf.LoRA(r=6), ["0"])
    assert handle.adapter("0").A.shape == (6, 18) and handle.adapter("0").B.shape == (12, 2)


def test_the_largest_useful_rank_is_the_weights_own():
    lf.attach(nn.Sequential(nn.Linear(4, 9)), lf.LoRA(r=4))
    lf.attach(nn.Sequential(nn.Conv1d(8, 8, 1, groups=4)), lf.LoRA(r=8), ["0"])
    with pytest.raises(lf.ConfigError, match="rank 4 at most"):
        lf.attach(nn.Sequential(nn.Linear(4, 9)), lf.LoRA(r=5))
    with pytest.raises(lf.ConfigError, match="rank 2 at most"):
        lf.attach(nn.Sequential(nn.Embedding(9, 2)), lf.LoRA(r=3), ["0"])


def test_weights_of_fewer_than_16_bits_are_refused():
    model = nn.Sequential(nn.Linear(16, 16).to(torch.float8_e4m3fn), nn.Linear(16, 16))
    for options in ({"targets": ["0"]}, {"targets": ["1"], "modules_to_save": ["0"]}):
        with pytest.raises(lf.TargetError, match=r"(?s)stored as torch\.float8_e4m3fn.*load the model in bfloat16"):
            lf.attach(model, lf.LoRA(r=2), **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "0" not in lf.suggest(model).attach(model).sites
