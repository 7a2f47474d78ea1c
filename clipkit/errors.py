"""The exceptions that clipkit raises deliberately.

::

    ClipkitError
    ├── ConfigError            a training config has an unknown key, a wrong type or a bad value
    ├── DataError              a data source cannot be opened or lacks required data
    │   ├── ImageError         an image cannot be read
    │   └── SkipLimitError     more items are unreadable than the limit allows
    ├── CaptionError           a caption, label or template is invalid
    ├── ModelError             a model is unknown or unsuitable, or its weights are unavailable
    │   └── TrainingError      a training run cannot start or continue
    ├── ArtifactError          a directory is not the expected artifact
    │   ├── ModelMismatchError an artifact was built with a different model
    │   └── SpecError          a FAISS factory string is invalid for these vectors
    ├── ServeError             a server cannot start, or refuses a request
    ├── ArgumentError          an argument of a function is out of range (also a ValueError)
    └── MissingExtraError      an optional dependency is not installed

Each message is one sentence: what was found, what was expected, how to fix it. The command line
prints it and exits with code 1. Any other exception is a bug and shows its traceback.
"""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the operating system for a full disk."""


class ClipkitError(Exception):
    """Base class of every error that clipkit raises deliberately."""


class ArgumentError(ClipkitError, ValueError):
    """An argument of a function is out of range, or not one of the known choices."""


class ConfigError(ClipkitError):
    """A training config has an unknown key, a wrong type or an invalid value."""


class DataError(ClipkitError):
    """A data source cannot be opened, or lacks images, captions or labels."""


class ImageError(DataError):
    """An image cannot be read; the message is the reason, without the file name."""


class SkipLimitError(DataError):
    """More items were skipped than the limit allows."""


class CaptionError(ClipkitError):
    """A caption, label or template is empty, repeated, or longer than 77 tokens."""


class ModelError(ClipkitError):
    """A model is unknown or unsuitable, or its weights are unavailable."""


class TrainingError(ModelError):
    """A training run cannot start or continue."""


class ArtifactError(ClipkitError):
    """A directory already exists, is incomplete, or is not the expected artifact."""


class ModelMismatchError(ArtifactError):
    """An artifact was built with a different model."""


class SpecError(ArtifactError):
    """A FAISS factory string is malformed, or invalid for the given vectors."""


class ServeError(ClipkitError):
    """A server cannot start, or refuses a request."""


class MissingExtraError(ClipkitError):
    """A required optional dependency is not installed."""
