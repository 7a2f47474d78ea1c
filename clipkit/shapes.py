"""Shapes and dtypes of arrays in signatures, in the notation of jaxtyping.

``Float32[NDArray[np.float32], "n dim"]`` is an array of n rows; one name stands for one size within
a call. The tests check them on every call. Elsewhere an annotation is the plain array type, because
importing jaxtyping takes 30 to 50 ms, and a search on the command line should not wait for that.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float as Float
    from jaxtyping import Float32 as Float32
    from jaxtyping import Float64 as Float64
    from jaxtyping import Int as Int
    from jaxtyping import Int64 as Int64
    from jaxtyping import Shaped as Shaped
else:

    class _Unchecked:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Float = Float32 = Float64 = Int = Int64 = Shaped = _Unchecked
