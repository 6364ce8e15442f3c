"""Damaged images: what was found, by all ranks together, and how much of it a run puts up with.

An image whose bytes changed or do not decode is found when it is read. Under the policy `fail` it ends the run. Under
`skip` another image takes its place in training, and an evaluation leaves it out; either way it is named in
`damaged.jsonl` of the run's folder, and a run that meets more of them than allowed ends on all ranks.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_proxygml.collectives import AgreedError
from dist_proxygml.parallel import ParallelContext, everyone

DAMAGE_FILE = "damaged.jsonl"


class Damage(NamedTuple):
    """An image that could not be used."""

    image: str  # shard and key
    reason: str


class DamageLog:
    """The damaged images of one split, each counted once however often it is met."""

    def __init__(self, path: Path | None, *, num_images: int, max_share: float, context: ParallelContext) -> None:
        self.path = path  # written by rank 0 alone; None keeps no file
        self.max_damaged = math.ceil(max_share * num_images)
        self.num_images = num_images
        self.context = context
        self._known: set[str] = set()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: Sequence[Damage]) -> list[Damage]:
        """Take in what this rank found; returns what is new over all ranks. Called on all ranks.

        Raises:
            ValueError: on every rank: there are now more damaged images than `max_share` of the split, rounded up.
        """
        gathered = [damage for part in everyone(self.context, list(found)) for damage in part]
        new = list({damage.image: damage for damage in gathered if damage.image not in self._known}.values())
        self._known.update(damage.image for damage in new)
        if new and self.path is not None and self.context.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(damage._asdict(), ensure_ascii=False) + "\n" for damage in new)
        if new and len(self._known) > self.max_damaged:
            raise AgreedError(
                f"{len(self)} of {self.num_images} images are damaged, the last {new[-1].image}: {new[-1].reason}; "
                f"data.max_damaged allows {self.max_damaged}; mend the shards (python -m dist_proxygml.shard verify "
                "--deep), or allow more"
            )
        return new
