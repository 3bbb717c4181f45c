"""Every setting of peft's LoRA config that this library reads: its files here, ours there, the same numbers."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lorafit as lf

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))


class Block(nn.Module):
    """A layer of a model, with experts inside that are numbered too."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.experts = nn.ModuleList([nn.Sequential(OrderedDict(up=nn.Linear(6, 6))) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.proj(x)) + sum(expert(x) for expert in self.experts) / 3


class Stack(nn.Module):
    """Two lists of blocks and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.decoder = nn.Module()
        self.decoder.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.norm_head = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.layers, *self.decoder.blocks]:
            x = block(x)
        return self.head(self.norm_head(x))


@pytest.fixture
def stack(tiny) -> Callable[[], nn.Module]:
    return lambda: tiny.seeded(Stack)


PATTERNS = {
    "rank": ({"proj": 5}, {}),
    "alpha": ({}, {"layers.1.proj": 3}),
    "rank and alpha of one layer": ({"layers.0.proj": 2}, {"layers.0.proj": 9}),
    "rank and alpha of different layers": ({"layers.0.proj": 2, "blocks.2.proj": 6}, {"layers.1.proj": 9}),
    "expression": ({r"layers\.[01]\..*": 2}, {r".*\.experts\.\d\.up": 7.5}),
    "anchored": ({r"^layers\.0\.proj": 2, r"^decoder\.blocks\.1\.proj": 3}, {r"^layers\.0\.experts\.1\.up": 2}),
    "alternatives": ({"proj|experts.1.up": 2}, {"layers.0.proj|layers.1.proj": 2}),
    "first hit wins": ({"layers.0.proj": 5, r"layers\.\d\.proj": 2, "proj": 3}, {r".*proj": 3, "layers.0.proj": 8}),
    "end of a longer path": ({"0.proj": 3, "1.proj": 2, "blocks.0.proj": 2}, {}),
}
UNSORTED = {"proj": 3, "layers.0.proj": 5}
"""The first hit is another one when the keys are sorted, as they are in a file."""


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("which", PATTERNS)
def test_patterns_of_peft_are_read(oracle, stack, which, rslora) -> None:
    ranks, alphas = PATTERNS[which]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["proj", "experts.0.up", "experts.1.up"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=rslora,
    )
    handle = oracle.check_read(stack, config, X)
    theirs = get_peft_model(stack(), config)
    for path in handle.sites:
        layer = theirs.base_model.model.get_submodule(path)
        method = handle.method_at(path)
        assert (method.r, method.scale) == (layer.r["default"], pytest.approx(layer.scaling["default"]))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("which", PATTERNS)
def test_patterns_of_ours_are_read_by_peft(oracle, stack, which, rslora) -> None:
    ranks, alphas = PATTERNS[which]
    oracle.check_written(
        stack,
        lf.LoRA(r=4, alpha=6, rslora=rslora),
        X,
        targets=["proj", "experts.0.up", "experts.1.up"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def test_patterns_whose_order_counts_are_read_as_the_file_has_them(oracle, stack) -> None:
    # peft sorts the keys when it saves, and then cannot load its own file: the tensors have other ranks.
    _, folder = oracle.written_by_peft(stack, LoraConfig(r=4, target_modules=["proj"], rank_pattern=UNSORTED))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(stack(), folder)
    with pytest.raises(lf.CheckpointError, match=r"layers\.0\.proj.*[\s\S]*r = 3[\s\S]*rank_pattern"):
        lf.load(stack(), folder)


def test_patterns_whose_order_counts_are_written_so_that_it_does_not(oracle, stack) -> None:
    oracle.check_written(
        stack, lf.LoRA(r=4, alpha=6), X, targets=["proj"], rank_pattern=UNSORTED, alpha_pattern=UNSORTED
    )


def test_patterns_for_a_path_that_ends_another_are_written_exactly(oracle, tiny) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.Sequential(nn.Linear(6, 6))
            self.add_module("0", nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.get_submodule("0")(x)))

    theirs = oracle.check_written(
        lambda: tiny.seeded(Nested), lf.LoRA(r=2, alpha=2), X, targets=["0"], rank_pattern={"outer.0": 3, "^0": 5}
    )
    assert theirs.base_model.model.outer[0].r["default"] == 3
    assert theirs.base_model.model.get_submodule("0").r["default"] == 5


def test_alpha_that_follows_the_rank_is_written_for_each_rank(oracle, stack) -> None:
    theirs = oracle.check_written(stack, lf.LoRA(r=4), X, targets=["proj"], rank_pattern={"layers.1.proj": 2})
    assert theirs.base_model.model.layers[1].proj.lora_alpha["default"] == 4
    assert theirs.base_model.model.layers[0].proj.lora_alpha["default"] == 8


def test_dropout_does_nothing_in_evaluation(oracle, stack) -> None:
    oracle.check_read(stack, LoraConfig(r=4, target_modules=["proj", "head"], lora_dropout=0.4), X)


def test_dropout_of_ours_is_read_by_peft(oracle, stack) -> None:
    theirs = oracle.check_written(stack, lf.LoRA(r=2, dropout=0.3), X, targets=["proj"])
    assert theirs.base_model.model.layers[0].proj.lora_dropout["default"].p == 0.3


TARGETS = {
    "suffixes": {"target_modules": ["proj", "experts.2.up"]},
    "whole paths": {"target_modules": ["layers.0.proj", "decoder.blocks.1.experts.0.up"]},
    "one path that is another's end": {"target_modules": ["blocks.0.proj"]},
    "expression": {"target_modules": r"layers\.\d\.(proj|experts\.1\.up)"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but some": {"target_modules": "all-linear", "exclude_modules": ["proj", "head"]},
    "exclude suffixes": {
        "target_modules": ["proj", "experts.0.up"],
        "exclude_modules": ["layers.1.proj", "experts.0.up"],
    },
    "exclude an expression": {"target_modules": ["proj", "head"], "exclude_modules": r"decoder\..*"},
    "one layer": {"target_modules": ["proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["proj"], "layers_to_transform": [0, 2]},
    "layers of one list": {"target_modules": ["proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "layers of lists": {"target_modules": ["proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    # the number of the layer counts, not that of the expert in it
    "experts of a layer": {"target_modules": ["up"], "layers_to_transform": [2]},
    "experts by pattern": {
        "target_modules": ["experts.2.up"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers", "blocks"],
    },
    "a whole path beside layers": {"target_modules": ["proj", "layers.2.experts.0.up"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("which", TARGETS)
def test_targets_of_peft_are_read(oracle, stack, which) -> None:
    oracle.check_read(stack, LoraConfig(r=2, lora_alpha=6, **TARGETS[which]), X)


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        (["proj", "experts.2.up"], ()),
        (["layers.0.proj", "decoder.blocks.1.experts.0.up"], ()),
        (r"layers\.\d\.(proj|experts\.1\.up)", ()),
        ("all-linear", ()),
        ("all-linear", ["proj", "head"]),
        (["proj", "head"], r"decoder\..*"),
        (r".*0.*proj", ()),
    ],
    ids=str,
)
def test_targets_of_ours_are_read_by_peft(oracle, stack, targets, exclude) -> None:
    oracle.check_written(stack, lf.LoRA(r=2, alpha=6), X, targets=targets, exclude=exclude)


def test_a_path_that_ends_another_is_written_as_an_expression(oracle, tiny) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 6)
            self.inner = nn.Sequential()
            self.inner.add_module("proj", nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.proj(x)))

    theirs = oracle.check_written(lambda: tiny.seeded(Nested), lf.LoRA(r=2), X, targets="proj")
    assert theirs.peft_config["default"].target_modules == "proj"
    assert isinstance(theirs.base_model.model.inner.proj, nn.Linear)


def test_many_whole_paths_are_read_by_peft(oracle, tiny) -> None:
    # From twenty names on peft looks for a shorter list of its own.
    build = lambda: tiny.seeded(lambda: nn.Sequential(*[Block() for _ in range(24)]))  # noqa: E731
    oracle.check_written(build, lf.LoRA(r=1), X, targets=[f"{i}.proj" for i in range(23)])


def test_all_linear_written_by_hand_means_what_it_means_in_peft(oracle, stack, edit) -> None:
    theirs, folder = oracle.written_by_peft(stack, LoraConfig(r=2, target_modules="all-linear"))
    edit(folder, target_modules="all-linear")
    handle = lf.load(stack(), folder)
    assert list(handle.sites) == list(lf.attach(stack(), lf.LoRA(r=2), "all-linear").sites)
    torch.testing.assert_close(oracle.run(handle.model, X), oracle.run(theirs, X), atol=1e-5, rtol=1e-5)


def _key_in(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if key in name] and None


def test_all_linear_written_by_hand_still_wants_every_layer(oracle, stack, edit, edit_tensors) -> None:
    _, folder = oracle.written_by_peft(stack, LoraConfig(r=2, target_modules="all-linear"))
    edit_tensors(edit(folder, target_modules="all-linear"), _key_in("layers.1.proj"))
    with pytest.raises(lf.CheckpointError, match=r"missing key[\s\S]*layers\.1\.proj"):
        lf.load(stack(), folder)


INITIALISATIONS = [True, False, "gaussian", "orthogonal", "mica"]


@pytest.mark.parametrize("init", INITIALISATIONS, ids=str)
def test_initialisations_that_leave_the_base_alone_are_read(oracle, stack, init) -> None:
    oracle.check_read(stack, LoraConfig(r=2, target_modules=["proj"], init_lora_weights=init), X)


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning:peft")
def test_eva_is_read(oracle, stack) -> None:
    config = LoraConfig(r=2, target_modules=["proj"], init_lora_weights="eva", eva_config=EvaConfig())
    oracle.check_read(stack, config, X)


def test_a_config_of_peft_holds_no_setting_that_is_unknown_here(oracle, stack) -> None:
    # An unknown setting is a LorafitWarning, and warnings are errors.
    _, folder = oracle.written_by_peft(stack, LoraConfig(r=2, target_modules=["proj"]))
    assert len(json.loads((folder / "adapter_config.json").read_text())) > 35
    lf.load(stack(), folder)


def test_an_unknown_setting_is_said_and_kept_out(oracle, stack, edit) -> None:
    theirs, folder = oracle.written_by_peft(stack, LoraConfig(r=2, target_modules=["proj"]))
    edit(folder, use_something_new=False)
    with pytest.warns(lf.LorafitWarning, match=r"adapter_config\.json.*use_something_new"):
        handle = lf.load(stack(), folder)
    torch.testing.assert_close(oracle.run(handle.model, X), oracle.run(theirs, X), atol=1e-5, rtol=1e-5)


# Names


def test_a_named_adapter_of_peft_is_read_from_its_sub_folder(oracle, stack) -> None:
    handle = oracle.check_read(stack, LoraConfig(r=2, target_modules=["proj"]), X, name="german")
    assert handle.name == "german"


def test_a_sub_folder_can_be_given_itself_and_under_another_name(oracle, stack) -> None:
    theirs, folder = oracle.written_by_peft(stack, LoraConfig(r=2, target_modules=["proj"]), "german")
    handle = lf.load(stack(), folder / "german", name="other")
    torch.testing.assert_close(oracle.run(handle.model, X), oracle.run(theirs, X), atol=1e-5, rtol=1e-5)


def test_a_named_adapter_of_ours_goes_where_peft_puts_it(oracle, stack) -> None:
    oracle.check_written(stack, lf.LoRA(r=2), X, targets=["proj"], name="german")
    assert (oracle.folder / "ours" / "german" / "adapter_config.json").is_file()
    assert not (oracle.folder / "ours" / "adapter_config.json").exists()


def test_several_adapters_of_peft_switch_and_add_up_as_there(oracle, stack) -> None:
    settings = {
        "one": LoraConfig(r=2, lora_alpha=6, target_modules=["proj"]),
        "two": LoraConfig(r=3, lora_alpha=2, target_modules=["proj", "experts.1.up", "head"]),
    }
    theirs = get_peft_model(stack(), settings["one"], adapter_name="one")
    theirs.add_adapter("two", settings["two"])
    oracle.randomise({key: value for key, value in theirs.state_dict().items() if "lora_" in key})
    theirs.save_pretrained(oracle.folder / "peft")

    model = stack()
    handles = {name: lf.load(model, oracle.folder / "peft", name=name) for name in settings}
    for names in (["one"], ["two"], ["one", "two"]):
        theirs.base_model.set_adapter(names)
        handles["one"].activate(names)
        torch.testing.assert_close(oracle.run(model, X), oracle.run(theirs, X), atol=1e-5, rtol=1e-5)
    with theirs.disable_adapter():
        handles["one"].activate(None)
        assert torch.equal(oracle.run(model, X), oracle.run(theirs, X))


# Modules saved in full


def test_saved_modules_of_peft_are_read_with_their_buffers(oracle, stack) -> None:
    config = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head", "norm_head"])
    handle = oracle.check_read(stack, config, X)
    assert list(handle.saved) == ["norm_head", "head"]
    assert handle.copies["norm_head"].running_mean.abs().min() > 0
    assert torch.equal(stack().norm_head.running_mean, torch.zeros(6))


def test_saved_modules_of_ours_are_read_by_peft_with_their_buffers(oracle, stack) -> None:
    handle = lf.attach(stack(), lf.LoRA(r=2), ["proj"], modules_to_save=["norm_head", "head"], seed=0)
    tensors = {key: value for copy in handle.copies.values() for key, value in copy.state_dict().items()}
    oracle.randomise({**dict(handle.named_parameters()), "mean": tensors["running_mean"]})
    expected = oracle.run(handle.model, X)
    theirs = PeftModel.from_pretrained(stack(), handle.save(oracle.folder / "ours"))
    torch.testing.assert_close(oracle.run(theirs, X), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(oracle.folder / "again")
    oracle.same_tensors(oracle.folder / "ours", oracle.folder / "again")


def test_a_saved_container_of_peft_is_read(oracle, stack) -> None:
    config = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["decoder.blocks.1"])
    handle = oracle.check_read(stack, config, X)
    assert "decoder.blocks.1.proj" not in handle.sites
    assert "decoder.blocks.0.proj" in handle.sites


def test_a_saved_container_of_ours_is_read_by_peft(oracle, stack) -> None:
    oracle.check_written(stack, lf.LoRA(r=2), X, targets=r".*[02]\.proj", modules_to_save=["decoder.blocks.1"])


def test_peft_compares_ends_of_names_and_what_it_saved_is_read(oracle, stack) -> None:
    # "head" also names norm_head for peft.
    config = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"])
    handle = oracle.check_read(stack, config, X, resave=False)
    assert list(handle.saved) == ["norm_head", "head"]


def test_a_name_that_peft_would_stretch_is_said_when_written(oracle, stack) -> None:
    handle = lf.attach(stack(), lf.LoRA(r=2), ["proj"], modules_to_save=["head"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    with pytest.warns(lf.LorafitWarning, match=r"PEFT cannot load[\s\S]*norm_head"):
        folder = handle.save(oracle.folder / "ours")
    with pytest.raises(KeyError, match="norm_head"):
        PeftModel.from_pretrained(stack(), folder)
    assert torch.equal(oracle.run(lf.load(stack(), folder).model, X), oracle.run(handle.model, X))


def test_two_adapters_keep_their_own_copies_of_a_module(oracle, stack) -> None:
    expected, folders = {}, {}
    for seed, name in enumerate(["one", "two"]):
        config = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["norm_head", "head"])
        theirs = get_peft_model(stack(), config, adapter_name=name)
        own = {k: v for k, v in theirs.state_dict().items() if name in k and not k.endswith("running_var")}
        oracle.randomise(own, seed)
        theirs.save_pretrained(oracle.folder / "peft")
        expected[name], folders[name] = oracle.run(theirs, X), oracle.folder / "peft"
    model = stack()
    base = oracle.run(model, X)
    handles = {name: lf.load(model, folders[name], name=name) for name in expected}
    for name, handle in handles.items():
        handle.activate(name)
        torch.testing.assert_close(oracle.run(model, X), expected[name], atol=1e-5, rtol=1e-5)
        oracle.same_tensors(handle.save(oracle.folder / "again"), folders[name] / name)
    for handle in handles.values():
        handle.detach()
    assert torch.equal(oracle.run(model, X), base)
