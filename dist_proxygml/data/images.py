"""Image decoding: JPEG, PNG, BMP, GIF, TIFF, WebP, PPM and AVIF become uint8 RGB, anything else is a ValueError.

    1, L, I;16, I, F, P, CMYK, ...      -> RGB by value (16 bits are divided by 256, not clipped)
    LA, PA, RGBA, P with transparency   -> composited on white

Every untrusted image is decoded here: only these formats are tried, by their first bytes (Pillow supports others, of
which EPS starts Ghostscript), and memory is bounded before decoding begins. A photograph of 150 megapixels fits, and no
file of a few kilobytes takes more memory than that.

Chosen: Pillow opens every image, because it alone reads all modes and reports truncation; the pixels of an ordinary
JPEG (grey or RGB) come from torchvision, a sixth faster and equal bit for bit. Pillow decodes what torchvision refuses,
so Pillow alone decides what counts as damaged. Pixels stay in memory as decoded, channels last, which torch crops and
resizes in half the time; large images are converted a few rows at a time.
EXIF orientation is applied (`upright`) to images of folders and tables, and never to those of published sets, whose
loaders all ignore it. AVIF is decoded only from files that the user names (`avif`), never from shards: its header need
not tell the size of the frame inside, which takes its decoder up to 2.5 GB.
Declined: patching a damaged image with grey pixels (Pillow's LOAD_TRUNCATED_IMAGES); decoding JPEGs at a half or a
quarter of their size (the pixels differ, and a crop of half a photograph's area must not be reduced at all).
"""

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLESPERPIXEL, TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

if TYPE_CHECKING:  # processes that only check files start without torch
    import torch

MAX_BYTES = 1 << 30  # of memory for decoding an image, and of an image file
_STRIP_PIXELS = 1 << 22  # are converted at a time
ORIENTATION_TAG = 0x0112  # of EXIF
UPRIGHT = 1  # 2 to 8: turned or mirrored
_FORMATS = "JPEG, PNG, BMP, GIF, TIFF, WebP or PPM"  # and AVIF
# By their first bytes; WebP's come after a size.
_OPENS: Mapping[bytes, Callable[[io.BytesIO], Image.Image]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    **{b"P%d" % number: PpmImageFile for number in range(1, 7)},
}


def decode_image(payload: bytes, *, upright: bool = False, avif: bool = False) -> "torch.Tensor":
    """Decode an image file to uint8 RGB [3, height, width], channels last in memory; `upright` turns and mirrors it as
    its EXIF orientation says, `avif` also takes that format.

    Raises ValueError with the decoder's reason if the bytes are empty, damaged, truncated or not an image, or, before
    decoding, if it would take more than MAX_BYTES.
    """
    import torch

    with opened(payload, upright=upright, avif=avif) as image:
        turned = orientation(image) if upright else UPRIGHT
        pixels_3hw = None
        if isinstance(image, JpegImageFile) and image.mode in ("L", "RGB"):
            pixels_3hw = _decode_jpeg(payload)
        if pixels_3hw is None:
            pixels_3hw = torch.from_numpy(rgb_pixels(image)).permute(2, 0, 1)
        if turned == UPRIGHT:
            return pixels_3hw
        return torch.from_numpy(turn(pixels_3hw.permute(1, 2, 0).numpy(), turned)).permute(2, 0, 1)


def turn(pixels_hw3: np.ndarray, turned: int) -> np.ndarray:
    """Return pixels as a viewer shows them under an EXIF orientation (CIPA DC-008, tag 0x0112), a copy in memory."""
    if turned >= 5:
        pixels_hw3 = pixels_hw3.swapaxes(0, 1)
    rows, columns = (slice(None, None, -1 if turned in flips else 1) for flips in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(pixels_hw3[rows, columns])


def decode_small(payload: bytes, *, side: int, upright: bool = False) -> Image.Image:
    """Decode an image file to a small RGB picture for display, at most `side` pixels wide and high.

    A JPEG is decoded at the smallest fraction of at least twice that size, several times faster, so these are not the
    pixels that models see. Raises ValueError as `decode_image`.
    """
    with opened(payload) as image:
        image.draft(None, (2 * side, 2 * side))
        turned = orientation(image) if upright else UPRIGHT
        small = to_rgb(image)
        small.load()
    small.thumbnail((side, side))
    return small if turned == UPRIGHT else Image.fromarray(turn(np.asarray(small), turned))


def read_image_file(path: Path, *, offset: int = 0, num_bytes: int | None = None) -> bytes:
    """Read an image file, or the one that takes `num_bytes` of a file from `offset` on.

    Raises ValueError with the reason if it cannot be read, has more than MAX_BYTES, ends early, or is not in a regular
    file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("the file cannot be read: it is no regular file")
            size = status.st_size if num_bytes is None else num_bytes
            if size > MAX_BYTES:
                raise ValueError(f"the file has {size:,} bytes, expected an image file of at most {MAX_BYTES:,}")
            if num_bytes is None:
                return stream.read()
            payload = os.pread(descriptor, num_bytes, offset)
            if len(payload) != num_bytes:
                raise ValueError(f"expected {num_bytes} bytes at offset {offset}, got {len(payload)}: the file was cut")
            return payload
    except OSError as problem:
        raise ValueError(f"the file cannot be read: {problem.strerror}") from problem


@contextmanager
def opened(payload: bytes, *, upright: bool = False, avif: bool = False) -> Iterator[Image.Image]:
    """Open an image and read its header; any failure inside the block becomes a ValueError. Its memory is bounded for
    what `decode_image` does with these arguments.
    """
    if not payload:
        raise ValueError("the image file is empty (0 bytes)")
    opens = _avif_opener() if avif and _is_avif(payload) else _opener(payload)
    if opens is None:
        found = "AVIF, which is read from folders and tables only" if _is_avif(payload) else "none of them"
        raise ValueError(f"the image does not decode: expected {_FORMATS}, got {found} by its first bytes")
    try:
        # Not through Image.open, which prints a warning about half its limit.
        with opens(io.BytesIO(payload)) as image:
            num_bytes = _bytes_to_decode(image, is_turned=upright and orientation(image) != UPRIGHT)
            if num_bytes > MAX_BYTES:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels in mode {image.mode} take {num_bytes:,} bytes to decode, "
                    f"expected at most {MAX_BYTES:,}; shrink or remove the image"
                )
            yield image
    except Exception as problem:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        raise ValueError(f"the image does not decode: {type(problem).__name__}: {problem}") from problem


def _opener(payload: bytes) -> Callable[[io.BytesIO], Image.Image] | None:
    """Return the opener for an image file by its first bytes; None for an unsupported format."""
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return WebPImageFile
    return next((opens for start, opens in _OPENS.items() if payload.startswith(start)), None)


def _is_avif(payload: bytes) -> bool:
    return payload[4:8] == b"ftyp" and (b"avif" in payload[8:64] or b"avis" in payload[8:64])


def _avif_opener() -> Callable[[io.BytesIO], Image.Image]:
    try:
        from PIL.AvifImagePlugin import AvifImageFile
    except ImportError:  # older than Pillow 11.3
        raise ValueError("the image does not decode: AVIF needs Pillow 11.3 or later; install it") from None
    return AvifImageFile


def _bytes_to_decode(image: Image.Image, *, is_turned: bool = False) -> int:
    """Bound the memory of decoding from the header: Pillow's storage of the pixels plus the larger of the decoder's
    buffers and the RGB result, and the turned one.
    """
    num_pixels = image.width * image.height
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    beside = 3.0 if image.mode == "RGB" else 4.0
    if isinstance(image, JpegImageFile):  # coefficients of two bytes, all of them in a progressive one
        shares = [horizontal * vertical for _, horizontal, vertical, _ in image.layer]
        largest = max(h for _, h, _, _ in image.layer) * max(v for _, _, v, _ in image.layer)
        beside = max(beside, 2 * sum(shares) / largest)
    elif isinstance(image, WebPImageFile):  # two canvases of RGBA, and a copy as bytes
        beside = 12.0
    elif isinstance(image, TiffImageFile):  # a strip or tile, which may be larger than the image; a copy for turning
        tags = image.tag_v2
        num_pixels = max(num_pixels, tags.get(TILEWIDTH, 0) * tags.get(TILELENGTH, 0))
        beside = max(beside, stored, max(tags.get(BITSPERSAMPLE, (1,))) * tags.get(SAMPLESPERPIXEL, 1) / 8)
    elif image.format == "AVIF":  # planes of 16 bits, with alpha, RGBA and a copy as bytes
        beside = 16.0
    return round(num_pixels * (stored + beside + 3 * is_turned))


def _decode_jpeg(payload: bytes) -> "torch.Tensor | None":
    """Decode a grey or RGB JPEG by torchvision to uint8 RGB [3, h, w]; None if it refuses.

    The function is deprecated since torchvision 0.29 (torchcodec's takes as long): where it is gone, or where warnings
    are errors, Pillow decodes.
    """
    import torch

    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        # A copy, since torch requires writable memory.
        return decode_jpeg(torch.frombuffer(bytearray(payload), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (ImportError, RuntimeError, DeprecationWarning):
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB, if it is not; transparent parts become white."""
    image.load()
    if _is_rgb(image):
        return image
    rgb = Image.new("RGB", image.size)
    for top, strip in _rgb_strips(image):
        rgb.paste(strip, (0, top))
    return rgb


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of a picture, uint8 RGB [height, width, 3]; transparent parts become white."""
    image.load()  # Pillow turns a TIFF as it says
    pixels_hw3 = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _rgb_strips(image):
        pixels_hw3[top : top + strip.height] = np.asarray(strip)
    return pixels_hw3


def _is_rgb(image: Image.Image) -> bool:
    return image.mode == "RGB" and "transparency" not in image.info


def _rgb_strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row and the RGB picture of a few rows at a time, because conversion takes several copies."""
    # Numbers without a range of their own: to 255, or to 65,535 where any is greater.
    is_wide = image.mode != "F" or np.max(image.getextrema()) > 255
    num_rows = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, num_rows):
        strip = image
        if num_rows < image.height:
            strip = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        if strip.mode.startswith("I;16") or strip.mode in ("I", "F"):
            values = np.asarray(strip) / np.float32(256 if is_wide else 1)
            strip = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
        if strip.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in strip.info:
            rgba = strip.convert("RGBA")
            strip = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            strip.alpha_composite(rgba)
        yield top, strip if strip.mode == "RGB" else strip.convert("RGB")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a picture, UPRIGHT if unset."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            found = exif.get(ORIENTATION_TAG)
    except Exception:  # as decoders, of damaged metadata
        return UPRIGHT
    return found if isinstance(found, int) and 1 <= found <= 8 else UPRIGHT


def image_extension(payload: bytes) -> str | None:
    """Return "jpg", "png" or "webp", what shards hold, by the file's first bytes; None for any other format."""
    return _EXTENSIONS.get(_opener(payload))


_EXTENSIONS: Mapping[Any, str] = {JpegImageFile: "jpg", PngImageFile: "png", WebPImageFile: "webp"}


def is_cut(payload: bytes) -> bool:
    """Whether a JPEG, PNG or WebP file probably lacks its end."""
    if payload.startswith(b"RIFF"):
        return len(payload) < 8 + int.from_bytes(payload[4:8], "little")
    return not payload.endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))
