"""The page of a run: what is on it, what is never on it, and what stands there while parts of the run are missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.evaluation.charts import Series, line_chart
from dist_proxygml.evaluation.embed import EmbeddingTable, save_table
from dist_proxygml.evaluation.evaluator import evaluate
from dist_proxygml.evaluation.report import _thumbnail_data, format_metrics, format_table, read_run, write_report
from dist_proxygml.parallel import single_process
from dist_proxygml.report import main
from tests.shards_of_noise import SIDE, Projection, write_noise_shards

CLASS_SIZES = [1, 9, 3, 1, 2, 5, 3, 13]
VOID = {"meta", "img", "link", "br", "line", "circle", "polyline", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.tags
            if name == tag and kind in ["", *(attributes.get("class") or "").split()]
        ]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("noise"), CLASS_SIZES)


@pytest.fixture
def run(tmp_path: Path, index: ShardIndex) -> Path:
    """A finished run as training leaves it: three evaluations, the newest embeddings, logged steps."""
    directory = tmp_path / "my run"
    (directory / "evaluation").mkdir(parents=True)
    transform = build_transform(ResizeConfig(name="resize", size=SIDE))
    for name, width in (("pixels", 2), ("step-000000", 3), ("step-000020", 8)):
        result = evaluate(
            Projection(width),
            index,
            transform,
            context=single_process(),
            recall_at=(1, 2, 10),
            kmeans_seeds=2,
        )
        (directory / "evaluation" / f"{name}.json").write_text(result.to_json())
    assert result.table is not None
    save_table(result.table, directory / "embeddings" / "step-000020.npz")
    data = {"shards": str(index.root), "train_split": "train", "test_split": "test"}
    (directory / "config.json").write_text(json.dumps({"name": "Fish & <chips>", "data": data}))
    lines = [
        {"kind": "train", "step": step, "loss": loss, "classification": loss - 1}
        | {"regularization": 1.0, "lr_backbone": 1e-3, "lr_proxies": 1e-2}
        for step, loss in ((5, 4.0), (10, 3.5), (15, 9.0), (10, 3.0), (15, 2.0), (20, 1.5))
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "train", "st'
    (directory / "metrics.jsonl").write_text(text)
    return directory


def test_the_page_opens_with_the_name_and_the_three_rows_of_results(run: Path, index: ShardIndex) -> None:
    page = Page(write_report(run, index).read_text())
    text = " ".join(page.text.split())
    assert "Fish & <chips>" in text
    order = [text.index(name) for name in ("Raw pixels", "Before training", "After training")]
    assert order == sorted(order)
    after = read_run(run).rows["after training"].metrics
    numbers = "".join(rf" {100 * after[f'recall@{k}']:.1f}" for k in (1, 2, 10))
    assert f"After training{numbers} {100 * after['map@r']:.1f} {100 * after['nmi']:.1f}" in text
    assert "After 20 training steps, every one of 37 images of 8 classes" in text
    assert "2 images have no other of their class" in text


def test_the_gallery_frames_right_and_wrong_neighbours_in_the_order_of_the_metrics(
    run: Path, index: ShardIndex
) -> None:
    page = Page(write_report(run, index).read_text())
    right, wrong = page.all("figure", "right"), page.all("figure", "wrong")
    assert (len(right) + len(wrong)) % 8 == 0
    assert len(right) > 10 < len(wrong)
    assert page.text.count("✓") == len(right) + 1  # and once where it is explained
    assert page.text.count("✗") == len(wrong) + 1

    # The first worst query, from a full sort.
    table = read_run(run).table
    assert table is not None
    scores = (table.embeddings @ table.embeddings.T).fill_diagonal_(-torch.inf)
    same = table.labels[:, None] == table.labels[None, :]
    ranked = np.take_along_axis(same.numpy(), np.argsort(-scores.numpy(), axis=1, kind="stable"), axis=1)[:, :-1]
    first = np.where(ranked.any(axis=1), ranked.argmax(axis=1) + 1, 0)
    assert first.max() > 8
    worst_text = page.text[page.text.index("Where it fails") :]
    assert re.search(r"at (\d+)", worst_text)[1] == str(first.max())  # type: ignore[index]
    worst_name = index.classes[int(table.labels[int(first.argmax())])].name
    assert worst_text.index(worst_name) < worst_text.index(f"at {first.max()}")


def test_the_pictures_are_those_of_the_images_that_were_not_left_out(run: Path, index: ShardIndex) -> None:
    """Without the first image, every row of the table is one before its place in the index."""
    table = read_run(run).table
    assert table is not None
    save_table(EmbeddingTable(*(part[1:] for part in table)), run / "embeddings" / "step-000020.npz")
    page = Page(write_report(run, index).read_text())
    images = ShardImages(index, build_transform(ResizeConfig(name="resize", size=SIDE)))
    pictures = {_thumbnail_data(images, image_id): index.labels[image_id] for image_id in range(index.num_samples)}
    shown = [(pictures[image["src"]], image["alt"]) for image in page.all("img") if image["src"] in pictures]
    named = [(label, alt) for label, alt in shown if "pattern " in (alt or "")]
    assert len(named) > 30
    assert all(re.search(rf"pattern {label}\b", alt) for label, alt in named)

    save_table(EmbeddingTable(*(part[:-1] for part in table)), run / "embeddings" / "step-000020.npz")
    assert "not the ones that the run was evaluated on" not in write_report(run, index).read_text()
    shuffled = EmbeddingTable(table.embeddings, table.labels.flip(0), table.ids)
    save_table(shuffled, run / "embeddings" / "step-000020.npz")
    assert "not the ones that the run was evaluated on" in write_report(run, index).read_text()


def test_every_image_is_inside_the_page_and_has_words_for_those_who_do_not_see_it(run: Path, index: ShardIndex) -> None:
    path = write_report(run, index)
    html = path.read_text()
    page = Page(html)
    images = page.all("img")
    assert len(images) > 90
    assert all((image["src"] or "").startswith("data:image/") for image in images)
    assert all(image["alt"] for image in images)
    assert all(chart["aria-label"] for chart in page.all("svg"))
    assert "http" not in html.replace("http-equiv", "")
    assert not page.all("script") + page.all("link") + page.all("iframe")
    assert "prefers-color-scheme: dark" in html
    assert path.stat().st_size < 10_000_000


def test_names_are_escaped(run: Path, index: ShardIndex) -> None:
    html = write_report(run, index).read_text()
    assert "<&>" not in html
    assert "pattern 1 &lt;&amp;&gt;" in html
    assert "<chips>" not in html


def test_a_step_logged_again_after_a_crash_counts_once(run: Path) -> None:
    logged = [(line["step"], line["loss"]) for line in read_run(run).training]
    assert logged == [(5, 4.0), (10, 3.0), (15, 2.0), (20, 1.5)]


def test_confused_classes_are_counted_in_both_directions(run: Path, index: ShardIndex) -> None:
    table = read_run(run).table
    assert table is not None
    nearest = (table.embeddings @ table.embeddings.T).fill_diagonal_(-torch.inf).argmax(dim=1)
    pairs: dict[tuple[int, int], int] = {}
    for query, answer in zip(table.labels.tolist(), table.labels[nearest].tolist(), strict=True):
        if CLASS_SIZES[query] > 1 and query != answer:
            pair = (min(query, answer), max(query, answer))
            pairs[pair] = pairs.get(pair, 0) + 1
    most = max(pairs.values())
    text = Page(write_report(run, index).read_text()).text
    assert re.search(r"(\d+) of (\d+) queries find", text)[1] == str(most)  # type: ignore[index]


def test_parts_that_are_missing_become_sentences(tmp_path: Path, run: Path, index: ShardIndex) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = Page(write_report(empty, index).read_text()).text
    assert "has not been evaluated yet" in text
    assert "No embeddings are stored" in text
    assert "No training steps have been logged" in text
    assert format_table(empty) == f"{empty} has no evaluation yet"

    assert "not at hand" in Page(write_report(run, None).read_text()).text
    other = write_noise_shards(tmp_path / "other", [4, 4])
    assert "not the ones" in Page(write_report(run, other).read_text()).text
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path / "nothing", index)


def test_a_damaged_image_costs_the_gallery_and_not_the_page(tmp_path: Path, run: Path) -> None:
    index = write_noise_shards(tmp_path / "damaged", CLASS_SIZES)
    for shard in index.shard_paths:
        content = bytearray(shard.read_bytes())
        for row in index.samples:
            content[int(row["offset"]) + 30] ^= 255
        shard.write_bytes(content)
    text = Page(write_report(run, index).read_text()).text
    assert "The images cannot be shown" in text
    assert "After training" in text


def test_the_terminal_table_lines_up_and_marks_what_a_row_lacks(run: Path) -> None:
    table = format_metrics(
        {
            "raw pixels": {"recall@1": 0.3534, "recall@10": 1.0, "map@r": 0.2, "r_precision": 0.5},
            "after training": {"recall@1": 0.61237, "recall@10": 0.9, "map@r": 0.4, "nmi": 0.85},
        }
    )
    assert table.splitlines() == [
        "percent          Recall@1  Recall@10      MAP@R        NMI",
        "raw pixels          35.34     100.00      20.00          -",
        "after training      61.24      90.00      40.00      85.00",
    ]
    assert [line.split("  ")[0] for line in format_table(run).splitlines()] == [
        "percent",
        "raw pixels",
        "before training",
        "after training",
    ]


def test_a_chart_puts_its_points_where_its_axes_say() -> None:
    chart = line_chart("Loss", [Series("total", [(0, 0.0), (10, 5.0)])], x_label="steps")
    assert re.findall(r'points="([^"]+)"', chart) == ["52.0,224.0 510.0,10.0"]
    assert 'aria-label="Loss: total ends at 5"' in chart
    assert line_chart("Loss", [Series("total", [])], x_label="steps") == ""
    nothing = [Series("total", [(0, float("nan"))])]
    assert line_chart("Loss", nothing, x_label="steps") == ""


def test_a_long_series_is_averaged_into_a_few_hundred_points() -> None:
    points = [(step, float(step % 2)) for step in range(100_000)]
    chart = line_chart("Loss", [Series("total", points)], x_label="steps")
    assert len(chart) < 20_000
    heights = {point.split(",")[1] for point in re.findall(r'points="([^"]+)"', chart)[0].split()}
    assert len(heights) == 1  # every average of zeros and ones is one half


def test_a_logarithmic_chart_leaves_out_what_falls_to_zero() -> None:
    series = [Series("backbone", [(0, 1e-3), (1, 1e-4), (2, 1e-12), (3, 0.0)])]
    chart = line_chart("Rate", series, x_label="steps", logarithmic=True)
    assert len(re.findall(r'points="([^"]+)"', chart)[0].split()) == 2


def test_equal_lines_are_drawn_once_under_both_names() -> None:
    points = [(0, 1.0), (1, 2.0)]
    chart = line_chart("Rate", [Series("one", points), Series("two", points)], x_label="steps")
    assert chart.count("<polyline") == 1
    assert "one, two" in chart


def test_the_command_writes_the_page_and_prints_the_table(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "after training" in printed
    assert f"report: {run / 'report.html'}" in printed
    assert main(["--run", str(run), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--run runs/demo_cpu" in capsys.readouterr().out
