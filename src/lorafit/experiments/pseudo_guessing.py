"""What a trained model says to records without an answer, and how sure it is.

Guesser
├── Closed   one of few answers: classes of a classifier, or the closed set of a language model (`training.choices`)
└── Open     whatever the model writes: its greedy answer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lorafit.errors import DataError, some
from lorafit.experiments.measuring import Model
from lorafit.experiments.pseudo_calibration import Calibration, calibrate, summarise
from lorafit.experiments.pseudo_reading import answer_name
from lorafit.rest import at_rest
from lorafit.training.batches import Collator, LabelCollator
from lorafit.training.choices import Scored, score
from lorafit.training.classify import LabelEncoder
from lorafit.training.config import Settings
from lorafit.training.encode import Encoder
from lorafit.training.examples import Example, Labelled
from lorafit.training.sequences import IGNORED

WRITTEN = 8
"""Answers written at a time."""
GRID = tuple(2 ** (step / 4) for step in range(-8, 13))
"""Temperatures that are tried for written answers: 0.25 to 8."""


@final
@dataclass(frozen=True)
class Guess:
    """An answer of the model's.

    Attributes:
        place: of the record among those that were given.
        answer: a class's name, one of the closed set, or what was written.
        confidence: how sure the model is of it, with the temperature.
    """

    place: int
    answer: str
    confidence: float


@final
@dataclass(frozen=True)
class Guesses:
    """Answers to many records; `left` are the places where those were read that got none, `why` why."""

    items: tuple[Guess, ...]
    left: tuple[str, ...] = ()
    why: str = ""


class Guesser(ABC):
    """A finished model as one that answers."""

    @abstractmethod
    def calibrate(self, held: Sequence[Example], asked: float) -> Calibration:
        """Finds the temperature on held-out records, and what the confidence that will be asked for is worth there.

        Raises:
            DataError: none of them fits into the length.
        """

    @abstractmethod
    def guess(self, examples: Sequence[Example], temperature: float) -> Guesses:
        """The model's answers."""

    @abstractmethod
    def right(self, examples: Sequence[Example]) -> tuple[float, ...] | None:
        """1 for each record that is answered rightly, else 0; None where an answer can be right in many words."""


@final
class Closed(Guesser):
    """Answers out of few.

    Args:
        answers: those.
        scorer: gives the score of each answer to each record.
    """

    def __init__(self, answers: Sequence[str], scorer: Callable[[Sequence[Example]], Scored]) -> None:
        self._answers = tuple(answers)
        self._scorer = scorer

    def calibrate(self, held: Sequence[Example], asked: float) -> Calibration:
        scored = self._scorer(held)
        if not scored.kept:
            raise DataError(
                "no validation record fits into the length, so that nothing tells what a confidence is worth",
                where="max_length",
                found=some(scored.dropped, 3),
                expected="records that fit with every answer",
                fix="raise --max-length",
            )
        return calibrate(scored.values, [self._gold(held[place]) for place in scored.kept], asked)

    def guess(self, examples: Sequence[Example], temperature: float) -> Guesses:
        scored = self._scorer(examples)
        sure, chosen = (scored.values / temperature).softmax(-1).max(-1)
        items = tuple(
            Guess(place, self._answers[answer], confidence)
            for place, answer, confidence in zip(scored.kept, chosen.tolist(), sure.tolist(), strict=True)
        )
        return Guesses(items, scored.dropped, "longer than max_length")

    def right(self, examples: Sequence[Example]) -> tuple[float, ...] | None:
        scored = self._scorer(examples)
        found = dict(zip(scored.kept, scored.values.argmax(-1).tolist(), strict=True))
        # A record that could not be scored is not answered rightly.
        return tuple(float(found.get(place) == self._gold(one)) for place, one in enumerate(examples))

    def _gold(self, example: Example) -> int:
        """The place of a record's own answer; -1 for one that training did not show, which no model can give."""
        name = answer_name(example)
        return self._answers.index(name) if name in self._answers else -1


@final
class Open(Guesser):
    """What a language model writes: each next token the most probable one.

    Its confidence is the mean probability of the answer's tokens, the one that ends it included. The temperature is the
    one under which the tokens of the held-out answers are most probable.
    """

    def __init__(self, loaded: Model, settings: Settings) -> None:
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._encoder = Encoder(loaded.tokenizer, settings.max_length)
        self._length = settings.max_new_tokens

    def calibrate(self, held: Sequence[Example], asked: float) -> Calibration:
        temperature = self._temperature(held)
        written, _ = self._written(held, (1.0, temperature))
        before, after, right = [], [], []
        for place, (text, sure) in written.items():
            before.append(sure[0])
            after.append(sure[1])
            right.append(float(_plain(text) == _plain(answer_name(held[place]))))
        if not right:  # not one answer came to an end: nothing is known of the confidences
            before, after, right = [0.0], [0.0], [0.0]
        first, then, true = (torch.tensor(each, dtype=torch.float64) for each in (before, after, right))
        return summarise(temperature, first, then, true, asked)

    def guess(self, examples: Sequence[Example], temperature: float) -> Guesses:
        written, left = self._written(examples, (temperature,))
        items = tuple(Guess(place, text, sure[0]) for place, (text, sure) in written.items())
        return Guesses(items, tuple(examples[place].where for place in left), "the answer did not come to an end")

    def right(self, examples: Sequence[Example]) -> tuple[float, ...] | None:
        return None

    def _temperature(self, held: Sequence[Example]) -> float:
        items = self._encoder.encode_all(held).items
        collate, device = Collator(self._tokenizer.pad_token_id), next(self._model.parameters()).device
        losses = torch.zeros(len(GRID), dtype=torch.float64)
        with at_rest(self._model):
            for start in range(0, len(items), WRITTEN):
                batch = {key: one.to(device) for key, one in collate(items[start : start + WRITTEN]).items()}
                following = batch.pop("labels")[:, 1:]
                learnt = following != IGNORED
                logits = self._model(**batch).logits[:, :-1][learnt].float()
                for number, temperature in enumerate(GRID):
                    lost = torch.nn.functional.cross_entropy(logits / temperature, following[learnt], reduction="sum")
                    losses[number] += float(lost)
        return GRID[int(losses.argmin())]

    def _written(
        self, examples: Sequence[Example], temperatures: Sequence[float]
    ) -> tuple[dict[int, tuple[str, list[float]]], list[int]]:
        """Place → the answer and its confidence under each temperature; and the places of those without an end."""
        samples = [self._encoder.sample(one) for one in examples]
        order = sorted(range(len(samples)), key=lambda place: len(samples[place].input_ids))
        found: dict[int, tuple[str, list[float]]] = {}
        left: list[int] = []
        for start in range(0, len(order), WRITTEN):
            places = order[start : start + WRITTEN]
            ids, logits = self._generated([samples[place].input_ids for place in places])
            for row, place in enumerate(places):
                end = self._end(ids[row].tolist())
                text = "" if end is None else self._tokenizer.decode(ids[row, :end], skip_special_tokens=True).strip()
                if end is None or not text:
                    left.append(place)
                    continue
                own, said = logits[row, : end + 1].float(), ids[row, : end + 1, None]
                sure = [float((own / each).softmax(-1).gather(-1, said).mean()) for each in temperatures]
                found[place] = (text, sure)
        return dict(sorted(found.items())), sorted(left)

    def _generated(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(records, tokens) what is written behind each prompt, and (records, tokens, vocabulary) the logits."""
        width, pad = max(map(len, prompts)), self._tokenizer.pad_token_id
        device = next(self._model.parameters()).device
        rows = [[pad] * (width - len(one)) + list(one) for one in prompts]
        masks = [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
        with at_rest(self._model):
            made = self._model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(masks, device=device),
                max_new_tokens=self._length,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=self._tokenizer.eos_token_id,
                use_cache=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return made.sequences[:, width:].cpu(), torch.stack(made.logits, 1).cpu()

    def _end(self, ids: Sequence[int]) -> int | None:
        """The place of the token that ends the answer; None if there is none."""
        end = self._tokenizer.eos_token_id
        return ids.index(end) if end in ids else None


def guesser(loaded: Model, settings: Settings, answers: Sequence[str] | None) -> Guesser:
    """The way in which this model answers.

    Args:
        loaded: the finished model.
        settings: of its run.
        answers: the closed set of a language model's answers; None for a classifier, or where they are open.
    """
    size = int(settings.training["per_device_eval_batch_size"])
    if loaded.labels is not None:
        return Closed(loaded.labels, lambda examples: _classified(loaded, settings.max_length, size, examples))
    if answers is None:
        return Open(loaded, settings)

    def scored(examples: Sequence[Example]) -> Scored:
        return score(loaded.model, loaded.tokenizer, examples, answers, max_length=settings.max_length, batch_size=size)

    return Closed(answers, scored)


def _classified(loaded: Model, max_length: int, size: int, examples: Sequence[Example]) -> Scored:
    """A classifier's logits."""
    labels = loaded.labels or ()
    texts = [replace(one, label=labels[0]) for one in examples if isinstance(one, Labelled)]
    items = LabelEncoder(loaded.tokenizer, max_length, labels).encode_all(texts).items
    collate, device = LabelCollator(loaded.tokenizer.pad_token_id), next(loaded.model.parameters()).device
    values = torch.zeros(len(items), len(labels), dtype=torch.float64)
    order = sorted(range(len(items)), key=lambda place: len(items[place]))
    with at_rest(loaded.model):
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch: dict[str, Any] = dict(collate([items[place] for place in places]))
            del batch["labels"]
            logits = loaded.model(**{key: one.to(device) for key, one in batch.items()}).logits
            values[torch.tensor(places)] = logits.double().cpu()
    return Scored(values, tuple(range(len(items))), ())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
