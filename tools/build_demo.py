"""Build the demo's shards: a class is one emoji, an image is one artist's drawing of it.

    python tools/build_demo.py --out shards/demo-again

    6 npm packages of SVG -> rasterised at 128 px -> averaged to 64 px on white -> 64-colour PNG

Kept are emoji drawn by at least 4 of the 6 sets; identical and blank drawings, skin tones, gendered
and directional variants are excluded. Classes are sorted by the sha1 of their name: the first half
trains, the second half is never seen in training.

Chosen: six sets under Apache-2.0, MIT and CC-BY-4.0, each pinned by version and sha256, so that the
same bytes come out every time.
Declined: share-alike sets, and 3-D renderings of a set that is already there (the same outlines).
Only a rebuild needs npm and resvg.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dist_proxygml.cli import add_options, build_parser, command, run_command
from dist_proxygml.data.builder import build_settings, build_shards, default_workers, finished_build
from dist_proxygml.data.datasets import SourceDataset, SourceImage, check_classes
from dist_proxygml.data.verify import describe_shards
from dist_proxygml.storage.files import publish

SIDE = 64
NUM_COLOURS = 64
MIN_SETS = 4
NUM_CLASSES = 1_098
NUM_IMAGES = 5_958


@dataclass(frozen=True)
class EmojiSet:
    """One openly licensed set of drawings and the npm package that brings its SVG sources."""

    name: str
    version: str
    sha256: str  # of the package's tarball
    license: str
    author: str
    url: str

    @property
    def package(self) -> str:
        """The npm package with its version."""
        return f"@iconify-json/{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """The file that `npm pack` makes of it."""
        return f"iconify-json-{self.name}-{self.version}.tgz"


# Their order decides which of two identical drawings stays.
EMOJI_SETS = (
    EmojiSet(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    EmojiSet(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    EmojiSet(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    EmojiSet(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    EmojiSet(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    EmojiSet(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
)


@dataclass(frozen=True)
class Drawings:
    """The content of one set's package."""

    icons: Mapping[str, Any]  # icons.json: bodies, aliases, sizes
    name_of_codepoints: dict[str, str]  # "1f600" -> "grinning-face"; empty for the older sets, which only have names
    category_of_name: dict[str, str]


def read_emoji(sources: Path | None, *, cache: Path) -> SourceDataset:
    """Render the demo's images from the npm tarballs in `sources`.

    None fetches them into `cache` with `npm pack`.
    Raises ValueError when npm, resvg or a tarball is missing or differs from the pinned one.
    """
    rasterise = _rasteriser()
    tarballs = find_tarballs(sources) if sources is not None else fetch_tarballs(cache)
    drawings = {name: read_drawings(path) for name, path in tarballs.items()}
    names = _common_names(drawings)

    # 1. Which sets draw which emoji.
    codepoints_of_name = _codepoints_of_names(drawings)
    drawn_by: dict[str, dict[str, str]] = {}
    for emoji_set in EMOJI_SETS:
        for codepoints, icon in _icons_of_set(emoji_set.name, drawings[emoji_set.name], codepoints_of_name):
            drawn_by.setdefault(codepoints, {}).setdefault(emoji_set.name, icon)

    # 2. Their pictures.
    pictures: dict[str, dict[str, bytes]] = {}
    candidates = [
        c for c in sorted(drawn_by) if c in names and len(drawn_by[c]) >= MIN_SETS and is_plain_emoji(c, names[c])
    ]
    for codepoints in tqdm(candidates, desc="drawing", unit=" emoji", mininterval=0.5):
        different: dict[bytes, tuple[str, bytes]] = {}
        for set_name, icon in drawn_by[codepoints].items():
            svg = svg_of_icon(drawings[set_name].icons, icon)
            picture = render(svg, rasterise) if svg is not None else None
            if picture is not None:
                different.setdefault(picture.tobytes(), (set_name, to_png(picture)))
        if len(different) >= MIN_SETS:
            pictures[codepoints] = dict(different.values())

    # 3. Classes and their split.
    by_hash = sorted(
        pictures,
        key=lambda codepoints: hashlib.sha1(_class_key(codepoints, names).encode()).hexdigest(),
    )
    train = set(by_hash[: len(by_hash) // 2])
    licenses = {emoji_set.name: emoji_set.license for emoji_set in EMOJI_SETS}
    categories = _categories(drawings, codepoints_of_name)
    images = [
        SourceImage(
            split="train" if codepoints in train else "test",
            source_id=codepoints,
            class_name=names[codepoints],
            name=f"{_class_key(codepoints, names)}/{set_name}.png",
            content=png,
            info={
                "set": set_name,
                "license": licenses[set_name],
                "category": categories.get(codepoints, "Other"),
            },
        )
        for codepoints in sorted(pictures)
        for set_name, png in pictures[codepoints].items()
    ]
    if (len(pictures), len(images)) != (NUM_CLASSES, NUM_IMAGES):
        raise ValueError(
            f"the demo should have {NUM_IMAGES} images of {NUM_CLASSES} emoji, got {len(images)} "
            f"of {len(pictures)}; "
            f"install the pinned renderer with `pip install resvg-py==0.5.0 pillow==13.0.0`"
        )
    dataset = SourceDataset("demo", images)
    check_classes(dataset)
    return dataset


def find_tarballs(folder: Path) -> dict[str, Path]:
    """The tarball of every set in a folder, checked against the pinned sha256."""
    missing = [emoji_set for emoji_set in EMOJI_SETS if not (folder / emoji_set.tarball).is_file()]
    if missing:
        commands = " ".join(emoji_set.package for emoji_set in missing)
        raise ValueError(
            f"{folder} lacks {', '.join(emoji_set.tarball for emoji_set in missing)}; "
            f"run `npm pack {commands}` there, or leave --root out to fetch them"
        )
    for emoji_set in EMOJI_SETS:
        found = hashlib.sha256((folder / emoji_set.tarball).read_bytes()).hexdigest()
        if found != emoji_set.sha256:
            raise ValueError(
                f"{folder / emoji_set.tarball} has sha256 {found}, expected {emoji_set.sha256}; "
                "delete it and fetch it again"
            )
    return {emoji_set.name: folder / emoji_set.tarball for emoji_set in EMOJI_SETS}


def fetch_tarballs(cache: Path) -> dict[str, Path]:
    """Fetch the tarballs that `cache` lacks with `npm pack`, which runs no script of a package."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [emoji_set.package for emoji_set in EMOJI_SETS if not (cache / emoji_set.tarball).is_file()]
    if missing:
        if shutil.which("npm") is None:
            raise ValueError(
                "rebuilding the demo's shards needs npm, which is not installed. Training does "
                "not: the built shards are in shards/demo. "
                f"Install node.js, or pass --root FOLDER with the tarballs of {', '.join(missing)}"
            )
        done = subprocess.run(
            ["npm", "pack", "--silent", *missing],
            cwd=cache,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ValueError(
                f"`npm pack {' '.join(missing)}` failed: {done.stderr.strip()[-500:]}; check the "
                "network, or pass --root FOLDER"
            )
    return find_tarballs(cache)


def read_drawings(tarball: Path) -> Drawings:
    """Icons, names and categories of one package."""
    with tarfile.open(tarball, "r:gz") as tar:
        content = {}
        for name in ("icons", "chars", "metadata"):
            stream = tar.extractfile(f"package/{name}.json")
            assert stream is not None, f"{tarball} has no package/{name}.json"
            content[name] = json.load(stream)
    names: dict[str, str] = {}
    for codepoints, name in sorted(content["chars"].items()):
        names.setdefault(_without_variation_selector(codepoints), name)
    categories = {name: category for category, members in content["metadata"]["categories"].items() for name in members}
    return Drawings(content["icons"], names, categories)


def svg_of_icon(icons: Mapping[str, Any], name: str) -> str | None:
    """A whole SVG document of an icon; follows aliases that are only another name.

    None when there is no such drawing.
    """
    for _ in range(6):
        if name in icons["icons"]:
            icon = icons["icons"][name]
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
                f'width="{width}" height="{height}">'
                f"{icon['body']}</svg>"
            )
        alias = icons.get("aliases", {}).get(name)
        if alias is None or {"hFlip", "vFlip", "rotate"} & set(alias):
            return None
        name = alias["parent"]
    return None


def render(svg: str, rasterise: Callable[[str, int], bytes | None]) -> Image.Image | None:
    """An SVG on a white square of 64 px, averaged from 128 px; None when it is blank or broken."""
    drawn = rasterise(svg, 2 * SIDE)
    if drawn is None:
        return None
    with Image.open(io.BytesIO(drawn), formats=["PNG"]) as opened:
        picture = opened.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = square.convert("RGB").resize(
        (SIDE, SIDE), Image.Resampling.BOX if side == 2 * SIDE else Image.Resampling.LANCZOS
    )
    return None if small.getextrema() == ((255, 255),) * 3 else small


def to_png(picture: Image.Image) -> bytes:
    """A picture as PNG of at most 64 colours; at this size the loss is hardly visible."""
    stream = io.BytesIO()
    colours = picture.quantize(NUM_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def is_plain_emoji(codepoints: str, name: str) -> bool:
    """Whether an emoji is no variant of another (skin tone, gender, direction) and no letter."""
    points = [int(point, 16) for point in codepoints.split("-")]
    if any(0x1F3FB <= point <= 0x1F3FF for point in points):  # skin tones
        return False
    if {0x2640, 0x2642, 0x27A1} & set(points[1:]):  # female, male, facing right
        return False
    if 0x200D in points and points[0] in (
        0x1F468,
        0x1F469,
        0x1F9D1,
    ):  # man, woman or person joined with something
        return False
    if len(points) == 1 and (
        0xE000 <= points[0] < 0xF900 or 0x1F1E6 <= points[0] <= 0x1F1FF
    ):  # private use, regional letters
        return False
    return re.search(r"skin-tone|-low$", name) is None


def attribution() -> str:
    """Who made the demo's pictures, and under which licence: a table in Markdown."""
    rows = [f"| {s.name} | {s.author} | {s.license} | `{s.package}` | {s.url} |" for s in EMOJI_SETS]
    return "\n".join(["| set | author | licence | npm package | source |", "|---|---|---|---|---|", *rows])


def _rasteriser() -> Callable[[str, int], bytes | None]:
    try:
        import resvg_py
    except ImportError as problem:
        raise ValueError(
            "rebuilding the demo's shards needs resvg: `pip install resvg-py==0.5.0 "
            "pillow==13.0.0`. "
            "Training does not: the built shards are in shards/demo"
        ) from problem

    def rasterise(svg: str, width: int) -> bytes | None:
        try:
            return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True))
        except Exception:  # resvg raises its own types for drawings that it cannot parse
            return None

    return rasterise


def _without_variation_selector(codepoints: str) -> str:
    return "-".join(point for point in codepoints.lower().split("-") if point != "fe0f")


def _class_key(codepoints: str, names: Mapping[str, str]) -> str:
    return f"{codepoints}_{names[codepoints]}"[:80]


def _common_names(drawings: Mapping[str, Drawings]) -> dict[str, str]:
    """One name per emoji. noto comes first: its names are those of Unicode's CLDR."""
    names: dict[str, str] = {}
    for content in drawings.values():
        for codepoints, name in content.name_of_codepoints.items():
            names.setdefault(codepoints, name)
    return names


def _codepoints_of_names(drawings: Mapping[str, Drawings]) -> dict[str, str]:
    """Code points of every name: those of the sets, then aliases, then older names of flags."""
    known: dict[str, str] = {}
    for content in drawings.values():
        for codepoints, name in content.name_of_codepoints.items():
            known.setdefault(name, codepoints)
    for content in drawings.values():
        for alias, target in sorted(content.icons.get("aliases", {}).items()):
            parent = target["parent"]
            if alias in known:
                known.setdefault(parent, known[alias])
            elif parent in known:
                known.setdefault(alias, known[parent])
    for name, codepoints in sorted(known.items()):
        if name.startswith("flag-") and not name.startswith("flag-for-"):
            known.setdefault(f"flag-for-{name.removeprefix('flag-')}", codepoints)
            known.setdefault(f"flag-for-{name}", codepoints)
    return known


def _icons_of_set(set_name: str, content: Drawings, codepoints_of_name: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(code points, icon) of a set's drawings, through their names if it has no code points."""
    if content.name_of_codepoints:
        yield from sorted(content.name_of_codepoints.items())
        return
    undashed: dict[str, str] = {}
    if set_name == "fxemoji":  # leaves dashes out of many names
        for name, codepoints in sorted(codepoints_of_name.items()):
            undashed.setdefault(name.replace("-", ""), codepoints)
    for icon in sorted({*content.icons["icons"], *content.icons.get("aliases", {})}):
        found = codepoints_of_name.get(icon) or undashed.get(icon.replace("-", ""))
        if found is not None:
            yield found, icon


def _categories(drawings: Mapping[str, Drawings], codepoints_of_name: Mapping[str, str]) -> dict[str, str]:
    categories: dict[str, str] = {}
    for content in drawings.values():
        for name, category in content.category_of_name.items():
            if name in codepoints_of_name:
                categories.setdefault(codepoints_of_name[name], category)
    return categories


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        None, "Draw the demo's images and write their shards.", "  python tools/build_demo.py --out shards/demo-again"
    )
    add_options(parser, "--out", "--overwrite")
    parser.add_argument("--root", type=Path, help="folder of the npm tarballs (default: fetch them)")
    return parser


@command(_parser, stopped="stopped; the same command resumes")
def main(given: argparse.Namespace) -> None:
    """Draw, write, and say what there is."""
    if not given.overwrite:  # before it draws: is there another build?
        settings = build_settings(seed=0, samples_per_shard=500, resize=None)
        finished_build(given.out, dataset="demo", settings=settings)
    dataset = read_emoji(given.root, cache=Path.home() / ".cache" / "dist_proxygml" / "emoji")
    build_shards(dataset, given.out, overwrite=given.overwrite, workers=default_workers(len(dataset.images)))
    with publish(given.out / "ATTRIBUTION.md") as stream:
        head = "# The makers of these images\n\nEach sample's JSON names its set and licence."
        stream.write(f"{head}\n\n{attribution()}\n".encode())
    print(describe_shards(given.out))


if __name__ == "__main__":
    run_command(main)
