"""The page of a run: what is on it, what is never on it, and what stands there while parts of the run are missing."""

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import html5lib
import numpy as np
import pytest
import torch
from PIL import Image

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable, save_table
from dist_proxygml.evaluation.evaluator import EvaluationResult, PairSettings
from dist_proxygml.evaluation.verification import verify_listed
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.statistics import ProxyStatistics, write_proxy_use
from dist_proxygml.protocols import far_metric, shown_far
from dist_proxygml.report import main
from dist_proxygml.reporting import pictures as report_pictures
from dist_proxygml.reporting.page import _charts, format_metrics, format_table, read_run, write_report
from dist_proxygml.reporting.thumbnails import MAX_BYTES, Thumbnails
from tests.report_runs import proxy_statistics, write_picture_shards, write_run
from tests.shards_of_noise import SIDE, write_noise_shards

CLASS_SIZES = [1, 9, 3, 1, 2, 5, 3, 13]
VOID = {"meta", "img", "link", "br", "hr"}


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
    return write_run(tmp_path / "my run", index, name="Fish & <chips>")


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
    worst_text = page.text[page.text.rindex("Where it fails") :]
    assert re.search(r"at (\d+)", worst_text)[1] == str(first.max())  # type: ignore[index]
    worst_name = index.classes[int(table.labels[int(first.argmax())])].name
    assert worst_text.index(worst_name) < worst_text.index(f"at {first.max()}")


def test_the_pictures_are_those_of_the_images_that_were_not_left_out(run: Path, index: ShardIndex) -> None:
    """Without the first image, every row of the table is one before its place in the index."""
    table = read_run(run).table
    assert table is not None
    save_table(EmbeddingTable(*(part[1:] for part in table)), run / "embeddings" / "step-000020.npz")
    page = Page(write_report(run, index).read_text())
    thumbnails = Thumbnails(index)
    pictures = {thumbnails.url(image_id): index.labels[image_id] for image_id in range(index.num_samples)}
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


def test_the_page_is_valid_html_and_its_links_lead_somewhere(run: Path, index: ShardIndex) -> None:
    html = write_report(run, index).read_text()
    html5lib.HTMLParser(strict=True).parse(html)  # raises at the first error of the grammar
    page = Page(html)
    named = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(named) == len(set(named)), "also inside of the charts"
    sections = [section["id"] for section in page.all("section")]
    assert len(sections) == 10
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in sections]


def test_every_number_has_its_meaning_its_bounds_and_its_deviation(run: Path, index: ShardIndex) -> None:
    path = run / "evaluation" / "step-000020.json"
    document = json.loads(path.read_text())
    document["metrics"] |= {"recall@1": 0.5, "nmi": 0.25, "nmi_sd": 0.015, "mrr": 0.75, "new_metric": 0.125}
    document["bounds"] = {"recall@1": [0.49, 0.515], "mrr": [0.745, 0.76], "new_metric": [0.125, 0.125]}
    path.write_text(json.dumps(document))
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    table = text[text.rindex("Every number") : text.rindex("Which classes it confuses")]
    assert re.search(
        r"Recall@1 queries with a right answer among the first 1 .* 50\.00 \[49\.00, 51\.50\] Recall@2", table
    )
    assert re.search(r"MRR 1 over the position .* 75\.00 \[74\.50, 76\.00\] NMI", table)
    assert re.search(r"25\.00 ± 1\.50", table)
    assert "new_metric - - 12.50" in table
    assert "[12.50" not in table  # ties do not touch it


def test_small_and_large_classes_are_shown_apart_where_there_are_both(run: Path, index: ShardIndex) -> None:
    """The noise has classes of 1, 9, 3, 1, 2, 5, 3 and 13 images; those of 1 do not ask."""
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    part = text[text.rindex("How it does on small and large") : text.rindex("Which classes it confuses")]
    assert "images of their class that are searched, themselves included" in part
    assert re.findall(r"(\d+(?: to \d+)?) (\d+) (\d+) [\d.]+ [\d.]+ [\d.]+ [\d.]+", part) == [
        ("2", "1", "2"),
        ("3 to 4", "2", "6"),
        ("5 to 8", "1", "5"),
        ("9 to 16", "2", "22"),
    ]
    path = run / "evaluation" / "step-000020.json"
    document = json.loads(path.read_text())
    entry = {"images": [0, 0], "classes": 3, "queries": 1234, "recall@1": 0.125, "map@r": 0.0625}
    document["class_sizes"]["trained"] = [entry, {**entry, "images": [1025, None], "recall@1": 0.75}]
    document["class_sizes"]["searched"] = document["class_sizes"]["searched"][:1]
    path.write_text(json.dumps(document))
    page = Page(write_report(run, index).read_text())
    text = " ".join(page.text.split())
    assert "images of their class that were trained on" in text
    assert "1,025 and more 3 1,234 - - 75.00 6.25" in text  # earlier results were not grouped so
    assert "that are searched" not in text
    widths = [bar["width"] for bar in page.all("rect") if bar.get("height") == "1"]
    assert widths == ["12.50", "75.00"]
    del document["class_sizes"]  # as earlier versions wrote it
    path.write_text(json.dumps(document))
    assert "small and large" not in write_report(run, index).read_text()


def test_the_best_evaluations_stand_beside_the_last_where_there_was_a_choice(run: Path, index: ShardIndex) -> None:
    assert "best of" not in Page(write_report(run, index).read_text()).text
    folder = run / "evaluation"
    document = json.loads((folder / "step-000020.json").read_text())
    for step, on_test, on_validation in ((10, 0.9, 0.4), (15, 0.8, 0.6), (20, 0.7, 0.5)):
        for name, value in (("", on_test), ("validation-", on_validation)):
            document["metrics"]["recall@1"] = value
            (folder / f"{name}step-{step:06d}.json").write_text(json.dumps(document))
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    assert re.search(r"After training 70\.0 .* Best on validation classes, step 15 80\.0 ", text)
    assert "Best on test (optimistic), step 10 90.0" in text
    assert "the best of 3 looks at the test images" in text
    assert "Recall@1 of validation classes" in text


def test_what_pairs_say_has_a_part_of_its_own_with_what_is_not_measurable(tmp_path: Path, index: ShardIndex) -> None:
    run = write_run(tmp_path / "run", index, name="run", pairs=PairSettings(False, (1e-6, 0.01, 0.5)))
    page = Page(write_report(run, index).read_text())
    text = " ".join(page.text.split())
    rows = read_run(run).rows
    pairs = rows["after training"].pairs
    assert pairs is not None
    assert f"{pairs.num_same:,} pairs of images of the same class and {pairs.num_different:,} of different" in text
    assert "at FAR 1e-6 not measurable with so few pairs" in text
    for point in pairs.points:
        values = " ".join(f"{100 * row.metrics[far_metric(point.far)]:.2f}" for row in rows.values())
        assert f"at FAR {shown_far(point.far)} {values} {point.threshold:.5f}" in text
    assert "Pairs of one class accepted, percent" in text
    assert "Accuracy" not in text
    assert "TAR at FAR 1e-2" in text  # among all numbers
    without = Page(write_report(write_run(tmp_path / "without", index, name="run"), index).read_text())
    assert "pairs apart" not in without.text


def test_a_verification_set_is_shown_by_its_pairs_alone(tmp_path: Path, index: ShardIndex) -> None:
    run = write_run(tmp_path / "run", index, name="run")
    listed = verify_listed(np.linspace(0, 1, 40), np.arange(40) % 3 > 0, np.arange(40) // 4, fars=(0.1,))
    for path in (run / "evaluation").iterdir():
        result = EvaluationResult.from_json(path.read_bytes())
        protocol = result.protocol | {"pairs": {"of": "listed"}}
        lone = {"num_queries": 0, "num_lone": 37, "bounds": {}}
        alone = dataclasses.replace(result, metrics=listed.metrics, pairs=listed, protocol=protocol, **lone)
        path.write_text(alone.to_json())
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    assert "After 20 training steps, 37 images are compared in pairs" in text
    assert f"{listed.num_same} listed pairs of images of the same class" in text
    mean, deviation = (f"{100 * listed.metrics[name]:.2f}" for name in ("pair_accuracy", "pair_accuracy_sd"))
    assert f"by the threshold of the others {' '.join([f'{mean} ± {deviation}'] * 3)}" in text
    assert "Recall@K" not in text
    assert "What it retrieves" not in text


def test_hubs_are_counted_over_the_ten_nearest_of_every_query(run: Path, index: ShardIndex) -> None:
    table = read_run(run).table
    assert table is not None
    scores = (table.embeddings @ table.embeddings.T).fill_diagonal_(-torch.inf)
    is_query = torch.bincount(table.labels)[table.labels] > 1
    nearest = scores.topk(10, dim=1).indices[is_query]
    counts = torch.bincount(nearest.flatten(), minlength=len(table.labels))
    hub = int(counts.argmax())
    wrong = (table.labels[is_query] != table.labels[hub])[(nearest == hub).any(dim=1)].float().mean()
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    section = text[text.rindex("Which images are found too often") :]
    assert re.search(r"in ([\d,]+) lists (\d+)% wrong", section).groups() == (  # type: ignore[union-attr]
        str(int(counts[hub])),
        f"{100 * wrong:.0f}",
    )
    shares = counts.double() - counts.double().mean()
    skewness = float((shares**3).mean() / (shares**2).mean() ** 1.5)
    assert f"the usual measure of hubness, is {skewness:.2f} : near 0" in section


def test_copies_of_training_images_are_shown_with_both_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    images = [png(generator.integers(0, 256, (SIDE, SIDE, 3))) for _ in range(9)]
    splits = write_picture_shards(
        tmp_path / "shards",
        {
            "test": [(image, number // 3) for number, image in enumerate(images[:6])] + [(images[0], 1)],
            "train": [(images[6], 0), (images[4], 1), (images[7], 0)],
        },
        names={"train": ["dog", "cat & mouse"]},
    )
    run = write_run(tmp_path / "run", splits["test"], name="copies", recall_at=(1, 2))
    page = Page(write_report(run, splits["test"]).read_text())
    text = " ".join(page.text.split())
    section = text[text.rindex("Which images occur twice") :]
    assert "1 of 7 test images is a copy of one of the 3 training images" in section
    assert "test test 1 training cat & mouse" in section
    assert "2 test images share their file (by length and checksum), 2 of them with an image of another" in section
    shown = [image["src"] for image in page.all("img") if (image["alt"] or "").startswith("copy in ")]
    assert shown == [Thumbnails(splits["test"]).url(4)] * 2

    unseen = write_noise_shards(tmp_path / "noise", CLASS_SIZES)
    alone = write_run(tmp_path / "alone", unseen, name="alone")
    text = Page(write_report(alone, unseen).read_text()).text
    assert "The training images are not at hand" in text
    assert "No two test images share a file." in text

    # Compared with itself, and from afar, by the indexes alone.
    config = json.loads((run / "config.json").read_text())
    config["data"]["train_split"] = "test"
    (run / "config.json").write_text(json.dumps(config))
    assert "the split that the run was trained on" in Page(write_report(run, splits["test"]).read_text()).text
    monkeypatch.setattr(ShardIndex, "open_sibling", lambda *_: dataclasses.replace(splits["train"], remote="s3://b"))
    section = " ".join(Page(write_report(run, splits["test"]).read_text()).text.split())
    assert "1 of 7 test images has the length and checksum of one of the 3 training images. Bytes were not" in section


def test_the_most_similar_images_of_different_classes_are_shown_once_and_first(tmp_path: Path) -> None:
    splits = write_picture_shards(
        tmp_path / "shards",
        {"test": [(png(np.full((SIDE, SIDE, 3), 20 * number)), number // 3) for number in range(9)]},
    )
    run = write_run(tmp_path / "run", splits["test"], name="alike", recall_at=(1, 2))
    # On a circle, so that a cosine is an angle: images 2 and 3 lie closest of different classes, then 5 and 6.
    angles = torch.tensor([0.0, 0.1, 0.2, 0.21, 0.4, 0.5, 0.53, 0.7, 0.8])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.from_numpy(splits["test"].labels)
    save_table(EmbeddingTable(rows, labels, torch.arange(9)), run / "embeddings" / "step-000020.npz")
    page = Page(write_report(run, splits["test"]).read_text())
    shown = [image["src"] for image in page.all("img") if (image["alt"] or "").startswith("look-alike")]
    assert shown[:4] == [Thumbnails(splits["test"]).url(number) for number in (2, 3, 5, 6)]
    assert len({tuple(shown[place : place + 2]) for place in range(0, len(shown), 2)}) == len(shown) / 2 == 12
    text = " ".join(page.text.split())
    assert f"similarity {np.cos(0.01):.3f} test 0 test 1 similarity {np.cos(0.03):.3f} test 1 test 2" in text


def test_a_gallery_of_its_own_is_what_is_shown_and_counted(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = [png(generator.integers(0, 256, (SIDE, SIDE, 3))) for _ in range(40)]
    pictures = [(image, number % 5) for number, image in enumerate(images)]
    splits = write_picture_shards(tmp_path / "shards", {"query": pictures[:15], "gallery": pictures[15:]})
    queries, gallery = splits["query"], splits["gallery"]
    run = write_run(tmp_path / "run", queries, name="apart")
    labels = torch.from_numpy(np.concatenate([queries.labels, gallery.labels]))
    rows = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    save_table(EmbeddingTable(rows, labels, torch.arange(40)), run / "embeddings" / "step-000020.npz")
    path = run / "evaluation" / "step-000020.json"
    document = json.loads(path.read_text())
    document["protocol"] |= {"num": {"gallery": 25}, "data": {"gallery_split": "gallery"}}
    path.write_text(json.dumps(document | {"num_queries": 13, "num_images": 40, "num_lone": 2}))

    page = Page(write_report(run, queries).read_text())
    text = " ".join(page.text.split())
    assert "every one of 13 queries of 5 classes, looks for its own class among 25 images of a gallery." in text
    assert "2 queries without a right answer there are skipped." in text
    assert f"of 15 queries, an image occurs {15 * 10 / 25:.1f} times on average" in text
    of_queries = {Thumbnails(queries).url(number) for number in range(15)}
    of_gallery = {Thumbnails(gallery).url(number) for number in range(25)}
    for image in page.all("img"):
        kind = (image["alt"] or "").split(":")[0]
        if kind == "query":
            assert image["src"] in of_queries
        elif kind in ("right", "wrong") or kind.endswith("lists"):
            assert image["src"] in of_gallery

    # Shards without that gallery are not those that the run was evaluated on.
    document["protocol"]["data"]["gallery_split"] = "elsewhere"
    path.write_text(json.dumps(document))
    assert "has the splits gallery, query, not" in Page(write_report(run, queries).read_text()).text


def test_what_the_proxies_do_is_told_from_the_newest_statistics(run: Path, index: ShardIndex) -> None:
    (run / "proxies" / "step-000005.json").write_text("{")  # older: not read
    page = Page(write_report(run, index).read_text())
    text = " ".join(page.text.split())
    assert "3 of 12 proxies (25.0%; 6 classes with 2 each) are dead: no image kept it." in text
    assert "<four> (proxy 2), five (proxy 1)" in text
    assert "of its class, 20 pairs" in text
    assert "of other classes, 400 pairs" in text
    assert len([path for path in page.all("path") if "fill-opacity" in (path.get("style") or "")]) == 2

    # As training writes them.
    statistics = ProxyStatistics(ClassPartition(num_classes=3), 1, device=torch.device("cpu"), group=None)
    write_proxy_use(
        run / "proxies" / "step-000025.json",
        statistics.close_window(),
        step=25,
        names_of=lambda ids: ["name"] * len(ids),
    )
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    assert "3 of 3 proxies (100.0%; 3 classes with 1 each) are dead" in text
    assert "The first of them: name, name, name." in text
    assert "No kept pairs were counted." in text

    broken = proxy_statistics()
    del broken["kept_negative"]["counts"]
    for content in (json.dumps(broken), "[]", '{"num_classes": 0}', "not JSON"):
        (run / "proxies" / "step-000030.json").write_text(content)
        text = Page(write_report(run, index).read_text()).text
        assert "step-000030.json cannot be read" in text
        assert "After training" in text


def test_the_page_stays_under_ten_megabytes_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of noise, which compress worst, all sections full, and names, lists and notes that are far too long."""
    assert report_pictures.NUM_PICTURES * MAX_BYTES * 4 / 3 < 8_000_000
    monkeypatch.setattr(report_pictures, "MAX_EXAMINED", 200)
    generator = np.random.default_rng(0)
    images = [png(generator.integers(0, 256, (150, 150, 3))) for _ in range(60)]
    # Every file is in both splits, and more than once in the one.
    splits = write_picture_shards(
        tmp_path / "shards",
        {
            "test": [(images[number % 60], number % 40) for number in range(300)],
            "train": [(image, 0) for image in images],
        },
        names={"test": [f"{label} " + "<long & long>" * 5000 for label in range(40)]},
    )
    run = write_run(tmp_path / "run", splits["test"], name="full")
    (tmp_path / "shards" / "ATTRIBUTION.md").write_text("me & you" * 500_000)
    path = run / "evaluation" / "step-000020.json"
    document = json.loads(path.read_text())
    document["protocol"]["data"]["left_out"] = list(range(300_000))
    path.write_text(json.dumps(document))
    table = read_run(run).table
    assert table is not None
    noise = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)))
    save_table(table._replace(embeddings=noise), run / "embeddings" / "step-000020.npz")

    html = write_report(run, splits["test"]).read_text()
    page = Page(html)
    sizes = [len(image["src"] or "") for image in page.all("img")]
    assert len(sizes) > report_pictures.NUM_PICTURES - 10
    assert len(sizes) <= report_pictures.NUM_PICTURES
    assert max(sizes) < MAX_BYTES * 4 / 3 + 40
    assert 1_000_000 < len(html.encode()) < 10_000_000
    assert "among 200 random ones of 300" in page.text
    assert " 18, 19 and 299,980 more" in page.text


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_what_a_user_named_is_text_wherever_it_stands(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> \"'&amp; "
    generator = np.random.default_rng(0)
    images = [png(generator.integers(0, 256, (SIDE, SIDE, 3))) for _ in range(24)]
    splits = write_picture_shards(
        tmp_path / "shards",
        {"test": [(image, number // 6) for number, image in enumerate(images)], "train": [(images[3], 0)]},
        names={"test": [f"{hostile}{label}" for label in range(4)], "train": [hostile]},
    )
    run = write_run(tmp_path / "run", splits["test"], name=hostile)
    (tmp_path / "shards" / "ATTRIBUTION.md").write_text(hostile)
    statistics = proxy_statistics()
    statistics["dead_definition"] = statistics["dead_examples"][0]["name"] = hostile
    (run / "proxies" / "step-000020.json").write_text(json.dumps(statistics))
    path = run / "evaluation" / "step-000020.json"
    document = json.loads(path.read_text())
    document["protocol"][hostile] = hostile
    document["metrics"][hostile] = 0.5
    path.write_text(json.dumps(document))
    html = write_report(run, splits["test"]).read_text()
    html5lib.HTMLParser(strict=True).parse(html)
    page = Page(html)
    assert not page.all("script")
    assert page.text.count(hostile.strip()) > 50
    assert any((image["alt"] or "").startswith(f"copy in training: {hostile}") for image in page.all("img"))
    assert [heading for heading in re.findall("<h1>(.*)</h1>", html) if "<" in heading] == []


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
    assert "No statistics of its proxies" in text
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


def test_the_command_writes_the_page_and_prints_the_table(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "after training" in printed
    assert f"report: {run / 'report.html'}" in printed
    assert main(["--run", str(run), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main(["--run", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "config.json").write_text('{"name": "a"}')
    (tmp_path / "report.html").mkdir()
    assert main(["--run", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["--run", str(tmp_path)]) == 2
    assert "config.json is not valid JSON" in capsys.readouterr().err
    assert main(["--data", "shards/demo", "compare", str(run), str(run)]) == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--run runs/demo_cpu" in capsys.readouterr().out


def test_a_page_with_images_is_not_replaced_by_one_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"name": "a", "data": {"shards": "nowhere"}}')
    page = tmp_path / "report.html"
    page.write_text('<img src="data:image/png;base64,AAAA">')
    assert main(["--run", str(tmp_path)]) == 2
    assert "would be lost: shard folder nowhere does not exist" in capsys.readouterr().err
    assert "AAAA" in page.read_text()
    page.unlink()
    assert main(["--run", str(tmp_path)]) == 0
    assert "--data says where the shards are" in capsys.readouterr().err


def test_no_command_runs_that_the_folder_of_a_run_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = {"name": "a\x1b[2J", "data": {"shards": f"pipe:touch {tmp_path}/pwned #{{}}"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert main(["--run", str(tmp_path)]) == 0
    assert "the page will have no images: expected a location that runs no command" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore:.*1 lines are skipped, the first is 1. no .step. in it")
@pytest.mark.parametrize("data", [[], {"shards": None}, {"shards": -1}, {"test_split": []}, {"cache_directory": 1}])
def test_a_configuration_of_other_types_costs_the_images_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: object
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"name": "a", "data": data}))
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "train", "step": {10**30}, "loss": 1.0}}\n')
    assert main(["--run", str(tmp_path)]) == 0
    assert "the page will have no images: " in capsys.readouterr().err


def test_shards_that_lie_elsewhere_are_read_through_the_cache_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"] = config.get("data", {}) | {"cache_directory": "/a/disk", "cache_limit": "2 KiB", "shards": "s3://b"}
    (copy / "config.json").write_text(json.dumps(config))
    opened: list[tuple[object, object]] = []

    def open_index(location: object, split: str, **cache: object) -> None:
        opened.append((location, cache))
        raise ValueError("nothing is there")

    monkeypatch.setattr("dist_proxygml.data.index.open_index", open_index)
    assert main(["--run", str(copy)]) == 0
    assert main(["--run", str(copy), "--data", "https://host/shards"]) == 2
    cache = {"cache_directory": Path("/a/disk"), "cache_limit": 2048}
    assert opened == [("s3://b", cache | {"is_typed": False}), ("https://host/shards", cache | {"is_typed": True})]


# ---- what the run was ------------------------------------------------------------------------------------------------


def changed(path: Path, **entries: object) -> None:
    """Change entries of a JSON document."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def whole_lines(path: Path) -> None:
    """Drop the line that a kill cut short."""
    path.write_text(path.read_text().rpartition("\n")[0] + "\n")


def test_the_page_begins_with_what_the_run_was_and_shows_images_before_all_numbers(
    run: Path, index: ShardIndex
) -> None:
    facts = {"ranks": 8, "device": "a <GPU>", "parameters": 1_234_567, "proxies": 20}
    seconds = {"training": 3600.0, "data": 0.0, "evaluation": 125.0, "checkpoint": 0.0}
    (run / "run.json").write_text(json.dumps({**facts, "seconds": seconds}))
    changed(run / "config.json", backbone={"name": "small_cnn", "embedding_dim": 128}, training={"ema_decay": 0.99})
    whole_lines(run / "metrics.jsonl")
    with (run / "metrics.jsonl").open("a") as log:
        for step, rate in ((21, 100.0), (22, 900.0), (23, 120.0)):
            log.write(json.dumps({"kind": "train", "step": step, "loss": 1.0, "images_per_second": rate}) + "\n")
    html = write_report(run, index).read_text()
    text = " ".join(Page(html).text.split())
    shown = [
        "1 h 2 min (training 1 h 0 min, evaluation 2 min)",
        "120 in training, median",
        "8 on a <GPU>",
        "small_cnn, 1,234,567 parameters, 128 dimensions",
        "moving average, decay 0.99",
        "After 20 training steps",
    ]
    places = [text.index(words) for words in shown]
    assert places == sorted(places)
    sections = [html.index(f'<section id="{key}">') for key in ("retrieves", "fails", "numbers", "proxies")]
    assert sections == sorted(sections)


def test_damaged_facts_are_left_out(run: Path, index: ShardIndex) -> None:
    (run / "run.json").write_text('{"ranks": 8, "seconds": {"training": "long"}}')
    assert "8 on unknown devices" in write_report(run, index).read_text()
    (run / "run.json").write_text("{")
    with pytest.warns(UserWarning, match=r"run\.json"):
        page = write_report(run, index).read_text()
    assert "unknown devices" not in page


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (0, "images of 8 classes, none of them seen in training, looks for"),
        (8, "images of 8 classes, all of them seen in training (other images of them), looks for"),
        (3, "images of 8 classes, 3 of them seen in training and 5 not, looks for"),
    ],
)
def test_the_first_sentence_says_whether_the_classes_were_trained(
    run: Path, index: ShardIndex, seen: int, words: str
) -> None:
    path = run / "evaluation" / "step-000020.json"
    protocol = json.loads(path.read_text())["protocol"]
    changed(path, protocol={**protocol, "classes": {"set": "any", "seen": seen, "unseen": 8 - seen}})
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    assert words in text


def test_wrong_answers_are_faded_where_a_query_has_no_right_one_left(run: Path, index: ShardIndex) -> None:
    table = read_run(run).table
    assert table is not None
    parts = report_pictures.picture_parts(table, index, gallery=None, training=None)
    places = [
        (place, tile["is_right"], row["num_positives"])
        for row in [*parts["random"], *parts["worst"]]
        for place, tile in enumerate(row["tiles"], 1)
    ]
    expected = sum(place > num_positives and not is_right for place, is_right, num_positives in places)
    page = Page(write_report(run, index).read_text())
    assert len(page.all("figure", "beyond")) == expected
    assert 0 < expected < len(page.all("figure", "wrong"))


def test_hubs_have_the_share_of_wrong_entries_of_all_lists_beside_them(run: Path, index: ShardIndex) -> None:
    table = read_run(run).table
    assert table is not None
    scores = (table.embeddings @ table.embeddings.T).fill_diagonal_(-torch.inf)
    nearest = scores.topk(10, dim=1).indices
    has_answer = torch.tensor([CLASS_SIZES[label] > 1 for label in table.labels.tolist()])
    wrong = (table.labels[nearest] != table.labels[:, None])[has_answer].double().mean().item()
    text = " ".join(Page(write_report(run, index).read_text()).text.split())
    assert f"For comparison: {100 * wrong:.0f}% of all entries of the lists are wrong." in text


def test_the_loss_stands_beside_that_of_a_guess(run: Path, index: ShardIndex) -> None:
    assert "ln(kept classes)" not in write_report(run, index).read_text()
    whole_lines(run / "metrics.jsonl")
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "train", "step": 30, "loss": 2.8, "kept_classes": 28.0}) + "\n")
    charts = {chart.title: chart for chart in _charts(read_run(run))}
    assert charts["Loss"].legend[-1] == ("classification of a guess: ln(kept classes)", True)
    assert "ln(kept classes) ends at 3.332" in charts["Loss"].spoken
