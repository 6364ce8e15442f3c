"""Damaged images: a log over all ranks, and how many a run tolerates.

An image whose bytes changed or do not decode is detected when it is read. Under the policy `fail` it ends the run.
Under `skip` another image replaces it in training, and an evaluation skips it; either way it is listed in
`damaged.jsonl` of the run's folder, and a run with more of them than allowed ends on all ranks.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_on_rank_zero
from dist_proxygml.storage.files import read_log

DAMAGE_FILE = "damaged.jsonl"
DAMAGE_FIELDS = {"split": str, "image": str, "reason": str}


class Damage(NamedTuple):
    """An image that could not be used."""

    image: str  # shard and key
    reason: str


def num_allowed(max_share: float, num_images: int) -> int:
    """Return the number of damaged images that a run tolerates: a share, rounded up."""
    return math.ceil(max_share * num_images)


class DamageLog:
    """Damaged images of one split, each counted once, over all starts of the run.

    Built on all ranks. Only rank 0 reads and writes `path`; splits may share it.

    Raises:
        ValueError: on every rank, if the file lists more images than `max_share` of the split, rounded up.
    """

    def __init__(self, path: Path, *, split: str, num_images: int, max_share: float, context: ParallelContext) -> None:
        self.path = path
        self.split = split
        self.max_damaged = num_allowed(max_share, num_images)
        self.num_images = num_images
        self.context = context
        self._known: dict[str, str] = run_on_rank_zero(context, self._read)
        self._check()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: Sequence[Damage]) -> list[Damage]:
        """Record what this rank found; return what is new over all ranks. Called on all ranks.

        Raises:
            ValueError: on every rank, if there are now more damaged images than `max_share` of the split, rounded up.
        """
        gathered = [damage for part in all_gather_object(self.context, list(found)) for damage in part]
        new = list({damage.image: damage for damage in gathered if damage.image not in self._known}.values())
        if not new:
            return []
        self._known.update(new)
        run_on_rank_zero(self.context, self._write, new)
        self._check()
        return new

    def _check(self) -> None:
        if len(self) > self.max_damaged:
            image, reason = list(self._known.items())[-1]
            raise AgreedError(
                f"{len(self)} of {self.num_images} images are damaged (see {self.path}), the last {image}: {reason}; "
                f"data.max_damaged allows {self.max_damaged}; repair the shards (python -m dist_proxygml.shard verify "
                f"--deep) and remove that file, or allow more"
            )

    def _read(self) -> dict[str, str]:
        """Read what earlier starts of the run found; invalid lines are ignored."""
        records = [record for _, record in read_log(self.path, DAMAGE_FIELDS).records]
        return {record["image"]: record["reason"] for record in records if record["split"] == self.split}

    def _write(self, new: Sequence[Damage]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as stream:
            for damage in new:
                stream.write(json.dumps({"split": self.split, **damage._asdict()}, ensure_ascii=False) + "\n")
