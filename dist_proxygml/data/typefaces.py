"""Typefaces in folders of fonts: which there are, what characters they claim, and their pictures.

A picture is the ink of one character, black on white, as an 8-bit PNG of `side` pixels: drawn three times as large, its
box of ink centred, averaged over 3 x 3. One scale for a typeface: the median of the larger side of its letters' ink is
27/32 of the picture; ink that would not fit is reduced on its own.

A family gives one typeface, the file (or face of a collection) nearest to weight 400, upright, of normal width; among
equals the one with most glyphs. Order: that of the folders as given, then of paths, then of faces in a collection.

Chosen: fontTools for tables (which characters, names, weight), Pillow's FreeType for pictures. Declined: trusting the
table of characters for what is drawn (fonts map thousands of characters to nothing, or to a box), weights of a family
as typefaces of their own, and shaping (each character stands alone).
"""

import io
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dist_proxygml.data.datasets import is_hidden, listing
from dist_proxygml.storage.files import sha256_of

FONT_SUFFIXES = (".otc", ".otf", ".ttc", ".ttf", ".woff", ".woff2")

_OVERSAMPLING = 3
_MEDIAN_INK = 27 / 32
_NUM_LETTERS = 300  # that the scale is measured on
_LARGEST_INK = 16  # in sides of the picture; more is a fault of the font
_FAINTEST = 40  # ink below this grey everywhere is none
_BITMAPS = frozenset({"EBDT", "CBDT", "bdat", "sbix"})  # tables of pictures
_LICENCE = re.compile(r"(copyright|copying|licen[cs]e|ofl)([-_. ].*)?", re.IGNORECASE)
# Letters but for modifiers, and numbers. Marks combine; of punctuation and symbols many differ by place or size alone.
_CATEGORIES = frozenset({"Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "No"})


class Typeface(NamedTuple):
    """A face of a font file."""

    name: str  # of its family, which no other has
    file: Path
    place: str  # the file below the folder that was given
    face: int  # in a collection
    sha256: str
    weight: int
    copyright: str  # these three as the font says them, possibly empty
    licence: str
    licence_url: str
    licence_files: tuple[Path, ...]
    characters: tuple[int, ...]  # that its table claims and `is_usable` allows, sorted


class Glyphs(NamedTuple):
    """What a process is to draw: characters of a face, at a font size that `font_size` gave."""

    file: Path
    face: int
    font_size: int
    side: int
    characters: tuple[int, ...]


@cache
def is_usable(character: int) -> bool:
    """Whether a character may be a class: a letter or a number that NFKC leaves as it is (Unicode, UAX #15)."""
    text = chr(character)
    return unicodedata.category(text) in _CATEGORIES and unicodedata.normalize("NFKC", text) == text


@cache
def script_of(character: int) -> str:
    """The first word of a character's Unicode name: CJK, HANGUL, LATIN."""
    return unicodedata.name(chr(character), "UNNAMED").split()[0]


# ---- which typefaces -------------------------------------------------------------------------------------------------


def read_typefaces(
    folders: Sequence[Path], *, on_bad: Literal["fail", "skip"] = "fail", quiet: bool = False
) -> tuple[list[Typeface], list[str]]:
    """The typefaces in folders (or files), and what the user should know of fonts that give none, a line each.

    Raises ValueError if a folder is missing, none has fonts, or fonts cannot be read (naming them all; with "skip" they
    are left out).
    """
    faces: list[_Face] = []
    bad, notes = [], []
    for root, path in tqdm(_font_files(folders), desc="reading fonts", unit=" files", disable=quiet):
        try:
            found = _faces_of(path, root)
            faces += found
            if not found:
                notes.append(f"left out, it has bitmaps and no outlines: {path}")
        except (
            Exception
        ) as problem:  # fontTools raises whatever its parsers meet: struct.error, KeyError, AssertionError
            bad.append(f"{path}: {_reason(problem)}")
    if bad and on_bad == "fail":
        shown = "".join(f"\n  {line}" for line in bad[:20]) + (f"\n  and {len(bad) - 20} more" if len(bad) > 20 else "")
        raise ValueError(
            f"{len(bad)} font files cannot be read:{shown}\nrepair or remove them, or pass --on-bad skip to leave them "
            "out"
        )
    notes += [f"left out, it cannot be read: {line}" for line in bad]
    chosen: dict[str, _Face] = {}
    for face in faces:  # of equals the first
        if face.family not in chosen or face.preference < chosen[face.family].preference:
            chosen[face.family] = face
    typefaces = []
    for face in faces:
        if chosen[face.family] is face:
            typeface = _typeface(face)
            if typeface.characters:
                typefaces.append(typeface)
            else:
                notes.append(f"left out, it has no letters or numbers of Unicode: {face.path}")
    return typefaces, notes


class _Face(NamedTuple):
    root: Path
    path: Path
    number: int
    family: str
    preference: tuple[bool, bool, int, int]  # lowest first: italic, not of normal width, distance from 400, -glyphs
    weight: int


def _font_files(folders: Sequence[Path]) -> list[tuple[Path, Path]]:
    found: dict[Path, tuple[Path, Path]] = {}  # each file once, where it is met first
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"expected a folder of fonts, got {folder}, which is not there; correct --fonts")
        paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
        for path in paths:
            if path.suffix.lower() in FONT_SUFFIXES and path.is_file() and not is_hidden(path.name):
                found.setdefault(path.resolve(), (folder if folder.is_dir() else folder.parent, path))
    if not found:
        where = ", ".join(f"{folder} ({listing(folder)})" for folder in folders)
        raise ValueError(f"expected font files ({', '.join(FONT_SUFFIXES)}) below --fonts, got none in {where}")
    return list(found.values())


def _faces_of(path: Path, root: Path) -> list[_Face]:
    """The faces of a file that have outlines."""
    faces = []
    with _faces_in(path) as fonts:
        for number, font in enumerate(fonts):
            try:
                _font(path, number, 96)
            except OSError:
                if _BITMAPS.isdisjoint(font.keys()):
                    raise
                continue  # FreeType scales no bitmaps
            os2 = font.get("OS/2")
            weight = os2.usWeightClass if os2 else 400
            italic = bool(font["head"].macStyle & 2) or bool(os2 and os2.fsSelection & 1)
            wide = bool(os2 and os2.usWidthClass not in (0, 5))
            family = " ".join((_named(font, 16) or _named(font, 1) or path.stem).replace("/", " ").split())
            preference = (italic, wide, abs(weight - 400), -font["maxp"].numGlyphs)
            faces.append(_Face(root, path, number, family, preference, weight))
    return faces


def _typeface(face: _Face) -> Typeface:
    with _faces_in(face.path) as fonts:
        font = fonts[face.number]
        table = font.getBestCmap() or {}  # none: a font of symbols, whose codes are its own
        copyright_, licence, licence_url = (_named(font, name_id) for name_id in (0, 13, 14))
    return Typeface(
        name=face.family,
        file=face.path,
        place=str(face.path.relative_to(face.root)),
        face=face.number,
        sha256=sha256_of(face.path),
        weight=face.weight,
        copyright=copyright_,
        licence=licence,
        licence_url=licence_url,
        licence_files=_licence_files(face.path, face.root),
        characters=tuple(sorted(c for c, glyph in table.items() if glyph != ".notdef" and is_usable(c))),
    )


@contextmanager
def _faces_in(path: Path) -> Iterator[list[Any]]:
    """The faces of a font file as fontTools reads them, table by table, while it is open."""
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of what fonts may lack
    with open(path, "rb") as stream:
        is_collection = stream.read(4) == b"ttcf"
        stream.seek(0)
        yield list(TTCollection(stream, lazy=True).fonts) if is_collection else [TTFont(stream, lazy=True)]


def _named(font: Any, name_id: int) -> str:
    """An entry of the name table, in English if there is one; empty if there is none."""
    try:
        return (font["name"].getDebugName(name_id) or "").strip()
    except (KeyError, UnicodeError):
        return ""


def _licence_files(path: Path, root: Path) -> tuple[Path, ...]:
    """The files that are named as licences are, in the folder nearest to the font, up to the one that was given."""
    for folder in path.parents:
        found = sorted(
            file
            for file in folder.iterdir()
            if _LICENCE.fullmatch(file.name) and file.is_file() and not file.is_symlink()
        )
        if found or folder == root:
            return tuple(found)
    return ()


def _reason(problem: Exception) -> str:
    if isinstance(problem, ImportError):
        return "WOFF2 needs brotli: pip install 'dist_proxygml[woff2]'"
    return f"{type(problem).__name__}: {' '.join(str(problem).split()) or 'no font'}"


# ---- their pictures, in any process ----------------------------------------------------------------------------------


def font_size(typeface: Typeface, side: int) -> int:
    """The size at which a typeface's letters fill pictures of `side` pixels; 0 if it draws none."""
    letters = [c for c in typeface.characters if unicodedata.category(chr(c)) == "Lo"] or list(typeface.characters)
    large = side * _OVERSAMPLING
    font = _font(typeface.file, typeface.face, large)
    inks = (_ink(font, c, side) for c in letters[:: max(1, len(letters) // _NUM_LETTERS)])
    sides = sorted(max(ink.size) for ink in inks if ink is not None)
    return max(8, round(large * large * _MEDIAN_INK / sides[len(sides) // 2])) if sides else 0


def draw(task: Glyphs) -> list[tuple[int, bytes]]:
    """(character, PNG) of those that have ink."""
    font = _font(task.file, task.face, task.font_size)
    large = task.side * _OVERSAMPLING
    result = []
    for character in task.characters:
        ink = _ink(font, character, task.side)
        if ink is None:
            continue
        if max(ink.size) > large - _OVERSAMPLING:
            factor = (large - _OVERSAMPLING) / max(ink.size)
            size = (max(1, round(ink.width * factor)), max(1, round(ink.height * factor)))
            ink = ink.resize(size, Image.Resampling.BOX)
        canvas = Image.new("L", (large, large))
        canvas.paste(ink, ((large - ink.width) // 2, (large - ink.height) // 2))
        small = canvas.reduce(_OVERSAMPLING)
        if max(small.tobytes()) > _FAINTEST:
            stream = io.BytesIO()
            small.point(_INVERTED).save(stream, "PNG")
            result.append((character, stream.getvalue()))
    return result


_INVERTED = [255 - grey for grey in range(256)]


def _font(file: Path, face: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, index=face, layout_engine=ImageFont.Layout.BASIC)


def _ink(font: ImageFont.FreeTypeFont, character: int, side: int) -> Image.Image | None:
    """The box of a character's ink, white on black; None if there is none, or a fault in it."""
    text = chr(character)
    try:
        left, top, right, bottom = map(round, font.getbbox(text))
        width, height = right - left, bottom - top
        if not 0 < max(width, height) <= _LARGEST_INK * side * _OVERSAMPLING or min(width, height) <= 0:
            return None
        canvas = Image.new("L", (width, height))
        ImageDraw.Draw(canvas).text((-left, -top), text, fill=255, font=font)
    except OSError:  # FreeType's errors of one glyph
        return None
    box = canvas.getbbox()
    return None if box is None else canvas.crop(box)
