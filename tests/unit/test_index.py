"""Opening a folder of shards."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dist_proxygml.data.index import ShardIndex, class_table_sha256, open_index, write_index
from dist_proxygml.data.shards import SAMPLE_DTYPE, ListedShard, ShardReader, list_shard, shard_name
from dist_proxygml.shard import main
from tests.shards_of_noise import write_noise_shards

SIZES = [3, 1, 4]


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_noise_shards(tmp_path / "shards", SIZES, num_shards=3)


def edit(index: ShardIndex, **changes: object) -> None:
    path = index.root / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def message_of_opening(index: ShardIndex, split: str = "test") -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_index(index.root, split)
    return str(caught.value)


def test_an_index_says_what_the_shards_hold(index: ShardIndex) -> None:
    assert (index.num_samples, index.num_classes, index.split) == (8, 3, "test")
    assert index.samples.dtype == SAMPLE_DTYPE
    assert isinstance(index.samples, np.memmap)
    assert index.labels.dtype == np.int64
    assert np.bincount(index.labels).tolist() == SIZES == [entry.count for entry in index.classes]
    assert [shard.num_samples for shard in index.shards] == [3, 3, 2]
    assert index.samples["shard"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert index.class_table_sha256 == class_table_sha256(index.classes)


def test_every_row_of_the_table_leads_to_its_image(index: ShardIndex) -> None:
    reader = ShardReader(index.open_shard, max_open=2)
    for row in index.samples[::-1]:
        payload = reader.read(
            int(row["shard"]),
            offset=int(row["offset"]),
            num_bytes=int(row["nbytes"]),
            crc32=int(row["crc32"]),
        )
        assert payload.startswith(b"\x89PNG")
        assert payload.endswith(b"IEND\xaeB`\x82")
    assert len(reader._descriptors) == 2
    reader.close()


def test_an_index_travels_to_another_process_as_paths_not_as_a_table(index: ShardIndex) -> None:
    travelled = pickle.dumps(index)
    again = pickle.loads(travelled)
    assert isinstance(again.samples, np.memmap)
    assert np.array_equal(again.samples, index.samples)
    assert again.classes == index.classes
    assert again.sha256 == index.sha256
    assert index.samples.tobytes() not in travelled


def test_the_class_tables_hash_ignores_counts_but_not_order(index: ShardIndex) -> None:
    one, two, three = index.classes
    assert class_table_sha256([one, three, two]) != index.class_table_sha256


def test_chosen_classes_are_a_split_of_their_own_with_labels_from_zero(index: ShardIndex) -> None:
    part = index.choose_classes(np.array([2, 0]), name="some")
    assert (part.split, part.num_classes, part.num_samples) == ("some", 2, SIZES[0] + SIZES[2])
    assert [entry.label for entry in part.classes] == [0, 1]
    old = [index.classes[0], index.classes[2]]
    assert [(e.name, e.source_id, e.count) for e in part.classes] == [(e.name, e.source_id, e.count) for e in old]
    assert part.class_table_sha256 == class_table_sha256(part.classes) != index.class_table_sha256
    assert part.sha256 == index.sha256
    rows = [row for row in index.samples.tolist() if row[1] != 1]  # shard, label, offset, ...
    assert part.samples.tolist() == [(shard, {0: 0, 2: 1}[label], *rest) for shard, label, *rest in rows]
    assert index.labels.max() == 2

    again = pickle.loads(pickle.dumps(part))
    assert np.array_equal(again.samples, part.samples)
    assert (again.classes, again.class_table_sha256) == (part.classes, part.class_table_sha256)


def test_the_class_table_of_chosen_classes_has_their_lines(index: ShardIndex) -> None:
    stored = (index.root / "index.classes.test.jsonl").read_bytes().splitlines(keepends=True)
    for number_of, kept in ((index, stored), (index.choose_classes(np.array([1, 2]), name="some"), stored[1:])):
        stream = io.BytesIO()
        number_of.write_class_table(stream)
        assert stream.getvalue() == b"".join(kept)


def test_a_missing_folder_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*dist_proxygml\.shard"):
        open_index(tmp_path / "nowhere", "train")


def test_a_folder_without_an_index_is_an_unfinished_build(index: ShardIndex) -> None:
    (index.root / "index.json").unlink()
    message = message_of_opening(index)
    assert "3 tar files and no index.json" in message
    assert "run the build again" in message
    assert f"shard index {index.root}" in message


def test_an_empty_folder_is_told_apart_from_an_unfinished_build(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\b0 tar files.*index\.json"):
        open_index(tmp_path, "train")


def test_another_version_kind_or_no_json_at_all_is_refused(index: ShardIndex) -> None:
    edit(index, version=1)
    assert "has version 1, this program reads versions 2 and 3" in message_of_opening(index)
    for version, build in ((3, {}), (2, {"exif": "applied"}), (3, {"exif": "ignored"})):  # says one thing and another
        edit(index, version=version, build=build)
        assert "garbles the field 'build.exif'" in message_of_opening(index)
    edit(index, version=2, kind="other")
    assert "not a shard index" in message_of_opening(index)
    (index.root / "index.json").write_text("{")
    assert "is not JSON" in message_of_opening(index)


def test_an_unknown_split_is_refused_with_those_that_exist(index: ShardIndex) -> None:
    assert "has the splits test, not 'train'" in message_of_opening(index, "train")


def test_a_garbled_split_is_refused_not_half_read(index: ShardIndex) -> None:
    edit(index, splits={"test": {"num_samples": 8}})
    assert "lacks or garbles the field 'splits.test.samples.sha256'" in message_of_opening(index)


def test_a_missing_and_a_cut_shard_are_both_named(index: ShardIndex) -> None:
    index.shard_paths[0].unlink()
    content = index.shard_paths[2].read_bytes()
    index.shard_paths[2].write_bytes(content[:-512])
    message = message_of_opening(index)
    assert "2 of 3 shards" in message
    assert "test-000000.tar is missing" in message
    assert f"test-000002.tar has {len(content) - 512} bytes, the index says {len(content)}" in message


def test_a_stale_table_is_refused(index: ShardIndex) -> None:
    table = index.root / "index.samples.test.npy"
    rows = np.load(table)
    rows["label"] = rows["label"][::-1]
    np.save(table, rows)
    assert "does not belong to" in message_of_opening(index)
    table.unlink()
    assert "index.samples.test.npy is missing" in message_of_opening(index)


def test_labels_beyond_the_class_table_are_refused(index: ShardIndex) -> None:
    document = json.loads((index.root / "index.json").read_text())
    document["splits"]["test"]["num_classes"] = 2
    edit(index, **document)
    assert "labels 0 to 2, but" in message_of_opening(index)


def test_a_changed_class_table_is_refused(index: ShardIndex) -> None:
    table = index.root / "index.classes.test.jsonl"
    table.write_text(table.read_text().replace("pattern 1", "pattern 9"))
    assert "index.classes.test.jsonl does not belong to" in message_of_opening(index)
    table.unlink()
    assert "index.classes.test.jsonl is missing" in message_of_opening(index)


def test_changed_bytes_and_a_file_that_shrank_are_noticed_at_the_read(index: ShardIndex) -> None:
    row = index.samples[0]
    reader = ShardReader(index.open_shard)
    where = {"offset": int(row["offset"]), "num_bytes": int(row["nbytes"])}
    with pytest.raises(ValueError, match="00000001"):
        reader.read(0, **where, crc32=1)
    index.shard_paths[0].write_bytes(index.shard_paths[0].read_bytes()[: where["offset"] + 5])
    with pytest.raises(ValueError, match=r"\b5: "):
        reader.read(0, **where, crc32=int(row["crc32"]))
    index.shard_paths[1].unlink()
    with pytest.raises(ValueError, match="No such file"):
        reader.read(1, **where, crc32=0)


@pytest.mark.parametrize("keep", [1100, 1024, 1536, -5000])
def test_listing_a_cut_tar_is_refused(index: ShardIndex, keep: int) -> None:
    path = index.shard_paths[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"test-000000\.tar"):
        list_shard(path)


def test_a_tar_cut_between_two_samples_is_told_by_its_missing_end_mark(index: ShardIndex) -> None:
    path = index.shard_paths[0]
    with tarfile.open(path) as tar:
        second_sample = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:second_sample])
    with pytest.raises(ValueError, match="end mark"):
        list_shard(path)


def test_members_of_a_sample_that_are_apart_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "b.png", "a.cls", "b.cls"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"1"))
    with pytest.raises(ValueError, match=r"sample a\b"):
        list_shard(path)


def test_listing_something_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    for content in (b"<html>503</html>" * 100, b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"(download|copy or build) the shard again"):
            list_shard(path)


def test_shards_that_lie_elsewhere_are_fetched_once_and_read_like_local_ones(index: ShardIndex, tmp_path: Path) -> None:
    log = tmp_path / "fetched"
    location = f"pipe:echo {{}} >> {log}; cat {index.root}/{{}}"
    remote = open_index(location, "test", cache_directory=tmp_path / "cache", is_typed=True)
    assert "test-000000.tar" not in log.read_text()  # shards come when they are read
    assert (remote.sha256, remote.classes, remote.samples.tolist()) == (
        index.sha256,
        index.classes,
        index.samples.tolist(),
    )
    for opened in (remote, pickle.loads(pickle.dumps(remote)), remote.open_sibling("test")):
        for row in opened.samples:
            where = {"offset": int(row["offset"]), "num_bytes": int(row["nbytes"]), "crc32": int(row["crc32"])}
            got = ShardReader(opened.open_shard).read(int(row["shard"]), **where)
            assert got == ShardReader(index.open_shard).read(int(row["shard"]), **where)
    fetched = log.read_text().split()
    assert sorted(name for name in fetched if name.endswith(".tar")) == [shard.file for shard in index.shards]
    assert remote.describe(0).startswith(f"{location}/test-000000.tar, sample test-00000000 (label ")


@pytest.mark.parametrize("table", ["index.samples.test.npy", "index.classes.test.jsonl"])
def test_a_server_cannot_send_a_table_that_is_larger_than_its_index_says(
    index: ShardIndex, tmp_path: Path, table: str
) -> None:
    location = f"pipe:cat {index.root}/{{}}; if [ {{}} = {table} ]; then yes; fi"
    with pytest.raises(ValueError, match=r"attempt 1 of 5.*\b\d+ bytes"):
        open_index(location, "test", cache_directory=tmp_path / "cache", is_typed=True)


@pytest.mark.ci
def test_ten_million_samples_open_within_seconds_and_cost_a_worker_nothing_of_their_own(tmp_path: Path) -> None:
    num_samples, num_classes, num_shards = 10_000_000, 1_000_000, 1000
    per_shard = num_samples // num_shards
    rows = np.zeros(per_shard, SAMPLE_DTYPE)
    shards = []
    for number in range(num_shards):
        labelled = rows.copy()
        labelled["label"] = (np.arange(per_shard) + number * per_shard) % num_classes
        shards.append((shard_name("train", number), ListedShard(0, "0" * 64, [], labelled, {})))
        (tmp_path / shard_name("train", number)).touch()
    names = [(f"class {label}", label) for label in range(num_classes)]
    write_index(tmp_path, dataset="large", build={}, shards={"train": shards}, classes={"train": names})

    started = time.process_time()
    index = open_index(tmp_path, "train")
    assert time.process_time() - started < 3.0
    assert (index.num_samples, index.num_classes) == (num_samples, num_classes)
    process = psutil.Process()
    before = process.memory_full_info().uss
    again = pickle.loads(pickle.dumps(index))  # what a spawned worker gets
    assert [int(again.samples["label"][i]) for i in (0, num_samples // 2, num_samples - 1)] == [0, 0, 999_999]
    assert process.memory_full_info().uss - before < 50e6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("splits", -1),
        ("splits", None),
        ("splits", {"test": None}),
        ("splits", {"test": {"num_classes": 10**30}}),
        ("splits", {"test": {"num_classes": 2.5}}),
        ("dataset", None),
        ("build", None),
        ("build", {"skipped": 3}),
    ],
)
def test_a_garbled_index_is_refused_naming_the_field(
    field: str, value: object, index: ShardIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(index, **{field: value})
    message = message_of_opening(index)
    assert f"index.json lacks or garbles the field '{field}" in message
    assert f"shard index {index.root}" in message
    assert main(["info", str(index.root)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("field", ["splits", "dataset", "build"])
def test_an_index_that_lacks_a_field_is_refused(field: str, index: ShardIndex) -> None:
    path = index.root / "index.json"
    document = json.loads(path.read_text())
    del document[field]
    path.write_text(json.dumps(document))
    assert f"index.json lacks or garbles the field '{field}'" in message_of_opening(index)


@pytest.mark.parametrize(
    "name", ["../outside.tar", "/dev/null", "a/b.tar", "..", "", "\x1b[2Jtest-000000.tar", "two\nlines.tar", 3, None]
)
def test_a_shard_is_a_file_beside_its_index(name: object, index: ShardIndex) -> None:
    document = json.loads((index.root / "index.json").read_text())
    document["splits"]["test"]["shards"][1]["file"] = name
    edit(index, **document)
    message = message_of_opening(index)
    assert "field 'splits.test.shards.1.file" in message
    assert "\n" not in message


def test_a_split_that_is_a_path_and_a_shard_named_twice_are_refused(index: ShardIndex) -> None:
    document = json.loads((index.root / "index.json").read_text())
    shards = document["splits"]["test"]["shards"]
    edit(index, splits={"../x": document["splits"]["test"]})
    assert "field 'splits.../x'" in message_of_opening(index)
    shards[2]["file"] = shards[0]["file"]
    edit(index, **document)
    assert "field 'splits.test.shards.2.file" in message_of_opening(index)


def test_an_index_without_its_last_shard_is_refused(index: ShardIndex) -> None:
    document = json.loads((index.root / "index.json").read_text())
    document["splits"]["test"]["shards"].pop()
    edit(index, **document)
    assert "and the 2 shards of the index have other counts of samples; copy" in message_of_opening(index)


def write_table(index: ShardIndex, table: np.ndarray) -> None:
    """Another sample table, of which the index knows the hash."""
    stream = io.BytesIO()
    np.save(stream, table)
    write_content(index, "samples", stream.getvalue())


def write_content(index: ShardIndex, kind: str, content: bytes) -> None:
    document = json.loads((index.root / "index.json").read_text())
    entry = document["splits"]["test"][kind]
    (index.root / entry["file"]).write_bytes(content)
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    edit(index, **document)


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard", 3), ("shard", 2**32 - 1), ("shard", 1), ("offset", 2**64 - 1), ("offset", 10**9), ("nbytes", 2**32 - 1)],
)
def test_a_row_that_leads_out_of_its_shard_is_refused_at_the_start(field: str, value: int, index: ShardIndex) -> None:
    table = np.array(index.samples)
    table[field][0] = value
    write_table(index, table)
    message = message_of_opening(index)
    assert "index.samples.test.npy" in message
    assert "copy the folder again or run" in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04zip", b"\x93NUMPY\x01\0\x02\0{}", pickle.dumps([1])])
def test_a_sample_table_that_is_none_is_refused(content: bytes, index: ShardIndex) -> None:
    table = np.array(index.samples)  # the file is mapped
    write_content(index, "samples", content)
    assert "index.samples.test.npy is not a table of samples" in message_of_opening(index)
    write_table(index, table[:, None])
    assert "index.samples.test.npy has (8, 1) rows of" in message_of_opening(index)


@pytest.mark.parametrize("content", [b"3\n" * 3, b"[1,2,3]\n" * 3, b"[" * 99_999, b'["a",1]\n' * 3, b"\xff\n" * 3])
def test_a_class_table_that_is_none_is_refused(content: bytes, index: ShardIndex) -> None:
    write_content(index, "classes", content)
    with pytest.raises(ValueError, match=r"index\.classes\.test\.jsonl.*\[name, id, count\]"):
        _ = open_index(index.root, "test").classes


def test_pipes_are_not_waited_for(index: ShardIndex, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("test-000001.tar", "index.samples.test.npy", "index.classes.test.jsonl", "index.json"):
        content = (index.root / name).read_bytes()
        (index.root / name).unlink()
        os.mkfifo(index.root / name)
        assert name in message_of_opening(index)
        indexed = main(["index", str(index.root)])
        error = capsys.readouterr().err
        if name.endswith(".tar"):
            assert "test-000001.tar is no regular file, expected a tar file" in error
        assert indexed == (2 if name.endswith(".tar") else 0)
        (index.root / name).unlink()
        (index.root / name).write_bytes(content)


def test_brackets_without_end_are_no_index(index: ShardIndex) -> None:
    (index.root / "index.json").write_text("[" * 100_000)
    assert "is not JSON" in message_of_opening(index)
