"""Adapters as plain LoRA: exactly where the update is low-rank, else the best of a rank with the error stated."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.compress import TruncationWarning
from lorafit.conversion import convert

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VECTORS = ["a", "b", "mix"]
ALL = [*VECTORS, "embed", "conv", "grouped"]
said = pytest.mark.filterwarnings(
    "ignore:PEFT has no (AdaLoRA|VeRA) for layers:lorafit.LorafitWarning",
    "ignore:PEFT cannot compute DoRA on grouped:lorafit.LorafitWarning",
    "ignore:Unexpected keyword arguments .'lorafit'.:UserWarning:peft",
    "ignore:fan_in_fan_out is set to:UserWarning:peft",
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(11, 8),
            a=nn.Linear(8, 6),
            b=nn.Linear(6, 8),
            mix=Conv1D(6, 8),
            conv=nn.Conv1d(6, 8, 3),
            grouped=nn.Conv2d(4, 8, (3, 2), groups=2),
            head=nn.Linear(8, 2),
        )
    )


def saved(method: lf.Method, folder: Path, targets: list[str], fill, **options) -> tuple[dict[str, Tensor], Path]:
    """The dense changes of a new adapter by path, and its folder."""
    handle = lf.attach(network(), method, targets, seed=0, **options)
    fill(handle, std=0.2)
    if isinstance(method, lf.DeltaLoRA):
        for path in handle.sites:
            handle.adapter(path).depart(method.lam)
        fill(handle, seed=2, std=0.2)
    return {path: handle.delta(path) for path in handle.sites}, handle.save(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


METHODS: dict[str, lf.Method] = {
    "lora": lf.LoRA(r=2),
    "rslora": lf.LoRA(r=4, alpha=3, rslora=True),
    "pissa": lf.LoRA(r=2, init="pissa"),
    "lora-plus": lf.LoRAPlus(r=2),
    "lora-fa": lf.LoRAFA(r=2),
    "delta-lora": lf.DeltaLoRA(r=2),
    "lora-drop": lf.LoRADrop(lf.LoRA(r=2), keep=("a", "b")),
    "adalora": lf.AdaLoRA(init_r=4, target_r=2),
    "vera": lf.VeRA(r=4),
    "vera, seed alone": lf.VeRA(r=4, save_projection=False),
}


@said
@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("which", METHODS)
def test_low_rank_is_exact(which, with_model, fill, tmp_path) -> None:
    plain = with_model or which not in ("adalora", "vera", "vera, seed alone")
    deltas, folder = saved(METHODS[which], tmp_path / "x", ALL if plain else VECTORS, fill)
    before = content(folder)
    made = convert(folder, model=network() if with_model else None)
    assert made == tmp_path / "x-lora" and content(folder) == before
    config = json.loads((made / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and "lorafit" not in config and config["use_dora"] is False
    assert {path.name for path in made.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    again = lf.load(network(), made)
    assert isinstance(again.method, lf.LoRA) and set(again.sites) == set(deltas)
    for path, delta in deltas.items():
        torch.testing.assert_close(again.delta(path), delta, atol=1e-6, rtol=1e-5)
    if not with_model and which in ("lora", "pissa", "lora-drop"):
        assert all(torch.equal(again.delta(path), delta) for path, delta in deltas.items())


@said
def test_peft_reads_what_was_converted(fill, tmp_path) -> None:
    x = torch.randn(3, 8)
    for method in (lf.AdaLoRA(init_r=4, target_r=2), lf.VeRA(r=4)):
        deltas, folder = saved(method, tmp_path / method.name, VECTORS, fill)
        theirs = PeftModel.from_pretrained(network(), convert(folder)).base_model.model
        expected = network().a.weight + deltas["a"]
        torch.testing.assert_close(theirs.a(x), x @ expected.T + network().a.bias, atol=1e-5, rtol=1e-4)


def test_a_pruned_adalora(fill, tmp_path) -> None:
    handle = lf.attach(network(), lf.AdaLoRA(init_r=4, target_r=2), VECTORS, seed=0)
    for k, path in enumerate(handle.sites):
        adapter = handle.adapter(path)
        sizes = {"P": (adapter.P.shape[0], k), "lam": (k,), "Q": (k, adapter.Q.shape[1])}
        adapter.resize({name: torch.Size(size) for name, size in sizes.items()})
    fill(handle)
    again = lf.load(network(), convert(handle.save(tmp_path / "x")))
    assert [again.method_at(path).r for path in handle.sites] == [1, 1, 2]
    for path in handle.sites:
        torch.testing.assert_close(again.delta(path), handle.delta(path), atol=1e-6, rtol=1e-5)


@said
@pytest.mark.parametrize("method", [lf.DoRA(lf.LoRA(r=2)), lf.DoRA(lf.VeRA(r=4)), lf.IntrinsicDimension(d=50)], ids=str)
def test_what_is_not_low_rank_is_the_best_of_its_rank(method, fill, tmp_path) -> None:
    deltas, folder = saved(method, tmp_path / "x", ALL, fill)
    with pytest.raises(lf.CheckpointError, match=r"file alone[\s\S]*model=model"):
        convert(folder)
    with pytest.warns(TruncationWarning, match="not exactly the adapter") as caught:
        made = convert(folder, model=network(), r=2, output=tmp_path / "y")
    again = lf.load(network(), made)
    record = json.loads((made / CONFIG).read_text())["lorafit"]["converted"]
    assert record["from"]["method"] == method.name and record["errors"].keys() == deltas.keys()
    for path, delta in deltas.items():
        error = float((again.delta(path) - delta).norm() / delta.norm())
        assert record["errors"][path] == pytest.approx(error, rel=1e-3, abs=1e-6)
        if path in ("a", "b"):
            u, s, vh = torch.linalg.svd(delta)
            torch.testing.assert_close(again.delta(path), u[:, :2] * s[:2] @ vh[:2], atol=1e-5, rtol=1e-3)
    lost = sum((again.delta(path) - delta).square().sum() for path, delta in deltas.items())
    overall = float((lost / sum(delta.square().sum() for delta in deltas.values())).sqrt())
    warning = next(each.message for each in caught if isinstance(each.message, TruncationWarning))
    assert record["error"] == pytest.approx(overall, rel=1e-3) and warning.overall == record["error"]
    assert f"{record['error']:.3g}" in (made / "README.md").read_text()
    assert not any("adapters" in key for key in network().state_dict())


@said
def test_a_large_enough_rank_is_exact_and_says_nothing(fill, tmp_path) -> None:
    deltas, folder = saved(lf.DoRA(lf.LoRA(r=2)), tmp_path / "x", ALL, fill)
    again = lf.load(network(), convert(folder, model=network(), r=16))
    for path, delta in deltas.items():
        torch.testing.assert_close(again.delta(path), delta, atol=1e-5, rtol=1e-4)


def test_dora_takes_the_rank_of_its_lora_and_a_dense_change_needs_one(fill, tmp_path) -> None:
    _, folder = saved(lf.DoRA(lf.LoRA(r=3)), tmp_path / "x", VECTORS, fill)
    with pytest.warns(TruncationWarning):
        assert lf.load(network(), convert(folder, model=network())).method.r == 3
    _, folder = saved(lf.IntrinsicDimension(d=50), tmp_path / "y", VECTORS, fill)
    with pytest.raises(lf.CheckpointError, match=r"no rank of its own[\s\S]*r=16"):
        convert(folder, model=network())


@pytest.mark.parametrize("with_model", [False, True])
def test_a_lower_rank_on_request(with_model, fill, tmp_path) -> None:
    for method in (lf.LoRA(r=4), lf.VeRA(r=4), lf.AdaLoRA(init_r=4, target_r=2)):
        deltas, folder = saved(method, tmp_path / method.name, VECTORS, fill)
        with pytest.warns(TruncationWarning):
            made = convert(folder, model=network() if with_model else None, r=2)
        again = lf.load(network(), made)
        for path in ("a", "b"):
            u, s, vh = torch.linalg.svd(deltas[path])
            torch.testing.assert_close(again.delta(path), u[:, :2] * s[:2] @ vh[:2], atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
def test_files_of_pefts(tmp_path) -> None:
    configs = {
        "vera": VeraConfig(r=4, target_modules=["a", "b"]),
        "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["a", "b"]),
    }
    for name, config in configs.items():
        theirs = get_peft_model(network(), config)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if "lora_" in key or "lambda" in key:
                    parameter.normal_()
        theirs.save_pretrained(tmp_path / name)
    with pytest.raises(lf.CheckpointError, match=r"how wide the layers are[\s\S]*model=model"):
        convert(tmp_path / "vera")
    made = {"vera": convert(tmp_path / "vera", model=network())}
    with pytest.warns(lf.LorafitWarning, match="do not tell convolutions from linear layers"):
        made["adalora"] = convert(tmp_path / "adalora")
    for name, folder in made.items():
        expected, found = lf.load(network(), tmp_path / name), lf.load(network(), folder)
        for path in ("a", "b"):
            torch.testing.assert_close(found.delta(path), expected.delta(path), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("with_model", [False, True])
def test_modules_saved_in_full_and_the_rest_of_the_config_come_along(with_model, fill, tmp_path) -> None:
    handle = lf.attach(network(), lf.VeRA(r=4), VECTORS, seed=0, modules_to_save=["head"])
    fill(handle)
    folder = handle.save(tmp_path / "x", base_model="a/b", task_type="FEATURE_EXTRACTION")
    made = convert(folder, model=network() if with_model else None)
    again = lf.load(network(), made)
    assert torch.equal(again.copies["head"].weight, handle.copies["head"].weight)
    config = json.loads((made / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "a/b" and config["task_type"] == "FEATURE_EXTRACTION"
    assert not any("vera" in key for key in load_file(made / WEIGHTS))


def test_the_source_is_never_written_to(fill, tmp_path, monkeypatch) -> None:
    _, folder = saved(lf.LoRA(r=2), tmp_path / "x", VECTORS, fill)
    before = content(folder)
    monkeypatch.chdir(folder)
    for output in (folder, ".", tmp_path / "y" / ".." / "x"):
        with pytest.raises(lf.CheckpointError, match="not written over") as caught:
            convert(folder, output=output)
        assert caught.value.fix
    assert content(folder) == before
    assert convert(".").resolve() == tmp_path / "x-lora"


@pytest.mark.parametrize("shapes", [5, [1], {"a": 5}, {"a": [6]}, {"a": [6, "8"]}, {"a": [0, 8]}], ids=str)
def test_sizes_that_are_none_are_refused(shapes, fill, tmp_path) -> None:
    _, folder = saved(lf.VeRA(r=3), tmp_path / "x", ["a"], fill)
    config = json.loads((folder / CONFIG).read_text())
    config["lorafit"]["shapes"] = shapes
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(lf.CheckpointError, match=r"lorafit\.shapes(.|\n)*model=model"):
        convert(folder)
    config["lorafit"]["shapes"] = {"a": [6, 800]}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(lf.CheckpointError, match="sizes that it notes for a"):
        convert(folder)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (lf.LoRAPlus(inner=lf.DoRA(lf.LoRA(r=2))), "dora"),
        (lf.LoRAPlus(inner=lf.DoRA(lf.AdaLoRA(init_r=4, target_r=2))), "dora"),
        (lf.LoRADrop(lf.DoRA(lf.LoRA(r=2))), "dora"),
        (lf.IntrinsicDimension(d=5), "intrinsic"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_what_depends_on_the_weights_is_named(method, name, fill, tmp_path) -> None:
    _, folder = saved(method, tmp_path / "x", VECTORS, fill)
    with pytest.raises(lf.CheckpointError, match=f"what {name} changes depends"):
        convert(folder)


def test_what_cannot_be_is_refused(fill, tmp_path) -> None:
    _, folder = saved(lf.AdaLoRA(init_r=4, target_r=2), tmp_path / "x", VECTORS, fill)
    for options in ({"to": "dora"}, {"r": 0}):
        with pytest.raises(lf.ConfigError):
            convert(folder, **options)
    with pytest.raises(lf.CheckpointError, match="no such folder"):
        convert(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
