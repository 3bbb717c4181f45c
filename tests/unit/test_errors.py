"""Errors: their parts, their text and their way through a pickle."""

from __future__ import annotations

import pickle

import pytest

from lorafit import errors
from lorafit.errors import ConfigError, LorafitError, nearest, some

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LorafitError)]


def test_every_part_has_its_line():
    error = ConfigError("wrong", found=3, expected="2", where="here", near=["near"], fix="mend it")
    assert str(error).splitlines() == [
        "wrong",
        "  where:    here",
        "  found:    3",
        "  expected: 2",
        "  nearest:  near",
        "  fix:      mend it",
    ]
    assert str(ConfigError("wrong")) == "wrong"
    assert "found:    0" in str(ConfigError("wrong", found=0))  # a falsy value is a value


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_they_survive_a_pickle(kind):
    error = kind("wrong", found=3, expected="2", where="here", near=("a", "b"), fix="mend it")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind and str(back) == str(error)
    assert (back.found, back.expected, back.where, back.near, back.fix) == (3, "2", "here", ("a", "b"), "mend it")


def test_the_tree():
    assert {kind.__name__ for kind in KINDS} == {
        "LorafitError",
        "ConfigError",
        "TargetError",
        "CheckpointError",
        "MergeError",
        "StateError",
        "TrainingError",
        "DataError",
        "MissingExtraError",
    }
    assert all(kind.__name__ in errors.__doc__ for kind in KINDS)
    assert issubclass(errors.ConfigError, ValueError) and issubclass(errors.MissingExtraError, ImportError)
    assert issubclass(errors.LorafitWarning, UserWarning)


def test_near_names():
    assert nearest("learnig_rate", ["learning_rate", "warmup"]) == ("learning_rate",)
    assert nearest("zzz", ["learning_rate"]) == ()
    assert nearest("a", iter(["a", "b"])) == ("a",)


def test_some_of_many():
    assert some([]) == "" and some(["a", "b"]) == "a, b"
    assert some("abcdefg") == "a, b, c, d, e and 2 more"
    assert some(iter("abc"), limit=1) == "a and 2 more"
