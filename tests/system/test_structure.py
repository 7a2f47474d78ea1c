"""The tests themselves: what they share lies in tests/helpers, and fixtures in conftest files."""

import ast

from tests.helpers.paths import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
CLOSED = {path.stem for path in FILES if path.name.startswith("test_")} | {"conftest"}


def imports(path):
    """Modules that a file imports, wherever in it, and names that may be modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_closed(module):
    """Whether it is a test file or a conftest, imported by its path or by its bare name."""
    first, *rest = module.split(".")
    return first in CLOSED or first == "" or (first == "tests" and rest[:1] != ["helpers"])


def test_no_test_file_imports_another():
    found = [f"{path} imports {module}" for path in FILES for module in imports(path)]
    assert len(found) > 1000
    assert not [line for line in found if is_closed(line.split()[-1])]


def test_helpers_hold_no_tests():
    assert not list((TESTS / "helpers").rglob("test_*.py"))
