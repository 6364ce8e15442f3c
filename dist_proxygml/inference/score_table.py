"""The meaning of a score in an index: how many answers are right from each score on, and how scores are distributed.

    precision(t) = right answers with score >= t / answers with score >= t
    recall(t)    = right answers with score >= t / right answers that lists of ten can hold

Labelled rows ask as somebody who searches does: each for its ten nearest with the index's own search, itself left out;
an answer is right if it is of the same class. Rows without another one of their class ask as well, since those who
search have such images, too. More than 10,000 rows are drawn from at random. Beside it stand histograms of the scores
of all pairs of the asking rows and any other, of the same and of different classes (exact counts, verification.py).

Stored in the index as scores.json. Chosen: counts in bins of 0.0001, as fine as people type thresholds;
declined: a curve with a point for each answer, hundreds of times as large.

Dimension key: n rows, q asking rows, k answers, D embedding.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.evaluation.verification import Histogram, Pairs, count_scores
from dist_proxygml.storage.files import parse_json

NUM_ANSWERS = 10  # as `search` shows unless told otherwise
MAX_QUERIES = 10_000
BINS = 10_000  # per unit of score
_MOST = BINS * 21 // 20  # unit rows may score a little above 1
_EDGES = np.arange(-_MOST, _MOST + 1) / BINS
_QUERIES_AT_A_TIME = 1024

Search = Callable[[Float[np.ndarray, "q D"], int], tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]]


class Measured(NamedTuple):
    """Answers from one score on."""

    score: float  # of the lowest, rounded down to a bin
    num_answers: int
    precision: float
    recall: float


class ScoreTable(NamedTuple):
    """Counts of answers by score.

    Attributes:
        measured_on: whose rows asked, for people.
        num_queries: rows that asked.
        num_rows: rows that were searched.
        num_possible: right answers that the lists could have held.
        first_bin: bin b has the scores from b / 10,000 on, below (b + 1) / 10,000.
        right, wrong: answers in the bins from `first_bin` on.
        histogram: scores of pairs.
    """

    measured_on: str
    num_queries: int
    num_rows: int
    num_possible: int
    first_bin: int
    right: list[int]
    wrong: list[int]
    histogram: Histogram

    def at(self, score: float) -> Measured | None:
        """The answers from a score on, rounded down to a bin; None if there are none."""
        place = _EDGES[int(np.searchsorted(_EDGES, score, side="right")) - 1]
        return next((found for found in self._of_bins() if found.score >= place), None)

    def lowest_for(self, precision: float) -> Measured | None:
        """The lowest score of an answer from which on the precision is as wanted, so the most recall; None without."""
        return next((found for found in self._of_bins() if found.precision >= precision), None)

    @property
    def best(self) -> Measured:
        """The answers from the score on that gives the highest precision, the lowest such score."""
        return max(self._of_bins(), key=lambda found: found.precision)

    def _of_bins(self) -> list[Measured]:
        """The answers from each bin on in which there are some, scores ascending."""
        right, wrong = (np.cumsum(counts[::-1])[::-1].tolist() for counts in (self.right, self.wrong))
        return [
            Measured((self.first_bin + bin) / BINS, r + w, r / (r + w), r / self.num_possible)
            for bin, (r, w) in enumerate(zip(right, wrong, strict=True))
            if self.right[bin] + self.wrong[bin]
        ]

    def to_json(self) -> str:
        """The table as a JSON document."""
        return json.dumps({**self._asdict(), "histogram": self.histogram._asdict()}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "ScoreTable":
        """Read what `to_json` wrote. Raises ValueError, TypeError or KeyError for anything else."""
        document = parse_json(text)
        table = cls(**{**document, "histogram": Histogram(**document["histogram"])})
        histogram = table.histogram
        places = [table.first_bin, histogram.first_bin, *table[1:4]]
        counts = [*table.right, *table.wrong, *histogram.same, *histogram.different]
        if not isinstance(table.measured_on, str) or any(type(number) is not int for number in [*places, *counts]):
            raise TypeError("expected whole numbers")
        is_even = len(table.right) == len(table.wrong) and len(histogram.same) == len(histogram.different)
        if not is_even or min(counts) < 0 or table.num_possible < 1 or not sum(table.right) + sum(table.wrong):
            raise ValueError("expected counts of answers")
        if table.first_bin < -_MOST or len(table.right) > len(_EDGES):
            raise ValueError("expected scores from -1 to 1")
        return table


def why_not_measurable(records: Sequence[ImageRecord]) -> str | None:
    """The reason why scores of these rows cannot be judged; None if they can."""
    labels = [record.label for record in records if record.label is not None]
    if len(labels) < len(records):
        return f"{len(records) - len(labels):,} of {len(records):,} rows have no class label"
    if len(set(labels)) == len(labels):
        return "no class has two rows"
    return None


def measure_scores(
    search: Search,
    rows_nD: Float[np.ndarray, "n D"],
    records: Sequence[ImageRecord],
    *,
    measured_on: str,
    max_queries: int = MAX_QUERIES,
) -> ScoreTable:
    """Let rows of an index search in it.

    Args:
        search: queries and k -> scores and rows of the nearest, as `Index.search`.
        rows_nD: unit rows of the index, float32; may be mapped.
        records: of the rows, for which `why_not_measurable` knows no reason.
        measured_on: for people.
        max_queries: rows that ask, at most.
    """
    label_n = np.array([record.label for record in records])
    num_answers = min(NUM_ANSWERS, len(label_n) - 1)
    asking_q = np.arange(len(label_n))
    if len(label_n) > max_queries:
        asking_q = np.sort(np.random.default_rng(0).choice(len(label_n), max_queries, replace=False))
    counts = np.zeros((2, len(_EDGES)), dtype=np.int64)
    with tqdm(total=len(asking_q), desc="judging scores", unit=" rows", delay=2.0, mininterval=0.5) as bar:
        for start in range(0, len(asking_q), _QUERIES_AT_A_TIME):
            asked = asking_q[start : start + _QUERIES_AT_A_TIME]
            scores_qk, rows_qk = search(np.asarray(rows_nD[asked], dtype=np.float32), num_answers + 1)
            others = np.argsort(rows_qk == asked[:, None], axis=1, kind="stable")[:, :num_answers]  # itself goes last
            scores_qk, rows_qk = (np.take_along_axis(found, others, axis=1) for found in (scores_qk, rows_qk))
            bins_qk = np.searchsorted(_EDGES, scores_qk.astype(np.float64), side="right") - 1
            is_right_qk = label_n[rows_qk] == label_n[asked][:, None]
            for row, chosen in enumerate((~is_right_qk, is_right_qk)):
                counts[row] += np.bincount(bins_qk[chosen], minlength=len(_EDGES))
            bar.update(len(asked))
    _, class_n, sizes_C = np.unique(label_n, return_inverse=True, return_counts=True)
    possible = int(np.minimum(sizes_C[class_n[asking_q]] - 1, num_answers).sum())
    filled = np.flatnonzero(counts.any(axis=0))
    wrong, right = counts[:, filled[0] : filled[-1] + 1].tolist()
    pairs = Pairs(rows_nD, label_n)
    if len(asking_q) < len(label_n):
        pairs = Pairs(np.asarray(rows_nD[asking_q]), label_n[asking_q], rows_nD, label_n, asking_q)
    first_bin = int(filled[0]) - _MOST
    histogram = count_scores(pairs)
    return ScoreTable(measured_on, len(asking_q), len(label_n), possible, first_bin, right, wrong, histogram)


def describe_scores(table: ScoreTable, precisions: Sequence[float] = (0.9, 0.95, 0.99)) -> str:
    """Scores to choose from, a line each."""
    lines = [
        f"scores, measured on {table.measured_on}: {table.num_queries:,} of {table.num_rows:,} rows asked for their "
        f"{NUM_ANSWERS} nearest",
        "precision  from score  recall   answers",
    ]
    for precision in precisions:
        found = table.lowest_for(precision)
        if found is None:
            best = table.best
            lines.append(f"{precision:9g}  not reached; {best.precision:.3f} from {best.score:.4f} is the most")
        else:
            lines.append(f"{precision:9g}  {found.score:10.4f}  {found.recall:6.3f}  {found.num_answers:8,}")
    return "\n".join(lines)
