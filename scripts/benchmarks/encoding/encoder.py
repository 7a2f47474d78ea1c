"""Tokenizer, text encoding and image encoding: clipkit and open_clip with the same weights.

    python -m scripts.benchmarks.encoding.encoder PAIRS.parquet
    python -m scripts.benchmarks.encoding.encoder PAIRS.parquet --only images --weights WEIGHTS

The ViT-B-32 has random weights, so that nothing is downloaded. `--weights` adds a convolutional
tower, an EfficientNet-Lite2 with the weights that scripts/recipes/efficientnet_weights.py writes;
its vectors of real photos vary as much as those of a trained model.
"""

import argparse
import io
import multiprocessing
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipkit.artifacts import ModelRef
from clipkit.config import parse_config
from clipkit.data.transforms import Preprocess
from clipkit.models import tokenizer
from clipkit.models.checkpoint import vector_dim
from clipkit.models.encoder import Encoder
from clipkit.models.inference_precision import prepare
from clipkit.training.build import build_towers
from scripts.benchmarks.common.flops import image_flops, matrix_peaks, share_of_peak
from scripts.benchmarks.common.timing import Times, alternate, ratios, spread

MODEL = "ViT-B-32"
CONVOLUTIONAL = {
    "embed_dim": 512,
    "vision": {
        "timm_model_name": "tf_efficientnet_lite2",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 260,
    },
    "text": {"width": 64, "heads": 1, "layers": 1},
}


def show(times: Times, items: int, unit: str, peer: str = "open_clip") -> None:
    """Print the rate of each contender and its speed relative to the peer."""
    for name, seconds in times.items():
        rate = items / statistics.median(seconds)
        relative = "" if name == peer else f"  {spread(ratios(times[peer], seconds))} times {peer}"
        print(f"  {name:24} {rate:10.1f} {unit}/s{relative}")


MANY = 20
"""Repetitions of the captions for two processes, so that dispatching the work costs little."""
halves: list[list[str]] = []


def tokenize_half(number: int) -> int:
    """The work of one process, forked with the captions and cached words in memory."""
    return len(tokenizer.tokenize(halves[number]))


def bench_tokenizer(captions: list[str], rounds: int) -> None:
    """Compare the tokenizers with an empty cache and a warm one, on one and two threads.

    Also with two processes, each with half of the captions, like the workers of a loader.
    """
    print(f"tokenizer, {len(captions)} captions")
    warm = open_clip.SimpleTokenizer()
    warm(captions)

    def ours_cold() -> None:
        tokenizer._chunks.clear()
        tokenizer.tokenize(captions)

    def on_two(tokenize: Callable[[list[str]], Any]) -> None:
        half = len(captions) // 2
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(tokenize, (captions[:half], captions[half:])))

    runs: dict[str, Callable[[], Any]] = {
        "open_clip": lambda: warm(captions),
        "open_clip, empty cache": lambda: open_clip.SimpleTokenizer()(captions),
        "clipkit, empty cache": ours_cold,
        "clipkit": lambda: tokenizer.tokenize(captions),
        "clipkit, two threads": lambda: on_two(tokenizer.tokenize),
        "open_clip, two threads": lambda: on_two(warm),
    }
    show(alternate(runs, rounds), len(captions), "captions")
    many = captions * MANY
    halves[:] = many[::2], many[1::2]
    with multiprocessing.get_context("fork").Pool(2) as workers:
        runs = {
            "one process": lambda: tokenizer.tokenize(many),
            "two processes": lambda: workers.map(tokenize_half, (0, 1), 1),
        }
        show(alternate(runs, rounds), len(many), "captions", "one process")


def encoder(clip: Any, precision: Any) -> Encoder:
    """A clipkit encoder of a copy of an open_clip model."""
    network = prepare(deepcopy(clip), precision, torch.device("cpu"))
    model = ModelRef("benchmark", "", "", vector_dim(clip), network.precision)
    return Encoder(network, model, Preprocess.of(clip.visual.preprocess_cfg))


def bench_captions(clip: Any, captions: list[str], count: int, rounds: int) -> None:
    """Compare text encoding on distinct captions of 8 to 24 tokens."""
    lengths = (tokenizer.tokenize(captions).argmax(axis=1) + 1).tolist()
    fitting = [c for c, n in zip(captions, lengths, strict=True) if 8 <= n <= 24]
    texts = list(dict.fromkeys(fitting))[:count]
    tokens = open_clip.SimpleTokenizer()(texts)
    print(f"captions, {MODEL}, {len(texts)} of 8 to 24 tokens")
    encoders = {name: encoder(clip, name) for name in ("fp32", "auto")}

    def theirs() -> Tensor:
        with torch.inference_mode():
            parts = torch.split(tokens, 64)
            return torch.cat([clip.encode_text(part, normalize=True) for part in parts])

    runs: dict[str, Callable[[], Any]] = {"open_clip": theirs}
    for name, ours in encoders.items():
        # clipkit starts from strings, so its time includes the tokenizer.
        runs[_label(name, ours, "text")] = lambda ours=ours: ours.encode_text(texts)
    show(alternate(runs, rounds), len(texts), "captions")
    for name, ours in encoders.items():
        compare(_label(name, ours, "text"), ours.encode_text(texts), theirs())


def _label(precision: str, encoder: Encoder, tower: str) -> str:
    found = encoder.network.precisions[tower]
    return f"clipkit {precision}" + ("" if found == precision else f" ({found})")


def bench_images(
    name: str, clip: Any, images: Tensor, peaks: dict[str, float], rounds: int
) -> None:
    """Compare image encoding on preprocessed images in batches of 64."""
    work = image_flops(clip)
    print(f"images, {name}, {len(images)} photos, {work / 1e9:.2f} GFLOP per image")
    encoders = {precision: encoder(clip, precision) for precision in ("fp32", "auto", "bf16")}

    def theirs(size: int = 64) -> Tensor:
        with torch.inference_mode():
            parts = torch.split(images, size)
            return torch.cat([clip.encode_image(part, normalize=True) for part in parts])

    # A convolutional tower allocates gigabytes for 64 images, anew for each batch.
    runs: dict[str, Callable[[], Any]] = {
        "open_clip": theirs,
        "open_clip, batches of 4": lambda: theirs(4),
    }
    for precision, ours in encoders.items():
        runs[_label(precision, ours, "image")] = lambda ours=ours: ours.encode_images(images)
    times = alternate(runs, rounds)
    show(times, len(images), "images")
    rates = {run: work * len(images) / statistics.median(times[run]) for run in times}
    limit = peaks["bf16"] / rates["open_clip"]
    print(f"  open_clip reaches {share_of_peak(rates['open_clip'], peaks, 'fp32')}; ", end="")
    print(f"an encoder at the bf16 peak would be {limit:.2f} times as fast")
    expected = theirs()
    for precision, ours in encoders.items():
        label = _label(precision, ours, "image")
        share = share_of_peak(rates[label], peaks, ours.network.precision)
        compare(label, ours.encode_images(images), expected, f", {share}")


def compare(name: str, ours: NDArray[np.float32], expected: Tensor, more: str = "") -> None:
    """Print the worst agreement of the vectors, also after centring.

    With random weights, most of a vector is the mean that all vectors share.
    """
    theirs = expected.numpy()
    plain = np.sum(ours * theirs, axis=1).min()
    mean = theirs.mean(axis=0)
    centred = F.cosine_similarity(torch.from_numpy(ours - mean), torch.from_numpy(theirs - mean))
    worst = np.abs(ours - theirs).max()
    print(
        f"  {name:24} worst cosine {plain:.6f}, centred {float(centred.min()):.5f}, "
        f"largest difference {worst:.1e}{more}"
    )


def read_photos(file: Path, size: tuple[int, int], count: int) -> Tensor:
    """Photos as float32 [count, 3, height, width], normalised as for EfficientNet-Lite."""
    rows = pq.read_table(file, columns=["image"]).slice(0, count).to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    pixels = [np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().sub(127).div(128)


def build_convolutional(weights: Path) -> Any:
    """An open_clip model with an EfficientNet-Lite2."""
    settings = {"model": {**CONVOLUTIONAL, "image_weights": str(weights)}}
    warnings.simplefilter("ignore")  # the classifier in the file is not loaded
    return build_towers(parse_config(settings).model, 0.07, seed=0).clip.eval()


def main() -> None:
    """Run the selected parts."""
    parts = ("tokenizer", "captions", "images")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path, help="Parquet file with images and captions")
    parser.add_argument("--only", choices=parts, nargs="*", default=parts)
    parser.add_argument(
        "--weights", type=Path, help="weights of EfficientNet-Lite2, with timm's names"
    )
    parser.add_argument("--photos", type=int, default=128)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    texts = pq.read_table(options.pairs, columns=["captions"])["captions"].to_pylist()
    captions = [caption for several in texts for caption in several]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "tokenizer" in options.only:
        bench_tokenizer(captions, options.rounds)
    torch.manual_seed(0)
    clip = open_clip.create_model(MODEL).eval()
    if "captions" in options.only:
        bench_captions(clip, captions, options.captions, options.rounds)
    if "images" not in options.only:
        return
    peaks = matrix_peaks(options.rounds)
    towers = {MODEL: clip}
    if options.weights:
        towers["EfficientNet-Lite2"] = build_convolutional(options.weights)
    for name, model in towers.items():
        images = read_photos(options.pairs, model.visual.image_size, options.photos)
        bench_images(name, model, images, peaks, options.rounds)


if __name__ == "__main__":
    main()
