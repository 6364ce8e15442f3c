"""Image bytes to pixels: whatever Pillow reads becomes uint8 RGB, the rest one ValueError.

    1, L, I;16, I, F, P, CMYK, ...      -> RGB by value (16 bits are divided by 256, not clipped)
    LA, PA, RGBA, P with transparency   -> laid on white

Chosen: Pillow opens every image, because it alone reads all modes and reports truncation; the pixels of an ordinary
JPEG (grey or RGB) come from torchvision, a sixth faster and equal bit for bit. What torchvision refuses Pillow decides,
so what counts as damaged is Pillow's word alone. Pixels stay in memory as they were decoded, colour by colour for each
pixel, which torch crops and resizes in half the time. EXIF orientation is ignored, as in every published loader of
these benchmarks.
Declined: patching a damaged image with grey pixels (Pillow's LOAD_TRUNCATED_IMAGES); decoding JPEGs at a half or a
quarter of their size (other pixels, and a crop of half the area of a photograph must not be reduced at all).
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

if TYPE_CHECKING:  # processes that only look at files start without torch
    import torch

# Pixels of an image, at most: Pillow's own limit. In RGB they take 537 MB.
MAX_PIXELS = 178_956_970


def decode_image(payload: bytes) -> "torch.Tensor":
    """The pixels of a JPEG, PNG or other image file: uint8 RGB [3, height, width], a pixel's colours side by side.

    Raises ValueError with the decoder's reason when the bytes are empty, damaged, truncated or no image, and for more
    than MAX_PIXELS pixels before any of them is decoded.
    """
    import torch

    with _opened(payload) as image:
        if isinstance(image, JpegImageFile) and image.mode in ("L", "RGB"):
            pixels_3hw = _decode_jpeg(payload)
            if pixels_3hw is not None:
                return pixels_3hw
        pixels_hw3 = np.array(to_rgb(image))
    return torch.from_numpy(pixels_hw3).permute(2, 0, 1)


def decode_small(payload: bytes, *, side: int) -> Image.Image:
    """A small RGB picture of an image file for people to look at, at most `side` pixels wide and high.

    A JPEG is decoded at the smallest fraction that has twice as many, several times faster: not the pixels that models
    see. Raises ValueError as `decode_image`.
    """
    with _opened(payload) as image:
        image.draft(None, (2 * side, 2 * side))
        small = to_rgb(image).copy()
    small.thumbnail((side, side))
    return small


@contextmanager
def _opened(payload: bytes) -> Iterator[Image.Image]:
    """The image with its header read; whatever goes wrong with it in this block is one kind of ValueError."""
    if not payload:
        raise ValueError("the image file is empty (0 bytes)")
    try:
        with _open(payload) as image:
            yield image
    except UnidentifiedImageError as problem:  # its own message has an address in memory
        raise ValueError("the image does not decode: no format that Pillow knows") from problem
    except Exception as problem:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        raise ValueError(f"the image does not decode: {type(problem).__name__}: {problem}") from problem


def _open(payload: bytes) -> Image.Image:
    """The image with its header read. Raises DecompressionBombError when it says too many pixels."""
    stream = io.BytesIO(payload)
    # Not through Image.open, which prints a warning about half the limit.
    match image_extension(payload):
        case "jpg":
            image: Image.Image = JpegImageFile(stream)
        case "png":
            image = PngImageFile(stream)
        case _:
            image = Image.open(stream)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,} in all; "
            "make the image smaller or leave it out"
        )
    return image


def _decode_jpeg(payload: bytes) -> "torch.Tensor | None":
    """The pixels of a grey or RGB JPEG by torchvision, uint8 RGB [3, h, w]; None when it refuses.

    The function is deprecated since torchvision 0.29 (torchcodec's takes as long): where it is gone, or where warnings
    are errors, Pillow decodes.
    """
    import torch

    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        # A copy, since torch wants memory that it may write to.
        return decode_jpeg(torch.frombuffer(bytearray(payload), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (ImportError, RuntimeError, DeprecationWarning):
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """The same picture in mode RGB, the image itself if it is; transparent parts become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        wide = image.mode != "F" or values.max(initial=0.0) > 255
        return Image.fromarray(np.clip(values / (256 if wide else 1), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")


def image_extension(payload: bytes) -> str | None:
    """ "jpg" or "png" by the file's first bytes, None for any other format."""
    if payload.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if payload.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return None
