"""Requests that are refused: each with its HTTP status and one sentence."""

from clipkit.errors import ServeError


class RequestError(ServeError):
    """A request is refused.

    Attributes:
        status: the HTTP status of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
