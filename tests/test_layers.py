"""Imports point one way, heavy libraries are imported where they are used, files stay small."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_metaopt

ROOT = Path(lightning_metaopt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each may import what stands in the lines above its own, and the files of its own folder; a new file is one entry.
LEVELS = [
    {"tree"},
    {"metastep", "snapshot", "recording", "kernels"},
    {"replay"},
    {"task", "rule"},
    {"episode"},
    {"objectives"},
    {"rules", "metagrads", "tasks", "models"},
    {"analysis", "storage", "inplace", "guard", "checks", "ledger", "processes", "task_loader"},
    {"deployment", "held_out"},
    {"adaptation"},
    {"optimizer", "learner", "baselines", "online"},
    {"loop", "callbacks", "data", "modules", "differentiable"},
    {"study"},
    {"cli"},
    {"__init__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

WITH_LIGHTNING = {"learner", "loop", "callbacks", "optimizer", "data", "modules", "study", "cli", "baselines"}
ON_IMPORT = {"torch", "lightning", "torchmetrics", "safetensors", "lightning_metaopt", "yaml"}  # yaml comes with lightning

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def part_of(path: Path) -> str:
    """The file or folder right below the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules(node: ast.AST) -> list[str]:
    """Full names of what an import statement imports; ``[]`` for another statement."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, "relative imports hide where they point"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def imports(path: Path) -> list[str]:
    return [name for node in ast.walk(ast.parse(path.read_text())) for name in modules(node)]


def at_import(path: Path) -> list[str]:
    """What is imported with the file itself: not inside functions, not for type checkers."""

    def visit(nodes):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                yield from visit(node.orelse)
                continue
            yield from modules(node)
            yield from visit(ast.iter_child_nodes(node))

    return list(visit(ast.parse(path.read_text()).body))


@every_file
def test_imports_point_down(path):
    own = part_of(path)
    assert own in LEVEL, f"give {own} its place in LEVELS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "lightning_metaopt":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
        if target == "__init__" and own == "cli":
            continue  # the version
        assert target == own or LEVEL[target] < LEVEL[own], f"{own} may not import {target}"
        assert not parts[-1].startswith("_") or parts[-1].endswith("__"), f"{name} is private to its file"


@every_file
def test_only_the_upper_layers_know_lightning(path):
    known = {name.split(".")[0] for name in imports(path)}
    if part_of(path) not in WITH_LIGHTNING:
        assert not known & {"lightning", "pytorch_lightning", "torchmetrics", "datasets"}
    assert not known & {"torchvision"}


@every_file
def test_heavy_libraries_are_imported_where_they_are_used(path):
    beyond = {name.split(".")[0] for name in at_import(path)} - set(sys.stdlib_module_names) - ON_IMPORT
    assert not beyond, f"import {', '.join(beyond)} inside the functions that use it"


@every_file
def test_files_are_small_and_say_what_is_public(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    body = ast.parse(text).body
    if len(body) == 1:  # the docstring of a folder
        return
    public = [
        node
        for node in body
        if isinstance(node, ast.Assign) and [target.id for target in node.targets if isinstance(target, ast.Name)] == ["__all__"]
    ]
    assert len(public) == 1
    names = ast.literal_eval(public[0].value)
    assert len(set(names)) == len(names)


@every_file
def test_no_check_is_switched_off_wholesale(path):
    text = path.read_text()
    assert not re.search(r"#\s*(noqa|type: ignore(?!\[))", text)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    ours = loaded_by("import lightning_metaopt") - loaded_by("import lightning.pytorch, torchmetrics, safetensors.torch")
    heavy = {"cvxpy", "cvxpylayers", "diffcp", "higher", "datasets", "matplotlib", "rich", "jsonargparse", "mlxtend", "pandas"}
    assert "lightning_metaopt" in ours
    assert not ours & {*heavy, "scipy", "optuna", "sklearn", "pyarrow", "yaml", "hypothesis", "pytest"}


def test_every_public_name_is_there():
    for path in FILES:
        dotted = ".".join(("lightning_metaopt", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        module = __import__(dotted, fromlist=["__all__"])
        assert all(hasattr(module, name) for name in getattr(module, "__all__", [])), dotted
