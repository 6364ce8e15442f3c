"""Precision and recall of answers by score, against numbers worked out by hand and scikit-learn; kept with an index."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from dist_proxygml import Index
from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.evaluation.verification import BINS_SHOWN
from dist_proxygml.inference import score_table
from dist_proxygml.inference.retrieval_index import SCORES_FILE
from dist_proxygml.inference.score_table import BINS, ScoreTable, describe_scores, measure_scores, why_not_measurable


def labelled(labels: Any) -> list[ImageRecord]:
    return [ImageRecord(str(row), int(label)) for row, label in enumerate(labels)]


def table_of(rows: np.ndarray, labels: Any, **options: Any) -> ScoreTable:
    index = Index.build(rows, labelled(labels), kind="flat")

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = index.search(queries, k)
        return found.scores, found.rows

    return measure_scores(search, rows, index.records, measured_on="test", **options)


def rows_around_centres(num_rows: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_classes, num_rows)
    rows = generator.normal(size=(num_classes, 8))[labels] + 0.6 * generator.normal(size=(num_rows, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def on_a_circle(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_hand_worked_example() -> None:
    # a at 0 and 20, b at 35 and 90, a lone c at 95. Each answers the other four:
    # 0:  20 a right, 35, 90, 95 | 20: 35, 0 a right, 70, 75 | 35: 20, 35, 55 b right, 60 | 90: 5 c, 55 b right, 70, 90
    # 95: 5, 60, 75, 95, all wrong
    table = table_of(on_a_circle(0, 20, 35, 90, 95), [4, 4, 2, 2, 9])
    assert (table.num_queries, table.num_rows, table.num_possible) == (5, 5, 4)
    assert (sum(table.right), sum(table.wrong)) == (4, 16)
    at_30 = table.at(np.cos(np.deg2rad(30)))  # 5 twice, 15 twice and 20 twice
    assert at_30 is not None
    assert (at_30.num_answers, at_30.precision, at_30.recall) == (6, 2 / 6, 0.5)
    assert at_30.score == int(np.cos(np.deg2rad(20)) * BINS) / BINS
    everything = table.at(-1)
    assert everything is not None
    assert (everything.num_answers, everything.precision, everything.recall) == (20, 0.2, 1.0)
    assert table.at(1.0) is None
    # 35 and 55 degrees come twice as well: 4 of 10 are right from 55 on, 4 of 12 from 60 on, 4 of 14 from 70 on.
    assert (table.best.num_answers, table.best.precision, table.best.recall) == (10, 0.4, 1.0)
    assert table.best.score == int(np.cos(np.deg2rad(55)) * BINS) / BINS
    assert table.lowest_for(0.5) is None
    found = table.lowest_for(0.3)
    assert found is not None
    assert (found.num_answers, found.precision) == (12, 4 / 12)
    assert table.lowest_for(0.2) == everything
    assert sum(table.histogram.same) == 2  # pairs, each once
    assert sum(table.histogram.different) == 8


@pytest.mark.parametrize("max_queries", [300, 80])
def test_every_score_agrees_with_scikit_learn(max_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_table, "_QUERIES_AT_A_TIME", 64)
    rows, labels = rows_around_centres(300, 40)
    table = table_of(rows, labels, max_queries=max_queries)
    index = Index.build(rows, labelled(labels), kind="flat")
    asking = np.arange(300)
    if max_queries < 300:
        asking = np.sort(np.random.default_rng(0).choice(300, max_queries, replace=False))
    scores, right, possible = [], [], 0
    for row in asking.tolist():
        found = index.search(rows[row], 11)
        answers = [(s, r) for s, r in zip(found.scores[0].tolist(), found.rows[0].tolist(), strict=True) if r != row]
        scores += [score for score, _ in answers[:10]]
        right += [labels[r] == labels[row] for _, r in answers[:10]]
        possible += min(10, int((labels == labels[row]).sum()) - 1)
    assert (table.num_queries, table.num_possible) == (max_queries, possible)
    precision, recall, thresholds = precision_recall_curve(right, scores)
    for score in np.linspace(-0.2, 1.0, 37).round(3):
        at = table.at(score)
        place = int(np.searchsorted(thresholds, score))
        if place == len(thresholds):
            assert at is None
            continue
        assert at is not None
        assert at.precision == pytest.approx(precision[place], abs=1e-12)
        assert at.recall * possible == pytest.approx(recall[place] * sum(right), abs=1e-9)
        assert at.num_answers == sum(s >= score for s in scores)
    scores_p, right_p = np.array(scores), np.array(right)
    grid = np.unique(np.floor(scores_p * BINS) / BINS).tolist()
    for wanted in (0.6, 0.9, 1.0):
        suggested = table.lowest_for(wanted)
        assert suggested is not None
        assert suggested.score == min(score for score in grid if right_p[scores_p >= score].mean() >= wanted)
    others = rows.astype(np.float64) @ rows[asking].T.astype(np.float64)
    kept = np.arange(300)[:, None] != asking
    if max_queries == 300:
        kept &= np.arange(300)[:, None] < asking  # each pair once
    edges = np.arange(table.histogram.first_bin, table.histogram.first_bin + len(table.histogram.same) + 1) / BINS_SHOWN
    same = labels[:, None] == labels[asking]
    assert table.histogram.same == np.histogram(others[kept & same], edges)[0].tolist()
    assert table.histogram.different == np.histogram(others[kept & ~same], edges)[0].tolist()
    assert sum(table.histogram.same) + sum(table.histogram.different) == kept.sum()


def test_copies_of_a_row_are_answers_and_the_row_itself_is_none() -> None:
    rows = np.repeat(on_a_circle(0, 90), 14, axis=0)  # more than ten of each: a row need not be among its own answers
    table = table_of(rows, np.arange(28) % 14)
    assert (sum(table.right) + sum(table.wrong), table.num_possible) == (280, 28)


def test_a_table_is_kept_with_its_index_and_an_index_without_one_opens(tmp_path: Path) -> None:
    rows, labels = rows_around_centres(60, 6)
    index = Index.build(rows, labelled(labels))
    assert index.scores is None
    index.save(tmp_path / "without")
    assert not (tmp_path / "without" / SCORES_FILE).exists()
    assert Index.load(tmp_path / "without").scores is None
    index.scores = table_of(rows, labels)
    index.save(tmp_path / "with")
    assert Index.load(tmp_path / "with", verify=True).scores == index.scores
    text = describe_scores(index.scores, (0.5, 1.1)).splitlines()
    found = index.scores.lowest_for(0.5)
    assert found is not None
    assert text[2].split() == ["0.5", f"{found.score:.4f}", f"{found.recall:.3f}", f"{found.num_answers:,}"]
    assert "not reached" in text[3]


@pytest.mark.parametrize(
    "damage",
    [
        {"right": "many"},
        {"right": [1]},
        {"num_possible": 0},
        {"first_bin": 0.5},
        {"wrong": None},
        {"histogram": {"first_bin": 0}},
        {"measured_on": 3},
        {"other": 1},
    ],
)
def test_a_damaged_table_is_refused_with_the_index(tmp_path: Path, damage: dict[str, Any]) -> None:
    rows, labels = rows_around_centres(60, 6)
    index = Index.build(rows, labelled(labels))
    index.scores = table_of(rows, labels)
    document = json.loads(index.scores.to_json()) | damage
    with pytest.raises((ValueError, TypeError, KeyError)):
        ScoreTable.from_json(json.dumps(document))
    index.save(tmp_path / "index")
    content = (tmp_path / "index" / SCORES_FILE).read_bytes()
    (tmp_path / "index" / SCORES_FILE).write_bytes(b"[" * len(content))
    with pytest.raises(ValueError, match=r"is damaged.*dist_proxygml.index"):
        Index.load(tmp_path / "index")
    shutil.rmtree(tmp_path / "index")


def test_rows_without_classes_are_not_measured() -> None:
    assert why_not_measurable(labelled([1, 1])) is None
    assert why_not_measurable(labelled([1, 2])) == "no class has two rows"
    assert why_not_measurable([ImageRecord("a", 1), ImageRecord("b")]) == "1 of 2 rows have no class label"
