"""What fits into a time: never fewer than three seeds, and what is left out is said."""

from __future__ import annotations

import pytest

from lorafit.errors import ConfigError
from lorafit.experiments.candidates import candidates
from lorafit.experiments.spending import Speed, plan_freely, plan_within, remember, remembered
from lorafit.training.spans import read_duration


@pytest.fixture(scope="module")
def three():
    """LoRA, DoRA and the base."""
    return candidates([("the test", {"num_train_epochs": 2})], ["lora", "dora"], ["base"], print)


def cost(plan, speed):
    """Seconds of the plan for two methods."""
    return 2 * (plan.rates + len(plan.seeds)) * (speed.around + 1.3 * speed.step * plan.steps) + speed.around


def test_what_is_asked_for_is_planned_without_a_budget(three):
    plan = plan_freely(three, 800, 5, 3)
    assert (plan.steps, plan.records, plan.rates, plan.seeds) == (200, 800, 5, (43, 44, 45))
    assert plan.said == ("200 steps on 800 records in each run, 5 rates and 3 seeds for each candidate: 17 runs",)
    with pytest.raises(ConfigError, match="too few seeds"):
        plan_freely(three, 800, 5, 2)


def test_no_rates_are_told_of_where_all_are_given():
    fixed = candidates([("the test", {"learning_rate": 1e-3})], ["lora", "dora"], ["base"], print)
    plan = plan_freely(fixed, 800, 5, 3)
    assert plan.rates == 0 and plan.said[0].endswith(" in each run, 3 seeds for each candidate: 7 runs")
    planned = plan_within(3600, 30, Speed(5.0, 10.0), fixed, 800, 5, 3)
    assert planned.rates == 0 and not any("of 5 rates" in line for line in planned.said)
    mixed = candidates([("the test", {"lora": {"learning_rate": 1e-3}})], ["lora", "dora"], ["base"], print)
    assert "and 5 rates for those without a given one: 12 runs" in plan_freely(mixed, 800, 5, 3).said[0]


@pytest.mark.parametrize("minutes", [10, 20, 40, 80, 400])
def test_a_plan_fits_into_its_time(three, minutes):
    speed = Speed(0.5, 10.0)
    plan = plan_within(60 * minutes, 30, speed, three, 800, 5, 3)
    assert cost(plan, speed) <= 60 * minutes - 30
    assert len(plan.seeds) >= 3 and 3 <= plan.rates <= 5 and 20 <= plan.steps <= 200
    assert (plan.steps < 200) == any("steps, so that" in line for line in plan.said)
    assert (plan.rates < 5) == any("of 5 rates" in line for line in plan.said)
    if minutes == 400:
        assert (plan.steps, plan.rates, len(plan.seeds)) == (200, 5, 5)


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_not(three):
    speed = Speed(0.5, 10.0)
    with pytest.raises(ConfigError) as caught:
        plan_within(60, 30, speed, three, 800, 5, 3)
    needed = read_duration(caught.value.fix.split()[1].rstrip(","))
    plan = plan_within(needed, 30, speed, three, 800, 5, 3)
    assert (plan.rates, len(plan.seeds)) == (3, 3) and plan.steps >= 20


def test_a_plan_is_made_once(three, tmp_path):
    plan = plan_within(2400, 30, Speed(0.5, 10.0), three, 800, 5, 3)
    remember(plan, {"seconds": 2400}, tmp_path)
    assert remembered({"seconds": 2400}, tmp_path) == plan and remembered({"seconds": 2500}, tmp_path) is None


@pytest.mark.parametrize("text", ["soon", "-3min", "0", "3 weeks"])
def test_what_is_no_length_of_time_is_refused(text):
    with pytest.raises(ConfigError, match="length of time"):
        read_duration(text)
