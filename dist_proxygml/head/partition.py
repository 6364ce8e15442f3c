"""Assignment of classes to ranks: contiguous ranges in rank order. Pure integers, no process group.

The split is torch.chunk's: ceil(C / W) classes a rank, the last ranks may own fewer or none. A balanced split (sizes
that differ by at most one) was declined: the largest share, which bounds memory and time, is the same, and this one is
the layout of a DTensor placed `Shard(0)`, so checkpoints load on any number of ranks without code of ours. Because
ranges are contiguous, rank order is global proxy index order; the tie rule of the selection relies on that.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassPartition:
    """The classes `start <= class < stop` that `rank` owns, of `num_classes` over `world_size` ranks."""

    num_classes: int
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, {self.world_size}), got {self.rank}")

    @property
    def start(self) -> int:
        """First class of this rank."""
        return min(self.rank * self._share, self.num_classes)

    @property
    def stop(self) -> int:
        """One past the last class of this rank."""
        return min((self.rank + 1) * self._share, self.num_classes)

    @property
    def num_local(self) -> int:
        """Number of classes of this rank; may be 0."""
        return self.stop - self.start

    def counts(self) -> list[int]:
        """Number of classes of every rank, in rank order; sums to `num_classes`."""
        return [ClassPartition(self.num_classes, self.world_size, rank).num_local for rank in range(self.world_size)]

    @property
    def _share(self) -> int:
        return -(-self.num_classes // self.world_size)
