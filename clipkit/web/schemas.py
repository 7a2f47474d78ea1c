"""What goes in and out of the API; the names here are those of its OpenAPI schema."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MOST_HITS = 10_000
"""How far a search can be paged: beyond, a person narrows it instead."""
MOST_CAPTIONS = 600
"""Labels × templates of one classification: about ten seconds of encoding on two cores."""
Text = Annotated[str, Field(max_length=10_000)]
Key = Annotated[str, Field(min_length=1, max_length=4096)]
ImageName = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Page(BaseModel):
    """Which hits of all, and among which pictures."""

    model_config = ConfigDict(extra="forbid")

    where: list[Text] = Field(
        [],
        max_length=16,
        description="Conditions on columns, as label=red, year>=2020 or folder~holiday; of several "
        "values of one column any will do.",
    )
    offset: int = Field(0, ge=0, le=MOST_HITS, description="Hits to leave out at the start.")
    limit: int = Field(60, ge=1, le=500, description="Hits to return at most.")


class Terms(Page):
    """What is searched for, beside a picture that may be sent along."""

    q: Text = Field("", description="Words; without anything to search for, pictures are listed.")
    minus: list[Text] = Field([], max_length=8, description="Words that are not wanted.")
    like: list[Key] = Field([], max_length=8, description="Keys of pictures to be like.")
    unlike: list[Key] = Field([], max_length=8, description="Keys of pictures not to be like.")


class Search(Terms):
    """A search for all that can be named in an address."""

    image: ImageName | None = Field(
        None, description="Name of a picture that was sent before, as an answer gave it."
    )


class Hit(BaseModel):
    """A picture found."""

    rank: int = Field(description="From 1.")
    key: str
    score: float | None = Field(
        description="Inner product with the query, higher is better; null where pictures are "
        "only listed."
    )
    probability: float | None = Field(
        description="That it matches, from 0 to 1; null where the index is not calibrated."
    )
    captions: list[str]
    label: str | None
    more: dict[str, Any] = Field(description="What else the index says of it.")


class Answer(BaseModel):
    """Hits, best first."""

    hits: list[Hit]
    total: int = Field(description="Pictures that fulfil the conditions, found or not.")
    matched: bool | None = Field(
        description="False where nothing is a good match; null where that cannot be told."
    )
    image: str | None = Field(description="Name of the picture that was sent.")
    notes: list[str] = Field(description="Sentences about what a person should know.")
    milliseconds: float = Field(description="From the request's arrival to its answer.")


class Classify(BaseModel):
    """Pictures and the labels to choose among."""

    model_config = ConfigDict(extra="forbid")

    labels: list[Annotated[str, Field(max_length=1000)]] = Field(
        min_length=2,
        max_length=200,
        description="Each a name, or a name and what captions say for it: fox: red fox, vixen.",
    )
    templates: list[Annotated[str, Field(max_length=1000)]] = Field(
        [], max_length=20, description="Captions with {} where the label goes; none: the usual."
    )
    keys: list[Key] = Field([], max_length=100)
    image: ImageName | None = None


class Classified(BaseModel):
    """A picture's probabilities."""

    key: str | None = Field(description="Null for the picture that was sent.")
    probabilities: list[float] = Field(description="One for each label, in their order.")


class Classification(BaseModel):
    """Probabilities of labels for each picture."""

    labels: list[str]
    templates: list[str]
    pictures: list[Classified]


class ColumnInfo(BaseModel):
    """A column that pictures can be chosen by."""

    name: str
    kind: str = Field(description="text, number, time or truth.")
    values: list[tuple[str, int]] = Field(description="Each value and how many pictures have it.")
    low: str | None
    high: str | None


class Info(BaseModel):
    """What is served."""

    name: str
    count: int
    model: str
    spec: str
    created: str
    clipkit: str
    missing: str | None = Field(description="Why no picture can be shown; null where some can.")
    calibrated: bool = Field(description="Whether hits come with a probability.")
    columns: list[ColumnInfo]
    most_hits: int
    largest_upload: int = Field(description="Bytes.")


class Health(BaseModel):
    """That the server is there."""

    status: str


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str
