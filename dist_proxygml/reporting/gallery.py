"""Pictures for monitoring a run: one image of queries and their nearest neighbours, and thumbnails.

The queries are the same in all evaluations of a split, so that changes are visible. A green frame marks the query's
class, a dashed red one another class; the dashes are for colour-blind readers. The picture has at most 648 x 720
pixels, whatever the split.

Declined: faiss, which would copy the gallery for ten queries; a product and a top-k of ten rows suffice. Which of
several neighbours tied at the last place is shown is undefined; the metrics handle ties exactly.

Dimension key: n images, q queries, g images that are searched, K neighbours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.evaluation.metrics import count_positives

NUM_QUERIES = 10
NUM_NEIGHBOURS = 8
TILE_SIDE = 64

_FRAME = 3
_GAP = 1
_CELL = TILE_SIDE + 2 * (_FRAME + _GAP)
_DASH = 8
_GREEN, _RED, _GREY = (26, 152, 80), (215, 48, 39), (128, 128, 128)


class TableImages:
    """Images of a table of embeddings, by id.

    Args:
        index: the split, or that of the queries.
        gallery: the split that was searched, if it is another one; its ids follow those of the queries.
    """

    def __init__(self, index: ShardIndex, gallery: ShardIndex | None) -> None:
        self._num_queries = index.num_samples
        splits = [index] if gallery is None else [index, gallery]
        self._images = [ShardImages(split, Resize(TILE_SIDE)) for split in splits]

    def thumbnail(self, image_id: int, side: int) -> np.ndarray:
        """Return a small image. Raises ValueError if it is damaged."""
        number = int(image_id >= self._num_queries)
        return thumbnail(self._images[number].image(image_id - number * self._num_queries), side)


def retrieval_gallery(table: EmbeddingTable, index: ShardIndex, *, gallery: ShardIndex | None = None) -> Tensor:
    """Draw some queries, one per row, and their nearest neighbours: uint8 [3, H, W]. Queries have a right answer.

    Args:
        table: the evaluated embeddings.
        index: the split, or that of the queries.
        gallery: the split that was searched, if it is another one.

    Raises:
        ValueError: an image is damaged.
    """
    labels_n, is_query_n = table.labels.numpy(), table.ids.numpy() < index.num_samples
    if gallery is None:
        has_answer_n, is_searched_n = count_positives(labels_n) > 0, is_query_n
    else:
        is_searched_n = ~is_query_n
        has_answer_n = is_query_n & np.isin(labels_n, labels_n[is_searched_n])
    queries = np.random.default_rng(0).permutation(np.flatnonzero(has_answer_n))
    query_q = torch.from_numpy(queries[:NUM_QUERIES])
    neighbour_qK = _nearest(table.embeddings, query_q, torch.from_numpy(np.flatnonzero(is_searched_n)))
    images = TableImages(index, gallery)
    canvas = np.full((len(query_q) * _CELL, (1 + neighbour_qK.shape[1]) * _CELL, 3), 255, dtype=np.uint8)
    for row, (query, neighbours) in enumerate(zip(query_q.tolist(), neighbour_qK.tolist(), strict=True)):
        for column, shown in enumerate([query, *neighbours]):
            picture = images.thumbnail(int(table.ids[shown]), TILE_SIDE)
            is_right = labels_n[shown] == labels_n[query]
            colour = _GREY if column == 0 else _GREEN if is_right else _RED
            cell = canvas[row * _CELL : (row + 1) * _CELL, column * _CELL : (column + 1) * _CELL]
            _draw(cell, picture, colour, is_dashed=not is_right)
    return torch.from_numpy(canvas).permute(2, 0, 1)


def thumbnail(image: Tensor, side: int) -> np.ndarray:
    """Fit a uint8 image [3, h, w] into the middle of a white square: uint8 [side, side, 3]."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    factor = side / max(picture.size)
    width, height = (max(1, round(factor * length)) for length in picture.size)
    square = np.full((side, side, 3), 255, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    fitted = picture.resize((width, height), Image.Resampling.BOX)
    square[top : top + height, left : left + width] = np.asarray(fitted)
    return square


def stratified_sample(labels: Sequence[int] | np.ndarray, num_points: int, *, least_per_class: int = 8) -> np.ndarray:
    """Sample rows of at most `num_points` images, ascending, by class.

    Classes in a fixed random order contribute their share of the points, but at least `least_per_class`: of very many
    classes, some appear with neighbours rather than each with one image.
    """
    labels_n = np.asarray(labels)
    generator = np.random.default_rng(0)
    shuffled_n = generator.permutation(len(labels_n))
    by_class_n = shuffled_n[np.argsort(labels_n[shuffled_n], kind="stable")]
    _, first_c, count_c = np.unique(labels_n[by_class_n], return_index=True, return_counts=True)
    most = max(least_per_class, num_points // max(1, len(count_c)))
    chosen: list[np.ndarray] = []
    num_left = num_points
    for label in generator.permutation(len(count_c)):
        if num_left == 0:
            break
        rows = by_class_n[first_c[label] :][: min(count_c[label], most, num_left)]
        chosen.append(rows)
        num_left -= len(rows)
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def _nearest(embeddings_nD: Tensor, query_q: Tensor, searched_g: Tensor) -> Tensor:
    """Find the nearest neighbours [q, K], best first, of rows of the table among others; no row is its own."""
    is_self_qg = query_q[:, None] == searched_g
    num_neighbours = min(NUM_NEIGHBOURS, len(searched_g) - int(is_self_qg.any()))
    everything = len(searched_g) == len(embeddings_nD)
    searched_gD = embeddings_nD if everything else embeddings_nD[searched_g]
    score_qg = (embeddings_nD[query_q] @ searched_gD.T).masked_fill_(is_self_qg, -torch.inf)
    score_qK, column_qK = score_qg.topk(num_neighbours, dim=1)
    order_qK = np.lexsort((column_qK.numpy(), -score_qK.numpy()), axis=1)
    return searched_g[column_qK.gather(1, torch.from_numpy(order_qK))]


def _draw(cell: np.ndarray, picture: np.ndarray, colour: tuple[int, int, int], *, is_dashed: bool) -> None:
    """Draw the framed picture into a white cell."""
    frame = cell[_GAP:-_GAP, _GAP:-_GAP]
    position = np.arange(len(frame))
    is_edge = np.minimum(position, len(frame) - 1 - position) < _FRAME
    is_drawn = (position // _DASH % 2 == 0) | (not is_dashed)
    frame[(is_edge[:, None] & is_drawn[None, :]) | (is_edge[None, :] & is_drawn[:, None])] = colour
    frame[_FRAME:-_FRAME, _FRAME:-_FRAME] = picture
