"""Fonts of rectangles, drawn for tests: what a character looks like, and what a font only claims, is known."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

UNITS = 1000

Rectangles = Sequence[tuple[int, int, int, int]]  # left, bottom, right, top; none: a character without ink

BOX: Rectangles = [(0, 0, 700, 60), (0, 640, 700, 700), (0, 0, 60, 700), (640, 0, 700, 700)]


def strokes(seed: str) -> Rectangles:
    """Some rectangles that fill a square of 700 units from edge to edge, others for another seed."""
    draw = random.Random(seed)
    bars = [(0, 0, 700, 40), (0, 0, 40, 700)]
    for _ in range(5):
        left, bottom = draw.randrange(0, 560, 20), draw.randrange(0, 560, 20)
        bars.append((left, bottom, left + draw.choice((60, 140)), bottom + draw.choice((60, 140))))
    return [*bars, (660, 660, 700, 700)]


def build_font(
    shapes: Mapping[str, Rectangles], family: str, *, weight: int = 400, italic: bool = False, licence: str = ""
) -> FontBuilder:
    """A TrueType font with a glyph for each character; equal shapes are glyphs of their own."""
    builder = FontBuilder(UNITS)
    names = {character: f"u{ord(character):04X}" for character in shapes}
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    glyphs = {".notdef": _glyph(BOX)} | {names[character]: _glyph(shape) for character, shape in shapes.items()}
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (UNITS, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    style = "Italic" if italic else f"W{weight}"
    texts = {
        "familyName": family,
        "styleName": style,
        "licenseDescription": licence,
        "copyright": f"Drawn for {family}",
    }
    builder.setupNameTable({name: text for name, text in texts.items() if text})
    builder.setupOS2(usWeightClass=weight, fsSelection=int(italic))
    builder.setupPost()
    return builder


def write_font(path: Path, shapes: Mapping[str, Rectangles], family: str, **options: object) -> Path:
    """Write `build_font`'s font, in WOFF2 where the path says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    builder = build_font(shapes, family, **options)  # type: ignore[arg-type]
    if path.suffix == ".woff2":
        builder.font.flavor = "woff2"
    builder.save(path)
    return path


def _glyph(rectangles: Rectangles) -> object:
    pen = TTGlyphPen(None)
    for left, bottom, right, top in rectangles:
        pen.moveTo((left, bottom))
        for point in ((left, top), (right, top), (right, bottom)):
            pen.lineTo(point)
        pen.closePath()
    return pen.glyph()
