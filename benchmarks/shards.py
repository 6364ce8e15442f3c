"""Speed of building shards of original bytes, beside `tar` of the same files.

    python -m benchmarks.shards                                    3,000 JPEGs of 500 x 375, 1 and 2 worker processes
    python -m benchmarks.shards --num-images 200 --repeats 1 --json shards.jsonl

Writes images with the statistics of photographs into a temporary folder (so it is the page cache that is read), then
times in turn, round after round:

    tar        tar cf of the folder, and fsync of the file
    build N    reading the folder and `build_shards` with N processes, from a running interpreter
    command N  the same as a command line: the interpreter's start and its imports too

A build does more than tar: it looks into every image, and takes a sha256 of every shard and a crc32 of every image. The
files that a build flushes to disk are all of its shards, tables and the index. Medians over the rounds; `of tar` is the
median of the rounds' ratios of rates, since a shared machine's speed varies. Prints a table, the bar that the project
has set itself, then one JSON line per row.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dist_proxygml.data.builder import build_shards
from dist_proxygml.data.imagefolder import read_imagefolder

BAR = 0.8  # of tar's rate, with as many processes as cores
IMAGES_PER_CLASS = 30
SIZE = (500, 375)

Row = dict[str, Any]


def main() -> None:
    """Measure tar and every number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=3000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count; one more goes before them")
    parser.add_argument("--folder", type=Path, help="where to write images and shards (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the JSON lines as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "out"
        num_bytes = write_photographs(raw, arguments.num_images)
        ways: dict[str, Callable[[], None]] = {"tar": partial(run_tar, raw, out)}
        for workers in arguments.workers:
            ways[f"build {workers}"] = partial(run_build, raw, out, workers)
            ways[f"command {workers}"] = partial(run_command, raw, out, workers)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats + 1):
            for name, way in ways.items():
                times[name].append(timed(way, out))
    rows = [row_of(name, times[name][1:], times["tar"][1:], arguments.num_images, num_bytes) for name in ways]
    print_table(rows, num_bytes)
    lines = [json.dumps(row) for row in rows]
    print("\n".join(lines))
    if arguments.json is not None:
        arguments.json.write_text("\n".join(lines) + "\n")


def write_photographs(root: Path, num_images: int) -> int:
    """Folders of JPEGs, 60 to 100 KB each: smooth colours under fine noise. Returns their bytes."""
    generator = np.random.default_rng(0)
    num_bytes = 0
    for number in tqdm(range(num_images), desc="writing images", mininterval=0.5):
        path = root / f"class {number // IMAGES_PER_CLASS:04d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        noise = generator.integers(-12, 13, (*smooth.shape[:2], 1))
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        num_bytes += path.stat().st_size
    return num_bytes


def timed(way: Callable[[], None], out: Path) -> float:
    """Seconds of one way to store the images, from a clean folder and with nothing left to flush from before."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def run_tar(raw: Path, out: Path) -> None:
    """What a user without this project would do."""
    out.mkdir()
    subprocess.run(["tar", "cf", out / "all.tar", "-C", raw, "."], check=True)
    descriptor = os.open(out / "all.tar", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def run_build(raw: Path, out: Path, workers: int) -> None:
    """The build within this interpreter."""
    build_shards(read_imagefolder(raw), out, workers=workers, quiet=True)


def run_command(raw: Path, out: Path, workers: int) -> None:
    """The build as a user starts it."""
    command = [sys.executable, "-m", "dist_proxygml.shard", "build", "imagefolder"]
    options = ["--root", raw, "--out", out, "--workers", str(workers)]
    subprocess.run([*command, *options], check=True, capture_output=True)


def row_of(name: str, times: list[float], tar_times: list[float], num_images: int, num_bytes: int) -> Row:
    """Medians of one way."""
    seconds = statistics.median(times)
    return {
        "way": name,
        "images": num_images,
        "bytes": num_bytes,
        "seconds": round(seconds, 4),
        "fastest": round(min(times), 4),
        "slowest": round(max(times), 4),
        "images_per_second": round(num_images / seconds),
        "of_tar": round(statistics.median(tar / own for tar, own in zip(tar_times, times, strict=True)), 3),
        "rounds": len(times),
        "cores": len(os.sched_getaffinity(0)),
    }


def print_table(rows: list[Row], num_bytes: int) -> None:
    """The table, and whether the bar is met."""
    print(f"\n{rows[0]['images']:,} images, {num_bytes / 1e6:.1f} MB, {rows[0]['cores']} cores\n")
    print(f"{'':<12}{'seconds':>10}{'fastest':>10}{'slowest':>10}{'images/s':>10}{'of tar':>8}")
    for row in rows:
        print(
            f"{row['way']:<12}{row['seconds']:>10.3f}{row['fastest']:>10.3f}{row['slowest']:>10.3f}"
            f"{row['images_per_second']:>10,}{row['of_tar']:>8.2f}"
        )
    best = max((row for row in rows if row["way"].startswith("build")), key=lambda row: row["of_tar"])
    verdict = "met" if best["of_tar"] >= BAR else "MISSED"
    print(f"\na build at {BAR:.0%} of tar's rate or more: {verdict} ({best['way']}: {best['of_tar']:.0%})\n")


if __name__ == "__main__":
    main()
