"""Command line around shards: build them from raw downloads, verify, index and describe them.

    python -m dist_proxygml.shard build sop --root Stanford_Online_Products --out shards/sop
    python -m dist_proxygml.shard verify --deep shards/sop

A build (data/builder.py) shuffles each split once by seed, writes the tars and, last, the index; equal inputs give
equal bytes, also after an interruption. Images keep their original bytes unless `--resize` is given. Exit codes: 0
done, 1 verify found damage, 2 the command cannot be carried out, 130 stopped by Ctrl-C.
"""

import argparse
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dist_proxygml.cli import at_least, refuse, run_command
from dist_proxygml.data.builder import (
    UnusableImage,
    build_settings,
    build_shards,
    default_workers,
    finished_build,
)
from dist_proxygml.data.datasets import (
    SourceDataset,
    read_cars196,
    read_cub200,
    read_imagefolder,
    read_inshop,
    read_sop,
)
from dist_proxygml.data.emoji import attribution, read_emoji
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.index import (
    INDEX_FILE,
    INDEX_KIND,
    JOURNAL_FILE,
    ShardIndex,
    class_table_name,
    open_index,
    read_index,
    write_index,
)
from dist_proxygml.data.shards import ListedShard, list_shard, split_of_shard
from dist_proxygml.storage.files import in_words, paths_in, publish

_READERS = {"cub200": read_cub200, "cars196": read_cars196, "sop": read_sop, "inshop": read_inshop}
_DATASETS = (*_READERS, "imagefolder", "demo")
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
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
    write_index(
        root,
        dataset=dataset if isinstance(dataset, str) else root.resolve().name,
        build=build if isinstance(build, dict) else {"layout": "unknown"},
        shards={split: shards[split] for split in classes},
        classes=classes,
        keys_repeat=[split for split, parts in key_hashes.items() if _repeat(np.concatenate(parts))],
    )
    return sorted(changed)


def _repeat(values: np.ndarray) -> bool:
    return len(np.unique(values)) < len(values)


def _previous_index(root: Path) -> Mapping[str, Any]:
    """The `index.json` that is there, of any version; empty when there is none that can be read."""
    if not (root / INDEX_FILE).is_file():  # a pipe would be waited for
        return {}
    try:
        document = json.loads((root / INDEX_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
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
        return [(str(name), source_id) for name, source_id, _ in map(json.loads, filter(None, lines))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def verify_shards(root: Path, *, deep: bool = False, quiet: bool = False) -> list[str]:
    """What is wrong with a folder of shards, one sentence each; empty when it is sound.

    Plain: index, tables, presence and size of the shards. Deep: also the sha256 of every
    shard, the crc32 and label of every sample, and that every image decodes.
    """
    document, _ = read_index(root)
    problems = []
    indexes = []
    for split in document["splits"]:
        try:
            indexes.append(open_index(root, split))
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
            decode_image(image)
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
        lines.append(f"{len(skipped)} images could not be used and were left out; {root / INDEX_FILE} names them")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is finished", file=sys.stderr)
        return 130
    except (ValueError, OSError) as problem:
        return refuse(problem)


def _build(options: argparse.Namespace) -> int:
    dataset = _read_dataset(options)
    for note in dataset.notes:
        print(note, file=sys.stderr)
    workers = default_workers(len(dataset.images)) if options.workers is None else options.workers
    try:
        result = build_shards(
            dataset,
            options.out,
            seed=options.seed,
            samples_per_shard=options.samples_per_shard,
            resize=options.resize,
            on_bad=options.on_bad,
            overwrite=options.overwrite,
            workers=workers,
        )
    except OSError as problem:
        if problem.errno not in _NO_ROOM:
            raise
        raise ValueError(
            f"no room to write on in {options.out}: {in_words(problem, options.out)}; what is finished is kept, and "
            "the same command goes on"
        ) from problem
    if options.dataset == "demo":
        head = "# The makers of these images\n\nEach sample's JSON names its set and licence."
        text = f"{head}\n\n{attribution()}\n"
        with publish(options.out / "ATTRIBUTION.md") as stream:
            stream.write(text.encode("utf-8"))
    if result.already_there:
        print(f"nothing to do: {options.out} holds this build; --overwrite builds it again, should files have changed")
    if result.num_kept:
        print(f"{result.num_kept} of {result.num_shards} shards were kept from a build that was interrupted")
    if result.skipped:
        print(_told(result.skipped), file=sys.stderr)
    if result.lost_classes:
        shown = ", ".join(map(repr, result.lost_classes[:20]))
        print(f"{len(result.lost_classes)} classes have no image left and are left out: {shown}", file=sys.stderr)
    if result.num_turned:
        print(
            f"viewers turn or mirror {result.num_turned} of the images (EXIF orientation), training and search see "
            "them as they are stored; to change that turn the files, as `mogrify -auto-orient` does, and build again",
            file=sys.stderr,
        )
    print(describe_shards(options.out))
    return 0


def _told(skipped: Sequence[UnusableImage]) -> str:
    first = "\n".join(f"  {image.where}: {image.reason}" for image in skipped[:20])
    return f"{len(skipped)} images cannot be used and were left out; {INDEX_FILE} names them, the first are\n{first}"


def _read_dataset(options: argparse.Namespace) -> SourceDataset:
    # Before hours of work: is there another build where it would go?
    settings = build_settings(seed=options.seed, samples_per_shard=options.samples_per_shard, resize=options.resize)
    if not options.overwrite:
        finished_build(options.out, dataset=options.dataset, settings=settings)
    if options.split_classes is not None and options.dataset != "imagefolder":
        raise ValueError(f"--split-classes is for imagefolder; {options.dataset} has a published split")
    if options.dataset == "demo":
        cache = Path.home() / ".cache" / "dist_proxygml" / "emoji"

        def progress(emoji: Iterable[str]) -> Iterable[str]:
            yield from tqdm(emoji, desc="drawing", unit=" emoji", mininterval=0.5)

        return read_emoji(options.root, cache=cache, progress=progress)
    if options.root is None:
        raise ValueError(f"building {options.dataset} needs --root, the folder of the unpacked download")
    if os.path.realpath(options.out) == os.path.realpath(options.root):
        raise ValueError(f"expected another folder for the shards than that of the images, got {options.out} for both")
    if options.dataset == "imagefolder":
        return read_imagefolder(
            options.root,
            allow_partial=options.allow_partial,
            allow_empty=options.on_bad == "skip",
            num_train_classes=options.split_classes,
        )
    return _READERS[options.dataset](options.root, allow_partial=options.allow_partial)


def _verify(options: argparse.Namespace) -> int:
    problems = verify_shards(options.directory, deep=options.deep)
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    depth = (
        "index, sizes, hashes, checksums, labels and images"
        if options.deep
        else "index and sizes (--deep reads everything)"
    )
    print(
        f"{options.directory}: {len(problems)} problems found"
        if problems
        else f"{options.directory}: sound; checked {depth}"
    )
    return 1 if problems else 0


def _index(options: argparse.Namespace) -> int:
    changed = index_shards(options.directory)
    if changed:
        print(
            f"warning: {len(changed)} shards are not what the earlier index says (sha256): {', '.join(changed[:20])}"
            f"{f' and {len(changed) - 20} more' if len(changed) > 20 else ''}; if nobody changed them they are damaged",
            file=sys.stderr,
        )
    print(describe_shards(options.directory))
    return 0


def _info(options: argparse.Namespace) -> int:
    print(describe_shards(options.directory))
    return 0


def _parser() -> argparse.ArgumentParser:
    def command(parent: Any, name: str, run: Any, *, help: str, example: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = parent.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  python -m dist_proxygml.shard {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=run)
        return parser

    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.shard",
        description="Build, verify, index and describe WebDataset shards.",
        epilog="example:\n  python -m dist_proxygml.shard build cub200 --root CUB_200_2011 --out shards/cub200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{build,verify,index,info}")

    build = command(
        commands,
        "build",
        _build,
        help="write the shards and the index of a raw data set",
        example="build sop --root downloads/Stanford_Online_Products --out shards/sop",
    )
    build.add_argument("dataset", choices=_DATASETS, help="layout of the raw data")
    build.add_argument(
        "--root",
        type=Path,
        help="folder of the unpacked download; demo: of the npm tarballs (default: fetch them)",
    )
    build.add_argument("--out", type=Path, required=True, help="folder to write the shards to")
    build.add_argument("--seed", type=at_least(0), default=0, help="seed of the shuffle (default 0)")
    build.add_argument(
        "--samples-per-shard",
        type=at_least(1),
        default=500,
        metavar="N",
        help="images in a shard (default 500)",
    )
    build.add_argument(
        "--resize",
        type=at_least(1),
        metavar="SHORT",
        help="re-encode larger images with this shorter side in pixels",
    )
    build.add_argument(
        "--split-classes",
        type=int,
        metavar="N",
        help="imagefolder without splits: the first N classes train (default: half); also one with a class `train`",
    )
    build.add_argument(
        "--allow-partial",
        action="store_true",
        help="leave out images that are missing and classes without any; do not check published counts",
    )
    build.add_argument(
        "--on-bad",
        choices=("fail", "skip"),
        default="fail",
        help="images that cannot be used: list them and fail (default), or decode every image first, leave them out "
        "and name them in the index",
    )
    build.add_argument(
        "--workers",
        type=at_least(1),
        metavar="N",
        help="processes that write (default: the usable cores, at most 8; 1 for few images)",
    )
    build.add_argument("--overwrite", action="store_true", help="replace finished shards in --out")

    verify = command(
        commands,
        "verify",
        _verify,
        help="check shards against their index",
        example="verify --deep shards/sop",
    )
    verify.add_argument("directory", type=Path, help="folder of shards")
    verify.add_argument(
        "--deep",
        action="store_true",
        help="read everything: hashes, checksums, labels, and decode every image",
    )

    index = command(
        commands,
        "index",
        _index,
        help="write the index of shards that others built",
        example="index shards/theirs",
    )
    index.add_argument("directory", type=Path, help="folder of shards named like train-000000.tar")

    info = command(
        commands,
        "info",
        _info,
        help="show counts, classes and class sizes",
        example="info shards/demo",
    )
    info.add_argument("directory", type=Path, help="folder of shards")
    return parser


if __name__ == "__main__":
    run_command(main)
