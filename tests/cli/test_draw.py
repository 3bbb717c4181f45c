"""`lorafit draw`: what it asks for, strengths and sums on a sheet, merged or not, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from lorafit.cli.draw_asked import ALONE, Asked, Sampler, ask
from lorafit.errors import CheckpointError, ConfigError
from tests.cli.conftest import call
from tests.cli.tiny_pipeline import SIDE

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers; the command shows this library's own
Run = Callable[..., Any]
Learnt = tuple[Path, Any]
ROUNDING = 2
"""Levels of 255 that a pixel may be off by where the same is computed in another order."""


def asking(*adapters: object, **options: Any) -> Asked:
    usual: dict[str, Any] = {
        "pipeline": "pipe",
        "dtype": "auto",
        "prompts": ["a disc"],
        "rows": "all",
        "scale": "1",
        "seeds": None,
        "sampler": Sampler(2, 7.5, "", None),
        "r": None,
        "merge": False,
        "output": Path("sheet.png"),
    }
    return ask(adapters=[str(each) for each in adapters], **{**usual, **options})


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of two runs, as far as can be seen without opening their adapters."""
    for name, prompt in (("cat", "a sks cat"), ("dog", "a sks dog")):
        (tmp_path / name / "adapter").mkdir(parents=True)
        settings = {"pipeline": "pipe", "instance_prompt": prompt}
        (tmp_path / name / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path / "cat", tmp_path / "dog"


# What is asked for


def test_rows_are_prompts_and_adapters_and_columns_are_seeds_and_strengths(runs: tuple[Path, Path]) -> None:
    cat, dog = runs
    asked = asking(f"{cat}=0.7", dog / "adapter", prompts=["one", "two"], scale="0,0.5,1", seeds="3,9")
    assert [row.said for row in asked.rows] == ["0.7 cat", "dog", "0.7 cat + dog"]
    assert asked.rows_said() == [
        "0.7 cat: one", "dog: one", "0.7 cat + dog: one", "0.7 cat: two", "dog: two", "0.7 cat + dog: two",
    ]  # fmt: skip
    assert asked.columns == [(3, 0.0), (3, 0.5), (3, 1.0), (9, 0.0), (9, 0.5), (9, 1.0)]
    assert asked.columns_said()[:2] == ["seed 3, 0", "seed 3, 0.5"] and asked.count == 36
    assert [row.said for row in asking(cat, dog, rows="each").rows] == ["cat", "dog"]
    assert [row.said for row in asking(cat, dog, rows="together").rows] == ["cat + dog"]


def test_usual_seeds_and_words() -> None:
    alone = asking()
    assert alone.rows == (ALONE,) and alone.seeds == (0, 1, 2, 3) and alone.rows_said() == ["a disc"]
    assert alone.columns_said() == ["seed 0", "seed 1", "seed 2", "seed 3"]
    assert asking(seeds="2").seeds == (0, 1) and asking(seeds="2,").seeds == (2,)


def test_one_seed_where_strengths_are_beside_each_other(runs: tuple[Path, Path]) -> None:
    asked = asking(runs[0], scale="0,1.25")
    assert asked.seeds == (0,) and asked.columns_said() == ["0", "1.25"] and asked.rows_said() == ["a disc"]


def test_the_run_says_its_pipeline_and_prompt(runs: tuple[Path, Path]) -> None:
    cat, dog = runs
    asked = asking(cat / "adapter", dog, pipeline=None, prompts=[])
    assert asked.pipeline == "pipe" and asked.prompts == ("a sks cat", "a sks dog")
    assert any("pipe" in line for line in asked.said) and any("a sks dog" in line for line in asked.said)
    assert asking(cat, pipeline="mine", prompts=["x"]).said == ()


def test_the_pipeline_of_a_run_is_found_from_any_folder_and_never_asked_of_the_hub(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cat, dog = runs
    pipe = tmp_path / "here" / "pipe"
    pipe.mkdir(parents=True)

    def run(folder: Path, **different: object) -> None:
        settings = {"pipeline": "pipe", "instance_prompt": "x", "pipeline_folder": str(pipe), **different}
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")

    run(cat)
    run(dog, pipeline="here/pipe")  # the same, from one folder above
    assert asking(cat, dog, pipeline=None).pipeline == str(pipe)
    pipe.rename(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"not where it was[\s\S]*--pipeline DIR"):
        asking(cat, pipeline=None)
    monkeypatch.chdir(tmp_path)
    assert asking(cat, pipeline=None).pipeline == str(tmp_path / "pipe"), "moved along with all"
    run(cat, pipeline="some/name", pipeline_folder=None)
    assert asking(cat, pipeline=None).pipeline == "some/name"
    for gone in ("./gone", "../gone", "/nowhere/gone", "deep/er/gone"):
        run(cat, pipeline=gone, pipeline_folder=None)
        with pytest.raises(ConfigError, match="not where it was"):
            asking(cat, pipeline=None)


def test_equal_names_are_told_apart_and_paths_may_have_an_equals_sign(tmp_path: Path) -> None:
    for name in ("a/cat", "b/cat", "b/r=4"):
        (tmp_path / name).mkdir(parents=True)
    asked = asking(tmp_path / "a/cat", tmp_path / "b/cat", f"{tmp_path}/b/r=4", f"{tmp_path}/b/r=4=2")
    assert [one.name for one in asked.rows[-1].subjects] == ["cat", "cat (2)", "r=4", "r=4 (2)"]
    assert [one.weight for one in asked.rows[-1].subjects] == [1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": "0,half"}, "--scale 0,0.5,1"),
        ({"scale": "1,1"}, "different numbers"),
        ({"scale": "inf"}, "--scale"),
        ({"scale": ""}, "--scale"),
        ({"seeds": "0"}, "--seeds"),
        ({"seeds": "-1,2"}, "--seeds"),
        ({"seeds": "1.5"}, "--seeds"),
        ({"seeds": "1,1"}, "different whole seeds"),
        ({"seeds": "many"}, "--seeds"),
        ({"seeds": ","}, "--seeds"),
        ({"seeds": "1000000000000"}, "from 1 to 1,000"),
        ({"seeds": "1e12"}, "from 1 to 1,000"),
        ({"seeds": f"{2**63},"}, "--seeds"),
        ({"sampler": Sampler(3, 1.0, "a cat", None)}, "--negative means nothing without a guidance above 1"),
        ({"rows": "eech"}, "nearest:  each"),
        ({"dtype": "float64"}, "float32"),
        ({"sampler": Sampler(3, 7.5, "", 20)}, "--size 16"),
        ({"output": Path("sheet.jpg")}, "--output sheet.png"),
        ({"output": Path("deep/sheet")}, "--output deep/sheet.png"),
        ({"output": Path()}, "--output sheet.png"),
        ({"output": Path("..")}, "--output ../sheet.png"),
        ({"output": Path("/")}, "--output /sheet.png"),
        ({"output": Path("nowhere/..")}, "--output nowhere/../sheet.png"),
        ({"prompts": [" "]}, "--prompt"),
        ({"pipeline": None}, "--pipeline"),
        ({"merge": True}, "--merge means nothing without an adapter"),
        ({"scale": "0.5"}, "--scale means nothing without an adapter"),
        ({"rows": "each"}, "--rows means nothing without a second adapter"),
        ({"r": 4}, "--r means nothing without a second adapter"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asking(**options)
    assert said in str(caught.value) and caught.value.fix


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": "each", "r": 4}, "--r means nothing without a row for the sum"),
        ({"scale": "0", "merge": True}, "--merge means nothing without a strength other than 0"),
        ({"scale": "0", "r": 4}, "--r means nothing without a strength other than 0"),
    ],
    ids=str,
)
def test_what_would_do_nothing_is_refused(runs: tuple[Path, Path], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asking(*runs, **options)
    assert said in str(caught.value) and caught.value.fix


def test_seeds_are_whole_numbers_to_the_last_digit() -> None:
    assert asking(seeds="9007199254740993,").seeds == (9007199254740993,)
    assert asking(seeds=f"0, {2**63 - 1}").seeds == (0, 2**63 - 1)


def test_what_is_wrong_with_adapters_is_said(runs: tuple[Path, Path], tmp_path: Path) -> None:
    cat, dog = runs
    with pytest.raises(ConfigError, match="nearest:  cat"):
        asking(tmp_path / "caat")
    for weight in ("0", "nan", "much"):
        with pytest.raises(ConfigError, match="that is not 0"):
            asking(f"{cat}={weight}")
    (dog / "settings.json").write_text(json.dumps({"pipeline": "other", "instance_prompt": "x"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="different pipelines"):
        asking(cat, dog, pipeline=None)
    (dog / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        asking(dog, pipeline=None)
    assert asking(dog).pipeline == "pipe", "what is not needed is not read"


# Pictures


def cells(path: Path, rows: int, columns: int) -> list[list[Any]]:
    """The pictures of a sheet that has words above rows and columns, as numbers."""
    from PIL import Image

    from lorafit.diffusion.drawing import GAP

    whole = numpy.asarray(Image.open(path).convert("RGB")).astype(int)
    # One line of words above the columns, and one above each row.
    line, left = divmod(whole.shape[0] - GAP - rows * (SIDE + GAP), rows + 1)
    assert left == 0 and whole.shape[1] >= GAP + columns * (SIDE + GAP), whole.shape  # wider for its words
    found = []
    for row in range(rows):
        top = line + GAP + row * (line + SIDE + GAP) + line
        found.append([whole[top : top + SIDE, x : x + SIDE] for x in _places(columns, GAP)])
    return found


def _places(columns: int, gap: int) -> Sequence[int]:
    return [gap + column * (SIDE + gap) for column in range(columns)]


def apart(one: Any, other: Any) -> int:
    """The largest difference of a pixel."""
    return int(abs(one - other).max())


@pytest.fixture
def draw(lorafit: Run, pipeline: Path) -> Run:
    def drawn(*arguments: object) -> Any:
        result = lorafit("draw", "--pipeline", pipeline, "--steps", "3", *arguments)
        assert result.status == 0, result.err
        return result

    return drawn


def test_the_pipeline_alone(draw: Run, tmp_path: Path) -> None:
    result = draw("--prompt", "a disc", "--prompt", "a cat", "--seeds", "3", "--output", "new/base.png", "--json")
    drawn = cells(tmp_path / "new" / "base.png", 2, 3)
    assert apart(drawn[0][0], drawn[0][1]) > ROUNDING, "seeds differ"
    assert result.json["columns"] == [{"seed": seed, "scale": 1.0} for seed in range(3)]
    assert [row["prompt"] for row in result.json["rows"]] == ["a disc", "a cat"]
    assert "6 pictures in " in result.err
    again = draw("--prompt", "a disc", "--prompt", "a cat", "--seeds", "3", "--output", "new/base.png")
    assert "was there, and is replaced" in again.out
    # A picture does not depend on the others of its sheet.
    draw("--prompt", "a cat", "--seeds", "2,", "--output", "one.png")
    assert apart(cells(tmp_path / "one.png", 1, 1)[0][0], drawn[1][2]) <= ROUNDING


def test_what_the_text_encoder_cuts_is_said(draw: Run) -> None:
    long, negative = "a disc " * 9, "no square " * 9
    once = ("--seeds", "1", "--prompt", "a disc")
    result = draw(*once, "--prompt", long, "--negative", negative, "--json")
    said = [line for line in result.err.splitlines() if "cut:" in line]
    assert len(said) == 2 and "a disc a disc" in said[0] and "no square no square" in said[1]
    assert "cut:" not in draw(*once).out


def test_strength_zero_is_the_pipeline_alone_and_merged_looks_the_same(
    draw: Run, learnt: Learnt, tmp_path: Path
) -> None:
    folder, _ = learnt
    draw("--prompt", "a sks disc", "--seeds", "1", "--output", "base.png")
    strengths = ("--adapter", folder, "--prompt", "a sks disc", "--scale", "0,0.5,1,1.25")
    draw(*strengths, "--output", "beside.png")
    draw(*strengths, "--merge", "--output", "merged.png")
    base = cells(tmp_path / "base.png", 1, 1)[0][0]
    beside, merged = (cells(tmp_path / name, 1, 4)[0] for name in ("beside.png", "merged.png"))
    assert apart(beside[0], base) == apart(merged[0], base) == 0, "bit for bit"
    assert all(apart(one, base) > ROUNDING for one in beside[1:]), "the adapter acts"
    assert apart(beside[1], beside[2]) > 0, "and less at half of its strength"
    assert [apart(one, other) <= ROUNDING for one, other in zip(beside, merged, strict=True)] == [True] * 4


def test_the_sum_of_halves_is_the_whole(draw: Run, learnt: Learnt, tmp_path: Path) -> None:
    folder, _ = learnt
    shutil.copytree(folder, tmp_path / "copy")
    prompt = ("--prompt", "a sks disc", "--seeds", "2")
    draw("--adapter", folder, *prompt, "--output", "whole.png")
    halves = ("--adapter", f"{folder}=0.5", "--adapter", f"{tmp_path / 'copy'}=0.5")
    result = draw(*halves, *prompt, "--output", "halves.png")
    assert "0.5 learnt + 0.5 copy at 1: 2 pictures" in result.out
    draw(*halves, *prompt, "--rows", "together", "--merge", "--output", "together.png")
    whole = cells(tmp_path / "whole.png", 1, 2)[0]
    each, _, together = cells(tmp_path / "halves.png", 3, 2)
    merged = cells(tmp_path / "together.png", 1, 2)[0]
    for place in range(2):
        assert apart(together[place], whole[place]) <= ROUNDING
        assert apart(merged[place], whole[place]) <= ROUNDING
        assert apart(each[place], whole[place]) > 0


def test_without_an_exact_sum_nothing_is_drawn_and_the_way_out_is_an_option(
    lorafit: Run, learning: list[str], learnt: Learnt, tmp_path: Path
) -> None:
    other = lorafit(*learning, "--method", "dora", "--max-steps", "1", "--sample-count", "0", "--output-dir", "other")
    assert other.status == 0, other.err
    both = ("draw", "--adapter", learnt[0], "--adapter", tmp_path / "other", "--seeds", "1", "--steps", "2")
    refused = lorafit(*both)
    assert refused.status == 1 and "--r 16" in refused.err and "adapter 'other'" in refused.err, refused.err
    assert "picture" not in refused.out and not (tmp_path / "sheet.png").exists()
    assert lorafit(*both, "--r", "8").status == 0 and (tmp_path / "sheet.png").is_file()


def test_the_line_that_a_run_ends_with_draws(lorafit: Run, learnt: Learnt, tmp_path: Path) -> None:
    folder, _ = learnt
    result = lorafit("draw", "--adapter", folder, "--scale", "0,0.5,1", "--steps", "2")
    assert result.status == 0, result.err
    assert "as the adapter's run had it" in result.out and (tmp_path / "sheet.png").is_file()
    cells(tmp_path / "sheet.png", 1, 3)


def test_a_run_with_a_relative_pipeline_is_drawn_from_any_folder(
    lorafit: Run, pipeline: Path, discs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pictures = ("--instance-images", discs, "--instance-prompt", "a sks disc", "--resolution", "16")
    short = ["--r", "2", "--max-steps", "1", "--sample-count", "0", "--evaluation-draws", "1"]
    command = ("dreambooth", "--pipeline", pipeline.name, *pictures, *short, "--output-dir", run)
    assert call(*command, folder=pipeline.parent).status == 0
    assert json.loads((run / "settings.json").read_text())["pipeline"] == pipeline.name
    result = lorafit("draw", "--adapter", run, "--seeds", "1", "--steps", "2")
    assert result.status == 0, result.err


def test_a_file_of_diffusers_is_drawn_with_and_a_wrong_one_is_named(draw: Run, lorafit: Run, learnt: Learnt) -> None:
    file = learnt[0] / "adapter" / "pytorch_lora_weights.safetensors"
    draw("--adapter", file, "--prompt", "a sks disc", "--seeds", "1")
    wrong = lorafit("draw", "--adapter", learnt[0] / "samples", "--pipeline", ".", "--prompt", "x")
    assert wrong.status == 1 and "model_index.json" in wrong.err
    nothing = lorafit("draw", "--adapter", learnt[0] / "samples", "--seeds", "1", "--steps", "1")
    assert nothing.status == 1 and "samples" in nothing.err


def test_wrong_words_are_wrong_usage(lorafit: Run) -> None:
    for arguments in (["--prompt", "x"], ["--pipeline", "p"], ["--pipeline", "p", "--prompt", "x", "--steps", "0"]):
        result = lorafit("draw", *arguments)
        assert result.status == 2, result.err
