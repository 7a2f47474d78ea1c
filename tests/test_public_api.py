"""The names that `import clipkit` offers, and their types."""

import ast
import inspect
import subprocess
import sys
from types import FunctionType

import pytest
import typer

import clipkit
from clipkit import errors
from clipkit.cli import app
from tests.helpers.paths import PACKAGE, ROOT

FUNCTIONS = {
    **{"index build": "build_index", "index add": "add_images", "index sync": "sync_index"},
    **{"index remove": "remove_items", "index compact": "compact_index"},
    **{"index merge": "merge_indexes", "index check": "check_index"},
    **{"index calibrate": "calibrate_index", "data check": "check_data"},
    **{"eval retrieval": "evaluate_retrieval", "eval zero-shot": "evaluate_zero_shot"},
    **{"eval suite": "evaluate_suite", "eval compare": "compare", "eval probe": "probe"},
    **{"init": "init_config", "config": "config_fields", "map": "draw_map", "plot": "plot_runs"},
}
"""The function of a command that has another name; the demo is for the command line only."""


def test_every_name_is_there_once():
    assert len(clipkit.__all__) == len(set(clipkit.__all__))
    assert dir(clipkit) == sorted(clipkit.__all__)
    for name in clipkit.__all__:
        assert getattr(clipkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = clipkit.no_such_name


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == clipkit._MODULES


def test_every_error_is_exported():
    raised = {name for name, one in vars(errors).items() if isinstance(one, type)}
    assert raised <= set(clipkit.__all__)
    for name in raised:
        assert name in errors.__doc__, f"{name} is missing in the tree of clipkit.errors"


def test_every_command_has_a_function():
    def walk(command, path=""):
        for name, one in getattr(command, "commands", {}).items():
            yield from walk(one, f"{path} {name}".strip())
        if not getattr(command, "commands", {}):
            yield path

    commands = set(walk(typer.main.get_command(app)))
    assert "index build" in commands
    for command in commands - {"demo"}:
        function = getattr(clipkit, FUNCTIONS.get(command, command))
        assert isinstance(function, FunctionType)
        assert inspect.getdoc(function)


def public_functions():
    return [
        one for name in clipkit.__all__ if isinstance(one := getattr(clipkit, name), FunctionType)
    ]


def test_types_that_functions_return_are_exported():
    for function in public_functions():
        returned = function.__annotations__.get("return")
        if isinstance(returned, type) and not returned.__module__.startswith("clipkit"):
            continue
        name = returned.__name__ if isinstance(returned, type) else str(returned).strip("'\"")
        if name.isidentifier() and name != "None":
            assert name in clipkit.__all__, f"{function.__name__} returns {returned}"


def test_a_users_script_passes_strict_type_checks():
    script = ROOT / "tests" / "typing" / "user_script.py"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run([*command, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_handles_name_themselves(colour_folder, tiny_checkpoint, tmp_path):
    encoder = clipkit.load_model(tiny_checkpoint)
    index = clipkit.build_index(colour_folder, tmp_path / "index", encoder)
    store = clipkit.open_store(index.manifest.source["store"])
    assert repr(encoder) == f"Encoder('{encoder.model}', dim=32, device='{encoder.device}')"
    assert repr(index) == f"VectorIndex('{index.path}', 12 vectors of {encoder.model})"
    assert repr(store) == f"EmbeddingStore('{store.path}', 12 vectors of {encoder.model})"
