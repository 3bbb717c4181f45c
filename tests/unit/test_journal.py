"""The journal of a loop of one's own: what it records, keeps and says, and that a killed loop goes on."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.journal import keeping, place
from lorafit.report import read_records
from lorafit.report.summary import summarize

LOOP = Path(__file__).with_name("journal_loop.py")
_spec = importlib.util.spec_from_file_location("journal_loop", LOOP)
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)
EPOCHS, BATCHES = script.EPOCHS, script.BATCHES


class Killed(BaseException):
    """Stands for a kill, where a process of its own would take too long."""


def at(epoch: int, batch: int) -> Callable[[int, int], None]:
    def stop(*now: int) -> None:
        if now == (epoch, batch):
            raise Killed

    return stop


def state(handle: lf.Handle) -> dict[str, Tensor]:
    """All that training changes: the adapter, what is trained in full, running statistics, Delta-LoRA's weights."""
    return {key: value.clone() for key, value in handle.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [one for one in found if one["event"] == event]


def opened(folder: Path, **options: Any) -> tuple[lf.Handle, torch.optim.Optimizer, lf.Journal, list[str]]:
    handle, optimizer = script.made(script.METHODS["lora"])
    lines: list[str] = []
    return handle, optimizer, lf.Journal(folder, handle, optimizer, say=lines.append, **options), lines


def one_step(handle: lf.Handle, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = handle.model(torch.randn(8, 6)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


# A loop from beginning to end ---------------------------------------------------


def test_the_records_are_those_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    handle, lines, journal = script.loop(folder, "lora")
    run = read_records(folder / "records.jsonl")
    assert run.remarks == (), "the report knows every event and key"
    assert [one.step for one in run.steps] == list(range(1, EPOCHS * BATCHES + 1))
    assert [one.step for one in run.evaluations] == [BATCHES * epoch for epoch in range(EPOCHS + 1)]
    assert all(one.examples == 16 and one.examples_per_second for one in run.steps)
    assert run.evaluations[0].accuracy is not None and run.data["eval_records"] == 30
    assert run.resolved["model"] == "Network" and run.resolved["trainable"] == handle.num_trainable
    assert run.verdict is not None and run.end is not None and run.end.status == "done"
    summary = summarize(run)
    assert summary.status == "done" and summary.change is not None and summary.change < 0
    assert summary.examples_per_second is not None and summary.tokens_per_second is None
    assert journal.outcome is not None and journal.outcome.after == pytest.approx(summary.after.loss, rel=1e-6)
    assert lines[-1].startswith("held-out loss ") and "better by" in lines[-1]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Examples per second" in page and "Network" in page and "Verdict" in page


def test_the_folder_of_a_finished_loop(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    handle, lines, _ = script.loop(folder, "lora")
    names = {each.name for each in folder.iterdir()}
    assert names == {"adapter", "finished", "journal.json", "records.jsonl", "report.html", "result.json"}
    torch.manual_seed(3)
    plain = script.Network()
    other = lf.load(plain, folder / "adapter")
    for path in handle.sites:
        torch.testing.assert_close(other.delta(path), handle.delta(path))
    assert any("buffers of 1 layers changed" in line for line in lines)


def test_the_best_adapter_is_kept(tmp_path: Path) -> None:
    handle, optimizer, journal, lines = opened(tmp_path / "run", steps=3)
    kept = None
    with journal:
        journal.evaluate([3.0, 3.0])
        for step, level in zip(journal, (2.0, 1.0, 2.5), strict=True):
            journal.step(one_step(handle, optimizer))
            journal.evaluate([level, level + 0.1])
            kept = [p.clone() for p in handle.parameters()] if step == 1 else kept
    assert journal.outcome.kept == 2 and journal.outcome.after == pytest.approx(1.05)
    assert all(torch.equal(*pair) for pair in zip(kept, handle.parameters(), strict=True))
    assert any("kept: the adapter of step 2" in line for line in lines)
    assert records(tmp_path / "run", "verdict")[-1]["kept"] == 2


def test_the_last_adapter_is_kept_on_request(tmp_path: Path) -> None:
    handle, optimizer, journal, _ = opened(tmp_path / "run", steps=2, keep_best=False)
    with journal:
        for _, level in zip(journal, (1.0, 2.0), strict=True):
            journal.step(one_step(handle, optimizer))
            journal.evaluate([level, level])
        last = [p.clone() for p in handle.parameters()]
    assert journal.outcome.kept is None and journal.outcome.after == 2.0
    assert all(torch.equal(*pair) for pair in zip(last, handle.parameters(), strict=True))


def test_overfitting_is_noticed_and_can_end_the_loop(tmp_path: Path) -> None:
    handle, optimizer, journal, lines = opened(tmp_path / "run", epochs=9)
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(200, generator=generator).abs() + 3
    with journal:
        for epoch in journal:
            journal.step(one_step(handle, optimizer))
            journal.evaluate(hard - 1 + 0.5 * abs(epoch - 2) + 0.01 * torch.randn(200, generator=generator))
            if journal.overfits:
                break
    assert journal.taken == 4 and journal.outcome.kept == 3
    assert any(line.startswith("overfitting since step 3") for line in lines)
    assert any("if journal.overfits: break" in line for line in lines)


def test_evaluating_disturbs_nothing(tmp_path: Path) -> None:
    handle, _, journal, _ = opened(tmp_path / "run")
    model = handle.model.train()
    model.norm.eval()
    batches = [[torch.randn(4, 6), torch.zeros(4, dtype=torch.long)] for _ in range(2)]

    def measure(batch: list[Tensor]) -> Tensor:
        assert not model.training and not torch.is_grad_enabled()
        torch.randn(3)
        random.random()
        numpy.random.rand()
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with journal:
        before = torch.get_rng_state()
        others = random.getstate(), numpy.random.get_state()[2]
        mean = journal.evaluate(measure, batches)
        assert torch.equal(torch.get_rng_state(), before)
        assert (random.getstate(), numpy.random.get_state()[2]) == others
        assert model.training and not model.norm.training
        assert journal.evaluate(measure, batches) == mean and len(journal.evaluations) == 1  # twice is once
        journal.step(1.0)


def test_losses_over_several_predictions(tmp_path: Path) -> None:
    _, _, journal, _ = opened(tmp_path / "run")
    with journal:
        mean = journal.evaluate(torch.tensor([2.0, 6.0]), correct=[1, 2], counts=[1, 3])
        journal.step(torch.tensor([1.0]))
    assert mean == 2.0
    assert records(tmp_path / "run", "evaluation")[0]["accuracy"] == 0.75
    assert records(tmp_path / "run", "held_out")[0]["counts"] == [1.0, 3.0]


def test_steps_between_two_records_are_averaged(tmp_path: Path) -> None:
    _, _, journal, _ = opened(tmp_path / "run", log_every=3)
    with journal:
        for loss in (1.0, 2.0, torch.tensor(6.0), 5.0):
            journal.step(loss, examples=2, grad_norm=torch.tensor(0.5))
    steps = records(tmp_path / "run", "step")
    assert [(one["step"], one["loss"], one["examples"], one["grad_norm"]) for one in steps] == [
        (3, 3.0, 6, 0.5),
        (4, 5.0, 2, 0.5),
    ]


def test_without_plotly_the_loop_is_done_and_the_install_line_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plotly", "plotly.offline", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    handle, optimizer, journal, lines = opened(tmp_path / "run", steps=1)
    with journal:
        for _ in journal:
            journal.step(one_step(handle, optimizer))
            journal.evaluate([1.0, 2.0])
    assert any(line.startswith("no report: ") and "lorafit[report]" in line for line in lines)
    assert "report:  not written" in lines and (tmp_path / "run" / "result.json").is_file()


def test_neither_journal_nor_suggestion_needs_transformers() -> None:
    code = (
        "import sys, torch, lorafit as lf\n"
        "lf.suggest(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))), lf.Journal\n"
        "print([name for name in ('transformers', 'accelerate', 'pydantic', 'rich', 'plotly') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


# Going on -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Tensor], Path]]:
    """What a loop that nobody stopped ends with, and its folder."""
    known: dict[str, tuple[dict[str, Tensor], Path]] = {}

    def found(name: str) -> tuple[dict[str, Tensor], Path]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name) / "run"
            known[name] = state(script.loop(folder, name)[0]), folder
        return known[name]

    return found


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 0), (3, 1), (4, 3)], ids=lambda at: f"{at[0]}-{at[1]}")
@pytest.mark.parametrize("name", ["lora", "adalora", "dora", "delta-lora"])
def test_a_killed_loop_ends_as_one_that_was_not(whole: Any, tmp_path: Path, name: str, place: tuple[int, int]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        script.loop(folder, name, at(*place))
    handle, lines, journal = script.loop(folder, name)
    expected, other = whole(name)
    assert same(state(handle), expected)
    if place[0]:
        assert f"goes on from step {BATCHES * place[0]}, after {place[0]} rounds" in lines
    assert [one.losses for one in journal.evaluations] == [tuple(one["losses"]) for one in records(other, "held_out")]
    runs = read_records(folder / "records.jsonl"), read_records(other / "records.jsonl")
    assert [one.loss for one in runs[0].steps] == [one.loss for one in runs[1].steps]
    assert runs[0].verdict == runs[1].verdict


@pytest.mark.parametrize("where", ["the checkpoint", "the best adapter", "the adapter", "the result"])
def test_a_kill_while_something_is_written(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = tmp_path / "run"

    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    def complete(path: Path, facts: Any) -> None:
        later = path.name not in (f"checkpoint-{BATCHES}", f"best-{BATCHES}")
        if later and path.name.startswith("checkpoint" if where == "the checkpoint" else "best"):
            raise Killed
        place.complete(path, facts)

    with monkeypatch.context() as patch:
        if where == "the adapter":
            patch.setattr(lf.Handle, "save", killed)
        elif where == "the result":
            patch.setattr(place.Place, "finish", killed)
        else:
            patch.setattr(keeping, "complete", complete)
        with pytest.raises(Killed):
            script.loop(folder, "lora")
    handle, lines, _ = script.loop(folder, "lora")
    assert same(state(handle), whole("lora")[0])
    assert any("cut off" in line for line in lines) == (where == "the checkpoint")
    assert not [each.name for each in folder.iterdir() if each.name.startswith(("checkpoint", "best"))]


def test_kill_nine_in_a_process_of_its_own(whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    call = [sys.executable, str(LOOP), str(folder), "lora"]
    killed = subprocess.run([*call, "2", "1"], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert (folder / f"checkpoint-{2 * BATCHES}" / "complete.json").is_file()
    again = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr[-2000:]
    one, other = (each / "adapter" / "adapter_model.safetensors" for each in (folder, whole("lora")[1]))
    assert one.read_bytes() == other.read_bytes()


def test_a_finished_loop_is_not_run_again(whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    expected = state(script.loop(folder, "lora")[0])
    before = (folder / "records.jsonl").read_bytes()

    def never(epoch: int, batch: int) -> None:
        raise AssertionError("it trains again")

    handle, lines, journal = script.loop(folder, "lora", never)
    assert same(state(handle), expected) and (folder / "records.jsonl").read_bytes() == before
    assert lines == [f"this loop is finished already: {folder}"]
    assert journal.outcome is not None and journal.outcome.steps == EPOCHS * BATCHES
    (folder / "report.html").unlink()  # as if a kill had come before it was drawn
    script.loop(folder, "lora", never)
    assert (folder / "report.html").is_file()
    _, _, again, _ = opened(folder, epochs=EPOCHS)
    with pytest.raises(lf.StateError, match="finished already"), again:
        again.step(1.0)


def test_ctrl_c_is_recorded_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def interrupt(epoch: int, batch: int) -> None:
        if (epoch, batch) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.loop(folder, "lora", interrupt)
    end = records(folder, "end")[-1]
    assert (end["status"], end["steps"], end["message"]) == ("interrupted", BATCHES + 2, "stopped by the user")


def test_an_error_of_the_loop_is_recorded_and_comes_through(tmp_path: Path) -> None:
    _, _, journal, lines = opened(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), journal:
        1 / 0  # noqa: B018
    end = records(tmp_path / "run", "end")[-1]
    assert (end["status"], end["message"]) == ("failed", "ZeroDivisionError: division by zero")
    assert lines[-1] == "stopped at step 0; the same program goes on from the start"


def test_a_loop_of_no_stated_length_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    handle, optimizer, journal, _ = opened(folder)
    with pytest.raises(Killed), journal:
        for _ in range(3):
            journal.step(one_step(handle, optimizer))
        journal.save()
        expected = state(handle), torch.get_rng_state()
        journal.step(one_step(handle, optimizer))
        raise Killed
    handle, _, journal, _ = opened(folder)
    with journal:
        assert journal.taken == 3 and same(state(handle), expected[0])
        assert torch.equal(torch.get_rng_state(), expected[1])


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_there(whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        script.loop(folder, "lora", at(3, 0))
    newest = folder / f"checkpoint-{3 * BATCHES}"
    (newest / "condition.pt").write_bytes(b"not this")
    with pytest.raises(lf.CheckpointError, match="damaged") as caught:
        script.loop(folder, "lora")
    assert f"remove {newest.name}" in str(caught.value.fix)
    for each in newest.iterdir():
        each.unlink()
    newest.rmdir()
    handle, lines, _ = script.loop(folder, "lora")
    assert f"goes on from step {2 * BATCHES}, after 2 rounds" in lines
    assert same(state(handle), whole("lora")[0])


def test_what_is_measured_after_the_loop_is_noted_when_it_goes_on_there(tmp_path: Path) -> None:
    def run(folder: Path, stop: bool) -> tuple[lf.Journal, Tensor]:
        handle, optimizer, journal, _ = opened(folder, epochs=2)
        torch.manual_seed(0)
        with journal:
            journal.evaluate([1.0, 2.0])
            for _ in journal:
                journal.step(one_step(handle, optimizer))
            if stop:
                raise Killed
            drawn = torch.randn(2)
            journal.evaluate([0.5, 1.0])
        return journal, drawn

    expected, first = run(tmp_path / "whole", stop=False)
    with pytest.raises(Killed):
        run(tmp_path / "run", stop=True)
    found, second = run(tmp_path / "run", stop=False)
    assert found.outcome.before == 1.5 and found.outcome.after is not None
    assert [one.step for one in found.evaluations] == [one.step for one in expected.evaluations] == [0, 2]
    assert torch.equal(first, second)


def test_the_checkpoints_rate_stands_and_is_said(tmp_path: Path) -> None:
    def run(rate: float, lines: list[str]) -> float:
        handle, _ = script.made(script.METHODS["lora"])
        optimizer = handle.optimizer(torch.optim.SGD, lr=rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        journal = lf.Journal(
            tmp_path / "run", handle, optimizer, epochs=4, also={"schedule": schedule}, say=lines.append
        )
        with pytest.raises(Killed), journal:
            for epoch in journal:
                journal.step(one_step(handle, optimizer))
                schedule.step()
                if epoch:
                    raise Killed
        return optimizer.param_groups[0]["lr"]

    lines: list[str] = []
    run(0.5, lines), run(0.5, lines)
    assert not any("rate stands" in line for line in lines)
    assert run(1.0, lines) == 0.5 / 2**2
    assert any("the checkpoint's learning rate stands: 0.5, not the 1 " in line for line in lines)


def test_what_kills_left_of_files_is_swept_away(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        script.loop(folder, "lora", at(2, 0))
    for name in (".result.json.x.tmp", "adapter/.adapter_config.json.y.tmp", "finished/.buffers.pt.z.tmp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    (folder / ".mine.tmp").write_text("mine")
    script.loop(folder, "lora")
    assert [path.name for path in folder.rglob(".*")] == [".mine.tmp"]


# Wrong input ----------------------------------------------------------------------


def test_a_round_without_a_step_is_told(tmp_path: Path) -> None:
    _, _, journal, _ = opened(tmp_path / "rounds", epochs=2)
    with pytest.warns(lf.LorafitWarning, match="round 1 is over, and no step was noted") as caught, journal:
        for _ in journal:
            journal.evaluate([1.0, 2.0])
    assert len(caught) == 1
    _, _, journal, _ = opened(tmp_path / "free")
    with pytest.warns(lf.LorafitWarning, match="the loop is over, and no step was noted"), journal:
        journal.evaluate([1.0, 2.0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"also": 3}, "found:    3"),
        ({"also": [3]}, "found:    a list"),
        ({"also": {"a": None}}, r"Journal\.also\['a'\]"),
        ({"also": {"a": torch.optim.SGD}}, "state_dict"),
        ({"also": {1: torch.Generator(), "b": torch.Generator()}}, "names of your own"),
        ({"data": ["x"]}, "a mapping from texts"),
        ({"data": {1: "x"}}, "a mapping from texts"),
        ({"data": {"event": "x"}}, "keys of this name"),
        ({"seed": "x"}, "no seed"),
        ({"say": None}, "no say"),
        ({"keep_best": 1}, "true or false"),
        ({"folder": None}, "no folder"),
        ({"handle": nn.Linear(2, 2)}, "lf.attach"),
        ({"optimizer": 10}, "epochs=10"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_arguments_are_looked_at_at_once(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    handle, optimizer = script.made(script.METHODS["lora"])
    given = {"folder": tmp_path / "run", "handle": handle, "optimizer": optimizer, **options}
    with pytest.raises(lf.ConfigError, match=says):
        lf.Journal(**given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda journal: journal.step(None), "found:    None"),
        (lambda journal: journal.step("0.5"), "found:    '0.5'"),
        (lambda journal: journal.step(0.5, grad_norm=torch.ones(3)), "grad_norm of a step must be one number"),
        (lambda journal: journal.step(0.5, examples=3.5), "whole number of examples"),
        (lambda journal: journal.evaluate(lambda x: x, [torch.ones(2)], correct=[1, 1]), "with correct beside it"),
        (lambda journal: journal.evaluate(lambda x: x, [torch.ones(2)], counts=[1, 1]), "with counts beside it"),
        (lambda journal: journal.evaluate(lambda x: x), "a function alone"),
        (lambda journal: journal.evaluate([1.0], [torch.ones(2)]), "a list beside a loader"),
        (lambda journal: journal.evaluate(lambda x: (x, x, x), [torch.ones(2)]), "a tuple of 3"),
        (lambda journal: journal.evaluate(lambda x: (x, 2 * x), [torch.ones(2)]), "2 of 1"),
    ],
    ids=["none", "text", "norms", "examples", "correct", "counts", "alone", "beside", "three", "more"],
)
def test_calls_with_something_else(tmp_path: Path, call: Callable[[lf.Journal], Any], says: str) -> None:
    _, _, journal, _ = opened(tmp_path / "run")
    with pytest.raises(lf.ConfigError, match=says), journal:
        call(journal)
    assert journal.taken == 0 and not journal.evaluations


def test_the_folder_of_another_loop_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        script.loop(folder, "lora", at(2, 0))
    with pytest.raises(lf.ConfigError, match="another loop") as caught:
        script.loop(folder, "dora")
    assert "method was 'lora' and is 'dora'" in str(caught.value)
    _, _, journal, _ = opened(folder, epochs=EPOCHS + 1)
    with pytest.raises(lf.ConfigError, match="epochs was 5 and is 6"):
        journal.__enter__()


def test_a_loop_that_left_nothing_makes_room(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        script.loop(folder, "lora", at(0, 1))
    script.loop(folder, "dora")
    assert read_records(folder / "records.jsonl").resolved["method"] == "dora"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    _, _, journal, _ = opened(tmp_path)
    with pytest.raises(lf.ConfigError, match=r"mine\.txt"):
        journal.__enter__()
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("losses", "options", "says"),
    [
        (torch.tensor(1.0), {}, "a tensor of shape"),
        (torch.ones(3, 2), {}, "a tensor of shape"),
        ([], {}, "none"),
        (1.0, {}, "a float"),
        (["high"], {}, "a list"),
        ([1.0, 2.0], {"correct": [1]}, "1 correct, 2 losses"),
        ([1.0, 2.0], {"counts": [1, 0]}, "without a prediction"),
        ([1.0, 2.0], {"counts": [1, math.inf]}, "without a prediction"),
        ([1.0, 2.0], {"counts": [1, math.nan]}, "without a prediction"),
        ([1.0, 2.0], {"correct": [1, 2]}, "no more than all"),
        ([1.0, 2.0], {"correct": [1, -1]}, "no more than all"),
        ([1.0, 2.0], {"correct": [1, math.nan]}, "no more than all"),
    ],
    ids=[
        "scalar",
        "matrix",
        "empty",
        "number",
        "words",
        "correct",
        "counts",
        "endless",
        "nan-counts",
        "too-many",
        "negative",
        "nan-correct",
    ],
)
def test_losses_that_are_not_one_for_each_record(tmp_path: Path, losses: Any, options: Any, says: str) -> None:
    _, _, journal, _ = opened(tmp_path / "run")
    with pytest.raises(lf.ConfigError, match=says), journal:
        journal.evaluate(losses, **options)


def test_other_held_out_records_are_refused(tmp_path: Path) -> None:
    _, _, journal, _ = opened(tmp_path / "run")
    with pytest.raises(lf.ConfigError, match="not the held-out records"), journal:
        journal.evaluate([1.0, 2.0])
        journal.step(1.0)
        journal.evaluate([1.0])


def test_a_loss_that_is_not_finite_ends_the_loop_before_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, _, journal, _ = opened(folder, epochs=3)
    with pytest.raises(lf.TrainingError, match="not finite"), journal:
        for _ in journal:
            journal.step(math.nan)
    assert not list(folder.glob("checkpoint-*"))
    assert read_records(folder / "records.jsonl").steps[0].diverged
    _, _, journal, _ = opened(tmp_path / "other")
    with pytest.raises(lf.TrainingError, match="held-out loss is not finite"), journal:
        journal.evaluate([1.0, math.inf])


def test_calls_at_the_wrong_time(tmp_path: Path) -> None:
    handle, optimizer, journal, _ = opened(tmp_path / "run")
    for call in (lambda: journal.step(1.0), lambda: journal.evaluate([1.0]), journal.save, lambda: next(iter(journal))):
        with pytest.raises(lf.StateError, match="not open"):
            call()
    with journal:
        with pytest.raises(lf.ConfigError, match="how many rounds"):
            next(iter(journal))
        with pytest.raises(lf.ConfigError, match="one number"):
            journal.step(torch.ones(2))
    _, _, rounds, _ = opened(tmp_path / "rounds", epochs=1)
    with rounds, pytest.raises(lf.StateError, match="between them"):
        rounds.save()
    with pytest.raises(lf.ConfigError, match="not both"):
        lf.Journal(tmp_path / "x", handle, optimizer, epochs=1, steps=1)
    with pytest.raises(lf.ConfigError, match="out of range"):
        lf.Journal(tmp_path / "x", handle, optimizer, epochs=0)


def test_an_optimizer_of_something_else_is_refused(tmp_path: Path) -> None:
    handle, _ = script.made(script.METHODS["lora"])
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(lf.TrainingError, match="does not hold"):
        lf.Journal(tmp_path / "run", handle, other).__enter__()
    assert not (tmp_path / "run").exists()


def test_what_was_kept_along_must_be_there_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        script.loop(folder, "lora", at(2, 0))
    _, _, journal, _ = opened(folder, epochs=EPOCHS)
    with pytest.raises(lf.CheckpointError, match="other things along") as caught:
        journal.__enter__()
    assert caught.value.found == "rate, and an optimizer"
    assert caught.value.expected == "nothing, and an optimizer"


def test_a_state_that_could_not_be_read_back_is_told_at_the_first_checkpoint(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"path": Path("somewhere")}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("never reached")

    handle, optimizer, journal, _ = opened(tmp_path / "run", epochs=2, also={"odd": Odd()})
    with pytest.raises(lf.CheckpointError, match="more than tensors"), journal:
        for _ in journal:
            journal.step(one_step(handle, optimizer))


def test_a_generator_of_a_loader_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    generator = torch.Generator().manual_seed(5)
    handle, optimizer, journal, _ = opened(folder, epochs=3, also={"order": generator})
    with pytest.raises(Killed), journal:
        for epoch in journal:
            drawn = torch.randn(2, generator=generator)
            if epoch == 1:
                raise Killed
            journal.step(one_step(handle, optimizer))
    generator = torch.Generator().manual_seed(99)
    handle, optimizer, journal, _ = opened(folder, epochs=3, also={"order": generator})
    with journal:
        assert torch.equal(torch.randn(2, generator=generator), drawn)
        assert journal.rounds == 1
