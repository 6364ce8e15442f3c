"""Draw some classes of the data set of glyphs as a picture: a row for each character, a column for each typeface.

python tools/glyphs_montage.py --data shards/glyphs --out docs/images/glyphs.png
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dist_proxygml.cli import build_parser, command, run_command
from dist_proxygml.data.index import ShardIndex, list_splits, open_index

CHARACTERS = "永愛龍鬱鷹回国图㩜한뷁글쫑あヲAgЖΩአꀀ"


def pictures_of(index: ShardIndex, characters: str) -> dict[tuple[str, str], Image.Image]:
    """The pictures of these characters in a split, by character and typeface."""
    wanted = {
        entry.label: chr(int(entry.source_id)) for entry in index.classes if chr(int(entry.source_id)) in characters
    }
    found = {}
    for sample_id in np.flatnonzero(np.isin(index.labels, list(wanted))):
        row = index.samples[sample_id]
        source = index.source(int(sample_id))
        assert source is not None, "shards of `shard build` say what an image was made of"
        with open(index.shard_paths[row["shard"]], "rb") as stream:
            stream.seek(int(row["offset"]))
            picture = Image.open(io.BytesIO(stream.read(int(row["nbytes"]))))
        found[wanted[int(row["label"])], source.partition("/")[2].removesuffix(".png")] = picture
    return found


def montage(pictures: dict[tuple[str, str], Image.Image], characters: str, typefaces: list[str]) -> Image.Image:
    """Pictures on a grey grid, empty where a typeface does not draw a character."""
    side = next(iter(pictures.values())).width + 4
    drawn = {typeface for _, typeface in pictures}
    columns = [typeface for typeface in typefaces if typeface in drawn]
    rows = [character for character in characters if any(c == character for c, _ in pictures)]
    result = Image.new("L", (len(columns) * side, len(rows) * side), 200)
    for (character, typeface), picture in pictures.items():
        result.paste(picture, (columns.index(typeface) * side + 2, rows.index(character) * side + 2))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        None,
        "Draw some classes of the data set of glyphs as a picture.",
        "  python tools/glyphs_montage.py --data shards/glyphs --out docs/images/glyphs.png",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards of `shard build glyphs`")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--characters", default=CHARACTERS, help=f"a row for each (default: {CHARACTERS})")
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> None:
    """Read, draw, write."""
    pictures: dict[tuple[str, str], Image.Image] = {}
    for split in list_splits(given.data):
        pictures.update(pictures_of(open_index(given.data, split), given.characters))
    if not pictures:
        raise ValueError(
            f"expected classes of {given.characters} in {given.data}, got none; name others by --characters"
        )
    typefaces = [record["name"] for record in json.loads((given.data / "fonts.json").read_text())["typefaces"]]
    montage(pictures, given.characters, typefaces).quantize(16).save(given.out, optimize=True)


if __name__ == "__main__":
    run_command(main)
