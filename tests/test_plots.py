from PIL import Image

from clipkit.plots import plot_run

LINES = [
    {"step": 10, "loss": 4.0},
    {"step": 20, "loss": 3.0},
    {
        "step": 20,
        "held_out": {
            f"{way}_r{k}": 0.1 * k for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)
        },
    },
]


def test_the_curve_is_a_picture_that_depends_on_the_log(tmp_path):
    for name, lines in (("all", LINES), ("start", LINES[:1]), ("empty", [])):
        plot_run(lines, tmp_path / f"{name}.png", "a run")
    sizes = set()
    pixels = set()
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as image:
            sizes.add(image.size)
            pixels.add(image.tobytes())
    assert len(sizes) == 1
    assert len(pixels) == 3
