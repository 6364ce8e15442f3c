"""Emoji that are joined to classes: neighbours, of one category, all of them once, and split as the demo is."""

from collections import Counter

from benchmarks.joined_emoji import JOINED, cut, read_joined
from dist_proxygml.data.datasets import SourceImage


def test_neighbours_of_a_category_are_one_class() -> None:
    assert [len(group) for group in cut([(i,) for i in range(9)], 4)] == [3, 3, 3]
    assert cut([(1,), (2,), (3,)], 2) == [[(1,)], [(2,), (3,)]]
    images = read_joined().images
    assert Counter(image.split for image in images) == {"train": 2977, "test": 2981}
    members: dict[tuple[str, str | int], list[SourceImage]] = {}
    for image in images:
        members.setdefault((image.split, image.source_id), []).append(image)
    emoji = {key: {image.info["emoji"] for image in of_class} for key, of_class in members.items()}
    sizes = Counter(len(names) for names in emoji.values())
    assert sizes.keys() == {2, 3, JOINED}
    assert sizes[JOINED] > 200
    assert sum(map(len, emoji.values())) == len({name for names in emoji.values() for name in names}) == 1098
    assert all(len({image.info["category"] for image in of_class}) == 1 for of_class in members.values())
    assert emoji["train", "1f60d"] == {
        "confused-face",
        "neutral-face",
        "pensive-face",
        "smiling-face-with-heart-eyes",
    }
