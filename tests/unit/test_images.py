"""Image files of every kind to pixels, and what is no whole image to one error."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from dist_proxygml.data import images
from dist_proxygml.data.images import MAX_BYTES, decode_image, image_extension, to_rgb

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

PNG = b"\x89PNG\r\n\x1a\n"


def smooth(height: int = 37, width: int = 53) -> Image.Image:
    """A picture that JPEG changes little: colours that go slowly over into each other."""
    row, column = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([40 + 3 * row, 30 + 3 * column, 200 - 2 * row], -1).clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def by_pillow(payload: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(payload)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Warnings are errors, but for torchvision's of what it will remove."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def png(header: tuple[int, int, int, int], rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: width, height, bits and colour type (Pillow writes no RGB of 16 bits)."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)),
        *more,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return PNG + b"".join(chunk(kind, content) for kind, content in chunks)


def jpeg_of_size(height: int, width: int) -> bytes:
    """A JPEG whose header says another size than its content has."""
    payload = bytearray(encode(smooth(), "JPEG"))
    start = payload.index(b"\xff\xc0") + 5
    payload[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(payload)


ORDINARY = {
    f"{name}-{'progressive' if progressive else 'baseline'}": encode(
        picture, "JPEG", progressive=progressive, **options
    )
    for name, picture, options in [
        ("4:4:4", smooth(), {"subsampling": 0}),
        ("4:2:2", smooth(), {"subsampling": 1}),
        ("4:2:0", smooth(), {"subsampling": 2, "quality": 30}),
        ("rgb", smooth(), {"keep_rgb": True}),
        ("grey", smooth().convert("L"), {}),
        ("restarts", smooth(), {"restart_marker_rows": 1}),
        ("one-pixel", smooth(1, 1), {}),
    ]
    for progressive in (False, True)
}


@pytest.mark.parametrize("payload", ORDINARY.values(), ids=ORDINARY)
def test_an_ordinary_jpeg_has_the_pixels_of_pillow_by_whichever_library(
    payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_pillow(payload)
    fast = decode_image(payload)
    monkeypatch.setattr(images, "_decode_jpeg", lambda payload: None)
    slow = decode_image(payload)
    for pixels in (fast, slow):
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous() == (pixels.shape[1:].numel() == 1)  # a pixel's colours lie side by side
        assert torch.equal(pixels, expected)


def test_ordinary_jpegs_are_decoded_by_torchvision_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = torch.zeros(3, 1, 1, dtype=torch.uint8)
    monkeypatch.setattr(images, "_decode_jpeg", lambda payload: answer)
    for payload in ORDINARY.values():
        assert decode_image(payload) is answer
    for payload in [encode(smooth().convert("CMYK"), "JPEG"), encode(smooth(), "PNG"), encode(smooth(), "BMP")]:
        assert decode_image(payload) is not answer
    monkeypatch.undo()
    for payload in ORDINARY.values():
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        assert torch.equal(decode_jpeg(data, mode=ImageReadMode.RGB), images._decode_jpeg(payload))


def test_cmyk_and_adobe_ycck_jpegs_have_their_colours() -> None:
    cmyk = encode(smooth().convert("CMYK"), "JPEG", quality=98)  # Pillow writes Adobe's inverted values
    assert b"Adobe" in cmyk
    assert (decode_image(cmyk).int() - by_pillow(encode(smooth(), "PNG")).int()).abs().max() <= 6
    # The same numbers read as YCCK: the fourth, black, stays as it is, the others are luma and chroma.
    marker = cmyk.index(b"Adobe")
    ycck = cmyk[: marker + 11] + b"\x02" + cmyk[marker + 12 :]
    cmyk_hw4 = np.asarray(Image.open(io.BytesIO(ycck))).astype(float)
    expected = (255 - cmyk_hw4[..., :3]) * (255 - cmyk_hw4[..., 3:]) / 255
    assert (decode_image(ycck).permute(1, 2, 0).double() - torch.from_numpy(expected)).abs().max() <= 1
    assert not torch.equal(decode_image(ycck), decode_image(cmyk))


def test_pngs_of_every_kind_have_their_colours() -> None:
    one = (1, 1)
    kinds: dict[str, tuple[bytes, tuple[int, int, int]]] = {
        "rgb": (png((*one, 8, 2), bytes([0, 10, 20, 30])), (10, 20, 30)),
        "rgb16": (png((*one, 16, 2), bytes([0, 10, 255, 20, 0, 30, 128])), (10, 20, 30)),
        "grey": (png((*one, 8, 0), bytes([0, 77])), (77, 77, 77)),
        "grey16": (png((*one, 16, 0), bytes([0, 77, 255])), (77, 77, 77)),
        "bilevel": (png((*one, 1, 0), bytes([0, 128])), (255, 255, 255)),
        "palette": (png((*one, 8, 3), bytes([0, 1]), (b"PLTE", bytes([0, 0, 0, 9, 8, 7]))), (9, 8, 7)),
        "clear palette": (
            png((*one, 8, 3), bytes([0, 1]), (b"PLTE", bytes([0, 0, 0, 9, 8, 7])), (b"tRNS", bytes([255, 0]))),
            (255, 255, 255),
        ),
        "clear rgb": (png((*one, 8, 2), bytes([0, 1, 2, 3]), (b"tRNS", bytes([0, 1, 0, 2, 0, 3]))), (255, 255, 255)),
        "rgba": (png((*one, 8, 6), bytes([0, 10, 20, 30, 255])), (10, 20, 30)),
        "half rgba": (png((*one, 8, 6), bytes([0, 10, 20, 30, 51])), (206, 208, 210)),  # a fifth of it on white
        "grey alpha": (png((*one, 8, 4), bytes([0, 10, 51])), (206, 206, 206)),
        "grey alpha16": (png((*one, 16, 4), bytes([0, 10, 99, 0, 0])), (255, 255, 255)),
    }
    for kind, (payload, expected) in kinds.items():
        pixels = decode_image(payload)
        assert (kind, tuple(pixels.shape)) == (kind, (3, 1, 1))
        assert (kind, tuple(pixels.flatten().tolist())) == (kind, expected)


def test_of_animations_and_other_formats_the_first_picture_is_taken() -> None:
    first, second = Image.new("RGB", (4, 3), (200, 0, 0)), Image.new("RGB", (4, 3), (0, 200, 0))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        payload = encode(first, kind, save_all=True, append_images=[second])
        assert (decode_image(payload)[:, 1, 1] - torch.tensor([200, 0, 0])).abs().max() <= 2
    with no_warnings():
        several = encode(first, "MPO", save_all=True, append_images=[second])
        assert decode_image(several)[0].float().mean() > 190


def test_every_orientation_is_turned_as_a_viewer_does_and_only_if_asked() -> None:
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {})):
        for value in range(1, 9):
            exif = Image.Exif()
            exif[images.ORIENTATION_TAG] = value
            payload = encode(smooth(), kind, exif=exif, **options)
            pixels = decode_image(payload, upright=True)
            plain = decode_image(payload)
            assert plain.shape == (3, 37, 53)
            # Pixels alone, since decoders of JPEG differ in rounding.
            shown = Image.fromarray(plain.permute(1, 2, 0).numpy())
            shown.getexif()[images.ORIENTATION_TAG] = value
            expected = torch.from_numpy(np.array(ImageOps.exif_transpose(shown))).permute(2, 0, 1)
            assert (kind, value, torch.equal(pixels, expected)) == (kind, value, True)
            assert pixels.stride() == expected.stride()  # channels last, in one piece
            small = images.decode_small(payload, side=26, upright=True)
            assert (small.width > small.height) == (value < 5)
    assert np.array_equal(images.turn(np.arange(6).reshape(1, 2, 3), 1), np.arange(6).reshape(1, 2, 3))


def test_a_picture_that_is_to_be_turned_counts_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 3
    payload = encode(smooth(), "JPEG", exif=exif)
    monkeypatch.setattr(images, "MAX_BYTES", 37 * 53 * 10 - 1)
    assert decode_image(payload).shape == (3, 37, 53)
    with pytest.raises(ValueError, match=r"take 19,610 bytes"):
        decode_image(payload, upright=True)


def test_avif_is_decoded_only_where_it_is_asked_for() -> None:
    payload = encode(smooth(), "AVIF", quality=100, subsampling="4:4:4")
    assert (decode_image(payload, avif=True).int() - by_pillow(payload).int()).abs().max() == 0
    for start in range(4, 64, 4):
        with pytest.raises(ValueError, match="does not decode"):
            decode_image(payload[:start], avif=True)
    with pytest.raises(ValueError, match="got AVIF, which is read from folders and tables only"):
        decode_image(payload)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, and no error
def test_the_orientation_is_ignored_and_damaged_metadata_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a right angle
    turned = encode(smooth(), "JPEG", exif=exif)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).size == (37, 53)
    plain = encode(smooth(), "JPEG")
    for payload in [
        turned,
        encode(smooth(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"),
        encode(smooth(), "JPEG", icc_profile=b"no profile at all"),
    ]:
        assert torch.equal(decode_image(payload), decode_image(plain))
    whole = encode(smooth(), "PNG", icc_profile=b"no profile at all", exif=b"garbage")
    assert torch.equal(decode_image(whole), decode_image(encode(smooth(), "PNG")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "progressive"])
def test_a_file_cut_anywhere_is_refused(kind: str) -> None:
    payload = encode(smooth(), "JPEG", progressive=True) if kind == "progressive" else encode(smooth(), kind)
    # Without its end mark and checksums, a PNG still has all its pixels.
    last = len(payload) - (40 if kind == "PNG" else 1)
    for length in sorted({0, 1, 2, 3, 8, *range(11, last, 97), last - 40, last - 1, last}):
        with pytest.raises(ValueError, match=r"^the image (does not decode|file is empty)"):
            decode_image(payload[:length])


def test_an_empty_file_and_an_unknown_format_are_called_so() -> None:
    with pytest.raises(ValueError, match=r"empty \(0 bytes\)"):
        decode_image(b"")
    with pytest.raises(ValueError, match=r"JPEG, PNG, "):
        decode_image(b"<html>not found</html>")


@pytest.mark.parametrize("head", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\x10JFIF\0", PNG, PNG + b"\0\0\0\rIHDR"])
def test_garbage_after_a_good_beginning_is_refused(head: bytes) -> None:
    garbage = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    for payload in (head + garbage, head + bytes(5000), head + b"<html>not found</html>"):
        with pytest.raises(ValueError, match="decode"):
            decode_image(payload)


@pytest.mark.parametrize("pillows_limit", [Image.MAX_IMAGE_PIXELS, None], ids=["pillow's", "switched-off"])
def test_a_decompression_bomb_is_refused_before_it_takes_memory_and_without_a_warning(
    pillows_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)  # some libraries set it to None
    side = int((MAX_BYTES / 5) ** 0.5) + 1  # a bit is stored as a byte, and becomes RGB in four
    rows = zlib.compress(bytes(1 << 20))
    bombs = [
        jpeg_of_size(side, side),
        png((side, side, 8, 2), rows),
        png((side, side, 1, 0), rows),
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with no_warnings():
                with pytest.raises(ValueError, match="DecompressionBombError"):
                    decode_image(bomb)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20  # a plane of one would take 180 MB
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_only_the_named_formats_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"}
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for kind in named:
        assert decode_image(encode(smooth(), kind)).shape == (3, 37, 53)
    refused = set()
    for kind in ("EPS", "PCX", "TGA", "ICO", "SGI", "IM", "DDS", "JPEG2000", "AVIF", "ICNS", "DIB"):
        try:
            payload = encode(smooth(64, 64), kind)
        except (OSError, KeyError):  # this Pillow has no such encoder
            continue
        with pytest.raises(ValueError, match=r"JPEG, PNG, "):
            decode_image(payload)
        refused.add(kind)
    assert "EPS" in refused
    assert not (tmp_path / "started").exists()


def picture_of(mode: str, side: int) -> Image.Image:
    return Image.new(mode, (side, side))


TURNED = Image.Exif()
TURNED[images.ORIENTATION_TAG] = 6
LARGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grey": ("PNG", "L", {}),
    "grey16": ("PNG", "I;16", {}),
    "grey and alpha": ("PNG", "LA", {}),
    "rgb": ("PNG", "RGB", {}),
    "rgba": ("PNG", "RGBA", {}),
    "clear palette": ("PNG", "P", {"transparency": 0}),
    "progressive": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "cmyk": ("JPEG", "CMYK", {}),
    "gif": ("GIF", "P", {}),
    "webp": ("WEBP", "RGBA", {"lossless": True, "method": 0}),
    "float": ("TIFF", "F", {"compression": "tiff_adobe_deflate"}),
    "one strip": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate", "strip_size": 1 << 30}),
    "turned": ("TIFF", "RGB", {"tiffinfo": {0x0112: 6}}),
    "turned jpeg": ("JPEG", "RGB", {"exif": TURNED, "quality": 20}),
    "turned cmyk": ("JPEG", "CMYK", {"exif": TURNED}),
    "turned png": ("PNG", "RGBA", {"exif": TURNED}),
    "avif": ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
}

DECODE = """
import os, resource, sys, warnings
from dist_proxygml.data.images import UPRIGHT, opened, orientation, rgb_pixels, turn, _bytes_to_decode
warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    if os.fork() == 0:
        payload = open(path, "rb").read()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with opened(payload, avif=True) as image:
            turned = orientation(image)
            expected = _bytes_to_decode(image, is_turned=turned != UPRIGHT)
            pixels = rgb_pixels(image)
            if turned != UPRIGHT:
                turn(pixels, turned)
        print(expected, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.ci
def test_decoding_takes_no_more_memory_than_is_counted_for_it(tmp_path: Path) -> None:
    for number, (kind, mode, options) in enumerate(LARGE.values()):
        (tmp_path / f"{number:02d}").write_bytes(encode(picture_of(mode, 5000), kind, **options))
    done = subprocess.run(
        [sys.executable, "-c", DECODE, *map(str, sorted(tmp_path.iterdir()))],
        timeout=200, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == len(LARGE)
    for name, (expected, taken) in zip(LARGE, found, strict=True):
        # Some millions of pixels at a time are converted in a few copies.
        assert (name, taken < expected + (80 << 20)) == (name, True)


def test_a_camera_of_a_hundred_megapixels_fits_and_a_small_file_that_asks_for_gigabytes_does_not() -> None:
    width, height = 11648, 8736
    for header in ((width, height, 8, 2), (width, height, 16, 0)):
        with images.opened(png(header, b"")):
            pass
    with images.opened(jpeg_of_size(height, width)):
        pass
    for header in ((13000, 13000, 8, 2), (13000, 13000, 8, 6), (20000, 20000, 16, 0)):
        with pytest.raises(ValueError, match="DecompressionBombError"):
            decode_image(png(header, b""))


def test_a_tile_that_is_larger_than_its_image_counts() -> None:
    # Width, height, bits, deflate, black is 0, samples, then width, height, offset and bytes of a tile.
    tags = {256: 53, 257: 37, 258: 8, 259: 8, 262: 1, 277: 1, 322: 40_000, 323: 40_000, 324: 200, 325: 40}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    payload = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields).ljust(300, b"\0")
    with pytest.raises(ValueError, match=r"DecompressionBombError.*\b53 x 37\b"):
        decode_image(payload)


def test_a_large_picture_is_converted_some_rows_at_a_time_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = smooth().convert("P")
    clear.info["transparency"] = 3
    wide = Image.fromarray((np.arange(37 * 53).reshape(37, 53) * 33).astype(np.uint16))
    numbers = Image.fromarray(np.linspace(-9, 300, 37 * 53, dtype=np.float32).reshape(37, 53))
    small = Image.fromarray(np.linspace(-9, 200, 37 * 53, dtype=np.float32).reshape(37, 53))
    alpha = smooth().convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    pictures = [smooth(), clear, wide, numbers, small, alpha, alpha.convert("LA"), smooth().convert("CMYK")]
    at_once = [images.rgb_pixels(picture) for picture in pictures]
    monkeypatch.setattr(images, "_STRIP_PIXELS", 300)
    for picture, expected in zip(pictures, at_once, strict=True):
        assert (picture.mode, np.array_equal(images.rgb_pixels(picture), expected)) == (picture.mode, True)
        assert (picture.mode, np.array_equal(np.asarray(to_rgb(picture)), expected)) == (picture.mode, True)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        with pytest.raises(ValueError, match=r"(regular file|Is a directory)"):
            images.read_image_file(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="No such file"):
        images.read_image_file(tmp_path / "none.png")
    with open(tmp_path / "large.png", "wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"\b1,073,741,825 bytes"):
        images.read_image_file(tmp_path / "large.png")


def test_texts_profiles_and_frames_do_not_grow() -> None:
    large = zlib.compress(bytes(300 << 20), 9)
    many = [(b"zTXt", b"a\0\0" + large), (b"iCCP", b"a\0\0" + large), (b"iTXt", b"a\0\1\0\0\0" + large)]
    tracemalloc.start()
    try:
        for chunk_of_it in many:
            with suppress(ValueError):
                decode_image(png((1, 1, 8, 2), bytes([0, 10, 20, 30]), chunk_of_it))
        frames = [Image.new("L", (2000, 2000), value) for value in range(20)]
        decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_the_limit_is_exact_and_pillow_warns_of_nothing_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 37 * 53 * 7)  # a pixel in four bytes, and its RGB or coefficients
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 - 1)
    with no_warnings():
        for kind in ("JPEG", "PNG"):
            assert decode_image(encode(smooth(), kind)).shape == (3, 37, 53)
            with pytest.raises(ValueError, match=r"\b37 x 54\b.*\bRGB\b.*\b13,986 bytes\b.*\b13,727\b"):
                decode_image(encode(smooth(54, 37), kind))


def test_what_torchvision_refuses_pillow_decides() -> None:
    payload = bytearray(encode(smooth(3, 53), "JPEG"))
    payload[-1] ^= 2  # all pixels are there, the end mark is not
    assert images._decode_jpeg(bytes(payload)) is None
    assert torch.equal(decode_image(bytes(payload)), by_pillow(bytes(payload)))


def test_where_torchvision_warns_of_its_end_or_has_come_to_it_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = encode(smooth(), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode_image(payload), by_pillow(payload))
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert torch.equal(decode_image(payload), by_pillow(payload))


def test_an_rgb_image_is_its_own_rgb() -> None:
    picture = smooth()
    assert to_rgb(picture) is picture
    assert to_rgb(picture.convert("L")).mode == "RGB"


def test_files_are_told_apart_by_their_first_bytes() -> None:
    kinds = [image_extension(encode(smooth(), kind)) for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    assert [*kinds, image_extension(b"")] == ["jpg", "png", "webp", None, None]


def test_looking_at_files_needs_no_torch() -> None:
    program = f"import runpy, sys; runpy.run_path({images.__file__!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], timeout=180, check=False)
    assert done.returncode == 0
