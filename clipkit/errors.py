"""Every error clipkit raises on purpose.

::

    ClipkitError
    ├── ConfigError            a training config: an unknown key, a wrong type, a bad value
    ├── DataError              a data source that cannot be opened or lacks what is needed
    │   ├── ImageError         one image that cannot be read
    │   └── SkipLimitError     more of the data is bad than the run allows
    ├── CaptionError           a caption, label or template that does not fit
    ├── ModelError             an unknown or unsuitable model, or weights out of reach
    │   └── TrainingError      a run that cannot go on
    ├── ArtifactError          a directory that is not what it should be
    │   ├── ModelMismatchError made by another model than the one at hand
    │   └── SpecError          a FAISS factory string that is impossible here
    ├── ServeError             a server that cannot start, or a request that it refuses
    └── MissingExtraError      an optional dependency that is not installed

Each message is one sentence for a person: what was found, what was expected, how to mend it. The
command line prints it and exits 1; any other exception is a bug and shows its traceback.
"""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk has no room."""


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
    """A directory exists already, is half-written, or holds something else than expected."""


class ModelMismatchError(ArtifactError):
    """Vectors of one model meet a different model."""


class SpecError(ArtifactError):
    """A FAISS factory string is malformed, or impossible for the vectors at hand."""


class ServeError(ClipkitError):
    """A server cannot start, or refuses a request."""


class MissingExtraError(ClipkitError):
    """An optional dependency is needed and not installed."""
