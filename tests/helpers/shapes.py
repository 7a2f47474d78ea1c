"""Check the shapes in the signatures of modules on every call."""

import sys
from types import FunctionType

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

MODULES = [
    "clipkit.evaluation.retrieval",
    "clipkit.index.vector_index",
    "clipkit.models.encoder",
    "clipkit.store.embedding_store",
    "clipkit.training.loss",
]

OWN_ERRORS = {
    "EmbeddingStore.from_vectors",
    "ExternalVectors.of",
    "VectorIndex.from_vectors",
    "VectorIndex.search_vectors",
}
"""Functions that check shapes themselves; the tests are about their own errors."""


def install():
    """Check the modules when they are imported."""
    early = [name for name in MODULES if name in sys.modules]
    assert not early, f"{early} are imported already; their shapes would not be checked"
    install_import_hook(MODULES, "tests.helpers.shapes.checked")


def checked(function):
    """The function with its shapes checked, but no other types: those have their own errors."""
    shapes = {name: hint for name, hint in function.__annotations__.items() if mentions_shape(hint)}
    if not shapes or function.__qualname__ in OWN_ERRORS:
        return function
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, shapes
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return beartype(copy)


def mentions_shape(hint):
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(mentions_shape, getattr(hint, "__args__", ())))


def unchecked(function):
    """The function without the check, whose frames would change the place of a warning."""
    return function.__wrapped__
