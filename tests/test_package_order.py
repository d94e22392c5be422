"""The rules on imports in CONTRIBUTING.md: they go one way between packages, and few files import certain modules."""

import ast
from pathlib import Path

import pytest

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
    },
    {"nn"},
    {"models"},
    {"adapt", "data", "metrics"},
    {"objectives", "decoding", "interop", "checkpoint"},
    {"training"},
    {"tasks"},
    {"plan"},
    {"cli", "launch"},
    {"experiments", "benchmarks"},
]
"""Packages from the bottom to the top. A file imports from its own layer and from the layers below it."""
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for top in ("jaxlm", "experiments", "benchmarks") for path in (ROOT / top).rglob("*.py"))


def package(module: str) -> str | None:
    """The package of a dotted module name, as in ``LAYERS``; None for what is not ours."""
    names = module.split(".")
    if names[0] in ("experiments", "benchmarks"):
        return names[0]
    return names[1] if names[0] == "jaxlm" and len(names) > 1 else None


def imports(path: Path) -> list[tuple[str, int]]:
    """Our packages that a file imports anywhere, each with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "jaxlm" else [node.module]
            )
            found += [(module, node.lineno) for module in modules]
    return [(name, line) for module, line in found if (name := package(module)) is not None]


def name_of(path: Path) -> str | None:
    return package(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_every_package_has_a_layer():
    found = {name for path in FILES if (name := name_of(path)) not in (None, "__init__", "__main__")}
    assert found == set(LEVEL)


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        if (own := name_of(path)) in LEVEL
        for name, line in imports(path)
        if name in LEVEL and LEVEL[name] > LEVEL[own]
    ]
    assert wrong == []


def test_no_family_imports_another():
    shared = {"common", "heads", "model", "recurrent", "__init__"}
    families = {path.stem for path in (ROOT / "jaxlm/models").glob("*.py")} - shared
    assert "gpt" in families
    wrong = []
    for family in families - {"roberta"}:  # RoBERTa is BERT with other positions and heads
        tree = ast.parse((ROOT / f"jaxlm/models/{family}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "jaxlm.models":
                wrong += [f"{family} imports {alias.name}" for alias in node.names if alias.name in families]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                name = node.module.removeprefix("jaxlm.models.")
                wrong += [f"{family} imports {name}"] if name in families else []
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("orbax", {"jaxlm/checkpoint.py"}), ("jax.experimental.shard_map", set())],
)
def test_only_these_files_import(module, allowed):
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module]
            if any(name == module or name.startswith(f"{module}.") for name in names):
                found.add(str(path.relative_to(ROOT)))
    assert {path for path in found if path.startswith("jaxlm/")} == allowed
