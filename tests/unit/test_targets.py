"""Which module paths a pattern names, and the shortest list that names given ones."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import TargetError
from lorafit.targets import check_keys, has_suffix, match, suffixes_for

PATHS = ["", "model", "model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.10.q_proj", "model.lm.q_proj_b"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], ["model.layers.0.q_proj", "model.layers.10.q_proj"]),
        (["0.q_proj"], ["model.layers.0.q_proj"]),  # whole components: not "10.q_proj"
        (["k_proj", "q_proj"], PATHS[2:5]),  # in the model's order
        (["model"], ["model"]),
        (("model.layers.0.q_proj",), ["model.layers.0.q_proj"]),
        (r".*\.q_proj", ["model.layers.0.q_proj", "model.layers.10.q_proj"]),
        (r"model\.layers\.\d\..*", ["model.layers.0.q_proj", "model.layers.0.k_proj"]),
        (r".*layers.*|model", ["model", *PATHS[2:5]]),
    ],
    ids=str,
)
def test_match(patterns, expected):
    assert match(patterns, PATHS, PATHS, "targets") == expected


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [
        (["q_prj"], ["targets matches no module", "'q_prj'", "q_proj", "write 'q_proj'"]),
        (["q_proj", "zzz"], ["'zzz'", "names among"]),
        ("q_proj", ["'q_proj'", "whole path", "targets=['q_proj']"]),
        ("(", ["not a regular expression", "'('", "targets=['(']"]),
        ([""], ["no module suffix", "''"]),
        ([7], ["no module suffix", "7"]),
        (7, ["neither a string nor a list", "7"]),
        (None, ["neither a string nor a list", "None", "all-linear"]),
    ],
    ids=str,
)
def test_what_matches_nothing_is_an_error_that_helps(patterns, parts):
    with pytest.raises(TargetError) as caught:
        match(patterns, PATHS, PATHS, "targets")
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.fix


def test_has_suffix():
    assert has_suffix("a.b", "b") and has_suffix("a.b", "a.b") and has_suffix("", "")
    assert not has_suffix("a.bb", "b") and not has_suffix("b.a", "b")


def test_check_keys():
    check_keys({"q_proj": 1}, PATHS, "rank_pattern")
    with pytest.raises(TargetError, match="rank_pattern matches no module") as caught:
        check_keys({"q_proj": 1, "qproj": 2}, PATHS, "rank_pattern")
    assert "'qproj'" in str(caught.value) and "q_proj" in caught.value.near
    with pytest.raises(TargetError, match="key of alpha_pattern is not a regular expression"):
        check_keys({"[": 1}, PATHS, "alpha_pattern")


parts = st.sampled_from(
    ["a", "b", "ab", "0", "1", "10", "q.", "x+", "("]
)  # dots make deeper paths; others need escapes
paths = st.lists(parts, min_size=1, max_size=4).map(lambda names: ".".join(names).rstrip("."))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(paths, min_size=1, max_size=8, unique=True), st.data())
def test_suffixes_for_names_exactly_the_sites(modules, data):
    sites = data.draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    named = suffixes_for(sites, modules)
    if isinstance(named, str):
        found = [path for path in modules if re.fullmatch(named, path)]
    else:
        assert named == sorted(set(named))
        found = [path for path in modules if any(has_suffix(path, name) for name in named)]
    assert set(found) == set(sites)
    assert match(named, modules, modules, "targets") == [path for path in modules if path in sites]


@pytest.mark.parametrize(
    ("sites", "modules", "expected"),
    [
        (["m.0.q", "m.1.q"], ["m", "m.0", "m.0.q", "m.0.k", "m.1.q", "m.1.k"], ["q"]),
        (["m.0.q"], ["m", "m.0.q", "m.1.q"], ["m.0.q"]),
        (["q"], ["q", "m.q"], "q"),
        ([""], ["", "a"], ""),
    ],
)
def test_suffixes_for_prefers_the_shortest(sites, modules, expected):
    assert suffixes_for(sites, modules) == expected
