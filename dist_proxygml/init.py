"""Write a first configuration: `python -m dist_proxygml.init shards/mine --out configs/mine.json`.

It fits the shards and this machine, says why each setting was chosen, and was checked as the start of a run checks it
(training/presets.py). What you know better: --set, or edit the file.
"""

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dist_proxygml.cli import add_options, build_parser, command, printable, run_command

if TYPE_CHECKING:
    from dist_proxygml.config import Config

EXAMPLES = """\
  python -m dist_proxygml.init shards/mine --out configs/mine.json
  python -m dist_proxygml.init shards/mine --out configs/mine.json --preset photos --set training.epochs=5
  python -m dist_proxygml.init s3://bucket/shards --out configs/big.json --device cuda
"""
PRESETS = ("small-images", "photos", "many-classes")


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("init", "Write a configuration that fits shards and this machine, and say why.", EXAMPLES)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "data",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="SHARDS",
        help="folder of shards, or where they lie: https://, s3://, gs://",
    )
    data.add_argument("--data", help=argparse.SUPPRESS)
    add_options(parser, "--out", metavar="FILE", help="configuration to write, named like configs/mine.json")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="images of at most 96 pixels; larger ones; 10,000 classes and more (default: by the shards)",
    )
    add_options(parser, "--device", help="device to train on; cuda also where there is none (default: auto)")
    add_options(parser, "--set", "--overwrite")
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> None:
    """Choose, say why, write, and say what to do next."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", given.out.stem).strip("-._")
    if given.out.suffix != ".json" or not name:
        raise ValueError(f"expected a file to write, named like configs/mine.json, with --out, got {given.out}")
    if given.out.exists() and not given.overwrite:
        raise ValueError(f"expected nothing at {given.out}, found a file; name another, or add --overwrite")
    from dist_proxygml.data.remote import is_remote
    from dist_proxygml.storage.files import paths_in, publish_text

    place = Path(given.data)
    if place.exists() and not is_remote(given.data) and not (place.is_dir() and paths_in(place, "*.tar")):
        how = f"imagefolder --data {place}" if place.is_dir() else f"table --table {place}"
        raise ValueError(
            f"expected shards at {place}, found {'a folder without any' if place.is_dir() else 'a file'}; build them "
            f"with `python -m dist_proxygml.shard build {how} --out shards/{place.stem}`, and name that folder"
        )
    import torch

    from dist_proxygml.reporting.render import format_seconds
    from dist_proxygml.training.presets import estimate_seconds, find_machine, suggest

    machine = find_machine(given.device)
    made = suggest(given.data, name, machine, preset=given.preset, overrides=given.set)
    lines = [*made.facts, "", *(f"{settings}  # {reason}" for settings, reason in made.choices)]
    lines += [f"{' '.join(given.set)}  # as asked for"] if given.set else []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    publish_text(given.out, json.dumps(made.raw, indent=2) + "\n")
    lines += ["", f"written to {given.out}; every other setting has its default (docs/settings.md)"]
    if machine.device == "cpu" or torch.cuda.is_available():
        seconds = estimate_seconds(made.config, num_ranks=made.num_ranks, device=machine.device)
        lines.append(f"training takes about {format_seconds(seconds)} here, without reading images and searching")
    if made.config.run_directory.exists():
        lines.append(f"warning: {made.config.run_directory} is there already, and would be resumed: --set name=OTHER")
    print(printable("\n".join([*lines, "", *_next_commands(given, made.config, made.num_ranks)])))


def _next_commands(given: argparse.Namespace, config: "Config", num_ranks: int) -> list[str]:
    run, name, python = config.run_directory, config.name, "python -m dist_proxygml"
    several = f"deepspeed --num_gpus {num_ranks} --module dist_proxygml"
    launch = python if num_ranks == 1 else several
    out, data, run_name = (shlex.quote(str(word)) for word in (given.out, given.data, run))
    split = config.evaluation.gallery_split or config.data.test_split or config.data.train_split
    validation = "" if config.data.test_split else " --validation"
    can_evaluate = config.data.test_split or config.data.validation_classes
    return [
        "next:",
        f"  {python}.train --config {out} --dry-run {num_ranks}",
        f"  {launch}.train --config {out}",
        *([f"  {launch}.evaluate --run {run_name}{validation}"] if can_evaluate else []),
        f"  {python}.embed --run {run_name} --data {data} --split {split} --out embeddings/{name}",
        f"  {python}.index --embeddings embeddings/{name} --out indexes/{name}",
        f"  {python}.search --index indexes/{name} QUERY.jpg --html found.html",
        f"  {python}.serve --index indexes/{name}",
    ]


if __name__ == "__main__":
    run_command(main)
