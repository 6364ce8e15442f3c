"""Image bytes to pixels: whatever Pillow reads becomes uint8 RGB, the rest one ValueError.

    1, L, I;16, I, F, P, CMYK, ...      -> RGB by value (16 bits are divided by 256, not clipped)
    LA, PA, RGBA, P with transparency   -> laid on white

Chosen: Pillow for every format, because it alone reads all modes and reports truncation. EXIF
orientation is ignored, as in every published loader of these benchmarks.
Declined: patching a damaged image with grey pixels (Pillow's LOAD_TRUNCATED_IMAGES).
"""

import io

import numpy as np
import torch
from PIL import Image


def decode_image(payload: bytes) -> torch.Tensor:
    """The pixels of a JPEG, PNG or other image file: uint8 RGB [3, height, width].

    Raises ValueError with the decoder's reason when the bytes are empty, damaged, truncated or no
    image.
    """
    if not payload:
        raise ValueError("the image file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(payload)) as image:
            pixels = np.array(to_rgb(image))
    except Exception as problem:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        raise ValueError(f"the image does not decode: {type(problem).__name__}: {problem}") from problem
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """The same picture in mode RGB; transparent parts become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB")
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
