import io
import os
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from clipkit.data.images import MAX_PIXELS, Skipped, content_hash, find_images, read_image
from clipkit.errors import DataError, ImageError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, colour, rows, *extra):
    """A PNG written by hand, for what Pillow does not write. Colour 0 grey, 2 RGB, 4 LA, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def quarters():
    """8 x 6: red, green over blue, white; no symmetry maps it onto itself."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:3, :4], pixels[:3, 4:], pixels[3:, :4] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    pixels[3:, 4:] = 255
    return pixels


def reason(source):
    with pytest.raises(ImageError) as caught:
        read_image(source)
    return str(caught.value)


def test_a_plain_file_and_its_bytes_read_alike(tmp_path):
    pixels = quarters()
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(pixels)))
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        image = read_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)


def test_a_path_may_be_a_str(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (200, 10, 30)).save(path)
    assert read_image(str(path)).getpixel((0, 0)) == (200, 10, 30)
    assert content_hash(str(path)) == content_hash(path.read_bytes())
    assert find_images(str(tmp_path)) == (["a.png"], [])
    with pytest.raises(ImageError, match="cannot be opened: no such file"):
        read_image(str(tmp_path / "no.png"))
    for wrong in (None, 3, [str(path)]):
        with pytest.raises(TypeError, match="expected a path or bytes"):
            read_image(wrong)


def test_the_suffix_does_not_matter(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(Image.fromarray(quarters())))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.jpg")), quarters())
    (tmp_path / "b.jpg").write_text("this is no image at all")
    assert reason(tmp_path / "b.jpg") == "is not an image of a known format"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("reduction", [None, lambda width, height: 2], ids=["whole", "half"])
def test_every_truncation_is_refused_or_harmless(format, reduction):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    image = Image.fromarray(noise)
    whole = saved(image, format)
    expected = np.asarray(read_image(whole, reduction))
    assert reason(whole[: len(whole) // 2])
    for cut in range(0, len(whole), max(1, len(whole) // 60)):
        try:
            left = read_image(whole[:cut], reduction)
        except ImageError:
            continue
        # What is lost was not pixels (a GIF's trailer).
        assert np.array_equal(np.asarray(left), expected)


@pytest.mark.parametrize("reduction", [None, lambda width, height: 4], ids=["whole", "quarter"])
def test_damaged_bytes_raise_image_errors_only(capfd, reduction):
    rng = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        whole = np.frombuffer(saved(Image.fromarray(quarters()), format), np.uint8)
        for _ in range(60):
            hurt = whole.copy()
            places = rng.integers(0, len(hurt), 4)
            hurt[places] = rng.integers(0, 256, 4)
            try:
                assert read_image(hurt.tobytes(), reduction).mode == "RGB"
            except ImageError:
                continue
    assert capfd.readouterr() == ("", "")


def damaged_tiff(compression, mode="RGB"):
    """A TIFF whose pixels are overwritten in the middle."""
    stream = io.BytesIO()
    Image.linear_gradient("L").convert(mode).save(stream, "TIFF", compression=compression)
    data = bytearray(stream.getvalue())
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff\x00" * 32
    return bytes(data)


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        ("tiff_deflate", "decoding error at scanline"),
        ("tiff_lzw", "(corrupted LZW table|using code not yet in table|not enough data)"),
        ("zstd", "data corruption|unknown frame descriptor|checksum"),
    ],
)
def test_what_libtiff_says_is_the_reason_and_not_printed(compression, said, capfd):
    found = reason(damaged_tiff(compression))
    assert re.match(rf"is damaged or truncated: .*\(libtiff: .*({said})", found, re.IGNORECASE)
    assert capfd.readouterr() == ("", "")


def test_what_pillow_logs_is_not_printed(capfd):
    data = bytearray(saved(Image.new("RGB", (8, 8)), "TIFF"))
    entry = data.index(struct.pack("<HHI", 277, 3, 1))  # the number of samples per pixel
    data[entry + 8] = 200
    assert reason(bytes(data))
    assert capfd.readouterr() == ("", "")


def test_threads_keep_what_libtiff_says_apart():
    bad, good = damaged_tiff("tiff_deflate"), b"no image at all"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reason, [bad, good] * 100))
    assert {("libtiff" in one) for one in found[::2]} == {True}
    assert set(found[1::2]) == {"is not an image of a known format"}


def test_others_hear_libtiff_as_before(capfd):
    read_image(saved(Image.new("RGB", (8, 8)), "TIFF"))
    with pytest.raises(OSError, match="decoder error"):
        Image.open(io.BytesIO(damaged_tiff("tiff_deflate"))).load()
    assert "Decoding error at scanline" in capfd.readouterr().err


def test_empty(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert reason(tmp_path / "a.jpg") == reason(b"") == "is empty (0 bytes)"


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for format in ("TIFF", "JPEG"):
        got = np.asarray(read_image(saved(image, format))).astype(int)
        assert np.abs(got - RED).max() <= 3


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    big_endian = Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes())
    sources = [saved(Image.fromarray(values), format) for format in ("PNG", "TIFF")]
    for source in [*sources, saved(big_endian, "TIFF")]:
        got = np.asarray(read_image(source))[0]
        assert got.tolist() == [[value] * 3 for value in expected]
    netpbm = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    assert np.asarray(read_image(netpbm))[0, :, 0].tolist() == expected


def test_sixteen_bit_colour_and_alpha():
    row = struct.pack(">6H", 65535, 32768, 256, 0, 255, 65535)
    assert np.asarray(read_image(png(2, 1, 16, 2, [row]))).tolist() == [
        [[255, 128, 1], [0, 0, 255]]
    ]
    row = struct.pack(">4H", 0, 65535, 0, 0)
    assert np.asarray(read_image(png(2, 1, 16, 4, [row]))).tolist() == [[[0] * 3, [255] * 3]]


def test_float_pixels_are_refused():
    assert "float pixels" in reason(saved(Image.new("F", (4, 4)), "TIFF"))


def test_transparency_lies_on_white():
    clear_then_red = [(255, 0, 0, 0), (255, 0, 0, 255), (255, 0, 0, 128)]
    image = Image.new("RGBA", (3, 1))
    image.putdata(clear_then_red)
    assert np.asarray(read_image(saved(image)))[0].tolist() == [
        [255, 255, 255],
        [255, 0, 0],
        [255, 127, 127],
    ]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(0, 0), (0, 255)])
    assert np.asarray(read_image(saved(grey)))[0].tolist() == [[255] * 3, [0] * 3]


def test_palette_with_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    one_clear = saved(image, transparency=1)
    assert np.asarray(read_image(one_clear))[0].tolist() == [[255, 0, 0], [255] * 3, [0, 0, 255]]
    each_its_own = saved(image, transparency=bytes([0, 255, 0]))
    assert np.asarray(read_image(each_its_own))[0].tolist() == [[255] * 3, [0, 255, 0], [255] * 3]


def test_a_transparent_colour_of_grey_and_rgb():
    grey = png(2, 1, 8, 0, [bytes([7, 9])], chunk(b"tRNS", struct.pack(">H", 7)))
    assert np.asarray(read_image(grey))[0].tolist() == [[255] * 3, [9] * 3]
    colour = png(
        2, 1, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
    )
    assert np.asarray(read_image(colour))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.asarray(read_image(data)).reshape(-1, 3).tolist() == [list(RED)] * 64


# What a viewer must do to the stored rows, EXIF 2.32 table 4, in numpy.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    stored = quarters()
    data = saved(Image.fromarray(stored), format, exif=exif, **options.get(format, {}))
    got = np.asarray(read_image(data)).astype(int)
    expected = UPRIGHT[orientation](stored)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= (12 if format == "JPEG" else 0)


def test_damaged_exif_does_not_cost_the_image():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\0\x01"
    data = saved(Image.fromarray(quarters()), "JPEG", exif=exif)
    assert read_image(data).size == (8, 6)


def test_one_pixel():
    assert np.asarray(read_image(saved(Image.new("RGB", (1, 1), RED)))).tolist() == [[list(RED)]]


def test_very_long_images():
    assert read_image(saved(Image.new("1", (20_000, 200)))).size == (20_000, 200)
    assert reason(saved(Image.new("1", (20_000, 199)))) == (
        "is 20000 x 199, a side is over 100 times the other"
    )
    assert reason(saved(Image.new("1", (1, 20_000)))).startswith("is 1 x 20000")


@pytest.mark.parametrize("limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_decompression_bomb_is_refused_by_its_header(limit, monkeypatch):
    bomb = png(60_000, 60_000, 8, 2, [b""])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("allocated"))
    monkeypatch.setattr(Image.core, "fill", lambda *_: pytest.fail("allocated"))
    assert "more than 178 million pixels" in reason(bomb)


def test_below_the_bomb_limit_no_warning_leaks():
    side = 10_000  # Pillow warns from 89 million pixels on
    assert Image.MAX_IMAGE_PIXELS < side * side < MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(png(side, side, 1, 0, [b""])).startswith("is damaged or truncated")


def test_pillow_is_left_as_it_was():
    truncated, pixels = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    reason(saved(Image.fromarray(quarters()))[:60])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is truncated
    assert pixels == Image.MAX_IMAGE_PIXELS


def test_a_postscript_file_is_never_interpreted(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(Image.new("RGB", (4, 4)), "EPS"))
    assert reason(tmp_path / "a.jpg") == "is not an image of a known format"


def test_what_is_no_file(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert reason(tmp_path / "x.jpg") == "is a directory, not an image"
    assert reason(tmp_path / "pipe.jpg") == "is not a regular file"
    assert reason(tmp_path / "none.jpg") == "cannot be opened: no such file or directory"
    assert reason(tmp_path / "loop.jpg") == "cannot be opened: too many levels of symbolic links"
    assert reason(Path("a\0b.jpg")).startswith("cannot be opened")


def test_an_unreadable_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(quarters())))
    monkeypatch.setattr(Path, "open", refuse)
    assert reason(tmp_path / "a.png") == "cannot be opened: permission denied"


def test_threads_read_alike():
    transparent = Image.new("P", (16, 16))
    transparent.putpalette([9, 8, 7])
    sources = [
        saved(Image.fromarray(quarters()), "JPEG"),
        saved(transparent, transparency=bytes([128])),
        saved(Image.new("I;16", (9, 9), 4000)),
        b"broken",
    ] * 50

    def read(source):
        try:
            return read_image(source).tobytes()
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, sources)) == [read(source) for source in sources]


def test_find_images_lists_without_opening(tmp_path):
    for name in ("b.JPG", "a.webp", "sub/deep/c.png", "note.txt", ".hidden.jpg", ".git/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == (["a.webp", "b.JPG", "sub/deep/c.png"], [])


def test_find_images_refuses_what_is_no_directory(tmp_path):
    with pytest.raises(DataError, match="is not a directory"):
        find_images(tmp_path / "none")


def test_a_directory_named_like_an_image(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    (tmp_path / "x.jpg" / "y.jpg").touch()
    keys, skipped = find_images(tmp_path)
    assert keys == ["x.jpg/y.jpg"]
    assert skipped == [Skipped("x.jpg", "is a directory, not an image; its contents are read")]


def test_links_are_followed_once(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("root/real/a.jpg", "outside/b.jpg"):
        (tmp_path / name).touch()
    (root / "away").symlink_to(tmp_path / "outside")
    (root / "again").symlink_to("real")
    (root / "real" / "up").symlink_to("..")
    (root / "file.jpg").symlink_to("real/a.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    keys, skipped = find_images(root)
    assert keys == ["away/b.jpg", "file.jpg", "real/a.jpg"]
    assert [item.key for item in skipped] == ["again", "dangling.jpg", "real/up", "self.jpg"]
    assert "already listed" in skipped[0].reason
    assert skipped[1].reason == "cannot be opened: no such file or directory"


def test_names_that_are_not_utf8(tmp_path):
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "café.jpg").touch()
    keys, skipped = find_images(tmp_path)
    assert keys == ["café.jpg"]
    assert skipped == [Skipped("caf\\xe9.jpg", "its name is not UTF-8; rename it")]


def test_a_directory_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.jpg").touch()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    keys, skipped = find_images(tmp_path)
    assert keys == ["a.jpg"]
    assert skipped == [Skipped("shut", "cannot be listed: permission denied")]
