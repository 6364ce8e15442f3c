"""Command line around shards: build them from raw downloads, verify, index and describe them.

    python -m dist_proxygml.shard build sop --data Stanford_Online_Products --out shards/sop
    python -m dist_proxygml.shard verify --deep shards/sop

A build (data/builder.py) shuffles each split once by seed, writes the tars and, last, the index; equal inputs give
equal bytes, also after an interruption. Images keep their original bytes unless `--resize` is given. Exit codes: 0
done, 1 verify found damage, 2 the command cannot be carried out, 130 stopped by Ctrl-C.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.cli import add_options, at_least, build_parser, command, printable, run_command
from dist_proxygml.data.builder import (
    BuildResult,
    UnusableImage,
    build_settings,
    build_shards,
    default_workers,
    finished_build,
)
from dist_proxygml.data.class_names import with_class_names
from dist_proxygml.data.class_split import ClassSplit
from dist_proxygml.data.datasets import SourceDataset
from dist_proxygml.data.glyphs import read_glyphs
from dist_proxygml.data.hf import read_hf
from dist_proxygml.data.imagefolder import read_imagefolder
from dist_proxygml.data.index import INDEX_FILE
from dist_proxygml.data.published import read_cars196, read_cub200, read_inshop, read_sop
from dist_proxygml.data.recordio import read_recordio
from dist_proxygml.data.reid import read_market1501, read_msmt17
from dist_proxygml.data.table import read_table
from dist_proxygml.data.verification_sets import read_pairs
from dist_proxygml.data.verify import describe_shards, index_shards, verify_shards
from dist_proxygml.storage.files import describe_error

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def _build(options: argparse.Namespace) -> int:
    dataset = _read_dataset(options)
    for note in dataset.notes:
        print(printable(note), file=sys.stderr)
    workers = default_workers(len(dataset.images)) if options.num_workers is None else options.num_workers
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
            f"no room to write on in {options.out}: {describe_error(problem, options.out)}; what is finished is kept, "
            "and the same command resumes"
        ) from problem
    if result.already_there:
        print(f"nothing to do: {options.out} holds this build; --overwrite builds it again, should files have changed")
    if result.num_kept:
        print(f"{result.num_kept} of {result.num_shards} shards were kept from a build that was interrupted")
    if result.skipped:
        print(printable(_describe_skipped(result.skipped)), file=sys.stderr)
    if result.lost_classes:
        shown = ", ".join(map(repr, result.lost_classes[:20]))
        print(f"{len(result.lost_classes)} classes have no image left and are skipped: {shown}", file=sys.stderr)
    for line in _describe_images(result):
        print(printable(line), file=sys.stderr)
    print(printable(describe_shards(options.out)))
    return 0


def _describe_skipped(skipped: Sequence[UnusableImage]) -> str:
    first = "\n".join(f"  {image.where}: {image.reason}" for image in skipped[:20])
    return f"{len(skipped)} images cannot be used and were skipped; {INDEX_FILE} names them, the first are\n{first}"


def _describe_images(result: BuildResult) -> Iterator[str]:
    if result.reencoded:
        counts = ", ".join(f"{number} {name}" for name, number in result.reencoded.items())
        yield f"{counts} files are stored as PNG, with the same pixels; JPEG, PNG and WebP keep their bytes"
    if result.num_turned and result.is_upright:
        yield (
            f"{result.num_turned} of the images are stored turned or mirrored (EXIF orientation); training, evaluation "
            "and search see them as viewers show them"
        )
    elif result.num_turned:
        yield (
            f"viewers turn or mirror {result.num_turned} of the images (EXIF orientation), training and search see "
            "these shards as they are stored, as published results and earlier versions do"
        )


def _read_dataset(options: argparse.Namespace) -> SourceDataset:
    # Before hours of work: is there another build where it would go?
    settings = build_settings(seed=options.seed, samples_per_shard=options.samples_per_shard, resize=options.resize)
    finished = None
    if not options.overwrite:
        finished = finished_build(options.out, dataset=options.dataset, settings=settings)
    if options.data is not None and os.path.realpath(options.out) == os.path.realpath(options.data):
        raise ValueError(f"expected another folder for the shards than that of the images, got {options.out} for both")
    layout = _LAYOUTS[options.dataset]
    if "--split-by" in layout.options and options.split_by is None:
        # Builds that do not say how are of earlier versions, which divided classes by name.
        options.split_by = "random" if finished is None else finished.get("split_classes", {"by": "name"})["by"]
    dataset = layout.read(options)
    return with_class_names(dataset, options.class_names) if getattr(options, "class_names", None) else dataset


class _Layout(NamedTuple):
    """A layout of raw data that can be built: a subcommand of `build`."""

    help: str
    example: str  # but for --out
    read: Callable[[argparse.Namespace], SourceDataset]
    options: Mapping[str, Mapping[str, Any] | None] = {}  # of this layout alone, or changes to those of all; None: not


def _published(name: str, root: str, read: Callable[..., SourceDataset]) -> _Layout:
    return _Layout(
        f"{name}, as published",
        f"--data {root}",
        lambda options: read(Path(options.data), allow_partial=options.allow_partial),
        {"--allow-partial": dict(help="leave out images that are missing; do not check the published counts")},
    )


def _class_split(options: argparse.Namespace) -> ClassSplit:
    return ClassSplit(options.split_classes, options.split_by, options.seed)


def _classes(text: str) -> int | float:
    try:
        number = int(text) if text.isdigit() else float(text)
        if (isinstance(number, int) and number >= 1) or 0 < number < 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number of classes, or a share between 0 and 1, got {text!r}")


def _column(text: str) -> tuple[str, str]:
    part, equals, column = text.partition("=")
    if not (part and equals and column):
        raise argparse.ArgumentTypeError(f"expected PART=COLUMN such as image=path, got {text!r}")
    return part, column


# Of layouts whose source may have no split, or no names of its classes.
_CLASS_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--split-classes": dict(
        type=_classes,
        metavar="N|SHARE",
        help="how many classes train, or which share of them, where no split is given (default: half); in a folder "
        "with a class `train`, and in a table with a split, this is how to say that classes are to be divided",
    ),
    "--split-by": dict(
        choices=("random", "name"),
        help="which ones: drawn by --seed (default), or the first in sorted order; the index records it",
    ),
    "--allow-seen-classes": dict(
        action="store_true",
        help="splits may share classes, such as new photos of known products "
        "(train with evaluation.allow_seen_classes=true)",
    ),
    "--class-names": dict(
        type=Path, metavar="TABLE", help="display names: a folder's name or a label, and its name, in two columns"
    ),
}


_COLUMNS: Mapping[str, Any] = dict(nargs="+", action="extend", type=_column, default=[], metavar="PART=COLUMN")


_LAYOUTS = {
    "cub200": _published("CUB-200-2011", "CUB_200_2011", read_cub200),
    "cars196": _published("Cars196", "cars196", read_cars196),
    "sop": _published("Stanford Online Products", "Stanford_Online_Products", read_sop),
    "inshop": _published("In-Shop Clothes Retrieval", "In-shop", read_inshop),
    "market1501": _published("Market-1501", "Market-1501-v15.09.15", read_market1501),
    "msmt17": _published("MSMT17", "MSMT17_V1", read_msmt17),
    "recordio": _Layout(
        "record files of face recognition: train.rec and train.idx, with verification sets beside them",
        "--data faces_emore",
        lambda options: read_recordio(
            Path(options.data),
            allow_partial=options.allow_partial,
            split=_class_split(options) if options.split_classes is not None else None,
            pairs=options.pairs,
        ),
        {
            "--split-classes": {
                **_CLASS_OPTIONS["--split-classes"],
                "help": "how many classes train, or which share of them; the others test (default: all train)",
            },
            "--split-by": _CLASS_OPTIONS["--split-by"],
            "--pairs": dict(
                type=Path,
                nargs="+",
                action="extend",
                default=[],
                metavar="FILE",
                help="verification sets (lfw.bin ...), there or beside train.rec; each becomes a split",
            ),
            "--allow-partial": dict(help="leave out records without an image, accept missing ones"),
        },
    ),
    "hf": _Layout(
        "Hugging Face data sets: a folder of save_to_disk, or a name on the hub",
        "--data user/name",
        lambda options: read_hf(
            options.data,
            columns=dict(options.columns),
            allow_partial=options.allow_partial,
            allow_seen_classes=options.allow_seen_classes,
            split=_class_split(options),
        ),
        {
            "--data": dict(metavar="DIR|NAME", help="the folder, or NAME or NAME:CONFIGURATION of the hub"),
            "--columns": {**_COLUMNS, "help": "columns of the parts image and label, if called otherwise"},
            **_CLASS_OPTIONS,
            "--allow-partial": dict(help="leave out rows without an image or a class"),
        },
    ),
    "pairs": _Layout(
        "verification sets of face recognition alone: *.bin",
        "--data faces_emore",
        lambda options: read_pairs(Path(options.data)),
    ),
    "imagefolder": _Layout(
        "folders of images: SPLIT/CLASS/image or CLASS/image",
        "--data photos",
        lambda options: read_imagefolder(
            Path(options.data),
            allow_partial=options.allow_partial,
            allow_empty=options.on_bad == "skip",
            allow_seen_classes=options.allow_seen_classes,
            split=_class_split(options),
            follow_links=options.follow_links,
        ),
        {
            "--data": dict(help="folder of class folders, or of splits"),
            **_CLASS_OPTIONS,
            "--follow-links": dict(
                type=Path,
                nargs="+",
                action="extend",
                default=[],
                metavar="DIR",
                help="follow links that lead below these folders (/ for all), also links to folders",
            ),
        },
    ),
    "table": _Layout(
        "images that a table lists: CSV, TSV, Parquet, JSON lines or COCO's JSON",
        "--table photos.csv --columns image=path label=product_id",
        lambda options: read_table(
            options.table,
            None if options.data is None else Path(options.data),
            columns=dict(options.columns),
            template=options.image_path,
            several=options.several,
            allow_partial=options.allow_partial,
            allow_seen_classes=options.allow_seen_classes,
            split=_class_split(options),
        ),
        {
            "--table": dict(
                nargs="+",
                action="extend",
                default=[],
                metavar="[SPLIT=]FILE",
                help="tables, each for a split if they have no such column and SPLIT or their names say so, as "
                "train.csv; default: metadata.csv, .jsonl or .parquet in --data and its folders",
            ),
            "--data": dict(
                required=False, help="folder that paths are relative to and lie in (default: the table's, and anywhere)"
            ),
            "--columns": {
                **_COLUMNS,
                "help": "columns of the parts image, label, split and class_name, if called otherwise; numbers from 1 "
                "in a table without a header",
            },
            "--image-path": dict(
                metavar="TEMPLATE", help="path of an image, with a row's values in braces: train/{id[0]}/{id}.jpg"
            ),
            "--several": dict(action="store_true", help="the image column names several images, separated by blanks"),
            **_CLASS_OPTIONS,
            "--allow-partial": dict(help="leave out rows whose image is not there"),
        },
    ),
    "glyphs": _Layout(
        "characters as classes, drawn by each typeface of a folder of fonts (docs/glyphs.md)",
        "--fonts fonts",
        lambda options: read_glyphs(
            options.fonts,
            size=options.size,
            min_images=options.min_images,
            on_bad=options.on_bad,
            workers=options.num_workers,
        ),
        {
            "--fonts": dict(
                type=Path,
                nargs="+",
                action="extend",
                required=True,
                metavar="DIR",
                help="folders of fonts, with all folders in them, or files: ttf, otf, ttc, woff2; their order is that "
                "of the typefaces, of which the first that draws a character gives the gallery's picture",
            ),
            "--size": dict(type=at_least(8), default=32, metavar="PIXELS", help="side of the pictures (default 32)"),
            "--min-images": dict(
                type=at_least(2), default=4, metavar="N", help="typefaces that must draw a character (default 4)"
            ),
            "--data": None,
            "--allow-partial": None,
            "--resize": None,
        },
    ),
}


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


# Of every layout, beside those that other commands have too.
_BUILD_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--data": dict(required=True, help="folder of the unpacked download"),
    "--allow-partial": dict(
        action="store_true", help="leave out images that are missing and classes without any; do not check counts"
    ),
    "--seed": dict(type=at_least(0), default=0, help="seed of the shuffle (default 0)"),
    "--samples-per-shard": dict(type=at_least(1), default=500, metavar="N", help="images in a shard (default 500)"),
    "--resize": dict(
        type=at_least(1), metavar="SHORT", help="re-encode larger images with this shorter side in pixels"
    ),
    "--num-workers": dict(
        type=at_least(1),
        metavar="N",
        help="processes that write (default: the usable cores, at most 8; 1 for few images)",
    ),
}


# What options were called, and still may be.
_FORMER_NAMES = {"--data": ("--root",), "--num-workers": ("--workers",)}


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "shard",
        "Build, verify, index and describe WebDataset shards.",
        "  python -m dist_proxygml.shard build cub200 --data CUB_200_2011 --out shards/cub200",
    )
    commands = parser.add_subparsers(required=True, metavar="{build,verify,index,info}")

    build = build_parser(
        "build",
        "write the shards and the index of a raw data set",
        "  python -m dist_proxygml.shard build sop --data downloads/Stanford_Online_Products --out shards/sop\n"
        "  python -m dist_proxygml.shard build imagefolder --help",
        within=commands,
    )
    layouts = build.add_subparsers(dest="dataset", required=True, metavar="LAYOUT", title="layouts of raw data")
    for name, layout in _LAYOUTS.items():
        example = f"  python -m dist_proxygml.shard build {name} {layout.example} --out shards/{name}"
        one = build_parser(name, layout.help, example, within=layouts)
        one.set_defaults(run=_build)
        one.set_defaults(data=None, resize=None)  # where a layout has no such option
        for option in dict.fromkeys(("--data", *layout.options, *_BUILD_OPTIONS)):
            if (changes := layout.options.get(option, {})) is None:
                continue
            names = [option, *_FORMER_NAMES.get(option, ())]
            action = one.add_argument(*names, **{**_BUILD_OPTIONS.get(option, {}), **changes})
            action.option_strings = [option]  # help and errors say no other
        add_options(one, "--out", help="folder to write the shards to")
        add_options(
            one,
            "--on-bad",
            help="images that cannot be used: list them and fail (default), or decode every image first, leave them "
            "out and name them in the index",
        )
        add_options(one, "--overwrite", help="replace finished shards in --out")

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
