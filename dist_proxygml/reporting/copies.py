"""Images that are in two splits at once: copies of a file, and pictures that look the same.

    copies        files of equal length and crc32 by the two indexes, then compared byte for byte
    look-alikes   difference hashes that differ in at most MAX_BITS of 64 bits, and small colour pictures that differ by
                  at most MAX_DIFFERENCE (root mean square): another size, another compression of the same picture

Copies cost nothing at any size. Look-alikes need the pixels, so at most `most` images of each split are drawn for
them; a JPEG is decoded at an eighth of its size, which makes that seconds. The hash alone takes any two shapes on
white for each other, the colours alone any two pale pictures; together they find what people call the same picture.
Declined: similarity of embeddings. It needs the training images' embeddings, which no run has, and a good model gives
different pictures of one thing nearly the same.

Dimension key: n images of this split, m of the other, F = 3 SMALL^2 colours of a small picture.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.reporting.thumbnails import Thumbnails

SMALL = 16  # side of the small colour pictures
MAX_BITS = 10
MAX_DIFFERENCE = 0.025  # of the range from black to white
_SAME_GREY = 2  # of 255: fields that differ by no more count as equal, since compression turns such bits around
_MAX_COMPARED = 1000  # files compared byte for byte
_TILE = 1024


class Pair(NamedTuple):
    """An image of this split and one of the other."""

    here: int
    there: int


class Copies(NamedTuple):
    """Files of this split that are in the other one as well, one pair for each."""

    pairs: list[Pair]  # compared byte for byte
    num_found: int  # by length and crc32
    num_compared: int  # of those; the first ones

    @property
    def num_expected(self) -> int:
        """All copies: those of the files that were not compared are taken at their word."""
        return len(self.pairs) + self.num_found - self.num_compared


class LookAlikes(NamedTuple):
    """Pictures that look the same, one pair for each of this split, most alike first."""

    pairs: list[Pair]
    num_here: int  # images that were looked at
    num_there: int


def find_copies(here: Thumbnails, there: Thumbnails) -> Copies:
    """Images of one split whose file is in another.

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
    """One number per image that is the same for files of equal length and crc32, uint64."""
    return (index.samples["nbytes"].astype(np.uint64) << np.uint64(32)) | index.samples["crc32"].astype(np.uint64)


def find_look_alikes(
    here: Thumbnails, there: Thumbnails, *, most: int, progress: Callable[[int], object] | None = None
) -> LookAlikes:
    """Pictures of one split that look like one of another. Images that cannot be read are passed over.

    Args:
        here: one split.
        there: the other.
        most: images looked at of each, drawn at random where there are more.
        progress: called with the number of images just read.
    """
    ids_n, colours_nF, bits_n64 = _look_at(here, most, progress)
    ids_m, colours_mF, bits_m64 = _look_at(there, most, progress)
    found: list[tuple[float, Pair]] = []
    for start in range(0, len(ids_n) if len(ids_m) else 0, _TILE):
        tile = slice(start, start + _TILE)
        num_bits_tm = (64 - bits_n64[tile] @ bits_m64.T) / 2
        colours_tF = colours_nF[tile]
        squares_tm = (colours_tF**2).sum(1)[:, None] + (colours_mF**2).sum(1) - 2 * colours_tF @ colours_mF.T
        squares_tm[num_bits_tm > MAX_BITS] = np.inf
        best_t = squares_tm.argmin(axis=1)
        square_t = squares_tm[np.arange(len(best_t)), best_t] / colours_tF.shape[1]
        for row in np.flatnonzero(square_t <= MAX_DIFFERENCE**2):
            found.append((float(square_t[row]), Pair(int(ids_n[start + row]), int(ids_m[best_t[row]]))))
    return LookAlikes([pair for _, pair in sorted(found)], len(ids_n), len(ids_m))


def _look_at(
    pictures: Thumbnails, most: int, progress: Callable[[int], object] | None
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n F"], Float[np.ndarray, "n 64"]]:
    """Ids, colours around grey, and difference hashes (+1, -1) of some images of a split, in the order of ids."""
    drawn = np.sort(np.random.default_rng(0).permutation(pictures.index.num_samples)[:most])
    ids, colours, hashes = [], [], []
    for sample_id in drawn.tolist():
        try:
            picture = pictures.picture(sample_id, side=2 * SMALL)
        except ValueError:
            continue  # damaged: `verify --deep` is there to name it
        finally:
            if progress is not None:
                progress(1)
        ids.append(sample_id)
        square = picture.resize((SMALL, SMALL), Image.Resampling.BOX)
        colours.append(np.asarray(square, dtype=np.float32).ravel() / 255 - 0.5)
        hashes.append(difference_hash(picture))
    return (
        np.array(ids, dtype=np.int64),
        np.array(colours, dtype=np.float32).reshape(len(ids), 3 * SMALL**2),
        np.where(np.array(hashes, dtype=bool).reshape(len(ids), 64), 1, -1).astype(np.float32),
    )


def difference_hash(picture: Image.Image) -> Bool[np.ndarray, " 64"]:
    """Whether brightness rises from each field of a grid of 8 rows and 9 columns to the next one to the right."""
    fields_89 = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int64)
    return np.asarray(np.diff(fields_89, axis=1) > _SAME_GREY).ravel()
