"""Steps that were skipped because something was NaN or infinite: their log, and how many are tolerated.

One such step costs one step. Several in a row, or more than one in a hundred, mean that the parameters themselves are
the cause: the run rolls back to the parameters of its last checkpoint and continues with images it has not seen yet.
If several rollbacks do not help, it ends with status 65: starting it again would not help either.
"""

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from dist_proxygml.distributed.collectives import NonFiniteError
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_on_rank_zero

NON_FINITE_FILE = "nonfinite.jsonl"
NON_FINITE_FIELDS = {"step": int}
_NUM_NAMED = 3
_WINDOW = 1000  # steps, of which one in a hundred may be skipped
_MOST_IN_WINDOW = _WINDOW // 100


class NonFiniteLog:
    """The skipped steps of this start of a run. Built, and every method called, on all ranks.

    Args:
        path: file to which rank 0 appends a line for each.
        max_in_row: consecutive skipped steps after which the run rolls back.
        max_rollbacks: maximum number of rollbacks.
        context: this process among its peers.
    """

    def __init__(self, path: Path, *, max_in_row: int, max_rollbacks: int, context: ParallelContext) -> None:
        self.path = path
        self.num_in_row = 0
        self.num_rollbacks = 0
        self._recent: deque[int] = deque(maxlen=_MOST_IN_WINDOW + 1)  # skipped steps
        self._max_in_row, self._max_rollbacks = max_in_row, max_rollbacks
        self._context = context

    @property
    def is_full(self) -> bool:
        """Whether so many steps were skipped, in a row or of the last thousand, that the run should roll back."""
        return self.num_in_row >= self._max_in_row or self._are_too_many

    @property
    def _are_too_many(self) -> bool:
        return len(self._recent) > _MOST_IN_WINDOW and self._recent[-1] - self._recent[0] < _WINDOW

    def add(self, step: int, reason: str, images: Sequence[str]) -> str:
        """Record a skipped step with this rank's suspected images; return a message."""
        self.num_in_row += 1
        self._recent.append(step)
        suspects = {rank: list(named) for rank, named in enumerate(all_gather_object(self._context, images)) if named}
        line = {"step": step, "reason": reason, "images": suspects}
        run_on_rank_zero(self._context, self._write, line)
        named = [f"{image} (rank {rank})" for rank, images in suspects.items() for image in images]
        more = f" and {len(named) - _NUM_NAMED} more" if len(named) > _NUM_NAMED else ""
        which = f"; images: {', '.join(named[:_NUM_NAMED])}{more}" if named else ""
        return f"skipped step {step} on all ranks: {reason}{which}"

    def roll_back(self, step: int, checkpoint: Path | None) -> str:
        """Record a rollback to a checkpoint; return a message.

        Raises:
            NonFiniteError: there were too many rollbacks, or there is no checkpoint.
        """
        num_left_out = len(self._recent) if self._are_too_many else self.num_in_row
        what = f"{num_left_out} steps up to step {step} came out as NaN or infinite, see {self.path}"
        remedy = "lower the learning rates, warm up for longer, or clip gradients"
        if checkpoint is None:
            raise NonFiniteError(f"{what}; there is no checkpoint yet to roll back to; {remedy}")
        if self.num_rollbacks == self._max_rollbacks:
            raise NonFiniteError(f"{what}; {self.num_rollbacks} rollbacks have not helped; {remedy}")
        self.num_rollbacks += 1
        self.num_in_row = 0
        self._recent.clear()
        run_on_rank_zero(self._context, self._write, {"step": step, "back_to": checkpoint.name})
        return f"{what}: rolled back to the parameters of {checkpoint}; continuing with the next images"

    def _write(self, line: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
