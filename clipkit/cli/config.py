"""clipkit init and clipkit config."""

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.options import CaptionColumn, Data, Encoding, ImageColumn, ImageRoot, Json
from clipkit.cli.output import note, print_json, print_text


def init(
    data: Data,
    out: Annotated[Path, typer.Option(help="TOML file to write.")] = Path("train.toml"),
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    as_json: Json = False,
) -> None:
    """Write a commented training configuration for your data.

    Image size, model, batch size and epochs are chosen from the number of images and their size.
    """
    from clipkit.tasks.config import init_config

    found = init_config(
        data,
        out,
        image_column=image_column,
        caption_column=caption_column,
        image_root=image_root,
        encoding=encoding,
    )
    if as_json:
        facts = {"config": str(out), "images": found.images, "image_side": found.image_side}
        print_json({**facts, "text": found.text})
    else:
        print_text(found.text)
    note(f"wrote {out}; train with: clipkit train {out} --out run")


def config(
    section: Annotated[
        str | None, typer.Argument(help="model, data, augment, optim or train; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List all fields of a training configuration.

    With type, default and description."""
    from clipkit.tasks.config import config_fields

    for field in config_fields(section):
        if as_json:
            print_json(field.to_dict())
            continue
        default = json.dumps(field.default, ensure_ascii=False)
        print_text(f"{field.name} = {default}  ({field.type})")
        print_text(textwrap.indent(textwrap.fill(field.description, 96), "    "))
