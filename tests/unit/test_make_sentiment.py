"""The script that makes records of rated sentences, without its download."""

from __future__ import annotations

from scripts.make_sentiment import Rated, chosen, record

SENTENCES = [
    Rated("movie/1", "movie/1", 2.5, "good"),
    Rated("movie/2", "movie/2", -0.2, "so so"),
    Rated("movie/3", "movie/3", -1.25, "poor"),
    Rated("movie/4", "movie/4", 1.0, "twice"),
    Rated("movie/5", "movie/5", 3.0, "twice"),
]


def test_a_rating_is_the_label_of_a_regression() -> None:
    assert record(SENTENCES[2], "ratings") == {"text": "poor", "label": -1.25, "id": "movie/3", "review": "movie/3"}
    assert record(SENTENCES[2], "classes")["label"] == "negative"
    assert record(SENTENCES[0], "answers")["completion"] == "positive"


def test_a_regression_keeps_what_is_nobodys_clear_opinion() -> None:
    assert {one.text for one in chosen(SENTENCES, 0.0, 0)} == {"good", "so so", "poor"}
    assert {one.text for one in chosen(SENTENCES, 0.5, 0)} == {"good", "poor"}
    assert chosen(SENTENCES, 0.0, 3) == chosen(SENTENCES, 0.0, 3)
