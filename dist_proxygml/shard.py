"""Command line around shards: build them from raw downloads, verify, index and describe them.

    python -m dist_proxygml.shard build sop --root Stanford_Online_Products --out shards/sop
    python -m dist_proxygml.shard verify --deep shards/sop

A build (data/builder.py) shuffles each split once by seed, writes the tars and, last, the index; equal inputs give
equal bytes, also after an interruption. Images keep their original bytes unless `--resize` is given. Exit codes: 0
done, 1 verify found damage, 2 the command cannot be carried out, 130 stopped by Ctrl-C.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_proxygml.cli import add_options, at_least, build_parser, command, printable, run_command
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
from dist_proxygml.data.index import (
    INDEX_FILE,
)
from dist_proxygml.data.verify import describe_shards, index_shards, verify_shards
from dist_proxygml.storage.files import in_words

_READERS = {"cub200": read_cub200, "cars196": read_cars196, "sop": read_sop, "inshop": read_inshop}
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def _build(options: argparse.Namespace) -> int:
    dataset = _read_dataset(options)
    for note in dataset.notes:
        print(printable(note), file=sys.stderr)
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
            "the same command resumes"
        ) from problem
    if result.already_there:
        print(f"nothing to do: {options.out} holds this build; --overwrite builds it again, should files have changed")
    if result.num_kept:
        print(f"{result.num_kept} of {result.num_shards} shards were kept from a build that was interrupted")
    if result.skipped:
        print(printable(_told(result.skipped)), file=sys.stderr)
    if result.lost_classes:
        shown = ", ".join(map(repr, result.lost_classes[:20]))
        print(f"{len(result.lost_classes)} classes have no image left and are left out: {shown}", file=sys.stderr)
    if result.num_turned:
        print(
            f"viewers turn or mirror {result.num_turned} of the images (EXIF orientation), training and search see "
            "them as they are stored; to change that turn the files, as `mogrify -auto-orient` does, and build again",
            file=sys.stderr,
        )
    print(printable(describe_shards(options.out)))
    return 0


def _told(skipped: Sequence[UnusableImage]) -> str:
    first = "\n".join(f"  {image.where}: {image.reason}" for image in skipped[:20])
    return f"{len(skipped)} images cannot be used and were left out; {INDEX_FILE} names them, the first are\n{first}"


def _read_dataset(options: argparse.Namespace) -> SourceDataset:
    # Before hours of work: is there another build where it would go?
    settings = build_settings(seed=options.seed, samples_per_shard=options.samples_per_shard, resize=options.resize)
    if not options.overwrite:
        finished_build(options.out, dataset=options.dataset, settings=settings)
    for name in ("split_classes", "allow_seen_classes"):
        if getattr(options, name) and options.dataset != "imagefolder":
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for imagefolder; {options.dataset} has a published split")
    if os.path.realpath(options.out) == os.path.realpath(options.root):
        raise ValueError(f"expected another folder for the shards than that of the images, got {options.out} for both")
    if options.dataset == "imagefolder":
        return read_imagefolder(
            options.root,
            allow_partial=options.allow_partial,
            allow_empty=options.on_bad == "skip",
            allow_seen_classes=options.allow_seen_classes,
            num_train_classes=options.split_classes,
        )
    return _READERS[options.dataset](options.root, allow_partial=options.allow_partial)


def _verify(options: argparse.Namespace) -> int:
    problems = verify_shards(options.directory, deep=options.deep)
    for problem in problems:
        print(printable(f"damaged: {problem}"), file=sys.stderr)
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
            f"warning: {len(changed)} shards are not what the earlier index says (sha256): "
            f"{printable(', '.join(changed[:20]))}"
            f"{f' and {len(changed) - 20} more' if len(changed) > 20 else ''}; if nobody changed them they are damaged",
            file=sys.stderr,
        )
    print(printable(describe_shards(options.directory)))
    return 0


def _info(options: argparse.Namespace) -> int:
    print(printable(describe_shards(options.directory)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "shard",
        "Build, verify, index and describe WebDataset shards.",
        "  python -m dist_proxygml.shard build cub200 --root CUB_200_2011 --out shards/cub200",
    )
    commands = parser.add_subparsers(required=True, metavar="{build,verify,index,info}")

    build = build_parser(
        "build",
        "write the shards and the index of a raw data set",
        "  python -m dist_proxygml.shard build sop --root downloads/Stanford_Online_Products --out shards/sop",
        within=commands,
    )
    build.set_defaults(run=_build)
    build.add_argument("dataset", choices=(*_READERS, "imagefolder"), help="layout of the raw data")
    build.add_argument("--root", type=Path, required=True, help="folder of the unpacked download")
    add_options(build, "--out", help="folder to write the shards to")
    build.add_argument("--seed", type=at_least(0), default=0, help="seed of the shuffle (default 0)")
    build.add_argument(
        "--samples-per-shard", type=at_least(1), default=500, metavar="N", help="images in a shard (default 500)"
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
        "--allow-seen-classes",
        action="store_true",
        help="imagefolder: splits may share classes, such as new photos of known products "
        "(train with evaluation.allow_seen_classes=true)",
    )
    build.add_argument(
        "--allow-partial",
        action="store_true",
        help="leave out images that are missing and classes without any; do not check published counts",
    )
    add_options(
        build,
        "--on-bad",
        help="images that cannot be used: list them and fail (default), or decode every image first, leave them out "
        "and name them in the index",
    )
    build.add_argument(
        "--workers",
        type=at_least(1),
        metavar="N",
        help="processes that write (default: the usable cores, at most 8; 1 for few images)",
    )
    add_options(build, "--overwrite", help="replace finished shards in --out")

    for name, run, help, example in (
        ("verify", _verify, "check shards against their index", "--deep shards/sop"),
        ("index", _index, "write the index of shards that others built", "shards/theirs"),
        ("info", _info, "show counts, classes and class sizes", "shards/demo"),
    ):
        one = build_parser(name, help, f"  python -m dist_proxygml.shard {name} {example}", within=commands)
        one.add_argument("directory", type=Path, help="folder of shards, named like train-000000.tar")
        one.set_defaults(run=run)
        if name == "verify":
            deep = "read everything: hashes, checksums, labels, and decode every image"
            one.add_argument("--deep", action="store_true", help=deep)
    return parser


@command(_parser, stopped="stopped; the same command resumes with what is finished")
def main(options: argparse.Namespace) -> int:
    """Run a command line; returns the exit code."""
    return int(options.run(options))


if __name__ == "__main__":
    run_command(main)
