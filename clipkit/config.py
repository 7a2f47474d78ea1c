"""TOML in, resolved TOML out; ``--set section.key=value`` overrides single fields.

The settings of a training run, each documented here next to its one default.

A TOML file has one table per section: ``[model]``, ``[data]``, ``[augment]``, ``[optim]``,
``[train]``.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from clipkit.errors import ConfigError


def _no_truth(value: Any) -> Any:
    """Refuse true and false, which would count as 1 and 0: `flip = true` would mirror them all."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
Number = Annotated[float, BeforeValidator(_no_truth)]
Whole = Annotated[int, BeforeValidator(_no_truth)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[Whole, Field(ge=1)]
Metric = Literal[
    "",
    "text_to_image_r1",
    "text_to_image_r5",
    "text_to_image_r10",
    "image_to_text_r1",
    "image_to_text_r5",
    "image_to_text_r10",
]


@dataclass(frozen=True)
class ModelConfig:
    """Which towers to train. Either ``name``, or all of ``embed_dim``, ``vision`` and ``text``."""

    __pydantic_config__ = _STRICT
    name: str = ""
    """An open_clip model name, such as "ViT-S-32"; built with random weights."""
    embed_dim: Annotated[Whole, Field(ge=0)] = 0
    """Width of the shared vector space, for own towers."""
    vision: dict[str, Any] = field(default_factory=dict)
    """Own image tower: open_clip's `vision_cfg` fields (image_size, layers, width, patch_size, or
    timm_model_name, timm_pool, timm_proj)."""
    text: dict[str, Any] = field(default_factory=dict)
    """Own text tower: open_clip's `text_cfg` fields (width, heads, layers). Context and vocabulary
    are always CLIP's 77 and 49,408."""
    start: str = ""
    """A MODEL (run, checkpoint or open_clip name with weights) whose weights to start from; it
    brings its own towers, so the other fields stay empty."""
    image_weights: str = ""
    """Weights that an image tower of timm starts from: a FILE in timm's layout (.safetensors or a
    plain PyTorch state dict; set `mean` and `std` to those it was trained with), or "pretrained"
    for timm's own, fetched by it. A classifier that does not fit is left out. Empty: random."""
    lock: tuple[Literal["image", "text"], ...] = ()
    """Towers that are not trained: those parts of them whose weights were loaded. With `start`
    that is the whole tower; with `image_weights` all but the projection into the shared space,
    which starts from random weights (LiT, Zhai et al. 2022)."""
    patch_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of each training picture's patches that the image tower does not see, chosen anew each
    time (FLIP): 0.5 halves its work at little loss. For vision transformers."""
    mean: tuple[Share, Share, Share] | tuple[()] = ()
    """Mean of the image channels in [0, 1], subtracted from images. Empty: timm's for
    `image_weights = "pretrained"`, else OpenAI CLIP's."""
    std: tuple[Positive, Positive, Positive] | tuple[()] = ()
    """Standard deviation of the image channels in [0, 1], by which images are divided; empty: as
    for `mean`."""


@dataclass(frozen=True)
class DataConfig:
    """Where the image–caption pairs come from."""

    __pydantic_config__ = _STRICT
    train: str = ""
    """DATA to train on: folder, CSV/TSV, JSONL, Parquet, WebDataset tars, `hf:org/name:split`."""
    held_out: str = ""
    """DATA for retrieval during training; empty: a share of the training pairs is held out."""
    held_out_share: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the training images held out when `held_out` is empty, at most 1,000 images."""
    image_column: str = ""
    """Column of the images; empty: found by its usual names."""
    caption_column: str = ""
    """Column of the captions; empty: found by its usual names."""
    label_column: str = ""
    """Column of the labels, which `balance` and `caption_weights` go by; empty: found by its usual
    names."""
    balance: Literal["", "label"] = ""
    """label: every label is drawn equally often, in epochs of as many pairs as before: pairs of a
    rare label several times, of a common one a part each epoch. Empty: every pair once an epoch."""
    caption_weights: dict[str, Positive] = field(default_factory=dict)
    """Weights of pairs in the loss, by label, such as { dog = 2.0 }; 1 for labels not named."""
    streaming: Literal["auto", "yes", "no"] = "auto"
    """Whether to read front to back instead of at random; auto: what does not fit in memory."""
    long_captions: Literal["cut", "error", "split"] = "cut"
    """What happens to captions over 77 tokens: cut and counted, refused before training starts,
    or split at sentence ends into several captions of the same image."""
    decode: Literal["fast", "exact"] = "fast"
    """How training pictures are read. fast: large JPEGs are decoded at 1/2, 1/4 or 1/8 of their
    size where the smallest crop still fills the model's, other pictures are averaged down likewise,
    crops lie at whole pixels and a vectorised kernel resizes them; exact: decoded whole, cropped
    between pixels, resized by Pillow. Held-out pictures are always read exactly."""
    cache: Literal["auto", "yes", "no"] = "auto"
    """Whether to keep decoded pictures in a file in the run's directory, mapped into memory, which
    goes when the process ends; it changes nothing but the speed. auto: for tables read more than
    once, in at most 2 GiB and a quarter of the free disk; yes: in a quarter of the free disk."""
    skip_limit: Share = 0.05
    """Largest share of unreadable pairs that training puts up with."""
    features: str = ""
    """Directory for the features of locked towers, each stored once and used again by every run
    with the same tower and data; empty: `features` in the run's own directory."""
    feature_views: Annotated[Whole, Field(ge=0)] = 1
    """Views of each image that a locked image tower makes features of: the first is the one that
    evaluation sees, further ones are augmented; each epoch draws one. What is stored cannot be
    augmented anew: 0 stores nothing and runs locked towers in every step."""
    workers: Annotated[Whole, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    """Threads that decode images; auto: one per core, at most 16."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images and captions. Held-out ones are never changed."""

    __pydantic_config__ = _STRICT
    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    """Share of the image's area kept by the random resized crop, from and to."""
    crop_ratio: tuple[Positive, Positive] = (0.75, 1.3333)
    """Width over height of the random crop, from and to."""
    flip: Share = 0.0
    """Probability of a mirror image. Off by default: captions say left and right."""
    color_jitter: Share = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    grayscale: Share = 0.0
    """Probability of a grey image."""
    rotate: Annotated[Number, Field(ge=0, le=180)] = 0.0
    """Largest rotation, in degrees either way; corners are filled with the image's edge colour."""
    drop_tokens: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Probability that a token of a training caption is left out. For few captions, which a text
    tower would else learn by heart."""

    def __post_init__(self) -> None:
        """Refuse ranges that are none."""
        for name, (low, high) in (("scale", self.crop_scale), ("ratio", self.crop_ratio)):
            if low > high or not high:
                raise ConfigError(
                    f"augment.crop_{name} is [{low:g}, {high:g}], expected the smaller of two "
                    "numbers first, and the larger above 0; put them in order"
                )


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, and the schedule of its learning rate after a linear warm-up."""

    __pydantic_config__ = _STRICT
    name: str = "adamw"
    """The optimiser, by timm's name: adamw, sgd (Nesterov's momentum), momentum (plain), lamb,
    lion, adafactor, muon, …; all are in `timm.optim.list_optimizers()`."""
    lr: Positive = 5e-4
    """Peak learning rate."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.2
    """Weight decay, as the optimiser understands it (decoupled in adamw, added to the gradient in
    sgd; sgdw decouples it); never applied to gains, biases and the temperature."""
    momentum: Share | Literal["auto"] = "auto"
    """Momentum of optimisers that have one, such as sgd; auto: 0.9."""
    beta1: Share | Literal["auto"] = "auto"
    """Decay of the first moment; auto: 0.9 in adamw, elsewhere the optimiser's own default."""
    beta2: Share | Literal["auto"] = "auto"
    """Decay of the second moment; auto: 0.98 in adamw, elsewhere the optimiser's own default."""
    eps: Positive | Literal["auto"] = "auto"
    """The optimiser's epsilon; auto: 1e-6 in adamw, elsewhere the optimiser's own default."""
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate for each layer further down a tower; what pools and projects at
    the top, and the temperature, learn at the full rate. 1: all layers do."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up: down a half cosine to `floor`, or always the same."""
    floor: Share = 0.0
    """Share of `lr` to which the cosine comes down."""
    warmup: Share = 0.05
    """Share of the run over which the learning rate climbs from zero."""
    cooldown: Share = 0.0
    """Share of the run, at its end, over which the learning rate falls in a line to zero."""
    clip_norm: Annotated[Number, Field(ge=0)] = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    temperature: Annotated[Number, Field(ge=0.01, le=1)] = 0.07
    """Initial temperature; its inverse, the logit scale, is learned and clamped to 1 to 100."""

    def __post_init__(self) -> None:
        """Refuse fields that contradict one another."""
        if self.warmup + self.cooldown > 1:
            raise ConfigError(
                f"optim.warmup and optim.cooldown are {self.warmup:g} and {self.cooldown:g}, "
                "shares of one run that come to more than 1; lower one of them"
            )
        if self.schedule == "constant" and self.floor:
            raise ConfigError(
                f"optim.floor is {self.floor:g}, but a constant schedule has none; leave it out, "
                'or set optim.schedule to "cosine"'
            )
        if self.schedule == "cosine" and self.cooldown and not self.floor:
            raise ConfigError(
                f"optim.cooldown is {self.cooldown:g}, but the cosine is down at zero before it; "
                'set optim.floor, such as 0.1, or optim.schedule to "constant"'
            )


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train."""

    __pydantic_config__ = _STRICT
    batch_size: Annotated[Whole, Field(ge=2)] = 256
    """Pairs per step, over all processes; each pair's negatives are the others of its batch."""
    chunk_size: Annotated[Whole, Field(ge=0)] = 0
    """Pairs a process encodes at once, for batches larger than memory: the gradient stays that of
    the whole batch, each step takes a second forward pass. 0: its whole share of the batch."""
    epochs: Count = 32
    """Passes over the training pairs."""
    steps: Annotated[Whole, Field(ge=0)] = 0
    """Steps in all, instead of `epochs`; 0: `epochs` decides. Streams of unknown length need it."""
    minutes: Annotated[Number, Field(ge=0)] = 0.0
    """Stop after this long, with the schedule fitted to the time; 0: no limit. A run ended by the
    clock cannot be repeated step for step."""
    grad_checkpointing: bool = False
    """Keep only the inputs of the transformers' blocks for the backward pass and compute the rest
    again: less memory for a third more work, the same gradient."""
    compile: bool = False
    """Compile the towers with `torch.compile`, which takes minutes at the start and needs a C++
    compiler (on a GPU, Triton); captions are padded to 16, 32, 48, 64 or 77 tokens."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the towers' matrix products; auto: bf16 on GPUs with bf16 units, and on CPUs
    with bf16 instructions for towers at least 128 wide and micro-batches of at least 16 pairs.
    Weights and loss are always float32."""
    shard: bool = False
    """Deal weights, gradients and optimiser state out over the processes that torchrun started,
    for towers too large for one card; slower, the same result."""
    duplicates: Literal["mask", "positive", "ignore"] = "mask"
    """Pairs of a batch with the same image or the same caption: not each other's negatives, each
    other's targets, or negatives like all others. Case, spacing and final punctuation of captions
    do not count. Equal captions have equal vectors, so that by them alone "positive" comes to the
    same gradient as "ignore"; it differs where an image comes twice in a batch, or where
    `augment.drop_tokens` makes equal captions differ."""
    like_length: bool = False
    """Whether batches are made of captions of like length, so that the text tower reads less
    padding: pairs are shuffled, sorted among 32 batches, and the batches shuffled. The other
    captions of a batch are then of like length too. For tables, not streams."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, order, caption choice and augmentation."""
    eval_epochs: Annotated[Number, Field(ge=0)] = 1.0
    """Epochs between two measurements of held-out retrieval; 0: only at the end. Of a stream 1,000
    steps count as an epoch."""
    save_epochs: Annotated[Number, Field(ge=0)] = 1.0
    """Epochs between two checkpoints, counted likewise; 0: only at the end."""
    save_minutes: Annotated[Number, Field(ge=0)] = 30.0
    """Minutes after which a checkpoint is due in any case; 0: never."""
    keep: Count = 2
    """How many of the latest checkpoints to keep, beside those of `keep_every` and `best`."""
    keep_every: Annotated[Whole, Field(ge=0)] = 0
    """Steps between two checkpoints that are kept for good; 0: none are."""
    best: Metric = "text_to_image_r1"
    """Held-out metric by which the best checkpoint so far is kept; "": it is not."""
    bad_steps: Count = 20
    """So many steps in a row without a finite loss and gradient (each is left out and counted)
    send the run back to its last good checkpoint; weights due to be saved that are not finite
    do at once."""
    retries: Annotated[Whole, Field(ge=0)] = 3
    """How often it may go back before it ends with an error."""
    retry_rate: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Factor on the learning rate each time it goes back."""
    log_steps: Count = 10
    """Steps between two lines of log.jsonl."""
    tensorboard: bool = False
    """Whether to write the log as event files too, in `tensorboard/` of the run's directory; needs
    the extra `clipkit[tensorboard]`."""

    def __post_init__(self) -> None:
        """Refuse fields that cannot go together."""
        if self.compile and self.shard:
            raise ConfigError(
                "train.compile and train.shard are both set, but a compiled tower does not gather "
                "its shards; leave one of them out"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run, section by section."""

    __pydantic_config__ = _STRICT
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig = LoopConfig()


_ADAPTER = TypeAdapter(TrainConfig)
_TEXTS = {
    f"{section.name}.{item.name}"
    for section in fields(TrainConfig)
    for item in fields(section.type)  # type: ignore[arg-type]
    if item.type is str
}
"""Fields that hold any text."""
_EXPECTED = {
    "dataclass_type": "expected a section of keys, such as [train]",
    "missing": "expected more values in the list",
    "tuple_type": "expected a list in brackets",
}
"""What pydantic says in the words of Python, in those of TOML; by its type of error."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply ``section.key=value`` overrides.

    Relative paths in ``[data]`` are taken from where the command runs, as on the command line.

    Raises:
        ConfigError: the file is missing or no TOML; an unknown key (with the nearest known one);
            a wrong type or value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows mark it
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}), expected a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "; write a path with backslashes in 'single quotes'" if "'\\'" in str(error) else ""
        raise ConfigError(f"{path} is not valid TOML: {error}{hint}") from None
    for override in overrides:
        _override(content, override)
    return parse_config(content, origin=str(path))


def parse_config(content: dict[str, Any], origin: str = "the configuration") -> TrainConfig:
    """Check a nested dictionary and turn it into a TrainConfig; raises ConfigError as above."""
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_sentence(error)}") from None


def dump_config(config: TrainConfig) -> str:
    """The configuration as TOML with every field written out."""
    return tomli_w.dumps(_plain(asdict(config)))


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what TOML can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _override(content: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value``; the value is read as TOML, else as a plain string."""
    target, equals, text = override.partition("=")
    *sections, key = _parts(target)
    if not equals or not sections or not all(sections) or not key:
        raise ConfigError(
            f"--set {override!r} is not section.key=value, for example train.epochs=5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if ".".join([*sections, key]) in _TEXTS and not isinstance(value, str):
        value = text.strip()  # a folder named 2024, or true
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
    content[key] = value


def _parts(target: str) -> list[str]:
    """The names in a dotted key, as TOML reads it; a name in quotes may hold dots itself."""
    names = []
    try:
        found: Any = tomllib.loads(f"{target} = 0")
        while isinstance(found, dict):
            ((name, found),) = found.items()
            names.append(name)
    except ValueError:  # TOML's error is one
        return target.strip().split(".")
    return names


def _sentence(error: ValidationError) -> str:
    """The first thing wrong, in one sentence."""
    problem = error.errors()[0]
    # pydantic adds the alternatives of a union to the path; a person knows only the key.
    where = ".".join(map(str, problem["loc"][:2]))
    expected = _EXPECTED.get(problem["type"], problem["msg"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section, _, key = where.rpartition(".")
        known = list(_known_keys(section))
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    found = json.dumps(problem["input"], default=str)
    known = re.findall(r"'(\w+)'", str(problem.get("ctx", {}).get("expected", "")))
    close = difflib.get_close_matches(str(problem["input"]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{where} is {found}; {expected[0].lower()}{expected[1:]}{hint}"


def _known_keys(section: str) -> list[str]:
    """Names of a section's fields; of the sections for an empty name."""
    sections = {item.name: item.type for item in fields(TrainConfig)}
    return [item.name for item in fields(sections[section])] if section else list(sections)  # type: ignore[arg-type]
