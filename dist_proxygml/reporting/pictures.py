"""The part of a run's page that shows images: retrieved, worst, confused, hubs, and those that training has seen too.

    table and split -> lists of a bounded number of queries -> five sections of HTML, each with a bounded number of
    thumbnails

At most NUM_PICTURES thumbnails of at most `thumbnails.MAX_BYTES` each, so the page stays under ten megabytes whatever
the data set. Everything is recomputed from the stored embeddings.

Dimension key: m examined queries, g gallery images, K neighbours.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.reporting.copies import (
    MAX_BITS,
    MAX_DIFFERENCE,
    SMALL,
    Pair,
    file_keys,
    find_copies,
    find_look_alikes,
)
from dist_proxygml.reporting.hubs import count_hubs
from dist_proxygml.reporting.neighbourhoods import Neighbourhoods, examine
from dist_proxygml.reporting.thumbnails import Thumbnails

NUM_NEIGHBOURS = 8  # shown for each query
NUM_QUERIES = 10  # shown at random, and as many of the worst
NUM_PAIRS = 9  # of confused classes
IMAGES_PER_CLASS = 4  # shown of each of a pair
NUM_HUBS = 12
NUM_COPIES = 12  # shown of copies, and as many look-alikes
NUM_PICTURES = 2 * NUM_QUERIES * (1 + NUM_NEIGHBOURS) + NUM_PAIRS * 2 * IMAGES_PER_CLASS + NUM_HUBS + 4 * NUM_COPIES
HUB_LIST = 10  # neighbours that count for hubs, as usual in the literature
MAX_EXAMINED = 10_000  # queries
MAX_LOOKED_AT = 10_000  # images of each split that are decoded to look for pictures that look the same
MAX_LETTERS = 80  # of a class name


class Section(NamedTuple):
    """One part of the page."""

    key: str  # for links to it
    title: str
    html: str


class _Album(NamedTuple):
    """What the sections are made of."""

    thumbnails: Thumbnails  # of the split
    of_gallery: Thumbnails | None  # of a gallery of its own
    labels: np.ndarray  # int64 [n]
    ids: np.ndarray  # int64 [n]: the rows' positions in the split's index; those of a gallery go on behind it
    lists: Neighbourhoods

    def picture(self, row: int, description: str) -> str:
        sample_id, num_samples = int(self.ids[row]), self.thumbnails.index.num_samples
        if self.of_gallery is not None and sample_id >= num_samples:
            return _image(self.of_gallery.url(sample_id - num_samples), description)
        return _image(self.thumbnails.url(sample_id), description)

    def name(self, row: int) -> str:
        return class_name(self.thumbnails.index, int(self.labels[row]))

    @property
    def scope(self) -> str:
        """Which queries were looked at, to go after "queries"."""
        return (
            ""
            if self.lists.are_all
            else f" among {len(self.lists.queries):,} random ones of {self.lists.num_queries:,}"
        )


def picture_sections(
    table: EmbeddingTable, index: ShardIndex, *, gallery: ShardIndex | None, training: ShardIndex | None
) -> list[Section]:
    """The sections that show images.

    Args:
        table: embeddings of the split, and behind them those of the gallery.
        index: the split.
        gallery: the split that is searched, with the same classes; None: the split itself.
        training: the split that the run was trained on, as far as it is at hand.

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
    sections = [_at_random(album), _worst(album), _confusions(album), _hubs(album)]
    sections.append(_seen_in_training(album.thumbnails, training, has_gallery=gallery is not None))
    return [section for section in sections if section.html]


def class_name(index: ShardIndex, label: int) -> str:
    """The name of a class, cut where it is very long."""
    name = index.classes[label].name
    return name if len(name) <= MAX_LETTERS else f"{name[:MAX_LETTERS]}…"


# ---- retrieved and worst -------------------------------------------------------------------------


def _at_random(album: _Album) -> Section:
    lists = album.lists
    return Section(
        "retrieves",
        "What it retrieves",
        f"<p>Random queries, left, and the {NUM_NEIGHBOURS} images nearest to each. A green frame with ✓ is the "
        f"query's class, a red one with ✗ is another, named below it.{_why_red(lists.num_positives)}</p>\n"
        + "\n".join(_retrieval(album, np.arange(len(lists.queries))[:NUM_QUERIES])),
    )


def _worst(album: _Album) -> Section:
    lists = album.lists
    order_m = np.lexsort((lists.queries, -lists.first_right))
    worst = order_m[lists.first_right[order_m] > 1][:NUM_QUERIES]
    return Section(
        "fails",
        "Where it fails",
        f"<p>The queries{album.scope} whose first right answer comes latest.</p>\n"
        + (
            "\n".join(_retrieval(album, worst))
            or '<p class="quiet">None: the first answer is right for all of them.</p>'
        ),
    )


def _why_red(num_positives_m: np.ndarray) -> str:
    """A sentence for data whose classes are smaller than a row, where even a perfect model shows red."""
    fewest, most = int(num_positives_m.min()), int(num_positives_m.max())
    if most >= NUM_NEIGHBOURS:
        return ""
    span = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f" A query has {span} right answers here, so every row has some red."


def _retrieval(album: _Album, chosen: np.ndarray) -> Iterable[str]:
    """One row for each of some examined queries: the query, then its neighbours."""
    lists = album.lists
    for number in chosen.tolist():
        query, right_K = int(lists.queries[number]), lists.right[number, :NUM_NEIGHBOURS]
        found = f"{int(right_K.sum())} of {int(lists.num_positives[number])} found"
        if not right_K.any():
            found = f"first right answer<br>at {int(lists.first_right[number]):,}"
        tiles = []
        for neighbour, score, right in zip(
            lists.neighbours[number].tolist(), lists.scores[number], right_K, strict=False
        ):
            other = album.name(neighbour)
            kind, mark = ("right", "✓") if right else ("wrong", "✗")
            caption = "" if right else f"<figcaption>{escape(other)}</figcaption>"
            described = f"{other}, similarity {score:.2f}"
            tiles.append(
                f'<figure class="tile {kind}" title="{escape(described, quote=True)}">'
                f"{album.picture(neighbour, f'{kind}: {described}')}"
                f'<span class="mark" aria-hidden="true">{mark}</span>{caption}</figure>'
            )
        name = album.name(query)
        yield (
            f'<div class="retrieval"><div class="query">{album.picture(query, f"query: {name}")}'
            f"<div><b>{escape(name)}</b><span>{found}</span></div></div>"
            f'<div class="neighbours">{"".join(tiles)}</div></div>'
        )


# ---- confused classes ----------------------------------------------------------------------------


def _confusions(album: _Album) -> Section:
    """The pairs of classes that most often are each other's first answer."""
    lists, labels_n = album.lists, album.labels
    asked_m, answered_m = labels_n[lists.queries], labels_n[lists.neighbours[:, 0]]
    wrong_m = asked_m != answered_m
    pairs = Counter(
        (min(a, b), max(a, b)) for a, b in zip(asked_m[wrong_m].tolist(), answered_m[wrong_m].tolist(), strict=True)
    )
    most = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:NUM_PAIRS]
    cards = []
    for labels, count in most:
        num_queries = int(np.isin(asked_m, labels).sum())
        rows = "".join(f"<div>{_class_images(album, label)}</div>" for label in labels)
        cards.append(
            f'<div class="pair">{rows}<p>{count:,} of {num_queries:,} queries find the other class first</p></div>'
        )
    scope = "" if lists.are_all else f", counted over {len(lists.queries):,} random queries"
    return Section(
        "confuses",
        "Which classes it confuses",
        f"<p>The pairs that most often are each other's first answer{scope}.</p>\n"
        f'<div class="cards pairs">{"".join(cards)}</div>'
        if cards
        else "",
    )


def _class_images(album: _Album, label: int) -> str:
    name = class_name(album.thumbnails.index, label)
    shown = np.flatnonzero(album.labels == label)[:IMAGES_PER_CLASS]
    return "".join(album.picture(int(row), name) for row in shown) + f"<b>{escape(name)}</b>"


# ---- hubs ----------------------------------------------------------------------------------------


def _hubs(album: _Album) -> Section:
    """Images that are in many lists, and how often they are wrong there."""
    lists = album.lists
    places_mK, wrong_mK = lists.places[:, :HUB_LIST], ~lists.right[:, :HUB_LIST]
    hubs = count_hubs(places_mK, wrong_mK, num_gallery=len(lists.gallery), num_queries=lists.num_queries)
    num_lists, length = places_mK.shape
    mean = num_lists * length / len(lists.gallery)
    most = np.lexsort((np.arange(len(lists.gallery)), -hubs.occurrences))[:NUM_HUBS]
    cards = []
    for place in most.tolist():
        row, count, wrong = int(lists.gallery[place]), int(hubs.occurrences[place]), int(hubs.wrong[place])
        name = album.name(row)
        cards.append(
            f'<figure class="hub">{album.picture(row, f"in {count} lists: {name}")}'
            f"<figcaption><b>{escape(name)}</b><span>in {count:,} lists<br>{100 * wrong / max(count, 1):.0f}% wrong"
            "</span></figcaption></figure>"
        )
    skewness = (
        "Every image is in equally many lists: there are no hubs."
        if hubs.skewness is None
        else f"The skewness of that count, the usual measure of hubness, is <b>{hubs.skewness:.2f}</b>"
        + ("" if lists.are_all else " (estimated from these lists for all queries)")
        + ": near 0 no image stands out, well above 1 a few images crowd into the lists of many others."
    )
    never = ""
    if lists.are_all:
        share = 100 * float((hubs.occurrences == 0).mean())
        never = f" {share:.1f}% of the images are in no list: nobody finds them that way."
    return Section(
        "hubs",
        "Which images are found too often",
        f"<p>In the lists of the {length} nearest images of {num_lists:,} queries"
        f"{'' if lists.are_all else f' (of {lists.num_queries:,}, drawn at random)'}, an image occurs "
        f"{mean:.1f} times on average. {skewness}{never} These occur most often; a list counts as wrong where its "
        f'query is of another class.</p>\n<div class="cards hubs">{"".join(cards)}</div>',
    )


# ---- images that training has seen too ------------------------------------------------------------


def _seen_in_training(here: Thumbnails, training: ShardIndex | None, *, has_gallery: bool) -> Section:
    """Copies and look-alikes between training and test images, and copies within the test images."""
    parts = []
    if has_gallery:
        parts.append("<p>Test images are the queries here; those of the gallery were not compared.</p>")
    if training is None:
        parts.append('<p class="quiet">The training images are not at hand, so nothing was compared with them.</p>')
    elif training.split == here.index.split and training.sha256 == here.index.sha256:
        parts.append('<p class="quiet">This is the split that the run was trained on.</p>')
    elif training.remote is not None:
        num_twins = int(np.isin(file_keys(here.index), file_keys(training)).sum())
        parts.append(
            f"<p>{_are(num_twins)} {here.index.num_samples:,} test images {'has' if num_twins == 1 else 'have'} the "
            f"length and checksum of one of the {training.num_samples:,} training images. Pixels were not compared, "
            "because the shards lie elsewhere.</p>"
        )
    else:
        parts += _compared(here, Thumbnails(training))
    parts.append(f"<p>{_copies_within(here.index)}</p>")
    return Section("seen", "Which images training has seen", "\n".join(parts))


def _compared(here: Thumbnails, there: Thumbnails) -> list[str]:
    copies = find_copies(here, there)
    num_images = min(here.index.num_samples, MAX_LOOKED_AT) + min(there.index.num_samples, MAX_LOOKED_AT)
    with tqdm(total=num_images, desc="report: comparing", unit=" images", delay=1.0, leave=False) as bar:
        alike = find_look_alikes(here, there, most=MAX_LOOKED_AT, progress=bar.update)
    are_copies = {pair.here for pair in copies.pairs}
    others = [pair for pair in alike.pairs if pair.here not in are_copies]

    compared = "compared byte for byte"
    if copies.num_compared < copies.num_found:
        compared = f"of which {copies.num_compared:,} were compared byte for byte"
    verdict = (
        f"{_are(copies.num_expected)} {here.index.num_samples:,} test images "
        f"{'is a copy' if copies.num_expected == 1 else 'are copies'} of one of the {there.index.num_samples:,} "
        f"training images (equal length and checksum{f', {compared}' if copies.num_found else ''})."
    )
    looked_at = f"all {alike.num_here:,} test and {alike.num_there:,} training images"
    if (alike.num_here, alike.num_there) != (here.index.num_samples, there.index.num_samples):
        looked_at = f"{alike.num_here:,} test and {alike.num_there:,} training images, drawn at random,"
    candidates = (
        f"Among {looked_at} <b>{len(others):,}</b> more {'pair looks' if len(others) == 1 else 'pairs look'} alike: "
        f"difference hashes of 64 bits that agree in at least {64 - MAX_BITS}, and {SMALL} x {SMALL} pictures whose "
        f"colours differ by at most {100 * MAX_DIFFERENCE:g}%. That finds the same picture in another size or "
        "compression, not crops, and may take two drawings for one: look for yourself."
    )
    return [
        f"<p>{verdict}</p>",
        _pairs(here, there, copies.pairs, "copy"),
        f"<p>{candidates}</p>",
        _pairs(here, there, others, "look-alike"),
    ]


def _pairs(here: Thumbnails, there: Thumbnails, pairs: Sequence[Pair], kind: str) -> str:
    """The first pairs as cards: test image, training image, their classes."""
    if not pairs:
        return ""
    cards = []
    for pair in pairs[:NUM_COPIES]:
        names = [
            class_name(side.index, int(side.index.labels[sample_id]))
            for side, sample_id in ((here, pair.here), (there, pair.there))
        ]
        cards.append(
            f'<div class="pair">'
            f"{_image(here.url(pair.here), f'{kind} in test: {names[0]}')}"
            f"{_image(there.url(pair.there), f'{kind} in training: {names[1]}')}"
            f"<dl><dt>test</dt><dd>{escape(names[0])}</dd><dt>training</dt><dd>{escape(names[1])}</dd></dl></div>"
        )
    more = f'<p class="quiet">The first {NUM_COPIES} of {len(pairs):,}.</p>' if len(pairs) > NUM_COPIES else ""
    return f'<div class="cards copies">{"".join(cards)}</div>{more}'


def _copies_within(index: ShardIndex) -> str:
    """A sentence about images of a split that share a file: across classes, one of the labels is wrong."""
    _, file_n, counts = np.unique(file_keys(index), return_inverse=True, return_counts=True)
    num_twins = int((counts[file_n] > 1).sum())
    if num_twins == 0:
        return "No two test images share a file."
    pairs = np.unique(np.stack([file_n, index.labels], axis=1), axis=0)
    labels_of_file = np.bincount(pairs[:, 0], minlength=len(counts))
    num_mixed = int((labels_of_file[file_n] > 1).sum())
    across = (
        f", {num_mixed:,} of them with an image of another class: no model can tell these apart"
        if num_mixed
        else ", always with images of their own class"
    )
    return f"{num_twins:,} test images share their file (by length and checksum){across}."


# ---- small things --------------------------------------------------------------------------------


def _are(number: int) -> str:
    return f"<b>{number:,}</b> of" if number else "<b>None</b> of"


def _image(url: str, description: str) -> str:
    return f'<img src="{url}" alt="{escape(description, quote=True)}">'
