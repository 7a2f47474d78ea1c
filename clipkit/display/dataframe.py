"""Results as pandas data frames; pandas is optional and imported on first use."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipkit.errors import MissingExtraError


def data_frame(columns: Mapping[str, Sequence[Any]]) -> Any:
    """A ``pandas.DataFrame`` with these columns.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtraError(
            "to_pandas() needs the package pandas, which is not installed; run: pip install pandas"
        ) from None
    return pd.DataFrame(dict(columns))
