"""Training configurations: write a starter file for given data, and list every field."""

import json
import math
import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from clipkit.artifacts import write_text
from clipkit.config import TrainConfig, parse_config
from clipkit.data.open_source import Source, open_source
from clipkit.data.rows import Row
from clipkit.data.source import no_captions
from clipkit.errors import ConfigError, DataError, ImageError

SAMPLE = 64
"""Images that are opened to find the typical size."""
SAMPLES_SEEN = 120_000
"""Training images over all epochs: 20 epochs of Flickr8k's 6,000 photos, where the small model's
held-out recall levels off (scripts/recipes/flickr8k.toml)."""
LARGE = 200_000
"""Images from which a ViT-B-32 is suggested instead of a small ResNet."""


@dataclass(frozen=True)
class StarterConfig:
    """A starter configuration and what it was derived from.

    Attributes:
        text: commented TOML.
        config: the same, parsed.
        images: number of images; None for a stream.
        image_side: median shorter side of a sample of the images, in pixels.
        path: file that was written, if any.
    """

    text: str
    config: TrainConfig
    images: int | None
    image_side: int
    path: Path | None


@dataclass(frozen=True)
class ConfigField:
    """One field of the training configuration.

    Attributes:
        name: as in ``--set``: ``section.key``.
        type: accepted values.
        default: value if the field is left out.
        description: what it does.
    """

    name: str
    type: str
    default: Any
    description: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def init_config(
    data: str | Path,
    out: str | Path | None = None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
    encoding: str | None = None,
) -> StarterConfig:
    """Write a commented starter configuration for image–caption pairs.

    Image size, model, batch size and epochs follow from the number of images and their median
    size; a comment beside each value explains it.

    Args:
        data: DATA to train on.
        out: TOML file to write; None returns the text only.
        image_column: column of the images; None finds it by its usual names.
        caption_column: column of the captions, likewise.
        image_root: folder that image paths start from; None finds it.
        encoding: of a CSV or TSV table; None finds it.

    Raises:
        DataError: the data cannot be opened, have no captions or no readable image.
        ConfigError: ``out`` exists.
    """
    path = None if out is None else Path(out)
    if path is not None and path.exists():
        raise ConfigError(f"{path} exists; name another file or delete it first")
    source = open_source(
        data, image=image_column, caption=caption_column, image_root=image_root, encoding=encoding
    )
    images = source.count
    side = _median_side(source)
    columns = {"image_column": image_column, "caption_column": caption_column}
    columns["encoding"] = encoding
    columns["image_root"] = None if image_root is None else str(image_root)
    text = _render(str(data), images, side, {k: v for k, v in columns.items() if v})
    config = parse_config(tomllib.loads(text), origin=f"the configuration for {data}")
    if path is not None:
        write_text(path, text)
    return StarterConfig(text, config, images, side, path)


def config_fields(section: str | None = None) -> list[ConfigField]:
    """Every field of the training configuration, or of one section, in order.

    Raises:
        ConfigError: there is no such section.
    """
    schema = TypeAdapter(TrainConfig).json_schema(mode="serialization")
    sections = list(schema["properties"])
    if section is not None and section not in sections:
        raise ConfigError(f"there is no section {section!r}, expected one of {', '.join(sections)}")
    found = []
    for name in sections if section is None else [section]:
        definition = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
        defaults = schema["properties"][name]["default"]
        found += [
            ConfigField(
                f"{name}.{key}", _type(item), defaults[key], " ".join(item["description"].split())
            )
            for key, item in definition["properties"].items()
        ]
    return found


def _type(item: dict[str, Any]) -> str:
    """A JSON schema type in words: ``number from 0 to 1``, ``"auto" or integer from 1``."""
    if "anyOf" in item:
        return " or ".join(_type(one) for one in item["anyOf"])
    if "const" in item:
        return json.dumps(item["const"])
    if "enum" in item:
        return " or ".join(map(json.dumps, item["enum"]))
    kind = item["type"]
    if kind == "array":
        if "prefixItems" in item:
            return f"list of {len(item['prefixItems'])}: {_type(item['prefixItems'][0])}"
        return "empty list" if item.get("maxItems") == 0 else f"list of {_type(item['items'])}"
    if kind == "object":
        return "table"
    low, high = item.get("minimum", item.get("ge")), item.get("maximum", item.get("le"))
    above = item.get("exclusiveMinimum", item.get("gt"))
    below = item.get("exclusiveMaximum", item.get("lt"))
    bounds = [
        f"{word} {bound:,}"
        for word, bound in (("from", low), ("above", above), ("to", high), ("below", below))
        if bound is not None
    ]
    return " ".join([kind, *bounds])


def _median_side(source: Source) -> int:
    """Median shorter side, in pixels, of a sample of readable images with captions."""
    sides: list[int] = []
    captions = False
    for row in _sample(source):
        captions = captions or bool(row.captions)
        try:
            sides.append(min(row.read_image().size))
        except ImageError:
            continue
    if not captions:
        raise no_captions(source)
    if not sides:
        raise DataError(f"none of the first images of {source.spec} can be read; run data check")
    return int(statistics.median(sides))


def _sample(source: Source) -> Iterator[Row]:
    if source.streaming:
        yield from islice(source.rows, SAMPLE)
        return
    rows = source.table
    for number in range(0, len(rows), math.ceil(len(rows) / SAMPLE)):
        yield rows[number]


def _render(data: str, images: int | None, side: int, columns: dict[str, str]) -> str:
    large = images is None or images >= LARGE
    amount = "a stream of unknown length" if images is None else f"{images:,} images"
    if large:
        model = (
            'name = "ViT-B-32" # 224 px, random weights; needs a GPU\n'
            "# To fine-tune a pretrained model instead, replace the line above with\n"
            '# init_from = "ViT-B-32/laion2b_s34b_b79k"'
        )
        batch, why_batch = 1024, "more pairs per batch are more negatives; lower it if memory ends"
        lr, why_lr = "5e-4", "open_clip's rate for ViT-B-32"
    else:
        size = next((s for s in (96, 64) if s <= side), 32)
        model = (
            "embed_dim = 256 # width of the shared vector space\n"
            "# A small CLIP ResNet that trains in minutes on a CPU. The median shorter side\n"
            f"# of the images is {side} px; image_size is a multiple of 32, time its square.\n"
            f"vision = {{ layers = [1, 1, 1, 1], width = 32, image_size = {size} }}\n"
            "text = { width = 256, heads = 4, layers = 2 }"
        )
        assert images is not None
        batch = max(2, min(256, 2 ** int(math.log2(max(images / 8, 2)))))
        why_batch = "each pair's negatives are the other pairs of its batch"
        lr, why_lr = "1e-3", "suits small towers with AdamW"
    if images is None:
        length = "steps = 10000 # the length of a stream is not known in advance"
    else:
        epochs = max(5, min(50, math.ceil(SAMPLES_SEEN / images)))
        every = max(1, epochs // 10)
        length = (
            f"epochs = {epochs} # about {epochs * images:,} training images in all\n"
            f"eval_every_epochs = {every}\nsave_every_epochs = {every}"
        )
    named = "".join(f"\n{name} = {json.dumps(value)}" for name, value in columns.items())
    return f"""\
# Starter configuration for {amount}. `clipkit config` lists every field.
# Train with: clipkit train THIS_FILE --out run

[model]
{model}

[data]
train = {json.dumps(data, ensure_ascii=False)}{named}
# 5 % of the images, at most 1,000, are held out to measure retrieval during training.

[augment]
crop_scale = [0.5, 1.0] # share of the area that the random crop keeps

[optim]
lr = {lr} # {why_lr}
warmup = 0.1 # share of the run

[train]
batch_size = {batch} # {why_batch}
{length}
"""
