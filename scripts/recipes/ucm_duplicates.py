"""How pairs that say the same are best counted: runs of each setting and seed, and a table.

    python scripts/recipes/ucm_duplicates.py OUT WEIGHTS --seeds 5 --batch-size 256

Every run is measured on the held-out photos: recall where an equal caption of another photo counts
as wrong ("apart", the usual protocol) and where it counts as right ("merged"), and the accuracy of
zero-shot classification among the labels. Means stand with their standard errors over the seeds,
and so do differences to `ignore`, taken seed by seed. Runs that are there already are not repeated.

Equal captions have equal vectors, so that `positive` comes to `ignore` but for rounding; `mask`
leaves out 0.3 % of the negatives, and over five seeds no figure differed by more than twice its
standard error.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

import clipkit
from clipkit.artifacts import is_complete
from clipkit.config import TrainConfig, load_config
from clipkit.data.labels import own_labels, targets_of
from clipkit.data.open_source import Source, open_source
from clipkit.evaluation.report import measure_retrieval, pair_up
from clipkit.models.embed_source import encode_pairs

RECIPE = Path(__file__).with_suffix(".toml")
SETTINGS = ("mask", "positive", "ignore")
TEMPLATES = ("This is a {} .", "There is a {} .", "Here is a {} .")  # as these captions begin
RECALLS = ("text_to_image_r1", "text_to_image_r10", "image_to_text_r1", "image_to_text_r10")

Figures = dict[str, float]


def measure(run: Path, source: Source) -> Figures:
    """The figures of a finished run."""
    encoder = clipkit.load_model(run)
    pairs = encode_pairs(encoder, source, workers=2, progress=False)
    found = {}
    for protocol in ("apart", "merge"):
        related = pair_up(pairs.texts, pairs.owners, protocol)
        figures = measure_retrieval(pairs.images, pairs.captions, related)[1]
        found |= {f"{name} {protocol}": figures[name].value for name in RECALLS}
    labels = own_labels(pairs.labels, source.spec)
    rows, targets = targets_of(pairs.labels, labels, source.spec)
    classifier = clipkit.ZeroShotClassifier.from_labels(encoder, labels, TEMPLATES)
    found["zero-shot"] = float(
        np.mean(classifier.logits(pairs.images[rows]).argmax(axis=1) == targets)
    )
    return found


def configured(options: argparse.Namespace, duplicates: str, seed: int) -> TrainConfig:
    """The recipe with what differs from run to run."""
    recipe = load_config(RECIPE)
    features, weights = str(options.out / "features"), str(options.weights)
    loop = replace(
        recipe.train,
        duplicates=duplicates,
        seed=seed,
        batch_size=options.batch_size,
        steps=options.steps,
    )
    return replace(
        recipe,
        model=replace(recipe.model, image_weights=weights),
        data=replace(recipe.data, features=features),
        train=loop,
    )


def shown(values: list[float]) -> str:
    """Mean and standard error, in percentage points."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{100 * np.mean(values):6.1f} ± {100 * error:3.1f}"


def table(found: dict[str, list[Figures]]) -> str:
    """A row a figure: each setting, then how far it is from `ignore`, seed by seed."""
    base = found["ignore"]
    others = [name for name in found if name != "ignore"]
    heads = [*found, *(f"{name} − ignore" for name in others)]
    lines = [f"{'%':24}" + "".join(f"{head:>18}" for head in heads)]
    for figure in base[0]:
        values = [[seed[figure] for seed in seeds] for seeds in found.values()]
        values += [
            [one[figure] - other[figure] for one, other in zip(found[name], base, strict=True)]
            for name in others
        ]
        lines.append(f"{figure:24}" + "".join(f"{shown(row):>18}" for row in values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a directory for features and runs")
    parser.add_argument("weights", type=Path, help="of the image tower, in timm's layout")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    name = f"{options.batch_size}x{options.steps}"
    found: dict[str, list[Figures]] = {name: [] for name in SETTINGS}
    for seed in range(options.seeds):
        for duplicates in SETTINGS:
            run = options.out / f"{duplicates}-{name}-{seed}"
            config = configured(options, duplicates, seed)
            if not is_complete(run):
                result = clipkit.train(config, run, resume=any(run.glob("step-*")))
                if not result.finished:
                    raise SystemExit(f"stopped in {run}; the same command goes on")
            figures = measure(run, open_source(config.data.held_out))
            found[duplicates].append(figures)
            print(run.name, *(f"{name} {value:.3f}" for name, value in figures.items()), sep="  ")
    print(f"\n{options.steps} steps of {options.batch_size} pairs, {options.seeds} seeds")
    print(table(found))


if __name__ == "__main__":
    main()
