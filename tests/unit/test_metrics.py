"""Metrics against numbers worked out by hand, scikit-learn, and pytorch-metric-learning."""

import math

import numpy as np
import pytest
import torch

from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation import metrics
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.evaluation.evaluator import Settings, evaluate_table
from dist_proxygml.evaluation.metrics import NEVER

# Two queries. First: R = 3, right answers at 2, 3 and 5. Second: R = 2, right answers at 1 and 4.
QUERY = np.array([0, 0, 0, 1, 1])
RANK = np.array([2, 3, 5, 1, 4])
SCORES = metrics.score_queries(QUERY, RANK, num_queries=2)


def test_recall_asks_for_any_right_answer_among_the_first_k() -> None:
    found = metrics.retrieval_metrics(SCORES, np.array([0, 1]), recall_at=(1, 2))
    assert (found["recall@1"], found["recall@2"]) == (0.5, 1.0)


def test_r_precision_is_the_share_of_right_answers_among_the_first_r() -> None:
    assert SCORES.r_precision.tolist() == [2 / 3, 1 / 2]


def test_map_at_r_averages_the_precision_at_right_answers_over_r() -> None:
    first = (1 / 2 + 2 / 3) / 3  # the right answer at 5 lies behind R
    second = (1 / 1) / 2  # the one at 4 as well
    assert SCORES.map_at_r == pytest.approx([first, second], abs=1e-15)


def test_map_goes_over_all_right_answers_and_mrr_over_the_first() -> None:
    expected = ((1 / 2 + 2 / 3 + 3 / 5) / 3 + (1 / 1 + 2 / 4) / 2) / 2
    found = metrics.retrieval_metrics(SCORES, np.array([0, 1]), recall_at=(1,))
    assert found["map"] == pytest.approx(expected, abs=1e-15)
    assert found["mrr"] == (1 / 2 + 1) / 2


def test_macro_precision_weighs_classes_and_not_images_alike() -> None:
    scores = metrics.score_queries(np.arange(4), np.array([1, 1, 2, 2]), num_queries=4)
    found = metrics.retrieval_metrics(scores, np.array([7, 7, 7, 2]), recall_at=(1,))
    assert found["recall@1"] == 2 / 4
    assert found["precision@1_macro"] == (2 / 3 + 0) / 2


def test_r_counts_the_others_of_the_class() -> None:
    assert metrics.count_positives(np.array([7, 3, 7, 9, 7, 3])).tolist() == [2, 1, 2, 0, 2, 1]


def test_dropping_the_first_column_may_drop_a_copy_and_count_the_query_itself() -> None:
    # Places of all images of the query's class, itself included: found first as it should be; behind a copy of another
    # class, so that it counts as a right answer at 1; and alone in its class, found first.
    query, place = np.array([0, 0, 1, 1, 2]), np.array([1, 4, 2, 9, 1])
    assert metrics.rank_without_first_column(query, place, num_queries=3).tolist() == [3, 1, NEVER]


def test_nmi_of_two_equal_halves_cut_across_is_zero_and_of_the_same_cut_is_one() -> None:
    labels = np.array([0, 0, 1, 1])
    assert metrics.normalized_mutual_information(labels, np.array([5, 5, 2, 2])) == pytest.approx(1.0)
    assert metrics.normalized_mutual_information(labels, np.array([0, 1, 0, 1])) == pytest.approx(0.0)


def test_nmi_averages_the_entropies_arithmetically_unless_told_otherwise() -> None:
    # One class split in two: I = H(classes) = ln 2, H(clusters) = (3/2) ln 2, so NMI = 2 / (1 + 3/2) = 0.8.
    labels, clusters = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    assert metrics.normalized_mutual_information(labels, clusters) == pytest.approx(0.8, abs=1e-12)
    geometric = metrics.normalized_mutual_information(labels, clusters, average="geometric")
    assert geometric == pytest.approx(1 / math.sqrt(1.5), abs=1e-12)


def test_f1_is_that_of_pairs() -> None:
    # Pairs of a cluster: (0,1), (0,2), (1,2), (3,4); of a class: (0,1), (2,3), (2,4), (3,4). Two are both.
    labels, clusters = np.array([0, 0, 1, 1, 1]), np.array([5, 5, 5, 2, 2])
    assert metrics.pairwise_f1(labels, clusters) == pytest.approx(2 * (2 / 4) * (2 / 4) / (2 / 4 + 2 / 4))
    assert metrics.pairwise_f1(np.array([0, 1]), np.array([0, 1])) == 0.0  # there are no pairs


@pytest.mark.parametrize(
    ("num_images", "num_classes", "num_clusters"),
    [(40, 5, 7), (300, 120, 90), (50, 1, 4), (50, 4, 1), (30, 30, 30), (30, 1, 1), (900, 2, 700)],
)
def test_ami_and_nmi_are_those_of_scikit_learn(num_images: int, num_classes: int, num_clusters: int) -> None:
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    generator = np.random.default_rng(num_images)
    labels = generator.permutation(np.arange(num_images) % num_classes)
    clusters = np.where(generator.random(num_images) < 0.5, labels, generator.permutation(num_images)) % num_clusters
    # The expected information is a sum of 1e5 terms of another order.
    expected = adjusted_mutual_info_score(labels, clusters)
    assert metrics.adjusted_mutual_information(labels, clusters) == pytest.approx(expected, abs=1e-10)
    expected = normalized_mutual_info_score(labels, clusters)
    assert metrics.normalized_mutual_information(labels, clusters) == pytest.approx(expected, abs=1e-12)


def test_ami_of_a_random_clustering_is_zero_where_nmi_is_not() -> None:
    generator = np.random.default_rng(0)
    labels, clusters = generator.integers(0, 2000, (2, 6000))
    assert abs(metrics.adjusted_mutual_information(labels, clusters)) < 0.01
    assert metrics.normalized_mutual_information(labels, clusters) > 0.8


def test_the_mean_does_not_depend_on_the_order_of_the_values() -> None:
    values = np.random.default_rng(0).random(1001)
    assert metrics.exact_mean(values) == metrics.exact_mean(values[::-1]) == math.fsum(values) / 1001


def test_metrics_are_those_of_pytorch_metric_learning_where_nothing_ties() -> None:
    accuracy_calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 60, (400,), generator=generator)
    centres = torch.randn(60, 24, generator=generator)[labels]
    rows = torch.nn.functional.normalize(centres + 1.5 * torch.randn(400, 24, generator=generator), dim=1)
    names = {"precision_at_1": "recall@1", "r_precision": "r_precision", "mean_average_precision_at_r": "map@r"}
    names |= {"mean_average_precision": "map", "mean_reciprocal_rank": "mrr"}
    theirs = accuracy_calculator.AccuracyCalculator(include=tuple(names), k=399, device=torch.device("cpu"))
    expected = theirs.get_accuracy(rows, labels)
    table = EmbeddingTable(rows, labels, torch.arange(400))
    ours = evaluate_table(table, context=single_process(), settings=Settings(kmeans_seeds=()))
    assert 0.3 < ours.metrics["recall@1"] < 0.9
    for their_name, our_name in names.items():
        # theirs sums in float32
        assert ours.metrics[our_name] == pytest.approx(expected[their_name], abs=1e-6), our_name
        assert ours.bounds[our_name] == pytest.approx((ours.metrics[our_name],) * 2, abs=1e-4), our_name


def test_metrics_come_in_reading_order_and_deviations_with_what_they_belong_to() -> None:
    keys = [
        "nmi",
        "nmi_sd",
        "map@r",
        "recall@10",
        "recall@2",
        "recall@1",
        "mrr",
        "odd_sd",
        "recall@1_dim64",
        "ir_recall@5",
        "legacy_recall@1",
    ]
    names = metrics.name_metrics(keys)
    assert [name.label for name in names] == [
        *("Recall@1", "Recall@2", "Recall@10", "MAP@R", "MRR", "NMI", "Recall@1 as published"),
        *("Recall@1, 64 dimensions", "ir_recall@5", "odd_sd"),
    ]
    assert names[2].meaning == "queries with a right answer among the first 10"
    assert names[-2].meaning == ""
