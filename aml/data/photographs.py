"""From an opened image file to eight bits per channel."""

from PIL import Image

_WIDE = ("I", "F")  # and I;16 with its byte orders


def require_eight_bits(file: Image.Image) -> None:
    """Raise OSError for 16-bit, integer and float images: Pillow's conversion would clip them to white or black."""
    if file.mode.partition(";")[0] in _WIDE:
        raise OSError(f"has 16 bits or more per channel (mode {file.mode}); save it with 8")


def to_rgb(file: Image.Image) -> Image.Image:
    """The image in mode RGB. Raises OSError as `require_eight_bits`."""
    require_eight_bits(file)
    return file.convert("RGB")
