"""Picture formats beside JPEG and PNG, and those that take a plugin."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from clipkit.data import images
from clipkit.data.images import read_image
from clipkit.errors import ImageError
from clipkit.tasks.embed import embed
from tests.helpers.toys import ColourEncoder, square

FORMS = {
    "a.webp": {"format": "WEBP", "lossless": True},
    "a.gif": {"format": "GIF"},
    "a.tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "a.bmp": {"format": "BMP"},
    "a.jp2": {"format": "JPEG2000"},
    "a.avif": {"format": "AVIF", "quality": 100},
}


def ftyp(major, *compatible):
    """The first box of an ISO file, which says what is in it, and a few bytes more."""
    brands = b"".join(brand.encode() for brand in (major, "\0\0\0\0", *compatible))
    return (8 + len(brands)).to_bytes(4) + b"ftyp" + brands + bytes(100)


def test_every_format_in_one_folder(tmp_path):
    encoder = ColourEncoder()
    (tmp_path / "photos").mkdir()
    for name, form in FORMS.items():
        if form["format"] == "AVIF" and not features.check("avif"):
            continue
        square("magenta", size=32).save(tmp_path / "photos" / name, **form)
    frames = [square(colour, size=32) for colour in ("magenta", "green")]
    frames[0].save(tmp_path / "photos" / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "photos" / "pages.tif", save_all=True, append_images=frames[1:])
    (tmp_path / "photos" / "phone.heic").write_bytes(ftyp("heic", "mif1", "heic"))
    store = embed(tmp_path / "photos", tmp_path / "store", encoder)
    assert set(store.keys) >= {*FORMS, "moving.gif", "pages.tif"} - {"a.avif"}
    expected = encoder.encode_images([square("magenta")])
    for vector in store.vectors():
        assert vector @ expected[0] > 0.999
    assert [key for key, _ in store.skipped()] == ["phone.heic"]


@pytest.fixture
def formats(monkeypatch):
    """Sets which formats there are, and forgets afterwards what a plugin registered."""
    readers = {name: reader for name, reader in Image.OPEN.items() if name != "HEIF"}
    monkeypatch.setattr(Image, "OPEN", readers)
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    images._formats.cache_clear()
    yield monkeypatch
    images._formats.cache_clear()


@pytest.mark.parametrize(
    "head", [ftyp("heic", "mif1", "heic"), ftyp("mif1", "heic", "miaf"), ftyp("hevc", "msf1")]
)
def test_heic_without_its_plugin_names_the_extra(formats, head):
    formats.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC image, .*pip install 'clipkit\[heif\]'"):
        read_image(head)


def test_avif_without_its_plugin_names_pillows_version(formats):
    images._formats()
    Image.OPEN.pop("AVIF", None)
    images._formats.cache_clear()
    formats.setattr(Image, "init", lambda: None)
    with pytest.raises(ImageError, match=r"AVIF image, .*11\.3.*upgrade Pillow"):
        read_image(ftyp("avif", "mif1", "miaf"))


@pytest.mark.parametrize("head", [ftyp("mp42", "isom"), b"\0\0\0\x18ftyp", b"ftypheic", b"GIF"])
def test_what_is_no_picture_names_no_plugin(head):
    with pytest.raises(ImageError) as caught:
        read_image(head)
    assert "install" not in str(caught.value)
    assert "upgrade" not in str(caught.value)


def test_a_damaged_avif_is_no_heic(formats):
    formats.setitem(sys.modules, "pillow_heif", None)
    if features.check("avif"):
        with pytest.raises(ImageError) as caught:
            read_image(ftyp("avif", "mif1", "miaf"))
        assert "HEIC" not in str(caught.value)


class ToyHeif(ImageFile.ImageFile):
    """Reads a picture of one colour, whatever the file holds."""

    format = "HEIF"

    def _open(self):
        self._size, self._mode = (8, 6), "RGB"

    def load(self):
        self.im = Image.new("RGB", self.size, (10, 200, 30)).im
        return Image.Image.load(self)


def test_the_plugin_is_registered_when_it_is_there(formats):
    def register():
        Image.register_open("HEIF", ToyHeif, lambda head: head[4:12] == b"ftypheic")

    formats.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    picture = read_image(ftyp("heic", "mif1"))
    assert picture.size == (8, 6)
    assert picture.getpixel((3, 3)) == (10, 200, 30)


def test_real_heic(formats):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    stream = io.BytesIO()
    square("cyan", size=64).save(stream, "HEIF", quality=95)
    picture = np.asarray(read_image(stream.getvalue()))
    assert picture.shape == (64, 64, 3)
    assert np.abs(picture.astype(int) - (0, 255, 255)).max() < 10
