"""The command that searches: what it prints and draws, and whom it refuses."""

import builtins
import csv
import hashlib
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_proxygml import Embedder, Index
from dist_proxygml.data import remote
from dist_proxygml.data.sources import FolderSource
from dist_proxygml.embed import main as embed_main
from dist_proxygml.evaluation.verification import Histogram
from dist_proxygml.index import main as index_main
from dist_proxygml.inference import search
from dist_proxygml.inference.score_table import ScoreTable, describe_scores
from dist_proxygml.inference.search_page import Row, Tile, write_page
from dist_proxygml.search import main
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import write_finished_run


class Place:
    """A run, a folder of images, and its index."""

    def __init__(self, root: Path) -> None:
        generator = np.random.default_rng(0)
        self.photos, self.index = root / "photos", root / "index"
        self.photos.mkdir()
        for number in range(12):
            image = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            image.save(self.photos / f"{number:02d}.png")
        self.run = write_finished_run(root / "runs")
        embed_main(["--run", str(self.run), "--data", str(self.photos), "--out", str(root / "e")])
        assert index_main(["--embeddings", str(root / "e"), "--out", str(self.index)]) == 0

    def path(self, number: int) -> Path:
        return self.photos / f"{number:02d}.png"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def searched(place: Place, *arguments: object) -> int:
    return main(["--index", str(place.index), *map(str, arguments)])


def told(capsys: pytest.CaptureFixture[str], place: Place, *arguments: object) -> str:
    capsys.readouterr()
    assert searched(place, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.rpartition("error: ")[2]


def test_a_table_names_the_nearest_first(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert searched(place, place.path(3), place.path(7), "-k", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = Index.load(place.index).search(Embedder.from_run(place.run).embed([place.path(3), place.path(7)]), 3)
    blocks = []
    for number, scores, ids in zip((3, 7), expected.scores.tolist(), expected.ids, strict=True):
        blocks.append(str(place.path(number)))
        blocks += [f"   {rank}  {scores[rank - 1]:8.5f}  {ids[rank - 1]}" for rank in (1, 2, 3)]
    assert lines == blocks
    assert lines[1] == "   1   1.00000  03.png"
    assert lines[5] == "   1   1.00000  07.png"


def test_json_has_what_the_table_has(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert searched(place, place.photos, "-k", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == {"run": "small", "step": 30}
    assert [query["query"] for query in found["queries"]] == [str(place.path(number)) for number in range(12)]
    for number, query in enumerate(found["queries"]):
        first, second = query["matches"]
        assert (first["rank"], first["id"], second["rank"]) == (1, f"{number:02d}.png", 2)
        assert first["score"] == pytest.approx(1, abs=1e-6)
        assert second["score"] < first["score"]


def test_a_query_of_the_index_is_left_out_by_its_pixels_and_so_are_copies(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ordinary = Index.load(place.index).search(Embedder.from_run(place.run).embed([place.path(3), place.path(7)]), 4)
    shutil.copy(place.path(3), tmp_path / "copy.png")
    Image.open(place.path(7)).save(tmp_path / "other.bmp")  # the same pixels in another file
    capsys.readouterr()
    assert searched(place, tmp_path / "copy.png", tmp_path / "other.bmp", "-k", 3, "--exclude-self") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines if len(line) == 3] == ordinary.ids[0][1:] + ordinary.ids[1][1:]
    # More copies than a first search finds, and an index of nothing else.
    for number in (0, 1, 2, 4, 5, 6, 8, 9, 10):
        shutil.copy(place.path(3), place.path(number))
    embed_main(["--run", str(place.run), "--data", str(place.photos), "--out", str(tmp_path / "e2")])
    assert index_main(["--embeddings", str(tmp_path / "e2"), "--out", str(tmp_path / "i2")]) == 0
    place.index = tmp_path / "i2"
    capsys.readouterr()
    assert searched(place, place.path(3), "-k", 2, "--exclude-self") == 0
    assert {line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]} == {"07.png", "11.png"}
    for number in (7, 11):
        shutil.copy(place.path(3), place.path(number))
    arguments = ["--run", str(place.run), "--data", str(place.photos), "--out", str(tmp_path / "e3")]
    embed_main(arguments)
    assert index_main(["--embeddings", str(tmp_path / "e3"), "--out", str(place.index), "--overwrite"]) == 0
    capsys.readouterr()
    assert searched(place, place.path(3), "--exclude-self", "--html", tmp_path / "found.html") == 0
    assert capsys.readouterr().out == f"{place.path(3)}: the index holds nothing else\n"


def test_without_the_images_of_the_index_a_query_cannot_be_told_from_itself(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = shutil.copy(place.path(3), tmp_path / "query.png")
    moved = place.photos.rename(tmp_path / "moved")
    assert str(place.photos) in told(capsys, place, query, "--exclude-self")
    assert searched(place, query, "--exclude-self", "--data", moved) == 0
    (moved / "03.png").unlink()
    error = told(capsys, place, query, "--exclude-self", "--data", moved)
    assert "03.png" in error
    assert "--exclude-self" in error


def test_answers_to_a_folder_of_queries_go_to_a_file(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, lines = tmp_path / "new" / "answers.csv", tmp_path / "answers.jsonl"
    capsys.readouterr()
    assert searched(place, place.photos, "-k", 2, "--out", rows) == 0
    assert capsys.readouterr().out == f"answers to 12 of 12 queries, written to {rows}\n"
    table = list(csv.DictReader(rows.open(newline="")))
    assert len(table) == 24
    assert [row["id"] for row in table if row["rank"] == "1"] == [f"{number:02d}.png" for number in range(12)]
    assert (table[0]["query"], table[0]["score"], table[0]["label"]) == (str(place.path(0)), "1.00000", "")
    assert searched(place, place.path(5), place.path(6), "--min-score", 1, "--exclude-self", "--out", lines) == 0
    assert [json.loads(line) for line in lines.read_text().splitlines()] == [
        {"query": str(place.path(number)), "matches": []} for number in (5, 6)
    ]
    assert "--overwrite" in told(capsys, place, place.path(0), "--out", rows)
    assert searched(place, place.path(5), "--min-score", 1, "--exclude-self", "--out", rows, "--overwrite") == 0
    assert list(csv.reader(rows.open(newline="")))[1:] == [[str(place.path(5)), "", "", "", "", ""]]
    assert "answers.csv" in told(capsys, place, place.path(0), "--out", tmp_path / "answers.txt")


def test_many_queries_are_spread_over_pages_that_link_each_other(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "_QUERIES_OF_A_PAGE", 5)
    assert searched(place, place.photos, "-k", 1, "--html", tmp_path / "found here.html") == 0
    assert "found here.html and 2 more" in capsys.readouterr().err
    names = ["found here.html", "found here-2.html", "found here-3.html"]
    for name, num_queries in zip(names, (5, 5, 2), strict=True):
        page = Page(tmp_path / name)
        links = [attributes for tag, attributes in page.tags if tag == "a"]
        assert [link["href"] for link in links] == [name.replace(" ", "%20") for name in names]
        assert [names[place] for place, link in enumerate(links) if "aria-current" in link] == [name]
        assert len(page.images()) == 2 * num_queries


def test_what_a_user_named_is_text_on_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> \"'&amp;"
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    found = [Tile(hostile, pixels, 0.5, hostile), Tile("gone.png", None, 0.25)]
    rows = [Row(Tile(hostile, pixels), found, ""), Row(Tile("other", pixels), [], hostile)]
    write_page(tmp_path / "page.html", rows, title=hostile, lead=hostile, makers=hostile)
    page = Page(tmp_path / "page.html")
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(hostile) == 2 + 3 + 1 + 2  # title and heading, names, nothing found, lead and makers
    assert [image["alt"] for image in page.images()] == [hostile, f"{hostile}: {hostile}", "other"]
    assert "not at hand" in page.text


def test_nothing_found_is_said_with_the_nearest(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = place.photos.parent / "stranger.png"
    Image.new("RGB", (9, 9), (250, 30, 200)).save(stranger)
    result = Index.load(place.index).search(Embedder.from_run(place.run).embed(stranger), 2)
    between = float(result.scores[0].mean())
    capsys.readouterr()
    assert searched(place, stranger, "--min-score", 1, "--html", stranger.with_suffix(".html")) == 0
    name, score = result.ids[0][0], result.scores[0, 0]
    sentence = f"{stranger}: nothing with a score of 1.0 or more; the nearest is {name} with {score:.5f}"
    assert capsys.readouterr().out == f"{sentence}\n"
    assert sentence in Page(stranger.with_suffix(".html")).text
    assert searched(place, stranger, "--min-score", between) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # the query, and the one above
    for no_page in (place.photos, place.path(0)):
        before = place.path(0).read_bytes()
        assert searched(place, stranger, "--html", no_page) == 2
        assert f"got {no_page}; name a file like found.html" in capsys.readouterr().err
        assert place.path(0).read_bytes() == before
    assert searched(place, stranger, "--min-score", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["matches"] == []


def test_a_name_takes_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    query = place.photos.parent / "one\ntwo\x1b[31m.png"
    shutil.copy(place.path(0), query)
    capsys.readouterr()
    assert searched(place, query, "-k", 2) == 0
    first, *matches = capsys.readouterr().out.splitlines()
    assert first.endswith(r"one\ntwo\x1b[31m.png")
    assert len(matches) == 2


@pytest.mark.parametrize("score", ["nan", "5", "-1.5", "much"])
def test_a_score_that_no_image_can_have_is_refused(
    place: Place, score: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        searched(place, place.path(0), f"--min-score={score}")
    assert f"expected a number from -1 to 1, got '{score}'" in capsys.readouterr().err


def test_a_page_stands_alone(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = tmp_path / 'a"<b>&.png'
    shutil.copy(place.path(5), query)
    page = tmp_path / "a folder of pages" / "found.html"
    place.path(2).unlink()
    assert searched(place, query, place.path(0), "-k", 12, "--html", page) == 0
    assert "02.png: the file cannot be read: No such file" in capsys.readouterr().err
    parsed = Page(page)
    images = parsed.images()
    assert len(images) == 2 + 2 * 11
    assert all((image["src"] or "").startswith("data:image/") for image in images)
    assert images[0]["alt"] == 'a"<b>&.png'
    assert images[1]["alt"] == "05.png"
    assert parsed.text.count("not at hand") == 2
    assert "Searched among 12 images, embedded by small, step 30." in parsed.text
    text = page.read_text()
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe"}
    assert "http:" not in text
    assert "https:" not in text


def test_a_page_finds_the_images_of_shards_and_names_their_makers(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "noise"
    index = write_noise_shards(root, [4, 9])
    (root / "ATTRIBUTION.md").write_text("drawn by <nobody>")
    arguments = ["--run", str(place.run), "--data", str(root), "--out", str(tmp_path / "shards_e")]
    embed_main(arguments)
    assert index_main(["--embeddings", str(tmp_path / "shards_e"), "--out", str(tmp_path / "shards_i")]) == 0
    place.index = tmp_path / "shards_i"
    assert searched(place, place.path(0), "-k", 3, "--html", tmp_path / "found.html") == 0
    assert "  pattern " in capsys.readouterr().out
    page = Page(tmp_path / "found.html")
    assert len(page.images()) == 1 + 3
    assert "drawn by <nobody>" in page.text
    # Where they are not any more.
    moved = index.root.rename(tmp_path / "moved")
    assert searched(place, place.path(0), "-k", 3, "--html", tmp_path / "found.html") == 0
    assert "the page will lack the images that were found" in capsys.readouterr().err
    assert len(Page(tmp_path / "found.html").images()) == 1
    assert searched(place, place.path(0), "-k", 3, "--html", tmp_path / "found.html", "--data", moved) == 0
    assert len(Page(tmp_path / "found.html").images()) == 1 + 3


def rewrite_manifest(folder: Path, **entries: object) -> None:
    """Change what a manifest says of model and data, as whoever passes the folder on may."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {name: manifest[name] | entry for name, entry in entries.items()}))


def replace_ids(folder: Path, ids: list[str]) -> None:
    """Give the rows other names, and mend the manifest."""
    content = "".join(json.dumps({"id": name}) + "\n" for name in ids).encode()
    (folder / "ids.jsonl").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["ids.jsonl"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("is_embeddings", [False, True])
def test_no_command_runs_that_an_index_or_embeddings_name(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_embeddings: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.0)
    command = f"pipe:touch {tmp_path}/pwned #{{}}"
    if is_embeddings:
        rewrite_manifest(tmp_path / "e", data={"location": command})
        arguments = ["--embeddings", str(tmp_path / "e"), "--out", str(place.index), "--overwrite"]
        assert index_main(arguments) == 0
    else:
        rewrite_manifest(place.index, data={"location": command})
    assert searched(place, place.path(0), "-k", 2, "--html", tmp_path / "found.html") == 0
    told = capsys.readouterr().err
    assert f"expected a location that runs no command, got '{command}' out of a file; if you trust it, type it" in told
    assert len(Page(tmp_path / "found.html").images()) == 1
    assert not (tmp_path / "pwned").exists()
    searched(place, place.path(0), "--html", tmp_path / "found.html", "--data", command)
    assert (tmp_path / "pwned").exists()  # typed, it runs


def test_a_page_shows_no_file_outside_the_folder_of_its_images(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = place.path(0)
    shutil.copy(inside, tmp_path / "secret.png")
    shutil.copy(inside, place.photos / "secret")
    (place.photos / "link.png").symlink_to(inside)
    os.mkfifo(place.photos / "fifo.png")
    ids = ["../secret.png", str(tmp_path / "secret.png"), "secret", "fifo.png", "01.png/../../secret.png"]
    replace_ids(place.index, [*ids, "link.png", *[f"{number:02d}.png" for number in range(6)]])
    before = FolderSource.of_folder
    monkeypatch.setattr(FolderSource, "of_folder", lambda root: pytest.fail(f"walked through {root}"))
    assert searched(place, inside, "-k", 12, "--html", tmp_path / "found.html") == 0
    assert len(Page(tmp_path / "found.html").images()) == 1 + 7
    told = capsys.readouterr().err
    for name in ids:
        assert f"not at hand: expected an image file below {place.photos}, got {name!r}" in told
    monkeypatch.setattr(FolderSource, "of_folder", before)


def test_nothing_that_an_index_says_steers_the_terminal(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clear, title = "\x1b[2J", "\x9d0;owned\x9c"
    replace_ids(place.index, [f"{clear}{title}{number}.png" for number in range(12)])
    rewrite_manifest(place.index, model={"run": f"run{clear}"}, data={"location": f"/nowhere/{clear}"})
    assert searched(place, place.path(0), "--html", tmp_path / "found.html") == 0
    captured = capsys.readouterr()
    assert "\\x1b[2J\\x9d0;owned\\x9c" in captured.out
    assert searched(place, place.path(0), "--json") == 0
    as_json = capsys.readouterr().out
    assert json.loads(as_json)["queries"][0]["matches"][0]["id"].startswith(clear + title)
    place.run.rename(tmp_path / "away")
    assert searched(place, place.path(0)) == 2
    for text in (captured.out, captured.err, as_json, capsys.readouterr().err):
        assert not {"\x1b", "\x9d", "\x9c"} & set(text)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"data": {"location": ["a"]}}, "data.location is ['a']"),
        ({"data": {"split": 1}}, "data.split is 1"),
        ({"model": {"path": {}}}, "model.path is {}"),
        ({"model": {"step": "x"}}, "model.step is 'x'"),
        ({"index": {"kind": "pq"}}, "index is {'kind': 'pq'}"),
    ],
)
def test_a_manifest_of_other_types_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str], entry: dict[str, object], found: str
) -> None:
    rewrite_manifest(place.index, **entry)
    assert told(capsys, place, place.path(0)).startswith(f"{place.index} is damaged: {found}; build it")


@pytest.mark.parametrize("name", ["path", "run", "step"])
def test_an_index_that_says_half_of_its_model_asks_for_one(
    place: Place, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    rewrite_manifest(place.index, model={name: None})
    assert "does not say which model it was made with; name it with --run" in told(capsys, place, place.path(0))
    assert searched(place, place.path(0), "--run", place.run) == 0


def test_a_page_is_written_wherever_an_index_says_its_images_lie_and_quotes_no_file_behind_a_link(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("my key")
    (place.photos / "ATTRIBUTION.md").symlink_to(tmp_path / "secret")
    for location in ("a" * 5000, "a\0b", str(place.photos)):
        rewrite_manifest(place.index, data={"location": location})
        assert searched(place, place.path(0), "--html", tmp_path / "found.html") == 0
        assert "my key" not in (tmp_path / "found.html").read_text()
        (tmp_path / "found.html").unlink()


def test_only_the_model_of_the_index_may_search(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_finished_run(tmp_path / "others", "other", seed=1)
    error = told(capsys, place, place.path(0), "--run", other)
    assert error == (
        f"{place.index} was made with small, step 30, but {other}/checkpoints/step-000030 (other, step 30) has other "
        "weights: their scores do not compare; name the right model with --run, or embed and index the images again\n"
    )
    moved = place.run.rename(tmp_path / "moved")
    error = told(capsys, place, place.path(0))
    assert error.startswith(f"the model of {place.index} (small, step 30) cannot be opened where it was: expected")
    assert "with --run" in error
    assert searched(place, place.path(0), "--run", moved) == 0  # the same weights, elsewhere
    capsys.readouterr()
    # A run that went on: the step of the index is taken, not the newest.
    newest = moved / "checkpoints" / "step-000060"
    shutil.copytree(other / "checkpoints" / "step-000030", newest)
    assert searched(place, place.path(0), "--run", moved) == 0


def test_an_index_without_a_model_asks_for_one(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [place.path(number) for number in range(12)]
    rows = Embedder.from_run(place.run).embed(paths)
    Index.build(rows, [path.name for path in paths]).save(place.index, overwrite=True)
    assert "does not say which model it was made with; name it with --run" in told(capsys, place, place.path(0))
    assert searched(place, place.path(4), "-k", 1, "--run", place.run) == 0
    assert capsys.readouterr().out.splitlines()[1] == "   1   1.00000  04.png"
    wide = np.eye(5, dtype=np.float32)
    Index.build(wide, list("abcde")).save(place.index, overwrite=True)
    error = told(capsys, place, place.path(0), "--run", place.run)
    assert f"holds embeddings of dimension 5, the model in {place.run} makes those of dimension 4" in error


def test_queries_that_cannot_be_read_are_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, place, "nowhere.png") == (
        "expected an image or a folder at nowhere.png, found nothing; correct the path\n"
    )
    place.path(1).write_bytes(b"GIF89a and then nothing")
    assert told(capsys, place, place.photos).startswith(f"{place.path(1)}: the image does not decode")
    assert searched(place, place.photos, "-k", 1, "--on-bad", "skip") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2 * 11
    assert f"skipped: {place.path(1)}: the image does not decode" in captured.err
    assert "none of the 1 images can be used" in told(capsys, place, place.path(1), "--on-bad", "skip")
    with pytest.raises(SystemExit):
        searched(place, place.path(0), "-k", "0")


def test_a_damaged_index_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.index / "index.faiss"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert searched(place, place.path(0)) == 0  # every byte is compared only if that is wanted
    capsys.readouterr()
    assert f"{place.index} is damaged: index.faiss has sha256" in told(capsys, place, place.path(0), "--verify")
    path.write_bytes(content[:-1])
    assert f"{place.index} is damaged: index.faiss has" in told(capsys, place, place.path(0))
    shutil.rmtree(place.index)
    assert "found no such folder; build it with" in told(capsys, place, place.path(0))


def test_the_page_is_there_before_anything_is_printed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "found.html"
    monkeypatch.setattr(builtins, "print", lambda *_, **__: order.append(page.exists()))
    order: list[bool] = []
    assert searched(place, place.path(0), "--html", page) == 0
    assert order
    assert all(order)


# ---- scores that mean something --------------------------------------------------------------------------------------


@pytest.fixture
def labelled(place: Place, tmp_path: Path) -> Place:
    """A place with an index of labelled images."""
    root = tmp_path / "shards"
    write_noise_shards(root, [4, 9, 7])
    embed_main(["--run", str(place.run), "--data", str(root), "--out", str(tmp_path / "labelled_e")])
    place.index = tmp_path / "labelled_i"
    assert index_main(["--embeddings", str(tmp_path / "labelled_e"), "--out", str(place.index)]) == 0
    return place


def test_an_index_of_labelled_images_says_what_scores_to_choose_and_one_without_labels_why_not(
    labelled: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    again = ["--embeddings", str(tmp_path / "labelled_e"), "--out", str(labelled.index), "--overwrite"]
    assert index_main(again) == 0
    out = capsys.readouterr().out
    assert f"scores, measured on {tmp_path / 'labelled_e'}: 20 of 20 rows asked for their 10 nearest" in out
    scores = Index.load(labelled.index).scores
    assert scores is not None
    assert describe_scores(scores) in out
    assert index_main(["--embeddings", str(tmp_path / "e"), "--out", str(tmp_path / "unlabelled")]) == 0
    assert "scores: not measured, 12 of 12 rows have no class label" in capsys.readouterr().out
    assert Index.load(tmp_path / "unlabelled").scores is None


def test_scores_are_measured_on_other_images_of_the_same_model(
    labelled: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, held_out = str(tmp_path / "e"), str(tmp_path / "labelled_e")
    arguments = ["--embeddings", photos, "--out", str(tmp_path / "other"), "--scores-from"]
    assert index_main([*arguments, held_out]) == 0
    index = Index.load(tmp_path / "other")
    assert (len(index), index.scores) == (12, Index.load(labelled.index).scores)
    capsys.readouterr()
    assert index_main([*arguments, photos, "--overwrite"]) == 2
    assert "12 of 12 rows have no class label" in capsys.readouterr().err
    other_run = write_finished_run(tmp_path / "other_runs", seed=1)
    embed_main(["--run", str(other_run), "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "oe")])
    assert index_main([*arguments, str(tmp_path / "oe"), "--overwrite"]) == 2
    assert "expected embeddings by one model" in capsys.readouterr().err


def test_a_precision_is_looked_up_and_what_is_doubtful_is_said(
    labelled: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = Index.load(labelled.index).scores
    assert scores is not None
    wanted = scores.best.precision * 0.9
    found = scores.lowest_for(wanted)
    assert found is not None
    capsys.readouterr()
    assert searched(labelled, labelled.photos, "-k", 20, "--precision", wanted) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    shown = [float(line.split()[1]) for line in lines if line.startswith("   ")]
    assert all(score >= found.score - 1e-5 for score in shown)
    assert 0 < len(shown) < 20 * 12
    assert last.startswith(
        f"Answers below {found.score:.4f} are doubtful: from there on {found.precision:.1%} were right"
    )
    assert str(tmp_path / "labelled_e") in last
    at = scores.at(0.5)
    assert at is not None
    assert searched(labelled, labelled.path(3), "--min-score", 0.5) == 0
    assert f"; from 0.5 on {at.precision:.1%} were right" in capsys.readouterr().out
    assert (
        searched(labelled, labelled.path(3), "-k", 20, "--json", "--html", tmp_path / "a.html", "--precision", wanted)
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert (document["doubtful_below"], document["precision"]) == (found.score, wanted)
    page = Page(tmp_path / "a.html")
    assert f"Answers below {found.score:.4f} are doubtful" in page.text
    assert "doubtful\n" not in page.text  # they are left out


def test_a_page_marks_doubtful_answers_where_they_are_not_left_out(labelled: Place, tmp_path: Path) -> None:
    assert searched(labelled, labelled.path(3), "-k", 20, "--html", tmp_path / "a.html") == 0
    below = search.doubt_about(Index.load(labelled.index)).below  # type: ignore[union-attr]
    found = Index.load(labelled.index).search(Embedder.from_run(labelled.run).embed(labelled.path(3)), 20)
    assert Page(tmp_path / "a.html").text.count(" doubtful") - 1 == int((found.scores < below).sum())  # and the lead


def test_a_precision_that_cannot_be_had_is_refused_with_what_helps(
    labelled: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = Index.load(labelled.index).scores
    assert scores is not None
    if scores.best.precision < 1:
        message = told(capsys, labelled, labelled.path(3), "--precision", 1)
        assert f"the most is {scores.best.precision:.4f}" in message
    labelled.index = tmp_path / "index"  # of images without labels
    message = told(capsys, labelled, labelled.path(3), "--precision", 0.9)
    assert "--precision" in message
    assert "--scores-from" in message
    with pytest.raises(SystemExit):
        searched(labelled, labelled.path(3), "--precision", 0.9, "--min-score", 0.5)


def test_a_score_that_is_never_good_enough_makes_all_answers_doubtful() -> None:
    table = ScoreTable("test", 2, 2, 2, 5000, [1], [3], Histogram(0, [1], [1]))
    index = Index.build(np.eye(2, dtype=np.float32), ["a", "b"])
    assert search.doubt_about(index) is None
    index.scores = table
    doubt = search.doubt_about(index)
    assert doubt is not None
    assert doubt.below > 1
    assert doubt.sentence.startswith("All answers are doubtful: 25.0% were right at best, from 0.5000 on")
    with pytest.raises(ValueError, match=r"--precision .* got 0.5; the most is 0.2500"):
        search.score_for(index, Path("i"), 0.5)
