"""Hugging Face data sets: bytes where they lie in the Arrow files, classes with their names, and what is refused."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from dist_proxygml.data.class_split import ClassSplit
from dist_proxygml.data.datasets import FileSlice, SourceDataset
from dist_proxygml.data.hf import read_hf
from dist_proxygml.data.index import open_index
from dist_proxygml.shard import main
from tests.raw_downloads import picture, samples_of


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def table(labels: list[Any], label: Any, first: int = 0, **columns: Any) -> datasets.Dataset:
    """Images of these classes; their files are PNGs from the seed `first` on."""
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [{"bytes": png(first + i), "path": None} for i in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels, **columns}, features=features)


NAMES = datasets.ClassLabel(names=["cat", "dog", "eel", "fox", "gnu"])


def saved(root: Path, **splits: datasets.Dataset) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(root))
    return str(root)


def bytes_of(dataset: SourceDataset) -> list[bytes]:
    found = []
    for image in dataset.images:
        assert isinstance(image.content, FileSlice)  # no bytes in memory
        found.append(image.content.file.read_bytes()[image.content.offset :][: image.content.num_bytes])
    return found


def test_splits_names_and_bytes_are_those_of_the_data_set(tmp_path: Path) -> None:
    root = saved(tmp_path / "raw", train=table([0, 0, 2, 0], NAMES), validation=table([3, 1, 1], NAMES, first=4))
    dataset = read_hf(root)
    assert [(i.split, i.source_id, i.class_name, i.name) for i in dataset.images] == [
        ("train", 0, "cat", "train/0"),
        ("train", 0, "cat", "train/1"),
        ("train", 2, "eel", "train/2"),
        ("train", 0, "cat", "train/3"),
        ("validation", 3, "fox", "validation/0"),
        ("validation", 1, "dog", "validation/1"),
        ("validation", 1, "dog", "validation/2"),
    ]
    assert bytes_of(dataset) == [png(i) for i in range(7)]


def test_several_files_with_several_batches_are_read_in_their_order(tmp_path: Path) -> None:
    labels = [i % 7 for i in range(2500)]  # a batch of a file has 1,000 rows
    table(labels, datasets.Value("int32")).save_to_disk(str(tmp_path / "raw"), num_shards=2)
    dataset = read_hf(str(tmp_path / "raw"), split=ClassSplit(3, "name"))
    assert [image.source_id for image in dataset.images] == labels
    assert [image.split for image in dataset.images] == ["train" if label < 3 else "test" for label in labels]
    assert bytes_of(dataset) == [png(i) for i in range(2500)]


def test_the_command_builds_shards_with_any_number_of_processes(tmp_path: Path) -> None:
    root = saved(tmp_path / "raw", train=table([0, 0, 2], NAMES), test=table([3, 1, 1], NAMES, first=3))
    for workers in (1, 2):
        out = tmp_path / f"{workers}"
        arguments = ["--data", root, "--out", str(out), "--num-workers", f"{workers}", "--samples-per-shard", "2"]
        assert main(["build", "hf", *arguments]) == 0
        assert [entry.name for entry in open_index(out, "test").classes] == ["dog", "fox"]
        assert {sample["png"] for sample in samples_of(out, "train")} == {png(i) for i in range(3)}


def test_classes_of_all_splits_are_divided_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = saved(tmp_path / "raw", train=table([0, 1, 2], NAMES), test=table([0, 1, 2], NAMES, first=3))
    arguments = ["build", "hf", "--data", root, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "is in train and in test" in (error := capsys.readouterr().err)
    assert "--split-classes N" in error
    assert main([*arguments, "--allow-seen-classes"]) == 0
    assert [entry.name for entry in open_index(tmp_path / "out", "test").classes] == ["cat", "dog", "eel"]
    arguments[-1] = str(tmp_path / "anew")
    assert main([*arguments, "--split-classes", "2", "--split-by", "name"]) == 0
    assert [entry.count for entry in open_index(tmp_path / "anew", "train").classes] == [2, 2]
    assert [entry.name for entry in open_index(tmp_path / "anew", "test").classes] == ["eel"]
    with pytest.raises(ValueError, match="3 classes with images, of which 4 would train"):
        read_hf(root, split=ClassSplit(4))


def test_texts_are_classes_and_columns_may_be_called_otherwise(tmp_path: Path) -> None:
    one = table(["b", "a", "a"], datasets.Value("string")).rename_columns({"image": "photo", "label": "product"})
    one.save_to_disk(str(tmp_path / "raw"))
    with pytest.raises(
        ValueError, match="expected a column 'image', got photo, product; name it with --columns image="
    ):
        read_hf(str(tmp_path / "raw"))
    columns = {"image": "photo", "label": "product"}
    dataset = read_hf(str(tmp_path / "raw"), columns=columns, split=ClassSplit(1, "name"))
    assert [(image.split, image.source_id) for image in dataset.images] == [
        ("test", "b"),
        ("train", "a"),
        ("train", "a"),
    ]
    with pytest.raises(ValueError, match="expected image, label, got 'camera'"):
        read_hf(str(tmp_path / "raw"), columns={"camera": "x"})
    with pytest.raises(ValueError, match="expected a column 'nothing'"):
        read_hf(str(tmp_path / "raw"), columns={"image": "nothing"})
    with pytest.raises(ValueError, match="expected a column of image files, got string"):
        read_hf(str(tmp_path / "raw"), columns={"image": "product", "label": "product"})


def test_a_selection_of_rows_is_what_is_saved(tmp_path: Path) -> None:
    one = table([0, 1, 2, 3, 4], NAMES).select([4, 0, 1])
    one.save_to_disk(str(tmp_path / "raw"))
    dataset = read_hf(str(tmp_path / "raw"))
    assert [image.class_name for image in dataset.images] == ["gnu", "cat", "dog"]
    assert bytes_of(dataset) == [png(4), png(0), png(1)]


@pytest.mark.parametrize("what", ["image", "class"])
def test_rows_without_image_or_class_are_refused_or_left_out(tmp_path: Path, what: str) -> None:
    labels = [0, -1 if what == "class" else 1, 2, 3]
    rows = table(labels, NAMES)
    if what == "image":
        images = [None if i == 1 else {"bytes": png(i), "path": None} for i in range(4)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=rows.features)
    root = saved(tmp_path / "raw", train=rows)
    with pytest.raises(ValueError, match=f"split train: row 1 has no {what}; pass --allow-partial"):
        read_hf(root)
    dataset = read_hf(root, allow_partial=True)
    assert bytes_of(dataset) == [png(0), png(2), png(3)]
    assert dataset.notes == ("1 rows without an image or a class were left out",)


def arrow_file(root: Path, rows: pyarrow.Table, **options: Any) -> str:
    """A folder of `save_to_disk` with another Arrow file in it."""
    table([0, 1], NAMES).save_to_disk(str(root))
    (file,) = root.glob("*.arrow")
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema, **options) as writer:
        writer.write_table(rows)
    return str(root)


def rows_of(images: list[dict[str, Any]]) -> pyarrow.Table:
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return pyarrow.table({"image": pyarrow.array(images, kind), "label": pyarrow.array([0, 1], pyarrow.int64())})


def test_images_that_are_only_named_are_refused(tmp_path: Path) -> None:
    images = [{"bytes": png(0), "path": "0.png"}, {"bytes": None, "path": "/etc/passwd"}]
    with pytest.raises(ValueError, match=r"named by their paths, expected their bytes; save it with .*save_to_disk"):
        read_hf(arrow_file(tmp_path / "raw", rows_of(images)))


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    images = [{"bytes": png(i) * 9, "path": None} for i in range(2)]
    with pytest.raises(ValueError, match="is compressed or damaged"):
        read_hf(arrow_file(tmp_path / "raw", rows_of(images), options=options))


def test_places_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little", signed=True) for n in (0, 1 << 29, 4)))
    images = pyarrow.Array.from_buffers(pyarrow.binary(), 2, [None, offsets, pyarrow.py_buffer(b"abcd")])
    struct = pyarrow.StructArray.from_arrays([images, pyarrow.nulls(2, pyarrow.string())], ["bytes", "path"])
    rows = pyarrow.table({"image": struct, "label": pyarrow.array([0, 1], pyarrow.int64())})
    with pytest.raises(ValueError, match=r"raw, split train.* damaged"):
        read_hf(arrow_file(tmp_path / "raw", rows))


def test_what_is_no_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"not a folder of `save_to_disk`: expected dataset_dict\.json or state\.json"):
        read_hf(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor the name of a data set"):
        read_hf(str(tmp_path / "nowhere"))
    root = saved(tmp_path / "raw", train=table([0, 1], NAMES))
    (file,) = (tmp_path / "raw" / "train").glob("*.arrow")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="raw: it cannot be read"):
        read_hf(root)
    shutil.rmtree(tmp_path / "raw" / "train")
    with pytest.raises(ValueError, match="raw: it cannot be read"):
        read_hf(root)

    def offline(*_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"user/name: .* the hub gives no such data set \(ConnectionError: no route\)"):
        read_hf("user/name")


def test_a_name_on_the_hub_is_opened_with_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = saved(tmp_path / "raw", train=table([0, 1], NAMES), test=table([2], NAMES, first=2))
    asked = []

    def load(name: str, configuration: str | None) -> Any:
        asked.append((name, configuration))
        return datasets.load_from_disk(root)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert bytes_of(read_hf("user/name:small")) == bytes_of(read_hf("name")) == [png(0), png(1), png(2)]
    assert asked == [("user/name", "small"), ("name", None)]
