"""The house: which layer may import which, what stays light, how large a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "clipkit"
# Lower rooms are never to know of higher ones.
LAYERS = [
    {"errors"},
    {"config", "manifest", "metrics", "pages", "plots", "progress"},
    {"data"},
    {"store", "model"},
    {"web"},
    {"tasks"},
    {"cli"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
# A folder is embedded before it is indexed.
TASK_IMPORTS = {("index", "embed")}
# To sync an index is to update it from each of its folders.
TASK_IMPORTS |= {("sync", "update")}
# To compare two models is to evaluate both, a suite is many evaluations.
TASK_IMPORTS |= {("compare", "evaluate"), ("suite", "evaluate")}
# The demo is by its nature a walk over all commands.
TASK_IMPORTS |= {
    ("demo", step)
    for step in ("train", "embed", "index", "search", "classify", "evaluate", "demo_page")
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",))


def imports(path):
    """Modules of clipkit that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipkit."):
            yield node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("clipkit."):
                    yield alias.name.split(".")[1:]


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0], parts[-1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    layer, name = room(path)
    if layer == "__init__":
        return
    for module in imports(path):
        target = module[0]
        assert HEIGHT[target] <= HEIGHT[layer], f"{path} imports {'.'.join(module)}"
        if {layer, target} == {"store", "model"}:
            pytest.fail(f"{path}: store and model do not know of each other")
        if layer == target == "tasks" and module[1:] != [name]:
            assert (name, module[1]) in TASK_IMPORTS, f"{path}: tasks do not import one another"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_sizes_stay_liveable(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{path}: {node.name} is too long"


def loaded_by(code):
    """Names of the modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import clipkit", "import clipkit.cli", "import clipkit.errors"])
def test_light_imports(code):
    assert not loaded_by(code) & {"torch", "faiss", "datasets", "open_clip", "pandas", "numpy"}


def test_help_imports_neither_torch_nor_faiss():
    code = (
        "import sys, clipkit.cli\nsys.argv = ['clipkit', '--help']\n"
        "try:\n    clipkit.cli.main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert not loaded_by(code) & {"torch", "faiss", "datasets", "open_clip", "numpy"}


def test_the_store_never_loads_torch():
    code = "import clipkit.store.embeddings, clipkit.store.vector_index"
    assert "torch" not in loaded_by(code)


def test_public_names_exist():
    import clipkit

    for name in clipkit.__all__:
        assert getattr(clipkit, name) is not None
    with pytest.raises(AttributeError):
        _ = clipkit.no_such_name
