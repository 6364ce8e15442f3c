"""Which of a run's evaluations are its results."""

import json
from pathlib import Path

import pytest

from dist_proxygml.evaluation.best import SelectedResult, select_results
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.reporting.page import format_table


def result(**metrics: float) -> EvaluationResult:
    metrics = {name.replace("_at_", "@"): value for name, value in metrics.items()}
    return EvaluationResult(metrics, {}, 9, 3, 9, 0, 0, {"format": 1})


def write(run: Path, name: str, **metrics: float) -> None:
    path = run / "evaluation" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result(**metrics).to_json())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Step 20 is best on validation classes, step 10 on the test split; NMI says the contrary."""
    for step, on_test, on_validation in ((0, 0.95, 0.95), (10, 0.8, 0.5), (20, 0.7, 0.6), (30, 0.6, 0.4)):
        write(tmp_path, f"step-{step:06d}", recall_at_10=0.99, recall_at_1=on_test, nmi=1 - on_test)
        write(tmp_path, f"validation-step-{step:06d}", recall_at_10=0.9, recall_at_1=on_validation, nmi=step / 100)
    write(tmp_path, "validation-step-000040", recall_at_1=0.99)  # stopped before its test split was evaluated
    write(tmp_path, "step-000030-on-shards-test", recall_at_1=1.0)
    write(tmp_path, "pixels", recall_at_1=1.0)
    return tmp_path


def test_last_and_best_are_told_apart_and_all_are_results_on_the_test_split(run: Path) -> None:
    assert select_results(run) == {
        "last": SelectedResult(30, result(recall_at_10=0.99, recall_at_1=0.6, nmi=0.4)),
        "best on validation classes": SelectedResult(20, result(recall_at_10=0.99, recall_at_1=0.7, nmi=1 - 0.7)),
        "best on test": SelectedResult(10, result(recall_at_10=0.99, recall_at_1=0.8, nmi=1 - 0.8)),
    }


def test_what_is_best_goes_by_the_metric_that_checkpoints_are_kept_by(run: Path) -> None:
    (run / "config.json").write_text(json.dumps({"checkpoint": {"keep_best": "nmi"}}))
    assert {name: chosen.step for name, chosen in select_results(run).items()} == {
        "last": 30,
        "best on validation classes": 30,
        "best on test": 30,
    }


def test_of_equal_ones_the_newest_is_best_and_what_is_no_number_never_is(run: Path) -> None:
    write(run, "step-000020", recall_at_1=0.8)
    write(run, "validation-step-000030", recall_at_1=float("nan"))
    steps = {name: chosen.step for name, chosen in select_results(run).items()}
    assert (steps["best on test"], steps["best on validation classes"]) == (20, 20)


def test_a_run_without_validation_classes_or_without_training_has_fewer_results(tmp_path: Path) -> None:
    assert select_results(tmp_path) == {}
    write(tmp_path, "step-000000", recall_at_1=0.9)
    assert select_results(tmp_path) == {}
    write(tmp_path, "step-000010", recall_at_1=0.8)
    assert list(select_results(tmp_path)) == ["last", "best on test"]
    assert "best" not in format_table(tmp_path)  # there was nothing to choose
    write(tmp_path, "step-000020", recall_at_1=0.7)
    assert "best on test (optimistic), step 10" in format_table(tmp_path)
    assert "validation" not in format_table(tmp_path)


def test_the_table_of_a_run_ends_with_what_is_best_and_says_what_flatters(run: Path) -> None:
    rows = [" ".join(line.split()) for line in format_table(run).splitlines()]
    assert rows[-3:] == [
        "after training 60.00 99.00 40.00",
        "best on validation classes, step 20 70.00 99.00 30.00",
        "best on test (optimistic), step 10 80.00 99.00 20.00",
    ]


def test_an_evaluation_that_cannot_be_read_is_named(run: Path) -> None:
    (run / "evaluation" / "step-000020.json").write_text("{")
    with pytest.raises(ValueError, match=r"step-000020\.json"):
        select_results(run)
