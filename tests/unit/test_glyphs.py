"""Typefaces to classes and splits, of fonts that the tests draw."""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dist_proxygml.data.datasets import SourceDataset, SourceImage
from dist_proxygml.data.glyphs import read_glyphs
from dist_proxygml.shard import main
from tests.drawn_fonts import BOX, Rectangles, strokes, write_font

LATIN = "abcdefghijklmnopqrstuvwxyz"
# FreeType hints no script but this one the same in each font, so equal shapes are equal pictures.
YI = "".join(map(chr, range(0xA000, 0xA014)))
HANGUL = "가각간갇갈갉갊감갑값"


def font(folder: Path, name: str, characters: str, changes: dict[str, Rectangles] | None = None) -> Path:
    """A font whose design is called `name`; the same name draws a character in the same way."""
    shapes = {c: strokes(f"{name}/{c}") for c in characters} | (changes or {})
    return write_font(folder / f"{name}.ttf", shapes, name)


def read(folder: Path, **settings: object) -> SourceDataset:
    return read_glyphs([folder], workers=1, quiet=True, **settings)  # type: ignore[arg-type]


def drawn_by(dataset: SourceDataset) -> dict[str, set[str]]:
    """The typefaces of each class."""
    result: defaultdict[str, set[str]] = defaultdict(set)
    for image in dataset.images:
        result[chr(int(image.source_id))].add(image.info["typeface"])
    return dict(result)


def trains(character: str) -> bool:
    return hashlib.sha1(character.encode()).hexdigest()[1] in "02468ace"


def document(dataset: SourceDataset) -> dict[str, object]:
    return json.loads(dataset.beside["fonts.json"])


@pytest.fixture
def fonts(tmp_path: Path) -> Path:
    """Typefaces: of Latin letters, two of Yi as well, one of some Hangul that no other has."""
    folder = tmp_path / "fonts"
    for name, characters in {
        "A": LATIN + YI,
        "B": LATIN,
        "C": LATIN + YI,
        "D": LATIN[:13] + HANGUL,
    }.items():
        font(folder, name, characters)
    return folder


def test_half_of_the_characters_train_and_searches_cross_typefaces(fonts: Path) -> None:
    dataset = read(fonts, min_images=3)
    assert drawn_by(dataset) == {c: {"A", "B", "C", "D"} if c in LATIN[:13] else {"A", "B", "C"} for c in LATIN}
    of_class: defaultdict[str, list[SourceImage]] = defaultdict(list)
    for image in dataset.images:
        of_class[chr(int(image.source_id))].append(image)
    queries = Counter[str]()
    for character, images in of_class.items():
        splits = {image.info["typeface"]: image.split for image in images}
        if trains(character):
            assert set(splits.values()) == {"train"}
            continue
        assert splits.pop("A") == "gallery"  # the first that draws it
        query = min(splits, key=lambda name: hashlib.sha256(f"{character}/{name}".encode()).digest())
        assert splits == {name: "query" if name == query else "test" for name in splits}
        queries[query] += 1
    assert len(queries) > 1
    assert {c for c in of_class if trains(c)} not in (set(), set(of_class))
    image = dataset.images[0]
    assert (image.class_name, image.name, image.info) == (
        "a U+0061",
        "U+0061/A.png",
        {"typeface": "A", "script": "LATIN"},
    )
    assert dataset.shared_classes == (("gallery", "query", "test"),)
    numbers = document(dataset)
    assert numbers["characters_by_images"] == {"1": 10, "2": 20, "3": 13, "4": 13}
    assert "10 with 1, 20 with 2, 13 with 3, 13 with 4" in dataset.notes[-1]


def test_the_order_of_folders_decides_about_the_gallery(fonts: Path, tmp_path: Path) -> None:
    dataset = read_glyphs([fonts / "C.ttf", fonts], min_images=3, workers=1, quiet=True)
    assert {image.info["typeface"] for image in dataset.images if image.split == "gallery"} == {"C"}


def test_fewer_images_make_more_classes(fonts: Path) -> None:
    assert set(drawn_by(read(fonts, min_images=2))) == {*LATIN, *YI}
    assert set(drawn_by(read(fonts, min_images=4))) == {*LATIN[:13]}
    with pytest.raises(ValueError, match=r"got 0 and 0 of 4 typefaces with 10 with 1, .* lower --min-images"):
        read(fonts, min_images=5)


def test_a_picture_of_four_characters_is_a_placeholder(fonts: Path) -> None:
    font(fonts, "E", LATIN, dict.fromkeys("abcd", BOX) | dict.fromkeys("ef", strokes("twice")) | {"z": []})
    found = drawn_by(read(fonts, min_images=3))
    assert {c for c in LATIN if "E" not in found[c]} == set("abcdefz")


def test_characters_that_most_typefaces_draw_alike_are_one_class(fonts: Path) -> None:
    # The second is drawn as the first by both typefaces that have it, the fourth as the third by one of two, the sixth
    # as the fifth by one of three.
    first, second, third, fourth, fifth, sixth = YI[:6]
    font(fonts, "A", LATIN + YI, {later: strokes(f"A/{c}") for c, later in zip(YI[0:6:2], YI[1:6:2], strict=True)})
    font(fonts, "C", LATIN + YI, {second: strokes(f"C/{first}")})
    font(fonts, "B", LATIN + fifth + sixth)
    dataset = read(fonts, min_images=2)
    assert document(dataset)["merged_characters"] == {second: first, fourth: third}
    found = drawn_by(dataset)
    assert found[first] == found[third] == {"A", "C"}
    assert found[fifth] == found[sixth] == {"B", "C"}  # which one A draws cannot be said
    assert {second, fourth}.isdisjoint(found)
    pictures = Counter((image.info["typeface"], image.content) for image in dataset.images)
    assert max(pictures.values()) == 1


def test_equal_pictures_of_a_class_come_once(fonts: Path) -> None:
    # E is A; of Yi it has too few characters to be compared.
    shapes = {c: strokes(f"A/{c}") for c in LATIN + YI}
    font(fonts, "E", LATIN + YI[:19], {c: shapes[c] for c in LATIN + YI[:19]})
    assert all("E" not in typefaces for typefaces in drawn_by(read(fonts, min_images=2)).values())
    font(fonts, "E", LATIN + YI[:19], {c: shapes[c] for c in LATIN})
    assert "E" in drawn_by(read(fonts, min_images=2))[YI[0]]


def test_a_typeface_loses_the_scripts_whose_outlines_it_shares(fonts: Path) -> None:
    # Two thirds of E's Latin letters are A's, moved by 3 units of 1000; a third of F's are; their Yi is their own.
    def moved(character: str) -> Rectangles:
        return [tuple(edge + 3 for edge in bar) for bar in strokes(f"A/{character}")]  # type: ignore[misc]

    font(fonts, "E", LATIN + YI, {c: moved(c) for c in LATIN[:18]})
    font(fonts, "F", LATIN + YI, {c: moved(c) for c in LATIN[:9]})
    dataset = read(fonts, min_images=2)
    found = drawn_by(dataset)
    assert {c for c in found if "E" in found[c]} == set(YI)
    assert {c for c in found if "F" in found[c]} >= {*LATIN[9:], *YI}
    assert any("1 typefaces share their outlines" in note for note in dataset.notes)
    (record,) = [one for one in document(dataset)["typefaces"] if one["name"] == "E"]  # type: ignore[attr-defined]
    assert record["scripts_of_earlier"] == {"LATIN": "A"}


def test_fonts_and_licences_are_listed(fonts: Path) -> None:
    (fonts / "OFL.txt").write_text("Permission is hereby granted")
    write_font(fonts / "alone" / "G.ttf", {"→": BOX}, "G")
    dataset = read(fonts, min_images=3)
    numbers = document(dataset)
    assert [
        (one["name"], one["file"], one["sha256"], one["images"])
        for one in numbers["typefaces"]  # type: ignore[attr-defined]
    ] == [
        (name, f"{name}.ttf", hashlib.sha256((fonts / f"{name}.ttf").read_bytes()).hexdigest(), number)
        for name, number in zip("ABCD", (26, 26, 26, 13), strict=True)
    ]
    assert numbers["versions"]["unicode"] == unicodedata.unidata_version  # type: ignore[index]
    text = dataset.beside["LICENSES.txt"].decode()
    assert text.count("Permission is hereby granted") == 1
    assert all(f"{name} ({name}.ttf)" in text for name in "ABCD")
    assert "G.ttf" not in text


def test_a_build_is_the_same_bytes_again_and_knows_its_settings(
    fonts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fonts / "LICENSE").write_text("free")
    build = ["build", "glyphs", "--fonts", str(fonts), "--min-images", "3", "--samples-per-shard", "20"]
    for name, workers in (("one", "1"), ("two", "2")):
        assert main([*build, "--out", str(tmp_path / name), "--num-workers", workers]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert {"fonts.json", "LICENSES.txt", "train-000001.tar", "query-000000.tar"} < set(files)
    assert main(["verify", "--deep", str(tmp_path / "one")]) == 0

    capsys.readouterr()
    assert main([*build, "--out", str(tmp_path / "one")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*build, "--out", str(tmp_path / "one"), "--size", "24"]) == 2
    assert "other images" in capsys.readouterr().err
    assert main([*build, "--out", str(tmp_path / "one"), "--size", "24", "--overwrite"]) == 0
    assert json.loads((tmp_path / "one" / "fonts.json").read_text())["size"] == 24
