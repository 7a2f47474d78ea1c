"""The HTTP API's requests and responses; the class names are those of its OpenAPI schema."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clipkit.errors import ServeError
from clipkit.index.vector_index import MINUS_WEIGHT

MAX_HITS = 10_000
"""Maximum number of hits that can be paged through."""
MAX_DISTINCT_HITS = 1000
"""Maximum with ``distinct``, which compares every hit with all better hits."""
MAX_CAPTIONS = 600
"""Maximum labels × templates of one classification: about ten seconds on two cores."""
Text = Annotated[str, Field(max_length=10_000)]
Key = Annotated[str, Field(min_length=1, max_length=4096)]
UploadName = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class RequestError(ServeError):
    """A request was refused.

    Attributes:
        status: the HTTP status of the response.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Page(BaseModel):
    """Which hits to return."""

    model_config = ConfigDict(extra="forbid")

    where: str = Field(
        "",
        max_length=4000,
        description="Condition on the columns of the index, in the language of `clipkit search "
        "--where`, such as: year >= 2020 and label in ('dog', 'cat').",
    )
    k: int = Field(10, ge=1, le=500, description="Number of hits to return.")
    offset: int = Field(0, ge=0, le=MAX_HITS, description="Number of best hits to skip.")
    distinct: bool = Field(
        False, description="Omit near-duplicates of better hits; for the first 1,000 hits only."
    )


class QueryTerms(Page):
    """The parts of a query, apart from an uploaded image."""

    q: Text = Field("", description="Text to search for. An empty query lists the images.")
    minus: list[Text] = Field([], max_length=8, description="Texts to move away from.")
    minus_weight: float = Field(
        MINUS_WEIGHT, gt=0, le=10, description="Weight of each `minus` text and `unlike` image."
    )
    like: list[Key] = Field([], max_length=8, description="Keys of images to move towards.")
    unlike: list[Key] = Field([], max_length=8, description="Keys of images to move away from.")
    image_weight: float = Field(1.0, gt=0, le=10, description="Weight of the uploaded image.")


class SearchQuery(QueryTerms):
    """A query that can be written as a URL."""

    image: UploadName | None = Field(
        None, description="Name of an uploaded image, from the response to the upload."
    )


class SearchHit(BaseModel):
    """An image that matches the query."""

    rank: int = Field(description="From 1.")
    key: str
    score: float | None = Field(
        description="Inner product with the query, higher is better; null without a query."
    )
    probability: float | None = Field(
        description="Probability that the image matches the text, from 0 to 1; null unless the "
        "index is calibrated with captions of its images and the query is only text."
    )
    captions: list[str]
    label: str | None
    more: dict[str, Any] = Field(description="The other columns of the index.")


class SearchResponse(BaseModel):
    """Hits, best first."""

    hits: list[SearchHit]
    total: int = Field(description="Number of images that satisfy `where`.")
    any_match: float | None = Field(
        description="Probability that any of the ten best hits matches the text; null as for the "
        "probability of a hit."
    )
    matched: bool | None = Field(
        description="False if there is no good match: `any_match` is below 0.5, or, in an index "
        "calibrated without captions, random words score as high. True if `any_match` is at least "
        "0.5; else null."
    )
    image: str | None = Field(description="Name of the uploaded image.")
    notes: list[str] = Field(description="Warnings, such as words beyond the context length.")
    milliseconds: float = Field(description="Time from the request to this response.")


class ClassifyRequest(BaseModel):
    """Images, and the labels to choose from."""

    model_config = ConfigDict(extra="forbid")

    labels: list[Annotated[str, Field(max_length=1000)]] = Field(
        min_length=2,
        max_length=200,
        description="Names, each optionally with phrases for captions: `fox: red fox, vixen`.",
    )
    templates: list[Annotated[str, Field(max_length=1000)]] = Field(
        [],
        max_length=20,
        description="Captions with {} in place of the label; empty for the default templates.",
    )
    keys: list[Key] = Field([], max_length=100)
    image: UploadName | None = None


class ImageProbabilities(BaseModel):
    """The probabilities of one image."""

    key: str | None = Field(description="Null for the uploaded image.")
    probabilities: list[float] = Field(description="One per label, in the order of the labels.")


class ClassifyResponse(BaseModel):
    """Probabilities of the labels for each image."""

    labels: list[str]
    templates: list[str]
    images: list[ImageProbabilities]


class Column(BaseModel):
    """A column of the index to filter by."""

    name: str
    kind: Literal["text", "number", "time", "boolean"]
    values: list[tuple[str, int]] = Field(
        description="Each value and its number of images, for columns with few values."
    )
    min: str | None = Field(description="Smallest number or time.")
    max: str | None = Field(description="Largest number or time.")


class Info(BaseModel):
    """Information about the served index."""

    name: str
    count: int
    model: str
    spec: str
    created: str
    clipkit: str
    missing: str | None = Field(description="Why no image can be shown; null if some can.")
    calibrated: bool = Field(description="Whether hits have a probability.")
    columns: list[Column]
    max_hits: int
    max_upload: int = Field(description="Bytes.")


class Health(BaseModel):
    """The server is running."""

    status: str
