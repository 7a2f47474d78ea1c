"""Encode photos end to end: clipkit, a plain open_clip loop and clip-retrieval, in alternation.

    python -m scripts.benchmarks.encoding.end_to_end PHOTOS.parquet --clip-retrieval PYTHON

All encode the same JPEG files with the same ViT-B-32 with random weights. Each contender is a
process that first loads the model and encodes a few photos. Then they alternate. Each round is
timed from the folder of photos to vectors in memory (open_clip) or on disk (the others).

clip-retrieval 2.45 pins other versions, so it needs its own environment
(`pip install clip-retrieval==2.45.0 "setuptools<70"`). It is skipped without --clip-retrieval.

Finally, the image towers alone are compared on decoded images, with the measured peak of matrix
products for reference.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchmarks.common.timing import ratios, spread

BATCH = 64
COUNTS = {"224": 512, "2MP": 128, "12MP": 64}
MARK = "##"  # precedes the answers of a contender, because libraries print too


# --- The contenders: each encodes a folder and returns the number of vectors ---------------------


def clipkit(weights: str, decode: str = "exact") -> dict[str, Callable[[Path, Path], int]]:
    """`clipkit embed --decode …` in this process."""
    encoder = __import__("clipkit").load_model(f"ViT-B-32/{weights}")
    from clipkit.tasks.embed import embed

    def run(folder: Path, out: Path) -> int:
        return len(embed(folder, out, encoder, decode=decode))

    def towers(folder: Path, _: Path) -> int:
        from clipkit.data.images import read_image
        from clipkit.data.transforms import as_batch

        files = sorted(folder.glob("*.jpg"))[: 4 * BATCH]
        batch = as_batch([encoder.preprocess.pixels(read_image(file)) for file in files])
        return _timed(lambda: encoder.encode_images(batch), len(files))

    return {"run": run, "towers": towers}


def open_clip(weights: str) -> dict[str, Callable[[Path, Path], int]]:
    """A typical open_clip loop: its transform in a DataLoader, its model in fp32."""
    import open_clip as library
    import torch
    from PIL import Image

    model, _, transform = library.create_model_and_transforms("ViT-B-32", pretrained=weights)
    model.eval()

    class Photos(torch.utils.data.Dataset):
        def __init__(self, folder: Path) -> None:
            self.files = sorted(folder.glob("*.jpg"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(self.files[index]))

    @torch.inference_mode()
    def run(folder: Path, _: Path) -> int:
        loader = torch.utils.data.DataLoader(Photos(folder), batch_size=BATCH, num_workers=2)
        vectors = [model.encode_image(batch, normalize=True).numpy() for batch in loader]
        return sum(map(len, vectors))

    @torch.inference_mode()
    def towers(folder: Path, _: Path) -> int:
        photos = Photos(folder)
        batch = torch.stack([photos[n] for n in range(min(len(photos), 4 * BATCH))])
        parts = batch.split(BATCH)
        return _timed(lambda: [model.encode_image(part) for part in parts], len(batch))

    return {"run": run, "towers": towers}


def clip_retrieval(weights: str) -> dict[str, Callable[[Path, Path], int]]:
    """`clip-retrieval inference`, which keeps its model loaded after the first call."""
    from clip_retrieval.clip_inference.worker import worker

    def run(folder: Path, out: Path) -> int:
        count = len(list(folder.glob("*.jpg")))
        worker(
            tasks=[0],
            input_dataset=str(folder),
            output_folder=str(out),
            output_partition_count=1,
            batch_size=BATCH,
            num_prepro_workers=2,
            enable_text=False,
            use_jit=False,
            clip_model=f"open_clip:ViT-B-32/{weights}",
        )
        return count

    return {"run": run}


def _timed(encode: Callable[[], Any], count: int) -> int:
    """Microseconds per image of a second pass."""
    encode()
    start = time.perf_counter()
    encode()
    return round(1e6 * (time.perf_counter() - start) / count)


def serve(name: str, weights: str) -> None:
    """Read requests ``[what, folder, out]``, one per line; answer with a number and seconds."""
    tasks = CONTENDERS[name](weights)
    for line in sys.stdin:
        what, folder, out = json.loads(line)
        start = time.perf_counter()
        number = tasks[what](Path(folder), Path(out))
        print(f"{MARK}{json.dumps([number, time.perf_counter() - start])}", flush=True)


CONTENDERS = {
    "clipkit": clipkit,
    "clipkit fast": partial(clipkit, decode="fast"),
    "open_clip": open_clip,
    "clip-retrieval": clip_retrieval,
}
OURS = ("clipkit", "clipkit fast")
TOWERS = ("clipkit", "open_clip")  # contenders whose image towers are compared


# --- The comparison ------------------------------------------------------------------------------


class Contender:
    """A process that serves requests."""

    def __init__(self, name: str, python: str, weights: Path, scratch: Path) -> None:
        self.name, self.requests, self.scratch = name, 0, scratch
        command = [python, "-m", __spec__.name, "--serve", name, "--weights", str(weights)]
        self.log = scratch / f"{name}.log"
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            if name == "clip-retrieval"
            else None,
        )

    def request(self, what: str, folder: Path) -> tuple[int, float]:
        """Send a request; returns its number and seconds."""
        self.requests += 1
        out = self.scratch / f"{self.name.replace(' ', '-')}-{self.requests}"
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([what, str(folder), str(out)]) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                number, seconds = json.loads(line.removeprefix(MARK))
                return number, seconds
        sys.exit(f"error: {self.name} exited:\n{self.log.read_text()[-2000:]}")


def save_weights(file: Path) -> None:
    """Save random weights of a ViT-B-32, with a fixed seed."""
    import open_clip as library
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = library.create_model("ViT-B-32").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def matmul_peak(dtype: str, size: int = 2048) -> float:
    """Peak rate of a large matrix product on this machine, in TFLOP/s."""
    import torch

    one, other = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


def compare(contenders: list[Contender], size: str, folder: Path, rounds: int) -> None:
    """Alternate the contenders on a folder; print images/s and the ratios to each peer."""
    speeds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        # Reverse the order each round, so that no contender always follows the same one.
        for contender in contenders[:: 1 if number % 2 else -1]:
            count, seconds = contender.request("run", folder)
            speeds[contender.name].append(count / seconds)
    bytes_each = statistics.mean(file.stat().st_size for file in folder.glob("*.jpg"))
    print(f"\n{size}: {len(list(folder.glob('*.jpg')))} photos of {bytes_each / 1e6:.2f} MB")
    for name, found in speeds.items():
        print(f"{name:15} {spread(found, 1):>22} images/s")
        for own in OURS if name not in OURS else ():
            print(f"{'':15}   {own} / {name}: {spread(ratios(speeds[own], found))}")


def compare_towers(contenders: list[Contender], folder: Path, rounds: int) -> None:
    """Alternate the image towers alone; print images/s and the share of the peak."""
    import open_clip as library

    from scripts.benchmarks.common.flops import image_flops

    found: dict[str, list[float]] = {c.name: [] for c in contenders if c.name in TOWERS}
    for _ in range(rounds):
        for contender in contenders:
            if contender.name in found:
                found[contender.name].append(1e6 / contender.request("towers", folder)[0])
    peaks = {dtype: matmul_peak(dtype) for dtype in ("float32", "bfloat16")}
    flops = image_flops(library.create_model("ViT-B-32").eval()) / 1e12
    shown = ", ".join(f"{dtype} {peak:.2f} TFLOP/s" for dtype, peak in peaks.items())
    print(
        f"\nthe image tower alone, {1000 * flops:.2f} GFLOP per image; "
        f"peak of matrix products: {shown}"
    )
    for name, speeds in found.items():
        shares = ", ".join(
            f"{statistics.median(speeds) * flops / peak:.0%} of the {dtype} peak"
            for dtype, peak in peaks.items()
        )
        print(f"{name:15} {spread(speeds, 1):>22} images/s   {shares}")


def main() -> None:
    """Prepare photos and weights, start the contenders and alternate them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "photos", type=Path, nargs="?", help="Parquet file with photos of 224 pixels"
    )
    parser.add_argument("--sizes", nargs="*", choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--share", type=float, default=1.0, help="scale the number of photos by this factor"
    )
    parser.add_argument(
        "--clip-retrieval", metavar="PYTHON", help="Python of an environment with it"
    )
    parser.add_argument("--scratch", type=Path, help="folder to keep photos and weights")
    parser.add_argument("--serve", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.weights)
        return
    from scripts.benchmarks.encoding.photos import write_photos

    sys.stdout.reconfigure(line_buffering=True)  # show results even if interrupted
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        weights = scratch / "vit-b-32.safetensors"
        if not weights.exists():
            save_weights(weights)
        folders = {
            size: write_photos(
                options.photos, scratch, size, max(1, int(COUNTS[size] * options.share))
            )
            for size in options.sizes
        }
        few = write_photos(options.photos, scratch / "few", "224", 8)
        pythons = dict.fromkeys((*OURS, "open_clip"), sys.executable)
        if options.clip_retrieval:
            pythons["clip-retrieval"] = options.clip_retrieval
        else:
            print("clip-retrieval is skipped: give --clip-retrieval PYTHON")
        contenders = [
            Contender(name, python, weights, Path(temporary)) for name, python in pythons.items()
        ]
        for contender in contenders:
            contender.request("run", few)
        for size, folder in folders.items():
            compare(contenders, size, folder, options.rounds)
        compare_towers(contenders, next(iter(folders.values())), options.rounds)
        for contender in contenders:
            contender.process.stdin.close()
            contender.process.wait()


if __name__ == "__main__":
    main()
