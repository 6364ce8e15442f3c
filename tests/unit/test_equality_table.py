"""What computes a training otherwise, beside what another seed changes: differences are paired, and small ones show."""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.retrieval import main, runs_of
from benchmarks.tables import TABLES, Row, Table, equality


def result(loss: float, recall: float) -> dict[str, Any]:
    return {"loss": loss, "test": {"recall@1": recall, "map@r": recall / 2}}


def test_differences_are_paired_by_seed_and_small_ones_are_not_rounded_away() -> None:
    labels = ("base", "close", "same", "none")
    rows = [Row(label, {"row": label}, (), seeds=(0, 1, 2)) for label in labels]
    lines = {("base", seed): result(2.0 + 0.1 * seed, 0.5 + 0.01 * seed) for seed in (0, 1, 2)}
    lines |= {("close", seed): result(2.0 + 0.1 * seed + 3e-8, 0.504 + 0.01 * seed) for seed in (1,)}
    lines |= {("same", seed): result(2.0 + 0.1 * seed, 0.501 + 0.011 * seed) for seed in (0, 1, 2)}
    made = equality.show(Table("t", "?", "docs/t.md", rows), lines).markdown.splitlines()
    assert made[2:] == [
        "| base | 3 | 2.1 | 51 | 25.5 |",
        "| **the same, seed to seed** |  | ± 0.1 | ± 1 | ± 0.5 |",
        "| close, less the first | 1 of 3 | +3e-08 | +0.4 | +0.2 |",
        "| same, less the first | 3 | 0 ± 0 | +0.2 ± 0.25 | +0.1 ± 0.12 |",
        "| none, less the first | 0 of 3 |  |  |  |",
    ]


def test_rows_train_the_same_on_other_ranks_stages_and_number_types() -> None:
    runs = [run for run in runs_of(TABLES["equality"], Path("runs")) if run.seed == 0]
    base = runs[0].config
    found = {}
    for run in runs:
        started = ["deepspeed", "--num_gpus", str(run.row.ranks)] if run.row.ranks > 1 else ["python"]
        assert run.command[: len(started) + 1] == [*started, "launchers/train.py"]
        engine = run.config.deepspeed
        found[run.row.ranks, engine["zero_optimization"]["stage"], engine.get("bf16", {}).get("enabled", False)] = run
        same = {"deepspeed", "name", "runs_dir"}
        assert run.config.model_dump(exclude=same) == base.model_dump(exclude=same)
    assert list(found) == [
        (1, 0, False),
        (2, 0, False),
        (4, 0, False),
        (2, 1, False),
        (2, 2, False),
        (2, 3, False),
        (1, 0, True),
    ]


@pytest.mark.parametrize("given", [None, "3"])
def test_ranks_have_one_thread_unless_the_environment_says_otherwise(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr("benchmarks.retrieval.make", lambda *_, **__: found.append(os.environ["OMP_NUM_THREADS"]))
    monkeypatch.setattr("benchmarks.retrieval.signal.signal", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    main(["--table", "equality"])
    assert found == [given or "1"]
