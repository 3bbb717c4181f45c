"""The page of `lorafit inspect`, from what its JSON says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorafit.report.document import render_document, write_document
from lorafit.report.inspection_page import document
from lorafit.report.palette import DARK, LIGHT

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def site(size: float, at: int = 0, **given: Any) -> dict[str, Any]:
    values = [size * 0.5**place for place in range(4)]
    norm = sum(value**2 for value in values) ** 0.5
    return {
        "out": 16, "in": 8 + at, "r": 4, "rank_in_use": 4 if size else 0, "norm": norm, "weight": 10.0,
        "relative": norm / 10, "start": None, "grown": None, "rescaled": False, "stable_rank": 1.3 if size else 0.0,
        "effective_rank": 2.9 if size else 0.0, "singular_values": values, "largest_row": 2.5 if size else None,
        "magnitude": 0.01 * size * (1 + at % 3), "direction": 0.002 * size * (1 + at % 5),
    } | given  # fmt: skip


def found(layers: int = 6, **given: Any) -> dict[str, Any]:
    paths = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    sites = {path: site(1.0 + at / 10, at) for at, path in enumerate(paths)}
    sites[paths[1]], sites[paths[5]] = site(0.0), site(100.0)
    findings = [
        {"path": paths[1], "kind": "dead", "detail": "ΔW is zero: nothing was learnt here"},
        {"path": paths[5], "kind": "far larger than its peers", "detail": "‖ΔW‖ is 115, 80 times the median"},
    ]
    return {
        "adapter": "runs/a", "method": "lora", "settings": {"r": 4}, "base": True, "findings": findings,
        "verdict": "it learnt: 17 of 18 sites changed; 1 out of line", "dead": [paths[1]], "dead_share": 1 / 18,
        "median_relative": 0.2, "sites": sites, "logits": {"effect": 5.5, "largest": 33.25}, "other": None,
    } | given  # fmt: skip


def without_base(**given: Any) -> dict[str, Any]:
    told = found(base=False, logits=None, median_relative=None, **given)
    for each in told["sites"].values():
        each.update(dict.fromkeys(("weight", "relative", "magnitude", "direction")))
    return told


def other(told: dict[str, Any]) -> dict[str, Any]:
    alike = {"outputs": 0.5, "inputs": 0.25, "cosine": -0.125,
             "output_cosines": [0.9, 0.7, 0.4, 0.1], "input_cosines": [0.8, 0.5, 0.3, 0.0]}  # fmt: skip
    sites: dict[str, Any] = dict.fromkeys(told["sites"], alike)
    sites[told["dead"][0]] = None
    mean = {"outputs": 0.5, "inputs": 0.25, "cosine": -0.125}
    return {"adapter": "runs/b", "method": "dora", "mean": mean, "sites": sites, "alone": [1, 2]}


def drawn(told: dict[str, Any]) -> str:
    return render_document(document(told, "runs/a"))


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page[page.index("<main>") : page.index("</main>")]))


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_what_was_found_is_on_the_page() -> None:
    page = drawn(found())
    assert headings(page) == [
        "Verdict", "What is out of line", "Where it learnt", "Sites", "Singular values of the changes",
        "Lengths and directions of the weights", "By kind of module",
    ]  # fmt: skip
    for told in (
        "It learnt something: 17 of 18 are changed, typically by 20.0 % of the size of a layer's weights.",
        "moves an output of the model by up to 5.5, of 33.2.",
        "Look first at model.layers.0.self_attn.v_proj: dead.",
        "It learnt: 17 of 18 sites changed; 1 out of line.",
        "Without change1 (5.6%)",
        "Not drawn: 1 that did not move.",
    ):
        assert told in words(page).replace("&#x27;", "'"), told
    assert page.count('<td class="site own"') == 2 and page.count('<td class="site') == 18
    assert 'title="model.layers.0.self_attn.v_proj: ‖ΔW‖ 0, 0 % of ‖W‖, effective rank 0.0"' in page


def test_without_the_base_nothing_is_said_of_it() -> None:
    page = drawn(without_base())
    assert "of ‖W‖" not in words(page) and "ΔM" not in words(page)
    assert "Only its own files were read" in words(page) and "in percent of the largest" in words(page)


def test_a_start_is_told_where_there_is_one() -> None:
    told = found()
    assert "of its start" not in drawn(told)
    for each in told["sites"].values():
        each.update(start=2.0, grown=each["norm"] / 2)
    assert "of its start" in drawn(told)


def test_ranks_are_mapped_where_they_differ() -> None:
    told = without_base(method="adalora")
    assert "Ranks of the sites" not in headings(drawn(told)), "one rank, and none at the dead site"
    told["sites"]["model.layers.2.mlp.up_proj"]["rank_in_use"] = 2
    page = drawn(told)
    assert "Ranks of the sites" in headings(page)
    assert "66 ranks in use at 18 sites, 3.67 on average." in words(page)


def test_an_adapter_that_learnt_nothing() -> None:
    told = found()
    told["sites"] = {path: site(0.0) for path in told["sites"]}
    nothing = [{"path": "", "kind": "nothing learnt", "detail": "the change is zero at every site"}]
    page = drawn(told | {"dead": list(told["sites"]), "dead_share": 1.0, "findings": nothing})
    assert "It learnt nothing: no layer is changed at all." in words(page)
    assert "the adapternothing learnt" in words(page)
    assert "Singular values of the changes" not in headings(page) and "data-figure" not in page.partition("</main>")[0]


def test_two_adapters() -> None:
    told = found()
    page = drawn(told | {"other": other(told)})
    assert headings(page)[-2:] == ["Beside runs/b", "Principal angles"]
    assert "Over 17 sites, 50.0 % of the directions that they write and 25.0 % of those that they read" in words(page)
    assert "1 sites are in the first alone, 2 in the second alone." in words(page)
    nothing = other(told) | {"mean": None, "sites": dict.fromkeys(told["sites"])}
    assert "no site at which both change something" in words(drawn(told | {"other": nothing}))


def test_hostile_names_stay_names() -> None:
    told = found()
    attack = "</script><img src=x onerror=alert(1)>.0.${x}"
    told["sites"][attack] = site(3.0)
    told["findings"][0]["path"] = attack
    page = render_document(document(told | {"other": other(told), "method": attack}, attack))
    assert "<img" not in page.partition("</main>")[0] and attack not in page


def test_a_single_site() -> None:
    path = "0"
    page = drawn(found() | {"sites": {path: site(1.0)}, "dead": [], "dead_share": 0.0, "findings": []})
    assert "can change 1 site, each a layer" in words(page) and "No site is out of line." in words(page)
    assert "before the rows" not in words(page)
    known = {"dead": [], "dead_share": 0.0, "findings": [], "median_relative": 0.1}
    page = drawn(found() | known | {"sites": {path: site(1.0, rescaled=True)}})
    assert "weights before the rows of the weights get their lengths" in words(page)


# In a browser


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_in_a_browser(open_page: Any, tmp_path: Path, width: int, scheme: str) -> None:
    told = found(layers=20, method="lora " * 30)
    page = write_document(document(told | {"other": other(told)}, "runs/a" * 30), tmp_path / "page.html")
    opened = open_page(page, width=width, scheme=scheme)
    assert opened.run("const page = document.documentElement; return page.scrollWidth - page.clientWidth") == 0
    assert opened.run("return document.querySelectorAll('.scatterlayer .trace').length") == 8 + 3 + 2
    # The head of the long table stays in sight.
    frame = "const frame = document.querySelector('.long'); "
    opened.run(frame + "frame.scrollTop = 200")
    opened.run(frame + "frame.querySelectorAll('th button')[2].click()")
    shown = frame + "return [frame.clientHeight < frame.scrollHeight, [...frame.querySelectorAll('tbody tr')].map("
    scrolls, norms = opened.run(shown + "(row) => Number(row.cells[2].dataset.key))]")
    assert scrolls and norms == sorted(norms) and len(norms) == 60
    above = "return frame.querySelector('th').getBoundingClientRect().top - frame.getBoundingClientRect().top"
    assert opened.run(frame + above) == pytest.approx(0, abs=1)
    paper = (LIGHT if scheme == "light" else DARK).paper
    rgb = f"rgb({', '.join(str(int(paper[at : at + 2], 16)) for at in (1, 3, 5))})"
    assert opened.run("return getComputedStyle(document.body).backgroundColor") == rgb
    assert [address for address in opened.requests() if not address.startswith(("file:", "data:", "blob:"))] == []
    assert opened.complaints() == []
