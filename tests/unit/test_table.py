"""Shards of images that a table lists, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dist_proxygml.data.index import open_index
from dist_proxygml.shard import main
from tests.raw_downloads import samples_of, write_image, write_lines

ROWS = [(f"{label}/{i}.jpg", label, "train" if label < 3 else "test") for label in range(5) for i in range(label + 1)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for number, (name, _, _) in enumerate(ROWS):
        write_image(tmp_path / "raw" / name, number)
    return tmp_path / "raw"


def build(out: Path, *options: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The JSON of every sample by split, in the order of their sources."""
    assert main(["build", "table", "--out", str(out), *map(str, options)]) == 0
    splits = json.loads((out / "index.json").read_text())["splits"]
    return {
        split: sorted((json.loads(sample["json"]) for sample in samples_of(out, split)), key=lambda i: i["source"])
        for split in splits
    }


def refusal(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    capsys.readouterr()
    assert main(["build", "table", "--out", "nowhere", *map(str, options)]) == 2
    assert not Path("nowhere").exists()
    return capsys.readouterr().err


def as_csv(raw: Path) -> list[str | Path]:
    write_lines(raw / "t.csv", ["image,label,split", *(f"{name},{label},{split}" for name, label, split in ROWS)])
    return ["--table", raw / "t.csv"]


def as_parquet(raw: Path) -> list[str | Path]:
    names, labels, splits = zip(*ROWS, strict=True)
    table = pyarrow.table({"file_name": names, "label": labels, "split": [split.upper() for split in splits]})
    parquet.write_table(table, raw.parent / "t.parquet")
    return ["--table", raw.parent / "t.parquet", "--data", raw]


def as_json_lines(raw: Path) -> list[str | Path]:
    write_lines(
        raw / "t.jsonl",
        [json.dumps({"path": str(raw / name), "sku": label, "split": split}) for name, label, split in ROWS],
    )
    return ["--table", raw / "t.jsonl", "--columns", "label=sku"]


def as_lists(raw: Path) -> list[str | Path]:
    for part in ("train", "test"):
        write_lines(raw / f"list_{part}.txt", [f"{name} {label}" for name, label, split in ROWS if split == part])
    tables = [raw / "list_train.txt", "--table", raw / "list_test.txt"]
    return ["--table", *tables, "--columns", "image=1", "label=2"]


def as_named_tables(raw: Path) -> list[str | Path]:
    for file, part in (("a.csv", "train"), ("b.csv", "test")):
        rows = [f"{name.split('/')[1][:-4]},{label}" for name, label, split in ROWS if split == part]
        write_lines(raw / file, ["id,label", *rows])
    return ["--table", f"train={raw}/a.csv", f"test={raw}/b.csv", "--image-path", "{label}/{id}.jpg"]


def as_images_of_classes(raw: Path) -> list[str | Path]:
    names: dict[int, list[str]] = {}
    for name, label, _ in ROWS:
        names.setdefault(label, []).append(name.split("/")[1][:-4])
    rows = [f"{label},{' '.join(ids)},{'train' if label < 3 else 'test'}" for label, ids in names.items()]
    write_lines(raw / "clean.csv", ["landmark_id,images,split", *rows])
    names_of = ["--columns", "image=images", "label=landmark_id"]
    return ["--table", raw / "clean.csv", *names_of, "--several", "--image-path", "{landmark_id[0]}/{images}.jpg"]


def as_coco(raw: Path) -> list[str | Path]:
    for part in ("train", "test"):
        rows = [(number, name, label) for number, (name, label, split) in enumerate(ROWS) if split == part]
        document = {
            "images": [{"id": number, "file_name": name} for number, name, _ in rows],
            "annotations": [{"image_id": number, "category_id": label} for number, _, label in rows],
        }
        (raw / f"{part}2021.json").write_text(json.dumps(document))
    return ["--table", raw / "train2021.json", raw / "test2021.json"]


@pytest.mark.parametrize(
    "write",
    [as_csv, as_parquet, as_json_lines, as_lists, as_named_tables, as_images_of_classes, as_coco],
)
def test_tables_of_every_kind_give_the_same_samples(
    write: Callable[[Path], list[str | Path]], raw: Path, tmp_path: Path
) -> None:
    found = build(tmp_path / "out", *write(raw))
    assert {split: [(info["source"], info["source_id"]) for info in infos] for split, infos in found.items()} == {
        part: [(name, label) for name, label, split in ROWS if split == part] for part in ("train", "test")
    }
    assert [entry.name for entry in open_index(tmp_path / "out", "test").classes] == ["3", "4"]
    assert main(["verify", "--deep", str(tmp_path / "out")]) == 0


def test_folders_of_hugging_face_have_names_that_repeat(raw: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        rows = [(name, label) for name, label, split in ROWS if split == part]
        (raw / part).mkdir()
        for number, (name, _) in enumerate(rows):
            (raw / name).rename(raw / part / f"{number}.jpg")
        lines = [json.dumps({"file_name": f"{number}.jpg", "label": row[1]}) for number, row in enumerate(rows)]
        write_lines(raw / part / "metadata.jsonl", lines)
    found = build(tmp_path / "out", "--data", raw)
    assert {split: len(infos) for split, infos in found.items()} == {"train": 6, "test": 9}
    assert [info["source"] for info in found["train"]] == [f"train/{number}.jpg" for number in range(6)]


def test_other_columns_are_kept_and_none_passes_for_what_the_build_says(raw: Path, tmp_path: Path) -> None:
    rows = [f'{name},{label},"Chair, ""blue"" {label}",{label}.50,applied,9' for name, label, _ in ROWS]
    write_lines(raw / "t.csv", ["image,label,class_name,price,exif,width", *rows])
    found = build(tmp_path / "out", "--table", raw / "t.csv")
    infos = [info for part in found.values() for info in part]
    assert len(infos) == len(ROWS)
    for info in infos:
        assert info["class_name"] == f'Chair, "blue" {info["source_id"]}'
        assert (info["price"], info["table.exif"], info["table.width"]) == (f"{info['source_id']}.50", "applied", "9")
        assert info["width"] == 6
        assert "exif" not in info
    assert not open_index(tmp_path / "out", "train").upright


def test_labels_are_texts_unless_all_are_written_as_whole_numbers(raw: Path, tmp_path: Path) -> None:
    write_lines(raw / "t.csv", ["image,label", "0/0.jpg,10", "1/0.jpg,9", "1/1.jpg,2", "2/0.jpg,-1"])
    build(tmp_path / "out", "--table", raw / "t.csv", "--split-classes", "3", "--split-by", "name")
    assert [entry.source_id for entry in open_index(tmp_path / "out", "train").classes] == [-1, 2, 9]
    write_lines(raw / "t.csv", ["image,label", "0/0.jpg,10", "1/0.jpg,9", "1/1.jpg,007", "2/0.jpg,7"])
    build(tmp_path / "text", "--table", raw / "t.csv", "--split-classes", "3", "--split-by", "name")
    assert [entry.source_id for entry in open_index(tmp_path / "text", "train").classes] == ["007", "10", "7"]


def test_rows_without_a_file_are_named_by_their_lines_or_left_out(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = as_csv(raw)
    (raw / "2" / "1.jpg").unlink()
    (raw / "4" / "0.jpg").unlink()
    error = refusal(capsys, *arguments)
    assert f"2 of the {len(ROWS)} images" in error
    for name in ("2/1.jpg", "4/0.jpg"):
        line = 2 + [row[0] for row in ROWS].index(name)
        assert f"{raw}/t.csv, line {line}: {name}\n" in error
    found = build(tmp_path / "out", *arguments, "--allow-partial")
    assert sum(map(len, found.values())) == len(ROWS) - 2
    assert "2 listed images are not there and were left out" in capsys.readouterr().err


def test_paths_may_lead_anywhere_unless_a_root_holds_them(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    rows = [
        f"{path},{label}"
        for path, label in (("../raw/0/0.jpg", 0), (raw / "1" / "0.jpg", 1), (f"{raw}/./2//0.jpg", 2), ("a.b", 3))
    ]
    write_lines(lists / "t.csv", ["image,label", *rows])
    write_image(lists / "a.jpg", 7)
    (lists / "a.jpg").rename(lists / "a.b")
    found = build(tmp_path / "out", "--table", lists / "t.csv")
    prefix = str(raw).lstrip("/")
    expected = {f"{prefix}/0/0.jpg", f"{prefix}/1/0.jpg", f"{prefix}/2/0.jpg", "a.b"}
    assert {info["source"] for part in found.values() for info in part} == expected
    assert "line 2: ../raw/0/0.jpg lies outside" in refusal(capsys, "--table", lists / "t.csv", "--data", lists)
    write_lines(lists / "t.csv", ["image,label", *rows[1:3]])
    found = build(tmp_path / "higher", "--table", lists / "t.csv", "--data", tmp_path)
    assert {info["source"] for part in found.values() for info in part} == {"raw/1/0.jpg", "raw/2/0.jpg"}


def test_a_split_that_shares_classes_gives_way_where_classes_are_divided(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{name},{label},{'val' if name.endswith('0.jpg') else 'train'}" for name, label, _ in ROWS]
    write_lines(raw / "t.csv", ["image,label,split", *rows])
    assert "--split-classes" in refusal(capsys, "--table", raw / "t.csv")
    found = build(tmp_path / "out", "--table", raw / "t.csv", "--split-classes", "0.6")
    assert {split: len({info["source_id"] for info in infos}) for split, infos in found.items()} == {
        "train": 3,
        "test": 2,
    }
    record = json.loads((tmp_path / "out" / "index.json").read_text())["build"]["split_classes"]
    assert record == {"train": 3, "test": 2, "by": "random", "seed": 0}


def test_query_and_gallery_share_their_classes(raw: Path, tmp_path: Path) -> None:
    parts = {0: "train", 1: "train", 2: "train"}
    rows = [
        f"{name},{label},{parts.get(label) or ('query' if name.endswith('0.jpg') else 'gallery')}"
        for name, label, _ in ROWS
    ]
    write_lines(raw / "t.csv", ["image,label,split", *rows])
    build(tmp_path / "out", "--table", raw / "t.csv")
    assert open_index(tmp_path / "out", "query").num_samples == 2
    assert open_index(tmp_path / "out", "gallery").num_samples == 3 + 4


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["image,label", "0/0.jpg,1", "1/0.jpg,"], [], "line 3: expected a label in the column 'label'"),
        (["image,label", "0/0.jpg,1", ",2"], [], "line 3: expected a path"),
        (["image,label", "0/0.jpg,1", "0/0.jpg,2"], [], "line 3 lists 0/0.jpg twice"),
        (["image,label,split", "0/0.jpg,1,train", "1/0.jpg,2,"], [], "line 3: expected a split"),
        (["image,sku", "0/0.jpg,1"], [], "expected a column label or class or class_id, found image, sku"),
        (["image,sku", "0/0.jpg,1"], ["--columns", "label=SKU"], "expected a column SKU, found image, sku"),
        (["image,label", "0/0.jpg,1"], ["--columns", "name=label"], "got 'name'"),
        (["image,label", "0/0.jpg,1"], ["--image-path", "{id}.jpg"], "line 2: --image-path '{id}.jpg' cannot"),
        (["image,label"], [], "expected rows, found none"),
        (["image,label", "0/0.jpg,1", "1/0.jpg,1"], [], "got 1 classes with images"),
    ],
)
def test_a_row_that_is_no_sample_is_named(
    lines: list[str],
    options: list[str],
    message: str,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(raw / "t.csv", lines)
    assert message in refusal(capsys, "--table", raw / "t.csv", *options)


def test_a_label_that_pandas_writes_as_missing_is_missing(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(raw / "t.jsonl", ['{"image": "0/0.jpg", "label": 1}', '{"image": "1/0.jpg", "label": NaN}'])
    assert "line 2: expected a label" in refusal(capsys, "--table", raw / "t.jsonl")
    table = pyarrow.table({"image": ["0/0.jpg", "1/0.jpg"], "label": [1.0, float("nan")]})
    parquet.write_table(table, raw / "t.parquet")
    assert "expected a label" in refusal(capsys, "--table", raw / "t.parquet")


def test_without_a_table_a_folder_needs_metadata(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected metadata.csv" in refusal(capsys, "--data", raw)
    assert "got neither" in refusal(capsys)
