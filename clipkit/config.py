"""The configuration of a training run: TOML in, a checked ``TrainConfig`` out, and back to TOML.

A TOML file has one table per section: ``[model]``, ``[data]``, ``[augment]``, ``[optim]`` and
``[train]``. Each field is documented here, beside its one default; ``clipkit config`` prints these
texts. ``--set section.key=value`` overrides single fields.
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


def _refuse_bool(value: Any) -> Any:
    """Refuse true and false, which pydantic would read as 1 and 0: `flip = true` flips always."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
Number = Annotated[float, BeforeValidator(_refuse_bool)]
Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
PositiveInt = Annotated[Integer, Field(ge=1)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
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
    """The model: ``name``, or ``init_from``, or all of ``embed_dim``, ``vision`` and ``text``."""

    __pydantic_config__ = _STRICT
    name: str = ""
    """An open_clip architecture, such as "ViT-S-32", built with random weights."""
    embed_dim: NonNegativeInt = 0
    """Dimension of the shared embedding space, for a custom architecture."""
    vision: dict[str, Any] = field(default_factory=dict)
    """Custom image tower: the fields of open_clip's `vision_cfg` (image_size, layers, width,
    patch_size, or timm_model_name, timm_pool, timm_proj)."""
    text: dict[str, Any] = field(default_factory=dict)
    """Custom text tower: the fields of open_clip's `text_cfg` (width, heads, layers). Context
    length and vocabulary size are always CLIP's: 77 and 49,408."""
    init_from: str = ""
    """A MODEL (run, checkpoint or open_clip name with weights) to fine-tune. It defines the
    architecture, so leave the other architecture fields empty."""
    image_weights: str = ""
    """Initial weights of a timm image tower: a FILE in timm's layout (.safetensors or a plain
    PyTorch state dict; set `mean` and `std` to match), or "pretrained" to download timm's own.
    A classification head that does not fit is dropped. Empty: random weights."""
    lock: tuple[Literal["image", "text"], ...] = ()
    """Towers to freeze, as in open_clip's `lock_image_tower`: all of their loaded weights. With
    `init_from` that is the whole tower; with `image_weights` everything but the projection, which
    starts from random weights (LiT, Zhai et al. 2022)."""
    patch_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Fraction of image patches to drop at random in training (FLIP, Li et al. 2023): 0.5 halves
    the work of the image tower at little loss. For vision transformers."""
    mean: tuple[Fraction, Fraction, Fraction] | tuple[()] = ()
    """Mean of the image channels, in [0, 1]. Empty: timm's for `image_weights = "pretrained"`,
    otherwise OpenAI CLIP's."""
    std: tuple[Positive, Positive, Positive] | tuple[()] = ()
    """Standard deviation of the image channels, in [0, 1]. Empty: chosen like `mean`."""


@dataclass(frozen=True)
class DataConfig:
    """Where the image–caption pairs come from."""

    __pydantic_config__ = _STRICT
    train: str | tuple[str, ...] = ""
    """DATA to train on: folder, CSV/TSV, JSONL, Parquet, WebDataset tars, `hf:org/name:split`; or a
    list of several, which are mixed in every batch ("a.tar::b.csv" is the same list)."""
    weights: tuple[Positive, ...] = ()
    """How often to draw each pair per epoch, one number for each DATA in `train`, such as [1, 2.5]:
    the ratios of open_clip's `--train-data-upsampling-factors`, but with exact counts instead of
    sampling with replacement. Empty: once."""
    val: str = ""
    """Held-out DATA to measure retrieval on during training. Empty: hold out `val_fraction` of the
    training images."""
    val_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Fraction of the training images to hold out if `val` is empty, at most 1,000 images."""
    image_column: str = ""
    """Column of the images. Empty: found by its usual names."""
    caption_column: str = ""
    """Column of the captions. Empty: found by its usual names."""
    label_column: str = ""
    """Column of the labels that `balance` and `caption_weights` use. Empty: found by its usual
    names."""
    balance: Literal["", "label"] = ""
    """label: draw every label equally often. An epoch keeps its length: pairs of rare labels are
    repeated, pairs of common labels are subsampled. Empty: draw every pair once per epoch."""
    caption_weights: dict[str, Positive] = field(default_factory=dict)
    """Loss weights of pairs by label, such as { dog = 2.0 }. Other labels have weight 1."""
    image_root: str = ""
    """Folder that the image paths of tables start from. Empty: the table's own, or the one below it
    that has the images."""
    encoding: str = ""
    """Encoding of CSV and TSV tables, such as cp1252. Empty: detected."""
    streaming: Literal["auto", "yes", "no"] = "auto"
    """Whether to read the data sequentially instead of by random access. auto: stream data that
    does not fit in memory."""
    long_captions: Literal["cut", "error", "split"] = "cut"
    """How to handle captions over 77 tokens. cut: truncate and count them; error: refuse to train;
    split: split them at sentence ends into several captions of the same image."""
    decode: Literal["fast", "exact"] = "fast"
    """How to decode training images. fast: decode large JPEGs at 1/2, 1/4 or 1/8 scale if the
    smallest crop still fills the model's input, crop at whole pixels and resize with a vectorised
    kernel; exact: decode at full size, crop at subpixels and resize with Pillow. Held-out images
    are always decoded exactly."""
    image_cache: Literal["auto", "yes", "no"] = "auto"
    """Whether to cache decoded images in a memory-mapped file in the run directory. It affects
    speed only and is deleted when the process ends. auto: if the images are read more than once,
    in at most 2 GiB and a quarter of the free disk space; yes: in a quarter of the free space."""
    max_skipped_fraction: Fraction = 0.05
    """Stop with an error if more than this fraction of the images cannot be read."""
    feature_dir: str = ""
    """Directory of cached features of locked towers, shared by all runs with the same tower and
    data. Empty: `features` in the run directory."""
    feature_views: NonNegativeInt = 1
    """Cached views per image of a locked image tower: the first is preprocessed as for evaluation,
    the others are augmented, and each epoch draws one. 0: cache nothing and run locked towers in
    every step."""
    workers: Annotated[Integer, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    """Threads that decode images. auto: one per core, at most 16."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training images and captions. Held-out pairs are never augmented."""

    __pydantic_config__ = _STRICT
    crop_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    """Range of the random resized crop's area, as a fraction of the image."""
    crop_ratio: tuple[Positive, Positive] = (0.75, 1.3333)
    """Range of the random crop's aspect ratio, width / height."""
    flip: Fraction = 0.0
    """Probability of a horizontal flip. Off by default because captions say left and right."""
    color_jitter: Fraction = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    grayscale: Fraction = 0.0
    """Probability of a conversion to grayscale."""
    rotate: Annotated[Number, Field(ge=0, le=180)] = 0.0
    """Largest rotation in degrees, in either direction. Corners repeat the edge colour."""
    token_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a token of a training caption. It keeps a text tower from memorising
    a small set of captions."""

    def __post_init__(self) -> None:
        """Refuse ranges in the wrong order."""
        for name, (low, high) in (("scale", self.crop_scale), ("ratio", self.crop_ratio)):
            if low > high or not high:
                raise ConfigError(
                    f"augment.crop_{name} is [{low:g}, {high:g}], expected the smaller of two "
                    "numbers first, and the larger above 0; reorder them"
                )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    __pydantic_config__ = _STRICT
    name: str = "adamw"
    """Optimizer, by timm's name: adamw, sgd (Nesterov momentum), momentum (plain), lamb, lion,
    adafactor, muon, …; `timm.optim.list_optimizers()` lists all."""
    lr: Positive = 5e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.2
    """Weight decay as the optimizer defines it (decoupled in adamw and sgdw, added to the gradient
    in sgd). Never applied to gains, biases and the temperature."""
    momentum: Fraction | Literal["auto"] = "auto"
    """Momentum, for optimizers that have it, such as sgd. auto: 0.9."""
    beta1: Fraction | Literal["auto"] = "auto"
    """Decay of the first moment. auto: 0.9 for adamw, otherwise the optimizer's default."""
    beta2: Fraction | Literal["auto"] = "auto"
    """Decay of the second moment. auto: 0.98 for adamw, otherwise the optimizer's default."""
    eps: Positive | Literal["auto"] = "auto"
    """Epsilon. auto: 1e-6 for adamw, otherwise the optimizer's default."""
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer, from the top of a tower down. Pooling, projections
    and the temperature learn at the full rate. 1: the same rate for all layers."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine decay to `min_lr_ratio`, or constant."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate of the cosine schedule, as a fraction of `lr`."""
    warmup: Fraction = 0.05
    """Fraction of the run for the linear warm-up from zero."""
    cooldown: Fraction = 0.0
    """Fraction of the run, at its end, for a linear decay to zero."""
    clip_norm: NonNegative = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    temperature: Annotated[Number, Field(ge=0.01, le=1)] = 0.07
    """Initial temperature. Its inverse, the logit scale, is learned and clamped to [1, 100]."""

    def __post_init__(self) -> None:
        """Refuse contradictory fields."""
        if self.warmup + self.cooldown > 1:
            raise ConfigError(
                f"optim.warmup and optim.cooldown are {self.warmup:g} and {self.cooldown:g}, "
                "expected fractions of the run that add up to at most 1; lower one of them"
            )
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ConfigError(
                f"optim.min_lr_ratio is {self.min_lr_ratio:g}, but a constant schedule has no "
                'minimum; remove it, or set optim.schedule to "cosine"'
            )
        if self.schedule == "cosine" and self.cooldown and not self.min_lr_ratio:
            raise ConfigError(
                f"optim.cooldown is {self.cooldown:g}, but the cosine reaches zero before it; "
                'set optim.min_lr_ratio, such as 0.1, or optim.schedule to "constant"'
            )


@dataclass(frozen=True)
class LoopConfig:
    """The training loop: batches, length, evaluation, checkpoints and recovery."""

    __pydantic_config__ = _STRICT
    batch_size: Annotated[Integer, Field(ge=2)] = 256
    """Pairs per step over all processes. The other pairs of a batch are a pair's negatives."""
    micro_batch_size: NonNegativeInt = 0
    """Pairs that a process encodes at once, for batches that do not fit in memory. The gradient is
    still that of the whole batch (GradCache), at the cost of a second forward pass. 0: encode the
    process's whole part of the batch at once."""
    epochs: PositiveInt = 32
    """Passes over the training pairs."""
    steps: NonNegativeInt = 0
    """Total steps, instead of `epochs`. 0: `epochs` decides. Streams of unknown length need it."""
    minutes: NonNegative = 0.0
    """Stop after this many minutes, with the schedule fitted to that time. 0: no limit. Such a run
    is not reproducible step by step."""
    grad_checkpointing: bool = False
    """Recompute the activations of transformer blocks in the backward pass: less memory for about
    a third more compute, with the same gradient."""
    compile: bool = False
    """Compile the towers with `torch.compile`. It takes minutes at the start and needs a C++
    compiler (on a GPU, Triton). Captions are padded to 16, 32, 48, 64 or 77 tokens."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the towers' matrix products; auto: bf16 on GPUs with bf16 units, and on CPUs
    with bf16 instructions for towers at least 128 wide and micro-batches of at least 16 pairs.
    Weights and loss are always float32."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP2), for towers too
    large for one GPU: slower, with the same result."""
    duplicates: Literal["mask", "positive", "ignore"] = "mask"
    """Pairs of a batch with the same image or the same caption, up to case, whitespace and final
    punctuation. mask: not each other's negatives; positive: each other's targets; ignore: ordinary
    negatives. Equal captions have equal vectors, so "positive" gives the gradient of "ignore" for
    them; it differs for repeated images and with `augment.token_dropout`."""
    bucket_by_length: bool = False
    """Whether to batch captions of similar length, which reduces padding: pairs are shuffled,
    sorted within groups of 32 batches (of a stream, of about 2,048 pairs, which wait in memory),
    and the batches are shuffled. The negatives then have similar lengths, too."""
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, data order, caption choice and augmentation."""
    eval_every_epochs: NonNegative = 1.0
    """Epochs between two evaluations on held-out pairs. 0: evaluate at the end only. For a stream,
    1,000 steps count as an epoch."""
    save_every_epochs: NonNegative = 1.0
    """Epochs between two checkpoints, counted likewise. 0: save at the end only."""
    save_every_minutes: NonNegative = 30.0
    """Minutes after which to save a checkpoint in any case. 0: never."""
    keep_last: PositiveInt = 2
    """Number of latest checkpoints to keep, beside those of `keep_every_steps` and
    `best_metric`."""
    keep_every_steps: NonNegativeInt = 0
    """Steps between two checkpoints that are never deleted. 0: none."""
    best_metric: Metric = "text_to_image_r1"
    """Held-out metric that selects the best checkpoint, which is kept. "": keep no best
    checkpoint."""
    max_nonfinite_steps: PositiveInt = 20
    """Roll back to the last good checkpoint after this many consecutive non-finite steps. A single
    non-finite step is skipped and counted. Non-finite weights are never saved: they cause an
    immediate rollback."""
    max_rollbacks: NonNegativeInt = 3
    """Number of rollbacks before the run fails with an error."""
    rollback_lr_factor: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Factor on the learning rate after each rollback."""
    log_every_steps: PositiveInt = 10
    """Steps between two lines of log.jsonl."""
    tensorboard: bool = False
    """Whether to also write TensorBoard event files, to `tensorboard/` in the run directory. Needs
    the extra `clipkit[tensorboard]`."""

    def __post_init__(self) -> None:
        """Refuse contradictory fields."""
        if self.compile and self.fsdp:
            raise ConfigError(
                "train.compile and train.fsdp are both set, but a compiled tower cannot gather "
                "its shards; remove one of them"
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


RENAMED = {
    "model.start": "model.init_from",
    "data.held_out": "data.val",
    "data.held_out_share": "data.val_fraction",
    "data.cache": "data.image_cache",
    "data.skip_limit": "data.max_skipped_fraction",
    "data.features": "data.feature_dir",
    "augment.drop_tokens": "augment.token_dropout",
    "optim.floor": "optim.min_lr_ratio",
    "train.chunk_size": "train.micro_batch_size",
    "train.shard": "train.fsdp",
    "train.like_length": "train.bucket_by_length",
    "train.eval_epochs": "train.eval_every_epochs",
    "train.save_epochs": "train.save_every_epochs",
    "train.save_minutes": "train.save_every_minutes",
    "train.keep": "train.keep_last",
    "train.keep_every": "train.keep_every_steps",
    "train.best": "train.best_metric",
    "train.bad_steps": "train.max_nonfinite_steps",
    "train.retries": "train.max_rollbacks",
    "train.retry_rate": "train.rollback_lr_factor",
    "train.log_steps": "train.log_every_steps",
}
"""Former names of fields, which are refused with the present name."""

_SECTIONS: dict[str, Any] = {section.name: section.type for section in fields(TrainConfig)}
_ADAPTER = TypeAdapter(TrainConfig)
_TEXT_FIELDS = {
    f"{name}.{item.name}": item.type
    for name, section in _SECTIONS.items()
    for item in fields(section)
    if item.type in (str, str | tuple[str, ...])
}
_EXPECTED = {
    "dataclass_type": "expected a section of keys, such as [train]",
    "missing": "expected more values in the list",
    "tuple_type": "expected a list in brackets",
}
"""TOML wording for pydantic's error types whose own message speaks of Python types."""


def load_config(path: str | Path, overrides: str | Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply ``section.key=value`` overrides.

    Relative paths in ``[data]`` are relative to the working directory, as on the command line.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown (the message names the
            nearest known key), or a type or value is wrong.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors add a BOM
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}), expected a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "; write a path with backslashes in 'single quotes'" if "'\\'" in str(error) else ""
        raise ConfigError(f"{path} is not valid TOML: {error}{hint}") from None
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply_override(content, override)
    return parse_config(content, origin=str(path))


def parse_config(content: dict[str, Any], origin: str = "the configuration") -> TrainConfig:
    """Check a nested dictionary and turn it into a TrainConfig; raises ConfigError as above."""
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_describe(error)}") from None


def dump_config(config: TrainConfig) -> str:
    """The configuration as TOML, with every field written out."""
    return tomli_w.dumps(_tuples_to_lists(asdict(config)))


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, tuple | list) else value


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value``. The value is read as TOML if possible, else as a string."""
    target, equals, text = override.partition("=")
    *sections, key = _key_parts(target)
    if not equals or not sections or not all(sections) or not key:
        raise ConfigError(
            f"--set {override!r} is not section.key=value, for example train.epochs=5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    kind = _TEXT_FIELDS.get(".".join([*sections, key]))
    if kind and not isinstance(value, str) and (kind is str or not isinstance(value, list)):
        value = text.strip()  # a folder named 2024, or true
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
    content[key] = value


def _key_parts(target: str) -> list[str]:
    """The names in a dotted TOML key; a quoted name may contain dots."""
    names = []
    try:
        found: Any = tomllib.loads(f"{target} = 0")
        while isinstance(found, dict):
            ((name, found),) = found.items()
            names.append(name)
    except ValueError:  # includes TOMLDecodeError
        return target.strip().split(".")
    return names


def _describe(error: ValidationError) -> str:
    """The first problem, in one sentence."""
    problem = error.errors()[0]
    # pydantic appends the alternatives of a union to the path; users know the key only.
    where = ".".join(map(str, problem["loc"][:2]))
    if where in RENAMED:
        return f"{where} was renamed {RENAMED[where]}; use the new name"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section, _, key = where.rpartition(".")
        known = [item.name for item in fields(_SECTIONS[section])] if section else list(_SECTIONS)
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    expected = _EXPECTED.get(problem["type"], problem["msg"])
    found = json.dumps(problem["input"], default=str)
    choices = re.findall(r"'(\w+)'", str(problem.get("ctx", {}).get("expected", "")))
    close = difflib.get_close_matches(str(problem["input"]), choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{where} is {found}; {expected[0].lower()}{expected[1:]}{hint}"
