"""Tables as people have them."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dist_proxygml.data.rows import Rows, plain


def rows_of(path: Path, content: str | bytes, *, has_header: bool = True) -> list[tuple[int, dict[str, object]]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(line, dict(row)) for line, row in Rows(path, has_header=has_header).read()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "image,label\na b.jpg,7\nc.jpg,08\n"),
        ("t.csv", b"\xef\xbb\xbfimage,label\r\na b.jpg,7\r\nc.jpg,08"),
        ("t.csv", 'image;"label"\n"a b.jpg";7\nc.jpg;08\n'),
        ("t.tsv", "image\tlabel\na b.jpg\t7\nc.jpg\t08\n"),
        ("t.txt", 'image label\n"a b.jpg"   7\nc.jpg 08\n'),
    ],
)
def test_text_tables_are_read_whatever_separates_their_columns(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert rows_of(tmp_path / name, content) == [
        (2, {"image": "a b.jpg", "label": "7"}),
        (3, {"image": "c.jpg", "label": "08"}),
    ]


def test_a_value_may_have_line_ends_commas_and_quotes_and_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    found = rows_of(tmp_path / "t.csv", 'image,title\n\na.jpg,"5"" pipe,\nblue"\nb.jpg,x\n')
    assert found == [(3, {"image": "a.jpg", "title": '5" pipe,\nblue'}), (5, {"image": "b.jpg", "title": "x"})]


def test_columns_without_a_header_are_numbered_from_1(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "t.txt", "a.jpg 3\nb.jpg 4\n", has_header=False) == [
        (1, {"1": "a.jpg", "2": "3"}),
        (2, {"1": "b.jpg", "2": "4"}),
    ]


def test_json_lines_keep_their_types(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"image": "a.jpg", "label": 7}\n\n{"label": null, "more": [1]}\n'
    assert rows_of(tmp_path / "t.jsonl", content) == [
        (1, {"image": "a.jpg", "label": 7}),
        (3, {"label": None, "more": [1]}),
    ]


def test_parquet_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_proxygml.data.rows._ROWS_AT_A_TIME", 2)
    table = pyarrow.table({"image": ["a", "b", "c"], "label": [1, 2, None]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert list(Rows(tmp_path / "t.parquet").read()) == [
        (1, {"image": "a", "label": 1}),
        (2, {"image": "b", "label": 2}),
        (3, {"image": "c", "label": None}),
    ]


def test_cocos_json_is_joined_by_ids(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 3}, {"id": 6, "file_name": "b.jpg"}],
        "annotations": [{"id": 1, "image_id": 6, "category_id": 9}, {"id": 2, "image_id": 5, "category_id": 8}],
        "categories": [{"id": 8, "name": "owl"}, {"id": 9, "name": "elk"}],
    }
    assert rows_of(tmp_path / "t.json", json.dumps(document)) == [
        (1, {"id": 6, "file_name": "b.jpg", "label": 9, "class_name": "elk"}),
        (2, {"id": 5, "file_name": "a.jpg", "width": 3, "label": 8, "class_name": "owl"}),
    ]


def test_values_that_json_has_not_become_texts() -> None:
    value = {"a": [1.5, float("nan")], "b": b"x", 3: pyarrow.scalar(0, pyarrow.date32()).as_py()}
    assert plain(value) == {"a": [1.5, None], "b": None, "3": "1970-01-01"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,label\na,1\nb,1,2\n", r"t\.csv, line 3: expected 2 columns \(image, label\), got 3"),
        ("t.csv", 'image,label\na,"1\nb,2\n', r"t\.csv, line 3: .*correct the quotes"),
        ("t.csv", "image,label,label\n", "two columns called 'label'"),
        ("t.csv", "image,label\ncaf\xe9,1\n".encode("latin-1"), "not a text file in UTF-8"),
        ("t.jsonl", '{"a": 1}\n[1]\n', r"t\.jsonl, line 2: expected an object"),
        ("t.jsonl", '{"a": 1}\n{"a"\n', r"t\.jsonl, line 2: no JSON"),
        ("t.parquet", "PAR1 no", "not a readable Parquet file"),
        ("t.json", "{}", "expected COCO's JSON .*, got one without 'images'"),
        ("t.json", '{"images": [], "annotations": 3}', "expected COCO's JSON"),
        (
            "t.json",
            '{"images": [], "annotations": [{"image_id": 1, "category_id": 2}]}',
            "annotation 1: .* image_id 1;",
        ),
        (
            "t.json",
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
            "annotation 1: .* and category_id, got",
        ),
        (
            "t.json",
            '{"images": [{"id": 1}], "annotations": [{"image_id": [1], "category_id": 2}]}',
            "annotation 1: .* and category_id, got",
        ),
        (
            "t.json",
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "category_id": 2}], '
            '"categories": [{"id": 3, "name": "owl"}]}',
            "annotation 1: expected an id of categories, got category_id 2;",
        ),
        ("t.xlsx", "PK", r"expected a table \(\.csv"),
    ],
)
def test_what_is_no_table_is_named_with_its_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / name, content)
