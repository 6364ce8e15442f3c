"""Raw downloads as they come, through the command line that builds shards of them."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

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
    arguments = ["build", name, "--root", str(raw), "--out", str(out), "--allow-partial"]
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
    assert main(["build", name, "--root", str(raw), "--out", str(tmp_path / "out")]) == 2
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
    assert main(["build", name, "--root", str(raw), "--out", str(raw / "out")]) == 2
    error = capsys.readouterr().err
    assert "looked for" in error
    assert "found pictures/" in error
    assert "--root" in error


def test_missing_images_are_counted_or_left_out(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sop(raw)
    next(raw.rglob("*_3.JPG")).unlink()
    arguments = ["build", "sop", "--root", str(raw), "--out", str(tmp_path / "out")]
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
    assert main(["build", name, "--root", str(raw), "--out", str(raw / "out")]) == 2
    assert message in capsys.readouterr().err


# ---- downloads as they come ------------------------------------------------------------------


def content_of(raw: Path, name: str, out: Path) -> set[tuple[str, str, str, str, bytes]]:
    """Split, class id and name, label and image of every sample of a build."""
    assert main(["build", name, "--root", str(raw), "--out", str(out), "--allow-partial"]) == 0
    found = set()
    for split in json.loads((out / "index.json").read_text())["splits"]:
        for sample in samples_of(out, split):
            info = json.loads(sample["json"])
            image = sample["jpg"] if "jpg" in sample else sample["png"]
            found.add((split, str(info["source_id"]), info["class_name"], sample["cls"].decode(), image))
    return found


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
    assert main(["build", "inshop", "--root", str(raw), "--out", str(raw / "out")]) == 2
    assert "unpack Img/img.zip" in capsys.readouterr().err
    assert main(["build", "cub200", "--root", str(raw / "Img" / "img.zip"), "--out", str(raw / "out")]) == 2
    assert "found a file, no folder" in capsys.readouterr().err


def test_two_downloads_below_one_root_are_not_mixed_up(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sop(raw)
    shutil.copytree(raw / "Stanford_Online_Products", raw / "copy")
    assert main(["build", "sop", "--root", str(raw), "--out", str(raw / "out"), "--allow-partial"]) == 2
    assert "has several downloads" in capsys.readouterr().err


def test_cars_without_the_test_labels_says_so(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cars_devkit(raw)
    move(raw / WITH_LABELS, raw / "devkit" / "cars_test_annos.mat")
    assert main(["build", "cars196", "--root", str(raw), "--out", str(raw / "out")]) == 2
    assert "cars_test_annos_withlabels" in capsys.readouterr().err
    shutil.copy(raw / "devkit" / "cars_meta.mat", raw / WITH_LABELS)
    assert main(["build", "cars196", "--root", str(raw), "--out", str(raw / "out")]) == 2
    assert "cars_test_annos_withlabels.mat has no variable 'annotations'" in capsys.readouterr().err
    (raw / WITH_LABELS).write_bytes(b"<html>404</html>")
    assert main(["build", "cars196", "--root", str(raw), "--out", str(raw / "out")]) == 2
    assert "is not a readable MATLAB file" in capsys.readouterr().err


# ---- folders of images -----------------------------------------------------------------------


def folder_of_classes(root: Path, names: Iterable[str] = "abcde") -> None:
    for number, name in enumerate(names):
        for i in range(number + 1):
            write_image(root / name / f"im.v{i}.png", 10 * number + i)  # dots in names are harmless
    (root / next(iter(names)) / "notes.txt").write_text("not an image")


@pytest.mark.parametrize(("option", "num_train"), [([], 2), (["--split-classes", "4"], 4)])
def test_class_folders_are_split_by_class(option: list[str], num_train: int, raw: Path, tmp_path: Path) -> None:
    folder_of_classes(raw)
    out = str(tmp_path / "out")
    assert main(["build", "imagefolder", "--root", str(raw), "--out", out, *option]) == 0
    train, test = open_index(out, "train"), open_index(out, "test")
    assert [entry.name for entry in train.classes] == list("abcde")[:num_train]
    assert [entry.name for entry in test.classes] == list("abcde")[num_train:]
    assert [entry.count for entry in train.classes] == [1, 2, 3, 4][:num_train]


def test_a_folders_own_split_is_kept_and_must_not_share_classes(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw / "train", "ab")
    folder_of_classes(raw / "val", "cd")
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert open_index(tmp_path / "out", "val").num_samples == 3
    assert main([*arguments, "--overwrite", "--split-classes", "1"]) == 2
    assert "has its own split" in capsys.readouterr().err
    folder_of_classes(raw / "test", "a")
    assert main([*arguments, "--overwrite"]) == 2
    assert "class a (a) is in test and in train" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--allow-seen-classes"]) == 0
    splits = {split: open_index(tmp_path / "out", split) for split in ("train", "test")}
    assert {split: [entry.name for entry in splits[split].classes] for split in splits} == {
        "train": ["a", "b"],
        "test": ["a"],
    }


def test_all_classes_may_train_where_they_are_all_named(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw)
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out"), "--split-classes"]
    assert main([*arguments, "6"]) == 2
    assert "has 5 classes with images, of which 6 would train" in capsys.readouterr().err
    assert main([*arguments, "5"]) == 0
    assert "data.test_split=null" in capsys.readouterr().err
    assert open_index(tmp_path / "out", "train").num_classes == 5
    with pytest.raises(ValueError, match="not 'test'"):
        open_index(tmp_path / "out", "test")


def test_splits_of_any_case_are_splits(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_classes(raw / "Train", "ab")
    folder_of_classes(raw / "TEST", "cd")
    folder_of_classes(raw / "Extra", "ef")
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    for split, names in (("train", "ab"), ("test", "cd"), ("Extra", "ef")):
        assert [entry.name for entry in open_index(tmp_path / "out", split).classes] == list(names)
    folder_of_classes(raw / "test", "gh")
    assert main(arguments) == 2
    assert "has two folders of one split, TEST and test; merge them" in capsys.readouterr().err


def test_a_split_without_another_is_refused(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_classes(raw / "train", "ab")
    (raw / "test").mkdir()
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "expected images of the split train and of at least one other" in error
    assert "got only train in test/, train/; add the missing split" in error
    assert main([*arguments, "--allow-partial"]) == 0


def test_files_that_are_nobodys_images_are_left_out_and_told(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw)
    expected = content_of(raw, "imagefolder", tmp_path / "plain")
    capsys.readouterr()
    for name in (".DS_Store", "a/.DS_Store", "b/._im.v0.png", ".ipynb_checkpoints/im.png", "__MACOSX/a/im.png"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(b"hidden")
    (raw / "a" / "Thumbs.db").write_bytes(b"x")
    write_image(raw / "without_class.png", 1)
    assert content_of(raw, "imagefolder", tmp_path / "strewn") == expected
    # notes.txt, Thumbs.db, without_class.png
    error = capsys.readouterr().err
    assert "3 files were left out: no images by their suffix, or in no class folder: " in error
    assert all(said in error for said in ("1 .txt", "1 .db", "1 .png"))


@pytest.mark.parametrize("own_split", [False, True])
@pytest.mark.parametrize("option", ["--allow-partial", "--on-bad=skip"])
def test_a_class_folder_without_an_image_is_an_error_unless_allowed_and_its_files_are_told(
    own_split: bool, option: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = raw / "train" if own_split else raw
    folder_of_classes(top)
    if own_split:
        folder_of_classes(raw / "test", "xy")
    expected = content_of(raw, "imagefolder", tmp_path / "plain")
    (top / "phone").mkdir()
    (top / "phone" / "IMG_1.HEIC").write_bytes(b"x")
    (top / "phone" / "IMG_2").write_bytes(b"x")
    (top / "zebra" / "deeper").mkdir(parents=True)
    capsys.readouterr()
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    before = "train/" if own_split else ""
    said = f"class folders without an image: '{before}phone' (1 .HEIC, 1 without suffix), '{before}zebra' (empty)"
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert main([*arguments, option]) == 0
    assert f"left out, {said}" in capsys.readouterr().err
    assert content_of(raw, "imagefolder", tmp_path / "out") == expected


def test_a_class_that_is_called_train_is_taken_for_a_split_unless_classes_are_counted(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw, ["bus", "car", "train", "truck"])
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "train is taken for a split: where it is a class, pass --split-classes N" in error
    assert main([*arguments, "--split-classes", "2"]) == 0
    assert [entry.name for entry in open_index(tmp_path / "out", "test").classes] == ["train", "truck"]
    assert capsys.readouterr().err.count("taken for a split") == 0
    folders = tmp_path / "folders"
    for name in ("car/sedan", "train/steam", "bus/city"):
        write_image(folders / name / "im.png", 1)
    assert main(["build", "imagefolder", "--root", str(folders), "--out", str(tmp_path / "other")]) == 0
    assert "train is taken for a split, so bus, car, train are splits; where they are" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--root", "--out"])
def test_a_link_to_itself_is_no_folder_and_no_image(
    option: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw)
    (tmp_path / "loop").symlink_to("loop")
    places = {"--root": str(raw), "--out": str(tmp_path / "out"), option: str(tmp_path / "loop")}
    assert main(["build", "imagefolder", *(word for pair in places.items() for word in pair)]) == 2
    assert f"{tmp_path / 'loop'} " in capsys.readouterr().err
    (raw / "a" / "self.png").symlink_to("self.png")
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "first a/self.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_in_unicode_with_dots_and_of_any_case_are_classes_and_images(raw: Path, tmp_path: Path) -> None:
    for name in ("a.b/İmage.JPG", "a.b/x.tar.Jpeg", "日本/猫 1.JPG", "日本/😀.PNG", "e\u0301/one.jpg", "z z/two.jpg"):
        write_image(raw / name, len(name))
    write_image(raw / "z z" / "deeper" / "three.jpg", 9)
    out = tmp_path / "out"
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(out)]) == 0
    assert [(entry.name, entry.count) for entry in open_index(out, "train").classes] == [("a.b", 2), ("e\u0301", 1)]
    assert [(entry.name, entry.count) for entry in open_index(out, "test").classes] == [("z z", 2), ("日本", 2)]
    assert {json.loads(sample["json"])["source"] for sample in samples_of(out, "test")} == {
        "z z/two.jpg",
        "z z/deeper/three.jpg",
        "日本/猫 1.JPG",
        "日本/😀.PNG",
    }


def test_a_name_that_is_no_utf8_is_refused(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_classes(raw)
    write_image(raw / "a" / "x.png", 1)
    (raw / "a" / "x.png").rename(raw / "a" / os.fsdecode(b"\xff.png"))
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "is not UTF-8; rename it" in capsys.readouterr().err


def test_links_inside_the_root_count_once_and_lead_somewhere(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw)
    (raw / "a" / "again.png").symlink_to(raw / "b" / "im.v0.png")
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]) == 0
    assert open_index(tmp_path / "out", "train").num_samples == 1 + 2 + 1
    for name, target, message in (
        ("c/lost.png", raw / "nowhere.png", "1 of the 17 images"),
        ("loop", raw, "is a link to a folder, whose images would count twice"),
        ("elsewhere", tmp_path, "is a link out of"),
    ):
        (raw / name).symlink_to(target)
        assert main(["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
        (raw / name).unlink()


def test_an_images_format_is_told_by_its_content(raw: Path, tmp_path: Path) -> None:
    folder_of_classes(raw)
    write_image(raw / "a" / "png.png", 1)
    (raw / "a" / "png.png").rename(raw / "a" / "called.jpg")
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]) == 0
    sample = next(s for s in samples_of(tmp_path / "out", "train") if b"called.jpg" in s["json"])
    assert sample["png"] == (raw / "a" / "called.jpg").read_bytes()


def test_links_out_of_the_root_are_refused(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_classes(raw)
    write_image(tmp_path / "private.png", 1)
    (raw / "a" / "link.png").symlink_to(tmp_path / "private.png")
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "is a link out of" in capsys.readouterr().err


def test_resize_reencodes_large_images_only_and_says_so(raw: Path, tmp_path: Path) -> None:
    write_image(raw / "a" / "large.png", 1, size=(40, 30))
    write_image(raw / "b" / "small.png", 2, size=(40, 10))
    write_image(raw / "b" / "other.bmp", 3, size=(4, 4))
    out = tmp_path / "out"
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(out)]
    assert main([*arguments, "--resize", "15"]) == 0
    (large,) = samples_of(out, "train")
    assert Image.open(io.BytesIO(large["jpg"])).size == (20, 15)
    assert json.loads(large["json"])["width"] == 20
    small = {json.loads(s["json"])["source"]: s for s in samples_of(out, "test")}
    assert small["b/small.png"]["png"] == (raw / "b" / "small.png").read_bytes()
    assert Image.open(io.BytesIO(small["b/other.bmp"]["jpg"])).size == (4, 4)
    assert json.loads((out / "index.json").read_text())["build"]["resize"] == 15


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bmp", None, "neither JPEG nor PNG"),
        ("x.jpg", b"", "the image file is empty"),
        ("x.jpg", b"<html>", "the image does not decode"),
    ],
)
def test_an_unusable_source_image_is_named(
    name: str,
    content: bytes | None,
    message: str,
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder_of_classes(raw)
    write_image(raw / "b" / name, 3)
    if content is not None:
        (raw / "b" / name).write_bytes(content)
    out = tmp_path / "out"
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"b/{name}" in error
    assert message in error
    assert not (out / "index.json").exists()
