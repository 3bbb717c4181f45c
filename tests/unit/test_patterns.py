"""Paths and patterns: what PEFT's expression finds, without trying every key on every path."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafit as lf
from lorafit.patterns import Patterns, heads, inside, tails
from lorafit.targets import check_keys


def test_a_path_from_both_ends():
    assert list(tails("a.b.c")) == ["a.b.c", "b.c", "c"] and list(tails("")) == [""]
    assert list(heads("a.b.c")) == ["a", "a.b", "a.b.c"] and list(heads("")) == [""]
    assert inside("a.b", {"a"}) and inside("a.b", {"a.b": 1}) and inside("", {""})
    assert not inside("ab.c", {"a"}) and not inside("a", {"a.b"}) and not inside("a", {""})


def test_the_first_key_that_fits_counts():
    pattern = Patterns({"q_proj": 1, r"layers\.0\..*": 2, "model": 3})
    assert pattern.find("model.layers.0.q_proj") == 1
    assert pattern.find("model.layers.0.k_proj") == 2
    assert pattern.find("model.layers.10.k_proj") is None
    assert pattern.find("x_q_proj") is None
    assert Patterns({"^q_proj": 4}).find("model.q_proj") is None
    assert Patterns({"a|b": 5}).find("x.b") == 5
    assert Patterns({}).find("x") is None
    assert Patterns({"layers.1.q": 6, "layers_1_q": 7}).find("m.layers_1_q") == 6  # a dot is any character there
    with pytest.raises(re.error):
        Patterns({"(": 1})


def test_keys_that_fit_nothing():
    assert Patterns({"q": 1, "m.q": 2, "k": 3, ".*": 4}).idle(["m.q"]) == ["k"]
    assert Patterns({"q": 1}).idle([]) == ["q"] and Patterns({}).idle(["q"]) == []


keys = st.text(alphabet="ab._-#0^\\*|", max_size=5)
paths = st.text(alphabet="ab._-#0\n", max_size=7)


def compiles(key: str) -> bool:
    try:
        re.compile(key)
        re.compile(rf"(.*\.)?({key})")
    except re.error:
        return False
    return True


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(keys.filter(compiles), max_size=5, unique=True), st.lists(paths, max_size=4))
def test_what_is_found_is_what_pefts_expression_finds(names, places):
    pattern = Patterns({name: number for number, name in enumerate(names)})
    fits = {path: [name for name in names if re.fullmatch(rf"(.*\.)?({name})", path)] for path in places}
    for path in places:
        assert pattern.find(path) == (names.index(fits[path][0]) if fits[path] else None)
    assert pattern.idle(places) == [name for name in names if not any(name in each for each in fits.values())]


@pytest.mark.parametrize(
    "escape", [str, re.escape, lambda path: "^" + re.escape(path)], ids=["plain", "escaped", "whole"]
)
def test_a_key_for_each_layer_is_looked_up_and_not_tried(escape, monkeypatch):
    def refused(*_: object) -> None:
        raise AssertionError("an expression was tried")

    monkeypatch.setattr("lorafit.patterns.expression", refused)
    layers = [f"model.layers.{number}.mlp.up_proj" for number in range(120)]
    pattern = Patterns({escape(path): number for number, path in enumerate(layers)})
    assert [pattern.find(path) for path in layers] == list(range(120)) and pattern.idle(layers) == []


def test_a_key_may_refer_back_to_its_own_groups():
    # Behind the two groups that a key is put into, as it always was.
    check_keys({r"(\d)\3": 1}, ["10", "11"], "rank_pattern")
    assert Patterns({r"(\d)\3": 1}).find("11") == 1
    with pytest.raises(lf.TargetError, match="not a regular expression"):
        check_keys({r"(\d)\9": 1}, ["10", "11"], "rank_pattern")
