"""Tests of the import rules in CONTRIBUTING.md: layers of packages, and modules that only certain files may import."""

import ast
import functools
from pathlib import Path

import pytest

from jaxlm.models import FAMILIES

ROOT = Path(__file__).parents[1]
LAYERS = [
    {
        "spec",
        "sharding",
        "devices",
        "host",
        "processes",
        "integrity",
        "config",
        "command_line",
        "json_files",
        "stderr_relay",
        "extras",
    },
    {"nn"},
    {"models"},
    {"adapt", "data", "metrics"},
    {"objectives", "decoding", "interop", "checkpoint"},
    {"training"},
    {"tasks"},
    {"plan"},
    {"cli", "launch"},
    {"testing"},
    {"experiments", "benchmarks"},
]
"""Packages from the bottom to the top. A file imports from its own layer and from the layers below it."""
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for top in ("jaxlm", "experiments", "benchmarks") for path in (ROOT / top).rglob("*.py"))


def package(module: str) -> str | None:
    """The package in ``LAYERS`` of a dotted module name; None for a module of another project."""
    names = module.split(".")
    if names[0] in ("experiments", "benchmarks"):
        return names[0]
    return names[1] if names[0] == "jaxlm" and len(names) > 1 else None


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """The nodes of the syntax tree of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> list[tuple[str, int]]:
    """The packages of this project that a file imports, each with the line number."""
    modules_found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            modules_found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "jaxlm" else [node.module]
            )
            modules_found += [(module, node.lineno) for module in modules]
    return [(name, line) for module, line in modules_found if (name := package(module)) is not None]


def name_of(path: Path) -> str | None:
    return package(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_every_package_has_a_layer():
    found = {name for path in FILES if (name := name_of(path)) not in (None, "__init__", "__main__")}
    assert found == set(LEVEL)


def test_packages_import_only_from_their_own_and_lower_layers():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        if (importing_package := name_of(path)) in LEVEL
        for name, line in imports(path)
        if name in LEVEL and LEVEL[name] > LEVEL[importing_package]
    ]
    assert wrong == []


def test_no_family_imports_another():
    families = set(FAMILIES)
    wrong = []
    for family in families - {"roberta"}:  # RoBERTa extends BERT with different positions and heads
        for node in nodes(ROOT / f"jaxlm/models/{family}.py"):
            if isinstance(node, ast.ImportFrom) and node.module == "jaxlm.models":
                wrong += [f"{family} imports {alias.name}" for alias in node.names if alias.name in families]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                name = node.module.removeprefix("jaxlm.models.")
                wrong += [f"{family} imports {name}"] if name in families else []
    assert wrong == []


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(
    ("module", "allowed"),
    [("orbax", {"jaxlm/checkpoint.py"}), ("jax.experimental.shard_map", set())],
)
def test_only_allowed_files_import_a_module(module, allowed):
    found = set()
    for path in FILES:
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module]
            if any(name == module or name.startswith(f"{module}.") for name in names):
                found.add(str(path.relative_to(ROOT)))
    assert {path for path in found if path.startswith("jaxlm/")} == allowed


def test_only_the_choices_ask_for_the_platform():
    """Which implementation runs on which platform is decided in one module."""
    found = set()
    for path in FILES:
        for node in nodes(path):
            function = node.func if isinstance(node, ast.Call) else None
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
            if name == "platform":
                found.add(str(path.relative_to(ROOT)))
    assert {path for path in found if path.startswith(("jaxlm/nn/", "jaxlm/models/"))} == {"jaxlm/nn/choices.py"}


def test_custom_gradients_run_in_shard_map():
    """Only ``jaxlm.nn.custom_gradient`` uses ``jax.custom_vjp``, whose rules would fail in ``jax.shard_map``."""
    used = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.custom_vjp"
    }
    assert used == {"jaxlm/nn/custom_gradient.py"}


def test_no_module_imports_private_names():
    """A module uses only the public names of another module."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {alias.name}"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("jaxlm")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert wrong == []


def test_a_family_fits_on_two_screens():
    """So that the code of a model is readable. Long docstrings belong on the page of the family."""
    lines = {family: len((ROOT / f"jaxlm/models/{family}.py").read_text().splitlines()) for family in FAMILIES}
    assert lines["gpt"] <= 220
    assert {family: count for family, count in lines.items() if count > 350} == {}


def test_functions_have_at_most_ten_parameters():
    """A function with more parameters needs an object for some of them."""
    found = []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                names = [x.arg for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 10:
                    found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert found == []


def meshes(source: str) -> list[int]:
    """The numbers of the lines that make a mesh without ``sharding.make_mesh``, or import ``make_mesh`` from jax."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            lines += [node.lineno for alias in node.names if alias.name in ("make_mesh", "create_device_mesh")]
        if isinstance(node, ast.Call):
            names = ast.unparse(node.func).split(".")
            made_by_jax = names[-1] == "make_mesh" and "jax" in names
            if made_by_jax or names[-1] in ("Mesh", "AbstractMesh", "create_device_mesh"):
                lines.append(node.lineno)
    return lines


def test_meshes_are_made_only_with_make_mesh():
    found = {str(path.relative_to(ROOT)) for path in FILES if meshes(path.read_text(encoding="utf-8"))}
    assert found == {"jaxlm/sharding.py"}  # the definition of make_mesh


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("mesh = jax.make_mesh((8,), ('data',))", True),
        ("mesh = jax.sharding.Mesh(devices, ('data',))", True),
        ("mesh = Mesh(devices, ('data',))", True),
        ("from jax import make_mesh", True),
        ("devices = mesh_utils.create_device_mesh((8,))", True),
        ("mesh = sharding.make_mesh('data=8')", False),
        ("from jaxlm.sharding import make_mesh; mesh = make_mesh('data=8')", False),
        ("def count(mesh: jax.sharding.Mesh): return isinstance(mesh, jax.sharding.AbstractMesh)", False),
    ],
)
def test_the_rule_on_meshes_allows_annotations_but_no_other_constructor(line, is_wrong):
    assert bool(meshes(line)) == is_wrong
