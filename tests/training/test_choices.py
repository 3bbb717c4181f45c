"""Answers of a closed set, scored: as the plain forward has it, whatever way is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorafit.errors import DataError
from lorafit.training import choices
from lorafit.training.choices import closed_answers, places, score
from lorafit.training.examples import Conversation, Document, Labelled, Turn
from lorafit.training.models import Located, load_tokenizer

ANSWERS = ("bad", "good", "rather good")


def asked(question: str, answer: str, where: str = "here") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), where)


@pytest.fixture
def llama(model_dir: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture
def tokenizer(model_dir: Any) -> Any:
    return load_tokenizer(Located(str(model_dir), "tiny"))


@pytest.fixture
def questions() -> list[Conversation]:
    return [asked("how was " + "it " * (n % 4 + 1) + f"{n}?", ANSWERS[n % 3], f"file:{n + 1}") for n in range(11)]


def by_hand(model: Any, tokenizer: Any, one: Conversation, answer: str) -> float:
    """log p of the answer and of the token that ends it, from the model's own logits."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": one.turns[0].content}], tokenize=False, add_generation_prompt=True
    )
    front = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    return sum(float(logs[place - 1, ids[place]]) for place in range(len(front), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_are_those_of_the_plain_forward(llama, tokenizer, questions, batch_size):
    scored = score(llama, tokenizer, questions, ANSWERS, max_length=64, batch_size=batch_size)
    expected = [[by_hand(llama, tokenizer, one, answer) for answer in ANSWERS] for one in questions]
    assert scored.kept == tuple(range(11)) and scored.dropped == ()
    torch.testing.assert_close(scored.values, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-5)


def test_the_prompt_is_computed_once_where_that_gives_the_same(llama, tokenizer, questions, monkeypatch):
    rows, _, _ = choices._encoded(tokenizer, questions, ANSWERS, 64)
    way = choices._way(llama, tokenizer, rows[:2])
    assert isinstance(way, choices._Shared)
    seen: list[tuple[int, ...]] = []
    hook = llama.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        way(llama, rows[:2])
    hook.remove()
    longest = len("rather good") + 2  # the prompt's last token, and the one that ends the answer
    assert len(seen) == 2 and seen[0][0] == 2 and seen[1] == (6, longest)
    monkeypatch.setattr(type(llama.model), "forward", refusing(type(llama.model).forward))
    assert isinstance(choices._way(llama, tokenizer, rows[:2]), choices._Whole)


def refusing(forward: Any) -> Any:
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise NotImplementedError("no states")
        return forward(self, *args, **kwargs)

    return inner


def test_earlier_turns_are_prompt(llama, tokenizer):
    turns = (Turn("user", "a?"), Turn("assistant", "good"), Turn("user", "b?"), Turn("assistant", "bad"))
    long = Conversation(turns, "here")
    scored = score(llama, tokenizer, [long], ANSWERS, max_length=128)
    rows, _, _ = choices._encoded(tokenizer, [long], ANSWERS, 128)
    assert [len(one.input_ids) - one.labels.count(-100) for one in rows[0]] == [4, 5, 12]
    assert torch.isfinite(scored.values).all()


def test_what_does_not_fit_is_named(llama, tokenizer):
    scored = score(
        llama, tokenizer, [asked("x" * 90, "bad", "file:1"), asked("x", "bad", "file:2")], ANSWERS, max_length=64
    )
    assert scored.kept == (1,) and scored.dropped == ("file:1",) and scored.values.shape == (1, 3)
    none = score(llama, tokenizer, [asked("x" * 90, "bad", "file:1")], ANSWERS, max_length=64)
    assert none.kept == () and none.values.shape == (0, 3)


def test_the_model_is_left_as_it_was(llama, tokenizer, questions):
    llama.train()
    first = score(llama, tokenizer, questions, ANSWERS, max_length=64)
    assert llama.training and all(one.grad is None for one in llama.parameters())
    assert torch.equal(first.values, score(llama, tokenizer, questions, ANSWERS, max_length=64).values)


def test_what_a_closed_set_is():
    assert closed_answers([asked("q", answer) for answer in ["b", "a", "b", "a"]]) == ("a", "b")
    assert closed_answers([asked("q", "a")] * 9) is None, "one answer is no choice"
    assert closed_answers([asked("q", f"{n}") for n in range(12)]) is None, "each comes once"
    assert closed_answers([asked("q", f"{n % 21}") for n in range(210)]) is None, "too many"
    assert closed_answers([Document("a text", "here")] * 4) is None
    assert closed_answers([Labelled("a", None, "x", "here")] * 4) is None


def test_an_answer_outside_of_the_set_is_an_error():
    assert places([asked("q", "good"), asked("q", "bad")], ANSWERS) == [1, 0]
    with pytest.raises(DataError) as error:
        places([asked("q", "goood", "file:7")], ANSWERS)
    assert error.value.where == "file:7" and error.value.near[0] == "good"
    with pytest.raises(DataError):
        score(None, None, [Document("a text", "file:3")], ANSWERS, max_length=8)
