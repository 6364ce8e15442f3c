"""Checks of a folder of shards: readable, complete, with the expected classes and counts.

Chosen: check the index, which is small, and a sample of the images; find duplicates by the index's length and crc32,
which two different images of equal length share about once in four billion. Declined: reading every byte, which
`python -m dist_proxygml.shard verify --deep` does, and near-duplicates, which need an embedding.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from dist_proxygml.data.datasets import PUBLISHED_COUNTS
from dist_proxygml.data.finding import Finding, run_check
from dist_proxygml.data.index import INDEX_FILE, ClassEntry, ShardIndex, list_splits, open_index
from dist_proxygml.data.shards import ShardReader

_NUM_SAMPLED = 200  # images of each split whose bytes are read


def audit_shards(
    location: str,
    *,
    train_split: str = "train",
    cache_directory: Path | None = None,
    cache_limit: int | None = None,
    allow_seen_classes: bool = False,
) -> tuple[list[Finding], dict[str, ShardIndex]]:
    """Run all checks of a local or remote folder of shards; also return the splits that could be opened.

    Of remote shards only the index is fetched. The location must have been typed by the user.
    """
    indices: dict[str, ShardIndex] = {}

    def opened() -> Iterator[Finding]:
        try:
            names = list_splits(location, cache_directory=cache_directory, cache_limit=cache_limit)
        except (ValueError, OSError) as error:
            yield Finding("problem", "shards", str(error))
            return
        for name in sorted(names, key=lambda name: (name != train_split, name)):
            try:
                index = open_index(
                    location, name, cache_directory=cache_directory, cache_limit=cache_limit, is_typed=True
                )
            except (ValueError, OSError) as error:
                yield Finding("problem", f"split {name}", str(error))
                continue
            indices[name] = index
            num_bytes = sum(shard.bytes for shard in index.shards)
            yield Finding(
                "ok",
                f"split {name}",
                f"{index.num_samples:,} images of {index.num_classes:,} classes in {len(index.shards)} shards of the "
                f"size that the index says, {num_bytes / 2**20:,.1f} MiB",
            )

    findings = run_check("shards", opened)
    for name, index in indices.items():
        if index.remote is None:
            findings += run_check(f"images {name}", partial(check_images, index))
        findings += run_check(f"counts {name}", partial(check_counts, index))
    for name, index in indices.items():
        if train_split in indices and name != train_split:
            check = partial(check_classes, indices[train_split], index, allow_seen=allow_seen_classes)
            findings += run_check("classes", check)
            findings += run_check("duplicates", partial(check_duplicates, indices[train_split], index))
    return findings, indices


def check_images(index: ShardIndex) -> Iterator[Finding]:
    """Check the crc32 of images sampled from the whole split."""
    drawn = np.random.default_rng(0).permutation(index.num_samples)[:_NUM_SAMPLED]
    reader = ShardReader(index.open_shard)
    damaged = []
    for sample_id in sorted(drawn.tolist()):
        row = index.samples[sample_id]
        try:
            reader.read(
                int(row["shard"]), offset=int(row["offset"]), num_bytes=int(row["nbytes"]), crc32=int(row["crc32"])
            )
        except ValueError as error:
            damaged.append(f"{index.describe(sample_id)}: {error}")
    reader.close()
    name = f"images {index.split}"
    if damaged:
        yield Finding(
            "problem",
            name,
            f"{len(damaged)} of {len(drawn)} images that were read are damaged, the first {damaged[0]}",
            f"see all with `python -m dist_proxygml.shard verify --deep {index.location}`, then copy or build the "
            'shards again, or set data.damaged_images to "skip"',
        )
    else:
        yield Finding("ok", name, f"{len(drawn)} images were read, each with the crc32 of the index")


def check_counts(index: ShardIndex) -> Iterator[Finding]:
    """Compare numbers of images and classes of a split with the literature."""
    expected = PUBLISHED_COUNTS.get(index.dataset, {}).get(index.split)
    if expected is None:
        return
    found = index.num_samples, int(np.count_nonzero(np.bincount(index.labels)))
    name = f"counts {index.split}"
    if found == expected:
        yield Finding("ok", name, f"those published for {index.dataset}")
    else:
        yield Finding(
            "problem",
            name,
            f"expected the published {expected[0]:,} images of {expected[1]:,} classes of {index.dataset}, found "
            f"{found[0]:,} of {found[1]:,}",
            f"unpack the download again and build with `python -m dist_proxygml.shard build {index.dataset}`; results "
            "on other counts are not comparable",
        )


def check_classes(train: ShardIndex, other: ShardIndex, *, allow_seen: bool = False) -> Iterator[Finding]:
    """Check that no class is in both splits, because retrieval is measured on unseen classes, unless those of trained
    classes are meant to be (`allow_seen`).
    """
    shared = shared_classes(train, other)
    if shared is None:
        yield Finding(
            "warning",
            "classes",
            f"{train.split} or {other.split} has numbers for class names, so shared classes cannot be detected",
            "write the class's name into each sample's JSON as class_name, and make the index again",
        )
    elif shared:
        known = f"{len(shared):,} of the {other.num_classes:,} classes of {other.split} are in {train.split} too"
        if allow_seen:
            yield Finding("ok", "classes", f"{known}, as evaluation.allow_seen_classes allows")
            return
        yield Finding(
            "problem",
            "classes",
            f"{known}, such as {shared[0]!r}: retrieval would be measured on classes that were trained",
            "build the shards with splits by class, or set evaluation.allow_seen_classes to true to measure on known "
            "classes",
        )
    else:
        yield Finding("ok", "classes", f"{train.split} and {other.split} share none")


def shared_classes(train: ShardIndex, other: ShardIndex) -> list[str] | None:
    """List the names of classes in both splits, sorted; None if either has only numbers for names."""
    is_same = (train.location, train.split) == (other.location, other.split)
    seen_C = seen_classes(train.classes, other, is_same_split=is_same)
    return None if seen_C is None else sorted(other.classes[label].name for label in np.flatnonzero(seen_C))


def seen_classes(
    trained: Sequence[ClassEntry], other: ShardIndex, *, is_same_split: bool
) -> Bool[np.ndarray, " C"] | None:
    """Find which classes of a split are trained, as `count_trained_images`."""
    trained_C = count_trained_images(trained, other, is_same_split=is_same_split)
    return None if trained_C is None else trained_C >= 0


def count_trained_images(
    trained: Sequence[ClassEntry], other: ShardIndex, *, is_same_split: bool
) -> Int[np.ndarray, " C"] | None:
    """Count the training images of each class of a split, by name; -1: the class is not trained. None if either side
    has only numbers for names.

    Args:
        trained: the trained classes.
        other: the split.
        is_same_split: they are classes of this very split, where also numbers tell.
    """
    if is_same_split:
        own = {(entry.name, entry.source_id): entry.count for entry in trained}
        return np.array([own.get((entry.name, entry.source_id), -1) for entry in other.classes], dtype=np.int64)
    names, other_names = _class_names(trained), _class_names(other.classes)
    if not (names and other_names):
        return None
    counts: Counter[str] = Counter()
    for entry in trained:
        counts[entry.name] += entry.count
    known = names & other_names
    return np.array([counts[entry.name] if entry.name in known else -1 for entry in other.classes], dtype=np.int64)


def _class_names(classes: Iterable[ClassEntry]) -> set[str]:
    """Return the names of classes; none if they merely repeat the labels."""
    return {entry.name for entry in classes if entry.name != str(entry.label)}


def check_duplicates(train: ShardIndex, other: ShardIndex) -> Iterator[Finding]:
    """Check for image files in both splits, equal by length and crc32."""
    keys: list[np.ndarray] = [
        index.samples["nbytes"].astype(np.uint64) << np.uint64(32) | index.samples["crc32"].astype(np.uint64)
        for index in (train, other)
    ]
    common, train_ids, other_ids = np.intersect1d(keys[0], keys[1], return_indices=True)
    if len(common) == 0:
        yield Finding("ok", "duplicates", f"no image file is in {train.split} and in {other.split}")
        return
    yield Finding(
        "warning",
        "duplicates",
        f"{len(common):,} image files are in {train.split} and in {other.split} alike, such as "
        f"{train.describe(int(train_ids[0]))} and {other.describe(int(other_ids[0]))}",
        "remove one of the two, or report it with the results",
    )


def check_num_classes(index: ShardIndex, num_classes: int, *, source: str) -> Finding:
    """Compare a configuration's number of classes with that of its training split."""
    if index.num_classes == num_classes:
        return Finding("ok", "num_classes", f"{num_classes:,} in {source} and in split {index.split}")
    return Finding(
        "problem",
        "num_classes",
        f"data.num_classes is {num_classes} in {source} but {index.num_classes} in {index.location}/{INDEX_FILE}, "
        f"split {index.split}",
        f"set data.num_classes={index.num_classes}, or point data.shards at the right shards",
    )
