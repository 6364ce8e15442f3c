"""Evaluation of a model on a split: embeddings -> exact neighbours -> metrics, the same numbers for
any number of ranks.

Every rank embeds its part of the images, holds the whole gallery, and searches its share of the
query tiles; per-query numbers are gathered in id order and averaged with one rounding. The k-means
seeds are shared out over the ranks. Everything after the forward pass is float32 outside autocast,
or integers and float64. Dividing the gallery over the ranks was declined: it saves memory, not
time, and a million 128-d rows are half a gigabyte.

Classes with one image have no right answer: left out as queries, kept in the gallery as
distractors, and counted. Metrics are fractions; only what is printed for people shows percent.

Dimension key: n images, q queries of this rank, Q queries of all ranks, K neighbours.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dist_proxygml.collectives import gather_rows
from dist_proxygml.data.damage import DamageLog
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ImageCache
from dist_proxygml.data.transforms import Transform
from dist_proxygml.evaluation import metrics
from dist_proxygml.evaluation.blocks import BlockFolder
from dist_proxygml.evaluation.embed import EmbeddingTable, embed_split
from dist_proxygml.evaluation.ranking import rank_neighbours, tiles_of_rank
from dist_proxygml.evaluation.search import FlatIndex, cluster, installed_faiss, load_faiss
from dist_proxygml.faults import fault_point
from dist_proxygml.parallel import ParallelContext, everyone, run_together
from dist_proxygml.preemption import StopSignals


class Settings(NamedTuple):
    """What a number depends on besides the model and the images; recorded in every result."""

    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    kmeans_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # none: no clustering
    kmeans_iterations: int = 25
    tile_size: int = 256  # queries of one search: the last bit of a score depends on it
    tie_tolerance: float = 1e-6  # inner products of unit rows differ by less than this between machines


@dataclass(frozen=True)
class EvaluationResult:
    """The numbers of one evaluation and the protocol they hold under.

    Attributes:
        metrics: fractions by name: recall@K for each K, r_precision, map@r; with clustering nmi
            (mean over the seeds) and nmi_sd (sample standard deviation, 0 for one seed).
        recall_at_1_bounds: recall@1 if every tie went wrong and if every tie went right.
        num_images: images of the split, all of them in the gallery.
        num_classes: classes with at least one image.
        num_queries: images whose class has another image.
        num_lone: images without one; also the number of classes with one image.
        num_damaged: damaged images of the split, left out altogether.
        protocol: what two results must share to be compared.
        table: the embeddings that were evaluated; not part of the JSON nor of equality.
    """

    metrics: dict[str, float]
    recall_at_1_bounds: tuple[float, float]
    num_images: int
    num_classes: int
    num_queries: int
    num_lone: int
    num_damaged: int
    protocol: dict[str, Any]
    table: EmbeddingTable | None = field(default=None, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """sha256 of the protocol: two results with other fingerprints measure different things."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The result as a JSON document; floats come back to the last digit."""
        document = {
            "metrics": self.metrics,
            "recall_at_1_bounds": list(self.recall_at_1_bounds),
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "num_queries": self.num_queries,
            "num_lone": self.num_lone,
            "num_damaged": self.num_damaged,
            "protocol": self.protocol,
            "fingerprint": self.fingerprint,
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationResult":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not such a document.
        """
        try:
            document = json.loads(text)
            low, high = document["recall_at_1_bounds"]
            return cls(
                metrics=dict(document["metrics"]),
                recall_at_1_bounds=(low, high),
                num_images=document["num_images"],
                num_classes=document["num_classes"],
                num_queries=document["num_queries"],
                num_lone=document["num_lone"],
                num_damaged=document["num_damaged"],
                protocol=dict(document["protocol"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected the JSON of an evaluation, got something else ({type(error).__name__}: "
                f"{error}); "
                "run the evaluation again to write it"
            ) from error


def evaluate(
    model: nn.Module,
    index: ShardIndex,
    transform: Transform,
    *,
    context: ParallelContext,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    batch_size: int = 64,
    num_workers: int = 0,
    kmeans_seeds: int = 5,
    cache: ImageCache | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
    damage: DamageLog | None = None,
    signals: StopSignals | None = None,
    blocks: BlockFolder | None = None,
) -> EvaluationResult:
    """Evaluate a model on a split, every image querying all the others.

    Called on all ranks; returns the same result on all of them, `table` included.

    Args:
        model: images uint8 [b, 3, H, W] -> embeddings [b, D], on `context.device`. Its modules keep
            their modes.
        index: the split.
        transform: how an image becomes a row of a batch.
        context: this process among its peers.
        recall_at: the K of Recall@K.
        batch_size: images of one forward pass of one rank.
        num_workers: loader processes of each rank.
        kmeans_seeds: number of k-means runs behind NMI (seeds 0, 1, ...); 0 leaves NMI out.
        cache: where decoded images are kept between evaluations; needs `num_workers` 0.
        preprocessing: the transform's settings, for the record.
        progress: called with the number of images after each batch of this rank.
        damage: where given, damaged images are left out, counted and recorded there; else they are an error.
        signals: requests to stop that this process receives.
        blocks: where embeddings are kept until the pass is done, so that an evaluation that is cut short goes on.

    Raises:
        StopRequested: on every rank: a rank was told to stop while images were embedded.
        ValueError: on every rank: a damaged image or too many, no usable faiss, embeddings that are zero or not
            finite, a `recall_at` the split cannot give, or no class with two images.
    """
    settings = Settings(recall_at=tuple(recall_at), kmeans_seeds=tuple(range(kmeans_seeds)))
    run_together(context, check_settings, index.labels, settings)
    table = embed_split(
        model,
        index,
        transform,
        context=context,
        batch_size=batch_size,
        num_workers=num_workers,
        cache=cache,
        preprocessing=preprocessing,
        progress=progress,
        damage=damage,
        signals=signals,
        blocks=blocks,
    )
    left_out = sorted(set(range(index.num_samples)) - set(table.ids.tolist()))
    data = {
        "dataset": index.dataset,
        "split": index.split,
        "index_sha256": index.sha256,
        "class_table_sha256": index.class_table_sha256,
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "left_out": left_out,
        "forward_batch_size": batch_size,
        "weights": sorted({str(parameter.dtype) for parameter in model.parameters()}),
    }
    result = evaluate_table(table, context=context, settings=settings, data=data)
    return dataclasses.replace(result, num_damaged=len(left_out))


def evaluate_table(
    table: EmbeddingTable,
    *,
    context: ParallelContext,
    settings: Settings,
    data: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """The metrics of embeddings that every rank holds. Called on all ranks; returns the same result
    on all of them.

    Args:
        table: the same on every rank, as `embed` returns it.
        context: this process among its peers.
        settings: how to count and cluster.
        data: where the embeddings come from, for the record.

    Raises:
        ValueError: on every rank: no usable faiss, a `recall_at` the split cannot give, or no class
            with two images.
    """
    labels_n = table.labels.numpy()
    run_together(context, check_settings, labels_n, settings)
    num_positives_n = metrics.count_positives(labels_n)
    query_n = num_positives_n > 0

    fault_point("evaluate.search")
    # 1. Retrieval: this rank's tiles, then everyone's per-query numbers in id order.
    scores_qM = _score_queries(table, num_positives_n, context=context, settings=settings)
    row_counts = everyone(context, len(scores_qM))
    local_qM = torch.from_numpy(scores_qM).to(context.device)
    scores_QM = gather_rows(local_qM, row_counts=row_counts, group=context.group).cpu().numpy()
    means = [metrics.exact_mean(scores_QM[:, column]) for column in range(scores_QM.shape[1])]
    names = [*(f"recall@{k}" for k in settings.recall_at), "r_precision", "map@r"]
    measured = dict(zip(names, means, strict=False))

    # 2. Clustering: each seed on one rank, its number on all of them.
    if settings.kmeans_seeds:
        nmi = _normalized_mutual_information(table, context=context, settings=settings)
        measured["nmi"] = statistics.fmean(nmi)
        measured["nmi_sd"] = statistics.stdev(nmi) if len(nmi) > 1 else 0.0

    return EvaluationResult(
        metrics=measured,
        recall_at_1_bounds=(means[-2], means[-1]),
        num_images=len(labels_n),
        num_classes=len(np.unique(labels_n)),
        num_queries=int(query_n.sum()),
        num_lone=int((~query_n).sum()),
        num_damaged=0,
        protocol=_protocol(settings, data or {}),
        table=table,
    )


def _score_queries(
    table: EmbeddingTable,
    num_positives_n: np.ndarray,
    *,
    context: ParallelContext,
    settings: Settings,
) -> np.ndarray:
    """The numbers of this rank's queries, float64 [q, M]: recalls, R-Precision, MAP@R, Recall@1 at
    worst and at best.
    """
    embeddings_nD, labels_n = table.embeddings.numpy(), table.labels.numpy()
    positions_n = np.arange(len(labels_n))  # faiss names rows by their position
    # One neighbour more than R, so that the list holds a wrong answer for the tie bounds.
    num_neighbours = min(max(*settings.recall_at, int(num_positives_n.max()) + 1), len(labels_n) - 1)
    gallery = FlatIndex(embeddings_nD)
    blocks = [np.zeros((0, len(settings.recall_at) + 4))]
    for tile in tiles_of_rank(
        len(labels_n), tile_size=settings.tile_size, rank=context.rank, world_size=context.world_size
    ):
        ranking = rank_neighbours(
            gallery, embeddings_nD[tile], query_ids=positions_n[tile], num_neighbours=num_neighbours
        )
        query_q = num_positives_n[tile] > 0  # lone images were searched with their tile, and are dropped here
        positives_q = num_positives_n[tile][query_q]
        scores_qK = ranking.scores[query_q]
        relevant_qK = labels_n[ranking.ids[query_q]] == labels_n[tile][query_q][:, None]
        columns = [metrics.recall_at(relevant_qK, k) for k in settings.recall_at]
        columns += [
            metrics.r_precision(relevant_qK, positives_q),
            metrics.map_at_r(relevant_qK, positives_q),
        ]
        columns += metrics.tie_bounds(relevant_qK, scores_qK, tolerance=settings.tie_tolerance)
        blocks.append(np.stack(columns, axis=1).astype(np.float64))
    return np.concatenate(blocks)


def _normalized_mutual_information(
    table: EmbeddingTable, *, context: ParallelContext, settings: Settings
) -> list[float]:
    """NMI of each seed, in the order of the seeds; rank r computes seeds r, r + W, ... Called on all ranks."""
    embeddings_nD, labels_n = table.embeddings.numpy(), table.labels.numpy()
    num_clusters = len(np.unique(labels_n))
    local: dict[int, float] = {}
    for seed in settings.kmeans_seeds[context.rank :: context.world_size]:
        clusters_n = cluster(
            embeddings_nD,
            num_clusters=num_clusters,
            seed=seed,
            num_iterations=settings.kmeans_iterations,
        )
        local[seed] = metrics.normalized_mutual_information(labels_n, clusters_n)
    of_seed = {seed: nmi for part in everyone(context, local) for seed, nmi in part.items()}
    return [of_seed[seed] for seed in settings.kmeans_seeds]


def check_settings(labels_n: np.ndarray, settings: Settings) -> None:
    """Find what would fail after the embedding pass, before it."""
    load_faiss()
    wrong = [k for k in settings.recall_at if not 1 <= k < len(labels_n)]
    if wrong or not settings.recall_at:
        raise ValueError(
            f"recall_at is {list(settings.recall_at)}: expected at least one K, each from 1 to "
            f"{len(labels_n) - 1}, "
            f"because a query has the other {len(labels_n) - 1} images as neighbours; change "
            "evaluation.recall_at"
        )
    if not metrics.count_positives(labels_n).any():
        raise ValueError(
            f"no class of the split has two images ({len(labels_n)} images, {len(labels_n)} "
            "classes), so no query has a "
            "right answer; evaluate a split with several images per class"
        )


def _protocol(settings: Settings, data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that changes a number, in words and values; the number of ranks is not among it."""
    clustering = {
        "algorithm": "faiss k-means, Euclidean, all points, random start, one run a seed",
        "num_iterations": settings.kmeans_iterations,
        "seeds": list(settings.kmeans_seeds),
        "num_clusters": "number of classes",
        "average": "arithmetic",
    }
    versions = {name: _version(name) for name in ("dist_proxygml", "torch", "numpy", "scikit-learn")}
    return {
        "format": 1,
        "data": dict(data),
        "embeddings": "float32, unit length",
        "search": f"exact inner product, float32, tiles of {settings.tile_size} queries",
        "self": "left out by id",
        "ties": "score descending, then id ascending",
        "tie_tolerance": settings.tie_tolerance,
        "lone_images": "left out as queries, kept in the gallery",
        "recall_at": list(settings.recall_at),
        "clustering": clustering if settings.kmeans_seeds else None,
        "versions": {**versions, "faiss": ", ".join(installed_faiss()) or "unknown"},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
