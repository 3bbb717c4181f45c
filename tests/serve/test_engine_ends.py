"""Requests that end before their answer does, and all that can break: everyone is told one end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch

from lorafit.errors import StateError
from lorafit.serve.batch import NOT_FINITE, Forward
from lorafit.serve.engine import Limits
from lorafit.serve.requests import BusyError, Finish
from lorafit.serve.row import Row
from lorafit.serve.runnable import windows
from lorafit.serve.schedule import Schedule

# Leaving ----------------------------------------------------------------------


def test_one_that_is_cancelled_leaves_and_the_others_do_not_notice(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    bank.rows = kit.slowed(bank.rows, 0.005)
    asked = [kit.ask([4, 5, number], 60, (None, "a", "b", "c")[number % 4]) for number in range(1, 5)]
    told = [kit.Told() for _ in asked]
    tickets = [engine.submit(one, tell) for one, tell in zip(asked, told, strict=True)]
    told[1].begun()
    tickets[1].cancel()
    tickets[1].cancel()
    assert told[1].wait().finish is Finish.CANCELLED and len(told[1].ids) < 60
    for number in (0, 2, 3):
        assert told[number].wait().finish is Finish.LENGTH
    engine.stop()
    for number in (0, 2, 3):
        assert told[number].ids == kit.alone(model, bank, asked[number])
    tickets[1].cancel()


def test_one_that_is_cancelled_while_its_prompt_is_read(kit, model, bank):
    schedule = Schedule(Forward(model, bank, windows(model)), bank, Limits(chunk=4))
    told = [kit.Told() for _ in range(3)]
    asked = [kit.ask(range(1, 60), 5, "a"), kit.ask(range(2, 61), 5, "b"), kit.ask(range(3, 62), 5, "c")]
    rows = [Row(one, tell, 96, None) for one, tell in zip(asked, told, strict=True)]
    for row in rows:
        schedule.admit(row)
    schedule.turn(0.0)
    rows[1].cancel()
    schedule.turn(0.0)
    assert told[1].finish is Finish.CANCELLED and +bank.uses == {"a": 1, "c": 1}
    while schedule.running:
        schedule.turn(0.0)
    assert [tell.ids for tell in (told[0], told[2])] == [kit.alone(model, bank, one) for one in (asked[0], asked[2])]
    lonely = Row(asked[0], kit.Told(), 96, None)
    schedule.admit(lonely)
    schedule.turn(0.0)
    steps = schedule.prompt_steps
    lonely.cancel()
    schedule.turn(0.0)
    assert lonely.finish is Finish.CANCELLED and schedule.prompt_steps == steps and not schedule.running


def test_one_that_is_cancelled_while_it_waits(kit, model, bank, engine_of):
    bank.rows = kit.slowed(bank.rows, 0.01)
    engine = engine_of(model, bank, rows=1)
    first, second = kit.Told(), kit.Told()
    engine.submit(kit.ask([1], 60), first)
    ticket = engine.submit(kit.ask([1], 3), second)
    first.begun()
    ticket.cancel()
    assert second.wait().finish is Finish.CANCELLED and second.last.tokens == 0
    assert first.pieces[-1].finish is None  # the other one is not through yet
    engine.stop(wait=0.0)
    early = engine_of(model, bank, start=False)
    told = kit.Told()
    early.submit(kit.ask([1], 3), told).cancel()
    early.start()
    assert told.wait().finish is Finish.CANCELLED


def test_one_who_cannot_be_told_is_cancelled(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    told, pieces = kit.Told(), []

    def deaf(piece):
        pieces.append(piece)
        raise OSError("gone")

    engine.submit(kit.ask([1, 2], 50, "a"), deaf)
    engine.submit(kit.ask([1, 2], 20, "b"), told)
    assert told.wait().finish is Finish.LENGTH
    engine.stop()
    assert [piece.finish for piece in pieces] == [None, Finish.CANCELLED]
    assert not +bank.uses


def test_stopping_finishes_who_runs_and_cancels_who_waits(kit, model, bank, engine_of):
    engine = engine_of(model, bank, rows=1)
    bank.rows = kit.slowed(bank.rows, 0.005)
    told = [kit.Told() for _ in range(3)]
    for tell in told:
        engine.submit(kit.ask([3], 30), tell)
    told[0].begun()
    engine.stop()
    assert [tell.finish for tell in told] == [Finish.LENGTH, Finish.CANCELLED, Finish.CANCELLED]
    for refused in (lambda: engine.submit(kit.ask([1]), kit.Told()), lambda: engine.call(int), engine.start):
        with pytest.raises(StateError):
            refused()
    engine.stop()


def test_stopping_in_a_hurry_cancels_all(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    bank.rows = kit.slowed(bank.rows, 0.02)
    told = kit.Told()
    engine.submit(kit.ask([3], 90, "a"), told)
    told.begun()
    engine.stop(wait=0.0)
    assert told.finish is Finish.CANCELLED and not +bank.uses and engine.stats().cache_bytes == 0


def test_stopping_before_it_began_and_from_its_own_thread(kit, model, bank, engine_of):
    engine = engine_of(model, bank, start=False)
    told = kit.Told()
    engine.submit(kit.ask([3]), told)
    future = engine.call(lambda: 1)
    engine.stop()
    assert told.finish is Finish.CANCELLED
    assert isinstance(future.exception(1), StateError)
    other = engine_of(model, bank)
    other.call(other.stop).result(5)
    with pytest.raises(StateError):
        other.submit(kit.ask([3]), told)


# What breaks ------------------------------------------------------------------


def test_a_pass_that_fails_ends_its_rows_and_the_engine_goes_on(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    broken, told = kit.Told(), kit.Told()
    engine.submit(kit.ask([1, 2, 3], 5, "broken"), broken)
    assert broken.wait().finish is Finish.FAILED
    assert broken.last.error == "the model failed: RuntimeError"
    asked = kit.ask([1, 2, 3], 5, "a")
    engine.submit(asked, told)
    assert told.wait().finish is Finish.LENGTH
    engine.stop()
    assert told.ids == kit.alone(model, bank, asked) and not +bank.uses


def test_a_failing_token_ends_who_runs_but_not_whose_prompt_is_read(kit, model, bank):
    schedule = Schedule(Forward(model, bank, windows(model)), bank, Limits(chunk=5))
    told = [kit.Told(), kit.Told()]
    schedule.admit(Row(kit.ask([1, 2], 50, "a"), told[0], 96, None))
    schedule.turn(0.0)
    reading = kit.ask(range(1, 41), 4, "b")
    schedule.admit(Row(reading, told[1], 96, None))
    rows, bank.rows = bank.rows, _failing_for(bank.rows, ("a",))
    schedule.turn(0.0)
    bank.rows = rows
    assert told[0].finish is Finish.FAILED and not told[1].pieces
    while schedule.running:
        schedule.turn(0.0)
    assert told[1].ids == kit.alone(model, bank, reading)


def _failing_for(rows: Callable, bad: tuple) -> Callable:
    def fail(names):
        if tuple(names) == bad:
            raise MemoryError
        return rows(names)

    return fail


def test_a_row_that_is_not_finite_fails_alone(kit, model, bank):
    asked = [kit.ask([5, 6], 12, "a"), kit.ask([5, 6, 7], 12, "nan"), kit.ask([8], 12), kit.ask(range(1, 30), 9, "b")]
    told, _ = kit.drive(model, bank, asked, Limits(), random.Random(1))
    assert told[1].finish is Finish.FAILED and told[1].last.error == NOT_FINITE
    for number in (0, 2, 3):
        assert told[number].ids == kit.alone(model, bank, asked[number])


def test_one_that_stops_being_finite_leaves_nothing_behind(kit, model, bank):
    asked = [kit.ask([5, 6], 30, "a"), kit.ask([7, 8], 30, "c"), kit.ask([9], 20, "b")]
    told = [kit.Told() for _ in asked]
    schedule = Schedule(Forward(model, bank, windows(model)), bank, Limits())
    rows = [Row(one, tell, 96, None) for one, tell in zip(asked, told, strict=True)]
    for row in rows[:2]:
        schedule.admit(row)
    for _ in range(5):
        schedule.turn(0.0)
    good = bank.matrices["c"]
    bank.matrices["c"] = good * torch.nan
    schedule.turn(0.0)
    bank.matrices["c"] = good
    assert told[1].finish is Finish.FAILED
    schedule.admit(rows[2])
    while schedule.running:
        schedule.turn(0.0)
    for number in (0, 2):
        assert told[number].ids == kit.alone(model, bank, asked[number])


def test_an_adapter_that_cannot_be_read_fails_its_request(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    told = kit.Told()
    bank.matrices["gone"] = bank.matrices["a"]
    blocked = threading.Event()
    engine.call(blocked.wait)
    engine.submit(kit.ask([1], adapter="gone"), told)
    del bank.matrices["gone"]
    blocked.set()
    assert told.wait().finish is Finish.FAILED
    assert told.last.error == "the file is damaged"  # and nothing of where it is


def test_who_finds_no_room_for_an_adapter_waits_for_one(kit, model, engine_of):
    bank = kit.PlainBank(model, room=1)
    engine = engine_of(model, bank)
    asked = [kit.ask([1, number], 10, name) for number, name in enumerate(("a", "b", "a", "c"), start=1)]
    told = [kit.Told() for _ in asked]
    for one, tell in zip(asked, told, strict=True):
        engine.submit(one, tell)
    for tell in told:
        assert tell.wait().finish is Finish.LENGTH
    engine.stop()
    assert [tell.ids for tell in told] == [kit.alone(model, bank, one) for one in asked]
    none = engine_of(model, kit.PlainBank(kit.make_model("llama"), room=0))
    never = kit.Told()
    none.submit(kit.ask([1], adapter="a"), never)
    assert never.wait().finish is Finish.FAILED and never.last.error == "there is no room"


def test_a_tokenizer_that_cannot_decode_fails_its_request(kit, model, bank):
    class Strict(kit.Characters):
        def decode(self, ids, skip_special_tokens=False):
            raise KeyError(ids)

    asked = [kit.ask([5, 6], 5, tokenizer=Strict()), kit.ask([5, 6], 5)]
    told, _ = kit.drive(model, bank, asked, Limits(), random.Random(0))
    assert [tell.finish for tell in told] == [Finish.FAILED, Finish.LENGTH]
    assert "KeyError" in told[0].last.error


def test_jobs_run_on_the_thread_and_what_they_raise_is_theirs(kit, model, bank, engine_of):
    engine = engine_of(model, bank)
    assert engine.call(lambda: threading.current_thread().name).result(5) == "lorafit-engine"
    for error in (KeyError("x"), SystemExit(3)):
        with pytest.raises(type(error)):
            engine.call(_raising(error)).result(5)
    blocked = threading.Event()
    engine.call(blocked.wait)
    unwanted = engine.call(lambda: 1)
    assert unwanted.cancel()
    blocked.set()
    told = kit.Told()
    engine.submit(kit.ask([1]), told)
    assert told.wait().finish is Finish.LENGTH


def _raising(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_a_loop_that_fails_leaves_nobody_waiting(kit, model, bank, engine_of, monkeypatch):
    engine = engine_of(model, bank, rows=1, start=False)
    told = [kit.Told() for _ in range(3)]
    for tell in told:
        engine.submit(kit.ask([1], 9), tell)
    calls = []

    def turn(now):
        calls.append(now)
        raise ZeroDivisionError

    monkeypatch.setattr(engine._schedule, "turn", turn)
    engine.start()
    for tell in told:
        assert tell.wait().finish is Finish.FAILED and "ZeroDivisionError" in tell.last.error
    engine._thread.join(5)
    assert len(calls) == 1
    for refused in (lambda: engine.submit(kit.ask([1]), kit.Told()), lambda: engine.call(int)):
        with pytest.raises(StateError, match="takes no requests") as caught:
            refused()
        assert "ZeroDivisionError" in str(caught.value.found)
    engine.stop()
    assert engine.stats().finished[Finish.FAILED] == 3


def test_in_a_storm_everyone_is_told_one_end(kit, model, bank, engine_of):
    engine = engine_of(model, bank, rows=8, waiting=20, chunk=16, cached=600)
    told, busy = [], []
    lock = threading.Lock()

    def client(seed: int) -> None:
        numbers = random.Random(seed)
        for one in kit.requests(numbers, 20, longest=30):
            tell = kit.Told()
            try:
                ticket = engine.submit(one, tell)
            except BusyError:
                busy.append(one)
                time.sleep(0.005)
                continue
            with lock:
                told.append((one, tell))
            if numbers.random() < 0.3:
                time.sleep(numbers.random() * 0.01)
                ticket.cancel()
            elif numbers.random() < 0.5:
                tell.wait()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    finishes = [tell.wait().finish for _, tell in told]
    engine.stop()
    assert set(finishes) <= {Finish.STOP, Finish.LENGTH, Finish.CANCELLED}
    stats = engine.stats()
    assert sum(stats.finished.values()) == len(told) and len(told) + len(busy) == 160
    assert stats.running == stats.waiting == stats.cache_bytes == 0 and not +bank.uses
    whole = [(one, tell) for one, tell in told if tell.finish is not Finish.CANCELLED]
    for one, tell in whole[::9]:
        assert tell.ids == kit.alone(model, bank, one)
