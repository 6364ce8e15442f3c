"""TAR at FAR, thresholds, ROC and histograms by counting, and the accuracy over folds, against numbers worked out by
hand, brute force in float64 and scikit-learn.
"""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve

from dist_proxygml.config import ResizeConfig, parse_config
from dist_proxygml.data.index import ShardIndex, open_index
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation import verification
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable, PassSettings, Split
from dist_proxygml.evaluation.evaluator import (
    EvaluationResult,
    PairSettings,
    Roles,
    Settings,
    check_settings,
    evaluate,
    evaluate_table,
)
from dist_proxygml.evaluation.exact import round_rows
from dist_proxygml.evaluation.metrics import name_metrics
from dist_proxygml.evaluation.verification import (
    Pairs,
    Verification,
    count_allowed,
    count_scores,
    fold_accuracies,
    verify_all,
    verify_listed,
)
from dist_proxygml.protocols import far_metric
from tests.shards_of_noise import SIDE, Projection, write_noise_shards

FARS = (1e-6, 1e-4, 1e-3, 1 / 300, 1e-2, 0.1, 0.5)
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo_cpu.json"


def random_rows(num_rows: int, dim: int, *, num_classes: int, noise: float, seed: int = 0) -> tuple[Any, Any]:
    """Rounded unit rows around a centre for each class, and labels, some of which nobody has."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows) * 3
    rows = generator.normal(size=(3 * num_classes, dim))[labels] + noise * generator.normal(size=(num_rows, dim))
    return round_rows((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)), labels


def scores_of(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """All scores in float64, and which are of the same class."""
    rows = pairs.rows.astype(np.float64)
    if pairs.others is None:
        upper = np.triu_indices(len(rows), 1)
        return (rows @ rows.T)[upper], (pairs.labels[:, None] == pairs.labels)[upper]
    kept = np.ones((len(rows), len(pairs.others)), dtype=bool)
    if pairs.own is not None:
        kept = np.arange(len(pairs.others)) != pairs.own[:, None]
    return (rows @ pairs.others.astype(np.float64).T)[kept], (pairs.labels[:, None] == pairs.other_labels)[kept]


def check_against_scikit_learn(found: Verification, scores: np.ndarray, same: np.ndarray) -> None:
    """Every number of a result."""
    assert (found.num_same, found.num_different) == (int(same.sum()), int((~same).sum()))
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    measurable = [far for far in FARS if far >= 1 / found.num_different]
    assert [point.far for point in found.points] == measurable
    assert found.not_measurable == [far for far in FARS if far not in measurable]
    for point in found.points:
        assert point.num_same / found.num_same == tpr[fpr <= point.far].max(), point
        assert point.num_same == (scores[same] >= point.threshold).sum()
        assert point.num_different == (scores[~same] >= point.threshold).sum()
        assert point.num_different / found.num_different <= point.far
    for threshold, num_same, num_different in found.roc:
        assert (num_same, num_different) == ((scores[same] >= threshold).sum(), (scores[~same] >= threshold).sum())
    assert found.roc[-1][1:] == (found.num_same, found.num_different)
    edges = np.arange(found.histogram.first_bin, found.histogram.first_bin + len(found.histogram.same) + 1) / 64
    assert found.histogram.same == np.histogram(scores[same], edges)[0].tolist()
    assert found.histogram.different == np.histogram(scores[~same], edges)[0].tolist()
    assert sum(found.histogram.same) == found.num_same


def test_hand_worked_example() -> None:
    # On a circle: a at 0 and 60 degrees, b at 50, 90 and 180. Pairs by score:
    #   10 degrees ab | 30 ab | 40 bb | 50 ab | 60 aa | 90 ab, bb | 120 ab | 130 bb | 180 ab
    angles = np.deg2rad([0, 60, 50, 90, 180])
    rows = round_rows(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32))
    pairs = Pairs(rows, np.array([5, 5, 7, 7, 7]))
    found = verify_all(pairs, fars=(0.1, 1 / 6, 2 / 6, 0.5, 0.9), context=single_process())
    # 4 of one class; of 6 others 0, 1, 2, 3 and 5 may be accepted: the second, third, fourth and sixth may not.
    assert (found.num_same, found.num_different, found.not_measurable) == (4, 6, [0.1])
    assert [(point.num_same, point.num_different) for point in found.points] == [(0, 1), (1, 2), (2, 3), (4, 5)]
    for angle, point in zip((30, 50, 90, 180), found.points, strict=True):  # the best that is not accepted
        assert math.cos(math.radians(angle)) < point.threshold
    assert found.metrics == {
        "tar@far=1.66667e-1": 0.0,
        "tar@far=3.33333e-1": 0.25,
        "tar@far=5e-1": 0.5,
        "tar@far=9e-1": 1.0,
    }


def test_pairs_of_other_classes_that_tie_are_accepted_together_or_not_at_all() -> None:
    rows = round_rows(np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]], np.float32))
    # score 1: aa (0, 1), ab twice (0, 2), (1, 2), bb never; cc (3, 4) is 1 as well. All others score 0.
    pairs = Pairs(rows, np.array([0, 0, 1, 2, 2]))
    found = verify_all(pairs, fars=(0.125, 0.25, 0.3), context=single_process())
    assert (found.num_same, found.num_different) == (2, 8)
    # One of the two may be accepted at 0.125, so neither is, nor what ties with them; at 0.25 both are.
    assert [(point.num_same, point.num_different) for point in found.points] == [(0, 0), (2, 2), (2, 2)]


@pytest.mark.parametrize("tile", [(1, 1), (7, 5), (64, 200), (1000, 1000)])
@pytest.mark.parametrize("num_classes", [2, 40, 150])
def test_all_pairs_of_a_split_agree_with_scikit_learn_for_any_blocks(num_classes: int, tile: tuple[int, int]) -> None:
    num_rows = {(1, 1): 50, (7, 5): 100}.get(tile, 300)
    rows, labels = random_rows(num_rows, 8, num_classes=num_classes, noise=0.8)
    pairs = Pairs(rows, labels)
    check_against_scikit_learn(verify_all(pairs, fars=FARS, context=single_process(), tile=tile), *scores_of(pairs))


@pytest.mark.parametrize("tile", [(7, 5), (1000, 1000)])
def test_queries_and_a_gallery_agree_with_scikit_learn(tile: tuple[int, int]) -> None:
    rows, labels = random_rows(130, 8, num_classes=30, noise=0.8)
    apart = Pairs(rows[:40], labels[:40], rows[40:], labels[40:])
    check_against_scikit_learn(verify_all(apart, fars=FARS, context=single_process(), tile=tile), *scores_of(apart))
    among = Pairs(rows[20:70], labels[20:70], rows, labels, np.arange(20, 70))
    check_against_scikit_learn(verify_all(among, fars=FARS, context=single_process(), tile=tile), *scores_of(among))
    alone = verify_all(among, fars=FARS, context=single_process())
    assert count_scores(among) == alone.histogram


@pytest.mark.parametrize(("spread", "num_passes"), [(1e-3, 2), (1e-5, 2), (1e-7, 4)])
def test_a_model_that_has_collapsed_is_counted_to_the_last_digit(
    spread: float, num_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    goes_over = verification._scores
    monkeypatch.setattr(verification, "_scores", lambda *given: passes.append(1) or goes_over(*given))
    generator = np.random.default_rng(1)
    rows = np.array([1.0, 1.0, 1.0, 1.0]) / 2 + spread * generator.normal(size=(120, 4))
    pairs = Pairs(round_rows(rows.astype(np.float32)), generator.integers(0, 20, 120))
    scores, same = scores_of(pairs)
    check_against_scikit_learn(verify_all(pairs, fars=FARS, context=single_process(), tile=(50, 50)), scores, same)
    assert len(passes) == num_passes


def test_listed_pairs_agree_with_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    same = generator.random(600) < 0.5
    scores = np.round(generator.normal(np.where(same, 0.5, 0.2), 0.15).clip(-1, 1), 2)  # with ties
    found = verify_listed(scores, same, np.arange(600) // 60, fars=FARS)
    check_against_scikit_learn(found, scores, same)
    assert len(found.accuracies) == 10
    assert set(found.metrics) == {
        *(far_metric(point.far) for point in found.points),
        "pair_accuracy",
        "pair_accuracy_sd",
    }


def test_the_threshold_of_a_fold_is_that_of_the_others() -> None:
    # Fold 0 alone would be decided rightly at 0.1 to 0.3; the others say half way between 0.6 and 0.8.
    scores = np.array([0.3, 0.75, 0.1, 0.8, 0.9, 0.6, 0.8, 0.6, 0.5])
    same = np.array([True, True, False, True, True, False, True, False, False])
    fold = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert fold_accuracies(scores, same, fold)[0] == 2 / 3  # 0.3 is below 0.7, 0.75 above


def test_of_equally_good_thresholds_the_highest_is_taken() -> None:
    scores, same = np.array([0.9, 0.8, 0.7, 0.75]), np.array([True, False, True, True])
    # The others: 0.9 right, 0.8 wrong, 0.7 right: accepting one or three is right twice; 0.85 refuses 0.75.
    assert fold_accuracies(scores, same, np.array([1, 1, 1, 0]))[0] == 0.0
    # Nothing is better than accepting none where all are different, and 0.75 is then refused.
    assert fold_accuracies(scores, np.array([False, False, False, True]), np.array([1, 1, 1, 0]))[0] == 0.0


def test_folds_agree_with_every_threshold_tried() -> None:
    generator = np.random.default_rng(3)
    same = generator.random(200) < 0.5
    scores = np.round(generator.normal(np.where(same, 0.5, 0.3), 0.2), 2)
    fold = generator.integers(0, 10, 200)
    expected = []
    for number in range(10):
        train, best, threshold = fold != number, -1, math.inf
        values = sorted(set(scores[train]), reverse=True)
        cuts = [math.inf, *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1]]
        for cut in cuts:
            right = int(((scores[train] >= cut) == same[train]).sum())
            if right > best:
                best, threshold = right, cut
        expected.append(((scores[~train] >= threshold) == same[~train]).mean())
    assert fold_accuracies(scores, same, fold) == expected
    with pytest.raises(ValueError, match="two folds"):
        fold_accuracies(scores, same, np.zeros(200, dtype=int))


@pytest.mark.parametrize(
    ("far", "num_different", "expected"),
    [(1e-3, 1000, 1), (1e-3, 999, 0), (0.3, 10, 3), (0.1 + 0.2, 10, 3), (1e-6, 10**12, 10**6), (0.7, 10, 7)],
)
def test_what_a_rate_allows_is_no_matter_of_rounding(far: float, num_different: int, expected: int) -> None:
    assert count_allowed(far, num_different) == expected


@pytest.mark.parametrize(
    ("far", "name"), [(1e-6, "tar@far=1e-6"), (0.1, "tar@far=1e-1"), (3e-4, "tar@far=3e-4"), (0.25, "tar@far=2.5e-1")]
)
def test_a_rate_has_one_name(far: float, name: str) -> None:
    assert far_metric(far) == name
    (named,) = name_metrics([name])
    assert (named.key, named.label) == (name, f"TAR at FAR {name.split('=')[1]}")


# ---- in an evaluation ------------------------------------------------------------------------------------------------


def table_of(rows: np.ndarray, labels: np.ndarray, ids: np.ndarray | None = None) -> EmbeddingTable:
    ids = np.arange(len(rows)) if ids is None else ids
    return EmbeddingTable(torch.from_numpy(rows), torch.from_numpy(labels), torch.from_numpy(ids))


def test_an_evaluation_measures_pairs_stores_them_and_says_so_in_its_fingerprint() -> None:
    rows, labels = random_rows(80, 8, num_classes=12, noise=0.8)
    settings = Settings(kmeans_seeds=(), pairs=PairSettings(False, (1e-6, 0.01, 0.1)))
    result = evaluate_table(table_of(rows, labels), context=single_process(), settings=settings)
    without = evaluate_table(table_of(rows, labels), context=single_process(), settings=settings._replace(pairs=None))
    assert result.pairs == verify_all(Pairs(rows, labels), fars=(1e-6, 0.01, 0.1), context=single_process())
    assert result.metrics == without.metrics | result.pairs.metrics
    assert result.pairs.not_measurable == [1e-6]
    assert "tar@far=1e-6" not in result.metrics
    assert result.fingerprint != without.fingerprint
    assert "pairs" not in without.protocol  # as before there were any
    assert "pairs" not in json.loads(without.to_json())
    again = EvaluationResult.from_json(result.to_json())
    assert again == result
    assert again.to_json() == result.to_json()


def test_queries_with_a_gallery_are_compared_with_it_alone() -> None:
    rows, labels = random_rows(80, 8, num_classes=12, noise=0.8)
    is_query = torch.arange(80) < 30
    settings = Settings(kmeans_seeds=(), pairs=PairSettings(False, (0.01, 0.1)))
    result = evaluate_table(
        table_of(rows, labels), context=single_process(), settings=settings, roles=Roles(is_query, ~is_query)
    )
    check = verify_all(
        Pairs(rows[:30], labels[:30], rows[30:], labels[30:]), fars=(0.01, 0.1), context=single_process()
    )
    assert result.pairs == check


def test_a_verification_set_has_metrics_of_its_pairs_only_and_leaves_out_damaged_images() -> None:
    rows, _ = random_rows(60, 8, num_classes=20, noise=0.5)
    ids = np.delete(np.arange(61), 7)  # image 7 is damaged
    generator = np.random.default_rng(0)
    listed = np.stack(
        [generator.integers(0, 61, 200), generator.integers(0, 61, 200), np.arange(200) % 2, np.arange(200) // 20], 1
    )
    settings = Settings(pairs=PairSettings(True, (0.1,)))
    result = evaluate_table(table_of(rows, ids, ids), context=single_process(), settings=settings, listed_p4=listed)
    kept = (listed[:, :2] != 7).all(axis=1)
    place = {number: row for row, number in enumerate(ids.tolist())}
    scores = np.array([float(rows[place[a]].astype(float) @ rows[place[b]].astype(float)) for a, b, *_ in listed[kept]])
    expected = verify_listed(scores, listed[kept, 2] == 1, listed[kept, 3], fars=(0.1,))
    assert result.pairs == expected._replace(num_left_out=int((~kept).sum()))
    assert result.metrics == expected.metrics
    assert result.pairs.num_left_out > 0
    assert (result.bounds, result.recall_at_1_bounds, result.num_queries, result.num_lone) == ({}, None, 0, 60)
    assert EvaluationResult.from_json(result.to_json()) == result


def test_a_verification_set_is_evaluated_from_its_shards(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    index = write_noise_shards(tmp_path, [1] * 24)
    pairs = np.stack([*generator.integers(0, 24, (2, 60)), np.arange(60) % 2, np.arange(60) % 10], 1)
    document = json.loads((tmp_path / "index.json").read_text())
    lines = ["first\tsecond\tsame\tfold", *("\t".join(map(str, pair)) for pair in pairs.tolist())]
    table = "\n".join(lines) + "\n"
    (tmp_path / "index.pairs.test.tsv").write_text(table)
    digest = hashlib.sha256(table.encode()).hexdigest()
    document["splits"]["test"]["pairs"] = {"file": "index.pairs.test.tsv", "sha256": digest, "num_pairs": 60}
    (tmp_path / "index.json").write_text(json.dumps(document))

    def evaluated(index: ShardIndex) -> EvaluationResult:
        transform = build_transform(ResizeConfig(name="resize", size=SIDE))
        settings = Settings(pairs=PairSettings(True, (0.1, 0.01)))
        return evaluate(
            Projection(), Split(index), PassSettings(transform), context=single_process(), settings=settings
        )

    result = evaluated(open_index(tmp_path, "test"))
    assert result.table is not None
    assert result.pairs is not None
    rows = round_rows(result.table.embeddings.numpy()).astype(np.float64)
    scores = (rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(axis=1)
    expected = verify_listed(scores, pairs[:, 2] == 1, pairs[:, 3], fars=(0.1, 0.01))
    assert result.pairs == expected
    assert set(result.metrics) == {"tar@far=1e-1", "pair_accuracy", "pair_accuracy_sd"}
    assert result.protocol["pairs"]["of"] == "listed"
    with pytest.raises(ValueError, match="has no pairs"):
        evaluated(index)


def test_what_pairs_cannot_measure_is_refused_before_images_are_embedded() -> None:
    labels, everyone = np.array([0, 0, 1, 1, 1]), np.ones(5, dtype=bool)
    settings = Settings(recall_at=(1,), pairs=PairSettings(False, (0.1, 0.2), "tar@far=1e-1"))
    with pytest.raises(ValueError, match=r"checkpoint.keep_best is 'tar@far=1e-1', .* got 6;"):
        check_settings(labels, settings, everyone, everyone)  # 6 pairs of different classes
    needs_less = settings._replace(pairs=PairSettings(False, (0.1, 0.2), "tar@far=2e-1"))
    check_settings(labels, needs_less, everyone, everyone)
    with pytest.raises(ValueError, match=r"evaluation.pairs needs pairs of different classes"):
        check_settings(np.zeros(5, dtype=int), needs_less, everyone, everyone)
    is_query = np.array([True, False, True, False, False])  # 2 x 3 pairs, 3 of them of the same class
    with pytest.raises(ValueError, match=r"checkpoint.keep_best .* got 3;"):
        check_settings(labels, needs_less, is_query, ~is_query)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pairs: pairs.pop("roc"),
        lambda pairs: pairs.update(num_same="many"),
        lambda pairs: pairs.update(points=[{"far": 1}]),
        lambda pairs: pairs["histogram"]["same"].append(1),
        lambda pairs: pairs.update(num_different=0),
    ],
)
def test_damaged_pairs_of_a_stored_result_are_found(damage: Any) -> None:
    rows, labels = random_rows(40, 8, num_classes=8, noise=0.8)
    settings = Settings(kmeans_seeds=(), pairs=PairSettings(False, (0.1,)))
    result = evaluate_table(table_of(rows, labels), context=single_process(), settings=settings)
    document = json.loads(result.to_json())
    damage(document["pairs"])
    with pytest.raises(ValueError, match="JSON of an evaluation"):
        EvaluationResult.from_json(json.dumps(document))


def test_the_configuration_says_what_pairs_give() -> None:
    raw = json.loads(CONFIG.read_text())

    def parsed(pairs: Any, **checkpoint: Any) -> Any:
        changed = raw | {"evaluation": raw.get("evaluation", {}) | {"pairs": pairs}}
        changed["checkpoint"] = raw.get("checkpoint", {}) | checkpoint
        return parse_config(changed, source="test").evaluation

    assert parsed(None).pairs is None
    assert parsed({}).metrics[-6:] == [f"tar@far=1e-{n}" for n in (6, 5, 4, 3, 2, 1)]
    listed = {"of": "listed", "far": [0.1]}
    assert parsed(listed, keep_best="pair_accuracy").metrics[-2:] == ["tar@far=1e-1", "pair_accuracy"]
    for far in ([], [0.0], [1.0], [0.1, 0.1], [float("inf")]):
        with pytest.raises(ValueError, match=r"far|configuration"):
            parsed({"far": far})
    with pytest.raises(ValueError, match=r"keep_best is 'pair_accuracy'"):
        parsed({"of": "all"}, keep_best="pair_accuracy")


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    bincount = torch.bincount

    def counted(values: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, values.numel())
        return bincount(values, **options)

    monkeypatch.setattr(verification.torch, "bincount", counted)
    rows, labels = random_rows(700, 4, num_classes=5, noise=0.8)
    verify_all(Pairs(rows, labels), fars=FARS, context=single_process(), tile=(64, 64))
    assert 0 < largest <= 64 * 64
