"""Record files of face recognition: what is read, lazily, and that nothing damaged passes for an image."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from dist_proxygml.data import builder
from dist_proxygml.data.builder import BuildResult, build_shards
from dist_proxygml.data.class_split import ClassSplit
from dist_proxygml.data.datasets import FileSlice, SourceDataset
from dist_proxygml.data.recordio import read_recordio
from dist_proxygml.shard import main
from tests.face_records import MAGIC, content, face_records, framed, jpeg, write_records
from tests.raw_downloads import digests, samples_of

LABELS = [0, 0, 1, 2, 2, 2, 4]  # no image of class 3


def bytes_of(dataset: SourceDataset) -> dict[str, bytes]:
    found = {}
    for image in dataset.images:
        part = image.content
        if isinstance(part, FileSlice):
            part = part.file.read_bytes()[part.offset : part.offset + part.num_bytes]
        assert isinstance(part, bytes)
        found[image.name] = part
    return found


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("labels_of", [1, 2, 3])
def test_images_and_classes_are_read_in_every_form(tmp_path: Path, header: bool, labels_of: int) -> None:
    face_records(tmp_path / "faces", LABELS, labels_of=labels_of, header=header)
    dataset = read_recordio(tmp_path, quiet=True)
    assert [(image.source_id, image.class_name, image.split) for image in dataset.images] == [
        (label, str(label), "train") for label in LABELS
    ]
    first = int(header)
    assert bytes_of(dataset) == {f"train.rec#{i}": jpeg(i) for i in range(first, first + len(LABELS))}
    assert all(isinstance(image.content, FileSlice) for image in dataset.images)  # no bytes in memory
    assert len(dataset.notes) == int(header) + 1  # property has a class more, and all classes train


def test_classes_are_divided_where_that_is_wanted(tmp_path: Path) -> None:
    face_records(tmp_path, LABELS)
    dataset = read_recordio(tmp_path, split=ClassSplit(2, "name"), quiet=True)
    assert [image.split for image in dataset.images] == ["train"] * 3 + ["test"] * 4
    assert dataset.build == {"split_classes": {"train": 2, "test": 2, "by": "name"}}
    with pytest.raises(ValueError, match="4 classes with images, of which 5 would train"):
        read_recordio(tmp_path, split=ClassSplit(5), quiet=True)


@pytest.mark.parametrize("places", [(0,), (4,), (8, 12), (3,), (0, 40)])
def test_a_record_that_was_cut_at_the_magic_is_put_together_again(tmp_path: Path, places: tuple[int, ...]) -> None:
    image = bytearray(jpeg(1))
    for place in places:
        image[place : place + 4] = MAGIC
    first_part = framed(content(1, bytes(image)))[7] >> 5
    assert first_part == (places != (3,))  # where it is not aligned nothing is cut
    write_records(tmp_path, {0: content(0, jpeg(0)), 1: content(1, bytes(image)), 2: content([2, 0], bytes(image))})
    assert bytes_of(read_recordio(tmp_path, quiet=True)) == {
        "train.rec#0": jpeg(0),
        "train.rec#1": bytes(image),
        "train.rec#2": bytes(image),
    }


def test_a_record_in_parts_whose_end_is_missing_is_named(tmp_path: Path) -> None:
    image = jpeg(1)[:40] + MAGIC + jpeg(1)
    offsets = write_records(tmp_path, {0: content(0, jpeg(0)), 1: content(1, image)})
    whole = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(whole[: offsets[1] + 80])
    with pytest.raises(ValueError, match=r"train.rec, record 1 at byte \d+ is cut after \d+ bytes"):
        read_recordio(tmp_path, quiet=True)


def test_damage_is_refused_with_the_number_of_the_record(tmp_path: Path) -> None:
    offsets = face_records(tmp_path, LABELS)
    rec, idx = tmp_path / "train.rec", tmp_path / "train.idx"
    whole, lines = rec.read_bytes(), idx.read_text()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_recordio(tmp_path, quiet=True)
        rec.write_bytes(whole)
        idx.write_text(lines)

    rec.write_bytes(whole[:-1])  # inside the last record
    refused(rf"record 11 at byte {offsets[11]} is cut")
    rec.write_bytes(whole[: offsets[5] + 60])
    refused(rf"record 6 at byte {offsets[6]} is not inside the file .*6 such records")
    rec.write_bytes(b"")
    refused("expected records, got 0 bytes")
    idx.write_text(lines.replace(f"3\t{offsets[3]}", f"3\t{len(whole) + 400}"))
    refused("record 3 at byte .* is not inside the file")
    idx.write_text(lines.replace(f"3\t{offsets[3]}", "3\t-4"))
    refused("record 3 at byte -4 is not inside the file")
    idx.write_text(lines.replace(f"3\t{offsets[3]}", f"3\t{offsets[3] + 4}"))
    refused("record 3 at byte .* is none: its index points elsewhere")
    idx.write_text(lines.replace(f"3\t{offsets[3]}", f"3\t{offsets[3] + 1}"))
    refused("record 3 at byte .* is none: its index points elsewhere")
    idx.write_text(lines.replace(f"3\t{offsets[3]}", f"2\t{offsets[3]}"))
    refused("has record 2 twice")
    idx.write_text(lines.replace(f"3\t{offsets[3]}", "3"))
    refused(r"train.idx: expected lines of a record's number and offset")
    idx.write_text("")
    refused(r"train.idx: expected lines of a record's number and offset")
    idx.write_text("\n".join(lines.split("\n")[:5]))  # cut
    refused("record 0 says that images are records 1 to 7, the index lists 4")
    broken = bytearray(whole)
    broken[offsets[2] + 8 : offsets[2] + 12] = (10**6).to_bytes(4, "little")  # its number of labels
    rec.write_bytes(broken)
    refused("record 2 at byte .* is shorter than its header")
    for label, shown in ((float("nan"), "nan"), (-1.0, "-1"), (0.5, "0.5"), (2.0**24, "16777216")):
        write_records(tmp_path, {3: content(0, jpeg(0)), 4: content(label, jpeg(1))})
        refused(f"record 4: expected a whole number from 0 to 16777215 as class, got {shown}")
    write_records(
        tmp_path, {0: content([3, 5], b""), 1: content(0, jpeg(0)), 2: content(0, jpeg(1)), 3: content(0, b"x")}
    )
    refused("record 0 says that images are records 1 to 2, but record 3 is one, too")


def test_numbers_that_float32_rounds_are_no_mistake(tmp_path: Path) -> None:
    """The header of Glint360K, with more than 2^24 images; here their index alone is that long."""
    stop = 2**24 + 3  # float32: 2^24 + 4
    image = framed(content(1, jpeg(0)))
    (tmp_path / "train.rec").write_bytes(framed(content([float(stop), float(stop)], b"")) + image)
    header = len(framed(content([0, 0], b"")))
    with open(tmp_path / "train.idx", "w") as stream:
        stream.write("0\t0\n" + "".join(f"{number}\t{header}\n" for number in range(stop - 5, stop)))
    with pytest.raises(ValueError, match=r"images are records 1 to 16777219, the index lists 5"):
        read_recordio(tmp_path, quiet=True)
    assert len(read_recordio(tmp_path, allow_partial=True, quiet=True).images) == 5


def test_a_record_without_an_image_is_refused_or_left_out(tmp_path: Path) -> None:
    write_records(tmp_path, {4: content(0, jpeg(0)), 5: content(1, b""), 6: content(2, jpeg(2))})
    with pytest.raises(ValueError, match=r"record 5 has no image, one of 1; .*--allow-partial"):
        read_recordio(tmp_path, quiet=True)
    dataset = read_recordio(tmp_path, allow_partial=True, quiet=True)
    assert [image.name for image in dataset.images] == ["train.rec#4", "train.rec#6"]
    assert "first 5" in dataset.notes[0]


def test_property_is_compared(tmp_path: Path) -> None:
    face_records(tmp_path, LABELS)
    (tmp_path / "property").write_text("5,112,112\n")
    assert f"{tmp_path / 'property'} announces 5 classes, 4 have images" in read_recordio(tmp_path, quiet=True).notes
    (tmp_path / "property").write_text("4,112,112")
    with pytest.raises(ValueError, match=r"record 7 has class 4, .*property announces 4 classes"):
        read_recordio(tmp_path, quiet=True)
    (tmp_path / "property").write_text("four")
    with pytest.raises(ValueError, match=r"property: expected CLASSES,HEIGHT,WIDTH, got 'four'"):
        read_recordio(tmp_path, quiet=True)


def test_a_folder_without_record_files_or_with_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for \*\.rec, \*\.idx"):
        read_recordio(tmp_path)
    face_records(tmp_path, LABELS)
    (tmp_path / "train.rec").rename(tmp_path / "a.rec")
    with pytest.raises(ValueError, match=r"a\.idx is missing"):
        read_recordio(tmp_path)
    (tmp_path / "b.rec").touch()
    with pytest.raises(ValueError, match=r"has 2 \.rec files and no train\.rec"):
        read_recordio(tmp_path)


def test_any_number_of_processes_reads_images_where_they_are(tmp_path: Path) -> None:
    face_records(tmp_path / "faces", LABELS)
    build = ["build", "recordio", "--data", str(tmp_path / "faces"), "--out", str(tmp_path / "out")]
    assert main([*build, "--samples-per-shard", "2"]) == 0
    whole = digests(tmp_path / "out")
    dataset = read_recordio(tmp_path / "faces", quiet=True)
    assert pickle.loads(pickle.dumps(dataset.images)) == dataset.images
    for workers in (1, 2):
        assert build_shards(dataset, tmp_path / f"{workers}", samples_per_shard=2, workers=workers, quiet=True)
        assert digests(tmp_path / f"{workers}") == whole
    assert {s["jpg"] for s in samples_of(tmp_path / "out", "train")} == {jpeg(i) for i in range(1, 8)}


def test_a_build_that_failed_keeps_the_shards_that_are_the_same(tmp_path: Path) -> None:
    offsets = face_records(tmp_path / "faces", LABELS)
    rec = tmp_path / "faces" / "train.rec"
    whole, status = rec.read_bytes(), rec.stat()

    def build() -> BuildResult:
        os.utime(rec, ns=(status.st_atime_ns, status.st_mtime_ns))
        dataset = read_recordio(tmp_path / "faces", quiet=True)
        return build_shards(dataset, tmp_path / "out", samples_per_shard=2, quiet=True)

    rec.write_bytes(whole[: offsets[7] + 32] + bytes(32) + whole[offsets[7] + 64 :])
    with pytest.raises(ValueError, match=r"train\.rec#7: the image does not decode"):
        build()
    rec.write_bytes(whole)
    assert build().num_kept == 3  # of 4
    again = build_shards(
        read_recordio(tmp_path / "faces", quiet=True), tmp_path / "anew", samples_per_shard=2, quiet=True
    )
    assert not again.num_kept
    assert digests(tmp_path / "out") == digests(tmp_path / "anew")


def test_another_place_in_the_file_is_another_image_to_a_build_that_resumes(tmp_path: Path) -> None:
    face_records(tmp_path / "faces", LABELS)
    image = read_recordio(tmp_path / "faces", quiet=True).images[0]
    assert isinstance(image.content, FileSlice)
    places = [image.content, image.content._replace(offset=0), image.content._replace(num_bytes=1)]
    tasks = [
        builder._ShardTask(tmp_path / "out.tar", 0, [replace(image, content=place)], [0], None, True, None)
        for place in places
    ]
    assert len({builder._fingerprint(task) for task in tasks}) == 3


def test_a_file_that_is_cut_after_it_was_read_ends_the_build(tmp_path: Path) -> None:
    offsets = face_records(tmp_path / "faces", LABELS)
    dataset = read_recordio(tmp_path / "faces", quiet=True)
    rec = tmp_path / "faces" / "train.rec"
    rec.write_bytes(rec.read_bytes()[: offsets[7] + 50])
    with pytest.raises(ValueError, match=r"train.rec#7: expected \d+ bytes at offset \d+, got \d+: the file was cut"):
        build_shards(dataset, tmp_path / "out", quiet=True)
