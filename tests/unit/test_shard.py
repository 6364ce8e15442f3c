"""Building, verifying, indexing and describing shards, through the command line."""

import gzip
import hashlib
import io
import json
import lzma
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from dist_proxygml.data.builder import build_shards
from dist_proxygml.data.datasets import SourceDataset, SourceImage
from dist_proxygml.data.index import JOURNAL_FILE, open_index
from dist_proxygml.data.shards import split_of_shard
from dist_proxygml.data.sources import open_source
from dist_proxygml.shard import main
from tests.raw_downloads import digests, picture, samples_of, small_dataset, sop
from tools.build_demo import EMOJI_SETS, NUM_CLASSES, NUM_IMAGES, is_plain_emoji
from tools.build_demo import main as build_demo

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "shards" / "demo"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


def test_shards_do_not_go_into_the_folder_of_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    given = ["build", "imagefolder", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "link")]
    assert main(given) == 2
    assert "expected another folder for the shards than that of the images" in capsys.readouterr().err
    assert list((tmp_path / "images").iterdir()) == []


def test_indexing_again_gives_the_same_index(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    before = {split: open_index(tmp_path, split) for split in ("train", "test")}
    (tmp_path / "index.samples.train.npy").unlink()
    assert main(["index", str(tmp_path)]) == 0
    for split, index in before.items():
        again = open_index(tmp_path, split)
        assert again.classes == index.classes
        assert again.shards == index.shards
        assert again.samples.tobytes() == index.samples.tobytes()


def test_indexing_again_changes_nothing(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    before = digests(tmp_path)
    assert main(["index", str(tmp_path)]) == 0
    assert digests(tmp_path) == before


@pytest.mark.parametrize("version", [1, 2])
def test_an_earlier_index_passes_on_what_the_shards_do_not_say(version: int, tmp_path: Path) -> None:
    shard = tmp_path / "photos-0003.tar"
    with webdataset.TarWriter(str(shard)) as writer:
        for i, label in enumerate([0, 2]):
            writer.write({"__key__": f"{i}", "jpg": picture(i), "cls": label})
        writer.write({"__key__": "2", "jpg": picture(2), "cls": 1, "json": {"class_name": "said", "source_id": "s"}})
    classes = [("cat <&>", "c"), ("dog", "d"), ("Ünï", 7), ("gone", 8)]
    document: dict[str, Any] = {"kind": "dist-proxygml-index", "version": version, "dataset": "theirs"}
    document |= {"build": {"layout": "by hand"}, "splits": {"photos": {}}}
    if version == 1:
        document["splits"]["photos"]["classes"] = [
            {"label": label, "name": name, "source_id": source_id, "count": 1}
            for label, (name, source_id) in enumerate(classes)
        ]
    else:
        lines = [json.dumps([name, source_id, 1]) for name, source_id in classes]
        (tmp_path / "index.classes.photos.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "index.json").write_text(json.dumps(document))
    assert main(["index", str(tmp_path)]) == 0
    index = open_index(tmp_path, "photos")
    found = [(entry.name, entry.source_id, entry.count) for entry in index.classes]
    assert found == [("cat <&>", "c", 1), ("said", "s", 1), ("Ünï", 7, 1)]
    document = json.loads((tmp_path / "index.json").read_text())
    assert (document["dataset"], document["build"]) == ("theirs", {"layout": "by hand"})


def test_a_damaged_header_does_not_end_a_shard_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    shard = tmp_path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    header = content.index(b"train-00000003.cls")
    content[header + 110] ^= 8
    shard.write_bytes(content)
    for command in (["verify", "--deep"], ["index"]):
        assert main([*command, str(tmp_path)]) in (1, 2)
        assert f"train-000000.tar: a damaged header at byte {header}" in capsys.readouterr().err


def test_an_image_that_does_not_decode_is_named_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "0.jpg"
    picture(0, (90, 90)).save(image)
    with webdataset.TarWriter(str(tmp_path / "train-000000.tar"), encoder=False) as writer:
        writer.write({"__key__": "whole", "jpg": image.read_bytes(), "cls": b"0"})
        writer.write({"__key__": "half", "jpg": image.read_bytes()[:2000], "cls": b"0"})
    assert main(["index", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["verify", "--deep", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "train-000000.tar: sample half: the image does not decode" in error
    assert "whole" not in error


def test_shards_of_others_get_an_index(tmp_path: Path) -> None:
    path = tmp_path / "photos-0003.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i, label in enumerate([0, 2, 2]):
            writer.write({"__key__": f"a/b/{i}", "jpg": picture(i), "cls": label, "txt": "caption"})
    assert main(["index", str(tmp_path)]) == 0
    index = open_index(tmp_path, "photos")
    assert index.labels.tolist() == [0, 2, 2]
    assert [(entry.name, entry.count) for entry in index.classes] == [("0", 1), ("1", 0), ("2", 2)]
    assert main(["verify", "--deep", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": b"x"}, "has members ['jpg']; expected one of"),
        ({"jpg": b"x", "png": b"x", "cls": b"1"}, "expected one of"),
        ({"jpg": b"x", "cls": b"1" + b" " * 99 + b"2"}, "has the label '1'"),
        ({"jpg": b"x", "cls": b"1.0"}, "has the label '1.0'"),
        ({"jpg": b"x", "cls": b"-1"}, "has the label '-1'; expected a non-negative integer"),
        ({"jpg": b"x", "cls": b"2147483648"}, "at most 2147483647"),
        ({"jpg": b"x", "cls": b"9" * 5000}, "at most 2147483647"),
        ({"jpg": b"x", "cls": b"1", "json": b"{"}, "is damaged"),
        ({"jpg": b"x", "cls": b"1", "json": b"[" * 100_000}, "is damaged"),
    ],
)
def test_samples_that_cannot_be_indexed_are_named(
    members: dict[str, bytes], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with webdataset.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "k", **members})
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "sample k" in error
    assert message in error


def a_tar(path: Path, names: list[str]) -> bytes:
    """Write a tar of the members, which hold a label or a picture, and return its bytes."""
    picture(0).save(path.with_suffix(".png"))
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = b"0" if name.endswith(".cls") else path.with_suffix(".png").read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def test_files_without_a_key_or_a_suffix_are_no_samples(tmp_path: Path) -> None:
    """As every reader of WebDataset takes them; archives of macOS and of whole folders have them."""
    names = [".DS_Store", "README", "a/LICENSE", "._k.png", "k.cls", "k.png", "a/._k.png", "a/k.cls", "a/k.png"]
    a_tar(tmp_path / "train-0.tar", names)
    assert main(["index", str(tmp_path)]) == 0
    assert open_index(tmp_path, "train").num_samples == 2


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (gzip.compress, "expected a plain tar, got a gzip file; unpack it with `gunzip`"),
        (lzma.compress, "expected a plain tar, got an xz file; unpack it with `unxz`"),
        (lambda tar: b"version https://git-lfs.github.com/spec/v1\n", "got a pointer of Git LFS; fetch the file"),
        (lambda tar: b"<!DOCTYPE html>" + tar, "got a web page; download the shard again"),
        (lambda tar: bytes(2 * 512), "expected samples in the split 'train', got none"),
    ],
)
def test_what_is_no_tar_with_samples_is_named_and_leaves_no_index(
    pack: Callable[[bytes], bytes], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train-0.tar"
    path.write_bytes(pack(a_tar(path, ["BZh.cls", "BZh.png"])))
    assert main(["index", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("index*"))
    a_tar(path, ["BZh.cls", "BZh.png"])  # begins like a bzip2 file
    assert main(["index", str(tmp_path)]) == 0


def test_a_folder_of_packed_shards_and_a_member_without_its_zeros_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    assert main(["index", str(tmp_path)]) == 2
    assert "has no .tar files; unpack train-0.tar.gz" in capsys.readouterr().err
    with open(tmp_path / "k.png", "wb") as stream:
        stream.truncate(1 << 20)
    (tmp_path / "k.cls").write_text("0")
    subprocess.run(["tar", "-S", "-cf", "train-0.tar", "k.cls", "k.png"], cwd=tmp_path, check=True)
    assert main(["index", str(tmp_path)]) == 2
    assert "train-0.tar: k.png is stored without its zeros (tar -S)" in capsys.readouterr().err


def theirs(path: Path, samples: list[tuple[str, int, dict[str, Any]]]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for key, label, info in samples:
            writer.write({"__key__": key, "jpg": picture(0), "cls": label, "json": info})


def test_labels_that_count_no_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs(tmp_path / "train-0.tar", [("a", 0, {}), ("b", 2**31 - 1, {})])
    assert main(["index", str(tmp_path)]) == 2
    assert "the 2 samples of 'train' have labels up to 2147483647, expected" in capsys.readouterr().err
    theirs(tmp_path / "train-0.tar", [("a", 0, {}), ("b", 300, {})])
    assert main(["index", str(tmp_path)]) == 0


LONG = "warehouse_camera_north_entrance_" * 4
KEYS = {
    "folders": (["red/0000", "blue/0000", "./grey/0000"], ["red/0000", "blue/0000", "grey/0000"]),
    "long": ([LONG + "0", LONG + "1", f"{LONG}/{LONG}/{'é' * 90}"],) * 2,
    "not ASCII": (["ä", "a\u0308", "日本\u3000語"],) * 2,
    "control characters": (["a\x1b[31mb", "a\nb", "c"], ["a\\x1b[31mb", "a\\nb", "c"]),
    "not UTF-8": (["\udce9t\udce9", "e", "x" * 120 + "\udce9"], ["\\xe9t\\xe9", "e", "x" * 120 + "\\xe9"]),
}


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
@pytest.mark.parametrize("kind", KEYS)
def test_a_samples_name_is_its_whole_key(kind: str, tar_format: int, tmp_path: Path) -> None:
    keys, names = KEYS[kind]
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tar_format) as tar:
        for label, key in enumerate(keys):
            for extension, content in (("JPG", b"no image"), ("Cls", f" {label}\n".encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert main(["index", str(tmp_path)]) == 0
    source = open_source(tmp_path, split="train")
    records = [source.record(number) for number in range(3)]
    assert [record.id for record in records] == names
    assert [record.label for record in records] == [0, 1, 2]
    assert "keys_repeat" not in (tmp_path / "index.json").read_text()


def test_keys_that_repeat_from_shard_to_shard_are_told_apart_by_the_shards_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in range(3):
        theirs(tmp_path / f"train-{shard}.tar", [("a/sample", 0, {}), (f"b/{shard}", 1, {})])
        theirs(tmp_path / f"test-{shard}.tar", [(f"{shard}", 0, {})])
    assert main(["index", str(tmp_path)]) == 0
    assert "train: 6 images" in (told := capsys.readouterr().out)
    assert told.count("keys repeat from shard to shard, so images are called SHARD/KEY") == 1
    names = {}
    for split in ("train", "test"):
        source = open_source(tmp_path, split=split)
        names[split] = [source.record(number).id for number in range(source.num_images)]
    assert names["train"][:3] == ["train-0/a/sample", "train-0/b/0", "train-1/a/sample"]
    assert len(set(names["train"])) == 6
    assert names["test"] == ["0", "1", "2"]
    index = pickle.loads(pickle.dumps(open_index(tmp_path, "train")))
    assert index.choose_classes(np.array([1]), name="some").name(2) == "train-2/b/2"


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_place_of_an_image_is_told_from_a_missing_one(
    kind: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = kind, "a.jpg"
        tar.addfile(link)
    assert main(["index", str(tmp_path)]) == 2
    assert "b.jpg is a link, expected a file; write the shard again with `tar --deref" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 3000])
def test_keys_with_dots_and_keys_without_end_are_refused_in_a_short_line(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i in range(number):
            tar.addfile(tarfile.TarInfo(f"photo.v2.{i:04d}.jpg"))
            tar.addfile(tarfile.TarInfo(f"photo.v2.{i:04d}.cls"))
        if not number:
            tar.addfile(tarfile.TarInfo("x" * 100_000 + ".jpg"))
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert len(error.replace(str(tmp_path), "")) < 700
    if number:
        five = ["v2.0000.cls", "v2.0000.jpg", "v2.0001.cls", "v2.0001.jpg", "v2.0002.cls"]
        assert f"has members {five} and 5995 more; expected" in error
        assert "keys end at the first dot of a file name" in error


def test_two_samples_with_one_key_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs(tmp_path / "train-0.tar", [("a", 0, {}), ("a", 1, {})])
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "train-0.tar: the member a." in error
    assert "comes twice" in error


def test_one_label_with_two_class_names_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cat, dog = ("a", 3, {"class_name": "cat"}), ("b", 3, {"class_name": "dog"})
    for first, second in (([cat, dog], []), ([cat], [dog])):
        theirs(tmp_path / "train-0.tar", first)
        theirs(tmp_path / "train-1.tar", second)
        assert main(["index", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "label 3 has " in error
        assert "'cat'" in error
        assert "'dog'" in error


def test_a_shard_that_changed_since_the_earlier_index_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    shard = tmp_path / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[int(open_index(tmp_path, "train").samples[6]["offset"]) + 50] ^= 4
    shard.write_bytes(content)
    assert main(["index", str(tmp_path)]) == 0
    assert "warning: 1 shards are not what the earlier index says (sha256): train-000001.tar" in capsys.readouterr().err
    assert main(["index", str(tmp_path)]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_build_that_was_not_finished_gets_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    (tmp_path / JOURNAL_FILE).touch()
    assert main(["index", str(tmp_path)]) == 0  # killed between its index and this
    (tmp_path / "index.json").unlink()
    capsys.readouterr()
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is a build that was not finished" in error
    assert "dist_proxygml.shard build` again" in error
    assert not (tmp_path / "index.json").exists()
    assert main(["info", str(tmp_path)]) == 2
    assert "shard index" not in capsys.readouterr().err


def test_an_earlier_index_that_is_garbled_does_no_harm(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    kind = {"kind": "dist-proxygml-index", "version": 2}
    for content in ("[" * 100_000, json.dumps(kind | {"dataset": None, "build": 3, "splits": -1})):
        (tmp_path / "index.json").write_text(content)
        assert main(["index", str(tmp_path)]) == 0
        assert main(["info", str(tmp_path)]) == 0


def test_a_folder_that_is_called_like_a_shard_is_told_from_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    (tmp_path / "train-000000.tar").unlink()
    (tmp_path / "train-000000.tar").mkdir()
    assert main(["index", str(tmp_path)]) == 2
    assert "train-000000.tar is a folder, expected a tar file" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 1
    assert "train-000000.tar is a folder, no file" in capsys.readouterr().err


def test_verify_finds_each_kind_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fresh(name: str) -> Path:
        build_shards(small_dataset(), tmp_path / name, samples_per_shard=5, quiet=True)
        return tmp_path / name / "train-000001.tar"

    def verify(shard: Path, *options: str) -> tuple[int, str]:
        code = main(["verify", *options, str(shard.parent)])
        return code, capsys.readouterr().err

    whole = fresh("whole")
    assert verify(whole, "--deep")[0] == 0

    cut = fresh("cut")
    cut.write_bytes(cut.read_bytes()[:-1024])
    assert verify(cut)[0] == 1

    flipped = fresh("flipped")
    content = bytearray(flipped.read_bytes())
    offset = int(open_index(flipped.parent, "train").samples[6]["offset"])
    content[offset + 50] ^= 4
    flipped.write_bytes(content)
    assert verify(flipped)[0] == 0  # the size is right; only reading tells
    code, error = verify(flipped, "--deep")
    assert code == 1
    assert "train-000001.tar: sha256 is" in error
    assert "sample train-00000006 has (label, offset, bytes, crc32)" in error

    swapped = fresh("swapped")
    other = swapped.with_name("train-000000.tar")
    first, second = other.read_bytes(), swapped.read_bytes()
    other.write_bytes(second)
    swapped.write_bytes(first)
    assert verify(swapped, "--deep")[0] == 1

    assert verify(tmp_path / "nowhere" / "x.tar")[0] == 2


def test_info_tells_counts_and_class_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    assert main(["info", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "train: 13 images, 5 classes, 3 shards" in output
    assert "images a class: 2 to 3, median 3" in output
    assert output.count("#") > 0


def test_nothing_that_an_index_says_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(Path(__file__).parents[2] / "shards" / "demo", tmp_path / "demo"))
    document = json.loads((root / "index.json").read_text())
    document["dataset"] = "\x1b[2J"
    for command, status in (("info", 0), ("verify", 1)):
        (root / "index.json").write_text(json.dumps(document))
        document["splits"]["test"]["classes"]["sha256"] = "\x1b]0;owned\x07"
        assert main([command, str(root)]) == status
        told = capsys.readouterr()
        assert "\\x1b" in told.out + told.err
        assert "\x1b" not in told.out + told.err


@pytest.mark.parametrize("command", ["build", "verify", "index", "info"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert re.search(
        rf"^examples?:\n  python -m dist_proxygml\.shard {command} ", capsys.readouterr().out, re.MULTILINE
    )


def test_mistakes_on_the_command_line_exit_with_2(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["build", "sop", "--out", str(raw)])
    assert "required: --data" in capsys.readouterr().err
    sop(raw)
    arguments = ["build", "sop", "--data", str(raw), "--out", str(raw / "out"), "--allow-partial"]
    with pytest.raises(SystemExit, match="2"):  # an option of another layout
        main([*arguments, "--split-classes", "3"])
    assert "--split-classes" in capsys.readouterr().err
    for option, value, lowest in (
        ("--samples-per-shard", "0", 1),
        ("--num-workers", "0", 1),
        ("--resize", "0", 1),
        ("--seed", "-1", 0),
        ("--seed", "x", 0),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, option, value])
        assert caught.value.code == 2
        message = f"argument {option}: expected a whole number of at least {lowest}, got '{value}'"
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["build", "mnist", "--out", "x"])
    assert caught.value.code == 2


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_proxygml.shard", "info", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: shard folder {tmp_path} has 0 tar files")
    assert done.stderr.count("\n") == 1


def test_a_shards_name_says_its_split() -> None:
    names = ["train-000012.tar", "00001.tar", "my-set_7.tar", "train.tar", "train-1.tar.tmp-2"]
    assert [split_of_shard(name) for name in names] == ["train", "train", "my-set", None, None]


# ---- the demo --------------------------------------------------------------------------------


def test_the_embedded_demo_is_sound_and_complete() -> None:
    assert main(["verify", "--deep", str(DEMO)]) == 0
    train, test = open_index(DEMO, "train"), open_index(DEMO, "test")
    assert train.num_samples + test.num_samples == NUM_IMAGES
    assert train.num_classes + test.num_classes == NUM_CLASSES
    assert not {entry.source_id for entry in train.classes} & {entry.source_id for entry in test.classes}
    assert min(entry.count for entry in (*train.classes, *test.classes)) >= 4


def test_building_the_demo_of_its_own_images_gives_the_embedded_files(tmp_path: Path) -> None:
    sets = [emoji_set.name for emoji_set in EMOJI_SETS]
    images = []
    for split in ("train", "test"):
        for sample in samples_of(DEMO, split):
            info = json.loads(sample["json"])
            facts = {name: info[name] for name in ("set", "license", "category")}
            images.append(
                SourceImage(split, info["source_id"], info["class_name"], info["source"], sample["png"], facts)
            )
    images.sort(key=lambda image: (image.source_id, sets.index(image.info["set"])))
    build_shards(SourceDataset("demo", images), tmp_path, quiet=True)
    embedded = digests(DEMO)
    del embedded["ATTRIBUTION.md"]
    assert digests(tmp_path) == embedded


@pytest.fixture(scope="module")
def demo_infos() -> dict[str, list[dict[str, Any]]]:
    """The JSON of every demo sample by split."""
    return {split: [json.loads(sample["json"]) for sample in samples_of(DEMO, split)] for split in ("train", "test")}


def test_the_demos_split_is_that_of_the_classes_hashes(
    demo_infos: dict[str, list[dict[str, Any]]],
) -> None:
    keys = {split: {info["source"].split("/")[0] for info in infos} for split, infos in demo_infos.items()}
    ordered = sorted(keys["train"] | keys["test"], key=lambda key: hashlib.sha1(key.encode()).hexdigest())
    assert set(ordered[: len(ordered) // 2]) == keys["train"]


def test_every_demo_image_has_its_set_and_licence_and_the_texts_are_there(
    demo_infos: dict[str, list[dict[str, Any]]],
) -> None:
    used = {(info["set"], info["license"]) for infos in demo_infos.values() for info in infos}
    assert used == {(emoji_set.name, emoji_set.license) for emoji_set in EMOJI_SETS}
    attribution = (DEMO / "ATTRIBUTION.md").read_text()
    for emoji_set in EMOJI_SETS:
        for fact in (emoji_set.author, emoji_set.license, emoji_set.package, emoji_set.url):
            assert fact in attribution
        assert (DEMO / "LICENSES" / f"{emoji_set.license}.txt").stat().st_size > 1000


def test_variants_of_an_emoji_are_left_out() -> None:
    assert is_plain_emoji("1f600", "grinning-face")
    assert is_plain_emoji("1f43b-200d-2744", "polar-bear")
    for codepoints, name in [
        ("1f44d-1f3fd", "thumbs-up-medium-skin-tone"),
        ("1f3c3-200d-2640", "woman-running"),
        ("1f468-200d-1f373", "man-cook"),
        ("1f1e6", "regional-indicator-a"),
        ("e001", "private"),
        ("1f4f6", "signal-low"),
    ]:
        assert not is_plain_emoji(codepoints, name)


def test_a_folder_without_the_demos_sources_names_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py")
    arguments = ["--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert build_demo(arguments) == 2
    error = capsys.readouterr().err
    assert "npm pack @iconify-json/noto@1.2.9" in error
    for emoji_set in EMOJI_SETS:
        (tmp_path / emoji_set.tarball).write_bytes(b"another file")
    assert build_demo(arguments) == 2
    assert f"expected {EMOJI_SETS[0].sha256}" in capsys.readouterr().err
