"""Rows whose pictures and captions say which row they are, and loaders of them."""

import io
import time

import numpy as np
import torch
from PIL import Image

from clipkit.data.loader import PairLoader
from clipkit.data.source import Source, in_memory, to_batches


def png(value):
    """A picture of one grey value; the value says which row it is."""
    stream = io.BytesIO()
    Image.new("RGB", (6, 5), (value,) * 3).save(stream, "PNG")
    return stream.getvalue()


def row(number, *, image=None, captions=None):
    return {
        "key": f"{number:03}.png",
        "image": {"bytes": png(number) if image is None else image, "path": None},
        "captions": [f"{number}", f"{number} again"] if captions is None else captions,
        "label": None,
    }


def source(rows, *, streaming=False):
    table = in_memory(to_batches(rows, 1000), [])
    return Source("toy", "toy", table.stream() if streaming else table, None, "0", [])


def preprocess(image, generator):
    """The row's number in the first channel, a random number in the second."""
    pixels = np.array(image)
    pixels[..., 1] = generator.randrange(256)
    time.sleep(generator.random() / 1000)  # threads finish in another order than they start
    return pixels


def tokenize(captions):
    """Not ids but enough to tell captions apart: the number, and whether it is the second."""
    tokens = np.zeros((len(captions), 77), np.int64)
    tokens[:, 0] = [int(caption.split()[0]) for caption in captions]
    tokens[:, 1] = ["again" in caption for caption in captions]
    return tokens


def loader(source, **changes):
    settings = {
        "preprocess": preprocess,
        "tokenize": tokenize,
        "split": None,
        "batch_size": 8,
        "seed": 3,
        "workers": 2,
        "skip_limit": 0.0,
    }
    return PairLoader(source, **(settings | changes))


def batches(source, epoch=0, start=0, **changes):
    return list(loader(source, **changes).batches(epoch, start))


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
    return True
