"""Folders of shards: compared with their index, described, and given an index where others wrote the tars."""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dist_proxygml.data.images import decode_image
from dist_proxygml.data.index import (
    INDEX_FILE,
    INDEX_KIND,
    JOURNAL_FILE,
    NUM_FOLDS,
    ShardIndex,
    class_table_name,
    open_index,
    pair_table_name,
    read_index,
    write_index,
)
from dist_proxygml.data.shards import ListedShard, list_shard, split_of_shard
from dist_proxygml.storage.files import parse_json, paths_in

_MANY_LABELS = 1_000_000  # a class table up to here is harmless, however few samples there are


def index_shards(root: Path, *, quiet: bool = False) -> list[str]:
    """Write the index of a folder of tars, for shards of another origin or whose index was lost.

    The split is what stands before the number in a tar's name. Labels stay as they are. Their names come from the
    samples' JSON when it has `class_name` or `source_id`, else from the index that was there (of version 1 or 2), which
    also passes on data set and build; else they are the labels' numbers.

    Returns the shards whose sha256 is no longer what the index that was there says. Raises ValueError for a build that
    is not finished, naming a shard that cannot be listed, for a label with two names, and for labels that are far
    larger than the number of samples.
    """
    if (root / JOURNAL_FILE).exists() and not (root / INDEX_FILE).exists():
        raise ValueError(
            f"{root} is a build that was not finished, an index would hide what is missing; "
            "run the same `python -m dist_proxygml.shard build` again"
        )
    tars = paths_in(root, "*.tar")
    if not tars:
        packed = [path.name for path in paths_in(root, "*.t*") if re.search(r"\.(tar\.\w+|tgz)$", path.name)]
        remedy = f"unpack {packed[0]} and its like" if packed else "name a folder of WebDataset shards"
        raise ValueError(f"{root} has no .tar files; {remedy}")
    previous = _previous_index(root)
    shards: dict[str, list[tuple[str, ListedShard]]] = {}
    names: dict[str, dict[int, tuple[str, int | str]]] = {}
    key_hashes: dict[str, list[np.ndarray]] = {}
    for path in tqdm(tars, desc=f"indexing {root}", unit=" shards", disable=quiet, mininterval=0.5):
        split = split_of_shard(path.name)
        if split is None:
            raise ValueError(f"{path} has no number at the end of its name; expected names like train-000000.tar")
        listed = list_shard(path)
        # Query and gallery share one label space.
        table = names.setdefault("query" if split == "gallery" else split, {})
        for label, entry in listed.classes.items():
            known, _ = table.setdefault(label, entry)
            if known != entry[0]:
                raise ValueError(
                    f"{path}: label {label} has the class name {entry[0]!r}, in an earlier shard {known!r}; "
                    "write the shards again with one name for each label"
                )
        hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in listed.keys]
        key_hashes.setdefault(split, []).append(np.frombuffer(b"".join(hashes), np.uint64))
        shards.setdefault(split, []).append((path.name, listed._replace(keys=[], classes={})))
    classes = {}
    for split in sorted(shards, key=lambda split: (split != "train", split)):
        table = names["query" if split == "gallery" else split]
        space = ("query", "gallery") if split in ("query", "gallery") else (split,)
        rows = [listed.rows for one in space for _, listed in shards.get(one, [])]
        num_samples = sum(map(len, rows))
        if not any(len(listed.rows) for _, listed in shards[split]):
            raise ValueError(
                f"{root / shards[split][0][0]}: expected samples in the split {split!r}, got none; remove its shards, "
                "or write them again"
            )
        num_classes = max(int(part["label"].max(initial=-1)) for part in rows) + 1
        if num_classes - 1 > max(_MANY_LABELS, 100 * num_samples):
            raise ValueError(
                f"{root}: the {num_samples} samples of {split!r} have labels up to {num_classes - 1}, expected labels "
                "that count the classes from 0; write the shards again with such labels"
            )
        numbers = {label: (str(label), label) for label in range(num_classes)}
        earlier = dict(enumerate(_previous_classes(root, split, previous)[:num_classes]))
        said_now = {label: entry for label, entry in table.items() if entry != numbers[label]}
        classes[split] = list({**numbers, **earlier, **said_now}.values())
    expected = _previous_sha256(previous)
    changed = [f for files in shards.values() for f, listed in files if expected.get(f, listed.sha256) != listed.sha256]
    dataset, build = previous.get("dataset"), previous.get("build")
    build = build if isinstance(build, dict) else {"layout": "unknown"}
    build.pop("exif", None)
    if any(listed.counted.get("upright") for files in shards.values() for _, listed in files):
        build["exif"] = "applied"  # by `build`, whatever has become of its index
    pairs = {split: _same_pairs(root, split, changed) for split in classes if (root / pair_table_name(split)).exists()}
    write_index(
        root,
        dataset=dataset if isinstance(dataset, str) else root.resolve().name,
        build=build,
        shards={split: shards[split] for split in classes},
        classes=classes,
        keys_repeat=[split for split, parts in key_hashes.items() if _repeat(np.concatenate(parts))],
        pairs=pairs,
    )
    return sorted(changed)


def _same_pairs(root: Path, split: str, changed: Collection[str]) -> np.ndarray:
    """The pairs of a verification set, of which only the index that was there knows which samples they mean."""
    try:
        index = open_index(root, split)
        if index.num_pairs and not changed:
            return index.read_pairs()
        problem = f"{len(changed)} shards changed" if changed else "the index that was there has no pairs"
    except ValueError as error:
        problem = str(error)
    raise ValueError(
        f"{root / pair_table_name(split)} has pairs of samples, and which is not certain any more: {problem}; build "
        "the verification set again, or remove the file"
    )


def _repeat(values: np.ndarray) -> bool:
    return len(np.unique(values)) < len(values)


def _previous_index(root: Path) -> Mapping[str, Any]:
    """The `index.json` that is there, of any version; empty when there is none that can be read."""
    if not (root / INDEX_FILE).is_file():  # a pipe would be waited for
        return {}
    try:
        document = parse_json((root / INDEX_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) and document.get("kind") == INDEX_KIND else {}


def _previous_sha256(previous: Mapping[str, Any]) -> dict[str, str]:
    """Shard file -> sha256 in an earlier index; empty when it has none that can be read."""
    try:
        return {s["file"]: s["sha256"] for entry in previous["splits"].values() for s in entry["shards"]}
    except (KeyError, TypeError, AttributeError):
        return {}


def _previous_classes(root: Path, split: str, previous: Mapping[str, Any]) -> list[tuple[str, int | str]]:
    """(name, source id) of every label in an earlier index; empty when it has none that can be read."""
    try:
        if previous["version"] == 1:
            return [(str(entry["name"]), entry["source_id"]) for entry in previous["splits"][split]["classes"]]
        table = root / class_table_name(split)
        lines = table.read_text(encoding="utf-8").split("\n") if table.is_file() else []
        return [(str(name), source_id) for name, source_id, _ in map(parse_json, filter(None, lines))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def verify_shards(root: Path, *, deep: bool = False, quiet: bool = False) -> list[str]:
    """List the problems of a folder of shards, one sentence each; none when it is sound.

    Plain: index, tables, pairs, presence and size of the shards. Deep: also the sha256 of every
    shard, the crc32 and label of every sample, and that every image decodes.
    """
    document, _ = read_index(root)
    problems = []
    indexes = []
    for split in document["splits"]:
        try:
            index = open_index(root, split)
            if index.num_pairs:
                index.read_pairs()
            indexes.append(index)
        except ValueError as problem:
            problems.append(str(problem))
    if deep:
        num_images = sum(index.num_samples for index in indexes)
        with tqdm(total=num_images, desc="verifying", unit=" images", disable=quiet, mininterval=0.5) as bar:
            for index in indexes:
                for number in range(len(index.shards)):
                    problems += _shard_problems(index, number, bar)
    return problems


def _shard_problems(index: ShardIndex, number: int, bar: tqdm) -> list[str]:
    path = index.shard_paths[number]
    expected = index.samples[index.samples["shard"] == number]
    problems = []

    def check(key: str, image: bytes, info: Mapping[str, Any]) -> None:
        bar.update()
        try:
            decode_image(image, upright=index.upright)
        except ValueError as problem:
            made_of = f" (made of {info['source']})" if "source" in info else ""
            problems.append(f"{path}: sample {key}{made_of}: {problem}")

    try:
        listed = list_shard(path, check_image=check)
    except (ValueError, OSError) as problem:
        return [*problems, str(problem)]
    if listed.sha256 != index.shards[number].sha256:
        problems.append(
            f"{path}: sha256 is {listed.sha256[:12]}..., the index says {index.shards[number].sha256[:12]}..."
        )
    if len(listed.rows) != len(expected):
        return [*problems, f"{path}: has {len(listed.rows)} samples, the index says {len(expected)}"]
    for key, found, wanted in zip(listed.keys, listed.rows.tolist(), expected.tolist(), strict=True):
        if found[1:] != wanted[1:]:
            problems.append(
                f"{path}: sample {key} has (label, offset, bytes, crc32) {found[1:]}, the index says {wanted[1:]}"
            )
    return problems


def describe_shards(root: Path) -> str:
    """Counts, classes and class sizes of every split as text."""
    document, digest = read_index(root)
    build = dict(document["build"])
    skipped = build.pop("skipped", [])
    lines = [f"{root}: {document['dataset']}, index {digest[:12]}, built with {build}"]
    if skipped:
        lines.append(f"{len(skipped)} images could not be used and were skipped; {root / INDEX_FILE} names them")
    for split in document["splits"]:
        index = open_index(root, split)
        counts = np.bincount(index.labels, minlength=index.num_classes)
        size = sum(shard.bytes for shard in index.shards)
        lines.append(
            f"{split}: {index.num_samples} images, {index.num_classes} classes, "
            f"{len(index.shards)} shards, {size / 1e6:.1f} MB; "
            f"images a class: {counts.min()} to {counts.max()}, median {np.median(counts):g}"
        )
        if index.keys_repeat:
            lines.append("  keys repeat from shard to shard, so images are called SHARD/KEY")
        if index.cameras is not None:
            lines.append(f"  {len(np.unique(index.cameras))} cameras")
        if index.num_pairs:
            num_same = int(index.read_pairs()[:, 2].sum())
            lines.append(f"  {index.num_pairs} pairs in {NUM_FOLDS} folds, {num_same} of them the same")
        lines += _histogram(counts)
    return "\n".join(lines)


def _histogram(counts: np.ndarray) -> list[str]:
    edges = np.unique(np.linspace(counts.min(), counts.max() + 1, min(11, counts.max() - counts.min() + 2)).astype(int))
    classes_per_bin, _ = np.histogram(counts, bins=edges)
    lines = []
    for low, high, number in zip(edges[:-1], edges[1:] - 1, classes_per_bin, strict=True):
        sizes = f"{low}" if low == high else f"{low}-{high}"
        lines.append(
            f"  {sizes:>9} images  {number:6d} classes  {'#' * int(np.ceil(40 * number / classes_per_bin.max()))}"
        )
    return lines
