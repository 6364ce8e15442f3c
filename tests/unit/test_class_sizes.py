"""Queries grouped by the size of their class."""

import json
import math
import time

import numpy as np
import pytest
import torch

from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.class_sizes import SizeGroup, as_document, from_document, group_by_size
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.evaluation.evaluator import EvaluationResult, Roles, Settings, evaluate_table
from dist_proxygml.evaluation.metrics import QueryScores


def scores_of(first_rank: list[int], map_at_r: list[float]) -> QueryScores:
    values = np.array(map_at_r)
    return QueryScores(np.array(first_rank), values, values, values)


def test_groups_double_and_the_last_is_open() -> None:
    sizes = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 512, 513, 1024, 1025, 10**9]
    scores = scores_of([1] * len(sizes), [0.5] * len(sizes))
    groups = group_by_size(scores, np.arange(len(sizes)), np.array(sizes))
    shown = ["0", "1", "2", "3 to 4", "5 to 8", "9 to 16", "17 to 32", "257 to 512", "513 to 1,024", "1,025 and more"]
    assert [group.sizes for group in groups] == shown
    assert [group.num_queries for group in groups] == [1, 1, 1, 2, 2, 2, 1, 1, 2, 2]


def test_a_group_is_the_mean_over_its_queries() -> None:
    """Classes 7 and 9 have 3 and 4 images, class 5 has 2; not all of them ask."""
    scores = scores_of([1, 4, 1, 2, 1], [0.5, 0.25, 1.0, 0.0, 0.75])
    found = group_by_size(scores, np.array([7, 5, 9, 9, 7]), np.array([3, 2, 4, 4, 3]))
    assert found == (SizeGroup(2, 2, 1, 1, 0.0, 0.25), SizeGroup(3, 4, 2, 4, 3 / 4, (0.5 + 1.0 + 0.0 + 0.75) / 4))
    assert from_document(json.loads(json.dumps(as_document(found)))) == found
    assert group_by_size(scores_of([], []), np.zeros(0, int), np.zeros(0, int)) == ()


def on_a_circle(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_an_evaluation_worked_out_by_hand() -> None:
    """Class 0 at 0, 1 and 40 degrees, class 1 at 41 and 80, class 2, of one image, at 42.

    First answers: 0 -> 1 right, 1 -> 0 right, 40 -> 41 wrong; 41 -> 40 (a tie with 42, the lower id) wrong, 80 -> 42
    wrong. MAP@R, R = 2 in class 0: of image 0 right (1), then right (40): 1; of 1 right, right: 1; of 40: 41 and 42
    wrong: 0. R = 1 in class 1: 0 and 0.
    """
    rows, labels = on_a_circle(0, 1, 40, 41, 80, 42), torch.tensor([0, 0, 0, 1, 1, 2])
    table = EmbeddingTable(rows, labels, torch.arange(6))
    settings = Settings(recall_at=(2,), kmeans_seeds=())
    searched = (SizeGroup(2, 2, 1, 2, 0.0, 0.0), SizeGroup(3, 4, 1, 3, 2 / 3, 2 / 3))
    result = evaluate_table(table, context=single_process(), settings=settings)
    assert result.class_sizes == {"searched": searched}
    # Class 0 was trained on 1 image, class 1 was not trained, class 2 on many.
    trained = evaluate_table(table, context=single_process(), settings=settings, trained_C=np.array([1, -1, 90]))
    groups = (SizeGroup(0, 0, 1, 2, 0.0, 0.0), SizeGroup(1, 1, 1, 3, 2 / 3, 2 / 3))
    assert trained.class_sizes == {"searched": searched, "trained": groups}
    assert EvaluationResult.from_json(trained.to_json()) == trained
    assert (trained.metrics, trained.fingerprint) == (result.metrics, result.fingerprint)
    unseen = evaluate_table(table, context=single_process(), settings=settings, trained_C=np.array([-1, -1, -1]))
    assert unseen.class_sizes == {"searched": searched}


def test_sizes_are_those_of_the_gallery_where_there_is_one() -> None:
    """A query at 0 finds its only image at 5; one of the class of 3 images at 90, 95, 50 asks at 20 and finds 5."""
    rows, labels = on_a_circle(0, 20, 5, 90, 95, 50), torch.tensor([0, 1, 0, 1, 1, 1])
    is_query = torch.tensor([True, True, False, False, False, False])
    result = evaluate_table(
        EmbeddingTable(rows, labels, torch.arange(6)),
        context=single_process(),
        settings=Settings(recall_at=(1,), kmeans_seeds=()),
        roles=Roles(is_query, ~is_query),
    )
    # The second query: wrong (5), then right (50) and right (90): (1/2 + 2/3) / 3.
    expected = pytest.approx((1 / 2 + 2 / 3) / 3)
    assert result.class_sizes["searched"] == (SizeGroup(1, 1, 1, 1, 1.0, 1.0), SizeGroup(3, 4, 1, 1, 0.0, expected))


@pytest.mark.parametrize(
    "change",
    [{"images": [1]}, {"images": ["1", 2]}, {"classes": 2.5}, {"queries": None}, {"recall@1": "0"}, {"map@r": None}],
)
def test_what_is_no_group_is_no_result(change: dict[str, object]) -> None:
    entry = as_document([SizeGroup(1, 2, 3, 4, 0.5, 0.25)])[0]
    result = {"metrics": {}, "bounds": {}, "protocol": {}}
    result |= dict.fromkeys(("num_images", "num_classes", "num_queries", "num_lone", "num_damaged"), 1)
    assert (
        len(EvaluationResult.from_json(json.dumps({**result, "class_sizes": {"searched": [entry]}})).class_sizes) == 1
    )
    with pytest.raises(ValueError, match="JSON of an evaluation"):
        EvaluationResult.from_json(json.dumps({**result, "class_sizes": {"searched": [{**entry, **change}]}}))


def test_a_million_queries_are_grouped_in_a_second_and_as_a_loop_does() -> None:
    generator = np.random.default_rng(0)
    size_c = (generator.pareto(1.0, 200_000) * 2 + 2).astype(np.int64)
    class_q = generator.integers(0, len(size_c), 1_000_000)
    first_rank, map_at_r = generator.integers(1, 4, len(class_q)), generator.random(len(class_q))
    scores = QueryScores(first_rank, map_at_r, map_at_r, map_at_r)
    started = time.process_time()
    groups = group_by_size(scores, class_q, size_c[class_q])
    assert time.process_time() - started < 3.0  # 0.6 s on a quiet core
    assert sum(group.num_queries for group in groups) == len(class_q)
    for group in groups:
        members = (size_c[class_q] >= group.first) & (size_c[class_q] <= (group.last or np.inf))
        assert group.num_queries == members.sum()
        assert group.num_classes == len(set(class_q[members].tolist()))
        assert group.recall_at_1 == (first_rank[members] == 1).sum() / members.sum()
        assert group.map_at_r == math.fsum(map_at_r[members].tolist()) / members.sum()
