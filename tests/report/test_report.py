"""Reading records and drawing them: which records stand, what is refused, what the page holds."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest

from lorafit.errors import ConfigError, DataError, MissingExtraError
from lorafit.report import read_records, write_report
from lorafit.report.curves import Series, smooth, thin
from lorafit.report.figures import draw
from lorafit.report.head import headline
from lorafit.report.palette import DARK, LIGHT, Palette, exchange
from lorafit.report.summary import summarize
from lorafit.report.text import duration, escape, percent, script_json, size
from lorafit.report.text import loss as loss_text


class Page(HTMLParser):
    """The elements, the visible text and the scripts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.inside: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "link"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, "elements are nested properly"

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.inside[-1:] != ["style"]:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])["figures"]


@pytest.fixture
def drawn(path: Path) -> Callable[[Any], Page]:
    """Writes a story, draws it and parses the page."""

    def draw_it(told: Any) -> Page:
        return Page(write_report(told.write(path), path.with_name("report.html")))

    return draw_it


# Which records stand


def test_a_whole_run(whole: Any, path: Path) -> None:
    run = read_records(whole.write(path))
    assert [step.step for step in run.steps] == list(range(1, 241))
    assert [one.step for one in run.evaluations] == [0, 40, 80, 120, 160, 200, 240]
    assert run.resolved["method"] == "LoRA"
    assert run.config["lr_scheduler_type"] == "cosine"
    assert run.environment["torch"] == "2.13.0+cpu"
    assert run.data["truncated"] == 14
    assert [pair.index for pair in run.pairs] == [0, 1, 2]
    assert run.pairs[1].after == run.pairs[1].gold == "An iterator of tuples."
    assert run.pairs[1].before is not None
    assert run.end is not None
    assert run.end.status == "done"
    assert run.saved[0].path == "runs/python-qa/adapter"
    assert run.remarks == run.resumes == ()


def test_after_a_resume_the_later_record_of_a_step_stands(resumed: Any, path: Path) -> None:
    run = read_records(resumed.write(path))
    assert [step.step for step in run.steps] == list(range(1, 181))
    later = [record for record in resumed.records if record["event"] == "step"][134:]
    assert [step.loss for step in run.steps[121:]] == [record["loss"] for record in later]
    assert run.resumes == (120,)
    assert [process.end is None for process in run.processes] == [True, False]
    assert [process.last_step for process in run.processes] == [133, 180]
    assert "13 logged steps of an earlier process" in run.remarks[0]


def test_what_a_resume_did_not_reach_again_falls_away(story: Any, path: Path) -> None:
    told = story().tell("run", resumed_from_step=0)
    for step in range(1, 9):
        told.tell("step", step=step, loss=float(step)).tell("evaluation", step=step, loss=float(step))
    told.tell("run", resumed_from_step=4).tell("step", step=5, loss=50.0)
    run = read_records(told.write(path))
    assert [step.loss for step in run.steps] == [1.0, 2.0, 3.0, 4.0, 50.0]
    assert [one.step for one in run.evaluations] == [1, 2, 3, 4]


def test_a_resume_that_never_trained_takes_nothing_away(story: Any, path: Path) -> None:
    told = story().tell("run", resumed_from_step=0)
    told.tell("step", step=1, loss=1.0).tell("step", step=2, loss=2.0).tell("run", resumed_from_step=1)
    run = read_records(told.write(path))
    assert [step.step for step in run.steps] == [1, 2]
    assert len(run.processes) == 2


def test_a_fresh_start_is_another_run(whole: Any, path: Path) -> None:
    whole.tell("run", run="new", resumed_from_step=0).tell("step", step=1, loss=9.0)
    run = read_records(whole.write(path))
    assert [step.loss for step in run.steps] == [9.0]
    assert run.config == {}
    assert run.pairs == ()
    assert "1 process of an earlier run" in run.remarks[0]


def test_of_two_records_of_a_step_in_one_process_the_later_stands(story: Any, path: Path) -> None:
    told = story().tell("run").tell("evaluation", step=3, loss=2.0).tell("evaluation", step=3, loss=1.0)
    assert [one.loss for one in read_records(told.write(path)).evaluations] == [1.0]


def test_changed_settings_are_remarked(story: Any, path: Path) -> None:
    told = story().tell("run").tell("config", config={"learning_rate": 1.0, "r": 8}, resolved={})
    told.tell("run", resumed_from_step=2).tell("config", config={"learning_rate": 2.0, "r": 8}, resolved={})
    run = read_records(told.write(path))
    assert run.config["learning_rate"] == 2.0
    assert run.remarks == ("The settings changed when the run was resumed: learning_rate. The report shows the last.",)


def test_unknown_events_and_keys_are_remarked(story: Any, path: Path) -> None:
    told = story().tell("run").tell("weather", sun=True).tell("weather").tell("step", step=1, mood="good")
    remarks = read_records(told.write(path)).remarks
    assert remarks == (
        "Records of kinds that this report does not know are not shown: weather (2).",
        "Keys that this report does not know are not shown: step.mood.",
    )


def test_a_line_separator_in_a_text_is_no_line(story: Any, path: Path) -> None:
    told = story().tell("run")
    told.records.append({"event": "sample", "phase": "before", "index": 0, "prompt": "a\u2028b\x85c", "output": "d"})
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in told.records), encoding="utf-8")
    assert read_records(path).pairs[0].prompt == "a\u2028b\x85c"


# Damage


def test_a_half_written_last_line_is_skipped_and_told(whole: Any, path: Path) -> None:
    whole.write(path)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    run = read_records(path)
    assert run.end is None
    assert run.remarks == (f"{path}:{len(whole.records)} is half-written, as a kill leaves it, and was skipped.",)


def test_a_half_written_letter_is_skipped_too(story: Any, path: Path) -> None:
    story().tell("run").write(path)
    path.write_bytes(path.read_bytes() + '{"event": "sample", "prompt": "ä'.encode()[:-1])
    assert "half-written" in read_records(path).remarks[0]


def test_a_repaired_line_is_skipped_and_told(story: Any, path: Path) -> None:
    story().tell("run").tell("run", resumed_from_step=1, repaired=True).write(path)
    first, second = path.read_text().splitlines()
    path.write_text(f'{first}\n{{"event": "st\n{second}\n')
    run = read_records(path)
    assert len(run.processes) == 2
    assert run.remarks == (f"{path}:2 is half-written, as a kill leaves it, and was skipped.",)


RUN = '{"event": "run"}'


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", 1, "holds no record"),
        ("\n \n", 1, "holds no record"),
        (RUN + '\n{"event": "step", "st\n' + RUN + "\n", 2, "not JSON"),
        (RUN + "\nnonsense\n", 2, "not JSON"),
        ("nonsense", 1, "not JSON"),
        (RUN + "\nnonsense\nmore nonsense", 2, "not JSON"),
        (RUN + '\n{"event": "step", "step": 1, "loss": NaN}\n', 2, "NaN is not a JSON number"),
        (RUN + '\n{"event": "step", "step": 1, "step": 2}\n', 2, "'step' stands there twice"),
        (RUN + "\n" + "[" * 100_000 + "\n", 2, "not JSON"),
        (RUN + "\n[1, 2]\n", 2, "is not a record"),
        (RUN + '\n{"step": 1}\n', 2, "is not a record"),
        ('{"event": "step", "step": 1}\n', 1, "do not begin with that of a run"),
        (RUN + '\n{"event": "step", "stepp": 1}\n', 2, "event 'step' is damaged"),
        (RUN + '\n{"event": "step", "step": -1}\n', 2, "event 'step' is damaged"),
        (RUN + '\n{"event": "step", "step": true}\n', 2, "event 'step' is damaged"),
        (RUN + '\n{"event": "step", "step": 1, "loss": "low"}\n', 2, "event 'step' is damaged"),
        (RUN + '\n{"event": "step", "step": 1, "loss": 1e999}\n', 2, "event 'step' is damaged"),
        (RUN + '\n{"event": "step", "step": 1, "loss": 1' + "0" * 400 + "}\n", 2, "event 'step' is damaged"),
        (RUN + '\n{"event": "end", "status": "don"}\n', 2, "event 'end' is damaged"),
        (RUN + '\n{"event": "config", "config": [1]}\n', 2, "event 'config' is damaged"),
        (RUN + '\n{"event": "sample", "phase": "before", "index": 0, "prompt": 3}\n', 2, "event 'sample' is damaged"),
        (RUN + '\n{"event": "saved", "step": 1, "time": "noon"}\n', 2, "event 'saved' is damaged"),
    ],
)
def test_damage_is_an_error_that_names_file_and_line(path: Path, content: str, line: int, message: str) -> None:
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_records(path)
    assert str(caught.value.where).startswith(f"{path}:{line}")
    assert None not in (caught.value.found, caught.value.expected, caught.value.fix)
    with pytest.raises(DataError):
        write_report(path, path.with_name("report.html"))
    assert not path.with_name("report.html").exists()


def test_bytes_that_are_no_text(path: Path) -> None:
    path.write_bytes(b'{"event": "run"}\n{"event": "\xff"}\n')
    with pytest.raises(DataError, match="utf-8") as caught:
        read_records(path)
    assert caught.value.where == f"{path}:2"


def test_errors_name_what_is_near(path: Path) -> None:
    path.write_text(RUN + '\n{"event": "end", "status": "don"}\n')
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert caught.value.near == ("done",)
    assert (caught.value.found, caught.value.expected) == ('"don"', "one of done, interrupted, failed")
    path.write_text(RUN + '\n{"event": "step", "stepp": 1}\n')
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert caught.value.near == ("stepp",)


def test_a_missing_file_and_a_folder(path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_records(path)
    assert caught.value.where == path
    path.write_text(RUN)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_records(path.parent)
    assert caught.value.fix == f"give {path}"


# The headline


def test_the_headline_of_a_whole_run(whole: Any, path: Path) -> None:
    summary = summarize(read_records(whole.write(path)))
    assert summary.before is not None
    assert summary.after is not None
    assert (summary.before.step, summary.after.step) == (0, 240)
    assert summary.after.perplexity is not None
    assert summary.change == pytest.approx(summary.after.loss / summary.before.loss - 1)
    assert summary.share == pytest.approx(4_884_480 / 139_399_488)
    assert summary.peak_bytes == 1_851_000_000
    assert 2500 < summary.tokens_per_second < 2800
    assert summary.seconds == whole.records[-1]["seconds"]


def test_memory_is_that_of_the_device_where_there_was_one(whole: Any, path: Path) -> None:
    for record in whole.records:
        if record["event"] == "step":
            record["peak_device_bytes"] = 5 * 2**30 + record["step"]
    run = read_records(whole.write(path))
    assert summarize(run).device_bytes == 5 * 2**30 + 240
    assert "on the device; 1.72 GiB resident" in headline(run, summarize(run))
    assert next(iter(traces(run, "device-memory").values())).y[0] == pytest.approx(5, abs=1e-3)


def test_the_end_says_which_evaluation_counts(story: Any, path: Path) -> None:
    told = story().tell("run")
    for step, loss in ((0, 3.0), (5, 1.0), (10, 2.0)):
        told.tell("evaluation", step=step, loss=loss, perplexity=10 * loss)
    told.tell("end", status="done", steps=10, eval_loss_before=3.0, eval_loss_after=1.0)
    summary = summarize(read_records(told.write(path)))
    assert summary.after is not None
    assert (summary.after.step, summary.after.loss, summary.after.perplexity) == (5, 1.0, 10.0)


def test_an_evaluation_is_known_by_a_loss_of_rounded_records(story: Any, path: Path) -> None:
    told = story().tell("run")
    for step, loss in ((0, 6.1), (5, 0.1682330792148908), (10, 0.34)):
        told.tell("evaluation", step=step, loss=loss, accuracy=0.1 * step, pearson=0.9)
    told.tell("end", status="done", steps=10, eval_loss_before=6.1, eval_loss_after=0.16823309045666665)
    after = summarize(read_records(told.write(path))).after
    assert after is not None
    assert (after.step, after.accuracy, after.agreement) == (5, 0.5, {"pearson": 0.9})


def test_a_run_without_an_end_has_its_last_evaluation(resumed: Any, path: Path) -> None:
    del resumed.records[-1]
    run = read_records(resumed.write(path))
    summary = summarize(run)
    assert summary.status == "no end"
    assert summary.after is not None
    assert summary.after.step == 160
    assert summary.seconds == pytest.approx(sum(process.seconds or 0 for process in run.processes))
    assert summary.train_seconds is None, "the process that was killed did not tell its own"


def test_nothing_is_made_up(bare: Any, path: Path) -> None:
    summary = summarize(read_records(bare.write(path)))
    known = {name for name, value in vars(summary).items() if value is not None}
    assert known == {"status", "seconds"}


# Curves


def test_smoothing_keeps_straight_lines_up_to_their_ends() -> None:
    for slope in (0.0, -0.7, 3.0):
        points = [(step, 100.0 + slope * step) for step in range(1, 301)]
        assert smooth(Series.made(points), 10).y == pytest.approx([y for _, y in points])


def test_smoothing_is_the_weighted_least_squares_line() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    smoothed = smooth(Series.made(list(enumerate(values))), 4).y
    for at in range(len(values)):
        distance = [other - at for other in range(len(values))]
        # polyfit squares what it is given as weights
        weight = [0.75 ** (abs(d) / 2) for d in distance]
        assert smoothed[at] == pytest.approx(numpy.polyfit(distance, values, 1, w=weight)[1])


def test_smoothing_takes_the_noise_and_keeps_gaps() -> None:
    noise = random.Random(1)
    points: list[tuple[int, float | None]] = [(step, noise.gauss(2.0, 0.3)) for step in range(400)]
    points[100] = (100, None)
    smoothed = smooth(Series.made(points), 20)
    assert smoothed.y[100] is None
    assert len(smoothed.finite) == 399
    assert max(abs(y - 2.0) for y in smoothed.finite[20:-20]) < 0.2
    alone = Series.made([(1, 5.0), (2, None)])
    assert smooth(alone, 5) is alone


def test_thinning_keeps_peaks_ends_and_gaps() -> None:
    points: list[tuple[int, float | None]] = [(step, 1.0 + step * 1e-6) for step in range(50_000)]
    points[31_234] = (31_234, 99.0)
    points[777] = (777, -99.0)
    points[40_000] = (40_000, None)
    series = thin(Series.made(points), 1000)
    assert len(series.x) <= 1100
    assert max(series.finite) == 99.0
    assert min(series.finite) == -99.0
    assert (series.x[0], series.x[-1]) == (0, 49_999)
    assert series.y[series.x.index(40_000)] is None
    assert list(series.x) == sorted(set(series.x))
    assert series.is_thinned
    short = Series.made(points[:900])
    assert thin(short, 1000) is short


# Figures


def traces(run: Any, key: str) -> dict[str, Any]:
    plot = next(plot for plot in draw(run) if plot.key == key)
    return {trace.name: trace for trace in plot.figure.data}


def test_the_figures_of_a_whole_run(whole: Any, path: Path) -> None:
    run = read_records(whole.write(path))
    assert [plot.key for plot in draw(run)] == ["loss", "learning-rate", "gradient", "throughput", "memory"]
    loss = traces(run, "loss")
    assert list(loss) == ["training, each logged step", "training, smoothed", "held-out"]
    assert loss["held-out"].x[0] == 0, "the measurement before the training is drawn"
    assert loss["training, each logged step"].y == tuple(step.loss for step in run.steps)
    assert next(iter(traces(run, "memory").values())).y[0] == run.steps[0].peak_rss_bytes / 2**30


def test_resumes_and_diverged_losses_are_marked(resumed: Any, path: Path) -> None:
    run = read_records(resumed.write(path))
    plots = {plot.key: plot for plot in draw(run)}
    assert "accuracy" in plots
    assert all([shape.x0 for shape in plot.figure.layout.shapes] == [120] for plot in plots.values())
    assert [note.text for note in plots["loss"].figure.layout.annotations] == ["resumed at 120"]
    loss = traces(run, "loss")
    assert loss["not finite"].x == (61, 62, 149)
    assert loss["training, each logged step"].y[60:62] == (None, None)
    assert "not a finite number at steps 61, 62, 149." in " ".join(plots["loss"].notes)


def test_a_loss_that_was_never_finite(story: Any, path: Path) -> None:
    told = story().tell("run").tell("step", step=1, loss=None, nonfinite=["loss"])
    (plot,) = draw(read_records(told.write(path)))
    assert [trace.name for trace in plot.figure.data] == ["not finite"]


def test_a_single_point_is_visible(story: Any, path: Path) -> None:
    told = story().tell("run").tell("step", step=1, loss=2.0, learning_rate=1e-3)
    run = read_records(told.write(path))
    assert {trace.mode for plot in draw(run) for trace in plot.figure.data} == {"lines+markers"}


@pytest.mark.parametrize(("steps", "tick"), [(3, 1), (30, None)])
def test_there_is_no_half_a_step(story: Any, path: Path, steps: int, tick: int | None) -> None:
    told = story().tell("run")
    for step in range(1, steps + 1):
        told.tell("step", step=step, loss=2.0)
    (plot,) = draw(read_records(told.write(path)))
    assert plot.figure.layout.xaxis.dtick == tick


def test_a_long_run_is_thinned_and_says_so(story: Any, path: Path, drawn: Any) -> None:
    told = story().tell("run")
    told.records += [{"event": "step", "step": step, "loss": 2 + step % 7} for step in range(1, 9001)]
    page = drawn(told)
    count = len(page.figures["loss"]["data"][0]["x"])
    assert count <= 2100
    assert f"{count:,} of 9,000 logged steps are drawn" in page.words


# The page


def test_the_page_tells_the_run(whole: Any, drawn: Any) -> None:
    page = drawn(whole)
    for told in (
        "SmolLM2-135M-Instruct",
        "LoRA",
        "causal language model",
        "2.550before, step 0",
        "1.459after, step 240",
        "−42.8 %",
        "1.72 GiB",
        "3.50 %",
        "4,884,480 of 139,399,488 parameters",
        "14 records cut to 512 tokens; the longest has 1,892",
        "droppednone",
        "The loss is computed on 66.3 % of the training tokens",
        "equals the reference",
        "lr_scheduler_typecosine",
        "2.13.0+cpu",
        "runs/python-qa/adapter",
        "The held-out loss was lowest at step 160 and has risen since.",
    ):
        assert told in page.words, told


def test_places_of_lost_records_are_told(whole: Any, drawn: Any) -> None:
    whole.records[3].update(
        truncated=3, truncated_at=["a.jsonl:3", "a.jsonl:<7>"], longest=512, longest_uncut=600, dropped=0,
        dropped_at=[], removed=1, removed_at=["a.jsonl:9"], unknown_at=[5],
    )  # fmt: skip
    words = drawn(whole).words
    assert "truncated3 records cut to 512 tokens; the longest has 600a.jsonl:3, a.jsonl:<7> and 1 more" in words
    assert "droppednone" in words
    assert "removed1 recorda.jsonl:9" in words
    assert "unknown at5" in words


def test_an_error_keeps_its_columns(story: Any, drawn: Any) -> None:
    page = drawn(story().tell("run").tell("end", status="failed", message="no\n  where:    here"))
    assert "no\n  where:    here" in page.text
    assert ("p", {"class": "message lines"}) in page.elements


def test_the_page_of_a_classifier_tells_its_accuracy(resumed: Any, drawn: Any) -> None:
    page = drawn(resumed)
    assert "Accuracy52.0 % → 89.4 %" in page.words
    assert "interrupted at step 180 of 240" in page.words
    assert "last measured, step 160" in page.words


def test_the_page_of_a_run_that_did_nothing(bare: Any, drawn: Any) -> None:
    page = drawn(bare)
    for told in ("not measured", "no end recorded", "recorded no samples", "recorded no step", "recorded no settings"):
        assert told in page.words
    assert page.figures == {}


def test_the_page_asks_for_nothing(whole: Any, drawn: Any) -> None:
    page = drawn(whole)
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "poster", "srcset")
    ]
    assert [address for address in addresses if not (address or "").startswith("data:")] == []
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_only_the_page_s_own_scripts_may_run(whole: Any, drawn: Any) -> None:
    page = drawn(whole)
    policy = next(
        attributes["content"]
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    data, *scripts = page.scripts
    assert json.loads(data)["dark"] == exchange()
    assert len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_hostile_text_stays_text(hostile: Any, whole: Any, drawn: Any) -> None:
    attack = "</script><script>window.pwned = 1</script>"
    page, tame = drawn(hostile), drawn(whole)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in tame.elements} | {"strong"}
    assert len(page.scripts) == len(tame.scripts) == 3
    assert attack not in page.source
    assert page.words.count(attack) > 10, "it is shown as it was"
    assert "${script} {braces}" in page.words
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_what_html_cannot_hold_is_made_visible(hostile: Any, drawn: Any) -> None:
    page = drawn(hostile)
    assert "\u2400\u241b[31mred\u2421" in page.text
    assert "half \\ud83d of a pair" in page.text
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page.source.replace(page.scripts[1], "")) is None


def test_json_inside_of_the_page() -> None:
    value = {"</script>": "<!-- & \u2028 \ud800 </SCRIPT"}
    packed = script_json(value)
    assert json.loads(packed) == value
    assert not set("<>&\u2028") & set(packed)


def test_drawing_twice_gives_the_same_bytes(whole: Any, path: Path) -> None:
    whole.write(path)
    one = write_report(path, path.with_name("1.html")).read_bytes()
    assert write_report(str(path), str(path.with_name("2.html"))).read_bytes() == one


# Writing


def test_the_report_replaces_an_older_one_and_leaves_nothing_else(bare: Any, path: Path) -> None:
    bare.write(path)
    target = path.parent / "new" / "report.html"
    assert write_report(path, target) == target
    target.write_text("old")
    write_report(path, target)
    assert target.read_text().startswith("<!doctype html>")
    assert [one.name for one in target.parent.iterdir()] == ["report.html"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_the_report_has_the_mode_of_any_new_file(bare: Any, path: Path) -> None:
    report = write_report(bare.write(path), path.with_name("report.html"))
    assert report.stat().st_mode == path.stat().st_mode


def test_a_failed_write_leaves_the_older_report(bare: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = write_report(bare.write(path), path.with_name("report.html"))
    before = report.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        write_report(path, report)
    assert "No space left" in str(caught.value.found)
    assert report.read_bytes() == before
    assert sorted(one.name for one in path.parent.iterdir()) == ["records.jsonl", "report.html"]


def test_the_records_are_never_written_over(bare: Any, path: Path) -> None:
    before = bare.write(path).read_bytes()
    for target in (path, path.parent / "." / path.name, path.parent):
        with pytest.raises(ConfigError, match="cannot be written over this path") as caught:
            write_report(path, target)
        assert caught.value.fix is not None
        assert ".html" in caught.value.fix
    assert path.read_bytes() == before


def test_without_plotly_the_install_line_is_told(
    bare: Any, whole: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plotly", "plotly.offline", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    for told in (bare, whole):
        with pytest.raises(MissingExtraError) as caught:
            write_report(told.write(path), path.with_name("report.html"))
        assert caught.value.fix == 'pip install "lorafit[report]"'
        assert not path.with_name("report.html").exists()
    assert read_records(path).steps, "reading needs no plotly"


# Words and colours


def test_numbers_as_words() -> None:
    assert [loss_text(value) for value in (2.5, 0.0, 0.0001, None)] == ["2.500", "0.000", "1.00e-04", "–"]
    assert [percent(value) for value in (0.5, 0.0123, 0.0004, 0.0)] == ["50.0 %", "1.23 %", "0.04 %", "0 %"]
    assert percent(-0.125, signed=True) == "−12.5 %"
    assert percent(0.125, signed=True) == "+12.5 %"
    assert [duration(value) for value in (0.04, 59.94, 59.96, 61, 3599.7, 86399)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 00 min",
        "23 h 59 min",
    ]
    assert [size(value) for value in (2048, 5 * 2**20, 1.5 * 2**30)] == ["2 KiB", "5 MiB", "1.50 GiB"]
    assert escape("a\r\nb\rc<'\">") == "a\nb\u240dc&lt;&#x27;&quot;&gt;"


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "muted", "held", "good", "bad", "warn", "train"])
@pytest.mark.parametrize("surface", ["paper", "card"])
def test_text_has_contrast(palette: Palette, name: str, surface: str) -> None:
    high, low = sorted((luminance(vars(palette)[name]), luminance(vars(palette)[surface])), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5
    assert len(set(palette.named().values())) == len(palette.named()), "each colour has one counterpart"


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_numbers_on_shades_and_dots_have_contrast(palette: Palette) -> None:
    ink, full, paper = (luminance(colour) + 0.05 for colour in (palette.ink, palette.full, palette.paper))
    assert max(ink, full) / min(ink, full) >= 4.5, "and lighter shades lie between this and the paper"
    for hue in palette.hues:
        dot = luminance(hue) + 0.05
        assert max(dot, paper) / min(dot, paper) >= 3, hue
