"""The figure of what DoRA moved: lengths over directions."""

from __future__ import annotations

from pathlib import Path
from statistics import correlation
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.report import anatomy, read_records, write_report
from lorafit.report.palette import LIGHT

SITES = ("layers.0.q", "layers.1.q", "layers.0.v", "layers.1.v")


def moved(*numbers: float | None) -> dict[str, float | None]:
    return dict(zip(SITES, numbers, strict=True))


@pytest.fixture
def told(story: Any) -> Any:
    """Three steps of four sites."""
    told = story().tell("run")
    told.tell("anatomy", step=0, magnitude=moved(1e-9, 0, 0, 0), direction=moved(0, 0, 0, 0))
    told.tell("anatomy", step=10, magnitude=moved(1, 2, 3, 4), direction=moved(0.1, 0.2, 0.3, 0.5))
    return told.tell("anatomy", step=20, magnitude=moved(4, 3, 3, 1), direction=moved(0.2, 0.3, 0.4, 0.5))


def test_a_trace_for_each_kind_and_a_weight_for_each_step(told: Any, path: Path) -> None:
    (plot,) = anatomy.draw(read_records(told.write(path)))
    q, v = plot.figure.data
    assert (q.name, v.name) == ("q", "v")
    assert q.x == (0.1, 0.2, 0.2, 0.3) and q.y == (1, 2, 4, 3)
    assert q.text == ("layers.0.q", "layers.1.q") * 2 and q.customdata == (10, 10, 20, 20)
    assert q.marker.size[0] < q.marker.size[2] and q.marker.opacity[0] < q.marker.opacity[2]
    assert (q.marker.color, v.marker.color) == LIGHT.hues[:2]
    assert q.marker.symbol != v.marker.symbol, "not by colour alone"
    assert (q.meta, v.meta) == ("hue-0 mark-0", "hue-1 mark-1")
    assert plot.figure.layout.xaxis.type is None


def test_the_correlation_is_that_of_the_last_step(told: Any, path: Path) -> None:
    (plot,) = anatomy.draw(read_records(told.write(path)))
    expected = f"{correlation([4, 3, 3, 1], [0.2, 0.3, 0.4, 0.5]):+.2f}".replace("-", "−")
    assert expected.startswith("−0.9")
    assert f"Correlation of ΔM and ΔD over the 4 sites at step 20: {expected}." in plot.notes[0]
    assert all(value in plot.notes[0] for value in ("−0.62", "+0.83", "−0.31", "arXiv:2402.09353"))
    assert "Small and pale: step 10; large: step 20." in plot.notes
    assert plot.spoken == " ".join(plot.notes)


def test_the_numbers_are_on_the_page(told: Any, path: Path) -> None:
    page = write_report(told.write(path), path.with_name("report.html")).read_text(encoding="utf-8")
    assert "By kind of module, and each site, at step 20 (4)" in page
    assert "<tr><td>q</td><td>2</td><td>0.250</td><td>3.50</td><td>−1.00</td></tr>" in page
    assert "<tr><td>layers.1.v</td><td>0.500</td><td>1.00</td></tr>" in page
    assert '<li class="hue-1 mark-1">v</li>' in page


@pytest.mark.parametrize(
    ("magnitude", "direction"),
    [({"a.0.q": 1.0}, {"a.0.q": 0.1}), ({"a.0.q": 1.0, "a.1.q": 1.0}, {"a.0.q": 0.1, "a.1.q": 0.2})],
)
def test_what_does_not_vary_has_no_correlation(
    story: Any, path: Path, magnitude: dict[str, float], direction: dict[str, float]
) -> None:
    told = story().tell("run").tell("anatomy", step=3, magnitude=magnitude, direction=direction)
    (plot,) = anatomy.draw(read_records(told.write(path)))
    assert plot.notes[0].startswith("There is no correlation of ΔM and ΔD")
    assert "step 3" in plot.notes[0] and not any("Small" in note for note in plot.notes)


def test_of_many_steps_some_are_drawn_and_the_last_one(parted: Any, path: Path) -> None:
    (plot,) = anatomy.draw(read_records(parted.write(path)))
    assert len(plot.figure.data) == 7
    assert all(sorted(set(trace.customdata)) == [40, 120, 160, 240] for trace in plot.figure.data)
    assert "4 of 6 recorded steps are drawn." in plot.notes


def test_axes_are_logarithmic_where_most_would_lie_in_a_corner(story: Any, path: Path) -> None:
    numbers = moved(1, 2, 3, 4000)
    told = story().tell("run").tell("anatomy", step=1, magnitude=numbers, direction=moved(1, 1, 1, 2))
    (plot,) = anatomy.draw(read_records(told.write(path)))
    assert plot.figure.layout.xaxis.type == plot.figure.layout.yaxis.type == "log"
    assert "Both axes are logarithmic." in plot.notes
    told.tell("anatomy", step=2, magnitude=numbers, direction=moved(0, 1, 1, 2))
    (plot,) = anatomy.draw(read_records(told.write(path)))
    assert plot.figure.layout.xaxis.type is None, "there is no logarithm of 0"


@pytest.mark.parametrize(("most", "kind"), [(7.9, None), (8.1, "log")])
def test_eight_times_the_middle_is_far(story: Any, path: Path, most: float, kind: str | None) -> None:
    told = story().tell("run")
    told.tell("anatomy", step=1, magnitude=moved(1, 1, 1, most), direction=moved(1, 2, 3, 4))
    (plot,) = anatomy.draw(read_records(told.write(path)))
    assert plot.figure.layout.xaxis.type == plot.figure.layout.yaxis.type == kind


@pytest.mark.parametrize(("most", "step"), [(4, None), (20, "D2"), (9e3, "D2"), (2e4, 1), (1e8, 2), (1e13, 3)])
def test_a_logarithmic_axis_has_as_many_labels_as_it_needs(
    story: Any, path: Path, most: float, step: int | str | None
) -> None:
    told = story().tell("run")
    told.tell("anatomy", step=1, magnitude=moved(1, 1, 1, 20), direction=moved(1, 2, 3, most))
    (plot,) = anatomy.draw(read_records(told.write(path)))
    assert plot.figure.layout.xaxis.dtick == step
    assert plot.figure.layout.xaxis.tickformat == ("~g" if step is None else None), "powers of ten, not zeros"


def test_what_is_not_finite_is_left_out_and_told(story: Any, path: Path) -> None:
    told = story().tell("run")
    told.tell("anatomy", step=1, magnitude=moved(1, None, 3, 4), direction=moved(0.1, 0.2, None, 0.3), nonfinite=["…"])
    run = read_records(told.write(path))
    assert run.remarks == ()
    (plot,) = anatomy.draw(run)
    assert sum(len(trace.x) for trace in plot.figure.data) == 2
    assert plot.notes[-1].endswith("not a finite number: 2 at step 1.")


def test_runs_of_other_methods_have_no_such_part(whole: Any, path: Path) -> None:
    whole.tell("anatomy", step=0, magnitude={"a.0.q": 0}, direction={"a.0.q": 0})
    whole.tell("anatomy", step=240, magnitude={"a.0.q": None}, direction={"a.0.q": None})
    assert anatomy.draw(read_records(whole.write(path))) == []
    page = write_report(path, path.with_name("report.html")).read_text(encoding="utf-8")
    assert "Lengths and directions" not in page and "$anatomy" not in page


def test_more_kinds_than_hues_have_other_symbols(story: Any, path: Path) -> None:
    sites = {f"a.0.kind{at}": at + 1.0 for at in range(20)}
    told = story().tell("run").tell("anatomy", step=1, magnitude=sites, direction=sites)
    (plot,) = anatomy.draw(read_records(told.write(path)))
    assert len({(trace.marker.color, trace.marker.symbol) for trace in plot.figure.data}) == 20
    assert len({trace.meta for trace in plot.figure.data}) == 20


def test_after_a_resume_the_later_record_stands(told: Any, path: Path) -> None:
    told.tell("run", resumed_from_step=10).tell("step", step=11, loss=1.0)
    told.tell("anatomy", step=15, magnitude=moved(1, 1, 1, 1), direction=moved(1, 1, 1, 1))
    assert [one.step for one in read_records(told.write(path)).anatomies] == [0, 10, 15]


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"magnitude": {}}, "step"),
        ({"step": 1, "magnitude": [1.0]}, "magnitude"),
        ({"step": 1, "direction": {"a": "far"}}, "direction"),
        ({"step": 1, "direction": {"a": False}}, "direction"),
    ],
)
def test_damage_is_an_error(story: Any, path: Path, fields: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError, match=f"event 'anatomy' is damaged(.|\n)*:2, key '{key}'"):
        read_records(story().tell("run").tell("anatomy", **fields).write(path))


def test_a_number_that_is_too_large_is_damage(path: Path) -> None:
    path.write_text('{"event": "run"}\n{"event": "anatomy", "step": 1, "magnitude": {"a": 1e999}}\n')
    with pytest.raises(DataError, match="finite numbers and nulls"):
        read_records(path)


def test_hostile_paths_stay_text(story: Any, path: Path) -> None:
    sites = {"a.0.</script><b>": 1.0, "a.1.q": 2.0}
    told = story().tell("run").tell("anatomy", step=1, magnitude=sites, direction=sites)
    (plot,) = anatomy.draw(read_records(told.write(path)))
    assert plot.figure.data[0].text[0] == "a.0.&lt;/script&gt;&lt;b&gt;", "plotly reads some HTML"
    page = write_report(path, path.with_name("report.html")).read_text(encoding="utf-8")
    assert '<li class="hue-0 mark-0">&lt;/script&gt;&lt;b&gt;</li>' in page
