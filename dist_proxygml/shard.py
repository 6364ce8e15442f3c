"""Command line around shards: build them from raw downloads, verify, index and describe them.

    python -m dist_proxygml.shard build sop --root Stanford_Online_Products --out shards/sop
    python -m dist_proxygml.shard verify --deep shards/sop

A build shuffles each split once by seed, writes the tars and, last, the index; equal inputs give
equal bytes. Images keep their original bytes unless `--resize` is given. Exit codes: 0 done, 1
verify found damage, 2 the command cannot be carried out.
"""

import argparse
import io
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dist_proxygml.data.datasets import (
    SourceDataset,
    SourceImage,
    read_cars196,
    read_cub200,
    read_imagefolder,
    read_inshop,
    read_sop,
)
from dist_proxygml.data.emoji import attribution, read_emoji
from dist_proxygml.data.images import decode_image, image_extension, to_rgb
from dist_proxygml.data.index import (
    INDEX_FILE,
    ShardIndex,
    open_index,
    read_index,
    write_index,
)
from dist_proxygml.data.shards import (
    ListedShard,
    ShardSample,
    list_shard,
    publish,
    sample_key,
    shard_name,
    split_of_shard,
    write_shard,
)

_READERS = {"cub200": read_cub200, "cars196": read_cars196, "sop": read_sop, "inshop": read_inshop}
_DATASETS = (*_READERS, "imagefolder", "demo")


def build_shards(
    dataset: SourceDataset,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = 500,
    resize: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Write all splits of a data set as shuffled shards with an index, which comes last.

    `resize` re-encodes images whose shorter side is longer than that many pixels (JPEG, quality
    95). Raises ValueError when `out` holds a finished build and `overwrite` is not given, or naming
    the image that is neither JPEG nor PNG or cannot be read.
    """
    if samples_per_shard < 1 or (resize is not None and resize < 1):
        raise ValueError(f"expected at least 1 sample per shard and 1 pixel, got {samples_per_shard} and {resize}")
    _clear_folder(out, overwrite=overwrite)
    splits = sorted({image.split for image in dataset.images}, key=lambda split: (split != "train", split))
    classes = {split: _class_table(dataset, split) for split in splits}
    listed: dict[str, list[tuple[str, ListedShard]]] = {}
    with tqdm(
        total=len(dataset.images),
        desc=f"building {dataset.name}",
        unit=" images",
        disable=quiet,
        mininterval=0.5,
    ) as bar:
        for split, table in classes.items():
            label_of = {source_id: label for label, (_, source_id) in enumerate(table)}
            images = _shuffled([image for image in dataset.images if image.split == split], split=split, seed=seed)
            listed[split] = []
            for first in range(0, len(images), samples_per_shard):
                file = shard_name(split, first // samples_per_shard)
                samples = [
                    _shard_sample(
                        image,
                        sample_id=first + position,
                        label=label_of[image.source_id],
                        resize=resize,
                    )
                    for position, image in enumerate(images[first : first + samples_per_shard])
                ]
                write_shard(out / file, samples)
                listed[split].append((file, list_shard(out / file)))
                bar.update(len(samples))
    build = {
        "layout": "shuffled",
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "resize": resize,
    }
    write_index(out, dataset=dataset.name, build=build, shards=listed, classes=classes)


def _clear_folder(out: Path, *, overwrite: bool) -> None:
    if (out / INDEX_FILE).exists() and not overwrite:
        raise ValueError(
            f"{out} already holds finished shards; pass --overwrite to replace them, or name another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / INDEX_FILE).unlink(missing_ok=True)  # first: a folder without it is an unfinished build
    ours = re.compile(r"([^.]+-\d{6}\.tar|index\.samples\..+\.npy|index\.json)(\.tmp-\d+)?")
    for path in out.iterdir():
        if path.is_file() and ours.fullmatch(path.name):
            path.unlink()


def _class_table(dataset: SourceDataset, split: str) -> list[tuple[str, int | str]]:
    """(name, source id) of every label of a split, in the order of the source's ids."""
    space = dataset.label_space(split)
    names = {image.source_id: image.class_name for image in dataset.images if image.split in space}
    return [(names[source_id], source_id) for source_id in sorted(names, key=lambda i: (isinstance(i, str), i))]


def _shuffled(images: list[SourceImage], *, split: str, seed: int) -> list[SourceImage]:
    draws = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(split.encode())])).random_raw(len(images))
    return [images[i] for i in np.argsort(draws, kind="stable")]


def _shard_sample(image: SourceImage, *, sample_id: int, label: int, resize: int | None) -> ShardSample:
    where = image.content if isinstance(image.content, Path) else image.name
    payload = image.content.read_bytes() if isinstance(image.content, Path) else image.content
    try:
        payload, (width, height) = _prepare(payload, resize=resize)
    except Exception as problem:  # Pillow raises its own types, OSError, SyntaxError ...
        raise ValueError(f"{where} cannot be read as an image: {problem}; repair or remove it") from problem
    extension = image_extension(payload)
    if extension is None:
        raise ValueError(f"{where} is neither JPEG nor PNG; convert it, or pass --resize to re-encode")
    info = {
        "source": image.name,
        "source_id": image.source_id,
        "class_name": image.class_name,
        "split": image.split,
        "width": width,
        "height": height,
        **image.info,
    }
    return ShardSample(sample_key(image.split, sample_id), extension, payload, label, info)


def _prepare(payload: bytes, *, resize: int | None) -> tuple[bytes, tuple[int, int]]:
    with Image.open(io.BytesIO(payload)) as opened:
        if resize is None or (min(opened.size) <= resize and image_extension(payload)):
            return payload, opened.size
        factor = min(1.0, resize / min(opened.size))
        size = (max(1, round(opened.width * factor)), max(1, round(opened.height * factor)))
        small = to_rgb(opened).resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=95)
    return stream.getvalue(), size


def index_shards(root: Path, *, quiet: bool = False) -> None:
    """Write the index of a folder of tars, for shards of another origin or whose index was lost.

    The split is what stands before the number in a tar's name. Labels stay as they are; names come
    from the samples' JSON when it has `class_name` and `source_id`, and are the label's number
    otherwise.
    """
    tars = sorted(root.glob("*.tar")) if root.is_dir() else []
    if not tars:
        raise ValueError(f"{root} has no .tar files; name a folder of WebDataset shards")
    try:
        previous, _ = read_index(root)
    except ValueError:
        previous = {}
    shards: dict[str, list[tuple[str, ListedShard]]] = {}
    names: dict[str, dict[int, tuple[str, int | str]]] = {}
    for path in tqdm(tars, desc=f"indexing {root}", unit=" shards", disable=quiet, mininterval=0.5):
        split = split_of_shard(path.name)
        if split is None:
            raise ValueError(f"{path} has no number at the end of its name; expected names like train-000000.tar")
        listed = list_shard(path)
        shards.setdefault(split, []).append((path.name, listed))
        # Query and gallery share one label space.
        table = names.setdefault("query" if split == "gallery" else split, {})
        for sample in listed.samples:
            name = str(sample.info.get("class_name", sample.label))
            table.setdefault(sample.label, (name, sample.info.get("source_id", sample.label)))
    classes = {}
    for split in shards:
        table = names["query" if split == "gallery" else split]
        classes[split] = [table.get(label, (str(label), label)) for label in range(max(table, default=-1) + 1)]
    write_index(
        root,
        dataset=previous.get("dataset", root.resolve().name),
        build=previous.get("build", {"layout": "unknown"}),
        shards=shards,
        classes=classes,
    )


def verify_shards(root: Path, *, deep: bool = False, quiet: bool = False) -> list[str]:
    """What is wrong with a folder of shards, one sentence each; empty when it is sound.

    Plain: index, sample tables, presence and size of the shards. Deep: also the sha256 of every
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
        with tqdm(
            total=sum(index.num_samples for index in indexes),
            desc="verifying",
            unit=" images",
            disable=quiet,
            mininterval=0.5,
        ) as bar:
            for index in indexes:
                for number in range(len(index.shards)):
                    problems += _shard_problems(index, number)
                    bar.update(index.shards[number].num_samples)
    return problems


def _shard_problems(index: ShardIndex, number: int) -> list[str]:
    path = index.shard_paths[number]
    expected = index.samples[index.samples["shard"] == number]
    try:
        listed = list_shard(path)
    except ValueError as problem:
        return [str(problem)]
    problems = []
    if listed.sha256 != index.shards[number].sha256:
        problems.append(
            f"{path}: sha256 is {listed.sha256[:12]}..., the index says {index.shards[number].sha256[:12]}..."
        )
    found = [(sample.label, sample.offset, sample.num_bytes, sample.crc32) for sample in listed.samples]
    rows = [(int(r["label"]), int(r["offset"]), int(r["nbytes"]), int(r["crc32"])) for r in expected]
    if len(found) != len(rows):
        return [*problems, f"{path}: has {len(found)} samples, the index says {len(rows)}"]
    content = path.read_bytes()
    for sample, got, want in zip(listed.samples, found, rows, strict=True):
        if got != want:
            problems.append(
                f"{path}: sample {sample.key} has (label, offset, bytes, crc32) {got}, the index says {want}"
            )
            continue
        try:
            decode_image(content[sample.offset : sample.offset + sample.num_bytes])
        except ValueError as problem:
            problems.append(f"{path}: sample {sample.key}: {problem}")
    return problems


def describe_shards(root: Path) -> str:
    """Counts, classes and class sizes of every split as text."""
    document, digest = read_index(root)
    lines = [f"{root}: {document.get('dataset')}, index {digest[:12]}, built with {document.get('build')}"]
    for split in document["splits"]:
        index = open_index(root, split)
        counts = np.array([entry.count for entry in index.classes])
        size = sum(shard.bytes for shard in index.shards)
        lines.append(
            f"{split}: {index.num_samples} images, {index.num_classes} classes, "
            f"{len(index.shards)} shards, {size / 1e6:.1f} MB; "
            f"images a class: {counts.min()} to {counts.max()}, median {np.median(counts):g}"
        )
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
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def _build(options: argparse.Namespace) -> int:
    dataset = _read_dataset(options)
    if dataset.num_left_out:
        print(
            f"{dataset.num_left_out} listed images are not there and were left out (--allow-partial)",
            file=sys.stderr,
        )
    build_shards(
        dataset,
        options.out,
        seed=options.seed,
        samples_per_shard=options.samples_per_shard,
        resize=options.resize,
        overwrite=options.overwrite,
    )
    if options.dataset == "demo":
        head = "# The makers of these images\n\nEach sample's JSON names its set and licence."
        text = f"{head}\n\n{attribution()}\n"
        with publish(options.out / "ATTRIBUTION.md") as stream:
            stream.write(text.encode("utf-8"))
    print(describe_shards(options.out))
    return 0


def _read_dataset(options: argparse.Namespace) -> SourceDataset:
    # Before hours of work: where would it go?
    if (options.out / INDEX_FILE).exists() and not options.overwrite:
        raise ValueError(
            f"{options.out} already holds finished shards; pass --overwrite to replace them, or name another folder"
        )
    if options.split_classes is not None and options.dataset != "imagefolder":
        raise ValueError(f"--split-classes is for imagefolder; {options.dataset} has a published split")
    if options.dataset == "demo":
        cache = Path.home() / ".cache" / "dist_proxygml" / "emoji"

        def progress(emoji: Iterable[str]) -> Iterable[str]:
            yield from tqdm(emoji, desc="drawing", unit=" emoji", mininterval=0.5)

        return read_emoji(options.root, cache=cache, progress=progress)
    if options.root is None:
        raise ValueError(f"building {options.dataset} needs --root, the folder of the unpacked download")
    if options.dataset == "imagefolder":
        return read_imagefolder(
            options.root,
            allow_partial=options.allow_partial,
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
    index_shards(options.directory)
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
            epilog=f"example: python -m dist_proxygml.shard {example}",
        )
        parser.set_defaults(run=run)
        return parser

    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.shard",
        description="Build, verify, index and describe WebDataset shards.",
        epilog="example: python -m dist_proxygml.shard build cub200 --root CUB_200_2011 --out OUT",
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
    build.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default 0)")
    build.add_argument(
        "--samples-per-shard",
        type=int,
        default=500,
        metavar="N",
        help="images in a shard (default 500)",
    )
    build.add_argument(
        "--resize",
        type=int,
        metavar="SHORT",
        help="re-encode larger images with this shorter side in pixels",
    )
    build.add_argument(
        "--split-classes",
        type=int,
        metavar="N",
        help="imagefolder without splits: the first N classes train (default: half)",
    )
    build.add_argument(
        "--allow-partial",
        action="store_true",
        help="leave out images that are missing; do not check published counts",
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
    sys.exit(main())
