"""The settings of a DreamBooth run: names, other spellings, types, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorafit as lf
from lorafit.diffusion.settings import Settings, own_fields, resolve

NEEDED: dict[str, Any] = {"pipeline": "p", "instance_images": "i", "instance_prompt": "a sks dog"}


def settled(**more: Any) -> Settings:
    return resolve([("here", {**NEEDED, **more})])


def test_defaults_and_method_fields() -> None:
    found = settled(r="4", alpha="8", method="lora-plus", ratio=2)
    assert found.method == "lora-plus" and found.method_options == {"r": 4, "alpha": 8.0, "ratio": 2.0}
    assert found.resolution == 512 and found.prompts == ["a sks dog"] and found.folder == Path("runs/i-lora-plus")
    assert settled(class_prompt="a dog").prompts == ["a sks dog", "a dog"]
    assert settled(sample_prompt="x").prompts == ["x"], "one prompt may stand alone"
    assert settled(class_prompt="a dog", num_class_images=3, prior_loss_weight=0.5).num_class_images == 3
    assert settled(crop="random", views=3).views == 3
    assert settled(output_dir="o").prior_folder == Path("o/class")


def test_the_spellings_of_the_scripts_are_taken_and_named() -> None:
    said: list[str] = []
    layer = {
        "pretrained_model_name_or_path": "p",
        "instance_data_dir": "i",
        "instance_prompt": "x",
        "max_train_steps": 5,
        "snr_gamma": 5,
        "mixed_precision": "bf16",
        "rank": 3,
        "center_crop": True,
    }
    found = resolve([("run.yaml", layer)], said.append)
    assert (found.pipeline, found.max_steps, found.min_snr, found.dtype, found.crop) == (
        "p",
        5,
        5.0,
        "bfloat16",
        "centre",
    )
    assert found.method_options == {"r": 3}
    assert "snr_gamma is called min_snr here" in said and len(said) == 7


def test_a_method_inside_of_another_has_its_spellings_and_types_too() -> None:
    found = settled(method="dora", inner={"method": "lora", "lora_r": "4", "alpha": "8"})
    assert found.method_options == {"inner": {"method": "lora", "r": 4, "alpha": 8.0}}
    with pytest.raises(lf.ConfigError, match="alhpa"):
        settled(method="dora", inner={"alhpa": 8})
    with pytest.raises(lf.ConfigError, match="--method dora"):
        settled(use_dora=True)


def test_later_layers_win() -> None:
    assert resolve([("file", {**NEEDED, "max_steps": 3}), ("line", {"max_train_steps": 9})]).max_steps == 9


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"instance_promt": "x"}, ["unknown setting", "instance_prompt"]),
        ({"lr": 1, "learning_rate": 2}, ["two names"]),
        ({"max_steps": 0}, ["max_steps"]),
        ({"r": "many"}, ["wrong type", "r"]),
        ({"d": 5}, ["unknown setting"]),
        ({"class_images": "c"}, ["class_prompt"]),
        ({"keep_prompts": ["an apple"]}, ["class_prompt", "prompts to keep"]),
        ({"keep_prompts": [""], "class_prompt": "a dog"}, ["keep_prompts"]),
        ({"num_class_images": 100}, ["num_class_images means nothing", "--class-prompt"]),
        ({"prior_loss_weight": 0.5}, ["prior_loss_weight means nothing", "--class-prompt"]),
        ({"views": 4}, ["views", "--crop random"]),
        ({"views": 8, "center_crop": True}, ["views", "--crop random"]),
        ({"text_encoder_lr": 1e-5}, ["train_text_encoder"]),
        ({"method": "dorra"}, ["unknown method"]),
        ({"lr_warmup_steps": 5}, ["constant_with_warmup"]),
        ({"learning_rate": float("nan")}, ["learning_rate"]),
        ({"instance_prompt": ""}, ["instance_prompt"]),
        ({"instance_prompt": " "}, ["instance_prompt", "has words"]),
        ({"class_prompt": " "}, ["class_prompt", "has words"]),
        ({"keep_prompts": ["an apple", "\t"], "class_prompt": "a dog"}, ["keep_prompts", "has words"]),
        ({"sample_prompts": [""]}, ["sample_prompts", "has words"]),
        ({"sample_prompt": ""}, ["sample_prompt", "has words"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_named(layer: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(lf.ConfigError) as error:
        settled(**layer)
    assert all(word in str(error.value) for word in words), error.value


def test_what_is_missing_is_named() -> None:
    with pytest.raises(lf.ConfigError, match="--instance-images"):
        resolve([("here", {"pipeline": "p", "instance_prompt": "x"})])


def test_every_setting_is_documented() -> None:
    text = Settings.__doc__ or ""
    absent = [name for name in own_fields() if name not in text]
    assert absent == []
