"""Evaluations side by side: what is printed, how sure differences are, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pytest

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.compare import find_uncertainty, image_difference, open_result
from dist_proxygml.evaluation.embedding_pass import PassSettings, Split, load_table, save_table
from dist_proxygml.evaluation.evaluator import EvaluationResult, Settings, evaluate
from dist_proxygml.report import main
from tests.shards_of_noise import SIDE, Projection, write_noise_shards, write_query_and_gallery

PROTOCOL: dict[str, Any] = {
    "format": 1,
    "data": {
        "split": "test",
        "preprocessing": {"name": "resize", "size": 32},
        "left_out": [],
        "forward_batch_size": 64,
    },
    "clustering": None,
    "versions": {"numpy": "2.0.0", "torch": "2.14.1"},
}


def write(path: Path, protocol: dict[str, Any], **metrics: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {name.replace("_at_", "@"): value for name, value in metrics.items()}
    path.write_text(EvaluationResult(metrics, {}, 9, 3, 9, 0, 0, protocol).to_json())
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """PROTOCOL with `section__key=value` changed."""
    protocol = copy.deepcopy(PROTOCOL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = protocol
        for parent in parents:
            section = section[parent]
        section[last] = value
    return protocol


def test_a_run_stands_for_its_last_evaluation_and_differences_are_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write(run / "evaluation" / "step-000900.json", PROTOCOL, recall_at_1=0.1)
    write(run / "evaluation" / "step-001000.json", PROTOCOL, recall_at_1=0.5, nmi=0.25)
    write(run / "evaluation" / "validation-step-002000.json", PROTOCOL, recall_at_1=0.9)
    other = write(tmp_path / "other.json", PROTOCOL, recall_at_1=0.625, mrr=0.5)
    assert main(["compare", str(run), str(other)]) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        f"A: {run}, step 1000",
        f"B: {other}",
        "",
        "percent A B B - A",
        "recall@1 50.00 62.50 +12.50",
        "nmi 25.00 - -",
        "mrr - 50.00 -",
    ]
    assert err.startswith(f"note: no intervals: no embeddings of {run}, step 1000 are stored")


def test_other_protocols_are_refused_and_every_entry_that_differs_is_named_with_both_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "one.json", PROTOCOL, recall_at_1=0.5)
    protocol = changed(data__preprocessing={"name": "center_crop"}, data__left_out=[3, 5], protocol="query")
    two = write(tmp_path / "two.json", protocol, recall_at_1=0.6)
    assert main(["compare", str(one), str(two)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    listed = [line.strip() for line in err.splitlines() if line.startswith("  ")]
    assert listed == [
        "data.left_out: [] | [3, 5]",
        'data.preprocessing.name: "resize" | "center_crop"',
        'protocol: (not there) | "query"',
    ]
    assert err.startswith("error: ")
    assert "add --force" in err

    assert main(["compare", str(one), str(two), "--force"]) == 0
    out, err = capsys.readouterr()
    assert "+10.00" in out
    assert err.startswith("warning: ")
    assert "data.preprocessing.name" in err
    assert "do not measure the same thing" in err


def test_of_long_values_the_difference_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = list(range(1000))
    one = write(tmp_path / "one.json", changed(data__left_out=images), recall_at_1=0.5)
    two = write(tmp_path / "two.json", changed(data__left_out=[*images[:100], 7]), recall_at_1=0.6)
    assert main(["compare", str(one), str(two)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left_out" in line]
    first, second = line.removeprefix("  data.left_out: ").split(" | ")
    assert first == "..., 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, ..."
    assert second == "..., 93, 94, 95, 96, 97, 98, 99, 7]"


def test_what_moves_last_digits_is_told_and_refuses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.json", PROTOCOL, recall_at_1=0.5)
    protocol = changed(versions__numpy="2.1.0", data__forward_batch_size=8, data__weights=["torch.bfloat16"])
    two = write(tmp_path / "two.json", protocol, recall_at_1=0.6)
    assert main(["compare", str(one), str(two)]) == 0
    out, err = capsys.readouterr()
    assert "+10.00" in out
    reasons = (
        'data.forward_batch_size: 64 | 8; data.weights: (not there) | ["torch.bfloat16"]; numpy: "2.0.0" | "2.1.0"'
    )
    assert err.splitlines()[0] == f"note: also different, A | B: {reasons}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file or directory; correct the path"),
        (lambda path: path.mkdir(), "found no evaluation/step-N.json"),
        (lambda path: path.write_text("{}"), "expected the JSON of an evaluation"),
        (lambda path: path.write_text('{"metrics": {}, "bounds": []}'), "expected the JSON of an evaluation"),
    ],
)
def test_what_is_no_evaluation_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    one = write(tmp_path / "one.json", PROTOCOL, recall_at_1=0.5)
    make(tmp_path / "two")
    assert main(["compare", str(one), str(tmp_path / "two")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert str(tmp_path / "two") in err
    assert message in err


def test_neither_a_run_nor_a_comparison_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "expected --run RUN or compare A B" in capsys.readouterr().err


# ---- intervals -------------------------------------------------------------------------------------------------------


def evaluated_run(
    path: Path, index: ShardIndex, *, width: int, gallery: ShardIndex | None = None, is_closed: bool = False
) -> Path:
    """A run's folder with one evaluation, its embeddings and where its shards are."""
    result = evaluate(
        Projection(width),
        Split(index, seen=np.full(index.num_classes, is_closed)),
        PassSettings(build_transform(ResizeConfig(name="resize", size=SIDE))),
        context=single_process(),
        gallery=None if gallery is None else Split(gallery),
        settings=Settings(recall_at=(1, 2), kmeans_seeds=()),
    )
    (path / "evaluation").mkdir(parents=True)
    (path / "evaluation" / "step-000020.json").write_text(result.to_json())
    (path / "config.json").write_text(json.dumps({"data": {"shards": str(index.root)}}))
    assert result.table is not None
    save_table(result.table, path / "embeddings" / "step-000020.npz")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("compared")
    index = write_noise_shards(root / "shards", [1, 9, 3, 1, 2, 5, 3, 13])
    return [evaluated_run(root / name, index, width=width) for name, width in (("one", 8), ("two", 2), ("twin", 8))]


def test_of_many_runs_each_has_its_difference_to_the_reference_with_an_interval(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(runs[1]), str(runs[0]), str(runs[2])]
    assert main(["compare", *given, "--reference", "best", "--resamples", "300"]) == 0
    out, err = capsys.readouterr()
    assert f"the first of them is the reference: {runs[0]}, step 20, {runs[2]}, step 20" in err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["percent"].split()[-6:] == ["A", "-", "B", "C", "-", "B"]
    assert lines["recall@1"].endswith("+0.00 [+0.00, +0.00] tie")
    assert " -" in lines["recall@1"].split("tie")[0]
    assert f"A: {runs[1]}, step 20, 8 unseen classes (open set)" in out
    assert "from 300 paired resamples (seed 0) of classes with all their queries" in out


def test_a_program_gets_the_same_numbers_again(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    documents = []
    for _ in range(2):
        assert main(["compare", *map(str, runs), "--json", "--resamples", "200", "--seed", "7"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1]
    first, other, twin = documents[0]["differences"]
    metrics = [result["metrics"] for result in documents[0]["results"]]
    for metric in ("recall@1", "recall@2", "r_precision", "map@r", "map", "mrr", "precision@1_macro"):
        assert first[metric] == twin[metric] == {"difference": 0.0, "low": 0.0, "high": 0.0, "is_tie": True}
        assert other[metric]["difference"] == pytest.approx(metrics[1][metric] - metrics[0][metric], abs=1e-12)
        assert other[metric]["low"] <= other[metric]["difference"] <= other[metric]["high"]
    assert documents[0]["results"][0]["classes"] == {"set": "open", "seen": 0, "unseen": 8}


def test_where_all_classes_were_trained_queries_are_resampled(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path / "shards", [4, 9, 3])
    closed = [evaluated_run(tmp_path / str(width), index, width=width, is_closed=True) for width in (3, 2)]
    found = find_uncertainty([open_result(run) for run in closed], reference=0, num_resamples=50, seed=0)
    assert not isinstance(found, str)
    assert found.drawn.startswith("queries, as all classes were trained")
    assert "precision@1_macro" not in found.intervals[1]


def test_queries_that_search_a_gallery_are_told_from_its_images(tmp_path: Path) -> None:
    query, gallery = write_query_and_gallery(tmp_path / "shards", [5, 9, 4, 8])
    named = [open_result(evaluated_run(tmp_path / str(width), query, gallery=gallery, width=width)) for width in (6, 2)]
    found = find_uncertainty(named, reference=0, num_resamples=50, seed=0)
    assert not isinstance(found, str)
    expected = named[1].result.metrics["map"] - named[0].result.metrics["map"]
    assert found.intervals[1]["map"].difference == pytest.approx(expected, abs=1e-12)


def test_embeddings_of_another_evaluation_give_no_interval(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path / "shards", [4, 9, 3])
    named = [open_result(evaluated_run(tmp_path / str(width), index, width=width)) for width in (6, 2)]
    assert named[0].embeddings is not None
    assert named[1].embeddings is not None
    save_table(load_table(named[0].embeddings), named[1].embeddings)
    assert "are not the embeddings of" in str(find_uncertainty(named, reference=0, num_resamples=50, seed=0))


def test_results_of_pairs_alone_give_no_interval(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path / "shards", [4, 9, 3])
    one = open_result(evaluated_run(tmp_path / "run", index, width=6))
    one.result.metrics.clear()
    one.result.metrics["pair_accuracy"] = 0.5
    assert "mean over queries" in str(find_uncertainty([one, one], reference=0, num_resamples=50, seed=0))


def test_other_images_are_named_by_the_first_file_that_is_not_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluated_run(tmp_path / "one", write_noise_shards(tmp_path / "a", [4, 9, 3]), width=3)
    other_index = write_noise_shards(tmp_path / "b", [4, 9, 3], copy_of={15: 14})
    two = evaluated_run(tmp_path / "two", other_index, width=3)
    assert main(["compare", str(one), str(two)]) == 2
    err = capsys.readouterr().err
    where = f"{tmp_path / 'a'} | {tmp_path / 'b'}"
    assert f"other images: split test, {where}: the first file that is not the same is test-000001.tar" in err
    query, gallery = write_query_and_gallery(tmp_path / "c", [5, 9, 4, 8])
    three = open_result(evaluated_run(tmp_path / "three", query, gallery=gallery, width=3))
    assert image_difference(open_result(one), three) == "split test | split query"


def test_another_size_of_the_images_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.json", PROTOCOL, recall_at_1=0.5)
    two = write(tmp_path / "two.json", changed(data__preprocessing__size=64), recall_at_1=0.6)
    assert main(["compare", str(one), str(two)]) == 0
    assert "note: also different, A | B: data.preprocessing.size: 32 | 64" in capsys.readouterr().err


def test_seen_and_unseen_classes_do_not_compare_but_results_that_do_not_say_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"closed": {"seen": 3, "unseen": 0}, "open": {"seen": 0, "unseen": 3}}
    paths = {
        name: write(tmp_path / f"{name}.json", {**PROTOCOL, "classes": {"set": name, **counts}}, recall_at_1=0.5)
        for name, counts in sets.items()
    }
    older = write(tmp_path / "older.json", PROTOCOL, recall_at_1=0.5)
    assert main(["compare", str(paths["closed"]), str(paths["open"])]) == 2
    assert 'classes.set: "closed" | "open"' in capsys.readouterr().err
    assert main(["compare", str(paths["closed"]), str(older)]) == 0
    out, err = capsys.readouterr()
    assert 'classes.set: "closed" | (not there)' in err
    assert "3 seen classes (closed set)" in out
    assert out.splitlines()[-1].split() == ["recall@1", "50.00", "50.00", "+0.00", "tie"]


def test_the_page_is_valid_and_says_ties(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "pages" / "compared.html"
    assert main(["compare", *map(str, runs), "--resamples", "50", "--html", str(page)]) == 0
    text = page.read_text()
    html5lib.HTMLParser(strict=True).parse(text)
    assert "8 unseen classes (open set)" in text
    assert "[+0.00, +0.00] tie" in text
    assert main(["compare", *map(str, runs), "--html", str(tmp_path / "page.json")]) == 2
    assert "--html" in capsys.readouterr().err
