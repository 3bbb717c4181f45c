"""A search of rates depends on what it found alone, and finds a better rate than it begins with."""

from __future__ import annotations

import math

from lorafit.experiments.candidates import candidates, default_rates, with_heads
from lorafit.experiments.tuning import Search, best


def loss(rate: float) -> float | None:
    """Lowest at 2e-3; too high rates diverge."""
    return None if rate > 8e-3 else (math.log(rate) - math.log(2e-3)) ** 2


def search(folder, count, *, again=False):
    found = Search(folder, "lora", 1e-3, count)
    while (rate := found.next()) is not None:
        if again:  # as after a kill: nothing is in memory
            found = Search(folder, "lora", 1e-3, count)
            assert found.next() == rate
        found.tell(rate, loss(rate))
    return found.tried


def test_a_search_that_is_killed_tries_the_same_rates(tmp_path):
    tried = search(tmp_path / "one", 8)
    assert [one.rate for one in tried[:3]] == [1e-3, 3.16e-3, 3.16e-4] and len(tried) == 8
    assert any(one.loss is None for one in tried)
    assert search(tmp_path / "two", 8, again=True) == tried
    search(tmp_path / "three", 4)
    assert search(tmp_path / "three", 8) == tried
    chosen = best(tried)
    assert chosen is not None and 1.5e-3 < chosen.rate < 3.2e-3
    assert best(tuple(one for one in tried if one.loss is None)) is None


def test_candidates_have_searches_of_their_own(tmp_path):
    one, other = Search(tmp_path, "lora", 1e-3, 2), Search(tmp_path, "dora", 1e-2, 2)
    one.tell(1e-3, 1.0)
    assert other.tried == () and other.next() == 1e-2


def test_a_head_learns_at_one_rate_beside_every_method(llama):
    said: list[str] = []
    made = candidates([("flags", {"model": str(llama)})], ["lora", "vera"], ["base"], said.append)
    assert with_heads(made, said.append, labelled=False) == made
    rates = default_rates(made, said.append, labelled=True)
    headed = with_heads(made, said.append, labelled=True)
    assert {one.settings.full_learning_rate for one in headed} == {rates["lora"]} and rates["vera"] != rates["lora"]
    assert f"learns at {rates['lora']:.2g} in every run" in said[-1]
    chosen = candidates([("flags", {"model": str(llama), "full_learning_rate": 0.5})], ["lora"], ["base"], said.append)
    assert with_heads(chosen, said.append, labelled=True) == chosen
