"""The rules of the code's structure, held by its syntax trees: who imports whom, and what nobody does."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import lorafit as lf
from lorafit.method import Method

SOURCE = Path(lf.__file__).parent
TIERS = (
    ("errors",),
    ("files", "delta", "memo", "fastfood", "compress", "patterns", "finite", "rest", "sharded", "casting"),
    ("kernels.scratch", "kernels.precision", "kernels.frozen", "kernels.geometry", "targets", "rownorm", "spectrum"),
    ("kernels.masks", "kernels.products", "kernels.pointwise", "kernels.vectors"),
    ("kernels.parts",),
    ("kernels.linear", "kernels.convolution", "kernels.lookup", "kernels.dense"),
    ("kernels.siblings",),
    ("kernels",),
    ("layers.site", "layers.fused"),
    ("layers.mixing",),
    ("quant.rows", "quant.linear", "quant.reading"),
    ("quant.modules",),
    ("layers.vector", "layers.lookup", "layers.convolution", "layers.hollow", "layers.following"),
    ("layers.own", "layers.transposed"),
    ("layers.packed",),
    ("layers.foreign",),
    ("layers",),
    ("mixed.assignment", "mixed.changes"),
    ("mixed.tables",),
    ("mixed.bucket",),
    ("mixed.slots",),
    ("mixed",),
    ("method",),
    ("anatomy", "summary"),
    ("methods.validate", "methods.directions", "methods.fewest", "methods.subspace"),
    ("methods.evidence",),
    ("methods.initialisers",),
    ("methods.lora",),
    ("methods.adalora_budget", "methods.adalora_triplets"),
    ("methods.adalora_schedule",),
    ("methods.adalora", "methods.lora_fa", "methods.vera", "methods.delta_lora", "methods.intrinsic"),
    ("methods.dora",),
    ("methods.lora_drop",),
    ("methods.lora_plus",),
    ("methods",),
    ("methods.table",),
    ("together",),
    ("adapted",),
    ("shared", "ledger", "hooks", "activation", "rows"),
    ("plan", "merging", "peft_layout"),
    ("quant.selecting",),
    ("quant.convert",),
    ("quant.loading", "quant"),
    ("peft_config",),
    ("layouts.base",),
    ("layouts.lora", "layouts.vera", "layouts.own"),
    ("layouts.adalora", "layouts.ours", "layouts.pairs"),
    ("layouts",),
    ("card",),
    ("store",),
    ("handle", "bare"),
    ("inject", "importance", "inspection", "distributed", "calls"),
    ("fitting", "state", "suggestion"),
    ("checkpoint", "combining", "looking"),
    ("conversion", "suggesting"),
    ("resizing",),
    ("report",),
    ("exporting",),
    ("training",),
    ("journal", "diffusion"),
    ("serve",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)
"""Imports point down only: a module imports from the rows above its own."""
RANK = {name: rank for rank, row in enumerate(TIERS) for name in row}
OUTSIDE = ("report", "exporting", "training", "journal", "diffusion", "serve", "experiments", "cli", "__main__")
"""What is not the core: the core needs torch, safetensors and Python alone."""


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
CORE = [name for name in FILES if name and name.partition(".")[0] not in OUTSIDE]


def tier(name: str) -> int:
    """The row of a module; what is deeper in a package has the package's."""
    while name not in RANK:
        name = name.rpartition(".")[0]
        assert name, "a module without a place in TIERS: give it one"
    return RANK[name]


def imports(name: str) -> Iterator[str]:
    """Every module that a module imports, also inside functions, as an absolute name."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                known = module == "lorafit" or inner.removeprefix("lorafit.") in FILES
                yield inner if known and module.startswith("lorafit") else module


def found(kind: type[ast.AST], names: list[str]) -> Iterator[tuple[str, ast.AST]]:
    for name in names:
        yield from ((name, node) for node in ast.walk(TREES[name]) if isinstance(node, kind))


def at(name: str, node: ast.AST) -> str:
    return f"{FILES[name].name}:{node.lineno}"


def test_there_is_something_to_look_at():
    assert len(FILES) > 30 and {"errors", "methods.lora", "handle"} <= set(CORE)


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_point_down(name):
    package = name.partition(".")[0]
    for target in imports(name):
        if not target.startswith("lorafit."):
            continue
        other = target.removeprefix("lorafit.")
        other = other if other in FILES else other.rpartition(".")[0] or other
        if other not in FILES:
            assert package in OUTSIDE, f"{name} imports {target}: the core imports modules, not the package's names"
            continue
        inside = package in OUTSIDE and other.partition(".")[0] == package
        assert inside or tier(other) < tier(name), f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_torch_and_safetensors_alone(name):
    allowed = {"lorafit", "torch", "safetensors"} | sys.stdlib_module_names
    assert {target.partition(".")[0] for target in imports(name)} <= allowed


@pytest.mark.parametrize("name", [name for name in FILES if name.partition(".")[0] == "report"])
def test_the_report_needs_errors_and_plotly_alone(name):
    for target in imports(name):
        if target.startswith("lorafit"):
            assert target.startswith(("lorafit.report", "lorafit.errors")), target
        else:
            assert target.partition(".")[0] in {"plotly"} | sys.stdlib_module_names, target


def test_importing_the_package_imports_neither_torch_nor_an_extra():
    heavy = ("torch", "safetensors", "numpy", "transformers", "datasets", "plotly", "typer", "pydantic")
    code = f"import sys, lorafit, lorafit.errors; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_the_command_line_starts_without_torch():
    code = "import sys, lorafit.cli.main; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_public_names():
    def key(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert lf.__all__ == sorted(lf.__all__, key=key)
    errors = {
        name
        for name, kind in vars(importlib.import_module("lorafit.errors")).items()
        if inspect.isclass(kind) and kind.__module__ == "lorafit.errors"
    }
    lazy = set(vars(lf)["_LAZY"])
    assert set(lf.__all__) == lazy | errors
    for name in lf.__all__:
        assert eval(f"lf.{name}") is not None, name
    assert set(lf.__all__) <= set(dir(lf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lf.nothing  # noqa: B018
    # What a type checker is shown is what a program gets.
    shown = {
        alias.name
        for node in TREES[""].body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert shown == lazy


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_all_names_what_is_there(name):
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            module = importlib.import_module(f"lorafit.{name}")
            assert sorted(module.__all__) == sorted(set(module.__all__))
            assert all(attribute in dir(module) for attribute in module.__all__)


def test_nobody_asks_whether_an_attribute_is_there():
    calls = [
        at(name, node)
        for name, node in found(ast.Call, list(FILES))
        if isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) + len(node.keywords) > 2))
    ]
    assert calls == []


def test_the_core_reads_no_environment_and_no_pickle():
    forbidden = {"environ", "environb", "getenv", "putenv"}
    places = [at(name, node) for name, node in found(ast.Attribute, CORE) if node.attr in forbidden]
    places += [
        at(name, node)
        for name, node in found(ast.Attribute, CORE)
        if node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id in ("torch", "pickle", "numpy")
    ]
    assert places == []
    for name in CORE:
        assert not {"pickle", "dill", "shelve", "marshal"} & {target.partition(".")[0] for target in imports(name)}, (
            name
        )


def test_only_one_package_names_layer_types():
    layers = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)} - {
        "Module",
        "ModuleDict",
        "ModuleList",
    }
    places = {
        name
        for name, node in found(ast.Attribute, CORE)
        if node.attr in layers and isinstance(node.value, ast.Name) and node.value.id == "nn"
    }
    assert places == {
        "layers",
        "layers.vector",
        "layers.lookup",
        "layers.convolution",
        "layers.foreign",
        "layers.hollow",
        "layers.own",
        "layers.transposed",
    }


def test_only_the_table_maps_strings_to_methods():
    names, elsewhere = set(lf.METHODS), [name for name in FILES if not name.startswith("methods")]

    def named(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Constant) and node.value in names

    places = [
        at(name, node)
        for name, node in found(ast.Compare, elsewhere)
        if any(named(part) for part in (node.left, *node.comparators))
    ]
    places += [at(name, node) for name, node in found(ast.Dict, elsewhere) if any(named(key) for key in node.keys)]
    places += [at(name, node) for name, node in found(ast.MatchValue, elsewhere) if named(node.value)]
    assert places == []


def test_no_class_keeps_mutable_state():
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = {"list", "dict", "set", "defaultdict", "Counter", "deque", "WeakSet", "WeakKeyDictionary"}
    places = []
    for name, node in found(ast.ClassDef, list(FILES)):
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
            made = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in makers
            if isinstance(value, mutable) or made:
                places.append(at(name, statement))
    places += [at(name, node) for name, node in found(ast.Global, list(FILES))]
    assert places == []


def test_classes_are_abstract_or_final():
    for name in CORE:
        module = importlib.import_module(f"lorafit.{name}")
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != module.__name__ or issubclass(kind, Exception):
                continue
            for base in kind.__bases__:
                own = base.__module__.startswith("lorafit")
                assert not own or inspect.isabstract(base), (
                    f"{kind.__name__} extends {base.__name__}, which is concrete"
                )
            assert sum(base.__module__.startswith("lorafit") for base in kind.__bases__) <= 1, kind


def test_a_method_is_a_file():
    for method in lf.METHODS.values():
        assert method.__module__.startswith("lorafit.methods.") and issubclass(method, Method)
        page = importlib.import_module(method.__module__).__doc__ or ""
        for part in ("arXiv:", "Trained:", "Count:", "Init:", "Schedule:", "Deviations.", "| symbol"):
            assert part in page, f"{method.__name__}: its page says nothing of {part!r}"


@pytest.mark.parametrize("name", list(FILES))
def test_files_and_functions_are_short(name):
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 460, f"{lines} lines"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # The signature of a command is the declaration of its options: what counts is what it does.
            body = [part for part in node.body if ast.get_docstring(node) is None or part is not node.body[0]]
            size = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert size <= 60, f"{node.name}: {size} lines"
