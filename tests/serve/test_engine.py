"""The engine: what it answers is what `generate` answers alone, whoever comes and goes, within its limits."""

from __future__ import annotations

import copy
import functools
import random
import time

import pytest

from lorafit.errors import ConfigError, DataError
from lorafit.serve.batch import Forward
from lorafit.serve.engine import Engine, Limits
from lorafit.serve.requests import BusyError, Finish
from lorafit.serve.row import Row
from lorafit.serve.runnable import windows
from lorafit.serve.schedule import Schedule, alike

FAMILIES = ("llama", "gpt2", "mistral", "gemma2")


# Answers ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "limits",
    [Limits(rows=6), Limits(rows=8, chunk=3), Limits(rows=9, chunk=7, cached=150)],
    ids=["whole", "portions", "little-cache"],
)
def test_each_answer_is_what_generate_writes_alone(kit, family, limits):
    model = kit.make_model(family)
    bank = kit.PlainBank(model)
    numbers = random.Random(f"{family}{limits}")
    asked = kit.requests(numbers, 10, longest=30, tokens=40)
    told, schedule = kit.drive(model, bank, asked, limits, numbers)
    for one, tell in zip(asked, told, strict=True):
        assert tell.ids == kit.alone(model, bank, one)
        full = len(tell.ids) == one.sampling.max_tokens
        assert tell.finish is (Finish.LENGTH if full else Finish.STOP)
        assert tell.last.tokens == len(tell.ids) + (not full)
    assert max(map(len, bank.passes)) >= 3 and not +bank.uses
    assert schedule.cache_bytes == schedule.columns == 0
    assert limits.cached < 1000 or schedule.set_aside == 0
    assert schedule.tokens == sum(tell.last.tokens for tell in told)
    assert schedule.finished[Finish.STOP] + schedule.finished[Finish.LENGTH] == len(asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_who_came_last_is_set_aside_where_the_cache_is_full_and_taken_up_again(kit, family):
    model = kit.make_model(family)
    bank = kit.PlainBank(model)
    asked = [kit.ask([7, 8, number], 60, name) for number, name in enumerate((None, "a", "b"))]
    asked.append(kit.ask([7, 8, 3], 60, "c", temperature=0.9, seed=3))
    told, schedule = kit.drive(model, bank, asked, Limits(cached=122), random.Random(0))
    assert schedule.set_aside >= 3 and max(map(len, bank.passes)) == 4
    # The first one ran through, the others were taken up again in their order.
    first = max(place for place, names in enumerate(bank.passes) if None in names)
    assert bank.passes[first + 1] == ("a",) and bank.passes[-1] == ("c",)
    assert [tell.ids for tell in told[:3]] == [kit.alone(model, bank, one) for one in asked[:3]]
    free, _ = kit.drive(model, bank, asked[3:], Limits(), random.Random(0))
    assert free[0].ids == told[3].ids and len(told[3].ids) == 60
    assert schedule.prompt_tokens == 12 and schedule.tokens == 240


def test_rows_of_one_length_need_no_mask(kit, model, bank, monkeypatch):
    masks = []
    forward = model.forward

    @functools.wraps(forward)
    def spy(**settings):
        masks.append(settings["attention_mask"])
        return forward(**settings)

    monkeypatch.setattr(model, "forward", spy)
    asked = [kit.ask([3, 4, 5], 4, name) for name in ("a", None)]
    schedule = Schedule(Forward(model, bank, windows(model)), bank, Limits())
    for one in asked:
        schedule.admit(Row(one, kit.Told(), 99, None))
    while schedule.running:
        schedule.turn(0.0)
    assert len(masks) == 4 and masks == [None] * 4


def test_through_the_thread_the_same(kit, model, bank, engine_of):
    engine = engine_of(model, bank, rows=7, chunk=9)
    numbers = random.Random(2)
    asked = kit.requests(numbers, 10, longest=30, tokens=40)
    told = []
    for one in asked:
        tell = kit.Told()
        engine.submit(one, tell)
        told.append(tell)
        time.sleep(numbers.choice([0.0, 0.002]))
    for tell in told:
        tell.wait()
    engine.stop()
    assert [tell.ids for tell in told] == [kit.alone(model, bank, one) for one in asked]
    assert {tell.thread.name for tell in told} == {"lorafit-engine"}
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.cache_bytes == 0
    assert stats.tokens_generated == sum(tell.last.tokens for tell in told)
    assert stats.prompt_tokens == sum(len(one.ids) for one in asked)


def test_a_seed_gives_the_same_answer_in_any_company(kit, model, bank):
    def mine():
        return kit.ask([5, 6, 7], 25, "a", temperature=0.8, top_p=0.9, seed=11)

    alone, _ = kit.drive(model, bank, [mine()], Limits(), random.Random(0))
    for seed in range(4):
        numbers = random.Random(seed)
        others = kit.requests(numbers, 6)
        warm = [kit.ask(one.ids, 12, one.adapter, temperature=1.5, seed=seed) for one in others[:3]]
        asked = [*others, *warm, mine()]
        numbers.shuffle(asked)
        told, _ = kit.drive(model, bank, asked, Limits(rows=5, chunk=4, cached=400), numbers)
        found = [tell.ids for one, tell in zip(asked, told, strict=True) if one.sampling.seed == 11]
        assert found == [alone[0].ids]
    assert len(set(alone[0].ids)) > 5


def test_half_precision(kit):
    model = kit.make_model("llama").bfloat16()
    bank = kit.PlainBank(model)
    told, _ = kit.drive(model, bank, [kit.ask([1, 2, 3], 6), kit.ask([4], 9, "a")], Limits(), random.Random(0))
    assert [len(tell.ids) for tell in told] == [6, 9]


def test_text_with_a_real_tokenizer(kit, tiny, engine_of):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    bank = kit.PlainBank(model)
    engine = engine_of(model, bank)
    ends = (tokenizer.eos_token_id,)
    told = []
    for text in ("hello", "x" * 60, "żółw 東京"):
        asked = kit.ask(tokenizer(text).input_ids, 40, "a", tokenizer=tokenizer, ends=ends)
        told.append((asked, kit.Told()))
        engine.submit(*told[-1])
    for _, tell in told:
        tell.wait()
    engine.stop()
    for asked, tell in told:
        assert tell.text == tokenizer.decode(kit.alone(model, bank, asked), skip_special_tokens=True)


def test_a_stop_string_over_several_tokens(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    whole = kit.Told()
    engine.submit(kit.ask([9, 8], 20, "b"), whole)
    text = whole.wait().text
    stop = text[6:9]
    at = text.index(stop)
    told = kit.Told()
    engine.submit(kit.ask([9, 8], 20, "b", stop=(stop, "nothing")), told)
    assert told.wait().text == text[:at]
    assert told.finish is Finish.STOP and told.last.tokens == at + 3
    beyond = kit.Told()
    engine.submit(kit.ask([9, 8], 20, "b", stop=(text[18:] + "x",)), beyond)
    assert beyond.wait().text == text and beyond.finish is Finish.LENGTH


def test_the_shortest_answers(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    one = kit.Told()
    engine.submit(kit.ask([7], 1), one)
    first = one.wait().ids
    assert (len(one.pieces), one.finish, one.last.tokens) == (1, Finish.LENGTH, 1)
    ended = kit.Told()
    engine.submit(kit.ask([7], 9, ends=tuple(first)), ended)
    assert ended.wait().text == "" and ended.finish is Finish.STOP and ended.last.tokens == 1


# Limits -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_with_the_context(kit, family, engine_of):
    model = kit.make_model(family)
    bank = kit.PlainBank(model)
    engine = engine_of(model, bank)
    assert engine.context == 96
    told = kit.Told()
    engine.submit(kit.ask(range(1, 91), 50), told)
    assert told.wait().finish is Finish.LENGTH and len(told.ids) == 6
    last = kit.Told()
    engine.submit(kit.ask(range(1, 96), 50), last)
    assert len(last.wait().ids) == 1
    small = engine_of(model, bank, cached=20, start=False)
    assert small.context == 20


def test_prompts_that_cannot_be_read_are_refused_at_once(kit, model, bank, engine_of):
    engine = engine_of(model, bank, context=30)
    for ids, said in (((), "empty"), (range(30), "too long"), ((3, 160), "does not have"), ((-1,), "does not have")):
        with pytest.raises(DataError, match=said):
            engine.submit(kit.ask(ids), kit.Told())
    with pytest.raises(DataError, match="no such adapter"):
        engine.submit(kit.ask([1], adapter="nobody"), kit.Told())
    with pytest.raises(ConfigError, match="context"):
        Engine(model, bank, Limits(context=97))


@pytest.mark.parametrize(
    "limits", [{"rows": 0}, {"waiting": 0}, {"context": 1}, {"cached": 0}, {"chunk": 0}, {"seconds": 0.0}], ids=str
)
def test_limits_out_of_range_are_refused_by_name(limits):
    with pytest.raises(ConfigError) as caught:
        Limits(**limits)
    assert caught.value.where == next(iter(limits))


def test_no_more_wait_than_may(kit, model, bank, engine_of):
    engine = engine_of(model, bank, waiting=3, start=False)
    told = [kit.Told() for _ in range(3)]
    for tell in told:
        engine.submit(kit.ask([1], 2), tell)
    with pytest.raises(BusyError):
        engine.submit(kit.ask([1], 2), kit.Told())
    assert engine.stats().waiting == 3
    engine.start()
    for tell in told:
        assert tell.wait().finish is Finish.LENGTH
    engine.submit(kit.ask([1], 2), kit.Told())


def test_no_more_rows_and_columns_at_once_than_may(kit, model, bank):
    numbers = random.Random(4)
    for limits in (Limits(rows=3), Limits(rows=20, cached=250)):
        bank.passes.clear()
        columns = []
        schedule = Schedule(Forward(model, bank, windows(model)), bank, limits)
        waiting = [Row(one, kit.Told(), 96, None) for one in kit.requests(numbers, 20)]
        while waiting or schedule.running:
            while waiting and schedule.fits(waiting[0]):
                schedule.admit(waiting.pop(0))
            schedule.turn(0.0)
            columns.append(schedule.columns * schedule.running)
        assert max(map(len, bank.passes)) <= limits.rows
        assert limits.cached > 1000 or max(columns) <= 2 * limits.cached


def test_first_come_first_served_and_none_starves(kit, model, bank):
    schedule = Schedule(Forward(model, bank, windows(model)), bank, Limits(rows=4, chunk=2, cached=500))
    ended = []
    order = []

    def row(name: int, length: int, tokens: int) -> Row:
        def tell(piece):
            if piece.finish is not None:
                ended.append(name)

        return Row(kit.ask(range(1, length + 1), tokens), tell, 96, None)

    huge = row(0, 80, 10)
    small = (row(number, 2, 3) for number in range(1, 1000))
    schedule.admit(next(small))
    waiting = [huge]
    turns = 0
    while 0 not in ended:
        waiting += [next(small) for _ in range(2)]
        while waiting and schedule.fits(waiting[0]):
            order.append(waiting[0] is huge)
            schedule.admit(waiting.pop(0))
        schedule.turn(0.0)
        turns += 1
        assert turns < 300
    assert order[0] and len(ended) > 20  # it was the first, and those after it did not wait for it


def test_prompts_of_like_lengths_are_read_together(kit):
    def row(length: int, adapter: str | None = None) -> Row:
        return Row(kit.ask([1] * length, 2, adapter), kit.Told(), 99, None)

    rows = [row(300), row(3, "b"), row(500), row(30), row(2, "a"), row(1200), row(32, "a"), row(33)]
    lengths = [[len(each.ids) for each in group] for group in alike(rows)]
    assert lengths == [[300, 500], [30, 2, 32, 3], [1200], [33]]


def test_time_runs_out_for_those_who_run_and_those_who_wait(kit, model, bank, engine_of):
    engine = engine_of(model, bank, rows=1, seconds=0.3, start=False)
    told = [kit.Told(), kit.Told()]
    for tell in told:
        engine.submit(kit.ask([1, 2], 90), tell)
    bank.rows = kit.slowed(bank.rows, 0.02)
    engine.start()
    assert [tell.wait().finish for tell in told] == [Finish.TIMEOUT] * 2
    assert told[0].ids and not told[1].ids
    engine.stop()
    assert engine.stats().finished[Finish.TIMEOUT] == 2
