"""Photos to vectors end to end: clipkit, the plain open_clip loop, and clip-retrieval, in turn.

python scripts/bench_encode.py ../shared/data/flickr8k-224-dev.parquet \
    --clip-retrieval /path/to/its/environment/bin/python

All encode the same JPEG files with the same ViT-B-32 of random weights, saved once. Each is a
process that loads the model and encodes a few photos first; then they take turns, and a turn is
timed from the folder of photos to vectors in hand (open_clip) or on disk (the others).
clip-retrieval 2.45 pins other versions, so it lives in an environment of its own
(`pip install clip-retrieval==2.45.0 "setuptools<70"`) and is left out without --clip-retrieval.
Last, the towers alone are compared, on pictures decoded before, with the peak of matrix products
measured here.
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

BATCH = 64
COUNTS = {"224": 512, "2MP": 128, "12MP": 64}
MARK = "##"  # before what a contender answers, for libraries print too


# --- the contenders: each turns a folder into vectors, and returns how many ----------------------


def clipkit(weights: str, decode: str = "exact") -> dict[str, Callable[[Path, Path], int]]:
    """`clipkit embed --decode …`, in this process."""

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
    """What one writes with open_clip: its transform in a DataLoader, its model in fp32."""
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
    """`clip-retrieval inference`, whose model stays loaded from the first call on."""
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
    """Encode once more and say how long it took, in microseconds a picture."""
    encode()
    start = time.perf_counter()
    encode()
    return round(1e6 * (time.perf_counter() - start) / count)


def serve(name: str, weights: str) -> None:
    """Take orders, ``[what, folder, out]`` a line, and answer each with a number and seconds."""
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
TOWERS = ("clipkit", "open_clip")  # whose image towers are compared alone


# --- the referee ---------------------------------------------------------------------------------


class Contender:
    """A process that waits for orders."""

    def __init__(self, name: str, python: str, weights: Path, scratch: Path) -> None:
        self.name, self.turns, self.scratch = name, 0, scratch
        command = [python, __file__, "--serve", name, "--weights", str(weights)]
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

    def order(self, what: str, folder: Path) -> tuple[int, float]:
        """Have something done; returns its number and the seconds it took."""
        self.turns += 1
        out = self.scratch / f"{self.name.replace(' ', '-')}-{self.turns}"
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([what, str(folder), str(out)]) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                number, seconds = json.loads(line.removeprefix(MARK))
                return number, seconds
        sys.exit(f"error: {self.name} ended:\n{self.log.read_text()[-2000:]}")


def save_weights(file: Path) -> None:
    """Weights of a ViT-B-32, random and always the same."""
    import open_clip as library
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = library.create_model("ViT-B-32").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def matmul_peak(dtype: str, size: int = 2048) -> float:
    """The best rate of a large matrix product here, in TFLOP/s."""
    import torch

    one, other = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


def image_flops() -> float:
    """Operations of a ViT-B-32's image tower for one picture, a product and a sum being two."""
    import open_clip as library
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = library.create_model("ViT-B-32").eval()
    # With gradients: without, attention runs in one piece that is not counted.
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops()


def spread(values: list[float], digits: int = 1) -> str:
    """The median, and the least and the largest."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def compare(contenders: list[Contender], size: str, folder: Path, rounds: int) -> None:
    """Have all encode a folder in turn; print images a second, and clipkit's over theirs."""
    speeds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        # The order turns round, so that no one always follows the same one.
        for contender in contenders[:: 1 if number % 2 else -1]:
            count, seconds = contender.order("run", folder)
            speeds[contender.name].append(count / seconds)
    bytes_each = statistics.mean(file.stat().st_size for file in folder.glob("*.jpg"))
    print(f"\n{size}: {len(list(folder.glob('*.jpg')))} photos of {bytes_each / 1e6:.2f} MB")
    for name, found in speeds.items():
        print(f"{name:15} {spread(found):>22} images/s")
        for own in OURS if name not in OURS else ():
            ratios = [ours / theirs for ours, theirs in zip(speeds[own], found, strict=True)]
            print(f"{'':15}   {own} over it: {spread(ratios, 2)}")


def compare_towers(contenders: list[Contender], folder: Path, rounds: int) -> None:
    """Encode alone, in turn, and what share of the peak of matrix products that is."""
    found: dict[str, list[float]] = {c.name: [] for c in contenders if c.name in TOWERS}
    for _ in range(rounds):
        for contender in contenders:
            if contender.name in found:
                found[contender.name].append(1e6 / contender.order("towers", folder)[0])
    peaks = {dtype: matmul_peak(dtype) for dtype in ("float32", "bfloat16")}
    flops = image_flops() / 1e12
    shown = ", ".join(f"{dtype} {peak:.2f} TFLOP/s" for dtype, peak in peaks.items())
    print(f"\nthe image tower alone; {1000 * flops:.2f} GFLOP a picture; peak of products: {shown}")
    for name, speeds in found.items():
        shares = ", ".join(
            f"{statistics.median(speeds) * flops / peak:.0%} of the {dtype} peak"
            for dtype, peak in peaks.items()
        )
        print(f"{name:15} {spread(speeds):>22} images/s   {shares}")


def main() -> None:
    """Make photos and weights, start the contenders, let them take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, nargs="?", help="Parquet with photos of 224 pixels")
    parser.add_argument("--sizes", nargs="*", choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of photos")
    parser.add_argument("--clip-retrieval", metavar="PYTHON", help="of an environment that has it")
    parser.add_argument("--scratch", type=Path, help="where photos and weights are kept")
    parser.add_argument("--serve", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.weights)
        return
    from bench_photos import write_photos

    sys.stdout.reconfigure(line_buffering=True)  # what is measured is seen, even if cut off
    with tempfile.TemporaryDirectory() as temporary:
        kept = options.scratch or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        weights = kept / "vit-b-32.safetensors"
        if not weights.exists():
            save_weights(weights)
        folders = {
            size: write_photos(
                options.photos, kept, size, max(1, int(COUNTS[size] * options.share))
            )
            for size in options.sizes
        }
        few = write_photos(options.photos, kept / "few", "224", 8)
        pythons = dict.fromkeys((*OURS, "open_clip"), sys.executable)
        if options.clip_retrieval:
            pythons["clip-retrieval"] = options.clip_retrieval
        else:
            print("without clip-retrieval: no --clip-retrieval PYTHON was given")
        contenders = [
            Contender(name, python, weights, Path(temporary)) for name, python in pythons.items()
        ]
        for contender in contenders:
            contender.order("run", few)
        for size, folder in folders.items():
            compare(contenders, size, folder, options.rounds)
        compare_towers(contenders, next(iter(folders.values())), options.rounds)
        for contender in contenders:
            contender.process.stdin.close()
            contender.process.wait()


if __name__ == "__main__":
    main()
