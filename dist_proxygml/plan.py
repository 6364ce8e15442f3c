"""What a run will need, before it allocates anything: bytes per rank for the head, bytes and messages per step. Pure
integers.

The head is the proxy bank, its gradient and optimizer state, and the similarity buffers of one micro-batch; the
backbone is DeepSpeed's.
"""

from dataclasses import dataclass

from dist_proxygml.config import Config
from dist_proxygml.loss import checked_topk
from dist_proxygml.selection import bytes_per_step, cheaper_selection

_FLOAT = 4  # the bank and the similarities are float32
# [B, p] arrays alive at once at the peak of a step: similarities, a masked copy for the choice, the kept similarities,
# and a gradient; the kept, positive and tie masks are one byte each.
_SIMILARITY_ARRAYS_BYTES = 4 * _FLOAT + 3


@dataclass(frozen=True)
class HeadPlan:
    """Needs of the head on the rank that owns the most classes."""

    world_size: int
    num_proxies: int
    topk: int
    selection: str
    bank_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    similarity_bytes: int
    received_bytes_per_step: int
    messages_per_step: int

    def __str__(self) -> str:
        """A table for people."""
        rows = [
            ("ranks", f"{self.world_size}"),
            ("proxies over all ranks", f"{self.num_proxies:,}"),
            ("kept per image k", f"{self.topk:,}"),
            ("selection", self.selection),
            ("bank", format_bytes(self.bank_bytes)),
            ("bank gradient", format_bytes(self.gradient_bytes)),
            ("bank optimizer state", format_bytes(self.optimizer_bytes)),
            ("similarity buffers", format_bytes(self.similarity_bytes)),
            ("received per step", format_bytes(self.received_bytes_per_step)),
            ("messages per step", f"{self.messages_per_step}"),
        ]
        return "plan of the head, per rank:\n" + "\n".join(f"  {name:<24}{value:>14}" for name, value in rows)


def plan_head(config: Config, *, world_size: int) -> HeadPlan:
    """The needs of `config` on `world_size` ranks.

    Raises:
        ValueError: k <= N, or the batch does not divide over the ranks.
    """
    proxies, dim = config.proxies, config.backbone.embedding_dim
    num_proxies = config.data.num_classes * proxies.per_class
    topk = checked_topk(config.data.num_classes, proxies.per_class, ratio=proxies.ratio, topk=proxies.topk)
    micro = config.micro_batch_size(world_size)
    sizes = {
        "batch_size": micro * world_size,
        "num_proxies": num_proxies,
        "embedding_dim": dim,
        "topk": topk,
        "world_size": world_size,
    }
    selection = proxies.selection if proxies.selection != "auto" else cheaper_selection(**sizes)
    own_proxies = config.partition(world_size, 0).num_local * proxies.per_class
    bank = own_proxies * dim * _FLOAT
    others = (world_size - 1) / world_size
    if selection == "gather":
        similarities = micro * num_proxies * _SIMILARITY_ARRAYS_BYTES + 2 * num_proxies * dim * _FLOAT
    else:
        similarities = micro * world_size * own_proxies * _SIMILARITY_ARRAYS_BYTES
    regularizer = 0  # class sums and their gradient
    if proxies.regularization_weight > 0:
        regularizer = config.data.num_classes * dim * 2 * _FLOAT
    # sizes, then gather: bank and its gradient, loss; candidates: embeddings, labels, to the owners, back, MAX, SUM,
    # gradient; the regulariser: class sums, their gradient, and its own sum
    messages = 1 + (3 if selection == "gather" else 7) + (3 if proxies.regularization_weight > 0 else 0)
    return HeadPlan(
        world_size=world_size,
        num_proxies=num_proxies,
        topk=topk,
        selection=selection,
        bank_bytes=bank,
        gradient_bytes=bank,
        optimizer_bytes=2 * bank,
        similarity_bytes=similarities + regularizer,
        received_bytes_per_step=config.accumulation
        * (bytes_per_step(selection, **sizes) + round(others * regularizer)),
        messages_per_step=0 if world_size == 1 else config.accumulation * messages,
    )


def format_bytes(count: float) -> str:
    """A byte count with a binary unit: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
