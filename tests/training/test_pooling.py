"""What a head reads: what the model's files say, what it computes, and that such a model is saved and read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lorafit.errors import ConfigError
from lorafit.training.models import Located, classifier_shape, head_paths, load_classifier, locate
from lorafit.training.pooling import KEY, brings_head, configured, mean, pooling_of
from tests.training.encoders import MEAN, encoder

NAMES = ("negative", "positive")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that was trained to be read by its mean."""
    return encoder(tmp_path_factory.mktemp("mean"), MEAN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that says nothing."""
    return encoder(tmp_path_factory.mktemp("plain"))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 5, 6, 3, 0], [2, 4, 8, 9, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def loaded(folder: Path, pooling: str | None, labels: tuple[str, ...] = NAMES) -> tuple[torch.nn.Module, list[str]]:
    return load_classifier(Located(str(folder), "x"), torch.float32, labels, 0, seed=3, pooling=pooling)


def test_the_models_files_decide_and_the_user_may_say_otherwise(sentences: Path, plain: Path) -> None:
    found = pooling_of(str(sentences), "auto")
    assert found.kind == "mean" and "modules.json" in found.said and "pooling=own" in found.said
    asked = pooling_of(str(sentences), "own")
    assert asked.kind is None and "mean pooling" in asked.said
    assert pooling_of(str(sentences), "cls").kind == "cls"
    assert pooling_of(str(plain), "auto").kind is None and pooling_of(str(plain), "auto").said == ""
    assert pooling_of(str(plain), "mean").kind == "mean"


@pytest.mark.parametrize(
    ("told", "kind", "said"),
    [
        ({"pooling_mode_cls_token": True}, "cls", "first token"),
        ({"pooling_mode": "mean"}, "mean", "mean of the last hidden states"),
        ({"pooling_mode_max_tokens": True}, None, "max pooling"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, None, "mean and max pooling"),
        ({"pooling_mode_lasttoken": True}, None, ""),
    ],
    ids=["cls", "newer", "max", "two", "last"],
)
def test_other_kinds(tmp_path: Path, told: dict[str, object], kind: str | None, said: str) -> None:
    found = pooling_of(str(encoder(tmp_path / "model", told)), "auto")
    assert found.kind == kind and said in found.said and bool(said) == bool(found.said)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model", MEAN)
    (folder / "modules.json").write_text("[")
    with pytest.raises(ConfigError, match="pooling is damaged") as caught:
        pooling_of(str(folder), "auto")
    assert "modules.json" in str(caught.value) and "pooling=own" in str(caught.value)


@pytest.mark.parametrize("known", [True, False], ids=["known-to-have-none", "not-known"])
def test_a_hub_model_whose_file_cannot_be_fetched_is_told(
    plain: Path, tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of a machine that is offline by now."""
    kept = tmp_path / "hub" / "models--me--encoder"
    commit = "0123456789" * 4
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    shutil.copytree(plain, kept / "snapshots" / commit)
    if known:
        (kept / ".no_exist" / commit).mkdir(parents=True)
        (kept / ".no_exist" / commit / "modules.json").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = pooling_of("me/encoder", "auto")
    assert found.kind is None
    assert found.said == "" if known else "modules.json cannot be fetched" in found.said and "mean" in found.said
    assert pooling_of("me/encoder", "mean").kind == "mean"


def test_the_mean_leaves_padding_out() -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = batch()["attention_mask"]
    by_hand = torch.stack([hidden[0, :4].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(mean(hidden, mask), by_hand)
    torch.testing.assert_close(mean(hidden, None), hidden.mean(1))
    assert mean(hidden.bfloat16(), mask).dtype == torch.bfloat16


def test_what_a_pooled_model_computes(sentences: Path) -> None:
    from transformers import BertModel

    model, head = loaded(sentences, "mean")
    assert head == ["classifier"] == head_paths(model) and model.config.id2label == {0: "negative", 1: "positive"}
    bert = BertModel.from_pretrained(sentences, add_pooling_layer=False)
    with torch.no_grad():
        hidden = bert(**batch()).last_hidden_state
        expected = torch.nn.functional.linear(
            mean(hidden, batch()["attention_mask"]), model.classifier.weight, model.classifier.bias
        )
        torch.testing.assert_close(model(**batch()).logits, expected)
    assert not any("pooler" in name for name, _ in model.named_parameters())
    assert model.classifier.weight.std() > 0 and not model.classifier.bias.any()
    again, _ = loaded(sentences, "mean")
    assert torch.equal(again.classifier.weight, model.classifier.weight)  # drawn from the seed alone
    assert model.config._attn_implementation == bert.config._attn_implementation


def test_a_pooled_model_is_saved_whole_and_read_again(sentences: Path, tmp_path: Path) -> None:
    model, _ = loaded(sentences, "mean", ())
    assert model.config.problem_type == "regression" and model(**batch()).logits.shape == (2, 1)
    model.save_pretrained(tmp_path / "saved")
    config = configured(str(tmp_path / "saved"))
    assert config.to_dict()[KEY] == "mean" and brings_head(config)
    found = pooling_of(str(tmp_path / "saved"), "auto")
    assert found.kind == "mean"
    again, head = loaded(tmp_path / "saved", "mean", ())
    assert head == []
    with torch.no_grad():
        torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits)
    by_class = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert by_class.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ConfigError, match="pooled states"):
        pooling_of(str(tmp_path / "saved"), "own")
    assert pooling_of(str(tmp_path / "saved"), "mean").kind == "mean"
    with pytest.raises(ConfigError, match="trained on something else"):
        pooling_of(str(tmp_path / "saved"), "cls")


def test_an_encoder_in_a_file_of_another_head_is_read(plain: Path, tmp_path: Path) -> None:
    """Its tensors are called bert.… there, and without that prefix in a file of the encoder alone."""
    from transformers import BertForMaskedLM

    BertForMaskedLM.from_pretrained(plain).save_pretrained(tmp_path / "masked")
    (one, head), (other, _) = loaded(tmp_path / "masked", "mean"), loaded(plain, "mean")
    assert head == ["classifier"]
    with torch.no_grad():
        torch.testing.assert_close(one(**batch()).logits, other(**batch()).logits)


def test_the_shape_alone_takes_no_weights(sentences: Path) -> None:
    with torch.device("meta"):
        shape = classifier_shape(configured(str(sentences)), NAMES, 0, "mean")
    model, _ = loaded(sentences, "mean")
    assert {name: one.shape for name, one in shape.named_parameters()} == {
        name: one.shape for name, one in model.named_parameters()
    }
    assert all(one.is_meta for one in shape.parameters())


def test_a_head_of_other_classes_is_refused(plain: Path, tmp_path: Path) -> None:
    model, _ = loaded(plain, None, ("a", "b", "c"))
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match="head that the model's files bring") as caught:
        loaded(tmp_path / "three", None)
    assert "2 classes" in str(caught.value)


def test_the_directory_of_a_package_leads_to_its_model(tmp_path: Path) -> None:
    encoder(tmp_path / "package" / "model", MEAN)
    (tmp_path / "package" / "__init__.py").touch()
    said: list[str] = []
    found = locate(str(tmp_path / "package"), said.append)
    assert found.path == str(tmp_path / "package" / "model") and "the model lies in" in said[0]
    assert json.loads((Path(found.path) / "1_Pooling" / "config.json").read_text()) == MEAN
    encoder(tmp_path / "package" / "other")
    with pytest.raises(ConfigError, match="holds no model") as caught:
        locate(str(tmp_path / "package"), said.append)
    assert "other" in str(caught.value)
