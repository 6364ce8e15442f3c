"""The image sections of a run's page: retrieved, worst, confused, hubs, duplicates.

    table and split -> lists of a bounded number of queries -> plain data for templates/report.html, with a bounded
    number of thumbnails

At most NUM_PICTURES thumbnails of at most `thumbnails.MAX_BYTES` each, so the page stays under ten megabytes whatever
the data set. Everything is recomputed from the stored embeddings; only the images that are shown are decoded.

Dimension key: m examined queries, g gallery images, K neighbours.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.reporting.copies import file_keys, find_copies
from dist_proxygml.reporting.hubs import count_hubs
from dist_proxygml.reporting.neighbourhoods import Neighbourhoods, examine
from dist_proxygml.reporting.thumbnails import Thumbnails

NUM_NEIGHBOURS = 8  # shown for each query
NUM_QUERIES = 10  # shown at random, and as many of the worst
NUM_PAIRS = 9  # of confused classes
IMAGES_PER_CLASS = 4  # shown of each of a pair
NUM_HUBS = 12
NUM_COPIES = 12  # copies shown, and as many look-alikes
NUM_PICTURES = 2 * NUM_QUERIES * (1 + NUM_NEIGHBOURS) + NUM_PAIRS * 2 * IMAGES_PER_CLASS + NUM_HUBS + 4 * NUM_COPIES
HUB_LIST = 10  # neighbours that count for hubs, as usual in the literature
MAX_EXAMINED = 10_000  # queries
MAX_LETTERS = 80  # of a class name


class _Album(NamedTuple):
    """Inputs of the sections."""

    thumbnails: Thumbnails  # of the split
    of_gallery: Thumbnails | None  # of a separate gallery
    labels: np.ndarray  # int64 [n]
    ids: np.ndarray  # int64 [n]: the rows' positions in the split's index, followed by the gallery's
    lists: Neighbourhoods

    def url(self, row: int) -> str:
        sample_id, num_samples = int(self.ids[row]), self.thumbnails.index.num_samples
        if self.of_gallery is not None and sample_id >= num_samples:
            return self.of_gallery.url(sample_id - num_samples)
        return self.thumbnails.url(sample_id)

    def name(self, row: int) -> str:
        return class_name(self.thumbnails.index, int(self.labels[row]))


def picture_parts(
    table: EmbeddingTable, index: ShardIndex, *, gallery: ShardIndex | None, training: ShardIndex | None
) -> dict[str, Any]:
    """Prepare the page's data on images.

    Args:
        table: embeddings of the split, followed by those of the gallery.
        index: the split.
        gallery: the split that is searched, with the same classes; None: the split itself.
        training: the split that the run was trained on, if available.

    Raises:
        ValueError: an image that would be shown cannot be read, or no query has a right answer.
    """
    ids_n = table.ids.numpy()
    is_gallery_n = None if gallery is None else ids_n >= index.num_samples
    num_queries = min(len(ids_n) if is_gallery_n is None else int((~is_gallery_n).sum()), MAX_EXAMINED)
    with tqdm(total=num_queries, desc="report: searching", unit=" queries", delay=1.0, leave=False) as bar:
        lists = examine(
            table,
            num_neighbours=max(NUM_NEIGHBOURS, HUB_LIST),
            most=MAX_EXAMINED,
            is_gallery=is_gallery_n,
            progress=bar.update,
        )
    of_gallery = None if gallery is None else Thumbnails(gallery)
    album = _Album(Thumbnails(index), of_gallery, table.labels.numpy(), ids_n, lists)
    num_examined = len(lists.queries)
    latest_m = np.lexsort((lists.queries, -lists.first_right))
    return {
        "num_neighbours": NUM_NEIGHBOURS,
        "num_examined": num_examined,
        "num_queries": lists.num_queries,
        # Qualifies "queries" on the page; empty for all of them.
        "scope": "" if lists.are_all else f" among {num_examined:,} random ones of {lists.num_queries:,}",
        "fewest_positives": int(lists.num_positives.min()),
        "most_positives": int(lists.num_positives.max()),
        "random": _retrievals(album, np.arange(num_examined)[:NUM_QUERIES]),
        "worst": _retrievals(album, latest_m[lists.first_right[latest_m] > 1][:NUM_QUERIES]),
        "confused": _confusions(album),
        "hubs": _hubs(album),
        "has_gallery": gallery is not None,
        "twice": _copies(album.thumbnails, training) | _copies_within(index),
        "alike": _look_alikes(album),
    }


def class_name(index: ShardIndex, label: int) -> str:
    """Return the name of a class, truncated if very long."""
    name = index.classes[label].name
    return name if len(name) <= MAX_LETTERS else f"{name[:MAX_LETTERS]}…"


def _retrievals(album: _Album, chosen: np.ndarray) -> list[dict[str, Any]]:
    """Prepare some of the examined queries with their neighbours."""
    lists = album.lists
    rows = []
    for number in chosen.tolist():
        query, right_K = int(lists.queries[number]), lists.right[number, :NUM_NEIGHBOURS]
        found = zip(lists.neighbours[number].tolist(), lists.scores[number], right_K, strict=False)
        rows.append(
            {
                "url": album.url(query),
                "name": album.name(query),
                "num_found": int(right_K.sum()),
                "num_positives": int(lists.num_positives[number]),
                "first_right": int(lists.first_right[number]),
                "tiles": [
                    {"url": album.url(row), "name": album.name(row), "score": score, "is_right": is_right}
                    for row, score, is_right in found
                ],
            }
        )
    return rows


def _confusions(album: _Album) -> list[dict[str, Any]]:
    """Find the pairs of classes that are most often each other's first answer."""
    lists, labels_n = album.lists, album.labels
    asked_m, answered_m = labels_n[lists.queries], labels_n[lists.neighbours[:, 0]]
    both_m2 = np.sort(np.stack([asked_m, answered_m], axis=1), axis=1)[asked_m != answered_m]
    pairs = Counter(map(tuple, both_m2.tolist()))
    most = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:NUM_PAIRS]

    def shown(label: int) -> dict[str, Any]:
        rows = np.flatnonzero(labels_n == label)[:IMAGES_PER_CLASS]
        return {"name": class_name(album.thumbnails.index, label), "urls": [album.url(int(row)) for row in rows]}

    return [
        {
            "num_wrong": num_wrong,
            "num_queries": int(np.isin(asked_m, labels).sum()),
            "classes": [shown(label) for label in labels],
        }
        for labels, num_wrong in most
    ]


def _hubs(album: _Album) -> dict[str, Any]:
    """Find images that are in many lists, and how often they are wrong there."""
    lists = album.lists
    places_mK, wrong_mK = lists.places[:, :HUB_LIST], ~lists.right[:, :HUB_LIST]
    hubs = count_hubs(places_mK, wrong_mK, num_gallery=len(lists.gallery), num_queries=lists.num_queries)
    images = []
    for place in np.argsort(-hubs.occurrences, kind="stable")[:NUM_HUBS].tolist():
        row, num_lists = int(lists.gallery[place]), int(hubs.occurrences[place])
        wrong = int(hubs.wrong[place]) / max(num_lists, 1)
        images.append({"url": album.url(row), "name": album.name(row), "num_lists": num_lists, "wrong": wrong})
    return {
        "images": images,
        "length": places_mK.shape[1],
        "mean": places_mK.size / len(lists.gallery),
        "wrong": float(wrong_mK.mean()),
        "skewness": hubs.skewness,
        "never": float((hubs.occurrences == 0).mean()),
    }


def _copies(here: Thumbnails, training: ShardIndex | None) -> dict[str, Any]:
    """Find test images that are also training images."""
    found: dict[str, Any] = {"num_test": here.index.num_samples, "num_copies": 0}
    if training is None:
        return found | {"training": "missing"}
    found["num_training"] = training.num_samples
    if training.split == here.index.split and training.sha256 == here.index.sha256:
        return found | {"training": "tested"}
    if training.remote is not None:
        num_copies = int(np.isin(file_keys(here.index), file_keys(training)).sum())
        return found | {"training": "remote", "num_copies": num_copies}
    there = Thumbnails(training)
    copies = find_copies(here, there)
    shown = [
        {
            "urls": [here.url(pair.here), there.url(pair.there)],
            "names": [
                class_name(side.index, int(side.index.labels[sample_id]))
                for side, sample_id in ((here, pair.here), (there, pair.there))
            ],
        }
        for pair in copies.pairs[:NUM_COPIES]
    ]
    numbers = {"num_copies": copies.num_expected, "num_found": copies.num_found, "num_compared": copies.num_compared}
    return {**found, **numbers, "training": "compared", "num_same": len(copies.pairs), "copies": shown}


def _copies_within(index: ShardIndex) -> dict[str, int]:
    """Count images of a split that share a file; across classes, one of the labels is wrong."""
    _, file_n, counts = np.unique(file_keys(index), return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([file_n, index.labels], axis=1), axis=0)
    labels_of_file = np.bincount(pairs[:, 0], minlength=len(counts))
    return {"num_twins": int((counts[file_n] > 1).sum()), "num_mixed": int((labels_of_file[file_n] > 1).sum())}


def _look_alikes(album: _Album) -> list[dict[str, Any]]:
    """Find the most similar pairs of images of different classes among the neighbours of the examined queries."""
    lists = album.lists
    query_w, column_w = np.nonzero(~lists.right)
    scores_w = lists.scores[query_w, column_w]
    nearest = np.argsort(-scores_w, kind="stable")[: 2 * NUM_COPIES]  # a pair is found from both ends
    rows_w2 = np.stack([lists.queries[query_w], lists.neighbours[query_w, column_w]], axis=1)[nearest]
    pairs = dict(zip(map(tuple, np.sort(rows_w2, axis=1).tolist()), scores_w[nearest].tolist(), strict=True))
    return [
        {"urls": [album.url(row) for row in pair], "names": [album.name(row) for row in pair], "score": score}
        for pair, score in list(pairs.items())[:NUM_COPIES]
    ]
