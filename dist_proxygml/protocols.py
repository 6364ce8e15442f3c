"""Published evaluation protocols: numbers of images and classes, K of Recall@K, queries and gallery.

Counts are those of the data sets' own lists: the last 100 classes of CUB-200-2011, the last 98 of Cars196 (training and
test images of the classification release together), Ebay_test.txt of Stanford Online Products, the query and gallery
images of In-Shop's list_eval_partition.txt, Market-1501 without its junk images, and the lists of MSMT17.
"""

from typing import NamedTuple


class Protocol(NamedTuple):
    """A published evaluation protocol."""

    dataset: str  # name of the layout that the shards were built from
    title: str
    recall_at: tuple[int, ...]
    num_classes: int
    num_images: int  # of the test split, or of the split of queries
    num_gallery: int | None = None  # images of a gallery of its own; None: every image against all others
    exclude_same: str | None = None  # right answers by the query's own camera are left out of the ranking


PROTOCOLS = {
    "cub": Protocol("cub200", "CUB-200-2011", (1, 2, 4, 8), 100, 5_924),
    "cars": Protocol("cars196", "Cars196", (1, 2, 4, 8), 98, 8_131),
    "sop": Protocol("sop", "Stanford Online Products", (1, 10, 100, 1000), 11_316, 60_502),
    "inshop": Protocol("inshop", "In-Shop Clothes Retrieval", (1, 10, 20, 30, 40, 50), 3_985, 14_218, 12_612),
    # The distractors of the gallery are a class that no query has.
    "market1501": Protocol("market1501", "Market-1501", (1, 5, 10), 751, 3_368, 15_913, "camera"),
    "msmt17": Protocol("msmt17", "MSMT17", (1, 5, 10), 3_060, 11_659, 82_161, "camera"),
}

# Those that the authors of ProxyGML published numbers for.
LEGACY_PROTOCOLS = ("cub", "cars", "sop")


def check_counts(name: str, *, num_classes: int, num_images: int, num_gallery: int | None, location: str) -> None:
    """Refuse images that are not those of a published protocol.

    Raises:
        ValueError: another number of classes or images.
    """
    protocol = PROTOCOLS[name]
    expected, got = (
        ", ".join(
            f"{count:,} {what}"
            for count, what in zip(counts, ("classes", "images", "gallery images"), strict=True)
            if count is not None
        )
        for counts in (
            (protocol.num_classes, protocol.num_images, protocol.num_gallery),
            (num_classes, num_images, num_gallery),
        )
    )
    if expected != got:
        raise ValueError(
            f"protocol {name!r} is that of {protocol.title}: expected {expected}, got {got} in {location}; build the "
            f"shards from the whole data set (`python -m dist_proxygml.shard build {protocol.dataset}`), or evaluate "
            'with protocol "custom"'
        )


def far_metric(far: float) -> str:
    """Return the name of TAR at a false accept rate: tar@far=1e-4."""
    return f"tar@far={shown_far(far)}"


def shown_far(far: float) -> str:
    """Format a false accept rate: 1e-4."""
    mantissa, exponent = f"{far:.15e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
