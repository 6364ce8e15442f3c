"""A run that trains on everything: nothing is evaluated, or validation classes alone, and everything else behaves."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.cluster.grid import last_evaluation
from dist_proxygml.config import Config, parse_config
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.evaluate import main as evaluate
from dist_proxygml.evaluation.best import BEST_ON_VALIDATION, LAST, select_results
from dist_proxygml.report import main as report
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import read_board

CLASS_SIZES = [5, 4, 6, 3, 5, 4, 5, 4]


def configuration(root: Path, name: str, *, validation_classes: int | None = None, epochs: int = 2) -> Config:
    raw: dict[str, Any] = {
        "name": name,
        "runs_dir": str(root / "runs"),
        "data": {
            "shards": str(root / "shards"),
            "train_split": "test",  # the only one that the noise shards have
            "test_split": None,
            "validation_classes": validation_classes,
            "num_workers": 0,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 6, "options": {"width": 4}},
        "proxies": {"per_class": 2, "topk": 5},
        "optimizer": {"backbone_lr": 1e-3, "proxies_lr": 0.05},
        "training": {"epochs": epochs, "batch_size": 12},
        "evaluation": {"batch_size": 8, "recall_at": [1, 2], "kmeans_seeds": 0, "raw_pixels": True},
        "checkpoint": {"keep_best": "recall@1", "keep_last": 1},
        "telemetry": {"progress_bar": False, "log_every_steps": 1},
    }
    return parse_config(raw, source="the test")


def train_all(context: ParallelContext, root: Path) -> None:
    """A run of two epochs, continued for a third; one with validation classes."""
    from dist_proxygml.training.run import train

    train(configuration(root, "all"), context)
    train(configuration(root, "all", epochs=3), context)
    train(configuration(root, "held-out", validation_classes=3), context)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("everything")
    write_noise_shards(root / "shards", CLASS_SIZES)
    run_ranks(train_all, 1, root, timeout=180)
    return root / "runs"


@pytest.mark.timeout(240)
def test_a_run_that_evaluates_nothing_trains_reports_and_continues(runs: Path) -> None:
    run = runs / "all"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train"}
    assert [line["step"] for line in lines] == list(range(1, 10))  # 36 images in batches of 12
    assert not list(run.glob("evaluation/*"))
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000009"]  # the last is the best
    page = (run / "report.html").read_text()
    assert "has not been evaluated" in page
    assert "has no test split" in page
    assert select_results(run) == {}
    assert last_evaluation(run) is None
    assert [path.name for path in sorted((run / "proxies").iterdir())][-1] == "step-000009.json"


@pytest.mark.timeout(240)
def test_its_page_can_be_written_again_but_has_no_use_for_shards(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(["--run", str(runs / "all")]) == 0
    assert "no images" not in capsys.readouterr().err
    assert report(["--run", str(runs / "all"), "--data", str(runs.parent / "shards")]) == 2
    assert "test_split" in capsys.readouterr().err


@pytest.mark.timeout(240)
def test_how_long_it_took_is_kept_over_starts(runs: Path) -> None:
    facts = json.loads((runs / "all" / "run.json").read_text())
    assert (facts["ranks"], facts["proxies"]) == (1, 16)
    assert facts["parameters"] > 100
    assert facts["device"].startswith("CPU, ")
    board = read_board(runs / "all")
    seconds = [event.value for event in board.Scalars("time/training_seconds")]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(facts["seconds"]["training"], abs=5)
    steps = [event.step for event in board.Scalars("time/training_seconds")]
    assert steps == sorted(set(steps))
    assert [event.value for event in board.Scalars("train/epoch")] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.timeout(240)
def test_validation_classes_alone_are_evaluated_and_stand_for_the_run(runs: Path) -> None:
    run = runs / "held-out"
    stored = sorted(path.name for path in (run / "evaluation").iterdir())
    assert stored[0] == "validation-step-000000.json"
    assert all(name.startswith("validation-step-") for name in stored)
    selected = select_results(run)
    assert selected.keys() == {LAST, BEST_ON_VALIDATION}
    last = selected[LAST].result
    assert last.class_set is not None
    assert (last.class_set.num_seen, last.class_set.num_unseen) == (0, 3)
    found = last_evaluation(run)
    assert found is not None
    assert found.metrics == last.metrics
    page = " ".join((run / "report.html").read_text().split())
    assert "of 3 classes, held out of training, looks for" in page


@pytest.mark.timeout(240)
def test_an_evaluation_needs_a_split_by_name(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.test_split.*--split"):
        evaluate(["--run", str(runs / "all")])
