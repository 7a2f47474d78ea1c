"""Every error clipkit raises on purpose.

::

    ClipkitError
    ├── ConfigError            a training config: an unknown key, a wrong type, a bad value
    ├── DataError              a data source that cannot be opened, or lacks something
    │   ├── ImageError         one image that cannot be read
    │   └── SkipLimitError     more bad items than the limit allows
    ├── CaptionError           a caption, label or template that does not fit
    ├── ModelError             an unknown or unsuitable model, or weights out of reach
    │   └── TrainingError      a run that cannot go on
    ├── ArtifactError          a directory that is not as expected
    │   ├── ModelMismatchError vectors of another model
    │   └── SpecError          a FAISS factory string that cannot be used
    ├── ServeError             a server that cannot start, or a refused request
    └── MissingExtraError      an optional dependency that is not installed

Each message is one sentence: what was found, what was expected, how to fix it. The command line
prints it and exits with code 1; any other exception is a bug and shows its traceback.
"""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""


class ClipkitError(Exception):
    """Base of every error that clipkit raises on purpose."""


class ConfigError(ClipkitError):
    """A training config holds an unknown key, a wrong type or an impossible value."""


class DataError(ClipkitError):
    """A data source cannot be opened, or lacks images, captions or labels."""


class ImageError(DataError):
    """One image cannot be read; the message is the reason alone, without the file's name."""


class SkipLimitError(DataError):
    """More items were skipped than the allowed share."""


class CaptionError(ClipkitError):
    """A caption, label or template is empty, repeated, or longer than 77 tokens."""


class ModelError(ClipkitError):
    """A model is unknown or unsuitable, or its weights cannot be reached."""


class TrainingError(ModelError):
    """A training run cannot start or go on."""


class ArtifactError(ClipkitError):
    """A directory exists already, is half-written, or holds something unexpected."""


class ModelMismatchError(ArtifactError):
    """Vectors were encoded by another model."""


class SpecError(ArtifactError):
    """A FAISS factory string is malformed, or impossible for the given vectors."""


class ServeError(ClipkitError):
    """A server cannot start, or refuses a request."""


class MissingExtraError(ClipkitError):
    """A required optional dependency is not installed."""
