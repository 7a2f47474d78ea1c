"""A network that is small enough for any test."""


def tiny_model(image_size: int = 32):
    """A real open_clip network of width 32, the settings of [model]."""
    return {
        "embed_dim": 32,
        "vision": {
            "image_size": image_size,
            "layers": 1,
            "width": 32,
            "patch_size": 8,
            "head_width": 16,
        },
        "text": {"width": 32, "heads": 2, "layers": 1},
    }
