"""Ranks of all right answers of all queries, shared out over the ranks; the same numbers however that is done.

    replicated   every rank has the whole gallery on its device and takes a share of the queries
    sharded      every rank has a part of the gallery on its device and takes all queries; the counts are added up

Queries go in the order of their labels, so that a class's images are compared with each other once, and in tiles that
fit a budget. `rank_counts.py` makes the counts independent of all of that, so nothing here can change a number.

Where many right answers lie far behind, lists are wasted: their queries are swept anyway, and a sweep counts for all
of a query's right answers at once. So lists are given up as soon as a tile leaves more than a quarter of its queries to
the sweep; the first tile is a small one.

Sharding was declined as a default: it saves memory of the device, not time. The embeddings themselves are in the host
memory of every rank either way (`embed` gathers them), which is what the exact scores are computed from.

Dimension key: n images, q queries of a tile, Q queries of all ranks, G gallery, p right answers of a tile, D embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dist_proxygml.distributed.collectives import all_reduce_sum, gather_rows
from dist_proxygml.distributed.memory import available_memory
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object
from dist_proxygml.evaluation.metrics import QueryScores, count_right_answers, rank_without_first_column, score_queries
from dist_proxygml.evaluation.progress import Follower, progress
from dist_proxygml.evaluation.rank_counts import (
    BEST,
    EXACT,
    WORST,
    Gallery,
    Limits,
    Part,
    Queries,
    ScoreBuffer,
    count_wrong_before,
    find_right_answers,
    index_gallery,
)
from dist_proxygml.evaluation.search import MOST_NEIGHBOURS_ON_GPU, build_searcher, searches_on_gpu

LIST_LENGTH = 64  # neighbours that faiss looks for; right answers behind them are counted for by a sweep
MOST_QUERIES = 4096  # of a tile
FIRST_QUERIES = 512  # of the first tile, which shows whether lists pay
MOST_SWEPT = 0.25  # of a tile's queries, for lists to pay
SCORE_COLUMNS = (2, 6, 10)  # where `QueryScores` begin in a query's row of numbers
NUM_COLUMNS = 15


class Images(NamedTuple):
    """All evaluated images in the order of their ids, which are unique over queries and gallery together."""

    rows: np.ndarray  # rounded unit rows
    labels: np.ndarray  # 0 .. num_classes - 1
    is_query: np.ndarray
    is_gallery: np.ndarray
    cameras: np.ndarray | None = None  # images of the query's class and camera are left out of its ranking


class SearchOptions(NamedTuple):
    """Options of the search; the numbers do not depend on them."""

    search: str = "faiss"  # or "counter": nothing but sweeps
    placement: str = "auto"  # or "replicated", "sharded"
    memory_budget: int = 256 << 20  # bytes of one rank while it searches, beyond embeddings and gallery
    verify: bool = False  # search both ways, and raise if they differ
    list_length: int = LIST_LENGTH


class Retrieval(NamedTuple):
    """Scores of the queries with a right answer, in the order of their ids."""

    position: np.ndarray  # of the queries among the images
    exact: QueryScores
    worst: QueryScores  # if every tie went wrong
    best: QueryScores
    first_column_dropped: np.ndarray | None  # first ranks of ALL queries as float64; NEVER where nothing right is left


def retrieve(
    images: Images,
    *,
    with_self: bool,
    tolerance: float,
    context: ParallelContext,
    options: SearchOptions,
    say: Callable[[str], object] = lambda _: None,
    follower: Follower | None = None,
) -> Retrieval:
    """Rank the right answers of every query that has one. Called on all ranks; the same result on all of them.

    Args:
        images: the same on every rank.
        with_self: also find where the query itself stands, and rank queries without a right answer; without cameras.
        tolerance: scores that differ by no more are tied, for `worst` and `best`.
        context: this process among its peers.
        options: how to search.
        say: takes lines for people.
        follower: is given the progress instead of a bar.

    Raises:
        ValueError: on every rank: no usable faiss, or with `verify` two ways to search that differ.
    """
    gallery_G = np.flatnonzero(images.is_gallery)
    num_classes = int(images.labels.max()) + 1
    rows_GD = images.rows if len(gallery_G) == len(images.rows) else images.rows[gallery_G]
    assert not (with_self and images.cameras is not None)
    cameras_G = None if images.cameras is None else images.cameras[gallery_G]
    gallery = index_gallery(rows_GD, images.labels[gallery_G], num_classes=num_classes, cameras_G=cameras_G)
    own_n = np.full(len(images.labels), -1)
    own_n[gallery_G] = np.arange(len(gallery_G))
    # Queries by label, then id; those without a right answer only where they count.
    num_members_n = np.diff(gallery.starts)[images.labels]
    num_right_n = count_right_answers(images.labels, images.is_gallery, images.cameras)
    asked_Q = np.flatnonzero(images.is_query & (with_self | (num_right_n > 0)))
    asked_Q = asked_Q[np.argsort(images.labels[asked_Q], kind="stable")]
    is_sharded = _is_sharded(rows_GD, context=context, options=options, say=say)

    searches = (options.search, {"faiss": "counter", "counter": "faiss"}[options.search])
    found = []
    for search in searches[: 1 + options.verify]:
        part = _part_of_rank(images, gallery, gallery_G, is_sharded, context, options._replace(search=search))
        job = _Job(gallery, part, is_sharded, with_self, tolerance, context, options, say)
        shared = asked_Q if is_sharded else _share(asked_Q, context)
        tiles = _tiles(shared, num_members_n, width=rows_GD.shape[1], options=options)
        rows = [np.zeros((0, NUM_COLUMNS))]
        with progress(
            "searching", len(shared), unit=" queries", is_shown=context.is_main, follower=follower
        ) as advance:
            for tile_q in tiles:
                cameras_q = None if images.cameras is None else images.cameras[tile_q]
                queries = Queries(images.rows[tile_q], images.labels[tile_q], own_n[tile_q], cameras_q)
                scores_qM, num_swept = _score_tile(queries, tile_q, job)
                rows.append(scores_qM)
                if num_swept > MOST_SWEPT * len(tile_q) and not options.verify:
                    job = job._replace(part=job.part._replace(searcher=None))
                advance(len(tile_q))
        del part, job  # before there may be another
        scores_QM = np.concatenate(rows)
        if not is_sharded:
            scores_QM = _gathered(scores_QM, context)
        found.append(scores_QM[np.argsort(scores_QM[:, 0], kind="stable")])
    if options.verify:
        _check_same(*found, names=searches)
        say(f"evaluation: {searches[0]} and {searches[1]} agree on the ranks of all {len(asked_Q):,} queries")
    return _unpacked(found[0], with_self=with_self)


class _Job(NamedTuple):
    """State shared by all tiles of queries."""

    gallery: Gallery
    part: Part
    is_sharded: bool
    with_self: bool
    tolerance: float
    context: ParallelContext
    options: SearchOptions
    say: Callable[[str], object]


def _is_sharded(
    rows_GD: np.ndarray, *, context: ParallelContext, options: SearchOptions, say: Callable[[str], object]
) -> bool:
    """Whether the gallery is divided, and say why. The same on all ranks, as they see the least of their memories."""
    size = f"evaluation: a gallery of {len(rows_GD):,} x {rows_GD.shape[1]} float32"
    if context.device.type == "cuda":
        needed = rows_GD.nbytes
        available = min(all_gather_object(context, available_memory(context.device)))
        choice = choose_placement(needed + options.memory_budget, available=available, world_size=context.world_size)
        size += f" takes {_mib(needed)} of the {_mib(available)} that are free on the GPU of a rank"
    else:
        choice = "replicated"
        size += f" is searched where it lies in the memory of each rank, {_mib(rows_GD.nbytes)}"
    if options.placement != "auto":
        choice = options.placement
    ranks = "" if context.world_size == 1 else f" over {context.world_size} ranks"
    say(f"{size}; {choice}{ranks}{'' if options.placement == 'auto' else ', as configured'}")
    return choice == "sharded"


def choose_placement(needed: int, *, available: int, world_size: int) -> str:
    """Divide a gallery that would take more than half of what a rank's device has left; one rank cannot."""
    return "sharded" if needed > available // 2 and world_size > 1 else "replicated"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _part_of_rank(
    images: Images,
    gallery: Gallery,
    gallery_G: np.ndarray,
    is_sharded: bool,
    context: ParallelContext,
    options: SearchOptions,
) -> Part:
    first, stop = 0, len(gallery.rows)
    if is_sharded:
        first, stop = (len(gallery.rows) * r // context.world_size for r in (context.rank, context.rank + 1))
    rows_gD = gallery.rows[first:stop]
    too_long = options.list_length > MOST_NEIGHBOURS_ON_GPU and searches_on_gpu(context.device)
    use_faiss = options.search == "faiss" and len(rows_gD) > 0 and not too_long  # a sweep has no limit
    on_device_gD = torch.from_numpy(rows_gD).to(context.device)
    return Part(
        rows=rows_gD,
        labels=images.labels[gallery_G[first:stop]],
        first=first,
        on_device=on_device_gD,
        searcher=build_searcher(rows_gD, on_device_gD) if use_faiss else None,
        buffer=ScoreBuffer(context.device),
    )


def _share(asked_Q: np.ndarray, context: ParallelContext) -> np.ndarray:
    cuts = [len(asked_Q) * rank // context.world_size for rank in (context.rank, context.rank + 1)]
    return asked_Q[cuts[0] : cuts[1]]


def _tiles(asked: np.ndarray, num_members_n: np.ndarray, *, width: int, options: SearchOptions) -> Iterator[np.ndarray]:
    """Consecutive queries whose rows, lists and class members fit half of the budget; at least one."""
    bytes_q = 8 * width + 40 * options.list_length + 200 * (num_members_n[asked] + 1)
    total_q = np.cumsum(bytes_q)
    start = 0
    while start < len(asked):
        before = total_q[start - 1] if start else 0
        stop = int(np.searchsorted(total_q, before + options.memory_budget // 2, side="right"))
        stop = min(max(stop, start + 1), start + (MOST_QUERIES if start else FIRST_QUERIES))
        yield asked[start:stop]
        start = stop


def _score_tile(queries: Queries, position_q: np.ndarray, job: _Job) -> tuple[np.ndarray, int]:
    """One row of numbers a query, float64: position, whether it has a right answer, `QueryScores` in the exact order,
    at worst and at best, and the first rank when the first column is dropped. And the number of queries swept.
    """
    right = find_right_answers(queries, job.gallery)
    counts_p3, num_swept = count_wrong_before(
        queries,
        right,
        ~right.is_left_out | job.with_self,
        job.part,
        list_length=job.options.list_length,
        tolerance=job.tolerance,
        limits=Limits(job.options.memory_budget // 2, job.say),
    )
    if job.is_sharded:
        counts = torch.from_numpy(counts_p3).to(job.context.device)
        counts_p3 = all_reduce_sum(counts, group=job.context.group).cpu().numpy()
    scores_qM = np.zeros((len(position_q), NUM_COLUMNS))
    scores_qM[:, 0] = position_q
    others_p = ~right.is_left_out
    answered = np.unique(right.query[others_p])
    scores_qM[answered, 1] = 1
    query_p = np.searchsorted(answered, right.query[others_p])
    for first_column, order in zip(SCORE_COLUMNS, (EXACT, WORST, BEST), strict=True):
        rank_p = _index_within(query_p) + counts_p3[others_p, order]
        scores = score_queries(query_p, rank_p, num_queries=len(answered))
        scores_qM[answered, first_column : first_column + len(scores)] = np.stack(scores, axis=1)
    if job.with_self:
        place_p = _index_within(right.query) + counts_p3[:, EXACT]
        scores_qM[:, -1] = rank_without_first_column(right.query, place_p, num_queries=len(position_q))
    return scores_qM, num_swept


def _index_within(query_p: np.ndarray) -> np.ndarray:
    """1, 2, ... within each query; queries ascend."""
    starts = np.flatnonzero(np.diff(query_p, prepend=-1))
    sizes = np.diff([*starts, len(query_p)])
    return np.asarray(np.arange(len(query_p)) - np.repeat(starts, sizes) + 1)


def _gathered(scores_QM: np.ndarray, context: ParallelContext) -> np.ndarray:
    row_counts = all_gather_object(context, len(scores_QM))
    local = torch.from_numpy(scores_QM).to(context.device)
    return np.asarray(gather_rows(local, row_counts=row_counts, group=context.group).cpu().numpy())


def _check_same(one_QM: np.ndarray, other_QM: np.ndarray, *, names: Sequence[str]) -> None:
    differs_Q = (one_QM != other_QM).any(axis=1)
    if differs_Q.any():
        first = int(differs_Q.argmax())
        raise RuntimeError(
            f"{names[0]} and {names[1]} differ for {int(differs_Q.sum())} of {len(one_QM)} queries, first for image "
            f"{int(one_QM[first, 0])}: {one_QM[first, 2:].tolist()} and {other_QM[first, 2:].tolist()}; one of them "
            "computes wrongly on this machine"
        )


def _unpacked(scores_QM: np.ndarray, *, with_self: bool) -> Retrieval:
    answered_qM = scores_QM[scores_QM[:, 1] == 1]
    of_order = []
    for start in SCORE_COLUMNS:
        first_rank, *others = answered_qM[:, start : start + len(QueryScores._fields)].T.copy()
        of_order.append(QueryScores(first_rank.astype(np.int64), *others))
    exact, worst, best = of_order
    dropped = scores_QM[:, -1].copy() if with_self else None
    return Retrieval(answered_qM[:, 0].astype(np.int64), exact, worst, best, dropped)
