"""What an adapter shows of itself, from its file alone or with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafit as lf
from lorafit.bare import bare_model
from lorafit.errors import CheckpointError, ConfigError
from lorafit.inspection import by_angles, compared, inspect, mean_likeness


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 8)


def model(layers: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(layers)))


def saved(path: Path, method: lf.Method | None = None, seed: int = 1) -> Path:
    base = model()
    handle = lf.attach(base, lf.LoRA(r=4) if method is None else method, "all-linear", seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return handle.save(path)


def changed(folder: Path, factors: dict[str, float]) -> Path:
    """The adapter of a folder with some tensors multiplied, as another program might have left it."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, factor in factors.items():
        tensors[f"base_model.model.{key}"].mul_(factor)
    save_file(tensors, path)
    return folder


def looked_at(folder: Path, **options: Any) -> Any:
    return inspect(lf.load(bare_model(folder), folder), weights=False, **options)


def test_a_site_that_learnt_nothing_and_one_that_does_the_work_of_all_are_named(tmp_path: Path) -> None:
    folder = changed(saved(tmp_path / "a"), {"1.q_proj.lora_B.weight": 0.0, "3.k_proj.lora_B.weight": 100.0})
    found = looked_at(folder)
    assert found.dead == ("1.q_proj",)
    by_path: dict[str, list[str]] = {}
    for finding in found.findings:
        by_path.setdefault(finding.path, []).append(finding.kind)
    assert by_path["1.q_proj"] == ["dead"]
    assert set(by_path["3.k_proj"]) == {"far larger than its peers", "does all the work"}
    assert set(by_path) == {"1.q_proj", "3.k_proj"}
    assert found.verdict() == "it learnt: 9 of 10 sites changed; 1 out of line"


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    import peft

    wrapped = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        wrapped.get_parameter("base_model.model.2.q_proj.lora_B.default.weight").zero_()
        wrapped.get_parameter("base_model.model.4.k_proj.lora_A.default.weight").mul_(100)
    wrapped.save_pretrained(tmp_path)
    found = looked_at(tmp_path)
    assert {finding.path for finding in found.findings} == {"2.q_proj", "4.k_proj"}


def test_an_adapter_before_its_first_step_learnt_nothing(tmp_path: Path) -> None:
    handle = lf.attach(model(), lf.LoRA(r=4), "all-linear")
    found = looked_at(handle.save(tmp_path))
    assert found.verdict().startswith("it learnt nothing")
    assert [finding.kind for finding in found.findings] == ["nothing learnt"]


@pytest.mark.parametrize("method", [lf.LoRA(r=4), lf.DoRA(lf.LoRA(r=4)), lf.AdaLoRA(init_r=4, target_r=2)], ids=str)
def test_numbers_are_those_of_the_change(tmp_path: Path, method: lf.Method) -> None:
    folder = saved(tmp_path, method)
    base = model()
    handle = lf.load(base, folder)
    for place in inspect(handle, weights=True).places:
        delta = handle.adapter(place.path).update(handle.sites[place.path].weight).delta.dense().double()
        assert place.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        weight = base.get_submodule(place.path).weight
        assert place.weight == pytest.approx(float(weight.norm()), rel=1e-5)
        assert place.relative == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        assert place.moved is not None and place.moved.magnitude > 0
    said = inspect(handle, weights=True).verdict()
    assert ("before the rows get their lengths" in said) == isinstance(method, lf.DoRA)
    alone = looked_at(folder)
    with_base = inspect(handle, weights=True)
    by_path = {place.path: place for place in with_base.places}
    assert [place.path for place in alone.places] == sorted(by_path)
    for own in alone.places:
        other = by_path[own.path]
        assert (own.path, own.out, own.inn, own.weight, own.moved) == (other.path, other.out, other.inn, None, None)
        assert own.norm == pytest.approx(other.norm, rel=1e-5)


def test_two_adapters_side_by_side(tmp_path: Path) -> None:
    first, same = (lf.load(bare_model(folder), folder) for folder in (saved(tmp_path / "a"), saved(tmp_path / "b")))
    folder = saved(tmp_path / "c", seed=9)
    other = lf.load(bare_model(folder), folder)
    alike, unlike = (mean_likeness(compared(first, each).values()) for each in (same, other))
    assert alike is not None and unlike is not None
    assert (alike.outputs, alike.inputs, alike.cosine) == pytest.approx((1, 1, 1), abs=1e-5)
    assert unlike.outputs < 0.7 and abs(unlike.cosine) < 0.5


def test_convolutions_embeddings_and_copies(tmp_path: Path) -> None:
    base = nn.Sequential()
    base.add_module("table", nn.Embedding(20, 8))
    base.add_module("conv", nn.Conv2d(8, 6, 3))
    base.add_module("head", nn.Linear(6, 3))
    handle = lf.attach(base, lf.LoRA(r=2), ["table", "conv"], modules_to_save=["head"])
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    found = looked_at(handle.save(tmp_path))
    sizes = {place.path: (place.out, place.inn) for place in found.places}
    assert sizes == {path: (site.shape.out, site.shape.inn) for path, site in handle.sites.items()}


def test_files_that_do_not_tell_the_sizes_of_layers_are_refused(tmp_path: Path) -> None:
    handle = lf.attach(model(), lf.VeRA(r=4), "all-linear")
    with pytest.raises(CheckpointError, match="does not tell the size"):
        bare_model(handle.save(tmp_path))


def test_the_share_of_dead_sites(tmp_path: Path) -> None:
    found = looked_at(changed(saved(tmp_path), {"1.q_proj.lora_B.weight": 0.0, "3.q_proj.lora_B.weight": 0.0}))
    assert found.dead_share == 0.2 and found.median_relative is None


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("around", [lambda method: method, lf.DoRA], ids=["lora", "dora"])
def test_what_an_initialiser_began_with_is_no_change(tmp_path: Path, init: str, around: Any) -> None:
    method = around(lf.LoRA(r=4, init=init))
    handle = lf.attach(model(), method, "all-linear", seed=1)
    found = inspect(handle, weights=True)
    assert found.dead_share == 1.0 and found.verdict().startswith("it learnt nothing")
    for place in found.places:
        parts = handle.adapter(place.path).modules()
        inner = next(part for part in parts if "A0" in dict(part.named_buffers(recurse=False)))
        assert place.start == pytest.approx(float((inner.scale * inner.B0 @ inner.A0).norm()), rel=1e-5)
        assert place.grown == 0
    folder = saved(tmp_path, method)
    alone = looked_at(folder)
    assert not alone.dead and all(place.grown == pytest.approx(place.norm / place.start) for place in alone.places)
    assert all(place.start is None and place.grown is None for place in looked_at(saved(tmp_path / "plain")).places)


def test_lengths_that_were_learnt_alone_are_learnt(tmp_path: Path) -> None:
    handle = lf.attach(model(), lf.DoRA(lf.LoRA(r=4)), "all-linear", seed=1)
    with torch.no_grad():
        for name, parameter in handle.adapter("2.q_proj").named_parameters():
            if name.rpartition(".")[2] == "m":
                parameter.mul_(1.1)
    found = inspect(handle, weights=True)
    assert "2.q_proj" not in found.dead and len(found.dead) == 9


def test_principal_angles(tmp_path: Path) -> None:
    folders = [saved(tmp_path / "a"), saved(tmp_path / "b", lf.LoRA(r=2), seed=7)]
    first, second = (lf.load(bare_model(folder), folder) for folder in folders)
    for path, one in by_angles(first, second).items():
        assert one is not None
        bases = []
        for handle in (first, second):
            dense = handle.adapter(path).update(handle.sites[path].weight).delta.dense().double()
            u, s, vh = torch.linalg.svd(dense)
            rank = int((s > 1e-5).sum())
            bases.append((u[:, :rank], vh[:rank].mT))
        for cosines, mean, ours in ((one.outputs, one.likeness.outputs, 0), (one.inputs, one.likeness.inputs, 1)):
            expected = torch.linalg.svdvals(bases[0][ours].mT @ bases[1][ours])
            assert cosines == pytest.approx(expected.tolist(), abs=1e-4) and len(cosines) == 2
            assert sum(cosine**2 for cosine in cosines) / 2 == pytest.approx(mean, abs=1e-5)


def test_adapters_of_different_models_are_refused(tmp_path: Path) -> None:
    first = lf.attach(nn.Sequential(nn.Linear(4, 4)), lf.LoRA(r=2), "all-linear")
    second = lf.attach(nn.Sequential(nn.Linear(4, 8)), lf.LoRA(r=2), "all-linear")
    with pytest.raises(ConfigError, match="different models"):
        by_angles(first, second)
