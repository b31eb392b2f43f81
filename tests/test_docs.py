"""What every public definition of the package says: what it is, what it raises, and of which types it is."""
import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).resolve().parent.parent / "minidiff"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "bank" not in path.parts)


def public(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.AST, bool]]:
    """(name, definition, whether it is a method) of all public functions, classes and their methods."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield owner + node.name, node, bool(owner)
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{node.name}.")


def wanting(source: str) -> list[str]:
    """One line for each definition that does not say what it should."""
    lines = []
    for name, node, method in public(ast.parse(source)):
        text = ast.get_docstring(node) or ""
        if not text:
            lines.append(f"{name} has no docstring")
        if isinstance(node, ast.ClassDef):
            continue
        if any(isinstance(each, ast.Raise) and each.exc for each in ast.walk(node)) and not (
                "Raises" in text or "Error" in text):
            lines.append(f"{name} raises, and does not say so")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs][method and not any(
            getattr(decorator, "id", "") == "staticmethod" for decorator in node.decorator_list):]
        if untyped := [each.arg for each in arguments if each.annotation is None]:
            lines.append(f"{name} has arguments without a type: {', '.join(untyped)}")
        if node.returns is None:
            lines.append(f"{name} does not say what it returns")
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_public_definition_says_what_it_is_what_it_raises_and_its_types(path):
    assert wanting(path.read_text(encoding="utf-8")) == []


def test_what_is_wanting_is_found():
    source = textwrap.dedent('''
        class Net:
            def forward(self, x: int, y):
                """Adds."""
                if y:
                    raise ValueError("no")
        def _private(): pass
    ''')
    assert wanting(source) == [
        "Net has no docstring", "Net.forward raises, and does not say so",
        "Net.forward has arguments without a type: y", "Net.forward does not say what it returns"]
