"""Verification sets of face recognition: their pairs with the shards, and that their pickles run nothing."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_proxygml.data.index import open_index
from dist_proxygml.data.verification_sets import read_pairs
from dist_proxygml.shard import main
from tests.face_records import face_pairs, face_records, jpeg, write_pairs

IMAGES = [jpeg(i) for i in range(40)]
FLAGS = [i % 2 == 0 for i in range(20)]


def image_of(root: Path, split: str, sample_id: int) -> bytes:
    index = open_index(root, split)
    row = index.samples[sample_id]
    shard = (root / index.shards[row["shard"]].file).read_bytes()
    return shard[row["offset"] :][: row["nbytes"]]


def build(*arguments: object) -> int:
    return main(["build", *map(str, arguments)])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    face_records(tmp_path / "faces", [0, 0, 1, 1, 2])
    face_pairs(tmp_path / "faces" / "lfw.bin")
    face_pairs(tmp_path / "cfp_fp.bin", num_pairs=10)
    pairs = ["--pairs", "lfw.bin", tmp_path / "cfp_fp.bin"]  # the first beside train.rec
    assert build("recordio", "--data", tmp_path / "faces", "--out", tmp_path / "out", *pairs) == 0
    return tmp_path / "out"


def test_pairs_are_those_of_the_file_in_ten_consecutive_folds(shards: Path, tmp_path: Path) -> None:
    images, flags = face_pairs(tmp_path / "again" / "lfw.bin")
    index = open_index(shards, "lfw")
    header, *lines = (shards / "index.pairs.lfw.tsv").read_text().splitlines()
    assert header == "first\tsecond\tsame\tfold"
    pairs = [[int(number) for number in line.split("\t")] for line in lines]
    assert index.read_pairs().tolist() == pairs
    assert [same for _, _, same, _ in pairs] == [int(flag) for flag in flags]
    assert [fold for *_, fold in pairs] == [0] * 3 + [1] * 3 + [2] * 3 + sorted([*range(3, 10)] * 2)  # 23 in ten
    for i, (first, second, _, _) in enumerate(pairs):
        assert (image_of(shards, "lfw", first), image_of(shards, "lfw", second)) == (images[2 * i], images[2 * i + 1])
    assert pairs[3][:2] == pairs[0][1::-1]  # an image that comes again is the same sample
    assert (index.num_samples, index.num_classes) == (44, 44)  # a class of its own each
    assert (open_index(shards, "cfp_fp").num_pairs, open_index(shards, "train").num_pairs) == (10, 0)


def test_verify_and_info_know_the_pairs(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(shards)]) == 0
    assert "23 pairs in 10 folds, 8 of them the same" in capsys.readouterr().out
    assert main(["verify", "--deep", str(shards)]) == 0
    record = json.loads((shards / "index.json").read_text())["splits"]["lfw"]["pairs"]
    assert (record["file"], record["num_pairs"]) == ("index.pairs.lfw.tsv", 23)
    table = shards / "index.pairs.lfw.tsv"
    whole = table.read_text()
    table.write_text(whole.replace("\t1\t", "\t0\t", 1))
    assert main(["verify", str(shards)]) == 1
    assert "index.pairs.lfw.tsv does not belong to" in capsys.readouterr().err
    table.unlink()
    assert main(["verify", str(shards)]) == 1
    assert "index.pairs.lfw.tsv is missing" in capsys.readouterr().err
    table.write_text(whole)
    assert main(["verify", str(shards)]) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("first\t", "1st\t"),
        ("\n", "\n0\t1\t1\t0\n"),
        ("\t0\t9\n", "\t0\t10\n"),
        ("\t0\t9\n", "\tx\t9\n"),
        ("\t9\n", "\n"),
    ],
)
def test_a_table_of_pairs_that_is_none_is_refused(shards: Path, old: str, new: str) -> None:
    """Somebody else's folder, whose hashes fit."""
    index = open_index(shards, "lfw")
    table = shards / "index.pairs.lfw.tsv"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=r"lfw\.tsv: expected 23 lines of first, second, same, fold"):
        index.read_pairs()


def test_an_index_of_garbled_pairs_is_refused(shards: Path) -> None:
    document = json.loads((shards / "index.json").read_text())
    for field, value in (("pairs", []), ("pairs", {"sha256": 1}), ("pairs", {"sha256": "", "num_pairs": -1})):
        document["splits"]["lfw"][field] = value
        (shards / "index.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=r"garbles the field 'splits\.lfw\.pairs"):
            open_index(shards, "lfw")


def test_shard_index_keeps_the_pairs_of_the_same_samples_only(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (shards / "index.json").read_bytes()
    assert main(["index", str(shards)]) == 0
    assert open_index(shards, "lfw").num_pairs == 23
    assert json.loads((shards / "index.json").read_bytes())["splits"] == json.loads(before)["splits"]
    shutil.copy(shards / "cfp_fp-000000.tar", shards / "lfw-000000.tar")
    assert main(["index", str(shards)]) == 2
    assert "index.pairs.cfp_fp.tsv has pairs of samples, and which is not certain any more" in capsys.readouterr().err


def test_a_folder_of_verification_sets_is_built_without_record_files(tmp_path: Path) -> None:
    face_pairs(tmp_path / "sets" / "lfw.bin")
    assert build("pairs", "--data", tmp_path / "sets", "--out", tmp_path / "out") == 0
    assert open_index(tmp_path / "out", "lfw").num_pairs == 23


def test_pairs_of_images_that_are_left_out_are_counted(tmp_path: Path) -> None:
    images = [*IMAGES]
    images[5] = b"no image"
    write_pairs(tmp_path / "sets" / "lfw.bin", images, FLAGS)
    assert build("pairs", "--data", tmp_path / "sets", "--out", tmp_path / "out") == 2
    assert build("pairs", "--data", tmp_path / "sets", "--out", tmp_path / "out", "--on-bad", "skip") == 0
    index = open_index(tmp_path / "out", "lfw")
    assert index.num_pairs == 19
    assert index.read_pairs()[:, 3].tolist() == [0, 0, *[1], *sorted([*range(2, 10)] * 2)]  # folds of all pairs
    assert index.build_record()["pairs_left_out"] == {"lfw": 1}


def test_sets_that_would_take_the_place_of_a_split_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    face_records(tmp_path / "faces", [0, 1])
    face_pairs(tmp_path / "train.bin")
    out = ["--data", tmp_path / "faces", "--out", tmp_path / "out", "--pairs"]
    assert build("recordio", *out, tmp_path / "train.bin") == 2
    assert "would be the split 'train', which is there already" in capsys.readouterr().err
    assert build("recordio", *out, "nowhere.bin") == 2
    assert "nowhere.bin is no file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no verification sets"):
        read_pairs(tmp_path / "faces")


# ---- pickles ---------------------------------------------------------------------------------------------------------


def python_2(images: list[bytes], flags: list[bool]) -> bytes:
    """As Python 2 pickles its str: binary strings that Python 3 reads as bytes."""
    parts = [b"\x80\x02(]("]
    parts += [b"T" + len(image).to_bytes(4, "little") + image for image in images]
    parts += [b"e](", *(b"\x88" if flag else b"\x89" for flag in flags), b"et."]
    return b"".join(parts)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "form",
    [
        lambda: (IMAGES, FLAGS),
        lambda: [tuple(IMAGES), tuple(map(int, FLAGS))],
        lambda: (IMAGES, np.array(FLAGS)),
        lambda: (IMAGES, list(np.array(FLAGS))),
        lambda: ([np.frombuffer(image, np.uint8) for image in IMAGES], FLAGS),
        lambda: (np.array(IMAGES, dtype=object), FLAGS),
        lambda: ([np.bytes_(image) for image in IMAGES], FLAGS),
    ],
)
def test_what_such_files_hold_is_read(tmp_path: Path, protocol: int, form: Any) -> None:
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(form(), protocol=protocol))
    dataset = read_pairs(tmp_path)
    assert [image.content for image in dataset.images] == IMAGES
    assert [pair.is_same for pair in dataset.pairs["lfw"]] == FLAGS


def test_files_of_python_2_are_read(tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(python_2(IMAGES, FLAGS))
    assert [image.content for image in read_pairs(tmp_path).images] == IMAGES


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Runs(os.mkdir, ("owned",)), r"it names posix\.mkdir"),
        (([Runs(os.mkdir, ("owned",))], [True]), r"it names posix\.mkdir"),
        (Runs(eval, ("__import__('os').mkdir('owned')",)), r"it names builtins\.eval"),
        ((np.array(IMAGES, dtype=object), Runs(getattr, ("", "join"))), r"it names builtins\.getattr"),
        ({"images": IMAGES}, "expected a list, got str"),
        (IMAGES, "too many values"),
        ((IMAGES[:-1], FLAGS), "39 images and 20 flags"),
        ((IMAGES[:18], FLAGS[:9]), "at least 10 flags"),
        ((["no bytes", *IMAGES[1:]], FLAGS), "expected the bytes of an image, got str"),
        ((IMAGES, [2, *FLAGS[1:]]), "expected True, False, 1 or 0, got 2"),
        ((IMAGES, ["1", *FLAGS[1:]]), "expected True, False, 1 or 0, got 1"),
        ((IMAGES, np.arange(20.0)), "an array of f8"),
        ((IMAGES, 7), "expected a list, got int"),
    ],
)
def test_what_is_no_verification_set_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lfw.bin").write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match=rf"lfw\.bin .*{message}"):
        read_pairs(Path())
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"no pickle", b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"(" * 9]
)
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"lfw\.bin is not a verification set"):
        read_pairs(tmp_path)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    face_pairs(tmp_path / "lfw.bin")
    whole = (tmp_path / "lfw.bin").read_bytes()
    for length in range(0, len(whole), 997):
        (tmp_path / "lfw.bin").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"lfw\.bin is not a verification set"):
            read_pairs(tmp_path)
