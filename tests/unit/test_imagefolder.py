"""Folders of images, through the command line that builds shards of them."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from dist_proxygml.data.index import open_index
from dist_proxygml.shard import main
from tests.raw_downloads import content_of, samples_of, write_image


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


def folder_of_classes(root: Path, names: Iterable[str] = "abcde") -> None:
    for number, name in enumerate(names):
        for i in range(number + 1):
            write_image(root / name / f"im.v{i}.png", 10 * number + i)  # dots in names are harmless
    (root / next(iter(names)) / "notes.txt").write_text("not an image")


@pytest.mark.parametrize(("option", "num_train"), [([], 2), (["--split-classes", "4"], 4)])
def test_class_folders_are_split_by_class(option: list[str], num_train: int, raw: Path, tmp_path: Path) -> None:
    folder_of_classes(raw)
    out = str(tmp_path / "out")
    assert main(["build", "imagefolder", "--data", str(raw), "--out", out, "--split-by", "name", *option]) == 0
    train, test = open_index(out, "train"), open_index(out, "test")
    assert [entry.name for entry in train.classes] == list("abcde")[:num_train]
    assert [entry.name for entry in test.classes] == list("abcde")[num_train:]
    assert [entry.count for entry in train.classes] == [1, 2, 3, 4][:num_train]


def test_a_folders_own_split_is_kept_and_must_not_share_classes(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw / "train", "ab")
    folder_of_classes(raw / "val", "cd")
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]
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
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out"), "--split-classes"]
    assert main([*arguments, "6"]) == 2
    assert "got 5 classes with images, of which 6 would train" in capsys.readouterr().err
    assert main([*arguments, "5"]) == 0
    assert "data.test_split=null" in capsys.readouterr().err
    assert open_index(tmp_path / "out", "train").num_classes == 5
    with pytest.raises(ValueError, match="not 'test'"):
        open_index(tmp_path / "out", "test")


def test_splits_of_any_case_are_splits(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_classes(raw / "Train", "ab")
    folder_of_classes(raw / "TEST", "cd")
    folder_of_classes(raw / "Extra", "ef")
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    for split, names in (("train", "ab"), ("test", "cd"), ("Extra", "ef")):
        assert [entry.name for entry in open_index(tmp_path / "out", split).classes] == list(names)
    folder_of_classes(raw / "test", "gh")
    assert main(arguments) == 2
    assert "has two folders of one split, TEST and test; merge them" in capsys.readouterr().err


def test_a_split_without_another_is_refused(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_classes(raw / "train", "ab")
    (raw / "test").mkdir()
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]
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
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]
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
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "train is taken for a split: where it is a class, pass --split-classes N" in error
    assert main([*arguments, "--split-classes", "2", "--split-by", "name"]) == 0
    assert [entry.name for entry in open_index(tmp_path / "out", "test").classes] == ["train", "truck"]
    assert capsys.readouterr().err.count("taken for a split") == 0
    folders = tmp_path / "folders"
    for name in ("car/sedan", "train/steam", "bus/city"):
        write_image(folders / name / "im.png", 1)
    assert main(["build", "imagefolder", "--data", str(folders), "--out", str(tmp_path / "other")]) == 0
    assert "train is taken for a split, so bus, car, train are splits; where they are" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data", "--out"])
def test_a_link_to_itself_is_no_folder_and_no_image(
    option: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw)
    (tmp_path / "loop").symlink_to("loop")
    places = {"--data": str(raw), "--out": str(tmp_path / "out"), option: str(tmp_path / "loop")}
    assert main(["build", "imagefolder", *(word for pair in places.items() for word in pair)]) == 2
    assert f"{tmp_path / 'loop'} " in capsys.readouterr().err
    (raw / "a" / "self.png").symlink_to("self.png")
    assert main(["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "first a/self.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_in_unicode_with_dots_and_of_any_case_are_classes_and_images(raw: Path, tmp_path: Path) -> None:
    for name in ("a.b/İmage.JPG", "a.b/x.tar.Jpeg", "日本/猫 1.JPG", "日本/😀.PNG", "e\u0301/one.jpg", "z z/two.jpg"):
        write_image(raw / name, len(name))
    write_image(raw / "z z" / "deeper" / "three.jpg", 9)
    out = tmp_path / "out"
    assert main(["build", "imagefolder", "--data", str(raw), "--out", str(out), "--split-by", "name"]) == 0
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
    assert main(["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "is not UTF-8; rename it" in capsys.readouterr().err


def test_links_inside_the_root_count_once_and_lead_somewhere(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw)
    (raw / "a" / "again.png").symlink_to(raw / "b" / "im.v0.png")
    assert main(["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out"), "--split-by=name"]) == 0
    assert open_index(tmp_path / "out", "train").num_samples == 1 + 2 + 1
    for name, target, message in (
        ("c/lost.png", raw / "nowhere.png", "1 of the 17 images"),
        ("loop", raw, "is a link to a folder, whose images would count twice"),
        ("elsewhere", tmp_path, "is a link out of"),
    ):
        (raw / name).symlink_to(target)
        assert main(["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
        (raw / name).unlink()


def test_an_images_format_is_told_by_its_content(raw: Path, tmp_path: Path) -> None:
    folder_of_classes(raw)
    write_image(raw / "a" / "png.png", 1)
    (raw / "a" / "png.png").rename(raw / "a" / "called.jpg")
    assert main(["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out"), "--split-by=name"]) == 0
    sample = next(s for s in samples_of(tmp_path / "out", "train") if b"called.jpg" in s["json"])
    assert sample["png"] == (raw / "a" / "called.jpg").read_bytes()


def test_links_out_of_the_root_are_followed_below_a_folder_that_is_named(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool"
    folder_of_classes(pool)
    expected = content_of(pool, "imagefolder", tmp_path / "plain")
    (raw / "a").mkdir(parents=True)
    (raw / "a" / "im.v0.png").symlink_to(pool / "a" / "im.v0.png")
    for name in "bcde":
        (raw / name).symlink_to(pool / name)
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"is a link out of {raw}, to {pool}/a/im.v0.png" in capsys.readouterr().err
    for other in (tmp_path / "elsewhere", raw):
        assert main([*arguments, "--follow-links", str(other)]) == 2
        assert "is a link out of" in capsys.readouterr().err
    assert content_of(raw, "imagefolder", tmp_path / "followed", "--follow-links", str(pool)) == expected
    assert content_of(raw, "imagefolder", tmp_path / "anywhere", "--follow-links", "/") == expected


@pytest.mark.parametrize("target", ["pool/a", "pool", "pool/b/..", "raw", "raw/c", ""])
def test_no_folder_is_read_twice_through_links(
    target: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(tmp_path / "pool")
    write_image(raw / "c" / "im.png", 1)
    (raw / "a").symlink_to(tmp_path / "pool" / "a")
    (raw / "z").symlink_to(tmp_path / target)
    out = str(tmp_path / "out")
    assert main(["build", "imagefolder", "--data", str(raw), "--out", out, "--follow-links", "/"]) == 2
    assert f"{raw}/z is a link to a folder, whose images would count twice" in capsys.readouterr().err


def test_query_and_gallery_share_classes_that_do_not_train(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw / "train", "ab")
    folder_of_classes(raw / "query", "cd")
    folder_of_classes(raw / "gallery", "cde")
    out = tmp_path / "out"
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(out)]
    assert main(arguments) == 0
    query, gallery = open_index(out, "query"), open_index(out, "gallery")
    assert [entry.name for entry in query.classes] == [entry.name for entry in gallery.classes] == list("cde")
    assert [entry.count for entry in query.classes] == [1, 2, 0]
    folder_of_classes(raw / "query", "a")
    assert main([*arguments, "--overwrite"]) == 2
    assert "class a (a) is in query/gallery and in train" in capsys.readouterr().err


def test_an_earlier_build_that_was_split_by_name_is_still_this_build(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw)
    index = tmp_path / "out" / "index.json"
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--split-by", "name"]) == 0
    document = json.loads(index.read_text())
    del document["build"]["split_classes"]  # as earlier versions wrote it
    index.write_text(json.dumps(document))
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--split-by", "random"]) == 2
    assert "already holds finished shards of other images" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads(index.read_text())["build"]["split_classes"] == {"train": 2, "test": 3, "by": "random", "seed": 0}


def test_resize_reencodes_large_images_only_and_says_so(raw: Path, tmp_path: Path) -> None:
    write_image(raw / "a" / "large.png", 1, size=(40, 30))
    write_image(raw / "b" / "small.png", 2, size=(40, 10))
    write_image(raw / "b" / "other.bmp", 3, size=(4, 4))
    out = tmp_path / "out"
    arguments = ["build", "imagefolder", "--data", str(raw), "--out", str(out), "--split-by", "name"]
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
        ("x.jpg", b"", "the image file is empty"),
        ("x.jpg", b"<html>", "the image does not decode"),
    ],
)
def test_an_unusable_source_image_is_named(
    name: str,
    content: bytes,
    message: str,
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder_of_classes(raw)
    write_image(raw / "b" / name, 3)
    (raw / "b" / name).write_bytes(content)
    out = tmp_path / "out"
    assert main(["build", "imagefolder", "--data", str(raw), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"b/{name}" in error
    assert message in error
    assert not (out / "index.json").exists()
