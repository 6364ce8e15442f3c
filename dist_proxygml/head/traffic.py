"""Bytes that a rank receives in a step's collectives, and the selection that needs the fewest. Pure integers.

Counted as in distributed/collectives.py: bytes received from other ranks, in float32 and int64 as sent, an all-reduce
by the ring algorithm (2 (W - 1) / W times its size; Patarasu and Yuan, Journal of Parallel and Distributed Computing
2009).

Only "gather" grows with the number of classes; it is for banks of about the size of the batch.
"""

from dist_proxygml.head.partition import ClassPartition

_FLOAT, _LABEL = 4, 8
_HISTOGRAM_BYTES = 4 * 256 * 4  # a histogram of 256 int32 counts for each byte of a float32
SELECTIONS = ("gather", "candidates", "histogram")


def bytes_per_step(
    selection: str,
    *,
    batch_size: int,
    num_classes: int,
    proxies_per_class: int,
    embedding_dim: int,
    topk: int | None,
    world_size: int,
    num_prefixes: int = 0,
) -> int:
    """Return the bytes that rank 0 receives for one micro-batch of `batch_size` images over all ranks, forward and
    backward, without the regulariser.

    `selection` is "none" where not the top-k competes. Each of `num_prefixes` of the embedding that are classified has
    an exchange and a softmax of its own. Assumes that the batch divides over the ranks; other ranks differ by the size
    of the last partition.
    """
    others = world_size - 1
    if others == 0:
        return 0
    own_rows = batch_size // world_size
    counts = [count * proxies_per_class for count in ClassPartition(num_classes, world_size).counts()]
    reduced = 2 * others / world_size  # received per byte that is all-reduced
    choice: float
    sizes = others * 2 * _LABEL
    if selection == "gather":
        bank = 2 * others * counts[0] * embedding_dim * _FLOAT  # rows are padded to the longest partition
        return round(sizes + bank + reduced * 2 * _FLOAT)
    embeddings = 2 * others * own_rows * embedding_dim * _FLOAT
    labels = others * own_rows * _LABEL
    softmax = reduced * batch_size * 4 * _FLOAT
    if selection == "none":
        choice = 0
    elif selection == "candidates":
        assert topk is not None
        num_negatives = topk - proxies_per_class
        values = sum(own_rows * min(num_negatives, count) * _FLOAT for count in counts[1:])
        choice = values + others * own_rows * 16  # threshold and quota, float64
    else:
        choice = reduced * batch_size * _HISTOGRAM_BYTES + others * batch_size * _LABEL
    return round(sizes + embeddings + labels + (1 + num_prefixes) * (choice + softmax))


def cheapest_selection(
    *,
    batch_size: int,
    num_classes: int,
    proxies_per_class: int,
    embedding_dim: int,
    topk: int,
    world_size: int,
    may_gather: bool = True,
) -> str:
    """Return the selection that receives the fewest bytes; ties go to gather, then candidates, then histogram.

    Gathering the bank needs a dense gradient; `may_gather` says whether there is one.
    """

    def cost(selection: str) -> int:
        return bytes_per_step(
            selection,
            batch_size=batch_size,
            num_classes=num_classes,
            proxies_per_class=proxies_per_class,
            embedding_dim=embedding_dim,
            topk=topk,
            world_size=world_size,
        )

    return min(SELECTIONS if may_gather else SELECTIONS[1:], key=cost)


def regularizer_bytes(anchors: int | None, *, num_classes: int, embedding_dim: int, world_size: int) -> int:
    """Return the bytes that rank 0 receives for the regulariser of one micro-batch, forward and backward.

    In full (`anchors` None): the class sums, a number, the class sums' gradient. Sampled: the anchors, assumed to be
    spread evenly, three numbers for each and their gradient.
    """
    others = world_size - 1
    reduced = 2 * others / world_size
    if anchors is None:
        largest = ClassPartition(num_classes, world_size).num_local  # rows are padded to the longest partition
        gradient = reduced * num_classes * embedding_dim * _FLOAT
        return round(others * largest * embedding_dim * _FLOAT + gradient + reduced * _FLOAT)
    gathered = others / world_size * anchors * embedding_dim * _FLOAT
    return round(gathered + reduced * anchors * (embedding_dim + 3) * _FLOAT)
