"""The figures of a comparison's page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from lorafit.errors import some
from lorafit.report import text
from lorafit.report.anatomy import SYMBOLS
from lorafit.report.figures import SMALL, TALL, Plot, blank
from lorafit.report.palette import LIGHT
from lorafit.report.scales import logarithmic, padded, price, short, upto
from lorafit.report.text import escape

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Row = Mapping[str, Any]

BASE: Final = "base"
GREY: Final = len(LIGHT.hues) - 1
"""The hue of the untrained model, and of what is significantly worse."""
PRICES: Final = (
    ("seconds", "Training time, s", 1),
    ("memory", "{memory}, GiB", 2**30),
    ("trainable", "Trained numbers", 1),
    ("file", "Size of the file, MiB", 2**20),
)


class Hues:
    """A hue and a symbol for each candidate, the same in every figure of the page."""

    def __init__(self, candidates: Iterable[Row]) -> None:
        trained = [each["name"] for each in candidates if each["kind"] != BASE]
        self._at = {name: at for at, name in enumerate(trained)}

    def style(self, name: str) -> dict[str, Any]:
        """`meta`, and a marker's colour and symbol."""
        at = self._at.get(name)
        hue = GREY if at is None else at % GREY
        mark = GREY if at is None else (at + 3 * (at // GREY)) % GREY  # another one when the hues begin again
        marker = {"color": LIGHT.hues[hue], "symbol": SYMBOLS[mark], "size": 9}
        return {"name": name, "meta": f"hue-{hue} mark-{mark}", "marker": marker, "line": {"color": LIGHT.hues[hue]}}


def far(places: Sequence[Row]) -> list[str]:
    """The names of those so far off that the others could not be told apart beside them."""
    best = places[0]["score"]
    off = {place["name"]: abs(place["score"] - best) for place in places}
    trained = sorted((place["name"] for place in places if place["kind"] != BASE), key=off.__getitem__)
    left = []
    while len(trained) > 3 and off[trained[-1]] > 4 * off[trained[-2]]:
        left.append(trained.pop())
    if trained:
        reach = 1.5 * off[trained[-1]]
        left += [place["name"] for place in places if place["kind"] == BASE and off[place["name"]] > reach]
    return left


def scores(ranking: Row) -> Plot:
    """The score of each candidate with its interval, and a dot for each seed."""
    left = far(ranking["places"])
    shown = [place for place in ranking["places"] if place["name"] not in left]
    figure = _lines(shown)
    for tied, name, hue, mark in _groups():
        group = [place for place in shown if place["tied"] is tied]
        if not group:
            continue
        figure.add_scatter(
            x=[place["score"] for place in group],
            y=[escape(place["name"]) for place in group],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [place["high"] - place["score"] for place in group],
                "arrayminus": [place["score"] - place["low"] for place in group],
                "color": LIGHT.hues[hue],
                "thickness": 2,
                "width": 5,
            },
            name=name,
            meta=f"hue-{hue} mark-{mark}",
            mode="markers",
            marker={"color": LIGHT.hues[hue], "symbol": SYMBOLS[mark], "size": 10},
            customdata=[[place["low"], place["high"]] for place in group],
            hovertemplate="%{y}: %{x:.4f}<br>%{customdata[0]:.4f} to %{customdata[1]:.4f}<extra></extra>",
        )
    figure.add_scatter(
        x=[score for place in shown for _, score in place["seeds"]],
        y=[escape(place["name"]) for place in shown for _ in place["seeds"]],
        customdata=[seed for place in shown for seed, _ in place["seeds"]],
        name="one seed",
        meta="hue-1 mark-0",
        mode="markers",
        marker={"color": LIGHT.hues[1], "symbol": "circle", "size": 6, "line": {"color": LIGHT.card, "width": 1}},
        hovertemplate="%{y}, seed %{customdata}: %{x:.4f}<extra></extra>",
    )
    _measured(figure, ranking, _unit(ranking))
    best = shown[0]
    spoken = f"{best['name']} has {number(ranking, best['score'])}, and is the best of {len(ranking['places'])}."
    notes = [f"Bars: {ranking['level'] * 100:.0f} % intervals over test records and seeds."]
    if len(shown) > 1:
        notes.append(
            "Bars may overlap although a difference is significant: what makes a record hard is in all of them alike, "
            "and drops out of differences."
        )
    return Plot("scores", f"{_word(ranking)} of each candidate", spoken, (*notes, *_off(ranking, left)), figure)


def differences(ranking: Row) -> Plot | None:
    """How far each one is from the best, record by record; None where there is only one."""
    left = far(ranking["places"])
    shown = [place for place in ranking["places"][1:] if place["name"] not in left]
    if not shown:
        return None
    figure = _lines(shown)
    for tied, name, hue, mark in _groups():
        group = [place["to_best"] for place in shown if place["tied"] is tied]
        if not group:
            continue
        figure.add_scatter(
            x=[one["value"] for one in group],
            y=[escape(one["name"]) for one in group],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [one["high"] - one["value"] for one in group],
                "arrayminus": [one["value"] - one["low"] for one in group],
                "color": LIGHT.hues[hue],
                "thickness": 2,
                "width": 5,
            },
            name=name.replace("best, or not", "not"),
            meta=f"hue-{hue} mark-{mark}",
            mode="markers",
            marker={"color": LIGHT.hues[hue], "symbol": SYMBOLS[mark], "size": 10},
            customdata=[one["adjusted"] for one in group],
            hovertemplate="%{y}: %{x:+.4f}<br>p %{customdata:.3g}, corrected<extra></extra>",
        )
    best = escape(ranking["places"][0]["name"])
    _measured(figure, ranking, f"{_unit(ranking)},<br>less that of {best}")
    figure.update_xaxes(zeroline=True, zerolinecolor=LIGHT.muted, zerolinewidth=1, rangemode="tozero")
    spoken = " ".join(f"{place['name']}: {number(ranking, place['to_best']['value'], '+')}." for place in shown)
    notes = (
        f"Bars: {ranking['level'] * 100:.0f} % intervals of each difference by itself. Which ones are significant was "
        "decided for all pairs together, with Holm's correction, and so more strictly.",
    )
    return Plot("differences", f"Difference to {ranking['places'][0]['name']}", spoken, notes, figure)


def _groups() -> tuple[tuple[bool, str, int, int], ...]:
    return ((True, "best, or not significantly worse", 0, 2), (False, "significantly worse", GREY, 1))


def _off(ranking: Row, left: Sequence[str]) -> list[str]:
    at = {place["name"]: place["score"] for place in ranking["places"]}
    if not left:
        return []
    return [f"Too far off to be drawn: {some(f'{name} ({number(ranking, at[name])})' for name in left)}."]


def _lines(shown: Sequence[Row]) -> Figure:
    """An empty figure with a line for each candidate, the best at the top."""
    figure = blank(max(150, 70 + 30 * len(shown)))
    names = [escape(place["name"]) for place in shown]
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names[::-1], range=[-0.6, len(names) - 0.4], dtick=1
    )
    figure.update_layout(hovermode="closest")
    return figure


def _measured(figure: Figure, ranking: Row, title: str) -> None:
    figure.update_xaxes(
        title={"text": title, "standoff": 6},
        title_font_size=12,
        tickformat=".1%" if ranking["metric"] == "accuracy" else "~g",
        nticks=8,
    )


def _word(ranking: Row) -> str:
    return "Accuracy" if ranking["metric"] == "accuracy" else "Loss"


def _unit(ranking: Row) -> str:
    if ranking["metric"] == "accuracy":
        return "accuracy on the test records"
    return f"loss on the test records, {_nats(ranking)}"


def _nats(ranking: Row) -> str:
    """What a loss counts; comparisons of before it was recorded have nats."""
    return str(ranking.get("unit") or "nats")


def memory(ranking: Row) -> str:
    """What the price in memory is: of the accelerator, where one computed."""
    return "Peak memory on the device" if ranking.get("memory") == "peak_device_bytes" else "Peak memory"


def number(ranking: Row, value: float, sign: str = "") -> str:
    """A score, or with a sign a difference of scores."""
    return f"{value:{sign}.1%}" if ranking["metric"] == "accuracy" else f"{value:{sign}.4f}"


def prices(ranking: Row, hues: Hues) -> list[Plot]:
    """The score against each price, with a line through those that no other one beats in both."""
    left = far(ranking["places"])
    said = memory(ranking)
    found = [_price(ranking, hues, left, cost, title.format(memory=said), unit) for cost, title, unit in PRICES]
    return [plot for plot in found if plot is not None]


def _price(ranking: Row, hues: Hues, left: Sequence[str], cost: str, title: str, unit: int) -> Plot | None:
    shown = [
        place
        for place in ranking["places"]
        if place["kind"] != BASE and place["name"] not in left and place["cost"][cost] is not None
    ]
    at = {place["name"]: (place["cost"][cost] / unit, place["score"]) for place in shown}
    if len({x for x, _ in at.values()}) < 2:
        return None
    figure = blank(SMALL + 40)
    worth = [name for name in ranking["fronts"][cost] if name in at]
    figure.add_scatter(
        x=[at[name][0] for name in worth],
        y=[at[name][1] for name in worth],
        name="worth the price",
        meta="faint",
        mode="lines",
        line={"color": LIGHT.faint, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    for place in shown:
        x, y = at[place["name"]]
        figure.add_scatter(
            x=[x], y=[y], mode="markers", **hues.style(place["name"]), cliponaxis=False,
            hovertemplate=f"{escape(place['name'])}<br>%{{x:,.4~g}}<br>%{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(**price([x for x, _ in at.values()]), showgrid=True)
    figure.update_yaxes(
        range=padded([y for _, y in at.values()], 0.12), tickformat=".1%" if ranking["metric"] == "accuracy" else "~g"
    )
    spoken = f"Worth their price, the cheapest first: {', '.join(worth)}."
    return Plot(f"price-{cost}", title, spoken, (spoken, *_off(ranking, [n for n in left if n != BASE])), figure)


def rates(candidates: Sequence[Row], hues: Hues, left: Sequence[str] = ()) -> Plot | None:
    """The loss on the validation part for each learning rate that was tried; `left` may lie above what is drawn."""
    searched = [(each, sorted(each["search"], key=lambda one: float(one["rate"]))) for each in candidates]
    lines = {
        each["name"]: [[(one["rate"], one["validation"]) for one in search if one["validation"] is not None]]
        for each, search in searched
    }
    drawn = _course(lines, hues, "rate %{x:.3~g}", left, best=min)
    if drawn is None:
        return None
    figure, notes = drawn
    tried = [one["rate"] for _, search in searched for one in search]
    figure.update_xaxes(**logarithmic(tried), title={"text": "learning rate", "standoff": 6}, title_font_size=12)
    lost = [f"{each['name']} at {short(one['rate'])}" for each, search in searched for one in search if one["failed"]]
    if lost:
        notes.append(f"Failed: {some(lost, 8)}.")
    chosen = [f"{each['name']} {short(each['rate'])}" for each in candidates if each["rate"] is not None]
    return Plot("rates", "Learning rates", f"Chosen: {', '.join(chosen)}.", tuple(notes), figure)


def curves(candidates: Sequence[Row], hues: Hues, left: Sequence[str] = ()) -> Plot | None:
    """The held-out loss in training, a line for each seed; `left` may lie above what is drawn."""
    lines = {
        each["name"]: [[(step, loss) for step, loss in one["curve"] if loss is not None] for one in each["seeds"]]
        for each in candidates
        if each["kind"] != BASE
    }
    drawn = _course(lines, hues, "step %{x:,d}", left, best=lambda losses: losses[-1])
    if drawn is None:
        return None
    figure, notes = drawn
    figure.update_xaxes(title={"text": "step", "standoff": 6}, title_font_size=12, tickformat=",d", showgrid=False)
    ends = [curve[-1][1] for found in lines.values() for curve in found if curve]
    spoken = f"Held-out losses end between {text.loss(min(ends))} and {text.loss(max(ends))}."
    return Plot("curves", "Held-out loss in training", spoken, ("A line for each seed.", *notes), figure)


def _course(
    lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    hues: Hues,
    where: str,
    left: Sequence[str],
    best: Callable[[Sequence[float]], float],
) -> tuple[Figure, list[str]] | None:
    """Losses over something, of each candidate as lines of one colour, and notes; None without any.

    The figure reaches up to where the `best` of each line can be told apart.
    """
    known = {name: [line for line in found if line] for name, found in lines.items() if any(found)}
    values = [loss for found in known.values() for line in found for _, loss in line]
    if not values:
        return None
    figure = blank(TALL)
    for name, found in known.items():
        style = hues.style(name)
        thin = len(found) > 1
        figure.add_scatter(
            x=[x for line in found for x in (*(x for x, _ in line), None)],
            y=[y for line in found for y in (*(y for _, y in line), None)],
            mode="lines+markers",
            opacity=0.75 if thin else 1,
            hovertemplate=f"{escape(name)}, {where}: %{{y:.4f}}<extra></extra>",
            **{
                **style,
                "marker": {**style["marker"], "size": 6 if thin else 8},
                "line": {**style["line"], "width": 1.5 if thin else 1.8},
            },
        )
    near = {name: found for name, found in known.items() if name not in left} or known
    within, above = upto([best([y for _, y in line]) for found in near.values() for line in found], values)
    figure.update_layout(hovermode="closest")
    title = {"text": "loss", "standoff": 6, "font": {"size": 12}}
    figure.update_yaxes(**({} if within is None else {"range": within}), tickformat="~g", title=title)
    if not above:
        return figure, []
    return figure, [f"{above:,} of {len(values):,} points lie above what is drawn, up to {text.loss(max(values))}."]
