"""Data set of glyphs: every character is a class, every typeface that really draws it gives one image.

    train            half of the characters, by the lowest bit of the first byte of sha1(character in UTF-8)
    gallery          of every other character the picture of the first typeface that draws it, in the order of --fonts
    query            one more picture of each, drawn by sha256("character/typeface")
    test             all their other pictures; it shares its classes with query and gallery

A search therefore crosses typefaces, over characters that training never saw.

Fonts claim more than they draw, so pictures decide. Of a typeface are dropped: empty ink; a picture of four or more
characters (a box for what is missing); a picture of two classes; and each script in which it shares its outlines with
an earlier typeface, where at least 0.4 of their common pictures correlate above 0.95 (different designs: at most 0.38).
Characters whose pictures are equal in at least half of the typefaces that draw both (A of Latin, Greek, Cyrillic) are
one class, named by the lowest.

Chosen: a sample of at most 300 characters of a script for comparing typefaces, those that most typefaces have; a
threshold between the pairs known as copies (from 0.43 on) and as designs of their own. Declined: dropping characters
that look alike but differ (hard negatives), and regional forms of Han characters as classes (they share a code point).
"""

import hashlib
import io
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image, features
from tqdm import tqdm

from dist_proxygml.data.builder import default_workers, in_processes
from dist_proxygml.data.datasets import SourceDataset, SourceImage, check_classes
from dist_proxygml.data.typefaces import Glyphs, Typeface, draw, font_size, read_typefaces, script_of

_PLACEHOLDER = 4  # characters that share a picture
_SAMPLE = 300  # characters of a script
_MIN_COMMON = 20  # of two typefaces in a script, to compare them
_SAME_PICTURE = 0.95  # correlation
_SAME_OUTLINES = 0.4  # share of same pictures
_SAME_CHARACTER = 0.5  # share of typefaces that draw two characters alike
_PER_TASK = 2000  # characters

# The pictures of a typeface: PNG by character.
_Pictures = dict[int, bytes]


class _Class(NamedTuple):
    character: int
    pictures: dict[int, bytes]  # PNG by the number of its typeface, in their order

    @property
    def trains(self) -> bool:
        return hashlib.sha1(chr(self.character).encode()).digest()[0] % 2 == 0


def read_glyphs(
    fonts: Sequence[Path],
    *,
    size: int = 32,
    min_images: int = 4,
    on_bad: Literal["fail", "skip"] = "fail",
    workers: int | None = None,
    quiet: bool = False,
) -> SourceDataset:
    """Draw the characters of all fonts in folders (or files), in pictures of `size` pixels.

    Classes have at least `min_images` pictures. The files beside the shards are fonts.json (settings, versions,
    typefaces with the hashes of their files, numbers of classes by images) and LICENSES.txt.

    Raises ValueError as `read_typefaces`, and if there are too few classes.
    """
    typefaces, notes = read_typefaces(fonts, on_bad=on_bad, quiet=quiet)
    claimed = sum(len(typeface.characters) for typeface in typefaces)
    workers = default_workers(claimed) if workers is None else workers

    # 1. Pictures: of a sample, to find typefaces that share outlines, then of all that the others claim.
    sample = _common_characters(typefaces)
    sizes = dict(enumerate(_font_sizes(typefaces, size, workers, quiet)))
    probes = _draw(
        typefaces, [[c for c in t.characters if c in sample] for t in typefaces], sizes, size, workers, quiet
    )
    copies = _copies(probes)
    wanted = [[c for c in t.characters if script_of(c) not in copies[i]] for i, t in enumerate(typefaces)]
    drawn = _draw(typefaces, wanted, sizes, size, workers, quiet)
    del probes
    drawn = [_without_placeholders(pictures) for pictures in drawn]

    # 2. Classes, and which of them train.
    classes, merged = _classes(drawn)
    by_images = Counter(len(one.pictures) for one in classes)
    classes = [one for one in classes if len(one.pictures) >= min_images]
    train = [one for one in classes if one.trains]
    unseen = [one for one in classes if not one.trains]
    if len(train) < 2 or len(unseen) < 2:
        raise ValueError(
            f"expected at least 2 characters to train and 2 to test that {min_images} typefaces draw, got {len(train)} "
            f"and {len(unseen)} of {len(typefaces)} typefaces with {_shown(by_images)}; add fonts of the same scripts, "
            "or lower --min-images"
        )
    images = list(_images(sorted(train + unseen), typefaces))

    # 3. What should be known of them.
    used = sorted({number for one in (*train, *unseen) for number in one.pictures})
    notes.append(
        f"{len(images)} images of {len(used)} of {len(typefaces)} typefaces; fonts.json says what of each was left out"
    )
    if sharing := sum(map(bool, copies)):
        notes.append(f"{sharing} typefaces share their outlines of a script with an earlier one, and lost it")
    if merged:
        notes.append(f"{len(merged)} characters are drawn as another one, and became one class with it")
    notes.append(
        f"characters by number of images, of which those with {min_images} and more are classes: {_shown(by_images)}"
    )
    document = {
        "size": size,
        "min_images": min_images,
        "classes": {"train": len(train), "test": len(unseen)},
        "characters_by_images": {str(number): count for number, count in sorted(by_images.items())},
        "merged_characters": {chr(character): chr(root) for character, root in sorted(merged.items())},
        "versions": _versions(),
        "typefaces": [
            _record(typefaces[i], copies[i], sum(i in one.pictures for one in (*train, *unseen)), typefaces)
            for i in range(len(typefaces))
        ],
    }
    beside = {
        "fonts.json": (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode(),
        "LICENSES.txt": _licences([typefaces[i] for i in used]).encode(),
    }
    dataset = SourceDataset("glyphs", images, (("gallery", "query", "test"),), tuple(notes), beside=beside)
    check_classes(dataset)
    return dataset


def _shown(by_images: Counter[int]) -> str:
    """Numbers of characters, in ranges that double from 8 on."""
    ranges = Counter(number if number < 8 else 1 << (number.bit_length() - 1) for number in by_images.elements())
    shown = (f"{ranges[low]} with {low if low < 8 else f'{low} to {2 * low - 1}'}" for low in sorted(ranges))
    return ", ".join(shown) or "no characters"


def _images(classes: Iterable[_Class], typefaces: Sequence[Typeface]) -> Iterator[SourceImage]:
    for character, pictures in classes:
        code = f"U+{character:04X}"
        splits = dict.fromkeys(pictures, "train" if _Class(character, pictures).trains else "test")
        if "test" in splits.values():
            first, *others = pictures
            splits[first] = "gallery"
            splits[min(others, key=lambda i: _draw_of(character, typefaces[i]))] = "query"
        for number, png in pictures.items():
            name = typefaces[number].name
            info = {"typeface": name, "script": script_of(character)}
            yield SourceImage(splits[number], character, f"{chr(character)} {code}", f"{code}/{name}.png", png, info)


def _draw_of(character: int, typeface: Typeface) -> bytes:
    return hashlib.sha256(f"{chr(character)}/{typeface.name}".encode()).digest()


# ---- pictures --------------------------------------------------------------------------------------------------------


def _common_characters(typefaces: Sequence[Typeface]) -> set[int]:
    """Of each script the characters that most typefaces claim; among equals the order is that of a hash."""
    claims = Counter(character for typeface in typefaces for character in typeface.characters)
    scripts: defaultdict[str, list[int]] = defaultdict(list)
    for character in claims:
        scripts[script_of(character)].append(character)
    sample: set[int] = set()
    for characters in scripts.values():
        characters.sort(key=lambda c: (-claims[c], hashlib.sha1(chr(c).encode()).digest()))
        sample.update(characters[:_SAMPLE])
    return sample


def _font_sizes(typefaces: Sequence[Typeface], side: int, workers: int, quiet: bool) -> list[int]:
    tasks = [(number, typeface, side) for number, typeface in enumerate(typefaces)]
    with closing(in_processes(_numbered_font_size, tasks, workers)) as results:
        bar = tqdm(results, total=len(tasks), desc="measuring", unit=" typefaces", disable=quiet)
        return [font_size for _, font_size in sorted(bar)]


def _numbered_font_size(task: tuple[int, Typeface, int]) -> tuple[int, int]:
    number, typeface, side = task
    return number, font_size(typeface, side)


def _draw(
    typefaces: Sequence[Typeface],
    characters: Sequence[Sequence[int]],
    sizes: Mapping[int, int],
    side: int,
    workers: int,
    quiet: bool,
) -> list[_Pictures]:
    """The pictures of these characters, for each typeface in the order of `characters`."""
    tasks = [
        (
            number,
            Glyphs(
                typefaces[number].file, typefaces[number].face, sizes[number], side, tuple(wanted[i : i + _PER_TASK])
            ),
        )
        for number, wanted in enumerate(characters)
        if sizes[number]
        for i in range(0, len(wanted), _PER_TASK)
    ]
    parts: list[_Pictures] = [{} for _ in typefaces]
    with (
        tqdm(
            total=sum(map(len, characters)), desc="drawing", unit=" characters", disable=quiet, mininterval=0.5
        ) as bar,
        closing(in_processes(_numbered_draw, tasks, workers)) as results,
    ):
        for number, num_characters, drawn in results:
            parts[number].update(drawn)
            bar.update(num_characters)
    return [{c: pictures[c] for c in sorted(pictures)} for pictures in parts]


def _numbered_draw(task: tuple[int, Glyphs]) -> tuple[int, int, list[tuple[int, bytes]]]:
    number, glyphs = task
    return number, len(glyphs.characters), draw(glyphs)


def _without_placeholders(pictures: _Pictures) -> _Pictures:
    counts = Counter(pictures.values())
    return {character: png for character, png in pictures.items() if counts[png] < _PLACEHOLDER}


def _copies(probes: Sequence[_Pictures]) -> list[dict[str, int]]:
    """For each typeface, the scripts whose outlines it shares, and the number of the earlier typeface that has them."""
    units: list[dict[int, np.ndarray]] = []
    result: list[dict[str, int]] = []
    for pictures in map(_without_placeholders, probes):
        unit_of = {character: _unit(png) for character, png in pictures.items()}
        scripts: defaultdict[str, set[int]] = defaultdict(set)
        for character in unit_of:
            scripts[script_of(character)].add(character)
        shared: dict[str, int] = {}
        for script, characters in sorted(scripts.items()):
            for number, earlier in enumerate(units):
                common = [character for character in characters if character in earlier]
                if len(common) < _MIN_COMMON:
                    continue
                similarity_n = np.array([unit_of[c] @ earlier[c] for c in common])
                if np.mean(similarity_n > _SAME_PICTURE) >= _SAME_OUTLINES:
                    shared[script] = number
                    break
        units.append({c: unit for c, unit in unit_of.items() if script_of(c) not in shared})
        result.append(shared)
    return result


def _unit(png: bytes) -> np.ndarray:
    """A picture as float32 [pixels] of mean 0 and length 1, so that products are correlations."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        pixels = np.asarray(picture, np.float32).ravel()
    pixels = pixels - pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


# ---- classes ---------------------------------------------------------------------------------------------------------


def _classes(drawn: Sequence[_Pictures]) -> tuple[list[_Class], dict[int, int]]:
    """All characters as classes, and those that were merged with a lower one that is drawn alike."""
    # 1. Which characters look the same, and in how many of the typefaces that draw both.
    alike: Counter[tuple[int, int]] = Counter()
    for pictures in drawn:
        groups: defaultdict[bytes, list[int]] = defaultdict(list)
        for character, png in pictures.items():
            groups[png].append(character)
        for group in groups.values():
            alike.update((a, b) for i, a in enumerate(group) for b in group[i + 1 :])
    root: dict[int, int] = {}

    def find(character: int) -> int:
        while character in root:
            character = root[character]
        return character

    for (a, b), count in sorted(alike.items()):
        if count >= _SAME_CHARACTER * sum(a in pictures and b in pictures for pictures in drawn):
            low, high = sorted((find(a), find(b)))
            if low != high:
                root[high] = low

    # 2. One picture for each class and typeface: the lowest character's, unless another class has the same.
    classes: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
    for number, pictures in enumerate(drawn):
        of_class: _Pictures = {}
        for character, png in pictures.items():
            of_class.setdefault(find(character), png)
        counts = Counter(of_class.values())
        for character, png in of_class.items():
            if counts[png] == 1 and png not in classes[character].values():
                classes[character][number] = png
    return [_Class(c, pictures) for c, pictures in sorted(classes.items())], {c: find(c) for c in root}


# ---- what lies beside the shards -------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    """Of what decides the pictures and their bytes."""
    return {
        "pillow": PIL.__version__,
        "freetype": features.version_module("freetype2"),
        "zlib": features.version_codec("zlib"),
        "unicode": unicodedata.unidata_version,
    }


def _record(
    typeface: Typeface, copies: Mapping[str, int], num_images: int, typefaces: Sequence[Typeface]
) -> dict[str, Any]:
    return {
        "name": typeface.name,
        "file": typeface.place,
        "face": typeface.face,
        "sha256": typeface.sha256,
        "weight": typeface.weight,
        "characters": len(typeface.characters),
        "images": num_images,
        "scripts_of_earlier": {script: typefaces[number].name for script, number in copies.items()},
        "copyright": typeface.copyright,
        "licence": typeface.licence,
        "licence_url": typeface.licence_url,
    }


def _licences(typefaces: Sequence[Typeface]) -> str:
    """The licence files of the fonts, each once, under the names of the typefaces that it is for."""
    of_text: defaultdict[str, list[str]] = defaultdict(list)
    for typeface in typefaces:
        texts = [file.read_bytes().decode("utf-8", "replace").strip() for file in typeface.licence_files]
        own = "\n".join(filter(None, (typeface.copyright, typeface.licence, typeface.licence_url)))
        for text in texts or [own or "No licence file lies beside this font, and it names none."]:
            of_text[text].append(f"{typeface.name} ({typeface.place})")
    line = "=" * 80
    head = (
        "The images in these shards were drawn with the typefaces below. Their licences, as the files beside the fonts "
        "or,\nwithout such files, the fonts themselves say them:\n"
    )
    return head + "".join(f"\n{line}\n{chr(10).join(names)}\n{line}\n\n{text}\n" for text, names in of_text.items())
