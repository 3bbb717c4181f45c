"""What the documentation lists is what the code has: names, settings, defaults, commands, events, tests."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import lorafit as lf
from lorafit import errors, layouts, peft_layout
from lorafit.cli import exits
from lorafit.cli.app import command
from lorafit.cli.demo import FOLDER, SETTINGS
from lorafit.cli.methods import default_shapes
from lorafit.diffusion import settings as diffusion
from lorafit.methods.initialisers import INITIALISERS
from lorafit.methods.table import markdown
from lorafit.report import pictures, records, watched
from lorafit.training import data, folder, owned
from lorafit.training.aliases import ALIASES
from lorafit.training.config import DEFAULT_TRAINING, RESERVED, Settings
from lorafit.training.formats import FORMATS
from lorafit.training.forms import SHAPES
from lorafit.training.record import environment

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL = (ROOT / "docs" / "all-of-it.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
DREAMBOOTH = (ROOT / "docs" / "dreambooth.md").read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def rows(text: str, *header: str) -> dict[str, list[str]]:
    """First cell → further cells, of the one table whose header begins with these cells."""
    tables = re.findall(r"(?:^\|.*\|\n)+", f"{prose(text)}\n", flags=re.MULTILINE)
    split = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in tables]
    fits = [table for table in split if [cell.strip() for cell in table[0]][: len(header)] == list(header)]
    assert len(fits) == 1, f"{len(fits)} tables with the header {header}"
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in fits[0][2:]}


def quoted(text: str) -> set[str]:
    """Every identifier that the text has between back-quotes, also inside of a longer quotation."""
    return {name for quote in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"[\w.-]+", quote)}


def shown(value: object) -> str:
    """A default as the tables write it."""
    if value is None:
        return "none"
    return '`""`' if value == "" else f"`{value}`"


def options() -> Iterator[str]:
    for one in command().commands.values():
        for parameter in one.params:
            yield from (*parameter.opts, *parameter.secondary_opts)


# Python -----------------------------------------------------------------------


def test_every_public_name_is_explained() -> None:
    pages = ALL + METHODS
    assert set(lf.__all__) <= quoted(prose(pages)) | set(re.findall(r"\blf\.(\w+)", pages))


def test_every_member_of_the_handle_is_in_the_table() -> None:
    public = {name for name in vars(lf.Handle) if not name.startswith("_")}
    held = set(inspect.signature(lf.Handle).parameters) - {"planned"} | {"schedule"}
    assert public | held == {
        name.partition("(")[0] for cell in rows(ALL, "member of `Handle`") for name in _names(cell)
    }


def _names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("method", lf.METHODS.values(), ids=lambda method: method.name)
def test_the_fields_of_a_method_and_their_defaults(method: type[Any]) -> None:
    table = rows(METHODS, f"field of `{method.__name__}`", "default")
    fields = {f"`{field.name}`": shown(_default(field)) for field in dataclasses.fields(method)}
    if method in (lf.LoRAPlus, lf.LoRAFA):  # the page says that these have LoRA's, and shows the others
        own = {f"`{field.name}`": shown(field.default) for field in dataclasses.fields(lf.LoRA)}
        assert own.items() <= fields.items()
        fields = {name: default for name, default in fields.items() if name not in own}
    assert {name: cells[0] for name, cells in table.items()} == fields


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is lf.LoRA
    return "LoRA()"


@pytest.mark.parametrize("page", [README, METHODS], ids=["README", "methods"])
def test_the_table_of_methods_is_what_the_command_prints(page: str) -> None:
    table = markdown(default_shapes())
    assert f"<!-- methods -->\n\n{table}\n\n<!-- end of methods -->" in page, "run: python scripts/tables.py"


def test_every_initialiser_is_explained() -> None:
    assert list(rows(METHODS, "name", "A and B")) == [f"`{name}`" for name in INITIALISERS]


def test_errors_and_what_else_they_are() -> None:
    table = rows(ALL, "class", "when", "also a")
    children = {kind for kind in vars(errors).values() if inspect.isclass(kind) and lf.LorafitError in kind.__bases__}
    assert set(table) == {f"`{kind.__name__}`" for kind in children}
    for kind in children:
        also = [f"`{base.__name__}`" for base in kind.__bases__ if base is not lf.LorafitError]
        assert table[f"`{kind.__name__}`"][1] == "".join(also)


def test_the_layout_names_every_key() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(layouts.__file__).parent.glob("*.py")))
    keys = set(
        re.findall(r'"((?:lora|vera)_(?:[ABE](?:\.weight)?|embedding_[AB]|lambda_[bd]|magnitude_vector))"', source)
    )
    assert len(keys) > 8
    assert {f"P.{key}" for key in keys - {"vera_A", "vera_B"}} <= quoted(ALL)
    assert f"`{peft_layout.PREFIX}`" in ALL


# Runs -------------------------------------------------------------------------


def test_settings_and_their_defaults() -> None:
    table = rows(ALL, "setting", "default")
    expected = {
        f"`{name}`": shown(field.get_default(call_default_factory=True))
        for name, field in Settings.model_fields.items()
    }
    assert {name: cells[0] for name, cells in table.items()} == expected


def test_settings_of_dreambooth_and_their_defaults() -> None:
    table = rows(DREAMBOOTH, "setting", "default")
    expected = {
        f"`{name}`": "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        for name, field in diffusion.Settings.model_fields.items()
    }
    assert {name: cells[0] for name, cells in table.items()} == expected


def test_spellings() -> None:
    table = rows(ALL, "here", "also written")
    listed = {spelling: name.strip("`") for name, cells in table.items() for spelling in _names(cells[0])}
    assert listed == dict(ALIASES)


def test_arguments_of_the_trainer() -> None:
    table = rows(ALL, "argument of the trainer", "here")
    listed = {name.strip("`"): cells[0] for name, cells in table.items()}
    assert listed.pop("learning_rate") == "from the model's width"
    assert listed == {name: shown(value) for name, value in DEFAULT_TRAINING.items()}
    assert {f"`{name}`" for name in RESERVED} <= set(re.findall(r"`\w+`", ALL))


def test_forms_and_formats() -> None:
    table = rows(ALL, "form", "columns")
    forms = [shape.make({**shape.required}).name for kind in SHAPES for shape in kind[:1]]
    assert list(table) == forms
    for form, kind in zip(forms, SHAPES, strict=True):
        columns = {column for shape in kind for column in (*shape.required.values(), *shape.optional.values())}
        assert columns <= quoted(table[form][0]), form
    assert {suffix for known in FORMATS for suffix in known.suffixes} <= quoted(ALL)


def test_events_and_their_keys() -> None:
    table = rows(ALL, "event", "further keys")
    kinds = (
        *(records.Step, records.Evaluation, records.Sample, records.Saved),
        *(records.Drop, records.Schedule, records.Anatomy, records.Verdict, records.End),
        *(watched.Forgetting, watched.Slices, watched.Shift, pictures.Sheet),
    )
    others = {"`run`", "`config`", "`environment`", "`data`", "`held_out`", "`watched`"}
    assert set(table) == {*others, *(f"`{kind.event}`" for kind in kinds)}
    for kind in kinds:
        keys = {field.name for field in dataclasses.fields(kind)} - {"diverged"}
        assert keys <= quoted(table[f"`{kind.event}`"][0]), kind.event
    assert set(environment(torch.device("cpu"), torch.float32)) == quoted(table["`environment`"][0])
    assert set(_info_keys()) <= quoted(table["`data`"][0])


def _info_keys() -> Iterator[str]:
    """The keys that `data.py` puts into the `data` record, from its source: `info.update(key=…)`, `places(key, …)`."""
    for node in ast.walk(ast.parse(inspect.getsource(data))):
        match node:
            case ast.Call(func=ast.Attribute(attr="update", value=ast.Attribute(attr="info"))):
                yield from (keyword.arg for keyword in node.keywords if keyword.arg is not None)
            case ast.Call(func=ast.Attribute(attr="places"), args=[ast.Constant(value=str() as key), *_]):
                yield key


def test_files_of_a_run() -> None:
    named = {**vars(owned), **vars(folder)}
    constants = {value for name, value in named.items() if name.isupper() and isinstance(value, str)}
    assert len(constants) > 5
    assert constants <= quoted(prose(ALL)) | {name.strip("`/") for name in rows(ALL, "file", "what it is")}


# The command line -------------------------------------------------------------


def test_commands_in_the_readme() -> None:
    table = rows(README, "command", "does")
    assert [name.split()[1].strip("`") for name in table] == list(command().commands)
    for name in table:
        words = name.strip("`").split()
        declared = command().commands[words[1]].params
        arguments = [one.metavar for one in declared if one.param_type_name == "argument"]
        assert words[2:] == arguments, name


def test_what_the_readme_says_of_the_demo() -> None:
    said = " ".join(README.split())
    assert f"trains {SETTINGS['max_steps']} steps" in said
    assert f"{SETTINGS['eval_limit']} held-out questions" in said
    assert f"into `{FOLDER}`" in said


def test_commands_in_the_changelog() -> None:
    said = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert set(command().commands) <= quoted(said.replace("lorafit ", ""))


def test_exit_statuses() -> None:
    listed = {int(status.strip("`")) for status in rows(ALL, "exit status")}
    assert listed == {value for name, value in vars(exits).items() if name.isupper()}
    assert all(str(status) in README for status in listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("lorafit ")]
    quotes = [quote for quote in re.findall(r"`([^`\n]+)`", prose(text)) if quote.startswith(("lorafit ", "--"))]
    fields = [field.name for kind in (TrainingArguments, lf.LoRA) for field in dataclasses.fields(kind)]
    known = {
        *options(),
        "--help",
        "--version",
        *(f"--{name.replace('_', '-')}" for name in (*fields, *Settings.model_fields, *ALIASES)),
        *(f"--{name.replace('_', '-')}" for name in diffusion.Settings.model_fields),
    }
    for line in (*lines, *quotes):
        assert set(re.findall(r"(?<!\S)--[\w-]+", line)) <= known, line
        words = line.split()
        if words[0] == "lorafit" and len(words) > 1 and words[1] != "COMMAND" and not words[1].startswith("-"):
            assert words[1] in command().commands, line


# All pages --------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|tests|docs|examples|scripts)/[\w./-]+)(?:::\w+)?`", text):
        assert (ROOT / path).exists(), path
    for path, name in re.findall(r"`(tests/[\w./-]+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"
    everywhere = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in everywhere, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_not_too_long(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    plain = [line for line in prose(text).splitlines() if not line.startswith("|")]
    code = "\n".join(re.findall(r"^```(?:python|bash).*?^```$", text, flags=re.DOTALL | re.MULTILINE)).splitlines()
    assert not [line for line in (*plain, *code) if len(line) > 120]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_tables(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    for table in re.findall(r"(?:^\|.*\n)+", f"{text}\n", flags=re.MULTILINE):
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table.splitlines()[0]
