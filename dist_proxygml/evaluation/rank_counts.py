"""How many wrong answers come before each right answer of a query: all that retrieval metrics need to know.

    rank of the j-th right answer = j + wrong answers before it,    order: score descending, then id ascending

Counted in three steps, for any number of queries at a time and any part of the gallery:

    1  exact scores of each query with the images of its own class
    2  lists: the F best of the part by float32 score (faiss). What is not in the list is no better than its end, so for
       right answers above the end the list shows how many wrong ones come before
    3  sweep: float32 products with the whole part for the queries that are left, no limit at F

A float32 score decides a comparison only where it is decided by more than the error bound of `exact.py`; what is closer
is decided by exact scores, and then by id. So the counts are integers that do not depend on tiles, threads, devices,
or on which step counted them; counts of the parts of a divided gallery add up. Where very much is close (masses of
equal images, a collapsed model), whole rows are computed exactly instead of pairs: time doubles, memory stays.

Beside the exact order, right answers are ranked with all ties (scores within `tolerance`) gone worst and gone best.

Dimension key: q queries of a tile, r rows and c columns of a block, g gallery rows of a part, G of the whole gallery,
p right answers of all queries of a tile, F length of a list, D embedding.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_proxygml.evaluation.exact import error_bound, float32_products, scores_of_block, scores_of_pairs

EXACT, WORST, BEST = 0, 1, 2  # columns of counts
COLUMNS = 1 << 16  # of the gallery in one block of a sweep
COLUMNS_OF_PRODUCT = 1 << 14  # on a CPU: what a product reads again and again stays in its cache
EXACT_COLUMNS = 1 << 11  # the same for whole rows of exact scores
# A row of a block with more pairs than this too close to decide is computed exactly as a whole: a sixteenth of its
# columns, or what a whole row would not be worth it for.
MOST_NEAR_SHARE, MOST_NEAR = 1 / 16, 64


class Searcher(Protocol):
    """Search for the rows of a part with the best float32 scores."""

    def search(
        self, queries_qD: Float[np.ndarray, "q D"], num_neighbours: int
    ) -> tuple[Float[np.ndarray, "q F"], Int[np.ndarray, "q F"]]:
        """Scores descending and row numbers; equal scores in any order."""
        ...


class ScoreBuffer:
    """Memory for the scores of a block, used again and again: fresh memory costs more than the product on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._scores = torch.empty(0, device=device)

    def take(self, num_rows: int, num_columns: int) -> Tensor:
        """float32 [num_rows, num_columns], not initialised; takes the place of what was taken before."""
        if self._scores.numel() < num_rows * num_columns:
            device = self._scores.device
            self._scores = torch.empty(0, device=device)  # let go first, for a GPU may not hold both
            self._scores = torch.empty(num_rows * num_columns, device=device)
        return self._scores[: num_rows * num_columns].view(num_rows, num_columns)


class Part(NamedTuple):
    """Consecutive rows of the gallery, all of them or one rank's."""

    rows: Float[np.ndarray, "g D"]  # rounded
    labels: Int[np.ndarray, " g"]
    first: int  # position of the first row in the whole gallery
    on_device: Tensor  # the same rows, on the device that sweeps
    searcher: Searcher | None  # None: everything is swept
    buffer: ScoreBuffer


class Queries(NamedTuple):
    """Queries of one tile, sorted by label."""

    rows: Float[np.ndarray, "q D"]  # rounded
    labels: Int[np.ndarray, " q"]
    own: Int[np.ndarray, " q"]  # position of the query itself in the gallery, or -1
    cameras: Int[np.ndarray, " q"] | None = None


class Gallery(NamedTuple):
    """The whole gallery, in the order of the ids, and where the images of each label are."""

    rows: Float[np.ndarray, "G D"]  # rounded
    members: Int[np.ndarray, " G"]  # positions sorted by label, then id
    starts: Int[np.ndarray, " C1"]  # where each label starts in `members`; one more for the end
    cameras: Int[np.ndarray, " G"] | None = None  # images of a query's label and camera are left out of its ranking


class RightAnswers(NamedTuple):
    """The images of the queries' own classes, with those that are left out of the ranking: the query itself where the
    gallery has it, and images by its own camera where there are cameras.

    Sorted by query, and for each query in the exact order.
    """

    query: Int[np.ndarray, " p"]  # row of the tile
    position: Int[np.ndarray, " p"]  # in the whole gallery
    score: Float[np.ndarray, " p"]  # exact
    is_left_out: Bool[np.ndarray, " p"]


class Limits(NamedTuple):
    """Bound on memory, and where to report that it had to be lowered."""

    block_bytes: int  # of the scores of one block of a sweep
    say: Callable[[str], object]


def index_gallery(
    rows_GD: Float[np.ndarray, "G D"],
    labels_G: Int[np.ndarray, " G"],
    *,
    num_classes: int,
    cameras_G: Int[np.ndarray, " G"] | None = None,
) -> Gallery:
    """Find the images of each label. Labels are 0 .. num_classes - 1."""
    counts_C = np.bincount(labels_G, minlength=num_classes)
    starts = np.concatenate([[0], np.cumsum(counts_C)])
    return Gallery(rows_GD, np.argsort(labels_G, kind="stable"), starts, cameras_G)


def find_right_answers(queries: Queries, gallery: Gallery) -> RightAnswers:
    """The right answers of every query with their exact scores."""
    first_q, end_q = gallery.starts[queries.labels], gallery.starts[queries.labels + 1]
    sizes_q = end_q - first_q
    starts_q = np.cumsum(sizes_q) - sizes_q
    query_p = np.repeat(np.arange(len(sizes_q)), sizes_q)
    position_p = gallery.members[np.arange(len(query_p)) - starts_q[query_p] + first_q[query_p]]
    score_p = np.empty(len(query_p))
    # Queries of a class share its images: one product a class, in steps that do not outgrow a large one.
    run_starts = np.flatnonzero(np.diff(queries.labels, prepend=-1))
    for start, stop in zip(run_starts, [*run_starts[1:], len(sizes_q)], strict=True):
        members = gallery.members[first_q[start] : end_q[start]]
        scores_qR = score_p[starts_q[start] : starts_q[start] + (stop - start) * len(members)]
        scores_qR = scores_qR.reshape(stop - start, len(members))
        for column in range(0, len(members), EXACT_COLUMNS):
            columns = slice(column, column + EXACT_COLUMNS)
            scores_qR[:, columns] = scores_of_block(queries.rows[start:stop], gallery.rows[members[columns]])
    order_p = np.lexsort((position_p, -score_p, query_p))
    position_p = position_p[order_p]
    is_left_out_p = position_p == queries.own[query_p]
    if gallery.cameras is not None:
        assert queries.cameras is not None
        is_left_out_p |= gallery.cameras[position_p] == queries.cameras[query_p]
    return RightAnswers(query_p, position_p, score_p[order_p], is_left_out_p)


def count_wrong_before(
    queries: Queries,
    right: RightAnswers,
    wanted_p: Bool[np.ndarray, " p"],
    part: Part,
    *,
    list_length: int,
    tolerance: float,
    limits: Limits,
) -> tuple[Int[np.ndarray, "p 3"], int]:
    """Count the wrong answers of the part that come before each wanted right answer: in the exact order, if every tie
    goes wrong, and if every tie goes right.

    Args:
        queries: the tile.
        right: what `find_right_answers` found for it.
        wanted_p: which of them to count for; the others get 0.
        part: where to count.
        list_length: F; 0 sweeps everything.
        tolerance: scores that differ by no more than this are tied, for the second and third count.
        limits: of memory.

    Returns:
        The counts, and the number of queries that had to be swept.
    """
    counts_p3 = np.zeros((len(wanted_p), 3), dtype=np.int64)
    left_p = wanted_p & (len(part.labels) > 0)
    bounds = _Bounds.of(right.score, tolerance=tolerance, embedding_dim=queries.rows.shape[1])
    if part.searcher is not None and list_length and left_p.any():
        left_p &= ~_count_in_lists(queries, right, left_p, part, bounds, counts_p3, list_length, limits)
    if left_p.any():
        _count_by_sweep(queries, right, left_p, part, bounds, counts_p3, limits)
    return counts_p3, len(np.unique(right.query[left_p]))


class _Bounds(NamedTuple):
    """Around the score of each right answer: a float32 score above `high` is certainly better, whatever ties do, and
    one below `low` certainly worse.
    """

    low: Float[np.ndarray, " p"]
    high: Float[np.ndarray, " p"]
    tolerance: float  # a multiple of 2^-52, so that a score plus or minus it is exact
    error: float

    @classmethod
    def of(cls, score_p: np.ndarray, *, tolerance: float, embedding_dim: int) -> "_Bounds":
        tolerance = round(tolerance * 2.0**52) / 2.0**52
        error = error_bound(embedding_dim)
        return cls(score_p - (tolerance + error), score_p + (tolerance + error), tolerance, error)


# ---- lists -----------------------------------------------------------------------------------------------------------


def _count_in_lists(
    queries: Queries,
    right: RightAnswers,
    wanted_p: np.ndarray,
    part: Part,
    bounds: _Bounds,
    counts_p3: np.ndarray,
    list_length: int,
    limits: Limits,
) -> Bool[np.ndarray, " p"]:
    """Count what the lists decide, into `counts_p3`; which right answers that were."""
    assert part.searcher is not None
    counted_p = np.zeros(len(wanted_p), dtype=bool)
    offsets_q1 = np.searchsorted(right.query, np.arange(len(queries.labels) + 1))

    def count_tile(start: int, stop: int) -> None:
        assert part.searcher is not None
        scores_qF, rows_qF = part.searcher.search(queries.rows[start:stop], list_length)
        _check_products(queries.rows[start:stop], part, scores_qF[:4], rows_qF[:4], bounds.error)
        wrong_qF = part.labels[rows_qF] != queries.labels[start:stop, None]
        num_wrong_q1 = np.zeros((len(wrong_qF), wrong_qF.shape[1] + 1), dtype=np.int64)
        np.cumsum(wrong_qF, axis=1, out=num_wrong_q1[:, 1:])
        is_whole = scores_qF.shape[1] == len(part.labels)
        step = max(1, limits.block_bytes // (8 * scores_qF.shape[1]))
        for first in range(offsets_q1[start], offsets_q1[stop], step):
            of_tile = np.arange(first, min(first + step, offsets_q1[stop]))
            query_p = right.query[of_tile] - start
            # An image behind the list scores at most the list's end, but for the error.
            end_p = np.where(is_whole, -np.inf, scores_qF[query_p, -1])
            sure_p = wanted_p[of_tile] & (bounds.low[of_tile] > end_p)
            of_tile, query_p = of_tile[sure_p], query_p[sure_p]
            above_p = (scores_qF[query_p] > bounds.high[of_tile, None]).sum(axis=1)
            near_p = (scores_qF[query_p] >= bounds.low[of_tile, None]).sum(axis=1) - above_p
            counts_p3[of_tile] = num_wrong_q1[query_p, above_p][:, None]
            entry_n = np.repeat(np.arange(len(of_tile)), near_p)
            column_n = np.arange(len(entry_n)) - np.repeat(np.cumsum(near_p) - near_p, near_p) + above_p[entry_n]
            is_wrong_n = wrong_qF[query_p[entry_n], column_n]
            entry_n, column_n = entry_n[is_wrong_n], column_n[is_wrong_n]
            positions_n = rows_qF[query_p[entry_n], column_n]
            _decide(queries, right, of_tile[entry_n], positions_n, part, bounds.tolerance, counts_p3)
            counted_p[of_tile] = True

    in_tiles(len(queries.labels), len(queries.labels), count_tile, limits.say)
    return counted_p


def _decide(
    queries: Queries,
    right: RightAnswers,
    right_n: np.ndarray,
    row_n: np.ndarray,
    part: Part,
    tolerance: float,
    counts_p3: np.ndarray,
) -> None:
    """Add wrong answers that are close to a right one to its counts, by their exact scores and then by id.

    Args:
        right_n: the right answers, as indices into `right`.
        row_n: the wrong answer beside each, as row of the part.
    """
    score_n = scores_of_pairs(queries.rows, part.rows, right.query[right_n], row_n)
    right_score_n = right.score[right_n]
    is_before_n = (score_n > right_score_n) | (
        (score_n == right_score_n) & (part.first + row_n < right.position[right_n])
    )
    num_right = len(counts_p3)
    counts_p3[:, EXACT] += np.bincount(right_n[is_before_n], minlength=num_right)
    counts_p3[:, WORST] += np.bincount(right_n[score_n >= right_score_n - tolerance], minlength=num_right)
    counts_p3[:, BEST] += np.bincount(right_n[score_n > right_score_n + tolerance], minlength=num_right)


# ---- sweep -----------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Consecutive queries of a sweep with the right answers that are counted for."""

    rows: np.ndarray
    right: np.ndarray  # indices into the tile's right answers, sorted by row
    starts: np.ndarray  # where each row's begin among them
    same_row: np.ndarray  # row and gallery position of everything with the query's label, which is no wrong answer
    same_position: np.ndarray


def _count_by_sweep(
    queries: Queries,
    right: RightAnswers,
    wanted_p: np.ndarray,
    part: Part,
    bounds: _Bounds,
    counts_p3: np.ndarray,
    limits: Limits,
) -> None:
    """Count over every row of the part, into `counts_p3`."""
    wanted = np.flatnonzero(wanted_p)
    swept_r = np.unique(right.query[wanted])
    wanted_starts = np.searchsorted(right.query[wanted], [*swept_r, len(queries.labels)])
    all_starts = np.searchsorted(right.query, np.arange(len(queries.labels) + 1))
    num_columns = min(COLUMNS, len(part.labels))
    tile = max(1, limits.block_bytes // (4 * num_columns))

    def count_tile(start: int, stop: int) -> None:
        rows = swept_r[start:stop]
        sizes = all_starts[rows + 1] - all_starts[rows]
        same_row_n = np.repeat(np.arange(len(rows)), sizes)
        same_n = np.arange(len(same_row_n)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + all_starts[rows][same_row_n]
        block = _Block(
            queries.rows[rows],
            wanted[wanted_starts[start] : wanted_starts[stop]],
            wanted_starts[start : stop + 1] - wanted_starts[start],
            same_row_n,
            right.position[same_n] - part.first,
        )
        counts_p3[block.right] += _sweep_rows(queries, right, block, part, bounds, num_columns, len(counts_p3))

    in_tiles(len(swept_r), tile, count_tile, limits.say)


def _sweep_rows(
    queries: Queries,
    right: RightAnswers,
    block: _Block,
    part: Part,
    bounds: _Bounds,
    num_columns: int,
    num_right: int,
) -> Int[np.ndarray, "k 3"]:
    """The counts of the right answers of a block of queries."""
    counts_p3 = np.zeros((num_right, 3), dtype=np.int64)
    # Bounds as float32, rounded away from the score.
    low_k = np.nextafter(bounds.low[block.right].astype(np.float32), np.float32(-np.inf))
    high_k = np.nextafter(bounds.high[block.right].astype(np.float32), np.float32(np.inf))
    device = part.on_device.device
    count = _count_rows if device.type == "cpu" else count_rows_on_device
    with float32_products(device):
        rows_rD = torch.from_numpy(block.rows).to(device)
        for column in range(0, len(part.labels), num_columns):
            scores_rc = _products(rows_rD, part.on_device[column : column + num_columns], part.buffer)
            if column == 0:
                sample_rF = np.tile(np.arange(min(8, scores_rc.shape[1])), (min(4, len(rows_rD)), 1))
                sample = scores_rc[: len(sample_rF), : sample_rF.shape[1]].cpu().numpy()
                _check_products(block.rows, part, sample, sample_rF, bounds.error)
            same_n = (block.same_position >= column) & (block.same_position < column + scores_rc.shape[1])
            same_row_n, same_column_n = block.same_row[same_n], block.same_position[same_n] - column
            scores_rc[torch.from_numpy(same_row_n).to(device), torch.from_numpy(same_column_n).to(device)] = -torch.inf
            most_near = max(MOST_NEAR, int(MOST_NEAR_SHARE * scores_rc.shape[1]))
            above_k, near_k, near_column, crowded_r = count(scores_rc, block.starts, low_k, high_k, most_near)
            counts_p3[block.right] += above_k[:, None]
            _decide(queries, right, block.right[near_k], column + near_column, part, bounds.tolerance, counts_p3)
            if crowded_r.any():
                columns = range(column, column + scores_rc.shape[1])
                _count_exactly(right, block, crowded_r, part, columns, bounds.tolerance, counts_p3)
    return counts_p3[block.right]


def _products(rows_rD: Tensor, columns_cD: Tensor, buffer: ScoreBuffer) -> Tensor:
    """float32 scores [r, c], in the buffer."""
    scores_rc = buffer.take(len(rows_rD), len(columns_cD))
    step = COLUMNS_OF_PRODUCT if rows_rD.device.type == "cpu" else len(columns_cD)
    for start in range(0, len(columns_cD), step):
        torch.matmul(rows_rD, columns_cD[start : start + step].T, out=scores_rc[:, start : start + step])
    return scores_rc


_Counted = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _count_rows(
    scores_rc: Tensor, starts_r1: np.ndarray, low_k: np.ndarray, high_k: np.ndarray, most_near: int
) -> _Counted:
    """For each right answer k the scores above `high`, and those between `low` and `high` as (k, column).

    A row with more than `most_near` of the latter is crowded: it is left to be counted exactly.
    """
    above_k = np.zeros(len(low_k), dtype=np.int64)
    near_k, near_column = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    crowded_r = np.zeros(len(scores_rc), dtype=bool)
    is_candidate = np.empty(scores_rc.shape[1], dtype=bool)
    for row, line_c in enumerate(scores_rc.numpy()):  # a row fits the cache, and its few candidates do ever after
        of_row = slice(starts_r1[row], starts_r1[row + 1])
        low, high = low_k[of_row], high_k[of_row]
        if not len(low):
            continue
        np.greater_equal(line_c, low[-1], out=is_candidate)  # the worst right answer is the last
        candidates = is_candidate.nonzero()[0]
        values = line_c[candidates]
        above, at_least = _counts_above(values, high, inclusive=False), _counts_above(values, low, inclusive=True)
        if (at_least - above).sum() > most_near:
            crowded_r[row] = True
            continue
        above_k[of_row] = above
        for k in np.flatnonzero(at_least - above):
            columns = candidates[(values >= low[k]) & (values <= high[k])]
            near_column.append(columns)
            near_k.append(np.full(len(columns), starts_r1[row] + k))
    return above_k, np.concatenate(near_k), np.concatenate(near_column), crowded_r


def _counts_above(values: np.ndarray, thresholds: np.ndarray, *, inclusive: bool) -> Int[np.ndarray, " k"]:
    """Count the values above (or at) each threshold."""
    if len(thresholds) <= 8:
        over = np.greater_equal if inclusive else np.greater
        return np.array([np.count_nonzero(over(values, threshold)) for threshold in thresholds], dtype=np.int64)
    below = np.searchsorted(np.sort(values), thresholds, side="left" if inclusive else "right")
    return np.asarray(len(values) - below)


def count_rows_on_device(
    scores_rc: Tensor, starts_r1: np.ndarray, low_k: np.ndarray, high_k: np.ndarray, most_near: int
) -> _Counted:
    """`_count_rows` for a GPU: a pass over all rows for the j-th right answer of each, instead of a row at a time."""
    device = scores_rc.device
    sizes_r = np.diff(starts_r1)
    above_k = np.zeros(len(low_k), dtype=np.int64)
    num_near_r = np.zeros(len(sizes_r), dtype=np.int64)
    near_k, near_column = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for j in range(int(sizes_r.max(initial=0))):
        rows = np.flatnonzero(sizes_r > j)
        k_r = starts_r1[rows] + j
        low_r1, high_r1 = (torch.from_numpy(bound[k_r]).to(device)[:, None] for bound in (low_k, high_k))
        lines_rc = scores_rc if len(rows) == len(sizes_r) else scores_rc[torch.from_numpy(rows).to(device)]
        above_rc = lines_rc > high_r1
        above_k[k_r] = above_rc.sum(dim=1).cpu().numpy()
        near_rc = (lines_rc >= low_r1).logical_xor_(above_rc)
        num_near_r[rows] += near_rc.sum(dim=1).cpu().numpy()
        near_rc[torch.from_numpy(num_near_r[rows] > most_near).to(device)] = False
        row_n, column_n = (index.cpu().numpy() for index in near_rc.nonzero(as_tuple=True))
        near_k.append(k_r[row_n])
        near_column.append(column_n)
    crowded_r = num_near_r > most_near
    is_crowded_k = np.repeat(crowded_r, sizes_r)
    above_k[is_crowded_k] = 0
    near, column = np.concatenate(near_k), np.concatenate(near_column)
    kept = ~is_crowded_k[near]
    return above_k, near[kept], column[kept], crowded_r


def _count_exactly(
    right: RightAnswers,
    block: _Block,
    crowded_r: np.ndarray,
    part: Part,
    columns: range,
    tolerance: float,
    counts_p3: np.ndarray,
) -> None:
    """Add the counts of whole rows over some columns, from exact scores of all their pairs."""
    rows = np.flatnonzero(crowded_r)
    row_of = np.full(len(crowded_r), -1)
    row_of[rows] = np.arange(len(rows))
    rows_rD = torch.from_numpy(block.rows[rows]).to(part.on_device.device).double()
    for column in range(columns.start, columns.stop, EXACT_COLUMNS):
        stop = min(column + EXACT_COLUMNS, columns.stop)
        scores_rc = (rows_rD @ part.on_device[column:stop].double().T).cpu().numpy()
        same_n = crowded_r[block.same_row] & (block.same_position >= column) & (block.same_position < stop)
        scores_rc[row_of[block.same_row[same_n]], block.same_position[same_n] - column] = -np.inf
        for row, line_c in zip(rows, scores_rc, strict=True):
            right_k = block.right[block.starts[row] : block.starts[row + 1]]
            score_k = right.score[right_k]
            before_k = _counts_above(line_c, score_k, inclusive=False)
            for k in np.flatnonzero(_counts_above(line_c, score_k, inclusive=True) - before_k):
                equal = part.first + column + np.flatnonzero(line_c == score_k[k])
                before_k[k] += np.searchsorted(equal, right.position[right_k[k]])
            counts_p3[right_k, EXACT] += before_k
            counts_p3[right_k, WORST] += _counts_above(line_c, score_k - tolerance, inclusive=True)
            counts_p3[right_k, BEST] += _counts_above(line_c, score_k + tolerance, inclusive=False)


# ---- both ------------------------------------------------------------------------------------------------------------


def in_tiles(
    num_rows: int, tile: int, work: Callable[[int, int], None], say: Callable[[str], object] = lambda _: None
) -> None:
    """Call `work(start, stop)` for consecutive tiles of the rows. A tile that a GPU has no memory for is halved and
    retried, with a message; `work` must leave nothing behind when it fails.
    """
    start = 0
    while start < num_rows:
        stop = min(start + tile, num_rows)
        is_done = True
        try:
            work(start, stop)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or stop - start == 1:
                raise
            is_done = False
        if is_done:
            start = stop
            continue
        torch.cuda.empty_cache()  # here: the error's traceback would hold the tensors of the tile that failed
        tile = (stop - start) // 2
        say(f"evaluation: the GPU has no memory for {stop - start} queries at once; continuing with {tile}")


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)  # faiss raises a RuntimeError for what cudaMalloc refuses
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "cudaErrorMemoryAllocation" in text


def _check_products(
    queries_qD: np.ndarray, part: Part, scores_qF: np.ndarray, rows_qF: np.ndarray, error: float
) -> None:
    """Hold a few float32 scores to their error bound: TF32, say, is far outside, and would make counts wrong."""
    query_n = np.repeat(np.arange(len(rows_qF)), rows_qF.shape[1])
    exact_n = scores_of_pairs(queries_qD, part.rows, query_n, rows_qF.ravel())
    worst = float(np.abs(scores_qF.ravel() - exact_n).max(initial=0.0))
    if not worst <= error:
        raise RuntimeError(
            f"float32 products are wrong by {worst:.2e}, more than the {error:.2e} that float32 allows: something "
            "computes them in lower precision (TF32?)"
        )
