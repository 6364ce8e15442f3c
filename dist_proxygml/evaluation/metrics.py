"""Retrieval metrics from the ranks of right answers, clustering metrics from labels and clusters.

    rank_j         position (from 1) of a query's j-th right answer among all gallery images but itself; where there are
                   cameras, also but those of its class by its own one (re-identification: Zheng et al., ICCV 2015)
    R              number of its right answers
    Recall@K       1 if rank_1 <= K                              in the metric-learning sense: a hit rate
    R-Precision    #{j: rank_j <= R} / R
    MAP@R          sum over rank_j <= R of j / rank_j, over R     Musgrave et al., arXiv 2003.08505
    MAP            sum over all j of j / rank_j, over R
    MRR            1 / rank_1
    precision@1    Recall@1; macro: its mean over the images of a class, then over classes

    NMI            2 I(U; V) / (H(U) + H(V))                      arithmetic averaging; geometric: I / sqrt(H(U) H(V))
    AMI            (I - E[I]) / ((H(U) + H(V)) / 2 - E[I])        Vinh, Epps, Bailey, JMLR 2010
    F1             of pairs: 2 P R / (P + R), P and R over the pairs of images that share a cluster, or a class

Recall in the sense of information retrieval (hits over R) is another number and is not offered under this name.

A result names its metrics by key ("recall@1", "map@r"), and `name_metrics` says what people read; `KEY_sd` is the
deviation of KEY over seeds, not a metric of its own.

Dimension key: q queries, p right answers of all queries, n images.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

NEVER = np.iinfo(np.int64).max  # the rank of a right answer that does not exist


class QueryScores(NamedTuple):
    """Per-query values from which metrics are computed."""

    first_rank: Int[np.ndarray, " q"]  # rank_1
    r_precision: Float[np.ndarray, " q"]
    map_at_r: Float[np.ndarray, " q"]
    map: Float[np.ndarray, " q"]


def count_positives(labels_n: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """R of every image when each is compared with all others: how many of them share its label."""
    _, class_n, counts = np.unique(labels_n, return_inverse=True, return_counts=True)
    return np.asarray(counts[class_n] - 1)


def count_right_answers(
    labels_n: Int[np.ndarray, " n"],
    is_gallery_n: Bool[np.ndarray, " n"],
    cameras_n: Int[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " n"]:
    """R of every image when it asks: gallery images of its label but itself; with cameras those by other cameras."""

    def in_gallery(groups_n: np.ndarray) -> np.ndarray:
        _, group_n = np.unique(groups_n, axis=0, return_inverse=True)
        return np.asarray(np.bincount(group_n[is_gallery_n], minlength=group_n.max(initial=-1) + 1)[group_n])

    if cameras_n is None:
        return in_gallery(labels_n) - is_gallery_n
    return in_gallery(labels_n) - in_gallery(np.stack([labels_n, cameras_n], axis=1))


def score_queries(query_p: Int[np.ndarray, " p"], rank_p: Int[np.ndarray, " p"], *, num_queries: int) -> QueryScores:
    """The scores of each query. Sums go over a query's right answers in order, so they do not depend on other queries.

    Args:
        query_p: the query of each right answer, ascending from 0; each query has at least one.
        rank_p: ranks, ascending within a query.
        num_queries: number of queries.
    """
    num_right_q = np.bincount(query_p, minlength=num_queries)
    starts_q = np.cumsum(num_right_q) - num_right_q
    within_p = np.arange(len(query_p)) - starts_q[query_p] + 1
    assert num_queries == 0 or (num_right_q.min() >= 1 and (rank_p >= within_p).all())
    precision_p = within_p / rank_p
    counted_p = rank_p <= num_right_q[query_p]

    def mean_over_right_answers(values_p: np.ndarray) -> np.ndarray:
        return np.asarray(np.bincount(query_p, weights=values_p, minlength=num_queries) / num_right_q)

    return QueryScores(
        first_rank=rank_p[starts_q],
        r_precision=mean_over_right_answers(counted_p),
        map_at_r=mean_over_right_answers(counted_p * precision_p),
        map=mean_over_right_answers(precision_p),
    )


def query_metrics(scores: QueryScores, *, recall_at: Sequence[int]) -> dict[str, Float[np.ndarray, " q"]]:
    """The value of each query under the metrics that are means over queries, by name."""
    found = {f"recall@{k}": (scores.first_rank <= k).astype(np.float64) for k in recall_at}
    found |= {"r_precision": scores.r_precision, "map@r": scores.map_at_r}
    return found | {"map": scores.map, "mrr": 1 / scores.first_rank}


def retrieval_metrics(
    scores: QueryScores,
    labels_q: Int[np.ndarray, " q"],
    *,
    recall_at: Sequence[int],
    seen_q: Bool[np.ndarray, " q"] | None = None,
) -> dict[str, float]:
    """The metrics over all queries, by name; of queries of trained classes (`seen_q`) and of others where there are
    both, Recall@1 apart.
    """
    hit_q = scores.first_rank == 1
    _, class_q = np.unique(labels_q, return_inverse=True)
    class_means = np.bincount(class_q, weights=hit_q) / np.bincount(class_q)
    found = {name: exact_mean(values_q) for name, values_q in query_metrics(scores, recall_at=recall_at).items()}
    found["precision@1_macro"] = exact_mean(class_means)
    if seen_q is not None and seen_q.any() and not seen_q.all():
        found |= {"recall@1_seen": exact_mean(hit_q[seen_q]), "recall@1_unseen": exact_mean(hit_q[~seen_q])}
    return found


def rank_without_first_column(
    query_p: Int[np.ndarray, " p"], place_p: Int[np.ndarray, " p"], *, num_queries: int
) -> Int[np.ndarray, " q"]:
    """Rank of the first right answer of each query, when "self" is excluded by dropping the first of K + 1 results as
    the published evaluation of Stanford Online Products does; NEVER if there is none.

    Where a copy of the query comes first, the copy is dropped, and the query itself stays and counts as a right answer.

    Args:
        query_p: the query of each image of its class, the query itself included; ascending.
        place_p: positions (from 1) among all images, the query included.
        num_queries: number of queries.
    """
    first_q = np.full(num_queries, NEVER)
    kept_p = place_p >= 2
    np.minimum.at(first_q, query_p[kept_p], place_p[kept_p] - 1)
    return first_q


def cluster_with_restarts(
    points_nD: Float[np.ndarray, "n D"], *, num_clusters: int, seed: int
) -> Int[np.ndarray, " n"]:
    """k-means by scikit-learn: k-means++, the best of ten starts; the cluster of each point."""
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(points_nD)).astype(np.int64)


def normalized_mutual_information(
    labels_n: Int[np.ndarray, " n"], clusters_n: Int[np.ndarray, " n"], *, average: str = "arithmetic"
) -> float:
    """NMI of a clustering, by scikit-learn."""
    from sklearn.metrics import normalized_mutual_info_score  # a slow import that only clustering needs

    return float(normalized_mutual_info_score(labels_n, clusters_n, average_method=average))


def adjusted_mutual_information(labels_n: Int[np.ndarray, " n"], clusters_n: Int[np.ndarray, " n"]) -> float:
    """AMI of a clustering with arithmetic averaging.

    As scikit-learn's, but for the expected mutual information: it depends on the sizes of a class and a cluster alone,
    and there are few different ones, where scikit-learn goes over all pairs of them (half a minute for 11,316 classes).
    """
    from sklearn.metrics import mutual_info_score

    class_sizes, cluster_sizes = (np.unique(part, return_counts=True)[1] for part in (labels_n, clusters_n))
    if len(class_sizes) == len(cluster_sizes) and len(class_sizes) in (1, len(labels_n)):
        return 1.0  # one cluster, or one for each image, on both sides: there is nothing to adjust
    expected = _expected_mutual_information(class_sizes, cluster_sizes)
    mean_entropy = (_entropy(class_sizes) + _entropy(cluster_sizes)) / 2
    denominator = mean_entropy - expected
    epsilon = float(np.finfo(np.float64).eps)
    denominator = min(denominator, -epsilon) if denominator < 0 else max(denominator, epsilon)
    return float((mutual_info_score(labels_n, clusters_n) - expected) / denominator)


def pairwise_f1(labels_n: Int[np.ndarray, " n"], clusters_n: Int[np.ndarray, " n"]) -> float:
    """F1 of the pairs of images that share a cluster against those that share a class; 0 where no pair shares both."""
    from sklearn.metrics.cluster import pair_confusion_matrix

    (_, false_positive), (false_negative, true_positive) = pair_confusion_matrix(labels_n, clusters_n).tolist()
    return 2 * true_positive / (2 * true_positive + false_positive + false_negative) if true_positive else 0.0


def _entropy(sizes: Int[np.ndarray, " c"]) -> float:
    shares = sizes / sizes.sum()
    return -math.fsum((shares * np.log(shares)).tolist())


def _expected_mutual_information(class_sizes: Int[np.ndarray, " u"], cluster_sizes: Int[np.ndarray, " v"]) -> float:
    """Mean mutual information of all clusterings with these sizes (hypergeometric model of randomness)."""
    from scipy.special import gammaln

    num_images = int(class_sizes.sum())
    log_factorial = gammaln(np.arange(num_images + 1) + 1)
    terms = []
    different_clusters, cluster_counts = np.unique(cluster_sizes, return_counts=True)
    for a, num_a in zip(*np.unique(class_sizes, return_counts=True), strict=True):
        for b, num_b in zip(different_clusters, cluster_counts, strict=True):
            shared = np.arange(max(1, a + b - num_images), min(a, b) + 1)
            log_probability = (
                log_factorial[[a, b, num_images - a, num_images - b]].sum()
                - log_factorial[num_images]
                - log_factorial[shared]
                - log_factorial[a - shared]
                - log_factorial[b - shared]
                - log_factorial[num_images - a - b + shared]
            )
            information = shared / num_images * np.log(num_images * shared / (float(a) * float(b)))
            terms.append(float(num_a) * float(num_b) * math.fsum((information * np.exp(log_probability)).tolist()))
    return math.fsum(terms)


def exact_mean(values_q: Float[np.ndarray, " q"]) -> float:
    """The mean with one rounding: independent of the order and the grouping of the values."""
    return math.fsum(values_q.tolist()) / len(values_q)


# ---- names -----------------------------------------------------------------------------------------------------------

_CLUSTERS = "k-means clusters, as many as classes, against the classes"


class MetricName(NamedTuple):
    """A metric for people."""

    key: str
    label: str
    meaning: str


_NAMES = (
    MetricName("recall@", "Recall@{}", "queries with a right answer among the first {}"),
    MetricName("recall@1_seen", "Recall@1, seen", "Recall@1 of the queries of trained classes"),
    MetricName("recall@1_unseen", "Recall@1, unseen", "Recall@1 of the queries of classes that were not trained"),
    MetricName("precision@1_macro", "Precision@1, classes", "Recall@1 with every class counting the same"),
    MetricName("r_precision", "R-Precision", "right answers among the first R, where a query has R of them"),
    MetricName("map@r", "MAP@R", "as R-Precision, earlier right answers counting more"),
    MetricName("map", "MAP", "precision at each right answer, wherever it comes, averaged"),
    MetricName("mrr", "MRR", "1 over the position of the first right answer"),
    MetricName("nmi", "NMI", f"mutual information of {_CLUSTERS}"),
    MetricName("ami", "AMI", f"as NMI, less what chance gives: {_CLUSTERS}"),
    MetricName("f1", "F1", f"pairs of images that are together in both: {_CLUSTERS}"),
    MetricName("pair_accuracy", "Pair accuracy", "listed pairs decided rightly by the threshold of the other folds"),
    MetricName("legacy_recall@", "Recall@{} as published", "what the authors' evaluation gives for Recall@{}"),
    MetricName("legacy_nmi", "NMI as published", "what the authors' evaluation gives for NMI"),
)


def _tar_name(key: str) -> MetricName:
    far = key.partition("=")[2]
    meaning = f"pairs of the same class accepted, where at most {far} of the pairs of different classes are"
    return MetricName(key, f"TAR at FAR {far}", meaning)


def _prefix_name(key: str, dim: str) -> MetricName:
    (name,) = name_metrics([key.rpartition("_")[0]])
    return MetricName(key, f"{name.label}, {dim} dimensions", f"{name.label} of embeddings cut to {dim} dimensions")


def name_metrics(keys: Iterable[str]) -> list[MetricName]:
    """The metrics among these keys, each once, in reading order."""
    found = set(keys)
    rates = sorted((float(key.partition("=")[2]), key) for key in found if re.fullmatch(r"tar@far=[\d.]+e-\d+", key))
    named = []
    for name in _NAMES:
        if name.key == "pair_accuracy":
            named += [_tar_name(key) for _, key in rates]
        if name.key.endswith("@"):
            cuts = sorted(int(match[1]) for key in found if (match := re.fullmatch(rf"{name.key}(\d+)", key)))
            named += [MetricName(f"{name.key}{k}", name.label.format(k), name.meaning.format(k)) for k in cuts]
        elif name.key in found:
            named.append(name)
    prefixes = sorted((int(match[2]), key) for key in found if (match := re.fullmatch(r"(.+)_dim(\d+)", key)))
    named += [_prefix_name(key, str(dim)) for dim, key in prefixes]
    known = {name.key for name in named}
    others = [key for key in sorted(found - known) if not (key.endswith("_sd") and key.removesuffix("_sd") in found)]
    return named + [MetricName(key, key, "") for key in others]
