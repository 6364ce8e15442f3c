"""Verification: telling pairs of images of one class from pairs of two by their score, over all pairs, exactly.

    FAR(t) = share of the pairs of different classes with score >= t      (false accept rate)
    TAR(t) = share of the pairs of the same class with score >= t         (true accept rate)

    TAR@FAR=f = max of TAR(t) over all t with FAR(t) <= f

(ISO/IEC 19795-1, with acceptance at equality.) With M pairs of different classes k = floor(f M) of them may be
accepted; what counts is the one that may not, s_{k+1}, and pairs of one class are accepted if they score more than
that. Pairs that tie with it are thus rejected. There is no interpolation, and an f below 1 / M is not measurable.

N^2 scores are never kept. They are counted, in passes over all pairs: first in bins of 2^-13, then within the bins
that hold a wanted s_{k+1} and pairs of the same class as well, in bins of 2^-29, and so on to the last digit 2^-52
(radix selection). Mostly two passes decide everything, four always do; memory does not depend on the number of pairs.
Scores are the exact ones of exact.py, so the counts, integers, are the same for any number of ranks and any blocks.
All products are float64: float32 first, as where neighbours are searched, saves half of a product and needs exact
scores near every edge of a bin, which a first pass alone has 16,384 of.

Ten-fold accuracy goes by the protocol of Labeled Faces in the Wild (Huang et al. 2007, "image-restricted"): the
threshold that is best on nine folds decides the tenth.

Dimension key: n images, r rows and c columns of a tile, p pairs, D embedding.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from dist_proxygml.distributed.collectives import all_reduce_sum
from dist_proxygml.distributed.parallel import ParallelContext, run_long, single_process
from dist_proxygml.evaluation.exact import SCALE
from dist_proxygml.protocols import far_metric

SAME, DIFFERENT = 1, 0  # rows of counts
SHIFTS = (39, 23, 7, 0)  # a bin of a pass is 2^(shift - 52) wide
NUM_BINS = 1 << 15  # of the first pass: scores from -2 to 2
OFFSET = NUM_BINS // 2
BINS_SHOWN = 64  # per unit of score, of a histogram for people
OFFSET_SHOWN = 2 * BINS_SHOWN
_ROC_POINTS = 120
_TILE_ON_CPU, _TILE_ON_GPU = (512, 2048), (2048, 16384)  # rows and columns

Blocks = Callable[[], Iterator[tuple[Tensor, int]]]
"""Goes once over scores, float64 [p], exact, which may be overwritten; with SAME or DIFFERENT."""


class Pairs(NamedTuple):
    """Which images are compared: each two of `rows` once, or each row with each of `others`."""

    rows: Float[np.ndarray, "r D"]  # unit rows, float32; rounded as they are used, so they may be mapped
    labels: Int[np.ndarray, " r"]
    others: Float[np.ndarray, "c D"] | None = None
    other_labels: Int[np.ndarray, " c"] | None = None
    own: Int[np.ndarray, " r"] | None = None  # the place of each row among the others, which it is not compared with


class OperatingPoint(NamedTuple):
    """A threshold, and what is accepted at or above it."""

    far: float  # as wanted
    threshold: float
    num_same: int
    num_different: int


class Histogram(NamedTuple):
    """Pairs in bins of 1 / 64, without empty ones at either end: bin b, from `first_bin` on, has the scores from b / 64
    on.
    """

    first_bin: int
    same: list[int]
    different: list[int]


class Verification(NamedTuple):
    """How well scores tell pairs of one class from others.

    Attributes:
        num_same, num_different: pairs.
        points: for each wanted FAR that is measurable, in order.
        not_measurable: the FARs that are not: below 1 / num_different.
        roc: thresholds, descending, with the numbers of pairs of the same and of different classes at or above them; a
            hundred or so.
        histogram: of the scores of both kinds.
        accuracies: of the folds, if there are folds.
        num_left_out: listed pairs without one of their images.
    """

    num_same: int
    num_different: int
    points: list[OperatingPoint]
    not_measurable: list[float]
    roc: list[tuple[float, int, int]]
    histogram: Histogram
    accuracies: list[float]
    num_left_out: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """Fractions by name: tar@far=F where it is measurable; with folds pair_accuracy and pair_accuracy_sd."""
        found = {far_metric(point.far): point.num_same / self.num_same for point in self.points}
        if self.accuracies:
            found["pair_accuracy"] = statistics.fmean(self.accuracies)
            found["pair_accuracy_sd"] = statistics.stdev(self.accuracies)
        return found

    def as_document(self) -> dict[str, Any]:
        """For JSON."""
        points = [point._asdict() for point in self.points]
        return {**self._asdict(), "points": points, "histogram": self.histogram._asdict()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Verification":
        """What `as_document` gave. Raises KeyError, TypeError or ValueError for anything else."""
        numbers = {name: document[name] for name in cls._fields}
        found = cls(**numbers)._replace(
            points=[OperatingPoint(**point) for point in document["points"]],
            roc=[(float(threshold), int(same), int(different)) for threshold, same, different in document["roc"]],
            histogram=Histogram(**document["histogram"]),
        )
        counted = [found.num_same, found.num_different, *found.histogram.same, *found.histogram.different]
        for point in found.points:
            counted += [point.num_same, point.num_different]
            if not all(isinstance(value, int | float) for value in (point.far, point.threshold)):
                raise TypeError("an operating point is no number")
        if not all(type(count) is int for count in counted) or found.num_same < 1 or found.num_different < 1:
            raise TypeError("a number of pairs is no number")
        if len(found.histogram.same) != len(found.histogram.different):
            raise ValueError("histograms of other lengths")
        return found


def verify_all(
    pairs: Pairs,
    *,
    fars: Sequence[float],
    context: ParallelContext,
    meanwhile: Callable[[], object] | None = None,
    tile: tuple[int, int] | None = None,
) -> Verification:
    """Count all pairs, shared out over the ranks. Called on all ranks; the same result on all of them.

    Args:
        pairs: the same on every rank.
        fars: above 0, below 1.
        context: this process among its peers.
        meanwhile: called now and then on all ranks at once; may use collectives and raise.
        tile: rows and columns of a block; no number depends on it.

    Raises:
        ValueError: on every rank: there are no pairs of one of the two kinds.
    """
    tile = tile or (_TILE_ON_GPU if context.device.type == "cuda" else _TILE_ON_CPU)

    def blocks() -> Iterator[tuple[Tensor, int]]:
        return _scores(pairs, tile, context)

    def count(work: Callable[[], Tensor]) -> Tensor:
        counts = run_long(context, work, meanwhile=meanwhile)
        return all_reduce_sum(counts, group=context.group).cpu()

    return _verify(blocks, count, fars, context.device)


def verify_listed(
    score_p: Float[np.ndarray, " p"],
    same_p: Bool[np.ndarray, " p"],
    fold_p: Int[np.ndarray, " p"],
    *,
    fars: Sequence[float],
) -> Verification:
    """The same for pairs that are listed, with the accuracy of each fold.

    Raises:
        ValueError: there are no pairs of one of the two kinds, or fewer than two folds.
    """
    scores = {kind: torch.from_numpy(score_p[same_p == bool(kind)]) for kind in (DIFFERENT, SAME)}
    found = _verify(
        lambda: iter([(scores[kind].clone(), kind) for kind in (DIFFERENT, SAME)]),
        lambda work: work(),
        fars,
        torch.device("cpu"),
    )
    return found._replace(accuracies=fold_accuracies(score_p, same_p, fold_p))


def count_scores(pairs: Pairs) -> Histogram:
    """The histogram of the scores alone, on this process."""
    here = single_process()
    return _coarse(_count_all(lambda: _scores(pairs, _TILE_ON_CPU, here), here.device))


def fold_accuracies(
    score_p: Float[np.ndarray, " p"], same_p: Bool[np.ndarray, " p"], fold_p: Int[np.ndarray, " p"]
) -> list[float]:
    """The share of each fold's pairs that the best threshold of the other folds decides rightly.

    That threshold lies half way between two neighbouring scores of the other folds; of equally good ones it is the
    highest.

    Raises:
        ValueError: there are fewer than two folds.
    """
    folds = np.unique(fold_p)
    if len(folds) < 2:
        raise ValueError(f"expected at least two folds of pairs, got {len(folds)}; give the pairs other folds")
    accuracies = []
    for fold in folds:
        tested_p = fold_p == fold
        threshold = _best_threshold(score_p[~tested_p], same_p[~tested_p])
        accuracies.append(float(((score_p[tested_p] >= threshold) == same_p[tested_p]).mean()))
    return accuracies


def _best_threshold(score_p: np.ndarray, same_p: np.ndarray) -> float:
    values_v, place_p = np.unique(-score_p, return_inverse=True)
    values_v = -values_v  # descending
    gain_v = np.bincount(place_p, weights=np.where(same_p, 1, -1))  # of accepting one value more
    best = int(np.concatenate([[0], np.cumsum(gain_v)]).argmax())  # how many values to accept
    if best == 0:
        return math.inf
    last, next_one = values_v[best - 1], values_v[min(best, len(values_v) - 1)]
    middle = (last + next_one) / 2
    return float(middle if middle > next_one else last)


# ---- counting --------------------------------------------------------------------------------------------------------


class _Open(NamedTuple):
    """A FAR whose threshold is known to lie in one bin."""

    number: int  # of the FAR
    prefix: int  # the bin
    same: int  # accepted above the bin
    different: int


def _verify(
    blocks: Blocks, count: Callable[[Callable[[], Tensor]], Tensor], fars: Sequence[float], device: torch.device
) -> Verification:
    """Radix selection. `count` makes one rank's counts those of all."""
    first = count(partial(_count_all, blocks, device))
    num_different, num_same = first.sum(dim=1).tolist()
    if not num_same or not num_different:
        raise ValueError(
            f"expected pairs of the same class and pairs of different classes, got {num_same:,} and "
            f"{num_different:,}; evaluate a split with several images in several classes"
        )
    points: dict[int, OperatingPoint] = {}
    allowed = [count_allowed(far, num_different) for far in fars]
    is_open = [_Open(number, 0, 0, 0) for number, most in enumerate(allowed) if most]
    counts, offset = {0: first}, -OFFSET
    for level, shift in enumerate(SHIFTS):
        unit, still_open = math.ldexp(1.0, shift - 52), []
        for far in is_open:
            of_bin = counts[far.prefix]
            above_b = of_bin.flip(1).cumsum(1).flip(1)  # in this bin or above
            bin = int((above_b[DIFFERENT] + far.different > allowed[far.number]).sum()) - 1  # that of s_{k+1}
            different, same = (above_b[:, bin] - of_bin[:, bin]).tolist()
            prefix = (far.prefix << (SHIFTS[level - 1] - shift) if level else 0) + bin + offset
            found = _Open(far.number, prefix, far.same + same, far.different + different)
            if int(of_bin[SAME, bin]) and shift:
                still_open.append(found)
            else:
                points[far.number] = OperatingPoint(fars[far.number], (prefix + 1) * unit, found.same, found.different)
        is_open, offset = still_open, 0
        if not is_open:
            break
        prefixes = sorted({far.prefix for far in is_open})
        within = count(partial(_count_within, blocks, prefixes, shift, SHIFTS[level + 1], device))
        counts = dict(zip(prefixes, within.unbind(1), strict=True))
    return Verification(
        num_same,
        num_different,
        [points[number] for number in sorted(points)],
        [far for far, most in zip(fars, allowed, strict=True) if not most],
        _curve(first),
        _coarse(first),
        [],
    )


def count_allowed(far: float, num_different: int) -> int:
    """k: how many of the pairs of different classes may be accepted; 0 where the FAR is not measurable."""
    most = int(far * num_different)
    while (most + 1) / num_different <= far:
        most += 1
    while most / num_different > far:
        most -= 1
    return most


def _count_all(blocks: Blocks, device: torch.device) -> Tensor:
    """int64 [2, NUM_BINS]."""
    counts = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=device)
    for scores, kind in blocks():
        counts[kind] += torch.bincount(_first_bins(scores), minlength=NUM_BINS)
    return counts


def _count_within(blocks: Blocks, prefixes: Sequence[int], shift: int, next_shift: int, device: torch.device) -> Tensor:
    """int64 [2, prefixes, bins]: the next digits of the scores with these prefixes, which ascend."""
    num_digits = 1 << (shift - next_shift)
    prefix_f = torch.tensor(prefixes, device=device)
    counts = torch.zeros(2, len(prefixes) * num_digits, dtype=torch.int64, device=device)
    is_wanted = torch.zeros(NUM_BINS, dtype=torch.bool, device=device)
    is_wanted[(prefix_f >> (SHIFTS[0] - shift)) + OFFSET] = True
    for scores, kind in blocks():
        chosen = is_wanted.index_select(0, _first_bins(scores.clone()))
        key = (scores[chosen] * 2.0**52).long()
        prefix = key >> shift
        place = torch.searchsorted(prefix_f, prefix).clamp_(max=len(prefixes) - 1)
        kept = prefix_f[place] == prefix
        digit = (key[kept] >> next_shift) & (num_digits - 1)
        counts[kind] += torch.bincount(place[kept] * num_digits + digit, minlength=counts.shape[1])
    return counts.view(2, len(prefixes), num_digits)


def _first_bins(scores: Tensor) -> Tensor:
    """int32, from 0; the scores are overwritten. Every step is exact: a sum of score and offset would round."""
    return scores.mul_(2.0 ** (52 - SHIFTS[0])).floor_().add_(OFFSET).to(torch.int32)


def _scores(pairs: Pairs, tile: tuple[int, int], context: ParallelContext) -> Iterator[tuple[Tensor, int]]:
    """The scores of this rank's share of the pairs."""
    device = context.device
    is_within = pairs.others is None
    order_r = np.argsort(pairs.labels, kind="stable")
    order_c, labels_C = order_r, pairs.labels
    if pairs.others is not None:
        assert pairs.other_labels is not None
        order_c, labels_C = np.argsort(pairs.other_labels, kind="stable"), pairs.other_labels
    columns = pairs.rows if pairs.others is None else pairs.others
    label_r, label_c = pairs.labels[order_r], labels_C[order_c]
    starts = range(0, len(order_r), tile[0])
    hidden = None if context.is_main else True  # None: hidden unless a person looks at it
    own_starts = starts[context.rank :: context.world_size]
    for start in tqdm(own_starts, desc="comparing pairs", unit=" tiles", delay=5.0, disable=hidden):
        stop = min(start + tile[0], len(order_r))
        rows_rD = _rounded(pairs.rows[order_r[start:stop]], device)
        # Columns of the rows' own classes; all others are pairs of different classes as a whole.
        first = start if is_within else int(np.searchsorted(label_c, label_r[start], side="left"))
        end = int(np.searchsorted(label_c, label_r[stop - 1], side="right"))
        before = 0 if is_within else first
        for low, high, is_mixed in ((0, before, False), (first, end, True), (end, len(label_c), False)):
            for column in range(low, high, tile[1]):
                place_c = np.arange(column, min(column + tile[1], high))
                columns_cD = _rounded(columns[order_c[place_c]], device)
                scores_rc = rows_rD @ columns_cD.T
                if not is_mixed:
                    yield scores_rc.view(-1), DIFFERENT
                    continue
                if is_within:
                    counts_rc = place_c > np.arange(start, stop)[:, None]
                elif pairs.own is not None:
                    counts_rc = order_c[place_c] != pairs.own[order_r[start:stop], None]
                else:
                    counts_rc = np.ones(scores_rc.shape, dtype=bool)
                same_rc = label_c[place_c] == label_r[start:stop, None]
                for kind in (DIFFERENT, SAME):
                    yield scores_rc[torch.from_numpy(counts_rc & (same_rc == bool(kind))).to(device)], kind


def _rounded(rows_nD: np.ndarray, device: torch.device) -> Tensor:
    """float64, multiples of 2^-26 as `round_rows` makes them; rounded rows stay as they are."""
    return torch.from_numpy(rows_nD).to(device).double().mul_(SCALE).round_().mul_(1 / SCALE)


# ---- for people ------------------------------------------------------------------------------------------------------


def _coarse(counts: Tensor) -> Histogram:
    """Bins for people from those of the first pass."""
    coarse = counts.view(2, 4 * BINS_SHOWN, -1).sum(dim=2)
    filled = coarse.sum(dim=0).nonzero()
    low, high = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (OFFSET_SHOWN, OFFSET_SHOWN)
    return Histogram(low - OFFSET_SHOWN, coarse[SAME, low:high].tolist(), coarse[DIFFERENT, low:high].tolist())


def _curve(counts: Tensor) -> list[tuple[float, int, int]]:
    """Thresholds with the numbers of same and different pairs at or above, evenly over the decades of FAR."""
    above = counts.flip(1).cumsum(1).numpy()  # the b-th from the top
    most = above[DIFFERENT, -1]
    # For each the last bin with no more pairs of different classes.
    wanted = np.searchsorted(above[DIFFERENT], [0, *np.geomspace(1, most, _ROC_POINTS), most], side="right") - 1
    points: dict[tuple[int, int], float] = {}
    for place in wanted[wanted >= 0].tolist():
        same, different = int(above[SAME, place]), int(above[DIFFERENT, place])
        points.setdefault((same, different), (NUM_BINS - 1 - place - OFFSET) / 2.0 ** (52 - SHIFTS[0]))
    return [(threshold, same, different) for (same, different), threshold in points.items()]
