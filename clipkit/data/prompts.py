"""Read labels and prompt templates, and combine them to captions for zero-shot classification."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from clipkit.data.labels import Label, check_paths, imagenet_labels, parse_label, to_labels
from clipkit.errors import CaptionError

SLOT = "{}"
IMAGENET = "imagenet"
TEMPLATE_SETS = ("openai", "simple")

# Averaging over several phrasings improves a label's vector: on ImageNet, one template gains 1.3
# points over bare labels and eighty gain another 3.5 (Radford et al. 2021, §3.1.4), most of it with
# the first few. These name no style or subject ("a sculpture of", "a type of pet") that could be
# wrong for the user's images. The bare slot is for labels that are already phrases or plurals.
DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "{}",
)

# Generic captions: a label must beat these if an image may match none of the labels.
BACKGROUND = (
    "a photo.",
    "a picture of something.",
    "a photo of an object.",
    "a photo of a place.",
    "a photo of a person.",
    "a photo of an animal.",
    "a photo of a plant.",
    "a photo of food.",
    "a photo of a building.",
    "a photo of a vehicle.",
    "a drawing.",
    "a page of text.",
    "a pattern.",
    "a blurry picture.",
)


def read_labels(labels: str | Path, *, single: bool = False) -> list[Label]:
    """Read labels from text like ``cat,dog,red fox``, a file with one per line, or ``imagenet``.

    A label may have phrases and groups, see ``parse_label``. Blank lines and surrounding spaces
    are ignored.

    Args:
        labels: the text, file or name.
        single: whether one label suffices, as of ``check_labels``.

    Raises:
        CaptionError: the file is missing or not UTF-8; there are too few labels; a label is
            empty or repeated (the tokenizer ignores case); or two labels have the same phrases.
    """
    text = str(labels)
    if text == IMAGENET and not os.path.isfile(text):
        return imagenet_labels()
    if os.path.isfile(text):
        lines, where = _lines(Path(text), "labels"), text
    elif isinstance(labels, Path) or _looks_like_path(text):
        raise CaptionError(
            f"{text} is not a file, expected a file with one label per line or labels like "
            "cat,dog,red fox; check the path"
        )
    else:
        lines, where = text.split(","), "the list of labels"
    found = [parse_label(line) for line in lines]
    check_labels(found, where, single=single)
    check_paths(found, where)
    return found


def _looks_like_path(text: str) -> bool:
    return "," not in text and ("/" in text or os.sep in text or bool(re.search(r"\.\w+$", text)))


def check_labels(
    labels: Sequence[str | Label], where: str = "the list of labels", *, single: bool = False
) -> None:
    """Check that there are two labels or more, none empty and none repeated.

    Args:
        labels: the labels.
        where: names the list in errors.
        single: whether one label suffices, because it is compared with background captions.

    Raises:
        TypeError: ``labels`` is a single string instead of a list.
        CaptionError: there are too few labels, or one is empty or repeated.
    """
    names = [str(label) for label in to_labels(labels)]
    if not any(names):
        raise CaptionError(f"{where} contains no labels, expected two or more; add them")
    if not all(names):
        raise CaptionError(
            f"{where} contains an empty label at position {names.index('') + 1}, "
            "expected text between the commas; remove the extra comma"
        )
    if len(names) == 1 and not single:
        raise CaptionError(
            f"{where} contains only {names[0]!r}, expected two or more labels, since the "
            "probability of a single label is always 1; add what else an image may show, or judge "
            "it by itself (clipkit classify --each)"
        )
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            raise CaptionError(
                f"{where} contains {name!r} twice (first as {seen[name.lower()]!r}), expected "
                "each label once, ignoring case; remove one"
            )
        seen[name.lower()] = name


def read_templates(name: str | Path | None) -> list[str]:
    """Read templates from a file with one per line, each with a slot ``{}``, or a known set.

    Args:
        name: a file; ``openai`` for the 80 templates that OpenAI evaluated on ImageNet with;
            ``simple`` for 7 of them that perform nearly as well; None for ``DEFAULT_TEMPLATES``.

    Raises:
        CaptionError: the file is missing, empty or not UTF-8 text, or a template has no slot.
    """
    if name is None:
        return list(DEFAULT_TEMPLATES)
    file = Path(name)
    if str(name) in TEMPLATE_SETS and not file.is_file():
        return _template_set(str(name))
    if not file.is_file():
        raise CaptionError(
            f"{file} is not a file, expected a file with one template per line, like "
            f"a photo of a {{}}., or one of {', '.join(TEMPLATE_SETS)}; check the path"
        )
    templates = _lines(file, "templates")
    if not templates:
        raise CaptionError(
            f"{file} contains no templates, expected one per line, for example a photo of a {{}}."
        )
    check_templates(templates)
    return templates


def _template_set(name: str) -> list[str]:
    from open_clip import zero_shot_metadata

    functions = getattr(zero_shot_metadata, f"{name.upper()}_IMAGENET_TEMPLATES")
    return [function(SLOT) for function in functions]


def check_templates(templates: Sequence[str]) -> None:
    """Check that each template has a slot.

    Raises:
        TypeError: ``templates`` is a single string instead of a list.
        CaptionError: a template has no slot.
    """
    if isinstance(templates, str):
        raise TypeError(
            f"templates is one string, {templates[:80]!r}, expected a list such as "
            f"['a photo of a {SLOT}.']"
        )
    for template in templates:
        if SLOT not in template:
            raise CaptionError(
                f"the template {template!r} has no slot, expected {SLOT} where the label goes; "
                f"write for example 'a photo of a {SLOT}.'"
            )


def label_captions(labels: Sequence[str | Label], templates: Sequence[str]) -> list[list[str]]:
    """The captions of each label, one per template and phrase: ``[labels][phrases × templates]``.

    Raises:
        TypeError: ``labels`` or ``templates`` is a single string instead of a list.
        CaptionError: a template has no slot.
    """
    check_templates(templates)
    # Not str.format, which would interpret braces in a label.
    return [
        [template.replace(SLOT, phrase) for phrase in label.phrases for template in templates]
        for label in to_labels(labels)
    ]


def _lines(file: Path, what: str) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CaptionError(
            f"cannot read {file}: {error}; expected {what} in UTF-8, one per line"
        ) from None
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]
