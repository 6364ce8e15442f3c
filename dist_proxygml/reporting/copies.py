"""Images of one split whose file is also in another: equal length and crc32 by the two indexes, then equal bytes.

No image is decoded, and two splits of any size take one sort. Declined: finding the same picture in another size or
compression among training images. That needs the pixels of both splits, or embeddings of the training images, which no
run has; among test images the report shows the pairs with the most similar embeddings.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.reporting.thumbnails import Thumbnails

_MAX_COMPARED = 1000  # files compared byte for byte


class Pair(NamedTuple):
    """An image of this split and one of the other."""

    here: int
    there: int


class Copies(NamedTuple):
    """Files of this split that are also in the other one, one pair each."""

    pairs: list[Pair]  # compared byte for byte
    num_found: int  # by length and crc32
    num_compared: int  # of those; the first ones

    @property
    def num_expected(self) -> int:
        """All copies, assuming that files that were not compared are equal."""
        return len(self.pairs) + self.num_found - self.num_compared


def find_copies(here: Thumbnails, there: Thumbnails) -> Copies:
    """Find the images of one split whose file is in another.

    Raises:
        ValueError: a file cannot be read.
    """
    keys_n, keys_m = file_keys(here.index), file_keys(there.index)
    first = np.argsort(keys_m, kind="stable")
    places_n = np.searchsorted(keys_m[first], keys_n)
    places_n[places_n == len(keys_m)] = 0
    twin_n = first[places_n]
    found = np.flatnonzero(keys_m[twin_n] == keys_n)
    compared = [Pair(int(i), int(twin_n[i])) for i in found[:_MAX_COMPARED]]
    same = [pair for pair in compared if here.file(pair.here) == there.file(pair.there)]
    return Copies(same, len(found), len(compared))


def file_keys(index: ShardIndex) -> Int[np.ndarray, " n"]:
    """Compute a uint64 per image that is equal for files of equal length and crc32."""
    return (index.samples["nbytes"].astype(np.uint64) << np.uint64(32)) | index.samples["crc32"].astype(np.uint64)
