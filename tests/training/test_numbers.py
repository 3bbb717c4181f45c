"""Labels that are numbers: how they are told from classes, put on a scale, made batches of, and judged."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorafit.errors import DataError
from lorafit.training.batches import VALUES, Records, ValueCollator, inputs_of
from lorafit.training.data import DataSettings, load_examples
from lorafit.training.examples import Labelled
from lorafit.training.numbers import SCALE, EncodedValue, Scale, ValueEncoder
from lorafit.training.objectives import EXPECTED, LOSSES, PREDICTED, Numbers
from lorafit.training.tasks import decide, number, numbers
from lorafit.training.valued import ValueData, load_any, load_value_data


def labelled(*labels: Any) -> list[Labelled]:
    return [Labelled(f"text {place}", None, label, f"a:{place}") for place, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("labels", "task", "said"),
    [
        ((1.5, 2.0, -3), "regression", "predicted as such"),
        (("1.5", "2"), "regression", "predicted as such"),
        ((1, 2, 3), "sequence-classification", "3 whole numbers, taken for classes"),
        ((1.0, 0.0), "sequence-classification", ""),
        ((0, 1), "sequence-classification", ""),
        (("good", "1.5"), "sequence-classification", ""),
        ((True, False), "sequence-classification", ""),
    ],
    ids=["fractions", "csv", "stars", "floats", "binary", "names", "truth"],
)
def test_what_labels_are_is_told_from_all_of_them(labels: Any, task: str, said: str) -> None:
    found = decide("auto", labelled(*labels))
    assert found.task == task and said in found.said and bool(said) == bool(found.said)
    assert decide("regression", labelled(*labels)).task == "regression"


def test_labels_as_numbers() -> None:
    assert numbers(labelled(1, "2.5", -3.0)) == [1.0, 2.5, -3.0]
    assert [number(one) for one in labelled("nan", "x", True)] == [None, None, None]
    with pytest.raises(DataError, match="no number") as caught:
        numbers(labelled(1, "poor", "fine"))
    assert "a:2" in str(caught.value) and "'poor'" in str(caught.value) and "--task classification" in str(caught.value)


def test_a_scale_brings_labels_to_mean_0_and_spread_1() -> None:
    scale = Scale.new([10.0, 20.0, 60.0])
    values = torch.tensor([10.0, 20.0, 60.0], dtype=torch.float64)
    outputs = (values - scale.offset) / scale.factor
    assert outputs.mean().abs() < 1e-12 and outputs.square().mean() == pytest.approx(1)
    torch.testing.assert_close(scale.label(outputs), values)
    assert Scale.read(scale.as_json()) == scale
    assert scale.kept == Scale(0.0, 1.0, scale.spread) and scale.kept.label(values) is not None
    assert scale.brought(SimpleNamespace(to_dict=dict)) == scale.kept
    config = SimpleNamespace(to_dict=lambda: {SCALE: Scale(5.0, 3.0, 3.0).as_json()})
    assert scale.brought(config) == Scale(5.0, 3.0, scale.spread)
    with pytest.raises(DataError, match="same number"):
        Scale.new([2.0, 2.0])


def test_texts_become_sequences_with_numbers(encoder_tokenizer: Any) -> None:
    examples = [Labelled("good film", None, 1.5, "a:1"), Labelled("it is very bad film", None, "-2", "a:2")]
    made = ValueEncoder(encoder_tokenizer, 5).encode_all(examples)
    assert [one.value for one in made.items] == [1.5, -2.0]
    assert made.items[0].input_ids == [2, 4, 7, 3] and made.items[0].token_type_ids == [0] * 4
    assert made.truncated == ("a:2",) and made.longest == 7 and len(made.items[1]) == 5


def test_a_batch_says_which_numbers_count() -> None:
    records = Records([EncodedValue([1, 2, 3], [0, 0, 0], -100.0, "a:1"), EncodedValue([4], [0], 0.5, "a:2")])
    batch = ValueCollator(9, Scale(-100.0, 1.0, 1.0))([records[0], records[1], records[-1]])
    assert batch["labels"].tolist() == [0, 0, -100] and batch[VALUES].tolist() == [0.0, 100.5, 0.0]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9], [1, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert set(inputs_of(batch)) == {"input_ids", "attention_mask", "token_type_ids"}


class Told(nn.Module):
    """Gives the outputs that it was made with, one for each record."""

    def __init__(self, *outputs: float) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.outputs[: len(input_ids), None].to(torch.bfloat16).float())


def test_the_loss_is_the_squared_error_in_squares_of_the_spread() -> None:
    scale = Scale(3.0, 2.0, 2.0)
    objective, model = Numbers(scale), Told(0.0, 1.0, 0.5)
    batch = ValueCollator(0, scale)(
        [
            EncodedValue([1], None, 4.0, "a"),
            EncodedValue([1], None, 5.0, "b"),
            EncodedValue([1], None, 0.0, "c", known=False),
        ]
    )
    loss = objective.loss(model, batch, None)
    assert loss.item() == pytest.approx(((3 - 4) ** 2 + (5 - 5) ** 2) / 4 / 2)
    assert objective.loss(model, batch, 4).item() == pytest.approx(0.25 / 4)
    loss.backward()
    assert model.outputs.grad is not None and model.outputs.grad[2] == 0 and model.outputs.grad[0] != 0
    assert objective.counted(batch) == 2
    table = objective.tally(model, batch).stacked()
    assert table[:2, LOSSES].tolist() == pytest.approx([0.25, 0.0])
    assert table[:2, PREDICTED].tolist() == pytest.approx([3.0, 5.0]) and table[:2, EXPECTED].tolist() == [4.0, 5.0]
    assert objective.figures(table[:2])["mean_absolute_error"] == pytest.approx(0.5)
    assert "perplexity" not in objective.figures(table[:2])


@pytest.mark.parametrize(("offset", "spread"), [(2e3, 10.0), (1.7e9, 60.0), (1e12, 1e3)])
def test_large_labels_that_lie_close_together_are_told_apart(offset: float, spread: float) -> None:
    """Seconds since 1970 within a minute: in float32 all of them are one number."""
    values = [offset + spread * math.sin(place) for place in range(32)]
    scale = Scale.new(values)
    objective = Numbers(scale)
    batch = ValueCollator(0, scale)([EncodedValue([1], None, value, "a") for value in values])
    assert batch[VALUES].dtype == torch.float32 and len(set(batch[VALUES].tolist())) == 32

    class Right(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return SimpleNamespace(logits=batch[VALUES][:, None])

    class Mean(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(32, 1))

    assert objective.loss(Right(), batch, None).item() == 0
    assert objective.loss(Mean(), batch, None).item() == pytest.approx(1, rel=1e-5)
    table = objective.tally(Mean(), batch).stacked()
    assert table[:, EXPECTED].tolist() == pytest.approx(values, rel=0, abs=1e-5 * spread)
    error = sum(abs(value - scale.offset) for value in values) / 32
    assert objective.figures(table)["mean_absolute_error"] == pytest.approx(error, rel=1e-5)
    table[:, PREDICTED] = scale.offset + 1e-4 * (table[:, EXPECTED] - scale.offset)
    assert objective.figures(table)["pearson"] == pytest.approx(1, abs=1e-3)  # though predictions hardly differ


@pytest.mark.parametrize("values", [[0.1] * 3, [0.7] * 48, [0.3, 0.1 + 0.2], [1e-200, -1e-200]])
def test_labels_that_differ_by_rounding_alone_are_the_same(values: list[float]) -> None:
    with pytest.raises(DataError, match="same number"):
        Scale.new(values)


@pytest.mark.parametrize("size", [1e200, 1.7e308])
def test_labels_that_cannot_be_squared_are_refused(size: float) -> None:
    with pytest.raises(DataError, match="too large") as caught:
        Scale.new([size, size, -size])
    assert f"{-size:g} to {size:g}" in str(caught.value)


def test_a_prediction_that_is_not_finite_has_no_figures() -> None:
    objective = Numbers(Scale(0.0, 1.0, 1.0))
    table = objective.tally(
        Told(math.inf), ValueCollator(0, objective.scale)([EncodedValue([1], None, 1.0, "a")])
    ).stacked()
    assert objective.figures(table) == {}


def test_the_data_of_a_regression(write: Any, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"good film {n}", "label": n / 2} for n in range(9)]
    wanted = DataSettings(write("rated.jsonl", rows), eval_split=3, seed=1)
    loaded = load_examples(wanted)
    data = load_any(wanted, encoder_tokenizer, task="auto", max_length=8, samples=2, loaded=loaded)
    assert isinstance(data, ValueData) and (len(data.train), len(data.eval)) == (6, 3)
    said = " ".join(data.announcements)
    assert "task=regression" in said and "labels are numbers from" in said and "text/label form (text → label)" in said
    assert data.scale == Scale.new([one.value for one in data.train])
    assert data.info["label_spread"] == data.scale.spread and data.info["train_records"] == 6
    known = Scale(0.0, 1.0, 7.0)
    assert load_value_data(encoder_tokenizer, max_length=8, loaded=loaded, scale=known).scale is known


def test_whole_numbers_are_predicted_as_numbers_if_the_user_says_so(write: Any, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"good film {n}", "label": n % 5} for n in range(10)]
    wanted = DataSettings(write("stars.jsonl", rows))
    loaded = load_examples(wanted)
    data = load_any(wanted, encoder_tokenizer, task="regression", max_length=8, samples=0, loaded=loaded)
    assert isinstance(data, ValueData) and "task=regression predicts" not in " ".join(data.announcements)
    classes = load_any(wanted, encoder_tokenizer, task="auto", max_length=8, samples=0, loaded=loaded)
    assert not isinstance(classes, ValueData) and "task=regression predicts them" in " ".join(classes.announcements)
