"""The import layers: a module imports only from lower layers, and `import minidiff` costs no more than torch."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minidiff"
LAYERS = (
    ("schedule", "values", "device", "io", "data", "nets.config", "nets.layers"),
    ("prediction", "grid", "nets"),
    ("samplers", "multistep", "guidance", "exact", "likelihood", "text"),
    ("sd", "editing"),
    ("measure", "train"),
    ("teach", "generate", "commands", "cli"),
    ("__main__",),
)
LAYER = {f"minidiff.{name}": number for number, names in enumerate(LAYERS) for name in names}
SLOW = {"transformers", "diffusers", "matplotlib", "PIL", "tokenizers", "scipy", "accelerate", "pandas", "IPython"}


def modules() -> dict[str, Path]:
    """{dotted name: file} of every module of the package but its lazy front door `minidiff/__init__.py`."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    names = {".".join(rel.parts).removesuffix(".__init__"): path for rel, path in files.items()}
    return {name: path for name, path in names.items() if name != "minidiff"}


def layer(name: str) -> int:
    """The layer of a module: its own entry, else that of the nearest package around it."""
    while name not in LAYER:
        assert "." in name, f"{name} has no layer"
        name = name.rpartition(".")[0]
    return LAYER[name]


def imports(source: str, name: str, package: bool, known: set[str]) -> set[str]:
    """The minidiff modules that the source of module `name` imports, inside functions and by string too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [alias.name for alias in node.names if (base, alias.name) != ("minidiff", "__version__")]
            found |= {f"{base}.{other}" if f"{base}.{other}" in known else base for other in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            assert isinstance(first, ast.Constant), f"{name} imports a module whose package is computed"
            found.add(first.value.rstrip("."))  # f"minidiff.teach.bank.{notebook}": the package it is in
    return {module for module in found if module.split(".")[0] == "minidiff"}


def graph() -> dict[str, set[str]]:
    files = modules()
    return {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", set(files)) - {name}
        for name, path in files.items()
    }


def broken(edges: dict[str, set[str]]) -> list[str]:
    """One line for each import that goes up, or through the front door."""
    return [
        f"{name} (layer {layer(name)}) imports {other}" + ("" if other == "minidiff" else f" (layer {layer(other)})")
        for name, others in edges.items()
        for other in sorted(others)
        if other == "minidiff" or layer(other) > layer(name)
    ]


def test_a_module_imports_only_its_own_layer_and_lower_ones():
    assert broken(graph()) == []


def test_imports_have_no_cycle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_the_reader_of_imports_sees_every_form():
    known = {"minidiff.grid", "minidiff.nets", "minidiff.nets.unet", "minidiff.sd.pipeline", "minidiff.data"}
    source = """
from .layers import Attention
from ..grid import Grid
from ..sd import pipeline
def late():
    import minidiff.data
    from minidiff.nets import unet
    importlib.import_module("minidiff.measure.evaluate")
import torch
"""
    assert imports(source, "minidiff.nets.vae", False, known) == {
        "minidiff.nets.layers", "minidiff.grid", "minidiff.sd.pipeline", "minidiff.data", "minidiff.nets.unet",
        "minidiff.measure.evaluate",
    }  # fmt: skip
    assert imports("from . import unet", "minidiff.nets", True, known) == {"minidiff.nets.unet"}


def test_an_import_upwards_is_found():
    assert broken({"minidiff.grid": {"minidiff.schedule", "minidiff.samplers"}}) == [
        "minidiff.grid (layer 1) imports minidiff.samplers (layer 2)"
    ]
    assert broken({"minidiff.cli": {"minidiff"}}) == ["minidiff.cli (layer 5) imports minidiff"]


def third_party(source: str) -> set[str]:
    """The top-level packages that a source imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_the_package_never_imports_the_libraries_it_replaces():
    replaced = {"transformers", "diffusers", "scipy", "torchvision", "einops"}
    found = {name: third_party(path.read_text(encoding="utf-8")) & replaced for name, path in modules().items()}
    assert {name: libraries for name, libraries in found.items() if libraries} == {
        "minidiff.measure.bench": {"diffusers"}}  # which it measures itself against, where it is installed
    assert third_party("def f():\n    from diffusers.models import UNet2DModel") & replaced == {"diffusers"}


def slow_imports(*names: str) -> list[str]:
    """Which of the slow libraries a fresh Python has loaded after importing these modules."""
    code = f"import sys, {', '.join(names)}; print(*({SLOW!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_import_minidiff_pulls_in_nothing_slower_than_torch():
    assert slow_imports("torch", "minidiff") == []


def test_the_mathematics_and_the_nets_import_nothing_slower_than_torch():
    names = ("schedule", "prediction", "grid", "samplers", "guidance", "nets.unet", "nets.vae", "nets.clip")
    assert slow_imports(*(f"minidiff.{name}" for name in names)) == []


def test_the_slow_libraries_are_seen_when_they_are_loaded():
    assert slow_imports("PIL.Image") == ["PIL"]


def test_every_module_has_a_test_file_of_its_name():
    """Recipes are tested as a family, notebooks' exercises by test_check and test_notebooks."""
    names = {path.stem for path in PACKAGE.rglob("*.py") if path.parent.name not in ("recipes", "bank")}
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert names - {"__init__", "__main__"} <= tested


def test_every_module_is_reachable_by_its_name_alone():
    import minidiff as md

    names = {path.stem for path in PACKAGE.rglob("*.py") if path.parent.name not in ("recipes", "bank")}
    for name in names - {"__init__", "__main__"}:
        assert getattr(md, name).__name__.endswith(f".{name}") and name in dir(md)
    with pytest.raises(AttributeError, match="module 'minidiff' has no attribute 'nothing'"):
        md.nothing
    with pytest.raises(AttributeError):
        md.__wrapped__
