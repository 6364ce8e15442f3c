"""Evaluation of a model on a split: embeddings -> ranks of right answers -> metrics, the same numbers for any number of
ranks.

Every rank embeds its part of the images; ranks are counted on all of them (`retrieval.py`), per-query numbers averaged
with one rounding, and the k-means seeds shared out. Everything after the forward pass is float32 outside autocast,
exact float64, or integers.

Images of classes without another one in the gallery have no right answer: skipped as queries, kept in the gallery as
distractors, and counted. Metrics are fractions; only what is printed for people shows percent.

`legacy_proxygml` adds the numbers that the authors' published evaluation gives, under names of their own. It differs:
a query without a right answer counts as a miss; on Stanford Online Products "self" is the first of K + 1 results,
whoever that is, and NMI is that of one faiss k-means with geometric averaging; on CUB and Cars it is that of
scikit-learn's k-means, the best of ten starts.

Dimension key: n images, Q queries of all ranks.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_long, run_together
from dist_proxygml.evaluation import metrics
from dist_proxygml.evaluation.class_sizes import SizeGroup, as_document, from_document, group_by_size
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable, PassHooks, PassSettings, Split, embed_split
from dist_proxygml.evaluation.exact import round_rows, scores_of_pairs
from dist_proxygml.evaluation.progress import Follower, progress
from dist_proxygml.evaluation.retrieval import Images, Retrieval, SearchOptions, retrieve
from dist_proxygml.evaluation.search import cluster, installed_faiss, load_faiss, searches_on_gpu
from dist_proxygml.evaluation.verification import Pairs, Verification, count_allowed, verify_all, verify_listed
from dist_proxygml.faults import fault_point
from dist_proxygml.protocols import check_counts, far_metric
from dist_proxygml.rules import check_gallery_split
from dist_proxygml.storage.files import parse_json

CLUSTERING_METRICS = ("nmi", "ami", "f1")
LEGACY_SEED = 1234  # faiss's own, which the published run on Stanford Online Products did not change


class PairSettings(NamedTuple):
    """Which pairs of images are told apart, and how."""

    are_listed: bool  # with the split; otherwise all
    fars: tuple[float, ...]
    needed: str | None = None  # a metric that must be measurable, if it is one of pairs; not recorded


class Settings(NamedTuple):
    """Settings that determine the numbers, besides the model and the images; recorded in every result."""

    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    kmeans_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # none: no clustering
    kmeans_iterations: int = 25
    kmeans_on_gpu: bool = False  # where every rank has one that faiss can use; on CPUs a seed gives the same everywhere
    tie_tolerance: float = 1e-6  # inner products of unit rows differ by less than this between machines
    protocol: str = "custom"
    legacy_proxygml: bool = False
    exclude_same: str | None = None  # "camera": images of the query's class by its own camera are no answers
    pairs: PairSettings | None = None
    prefixes: tuple[int, ...] = ()  # Recall@1 and MAP@R of so many first dimensions, brought to unit length, too


class ClassSet(NamedTuple):
    """How many of the evaluated classes the model was trained on."""

    num_seen: int
    num_unseen: int

    @property
    def kind(self) -> str:
        """closed: all of them; open: none; mixed: some."""
        return "open" if not self.num_seen else "mixed" if self.num_unseen else "closed"

    def __str__(self) -> str:
        counts = {"seen": self.num_seen, "unseen": self.num_unseen}
        shown = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        return f"{shown} classes ({self.kind} set)"

    def as_entry(self) -> dict[str, Any]:
        """The entry of a result's protocol."""
        return {"set": self.kind, "seen": self.num_seen, "unseen": self.num_unseen}


class Roles(NamedTuple):
    """Which images of a table ask, and which are searched. By default every image does both, and leaves itself out."""

    is_query: torch.Tensor  # bool [n]
    is_gallery: torch.Tensor  # bool [n]


@dataclass(frozen=True)
class EvaluationResult:
    """The numbers of one evaluation and the protocol they hold under.

    Attributes:
        metrics: fractions by name: recall@K for each K, r_precision, map@r, map, mrr, precision@1_macro; with
            clustering nmi, ami, f1 (means over the seeds) and nmi_sd, ... (sample standard deviations, 0 for one seed);
            recall@1_dim64 and map@r_dim64 of a prefix of 64 dimensions;
            where some classes were trained, recall@1_seen and recall@1_unseen of the queries of either kind;
            tar@far=F and pair_accuracy, legacy_recall@K and legacy_nmi where they were asked for.
        bounds: of each retrieval metric, and of recall@1 in any case: if every tie went wrong, if every tie went right.
            Of a verification set, where no image has another of its class, there are metrics of pairs only.
        num_images: evaluated images, queries and gallery together.
        num_classes: classes with at least one image.
        num_queries: queries with a right answer in the gallery.
        num_lone: queries without one, which are skipped; with every image against all others also the number of
            classes with one image.
        num_damaged: damaged images of the split, skipped altogether.
        protocol: what two results must share to be compared.
        table: the embeddings that were evaluated; not part of the JSON nor of equality.
        pairs: how well scores tell pairs of images apart, where it was asked for.
        class_sizes: the queries by the number of images of their class: "searched" of those that are searched, and,
            where a class was trained, "trained" of those that were trained on.
    """

    metrics: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    num_images: int
    num_classes: int
    num_queries: int
    num_lone: int
    num_damaged: int
    protocol: dict[str, Any]
    table: EmbeddingTable | None = field(default=None, repr=False, compare=False)
    pairs: Verification | None = None
    class_sizes: Mapping[str, tuple[SizeGroup, ...]] = field(default_factory=dict)

    @property
    def recall_at_1_bounds(self) -> tuple[float, float] | None:
        """Recall@1 if every tie went wrong and if every tie went right; None without retrieval."""
        return self.bounds.get("recall@1")

    @property
    def is_across_cameras(self) -> bool:
        """Whether images of a query's class by its own camera were left out; MAP is the usual number then."""
        return bool(self.protocol.get("self", "").endswith("camera"))

    @property
    def class_set(self) -> ClassSet | None:
        """How many classes were trained; None: unknown, or stored before this was recorded."""
        found = self.protocol.get("classes")
        return None if found is None else ClassSet(found["seen"], found["unseen"])

    @property
    def fingerprint(self) -> str:
        """sha256 of the protocol: two results with other fingerprints measure different things."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The result as a JSON document; floats come back to the last digit."""
        document = {
            "metrics": self.metrics,
            "bounds": {name: list(bounds) for name, bounds in self.bounds.items()},
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "num_queries": self.num_queries,
            "num_lone": self.num_lone,
            "num_damaged": self.num_damaged,
            "protocol": self.protocol,
            "fingerprint": self.fingerprint,
        }
        if self.pairs is not None:
            document["pairs"] = self.pairs.as_document()
        if self.class_sizes:
            document["class_sizes"] = {name: as_document(groups) for name, groups in self.class_sizes.items()}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "EvaluationResult":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not such a document.
        """
        try:
            document = parse_json(text)
            if "bounds" not in document:  # before there were bounds of other metrics
                document["bounds"] = {"recall@1": document["recall_at_1_bounds"]}
            if not all(isinstance(value, int | float) for value in document["metrics"].values()):
                raise TypeError("a metric is no number")
            counted = document["protocol"].get("classes", {"seen": 0, "unseen": 0})
            if not all(type(counted[name]) is int for name in ("seen", "unseen")):
                raise TypeError("a number of classes is no number")
            return cls(
                metrics=dict(document["metrics"]),
                bounds={name: (low, high) for name, (low, high) in document["bounds"].items()},
                num_images=document["num_images"],
                num_classes=document["num_classes"],
                num_queries=document["num_queries"],
                num_lone=document["num_lone"],
                num_damaged=document["num_damaged"],
                protocol=dict(document["protocol"]),
                pairs=Verification.from_document(document["pairs"]) if "pairs" in document else None,
                class_sizes={name: from_document(of) for name, of in document.get("class_sizes", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"expected the JSON of an evaluation, got something else ({type(error).__name__}: {error}); run the "
                "evaluation again to write it"
            ) from error


def evaluate(
    model: nn.Module,
    split: Split,
    embedding: PassSettings,
    *,
    context: ParallelContext,
    gallery: Split | None = None,
    settings: Settings = Settings(),  # noqa: B008 - it cannot be changed
    options: SearchOptions = SearchOptions(),  # noqa: B008
    hooks: PassHooks = PassHooks(),  # noqa: B008
) -> EvaluationResult:
    """Evaluate a model on a split, every image querying all the others, or all images of another split.

    Called on all ranks; returns the same result on all of them, `table` included.

    Args:
        model: images uint8 [b, 3, H, W] -> embeddings [b, D], on `context.device`. Its modules keep their modes.
        split: the images; the queries, if there is a `gallery`.
        embedding: how they become rows.
        context: this process among its peers.
        gallery: the split that is searched, with the same classes; None: the split itself. Its images follow those of
            `split` in the table, with ids that continue theirs.
        settings: what to measure; the numbers of images and classes of a published protocol are insisted on.
        options: how to search; no number depends on it.
        hooks: requests to stop, blocks and progress messages. With blocks an interrupted evaluation resumes.

    Raises:
        StopRequested: on every rank: a rank was asked to stop while images were embedded or clustered.
        ValueError: on every rank: a damaged image or too many, no usable faiss, embeddings that are zero or not
            finite, a `recall_at` the split cannot give, no query with a right answer, or not the protocol's images.
    """
    index = split.index
    run_together(context, check_split, index, None if gallery is None else gallery.index, settings)
    tables, left_out = [], []
    for part in (split, gallery):
        if part is None:
            continue
        table = embed_split(model, part, embedding, context=context, hooks=hooks)
        offset = index.num_samples if part is gallery else 0
        missing = sorted(set(range(part.index.num_samples)) - set(table.ids.tolist()))
        left_out += [offset + missing_id for missing_id in missing]
        tables.append(table._replace(ids=table.ids + offset))
    table = EmbeddingTable(*(torch.cat(parts) for parts in zip(*tables, strict=True))) if gallery else tables[0]
    data = {
        "dataset": index.dataset,
        "split": index.split,
        "gallery_split": None if gallery is None else gallery.index.split,
        "index_sha256": index.sha256,
        "class_table_sha256": index.class_table_sha256,
        "images_built_with": run_together(context, index.build_record),
        "preprocessing": None if embedding.preprocessing is None else dict(embedding.preprocessing),
        "left_out": left_out,
        "forward_batch_size": embedding.batch_size,
        "weights": sorted({str(parameter.dtype) for parameter in model.parameters()}),
    }
    roles = None if gallery is None else Roles(table.ids < index.num_samples, table.ids >= index.num_samples)
    cameras_n = None
    if settings.exclude_same is not None:
        cameras_n = _cameras(index, None if gallery is None else gallery.index)[table.ids.numpy()]
    is_listed = settings.pairs is not None and settings.pairs.are_listed
    result = evaluate_table(
        table,
        context=context,
        settings=settings,
        options=options,
        roles=roles,
        cameras_n=cameras_n,
        seen_C=split.seen,
        trained_C=split.trained_images,
        listed_p4=run_together(context, index.read_pairs) if is_listed else None,
        data=data,
        hooks=hooks,
    )
    return dataclasses.replace(result, num_damaged=len(left_out))


def evaluate_table(
    table: EmbeddingTable,
    *,
    context: ParallelContext,
    settings: Settings,
    options: SearchOptions = SearchOptions(),  # noqa: B008
    roles: Roles | None = None,
    cameras_n: np.ndarray | None = None,
    seen_C: np.ndarray | None = None,
    trained_C: np.ndarray | None = None,
    listed_p4: np.ndarray | None = None,
    data: Mapping[str, Any] | None = None,
    hooks: PassHooks = PassHooks(),  # noqa: B008
) -> EvaluationResult:
    """The metrics of embeddings that every rank holds. Called on all ranks; returns the same result on all of them.

    Args:
        table: the same on every rank, as `embed` returns it: rows of unit length, ids ascending and unique.
        roles: which images ask and which are searched; None: all do both.
        cameras_n: the camera of each row, int; needed with `exclude_same`, and used with nothing else.
        seen_C: bool by label, which classes were trained; None: unknown.
        trained_C: int by label, how many images of each class were trained on, none where negative; None: unknown.
        listed_p4: the listed pairs, int64: first and second id, 1 for the same class, fold. Those of which an image is
            missing are left out.
        data: where the embeddings come from, for the record.
        context, settings, options, hooks: as in `evaluate`.

    Raises:
        StopRequested: on every rank: a rank was asked to stop while points were clustered.
        ValueError: on every rank: no usable faiss, a `recall_at` the split cannot give, rows that are not of unit
            length, or no query with a right answer.
    """
    labels_n = table.labels.numpy()
    if roles is None:
        everyone_n = np.ones(len(labels_n), dtype=bool)
        is_query_n, is_gallery_n = everyone_n, everyone_n
    else:
        is_query_n, is_gallery_n = (role.numpy() for role in roles)
    if settings.exclude_same is None:
        cameras_n = None
    if settings.kmeans_seeds and settings.kmeans_on_gpu:
        are_there = all_gather_object(context, run_together(context, searches_on_gpu, context.device))
        settings = settings._replace(kmeans_on_gpu=all(are_there))
    run_together(context, check_settings, labels_n, settings, is_query_n, is_gallery_n, cameras_n)

    fault_point("evaluate.search")
    _, class_n = np.unique(labels_n, return_inverse=True)
    rows_nD = run_together(context, round_rows, table.embeddings.numpy())
    measured: dict[str, float] = {}
    bounds: dict[str, tuple[float, float]] = {}
    class_sizes: dict[str, tuple[SizeGroup, ...]] = {}
    found = None

    def agree() -> None:
        if hooks.signals is not None:
            hooks.signals.agree(context)

    if has_right_answers(labels_n, is_query_n, is_gallery_n, cameras_n):
        # 1. Retrieval.
        search = functools.partial(
            retrieve,
            tolerance=settings.tie_tolerance,
            context=context,
            options=options,
            say=hooks.say,
            follower=hooks.follower,
        )
        images = Images(rows_nD, class_n, is_query_n, is_gallery_n, cameras_n)
        found = search(images, with_self=_drops_first_column(settings))
        measured, bounds = _retrieval_metrics(found, labels_n, settings, seen_C)
        searched_C = np.bincount(labels_n[is_gallery_n], minlength=int(labels_n.max()) + 1)
        for name, num_images_C in (("searched", searched_C), ("trained", trained_C)):
            if num_images_C is not None and (num_images_C[labels_n] > 0).any():
                label_q = labels_n[found.position]
                class_sizes[name] = group_by_size(found.exact, label_q, np.maximum(num_images_C[label_q], 0))
        for dim in settings.prefixes:
            rows_nd = run_together(context, _prefix_rows, table, dim)
            scores = search(images._replace(rows=rows_nd), with_self=False).exact
            of_query = metrics.query_metrics(scores, recall_at=(1,))
            measured |= {f"{name}_dim{dim}": metrics.exact_mean(of_query[name]) for name in ("recall@1", "map@r")}

        # 2. Clustering: each seed on one rank, its numbers on all of them.
        if settings.kmeans_seeds:
            clusterings = _clusterings(
                table, context=context, settings=settings, meanwhile=agree, follower=hooks.follower
            )
            for name, values in zip(CLUSTERING_METRICS, clusterings, strict=True):
                measured[name] = statistics.fmean(values)
                measured[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0

    # 3. Pairs.
    verified = None
    if settings.pairs is not None:
        verified = _verify(rows_nD, table, (is_query_n, is_gallery_n), listed_p4, settings.pairs, context, agree)
        measured |= verified.metrics

    # 4. What the published evaluation would say.
    if settings.legacy_proxygml and found is not None:
        num_queries = int(is_query_n.sum())
        measured |= _legacy_metrics(
            found, table, num_queries=num_queries, context=context, settings=settings, meanwhile=agree
        )

    num_answered = 0 if found is None else len(found.position)
    counts = {
        "images": len(labels_n),
        "classes": int(class_n.max()) + 1,
        "queries": num_answered,
        "queries_without_right_answer": int(is_query_n.sum()) - num_answered,
        "gallery": int(is_gallery_n.sum()),
    }
    return EvaluationResult(
        metrics=measured,
        bounds=bounds,
        num_images=counts["images"],
        num_classes=counts["classes"],
        num_queries=counts["queries"],
        num_lone=counts["queries_without_right_answer"],
        num_damaged=0,
        protocol=_protocol(settings, counts, data or {}, _count_classes(labels_n, seen_C)),
        pairs=verified,
        class_sizes=class_sizes,
        table=table,
    )


def _prefix_rows(table: EmbeddingTable, dim: int) -> np.ndarray:
    """The first dimensions of all embeddings, brought to unit length and rounded as whole ones are."""
    return round_rows(F.normalize(table.embeddings[:, :dim], dim=1).numpy())


def _retrieval_metrics(
    found: Retrieval, labels_n: np.ndarray, settings: Settings, seen_C: np.ndarray | None
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The metrics in the exact order, and with ties at their worst and at their best."""
    recall_at = dict.fromkeys((*settings.recall_at, 1))
    exact, worst, best = (
        metrics.retrieval_metrics(
            scores,
            labels_n[found.position],
            recall_at=tuple(recall_at),
            seen_q=None if seen_C is None else seen_C[labels_n[found.position]],
        )
        for scores in (found.exact, found.worst, found.best)
    )
    bounds = {name: (worst[name], best[name]) for name in exact}
    wanted = {name: value for name, value in exact.items() if name != "recall@1" or 1 in settings.recall_at}
    return wanted, bounds


def _clusterings(
    table: EmbeddingTable,
    *,
    context: ParallelContext,
    settings: Settings,
    meanwhile: Callable[[], object],
    follower: Follower | None,
) -> tuple[list[float], ...]:
    """NMI, AMI and F1 of each seed, in the order of the seeds; rank r computes seeds r, r + W, ... Called on all
    ranks.
    """
    embeddings_nD, labels_n = table.embeddings.numpy(), table.labels.numpy()
    num_clusters = len(np.unique(labels_n))

    def measure() -> dict[int, tuple[float, ...]]:
        of_own_seeds: dict[int, tuple[float, ...]] = {}
        own_seeds = settings.kmeans_seeds[context.rank :: context.world_size]
        with progress(
            "clustering", len(own_seeds), unit=" seeds", is_shown=context.is_main, follower=follower
        ) as advance:
            for seed in own_seeds:
                clusters_n = cluster(
                    embeddings_nD,
                    num_clusters=num_clusters,
                    seed=seed,
                    num_iterations=settings.kmeans_iterations,
                    device=context.device if settings.kmeans_on_gpu else None,
                )
                of_own_seeds[seed] = (
                    metrics.normalized_mutual_information(labels_n, clusters_n),
                    metrics.adjusted_mutual_information(labels_n, clusters_n),
                    metrics.pairwise_f1(labels_n, clusters_n),
                )
                advance(1)
        return of_own_seeds

    local = run_long(context, measure, meanwhile=meanwhile)
    of_seed = {seed: numbers for part in all_gather_object(context, local) for seed, numbers in part.items()}
    return tuple(list(values) for values in zip(*(of_seed[seed] for seed in settings.kmeans_seeds), strict=True))


def _verify(
    rows_nD: np.ndarray,
    table: EmbeddingTable,
    roles: tuple[np.ndarray, np.ndarray],
    listed_p4: np.ndarray | None,
    wanted: PairSettings,
    context: ParallelContext,
    meanwhile: Callable[[], object],
) -> Verification:
    """Tell pairs apart: the listed ones, else each two images, or each query and each image of the gallery. Called on
    all ranks.
    """
    if listed_p4 is not None:
        return run_together(context, _verify_listed, rows_nD, table.ids.numpy(), listed_p4, wanted.fars)
    labels_n, (is_query_n, is_gallery_n) = table.labels.numpy(), roles
    pairs = Pairs(rows_nD, labels_n)
    if not is_query_n.all():
        gallery = np.flatnonzero(is_gallery_n)
        place_n = np.full(len(labels_n), -1)
        place_n[gallery] = np.arange(len(gallery))
        pairs = Pairs(
            rows_nD[is_query_n], labels_n[is_query_n], rows_nD[gallery], labels_n[gallery], place_n[is_query_n]
        )
    return verify_all(pairs, fars=wanted.fars, context=context, meanwhile=meanwhile)


def _verify_listed(
    rows_nD: np.ndarray, ids_n: np.ndarray, listed_p4: np.ndarray, fars: tuple[float, ...]
) -> Verification:
    first_p, second_p, same_p, fold_p = listed_p4[np.isin(listed_p4[:, :2], ids_n).all(axis=1)].T
    first_p, second_p = (np.searchsorted(ids_n, ids_p) for ids_p in (first_p, second_p))
    score_p = scores_of_pairs(rows_nD, rows_nD, first_p, second_p)
    verified = verify_listed(score_p, same_p == 1, fold_p, fars=fars)
    return verified._replace(num_left_out=len(listed_p4) - len(score_p))


def _legacy_metrics(
    found: Retrieval,
    table: EmbeddingTable,
    *,
    num_queries: int,
    context: ParallelContext,
    settings: Settings,
    meanwhile: Callable[[], object],
) -> dict[str, float]:
    """Compute the metrics of the authors' evaluation of this protocol. Called on all ranks."""
    first_rank = found.first_column_dropped if _drops_first_column(settings) else found.exact.first_rank
    assert first_rank is not None
    measured = {f"legacy_recall@{k}": int((first_rank <= k).sum()) / num_queries for k in settings.recall_at}
    if settings.kmeans_seeds:
        is_last = context.rank == context.world_size - 1  # it has the fewest seeds
        nmi = run_long(context, lambda: _legacy_nmi(table, settings) if is_last else None, meanwhile=meanwhile)
        measured["legacy_nmi"] = next(value for value in all_gather_object(context, nmi) if value is not None)
    return measured


def _legacy_nmi(table: EmbeddingTable, settings: Settings) -> float:
    embeddings_nD, labels_n = table.embeddings.numpy(), table.labels.numpy()
    num_clusters = len(np.unique(labels_n))
    if _drops_first_column(settings):
        clusters_n = cluster(embeddings_nD, num_clusters=num_clusters, seed=LEGACY_SEED, num_iterations=20)
        return metrics.normalized_mutual_information(labels_n, clusters_n, average="geometric")
    clusters_n = metrics.cluster_with_restarts(embeddings_nD, num_clusters=num_clusters, seed=0)
    return metrics.normalized_mutual_information(labels_n, clusters_n)


def _drops_first_column(settings: Settings) -> bool:
    """Whether the published evaluation is wanted, and takes the first of K + 1 results for the query itself."""
    return settings.legacy_proxygml and settings.protocol == "sop"


def check_split(index: ShardIndex, gallery: ShardIndex | None, settings: Settings) -> None:
    """Find mistakes that would otherwise surface after the embedding pass.

    Raises:
        ValueError: as `evaluate`.
    """
    num_queries = index.num_samples
    labels_n = index.labels if gallery is None else np.concatenate([index.labels, gallery.labels])
    if gallery is not None and gallery.location == index.location:
        check_gallery_split(gallery.split, query_split=index.split, setting="gallery", of=f"that of {index.location}")
    if gallery is not None and gallery.class_table_sha256 != index.class_table_sha256:
        raise ValueError(
            f"expected splits {index.split!r} and {gallery.split!r} of {index.location} to share their classes, got "
            "other classes, so no query has a right answer; name two splits that belong together"
        )
    if settings.protocol != "custom":
        check_counts(
            settings.protocol,
            num_classes=len(np.unique(labels_n)),
            num_images=num_queries,
            num_gallery=None if gallery is None else gallery.num_samples,
            location=index.location,
        )
    is_query_n = np.arange(len(labels_n)) < num_queries
    cameras_n = None if settings.exclude_same is None else _cameras(index, gallery)
    check_settings(labels_n, settings, is_query_n, is_query_n if gallery is None else ~is_query_n, cameras_n)
    if settings.pairs is not None and settings.pairs.are_listed:
        _check_needed(settings.pairs, int((index.read_pairs()[:, 2] == 0).sum()))


def _cameras(index: ShardIndex, gallery: ShardIndex | None) -> np.ndarray:
    """The camera of every image, those of the gallery last, int32 [n]. Raises ValueError if there are none."""
    parts = []
    for one in (index, gallery):
        if one is None:
            continue
        if one.cameras is None:
            raise ValueError(
                f"evaluation.exclude_same expects the camera of every image, got none in the index of {one.location} "
                f"for split {one.split!r}; build the shards with `python -m dist_proxygml.shard build market1501` or "
                '`msmt17`, or write "camera": NUMBER into each KEY.json and run `python -m dist_proxygml.shard index`'
            )
        parts.append(one.cameras)
    return np.concatenate(parts)


def check_settings(
    labels_n: np.ndarray,
    settings: Settings,
    is_query_n: np.ndarray,
    is_gallery_n: np.ndarray,
    cameras_n: np.ndarray | None = None,
) -> None:
    """Find mistakes that would otherwise surface after the embedding pass.

    Raises:
        ValueError: as `evaluate_table`.
    """
    are_listed = settings.pairs is not None and settings.pairs.are_listed
    is_searched = has_right_answers(labels_n, is_query_n, is_gallery_n, cameras_n)
    if are_listed and not is_searched:
        return
    load_faiss()
    if settings.exclude_same is not None and cameras_n is None:
        raise ValueError("exclude_same expects the camera of every image, got none; pass cameras_n")
    has_itself = bool((is_query_n & is_gallery_n).any())
    most = int(is_gallery_n.sum()) - has_itself
    wrong = [k for k in settings.recall_at if not 1 <= k <= most]
    if wrong or not settings.recall_at:
        raise ValueError(
            f"recall_at is {list(settings.recall_at)}: expected at least one K, each from 1 to {most}, "
            f"because a query has {'the other ' if has_itself else ''}{most} images as neighbours; change "
            "evaluation.recall_at"
        )
    if not is_searched:
        what = "two images" if has_itself else "an image among the queries and one in the gallery"
        what += "" if cameras_n is None else " by two cameras"
        num_classes = len(np.unique(labels_n))
        raise ValueError(
            f"no class of the split has {what} ({len(labels_n)} images, {num_classes} classes), so no query has "
            "a right answer; evaluate a split with several images per class, or the pairs that come with a "
            "verification set: evaluation.pairs.of=listed"
        )
    if settings.pairs is not None and not are_listed:
        num_same = int((metrics.count_right_answers(labels_n, is_gallery_n) + is_gallery_n)[is_query_n].sum())
        num_different = (int(is_query_n.sum()) * int(is_gallery_n.sum()) - num_same) // (1 + has_itself)
        if num_different == 0:
            raise ValueError(
                "evaluation.pairs needs pairs of different classes, got images of one class; evaluate a split with "
                "several classes, or set it to null"
            )
        _check_needed(settings.pairs, num_different)


def has_right_answers(
    labels_n: np.ndarray, is_query_n: np.ndarray, is_gallery_n: np.ndarray, cameras_n: np.ndarray | None
) -> bool:
    """Whether any query has a right answer."""
    return bool((is_query_n & (metrics.count_right_answers(labels_n, is_gallery_n, cameras_n) > 0)).any())


def _check_needed(wanted: PairSettings, num_different: int) -> None:
    """Raise ValueError if a metric that is needed cannot be measured."""
    missing = [far_metric(far) for far in wanted.fars if not count_allowed(far, num_different)]
    if wanted.needed in missing:
        raise ValueError(
            f"checkpoint.keep_best is {wanted.needed!r}, which takes 1 / FAR pairs of different classes, got "
            f"{num_different:,}; choose by a higher FAR of evaluation.pairs.far, or by another metric"
        )


def _count_classes(labels_n: np.ndarray, seen_C: np.ndarray | None) -> ClassSet | None:
    if seen_C is None:
        return None
    is_seen = seen_C[np.unique(labels_n)]
    return ClassSet(int(is_seen.sum()), int((~is_seen).sum()))


def _protocol(
    settings: Settings, counts: Mapping[str, int], data: Mapping[str, Any], classes: ClassSet | None
) -> dict[str, Any]:
    """Everything that changes a number, in words and values; the number of ranks is not among it."""
    where = ", points assigned on a GPU" if settings.kmeans_on_gpu else ""
    clustering = {
        "algorithm": f"faiss k-means, Euclidean, all points, random start, one run a seed{where}",
        "num_iterations": settings.kmeans_iterations,
        "seeds": list(settings.kmeans_seeds),
        "num_clusters": "number of classes, queries and gallery together",
        "average": "arithmetic",
    }
    versions = {
        name: _version(name)
        for name in ("dist_proxygml", "torch", "torchvision", "timm", "pillow", "numpy", "scipy", "scikit-learn")
    }
    pairs = {} if settings.pairs is None else {"pairs": _pairs_protocol(settings.pairs)}
    prefixes = {"prefixes": list(settings.prefixes)} if settings.prefixes else {}
    return {
        "format": 2,
        "name": settings.protocol,
        "data": dict(data),
        "num": dict(counts),
        **({} if classes is None else {"classes": classes.as_entry()}),
        "embeddings": "float32, unit length",
        "scores": "inner products of rows rounded to multiples of 2^-26, exact",
        "self": "left out by id"
        + ("" if settings.exclude_same is None else f", and images of its class by its own {settings.exclude_same}"),
        "ties": "score descending, then id ascending",
        "tie_tolerance": settings.tie_tolerance,
        "lone_images": "left out as queries, kept in the gallery",
        "recall_at": list(settings.recall_at),
        "clustering": clustering if settings.kmeans_seeds else None,
        "legacy_proxygml": _legacy_protocol(settings) if settings.legacy_proxygml else None,
        **pairs,
        **prefixes,
        "versions": {**versions, "faiss": ", ".join(installed_faiss()) or "unknown"},
    }


def _pairs_protocol(wanted: PairSettings) -> dict[str, Any]:
    return {
        "of": "listed" if wanted.are_listed else "all",
        "far": list(wanted.fars),
        "accepted": "score >= threshold, the most with FAR <= the one wanted, not interpolated",
        "accuracy": "threshold of the other folds, half way between scores, the highest of the best"
        if wanted.are_listed
        else None,
    }


def _legacy_protocol(settings: Settings) -> dict[str, Any]:
    if settings.protocol == "sop":
        clustering = {"algorithm": "faiss k-means", "num_iterations": 20, "seed": LEGACY_SEED, "average": "geometric"}
        own = "the first of K + 1 results, whoever that is"
    else:
        clustering = {"algorithm": "scikit-learn KMeans, k-means++", "starts": 10, "seed": 0, "average": "arithmetic"}
        own = "left out by id"
    return {"self": own, "lone_images": "count as misses", "clustering": clustering}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
