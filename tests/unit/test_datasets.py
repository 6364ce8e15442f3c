"""Raw downloads as they come, through the command line that builds shards of them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dist_proxygml.data import datasets
from dist_proxygml.data.index import open_index
from dist_proxygml.protocols import PROTOCOLS
from dist_proxygml.shard import main
from tests.raw_downloads import (
    LAYOUTS,
    Layout,
    cars_csv,
    cars_devkit,
    cars_one_folder,
    content_of,
    cub,
    inshop,
    samples_of,
    sop,
    write_image,
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.mark.parametrize(("name", "layout", "expected"), LAYOUTS, ids=[layout.__name__ for _, layout, _ in LAYOUTS])
def test_a_raw_layout_becomes_the_metric_learning_split_with_its_own_bytes(
    name: str,
    layout: Layout,
    expected: dict[str, list[tuple[int | str, int]]],
    raw: Path,
    tmp_path: Path,
) -> None:
    layout(raw)
    out = tmp_path / "out"
    arguments = ["build", name, "--data", str(raw), "--out", str(out), "--allow-partial"]
    assert main([*arguments, "--samples-per-shard", "2"]) == 0
    assert main(["verify", "--deep", str(out)]) == 0
    originals = {path.read_bytes() for path in raw.rglob("*.[jJ]*")}
    found = set()
    for split, classes in expected.items():
        index = open_index(out, split)
        assert [(entry.source_id, entry.count) for entry in index.classes] == classes
        assert [entry.label for entry in index.classes] == list(range(len(classes)))
        for sample in samples_of(out, split):
            entry = index.classes[int(sample["cls"])]
            info = json.loads(sample["json"])
            assert (info["class_name"], info["source_id"]) == (entry.name, entry.source_id)
            assert (info["split"], info["width"], info["height"]) == (split, 6, 5)
            # The image is the one that the source lists under this class.
            source = next(raw.rglob(Path(info["source"]).name)) if name != "cars196" else None
            assert source is None or source.read_bytes() == sample["jpg"]
            found.add(sample["jpg"])
    assert found == originals


def test_published_counts_are_those_of_the_protocols() -> None:
    for protocol in PROTOCOLS.values():
        counts = datasets.PUBLISHED_COUNTS[protocol.dataset]
        test = counts["test" if protocol.num_gallery is None else "query"]
        gallery = counts.get("gallery", (None, 0))
        assert test[0] == protocol.num_images
        assert max(test[1], gallery[1]) == protocol.num_classes  # Market-1501's distractors are a class of the gallery
        assert gallery[0] == protocol.num_gallery


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, layout, _ in LAYOUTS],
    ids=[layout.__name__ for _, layout, _ in LAYOUTS],
)
def test_published_counts_are_asserted(
    name: str, layout: Layout, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout(raw)
    assert main(["build", name, "--data", str(raw), "--out", str(tmp_path / "out")]) == 2
    images, classes = datasets.PUBLISHED_COUNTS[name]["train"]
    error = capsys.readouterr().err
    assert f"{name} train: expected {images} images of {classes} classes as published" in error
    assert "--allow-partial" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cub200", "cars196", "sop", "inshop"])
def test_a_wrong_layout_says_what_was_looked_for_and_found(
    name: str, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(raw / "pictures" / "a.jpg", 1)
    assert main(["build", name, "--data", str(raw), "--out", str(raw / "out")]) == 2
    error = capsys.readouterr().err
    assert "looked for" in error
    assert "found pictures/" in error
    assert "--data" in error


def test_missing_images_are_counted_or_left_out(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sop(raw)
    next(raw.rglob("*_3.JPG")).unlink()
    arguments = ["build", "sop", "--data", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "1 of the 5 images" in capsys.readouterr().err
    assert main([*arguments, "--allow-partial"]) == 0
    assert "1 listed images are not there" in capsys.readouterr().err
    assert open_index(tmp_path / "out", "train").num_samples == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("CUB_200_2011/image_class_labels.txt", "7 1\n", "", "list different ids"),
        ("CUB_200_2011/classes.txt", "100 ", "102 ", "which classes.txt does not list"),
        ("CUB_200_2011/images.txt", "7 ", "seven ", "images.txt: expected a whole number"),
        ("CUB_200_2011/image_class_labels.txt", "7 1\n", "7 b\n", "image_class_labels.txt, image 7: expected a whole"),
        (
            "CUB_200_2011/bounding_boxes.txt",
            "7 1.0",
            "7 x",
            "bounding_boxes.txt, image 7: expected numbers, got 'x 2.0",
        ),
        ("Stanford_Online_Products/Ebay_test.txt", " 11319 ", " x ", "Ebay_test.txt, image bicycle_final/111011319_4"),
        ("CUB_200_2011/image_class_labels.txt", "7 1\n", "7\n", "expected 2 fields"),
        ("CUB_200_2011/image_class_labels.txt", "7 1\n", "7 1\n7 100\n", "has the id 7 twice"),
        ("CUB_200_2011/images.txt", "Bird_7.jpg", "Bird_2.jpg", "lists 001.Black_footed_Albatross/Bird_2.jpg twice"),
        ("CUB_200_2011/images.txt", "001.Black_footed_Albatross/Bird_7", "../../../private", "which leads out of it"),
    ],
)
def test_garbled_tables_are_refused(
    file: str, old: str, new: str, message: str, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, layout = ("cub200", cub) if file.startswith("CUB") else ("sop", sop)
    layout(raw)
    text = (raw / file).read_text()
    assert old in text
    (raw / file).write_text(text.replace(old, new, 1))
    if "seven" in new:
        labels = raw / "CUB_200_2011" / "image_class_labels.txt"
        labels.write_text(labels.read_text().replace("7 1\n", "seven 1\n"))
    assert main(["build", name, "--data", str(raw), "--out", str(raw / "out")]) == 2
    assert message in capsys.readouterr().err


# ---- downloads as they come ------------------------------------------------------------------


def move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def into_itself(folder: Path) -> None:
    """`folder/` becomes `folder/folder/`, as of an archive unpacked into a folder of its own name."""
    folder.rename(folder.with_name("aside"))
    move(folder.with_name("aside"), folder / folder.name)


def all_into(raw: Path, folder: str) -> None:
    raw.rename(raw.with_name("aside"))
    move(raw.with_name("aside"), raw / folder)


def crlf(raw: Path) -> None:
    for path in (*raw.rglob("*.txt"), *raw.rglob("*.csv")):
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


def blank_lines_and_byte_order_mark(raw: Path) -> None:
    for path in (*raw.rglob("*.txt"), *raw.rglob("*.csv")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n\n" * (path.suffix == ".txt") + b"\n\n")


def lower_suffixes(raw: Path) -> None:
    for path in raw.rglob("*.[jJ]*"):
        path.rename(path.with_suffix(".jpg"))


def upper_suffixes(raw: Path) -> None:
    for path in raw.rglob("*.[jJ]*"):
        path.rename(path.with_suffix(".JPG"))


def strewn_with_hidden_files(raw: Path) -> None:
    for folder in [raw, *(path for path in raw.rglob("*") if path.is_dir())]:
        (folder / ".DS_Store").write_bytes(b"x")
        (folder / "._a.jpg").write_bytes(b"x")
        (folder / "Thumbs.db").write_bytes(b"x")
    (raw / "__MACOSX" / "CUB_200_2011").mkdir(parents=True)


VARIATIONS: list[Callable[[Path], None]] = [
    crlf,
    blank_lines_and_byte_order_mark,
    lower_suffixes,
    upper_suffixes,
    strewn_with_hidden_files,
    partial(all_into, folder="unpacked"),
    partial(all_into, folder="stanford_cars"),
]
NAMES = ["crlf", "blank", "lower", "upper", "hidden", "deeper", "stanford_cars"]


@pytest.mark.parametrize("vary", VARIATIONS, ids=NAMES)
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, layout, _ in LAYOUTS],
    ids=[layout.__name__ for _, layout, _ in LAYOUTS],
)
def test_a_download_gives_the_same_however_it_was_packed(
    name: str, layout: Layout, vary: Callable[[Path], None], raw: Path, tmp_path: Path
) -> None:
    layout(raw)
    expected = content_of(raw, name, tmp_path / "plain")
    vary(raw)
    assert content_of(raw, name, tmp_path / "varied") == expected


@pytest.mark.parametrize(
    ("name", "layout", "vary"),
    [
        ("cub200", cub, lambda raw: into_itself(raw / "CUB_200_2011")),
        ("cub200", cub, lambda raw: into_itself(raw / "CUB_200_2011" / "images")),
        ("cub200", cub, lambda raw: (raw / "CUB_200_2011" / "bounding_boxes.txt").unlink()),
        ("sop", sop, lambda raw: into_itself(raw / "Stanford_Online_Products")),
        ("cars196", cars_one_folder, lambda raw: into_itself(raw / "car_ims")),
        ("cars196", cars_devkit, lambda raw: into_itself(raw / "cars_train")),
        ("cars196", cars_devkit, lambda raw: move(raw / "devkit", raw / "car_devkit" / "devkit")),
        ("cars196", cars_devkit, lambda raw: move(raw / WITH_LABELS, raw / WITH_LABELS.name)),
        ("cars196", cars_devkit, lambda raw: move(raw / WITH_LABELS, raw / "cars_test_annos_withlabels (1).mat")),
        ("cars196", cars_csv, lambda raw: move(raw / "car_data" / "car_data", raw / "inner") or flat(raw)),
        ("inshop", inshop, lambda raw: move(raw / "Eval" / INSHOP_LIST, raw / INSHOP_LIST)),
        ("inshop", inshop, lambda raw: move(raw / "Eval" / INSHOP_LIST, raw / "Anno" / INSHOP_LIST)),
        ("inshop", inshop, lambda raw: move(raw / "Img" / "img", raw / "img")),
        ("inshop", inshop, lambda raw: move(raw / "Img" / "img", raw / "Img" / "img_highres")),
        ("inshop", inshop, lambda raw: move(raw / "Img" / "img", raw / "img_highres" / "img_highres")),
        ("inshop", inshop, lambda raw: into_itself(raw / "Img" / "img")),
        ("inshop", inshop, lambda raw: move(raw / "Img" / "img", raw / "img_highres") or (raw / "img").mkdir()),
    ],
)
def test_files_are_found_where_copies_of_a_download_have_them(
    name: str, layout: Layout, vary: Callable[[Path], None], raw: Path, tmp_path: Path
) -> None:
    layout(raw)
    expected = content_of(raw, name, tmp_path / "plain")
    vary(raw)
    assert content_of(raw, name, tmp_path / "varied") == expected


WITH_LABELS = Path("devkit/cars_test_annos_withlabels.mat")
INSHOP_LIST = "list_eval_partition.txt"


def flat(raw: Path) -> None:
    (raw / "car_data").rmdir()
    (raw / "inner").rename(raw / "car_data")


def test_what_is_still_packed_is_named(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inshop(raw)
    shutil.rmtree(raw / "Img" / "img")
    (raw / "Img" / "img.zip").write_bytes(b"PK")
    assert main(["build", "inshop", "--data", str(raw), "--out", str(raw / "out")]) == 2
    assert "unpack Img/img.zip" in capsys.readouterr().err
    assert main(["build", "cub200", "--data", str(raw / "Img" / "img.zip"), "--out", str(raw / "out")]) == 2
    assert "found a file, no folder" in capsys.readouterr().err


def test_two_downloads_below_one_root_are_not_mixed_up(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sop(raw)
    shutil.copytree(raw / "Stanford_Online_Products", raw / "copy")
    assert main(["build", "sop", "--data", str(raw), "--out", str(raw / "out"), "--allow-partial"]) == 2
    assert "has several downloads" in capsys.readouterr().err


def test_cars_without_the_test_labels_says_so(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cars_devkit(raw)
    move(raw / WITH_LABELS, raw / "devkit" / "cars_test_annos.mat")
    assert main(["build", "cars196", "--data", str(raw), "--out", str(raw / "out")]) == 2
    assert "cars_test_annos_withlabels" in capsys.readouterr().err
    shutil.copy(raw / "devkit" / "cars_meta.mat", raw / WITH_LABELS)
    assert main(["build", "cars196", "--data", str(raw), "--out", str(raw / "out")]) == 2
    assert "cars_test_annos_withlabels.mat has no variable 'annotations'" in capsys.readouterr().err
    (raw / WITH_LABELS).write_bytes(b"<html>404</html>")
    assert main(["build", "cars196", "--data", str(raw), "--out", str(raw / "out")]) == 2
    assert "is not a readable MATLAB file" in capsys.readouterr().err
