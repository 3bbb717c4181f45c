"""The figures of the report, drawn by plotly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lorafit.errors import MissingExtraError, some
from lorafit.report import text
from lorafit.report.curves import Series, smooth, span, thin
from lorafit.report.palette import LIGHT
from lorafit.report.records import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FONT: Final = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
TALL: Final = 380
SMALL: Final = 220
TICKS: Final = 8
"""Up to how many steps each has its tick."""


@dataclass(frozen=True)
class Plot:
    """One figure and the words around it.

    Attributes:
        key: a short name that is unique in the page.
        title: what is drawn, with its unit.
        spoken: what can be seen, for those who cannot.
        notes: what a reader should know of the drawing.
        figure: the plotly figure, in the colours of the light palette; `meta` of a trace is how the style sheet
            marks it in the legend.
    """

    key: str
    title: str
    spoken: str
    notes: tuple[str, ...]
    figure: Figure


def plotly_script() -> str:
    """The source of plotly.js, as the installed plotly carries it.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return str(get_plotlyjs())


def draw(run: Run) -> list[Plot]:
    """The figures for which `run` has data: loss first, then accuracy, then how the training went.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    steps = run.steps
    small = [
        _curve(run, "learning-rate", "Learning rate", [(s.step, s.learning_rate) for s in steps], ".2e"),
        _curve(run, "gradient", "Gradient norm", [(s.step, s.grad_norm) for s in steps], ".3g"),
        _curve(run, "throughput", "Tokens per second", [(s.step, s.tokens_per_second) for s in steps], ",.0f"),
        _curve(run, "examples", "Examples per second", [(s.step, s.examples_per_second) for s in steps], ",.0f"),
        _curve(
            run,
            "memory",
            "Peak memory so far, GiB",
            [(s.step, _gib(s.peak_rss_bytes)) for s in steps],
            ".2f",
        ),
        _curve(
            run,
            "device-memory",
            "Peak memory on the device so far, GiB",
            [(s.step, _gib(s.peak_device_bytes)) for s in steps],
            ".2f",
        ),
    ]
    return [plot for plot in (_losses(run), _accuracy(run), _correlation(run), *small) if plot is not None]


def _gib(count: float | None) -> float | None:
    return None if count is None else count / 2**30


def _losses(run: Run) -> Plot | None:
    train = Series.made([(step.step, step.loss) for step in run.steps])
    held = Series.made([(one.step, one.loss) for one in run.evaluations])
    diverged = [step.step for step in run.steps if step.diverged]
    finite = train.finite + held.finite
    if not finite and not diverged:
        return None
    figure = over_steps(run, TALL, labelled=True)
    notes: list[str] = []
    spoken: list[str] = []
    if train.finite:
        notes += _add_train(figure, train)
        spoken.append(f"Training loss from {text.loss(train.finite[0])} to {text.loss(train.finite[-1])}.")
    if held.finite:
        figure.add_scatter(
            x=held.x,
            y=held.y,
            name="held-out",
            meta="held",
            mode="lines+markers",
            cliponaxis=False,
            line={"color": LIGHT.held, "width": 2},
            marker={"color": LIGHT.held, "size": 8},
            hovertemplate="%{y:.4f}",
        )
        best, step = min((y, x) for x, y in zip(held.x, held.y, strict=True) if y is not None)
        notes.append(f"Lowest held-out loss {text.loss(best)}, at step {step:,}.")
        spoken.append(f"Held-out loss from {text.loss(held.finite[0])} to {text.loss(held.finite[-1])}.")
    if diverged:
        figure.add_scatter(
            x=diverged,
            y=[min(finite, default=0.0)] * len(diverged),
            name="not finite",
            meta="lost",
            mode="markers",
            marker={"color": LIGHT.bad, "size": 9, "symbol": "x"},
            hovertemplate="not finite",
        )
        many = "steps" if len(diverged) > 1 else "step"
        notes.append(f"The training loss was not a finite number at {many} {_list(diverged)}.")
        spoken.append(notes[-1])
    notes += [
        f"From step {one.start:,} on, the adapted weights moved too."
        for one in run.schedules[-1:]
        if one.started and one.start is not None
    ]
    if run.resumes:
        notes.append(f"Dotted: resumed at {'steps' if len(run.resumes) > 1 else 'step'} {_list(run.resumes)}.")
    return Plot("loss", "Loss", " ".join(spoken), tuple(notes), figure)


def _list(steps: Iterable[int]) -> str:
    return some((f"{step:,}" for step in steps), limit=8)


def _add_train(figure: Figure, train: Series) -> list[str]:
    """Draw the training loss; notes on how it was."""
    reach = span(len(train.finite))
    is_smoothed = len(train.finite) >= 2 * reach
    raw = thin(train)
    figure.add_scatter(
        x=raw.x,
        y=raw.y,
        name="training, each logged step" if is_smoothed else "training",
        meta="faint" if is_smoothed else "train",
        mode=_mode(raw),
        line={"color": LIGHT.faint if is_smoothed else LIGHT.train, "width": 1.2 if is_smoothed else 2},
        marker={"color": LIGHT.train, "size": 7},
        hovertemplate="%{y:.4f}",
    )
    notes = []
    if is_smoothed:
        curve = thin(smooth(train, reach))
        figure.add_scatter(
            x=curve.x,
            y=curve.y,
            name="training, smoothed",
            meta="train",
            mode=_mode(curve),
            line={"color": LIGHT.train, "width": 2.2},
            hovertemplate="%{y:.4f}",
        )
        notes.append(f"Smoothed by lines through about {reach} logged steps to either side of each.")
    return notes + _thinned(raw)


def _accuracy(run: Run) -> Plot | None:
    accuracy = Series.made([(one.step, one.accuracy) for one in run.evaluations])
    if not accuracy.finite:
        return None
    figure = over_steps(run, SMALL)
    figure.add_scatter(
        x=accuracy.x,
        y=accuracy.y,
        name="held-out accuracy",
        mode="lines+markers",
        cliponaxis=False,
        line={"color": LIGHT.held, "width": 2},
        marker={"color": LIGHT.held, "size": 7},
        hovertemplate="%{y:.2%}",
    )
    figure.update_yaxes(tickformat=".0%")
    first, last = text.percent(accuracy.finite[0]), text.percent(accuracy.finite[-1])
    return Plot("accuracy", "Held-out accuracy", f"Held-out accuracy from {first} to {last}.", (), figure)


def _correlation(run: Run) -> Plot | None:
    """Of a regression: Pearson's r of the held-out records, with its 95 % interval."""
    known = [one for one in run.evaluations if "pearson" in one.agreement]
    if not known:
        return None
    figure = over_steps(run, SMALL)
    values = [one.agreement["pearson"] for one in known]
    low, high = (
        [one.agreement.get(f"pearson_{end}", value) for one, value in zip(known, values, strict=True)]
        for end in ("low", "high")
    )
    figure.add_scatter(
        x=[one.step for one in known],
        y=values,
        name="held-out correlation",
        mode="lines+markers",
        cliponaxis=False,
        line={"color": LIGHT.held, "width": 2},
        marker={"color": LIGHT.held, "size": 7},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [end - value for end, value in zip(high, values, strict=True)],
            "arrayminus": [value - end for end, value in zip(low, values, strict=True)],
            "thickness": 1,
            "width": 3,
        },
        hovertemplate="%{y:.3f}",
    )
    spoken = f"Correlation of predicted and right numbers from {values[0]:.3f} to {values[-1]:.3f}."
    notes = ("Pearson's r; bars are 95 % intervals over the held-out records.",)
    return Plot("correlation", "Held-out correlation", spoken, notes, figure)


def _curve(run: Run, key: str, title: str, points: list[tuple[int, float | None]], tooltip: str) -> Plot | None:
    """One small figure of one series, from zero upwards."""
    series = thin(Series.made(points))
    if not series.finite:
        return None
    figure = over_steps(run, SMALL)
    figure.add_scatter(
        x=series.x,
        y=series.y,
        name=title.lower(),
        mode=_mode(series),
        line={"color": LIGHT.train, "width": 1.8},
        marker={"color": LIGHT.train, "size": 7},
        hovertemplate=f"%{{y:{tooltip}}}",
    )
    # Decimals as the settings have them, thousands apart: neither 200µ nor 3k.
    figure.update_yaxes(rangemode="tozero", tickformat=",~g")
    low, high = text.rough(min(series.finite)), text.rough(max(series.finite))
    return Plot(key, title, f"{title}, between {low} and {high}.", tuple(_thinned(series)), figure)


def _mode(series: Series) -> str:
    """Lines alone, unless they would not show a point that has no neighbour."""
    known = (False, *(y is not None for y in series.y), False)
    neighbours = zip(known, known[1:], known[2:], strict=False)
    return "lines+markers" if (False, True, False) in neighbours else "lines"


def _thinned(series: Series) -> list[str]:
    if not series.is_thinned:
        return []
    return [f"{len(series.x):,} of {series.of:,} logged steps are drawn: the lowest and highest of each stretch."]


def blank(height: int, top: int = 14) -> Figure:
    """An empty figure in the style of the page.

    Args:
        height: in pixels.
        top: room above the plot, in pixels.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    axis = {
        "gridcolor": LIGHT.grid,
        "linecolor": LIGHT.rule,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        "exponentformat": "power",
    }
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 44, "r": 12, "t": top, "b": 34},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": LIGHT.muted},
        hoverlabel={"bgcolor": LIGHT.card, "bordercolor": LIGHT.rule, "font": {"color": LIGHT.ink}},
        showlegend=False,  # the page has one, which wraps as text does
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": LIGHT.muted, "activecolor": LIGHT.ink},
        xaxis=axis,
        yaxis=axis,
    )
    return figure


def over_steps(run: Run, height: int, *, labelled: bool = False) -> Figure:
    """An empty figure over the steps of a run, with marks where it was resumed.

    Args:
        run: a run.
        height: in pixels.
        labelled: whether the marks say what they are, where there is room.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    figure = blank(height, 22 if labelled else 14)
    reached = [one.step for one in run.steps] + [one.step for one in run.evaluations]
    last = max(reached, default=0)
    figure.update_layout(
        hovermode="x unified",
        xaxis={"showgrid": False, "showline": True, "tickformat": ",d", "range": [0, max(last, 1) * 1.01]},
        shapes=[_mark(step) for step in run.resumes],
        annotations=[_label(step, last) for step in run.resumes] if labelled and len(run.resumes) < 3 else [],
    )
    if last <= TICKS:
        figure.update_xaxes(dtick=1)  # there is no half a step
    figure.update_xaxes(title={"text": "step", "standoff": 6}, hoverformat=",d", title_font_size=12)
    return figure


def _mark(step: int) -> Mapping[str, Any]:
    return {
        "type": "line",
        "x0": step,
        "x1": step,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": LIGHT.muted, "width": 1, "dash": "dot"},
    }


def _label(step: int, last: int) -> Mapping[str, Any]:
    is_left = step < last / 2  # where there is more room beside the line
    return {
        "x": step,
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "xanchor": "left" if is_left else "right",
        "text": f"resumed at {step:,}",
        "showarrow": False,
        "font": {"size": 11},
    }


def _missing(error: ModuleNotFoundError) -> MissingExtraError:
    return MissingExtraError(
        "the report is drawn by plotly, which is not installed",
        found=error,
        fix='pip install "lorafit[report]"',
    )


def as_json(plots: Iterable[Plot]) -> dict[str, Any]:
    """The figures as plotly.js takes them, by key."""
    return {plot.key: plot.figure.to_plotly_json() for plot in plots}
