"""How strongly adapters act, and several subjects at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

from lorafit.diffusion.reading import detach, load
from lorafit.diffusion.saving import save
from lorafit.diffusion.strength import strength
from tests.diffusion import tiny
from tests.diffusion.tiny import near, saved

pytestmark = pytest.mark.filterwarnings("ignore", "error::lorafit.errors.LorafitWarning")  # diffusers warns a lot
LORA, DORA = lf.LoRA(r=4, alpha=2), lf.DoRA(lf.LoRA(r=4, alpha=8))


def test_strength_is_undone_and_nought_is_the_base(tmp_path: Path) -> None:
    saved("sd", tmp_path, DORA)
    pipe = tiny.made("sd")
    base = tiny.denoised(pipe)
    handles = load(pipe, tmp_path)
    full = tiny.denoised(pipe)
    with strength(handles, 0):
        assert torch.equal(tiny.denoised(pipe), base)
    with strength(handles, 1.25), strength(handles, 2.0):
        more = tiny.denoised(pipe)
    assert torch.equal(tiny.denoised(pipe), full) and not torch.equal(more, full)
    with pytest.raises(lf.ConfigError, match="strength"), strength(handles, float("nan")):
        pass
    handles["unet"].merge()
    with pytest.raises(lf.StateError, match="merged"), strength(handles, 0.5):
        pass
    handles["unet"].unmerge()
    detach(handles)
    handles = load(pipe, tmp_path, scale=0)
    assert torch.equal(tiny.denoised(pipe), base)
    with strength(handles, 0):
        assert torch.equal(tiny.denoised(pipe), base)
    with pytest.raises(lf.StateError, match="does not act"), strength(handles, 1.0):
        pass


def test_strength_is_a_factor_of_the_change(tmp_path: Path) -> None:
    saved("sd", tmp_path, LORA, encoders=False)
    pipe = tiny.made("sd")
    handle = load(pipe, tmp_path)["unet"]
    path = next(iter(handle.sites))
    whole = handle.delta(path).clone()
    with strength({"unet": handle}, 0.5):
        assert torch.equal(handle.delta(path), whole * 0.5)
        assert handle.num_trainable == 0
    assert torch.equal(handle.delta(path), whole)


def test_what_acts_at_another_strength_is_saved_so_or_not_at_all(tmp_path: Path) -> None:
    saved("sd", tmp_path / "lora", LORA, encoders=False)
    saved("sd", tmp_path / "vera", lf.VeRA(r=4), encoders=False)
    pipe, other = tiny.made("sd"), tiny.made("sd")
    save(load(pipe, tmp_path / "lora", scale=0.5), tmp_path / "half")
    load(other, tmp_path / "half")
    near(tiny.denoised(other), tiny.denoised(pipe))
    handles = load(tiny.made("sd"), tmp_path / "vera", scale=0.5)
    with pytest.raises(lf.StateError, match="acts at another strength"):
        save(handles, tmp_path / "never")
    with strength(handles, 1):
        save(handles, tmp_path / "whole")
    assert not (tmp_path / "never").exists() and (tmp_path / "whole" / "unet").is_dir()


def test_two_subjects_are_summed_up(tmp_path: Path) -> None:
    saved("sd", tmp_path / "cat", LORA, seed=1)
    saved("sd", tmp_path / "dog", lf.LoRA(r=2, alpha=4), encoders=False, targets=["to_q", "to_v"], seed=2)
    pipe = tiny.made("sd")
    deltas: dict[str, torch.Tensor] = {}
    for name, factor in (("cat", 1.0), ("dog", 0.7)):
        handles = load(pipe, tmp_path / name)
        for path in handles["unet"].sites:
            deltas[path] = deltas.get(path, torch.zeros(())) + factor * handles["unet"].delta(path)
        detach(handles)
    both = load(pipe, {"cat": tmp_path / "cat", "dog": tmp_path / "dog"}, weights={"dog": 0.7}, name="both")
    assert list(both) == ["unet", "text_encoder"] and both["unet"].active == ("both",)
    for path, delta in deltas.items():
        torch.testing.assert_close(both["unet"].delta(path), delta, rtol=1e-5, atol=1e-6)
    save(both, tmp_path / "sum")
    other = tiny.made("sd")
    load(other, tmp_path / "sum")
    near(tiny.denoised(other), tiny.denoised(pipe))
    detach(both)
    only = load(pipe, {"cat": tmp_path / "cat", "dog": tmp_path / "dog"}, weights={"dog": 0})
    again = tiny.made("sd")
    load(again, tmp_path / "cat")
    assert torch.equal(tiny.denoised(pipe), tiny.denoised(again))
    detach(only)


def test_subjects_that_cannot_be_summed_up_leave_the_pipeline_alone(tmp_path: Path) -> None:
    for name, seed in (("cat", 1), ("dog", 2)):
        saved("sd", tmp_path / name, DORA, encoders=False, seed=seed)
    pipe = tiny.made("sd")
    base = tiny.denoised(pipe)
    paths = {name: tmp_path / name for name in ("cat", "dog")}
    with pytest.raises(lf.MergeError, match="DoRA"):
        load(pipe, paths)
    for options in ({"weights": {"bird": 1.0}}, {"weights": {"cat": 0, "dog": 0}}, {"trainable": True}):
        with pytest.raises(lf.ConfigError):
            load(pipe, paths, **options)
    with pytest.raises(lf.ConfigError, match="weights"):
        load(pipe, tmp_path / "cat", weights={"cat": 1.0})
    assert torch.equal(tiny.denoised(pipe), base)
    assert not any("adapters" in key for key in pipe.unet.state_dict())
    handles = load(pipe, paths, how="svd", r=16)
    assert list(handles) == ["unet"]


def test_what_is_loaded_acts_alone_in_all_parts(tmp_path: Path) -> None:
    saved("sd", tmp_path / "cat", LORA)
    wanted = saved("sd", tmp_path / "dog", lf.LoRA(r=2), encoders=False)
    pipe = tiny.made("sd")
    cat = load(pipe, tmp_path / "cat", name="cat")
    cats = tiny.denoised(pipe)
    load(pipe, tmp_path / "dog", name="dog")
    assert torch.equal(tiny.denoised(pipe), wanted) and cat["text_encoder"].active == ()
    for handle in cat.values():
        handle.activate("cat")
    assert torch.equal(tiny.denoised(pipe), cats)


def test_what_cannot_be_loaded_leaves_active_what_was(tmp_path: Path) -> None:
    saved("sd", tmp_path / "cat", LORA)
    saved("sd", tmp_path / "dog", lf.LoRA(r=2), encoders=False)
    pipe = tiny.made("sd")
    cat = load(pipe, tmp_path / "cat", name="cat")
    cat["text_encoder"].merge()
    before = tiny.denoised(pipe)
    with pytest.raises(lf.StateError, match="merged"):
        load(pipe, tmp_path / "dog", name="dog")
    assert cat["unet"].active == ("cat",) and torch.equal(tiny.denoised(pipe), before)
