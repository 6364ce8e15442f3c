"""Fonts to typefaces and pictures, of fonts that the tests draw."""

import io
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTCollection
from PIL import Image

from dist_proxygml.data.typefaces import Glyphs, Typeface, draw, font_size, is_usable, read_typefaces, script_of
from tests.drawn_fonts import BOX, build_font, strokes, write_font

LETTERS = {character: strokes(character) for character in "abcdefghij"}


def pictures(typeface: Typeface, side: int = 32) -> dict[str, np.ndarray]:
    task = Glyphs(typeface.file, typeface.face, font_size(typeface, side), side, typeface.characters)
    return {chr(character): np.asarray(Image.open(io.BytesIO(png))) for character, png in draw(task)}


def read(*folders: Path, on_bad: str = "fail") -> tuple[list[Typeface], list[str]]:
    return read_typefaces(folders, on_bad=on_bad, quiet=True)  # type: ignore[arg-type]


def test_letters_and_numbers_that_nfkc_leaves_alone_are_usable() -> None:
    assert [c for c in "aΩ龍한7Ⴀ፩" if not is_usable(ord(c))] == []
    # a ligature, full width, a compatibility ideograph, a superscript; mark, modifier, punctuation, symbol, radical;
    # private, unassigned
    assert [c for c in "ﬁＡ²\uf900\u0301ʰ,+⺅\ue000\u0378" if is_usable(ord(c))] == []
    assert [script_of(ord(c)) for c in "a龍한"] == ["LATIN", "CJK", "HANGUL"]


def test_a_picture_is_the_ink_centred_black_on_white(tmp_path: Path) -> None:
    write_font(tmp_path / "one.ttf", {"a": [(100, 0, 800, 350)], "b": [(0, 300, 700, 1000)], "c": BOX}, "One")
    ((typeface,), notes) = read(tmp_path)
    assert notes == []
    for side in (32, 40):
        drawn = pictures(typeface, side)
        assert drawn["a"].shape == (side, side)
        # 700 units, the median of the larger sides, are 27/32 of the picture; a is half as high as it is wide.
        ink = np.argwhere(drawn["a"] < 128)
        height, width = ink.max(0) - ink.min(0) + 1
        assert abs(width - side * 27 / 32) <= 1
        assert abs(height - side * 27 / 64) <= 1
        assert np.abs(ink.max(0) + ink.min(0) - (side - 1)).max() <= 1
        assert drawn["a"].min() == 0
        assert drawn["a"].max() == 255


def test_ink_too_large_is_reduced_to_fit(tmp_path: Path) -> None:
    shapes = {**LETTERS, "z": [(0, 0, 3000, 60), (0, 0, 60, 1500)]}
    write_font(tmp_path / "one.ttf", shapes, "One")
    ((typeface,), _) = read(tmp_path)
    ink = np.argwhere(pictures(typeface)["z"] < 255)
    height, width = ink.max(0) - ink.min(0) + 1
    assert 30 <= width <= 32
    assert 15 <= height <= 17


def test_what_a_font_claims_without_ink_is_not_drawn(tmp_path: Path) -> None:
    write_font(tmp_path / "one.ttf", {**LETTERS, "x": [], "y": [(0, 0, 1, 1)]}, "One")
    ((typeface,), _) = read(tmp_path)
    assert {ord("x"), ord("y")} < set(typeface.characters)
    assert sorted(pictures(typeface)) == list("abcdefghij")


def test_a_character_on_the_notdef_glyph_is_not_claimed(tmp_path: Path) -> None:
    builder = build_font(LETTERS, "One")
    for table in builder.font["cmap"].tables:
        table.cmap[ord("q")] = ".notdef"
    builder.save(tmp_path / "one.ttf")
    ((typeface,), _) = read(tmp_path)
    assert typeface.characters == tuple(map(ord, "abcdefghij"))


def test_a_family_gives_its_regular_upright_face(tmp_path: Path) -> None:
    write_font(tmp_path / "a-bold.ttf", LETTERS, "One", weight=700)
    write_font(tmp_path / "b-italic.ttf", LETTERS, "One", italic=True)
    write_font(tmp_path / "c-book.ttf", LETTERS, "One", weight=350)
    write_font(tmp_path / "d-large.ttf", {**LETTERS, "k": BOX}, "One", weight=450)
    write_font(tmp_path / "e-same.ttf", LETTERS, "One", weight=450)
    write_font(tmp_path / "a-other.ttf", LETTERS, "Two", weight=900)
    typefaces, _ = read(tmp_path)
    assert [(t.name, t.place, t.weight) for t in typefaces] == [
        ("Two", "a-other.ttf", 900),
        ("One", "d-large.ttf", 450),
    ]


def test_order_is_that_of_the_folders_and_a_file_comes_once(tmp_path: Path) -> None:
    for name in ("a/one", "a/deeper/two", "b/three"):
        write_font(tmp_path / f"{name}.ttf", LETTERS, name[-3:])
    names = [t.place for t in read(tmp_path / "b", tmp_path)[0]]
    assert names == ["three.ttf", "a/deeper/two.ttf", "a/one.ttf"]
    assert [t.place for t in read(tmp_path / "a" / "one.ttf")[0]] == ["one.ttf"]


def test_collections_and_woff2_give_the_pictures_of_their_fonts(tmp_path: Path) -> None:
    plain = write_font(tmp_path / "plain" / "one.ttf", LETTERS, "One")
    write_font(tmp_path / "web" / "one.woff2", LETTERS, "One")
    collection = TTCollection()
    collection.fonts = [build_font({"a": BOX}, "Box").font, build_font(LETTERS, "One").font]
    (tmp_path / "two").mkdir()
    collection.save(tmp_path / "two" / "two.ttc")

    (reference,), (web,), (box, second) = (read(tmp_path / name)[0] for name in ("plain", "web", "two"))
    assert (box.name, box.face, second.name, second.face) == ("Box", 0, "One", 1)
    expected = pictures(reference)
    for typeface in (web, second):
        drawn = pictures(typeface)
        assert drawn.keys() == expected.keys()
        assert all(np.array_equal(drawn[c], expected[c]) for c in expected)
    assert not np.array_equal(pictures(box)["a"], expected["a"])
    assert plain.read_bytes() != (tmp_path / "web" / "one.woff2").read_bytes()


def test_broken_fonts_are_named_all_together_or_left_out(tmp_path: Path) -> None:
    whole = write_font(tmp_path / "whole.ttf", LETTERS, "Whole")
    (tmp_path / "cut.ttf").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "noise.otf").write_bytes(b"no font at all")
    with pytest.raises(
        ValueError, match=r"2 font files cannot be read:(?s:.*)cut\.ttf(?s:.*)noise\.otf(?s:.*)--on-bad skip"
    ):
        read(tmp_path)
    typefaces, notes = read(tmp_path, on_bad="skip")
    assert [t.name for t in typefaces] == ["Whole"]
    assert ["cut.ttf" in note or "noise.otf" in note for note in notes] == [True, True]


def test_fonts_without_letters_are_said_and_left_out(tmp_path: Path) -> None:
    write_font(tmp_path / "arrows.ttf", {"→": BOX, "+": BOX}, "Arrows")
    write_font(tmp_path / "letters.ttf", LETTERS, "Letters")
    typefaces, notes = read(tmp_path)
    assert [t.name for t in typefaces] == ["Letters"]
    assert len(notes) == 1
    assert "arrows.ttf" in notes[0]


def test_no_fonts_and_no_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    write_font(tmp_path / ".hidden.ttf", LETTERS, "Hidden")
    with pytest.raises(ValueError, match=r"got none in .*readme\.txt"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere, which is not there; correct --fonts"):
        read(tmp_path / "nowhere")


def test_licences_are_those_nearest_to_the_font(tmp_path: Path) -> None:
    for name in ("a/b/one", "a/two", "three"):
        write_font(tmp_path / f"{name}.ttf", LETTERS, name[-3:], licence=f"of {name}")
    (tmp_path / "a" / "b" / "copyright").write_text("nearest")
    (tmp_path / "a" / "b" / "copyrighted.txt").write_text("no licence")
    (tmp_path / "LICENSE_SANS").write_text("of all")
    (tmp_path / "OFL.txt").write_text("of all, too")
    found = {t.place: ([file.name for file in t.licence_files], t.licence, t.copyright) for t in read(tmp_path)[0]}
    assert found == {
        "a/b/one.ttf": (["copyright"], "of a/b/one", "Drawn for one"),
        "a/two.ttf": (["LICENSE_SANS", "OFL.txt"], "of a/two", "Drawn for two"),
        "three.ttf": (["LICENSE_SANS", "OFL.txt"], "of three", "Drawn for ree"),
    }
    # Nothing above the folder that was given is read.
    assert read(tmp_path / "a" / "two.ttf")[0][0].licence_files == ()
