"""Build shards of emoji whose classes have several modes: neighbours in Unicode of one category are one class.

    python -m benchmarks.joined_emoji --out shards/emoji_joined

The images are those of the demo, and so is the split: emoji of training classes train, those of test classes test. In
either, the emoji of a category (Food & Drink, Symbols, ...), in the order of their code points, are cut into classes of
four, some of three or two where the number does not divide.
"""

import json
import sys
import tarfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from dist_proxygml.data.builder import build_shards
from dist_proxygml.data.datasets import SourceDataset, SourceImage

JOINED = 4  # emoji in a class
DEMO = Path(__file__).resolve().parents[1] / "shards" / "demo"


def read_joined(demo: Path = DEMO, *, joined: int = JOINED) -> SourceDataset:
    """The demo's images with joined classes, named by the first emoji of each."""
    images = []
    for split in ("train", "test"):
        found = _read_split(demo, split)
        emoji_of: dict[str, set[tuple[int, ...]]] = {}  # by category
        for info, _ in found:
            emoji_of.setdefault(info["category"], set()).add(_points(info["source_id"]))
        class_of = {
            points: group[0] for emoji in emoji_of.values() for group in cut(sorted(emoji), joined) for points in group
        }
        names = {_points(info["source_id"]): info["class_name"] for info, _ in found}
        for info, content in found:
            first = class_of[_points(info["source_id"])]
            kept = {name: info[name] for name in ("category", "license", "set")}
            class_id = "-".join(f"{point:x}" for point in first)
            images.append(
                SourceImage(
                    split, class_id, names[first], info["source"], content, {**kept, "emoji": info["class_name"]}
                )
            )
    return SourceDataset("emoji_joined", images)


def cut(emoji: Sequence[tuple[int, ...]], joined: int) -> list[list[tuple[int, ...]]]:
    """Neighbours together, in groups of nearly equal size of at most `joined`."""
    count, size = -(-len(emoji) // joined), len(emoji)
    return [list(emoji[size * i // count : size * (i + 1) // count]) for i in range(count)]


def _points(source_id: str) -> tuple[int, ...]:
    return tuple(int(point, 16) for point in source_id.split("-"))


def _read_split(demo: Path, split: str) -> list[tuple[dict[str, str], bytes]]:
    """Metadata and file of each image, in the order of their sources."""
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted(demo.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None, f"{path} has files only"
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = stream.read()
    found = [(json.loads(sample["json"]), sample["png"]) for sample in members.values()]
    return sorted(found, key=lambda sample: sample[0]["source"])


def main(given: Sequence[str] | None = None) -> int:
    """Carry out the command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shards/emoji_joined"), help="folder for the shards")
    build_shards(read_joined(), parser.parse_args(given).out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
