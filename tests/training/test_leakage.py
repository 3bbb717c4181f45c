"""Repetitions and leaks: exact ones by digest, near ones by MinHash and a full comparison."""

from __future__ import annotations

import random

import pytest

from lorafit.training.examples import Conversation, Document, Labelled, Turn
from lorafit.training.leakage import NEAR, can_compare_nearly, compare, near

WORDS = [f"word{n}" for n in range(400)]
needs_datasketch = pytest.mark.skipif(not can_compare_nearly(), reason="needs datasketch")


def asked(question: str, answer: str, where: str) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), where)


def sentence(chance: random.Random, words: int = 40) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def test_repetitions_are_told_apart():
    train = [
        asked("What is 1?", "one", "a:1"),
        asked("What is 1?", "one", "a:2"),
        asked("What is 1?", "uno", "a:3"),
        asked("what  is 1", "eins", "a:4"),
        asked("What is 2?", "two", "a:5"),
    ]
    found, leaked = compare(train)
    assert (found.whole, found.question, found.alike) == (("a:2",), ("a:3",), ("a:4",))
    assert leaked.whole == leaked.question == leaked.alike == leaked.answer == ()


def test_leaks_are_told_apart_also_from_what_was_removed():
    long = "a long answer that nobody gives to two different questions"
    train = [asked("What is 1?", "one", "a:1"), asked("And 4?", long, "a:2"), asked("short?", "yes", "a:3")]
    removed = [asked("What is 9?", "nine", "a:4"), asked("What is 8?", "eight", "a:5")]
    held = [
        asked("What is 9?", "nine", "b:1"),
        asked("What is 8?", "acht", "b:2"),
        asked("WHAT IS 1", "one", "b:3"),
        asked("And 5?", long.upper(), "b:4"),
        asked("other?", "yes", "b:5"),
    ]
    found, leaked = compare(train, held, removed)
    assert found.whole == ()
    assert (leaked.whole, leaked.question) == (("b:1",), ("b:2",))
    assert (leaked.alike, leaked.answer) == (("b:3",), ("b:4",)), "short answers may well be equal"


def test_pairs_and_turns_do_not_run_into_each_other():
    found, _ = compare([Labelled("a", "b\nc", "x", "a:1"), Labelled("a\nb", "c", "x", "a:2")])
    assert found.whole == found.question == ()
    one = Conversation((Turn("system", "a"), Turn("user", "b"), Turn("assistant", "c")), "a:1")
    two = Conversation((Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")), "a:2")
    found, _ = compare([one, two])
    assert found.whole == found.question == () and found.alike == ("a:2",)


def test_what_has_no_words_is_compared_as_it_is():
    found, _ = compare([Document("!!", "a:1"), Document("??", "a:2"), Document("!!", "a:3")])
    assert found.whole == ("a:3",) and found.alike == ()


def test_two_labels_for_one_text():
    found, _ = compare([Labelled("a", None, "x", "a:1"), Labelled("a", None, "y", "a:2")])
    assert found.question == ("a:2",)


@needs_datasketch
def test_near_pairs_are_found_and_others_are_not():
    chance = random.Random(0)
    texts = [sentence(chance) for _ in range(200)]
    train = [asked(text, "so it is", f"a:{n}") for n, text in enumerate(texts)]
    train.append(asked(f"{texts[7]} word1", "so it is", "a:near"))
    train.append(asked(texts[9].upper(), "So it is!", "a:alike"))
    half = " ".join([*texts[20].split()[:20], *texts[30].split()[20:]])
    train.append(asked(half, "so it is", "a:half"))
    held = [asked(f"word2 {texts[11]}", "so it is", "b:near"), asked(sentence(chance), "so it is", "b:far")]
    found = near(train, held)
    assert found.repeats == (("a:near", "a:7"),), "what differs in case alone is found exactly"
    assert found.leaks == (("a:11", "b:near"),) and found.compared == len(train)


@needs_datasketch
def test_many_near_records_are_told_once_each_and_leaks_of_them_all():
    base = " ".join(WORDS[:60])
    train = [Document(f"{base} number {n}", f"a:{n}") for n in range(50)]
    found = near(train, [Document(f"{base} and more", "b:1")])
    places = [where for where, _ in found.repeats]
    assert len(places) == len(set(places)) >= 47 and "a:0" not in places, "sketches may miss a few"
    assert len({other for _, other in found.repeats}) <= 3, "few stand for all, so that nothing is quadratic"
    assert len(found.leaks) >= 47 and {other for _, other in found.leaks} == {"b:1"}


@needs_datasketch
def test_templates_are_not_near():
    """Questions of one pattern share runs of words, and are different questions."""
    train = [asked(f"what is {n} plus {n + 3}?", f"it is {2 * n + 3}, of course", f"a:{n}") for n in range(30)]
    assert near(train, train[:0]).repeats == ()


@needs_datasketch
def test_of_more_records_than_the_bound_an_even_choice_is_compared():
    train = [Document(f"text number {n} of its own, {n * n} and {n**3}", f"a:{n}") for n in range(40)]
    assert near(train, (), most=10).compared == 10


@needs_datasketch
def test_scripts_without_spaces_and_very_short_texts():
    text = "機械学習のモデルを微調整する方法について説明してください。低ランク適応とは何ですか。"
    found = near(
        [Document(text, "a:1"), Document(f"{text}はい", "a:2"), Document("一", "a:3"), Document("二", "a:4")], ()
    )
    assert found.repeats == (("a:2", "a:1"),)


def test_the_bound_is_the_documented_one():
    assert NEAR == 0.8
