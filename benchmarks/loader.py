"""Images per second of the training loader beside its ceiling and other loaders, and what an index of ten million
samples costs.

    python -m benchmarks.loader                                        all of it, quarter of an hour
    python -m benchmarks.loader --images photographs --workers 0 2 --repeats 9 --json loader.jsonl

Two sets of images: the demo shards with the demo's affine_jitter, and photographs of 500 x 375 pixels and about 80 KB
(noise with the spectrum of natural images, JPEG) with random_resized_crop to 224. The loaders:

    memory        decode and transform the same bytes lying in memory: no file, no checksum, no order. The ceiling;
                  with several workers as many processes do so at the same time
    in_loader     the same, by the workers of a DataLoader: beside it, what a loader itself costs can be told from what
                  shards, checksums and order cost
    ours          build_train_loader
    webdataset    the shards as a plain WebDataset: shuffled, decoded and transformed by our functions, in a DataLoader
    imagefolder   the photographs as files: torchvision's ImageFolder and the same transform of torchvision, in a
                  DataLoader with shuffle

A pass is one epoch of one loader in a process of its own, each process on one thread; the clock starts when every
worker has delivered a batch. Passes of all loaders alternate, since a shared machine's speed varies from minute to
minute: rates are medians over the passes, ratios medians of the ratios to the ceiling's pass in the same round.

    per worker    images per second over the number of decoding processes
    CPU ms        processor time of all processes for an image, which other programs disturb less than the clock
    MiB           memory of the process and its workers half-way through an epoch, above what the process had before
                  (PSS: what several share counts once)

The index of ten million samples lies beside 20,000 links to one shard: opened in a new process, order drawn over
everything, until the first batch is there, and the same for the last batch of the epoch. A worker's private memory is
set beside that of a worker with a small index. Prints tables, the bars that the project has set itself, then one JSON
line per row.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import webdataset  # noqa: TID251  # the baseline
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.head import MIB, Row, Settings, machine, number, rounded
from dist_proxygml.config import RandomResizedCropConfig, TransformConfig, load_config
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.index import ShardIndex, open_index, write_index
from dist_proxygml.data.pipeline import EpochOrder, Loading, RankShare, build_train_loader
from dist_proxygml.data.shards import ListedShard, ShardSample, sample_key, shard_name, write_shard
from dist_proxygml.data.transforms import build_transform

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 64
LOADERS = ("memory", "in_loader", "ours", "webdataset", "imagefolder")
NUM_CLASSES = 20  # of the photographs
SAMPLES_PER_SHARD = 500


class Images(NamedTuple):
    """A set of images and what is done to them."""

    name: str
    shards: Path
    transform: TransformConfig
    folder: Path | None  # the same images as files, by class


class Pass(NamedTuple):
    """One epoch of one loader."""

    images_per_second: float
    cpu_ms: float  # of all processes, per image
    resident_bytes: int | None


def main() -> None:
    """Measure the loaders and the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="*", choices=("photographs", "demo"), default=("photographs", "demo"))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes of the loaders")
    parser.add_argument("--repeats", type=int, default=7, help="counted passes of each loader")
    parser.add_argument("--num-photographs", type=int, default=2000, help="photographs that are made")
    parser.add_argument("--num-samples", type=int, default=10_000_000, help="samples of the large index; 0: leave it")
    parser.add_argument("--json", type=Path, help="file for the JSON lines as well")
    arguments = parser.parse_args()
    needed = BATCH_SIZE * (max(arguments.workers) + 2)
    if arguments.num_photographs < needed:
        parser.error(f"--num-photographs must be at least {needed} for {max(arguments.workers)} workers")
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"others keep {load:.1f} of {os.cpu_count()} cores busy: expect wrong rates, less wrong ratios")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.images:
            images = demo() if name == "demo" else photographs(Path(directory), arguments.num_photographs)
            print_heading(images)
            for num_workers in arguments.workers:
                for row in measure_loaders(images, num_workers, arguments.repeats):
                    rows.append(row)
                    print_row(row)
        if arguments.num_samples:
            rows += measure_index(Path(directory), arguments.num_samples, arguments.repeats)
    print()
    for line in bars(rows):
        print(line)
    print()
    settings = Settings(arguments.repeats, 1, "cpu")
    lines = [json.dumps(rounded({**row, **machine(settings)})) for row in rows]
    print("\n".join(lines))
    if arguments.json is not None:
        arguments.json.write_text("\n".join(lines) + "\n")


# ---- images ----------------------------------------------------------------------------------------------------------


def demo() -> Images:
    """The embedded shards with the demo's transform."""
    config = load_config(ROOT / "configs" / "demo_cpu.json")
    return Images("demo", ROOT / "shards" / "demo", config.data.train_transform, None)


def photographs(directory: Path, count: int) -> Images:
    """So many photographs as shards and as files, the same on every machine with the same libraries."""
    shards, folder = directory / "shards", directory / "files"
    shards.mkdir()
    for label in range(NUM_CLASSES):
        (folder / f"{label:03d}").mkdir(parents=True)
    files = []
    for number_of_shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        samples = []
        for i in range(first, min(first + SAMPLES_PER_SHARD, count)):
            sample = ShardSample(sample_key("train", i), "jpg", photograph(i), i % NUM_CLASSES, {})
            (folder / f"{sample.label:03d}" / f"{i:08d}.jpg").write_bytes(sample.image)
            samples.append(sample)
        name = shard_name("train", number_of_shard)
        files.append((name, write_shard(shards / name, samples)))
    classes = [(str(label), label) for label in range(NUM_CLASSES)]
    write_index(shards, dataset="noise", build={}, shards={"train": files}, classes={"train": classes})
    return Images("photographs", shards, RandomResizedCropConfig(name="random_resized_crop"), folder)


def photograph(seed: int, *, height: int = 375, width: int = 500) -> bytes:
    """A JPEG of noise whose amplitude falls with the frequency f as f^-1.15, as in natural images; little colour."""
    generator = np.random.Generator(np.random.Philox(seed))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = np.maximum(frequency, 1 / width) ** -1.15
    phase_3hf = np.exp(2j * np.pi * generator.random((3, *amplitude.shape)))
    noise_3hw = np.fft.irfft2(amplitude * phase_3hf, s=(height, width))
    luma, blue, red = noise_3hw / noise_3hw.std(axis=(1, 2), keepdims=True) * np.array([48, 16, 16])[:, None, None]
    pixels_hw3 = 120 + np.stack([luma + red, luma - 0.3 * red - 0.3 * blue, luma + blue], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(pixels_hw3.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=87)
    return stream.getvalue()


# ---- loaders ---------------------------------------------------------------------------------------------------------


def measure_loaders(images: Images, num_workers: int, repeats: int) -> Iterator[Row]:
    """A row for each loader, after alternating passes."""
    without = {"in_loader": num_workers == 0, "imagefolder": images.folder is None}
    loaders = [name for name in LOADERS if not without.get(name, False)]
    memory = {name: run_pass(name, images, num_workers, watch_memory=True).resident_bytes for name in loaders}
    rounds = [{name: run_pass(name, images, num_workers) for name in loaders} for _ in range(repeats)]
    for name in loaders:
        rates = [found[name].images_per_second for found in rounds]
        yield {
            "images": images.name,
            "loader": name,
            "workers": num_workers,
            "images_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "per_worker": statistics.median(rates) / max(1, num_workers),
            "over_memory": ratio(rounds, name, "memory"),
            "ours_over_it": ratio(rounds, "ours", name),
            "cpu_ms": statistics.median(found[name].cpu_ms for found in rounds),
            "cpu_over_memory": statistics.median(found[name].cpu_ms / found["memory"].cpu_ms for found in rounds),
            "resident_mib": (memory[name] or 0) / MIB,
            "passes": repeats,
        }


def ratio(rounds: list[dict[str, Pass]], loader: str, other: str) -> float:
    """How many images one loads while the other loads one."""
    return statistics.median(found[loader].images_per_second / found[other].images_per_second for found in rounds)


def run_pass(loader: str, images: Images, num_workers: int, *, watch_memory: bool = False) -> Pass:
    """One epoch in a new process; of the ceiling one for each worker, at the same time."""
    processes = max(1, num_workers) if loader == "memory" else 1
    with ProcessPoolExecutor(processes, mp_context=new_process()) as pool:
        futures = [pool.submit(one_pass, loader, images, num_workers, watch_memory) for _ in range(processes)]
        passes = [future.result() for future in futures]
    return Pass(
        sum(p.images_per_second for p in passes),
        statistics.mean(p.cpu_ms for p in passes),
        sum(p.resident_bytes or 0 for p in passes),
    )


def one_pass(loader: str, images: Images, num_workers: int, watch_memory: bool) -> Pass:
    """One epoch in this process; the clock starts when every worker has delivered a batch."""
    start_as_a_program_does()
    batches = BATCHES[loader](images, num_workers)
    num_batches = -(-open_index(images.shards, "train").num_samples // BATCH_SIZE)
    bytes_at_start = resident_bytes()
    resident = None
    clocks: list[tuple[float, float]] = []  # when a batch had come: seconds, processor seconds
    num_images = 0
    workers: list[psutil.Process] = []
    for position, batch in enumerate(batches):
        if position <= num_workers:
            workers = psutil.Process().children(recursive=True)
        else:
            num_images += len(batch)
        seconds = time.process_time() + sum(sum(worker.cpu_times()[:2]) for worker in workers)
        clocks.append((time.perf_counter(), seconds))
        if watch_memory and position == num_batches // 2:
            resident = resident_bytes() - bytes_at_start
    # Not until the loader has ended: stopping its workers is no part of an image.
    (start, start_cpu), (end, end_cpu) = clocks[num_workers], clocks[-1]
    return Pass(num_images / (end - start), 1e3 * (end_cpu - start_cpu) / num_images, resident)


def new_process() -> ForkServerContext:
    """A process that has imported what takes long, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.io", "webdataset", "dist_proxygml.data.pipeline", "benchmarks.head"])
    return context


def start_as_a_program_does() -> None:
    """One thread; and worker processes are forked, which the fork server's children would not do."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)


def resident_bytes() -> int:
    """Memory of this process and its children; what several share counts once."""
    own = psutil.Process()
    return sum(process.memory_full_info().pss for process in (own, *own.children(recursive=True)))


class Payloads(Dataset[Tensor]):
    """The images of a split as bytes in memory; item i is its i-th batch, decoded and transformed."""

    def __init__(self, images: Images) -> None:
        index = open_index(images.shards, "train")
        contents = [path.read_bytes() for path in index.shard_paths]
        rows = (row.item() for row in index.samples)
        self.payloads = [contents[shard][offset : offset + size] for shard, _, offset, size, _ in rows]
        self.transform = build_transform(images.transform)
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return -(-len(self.payloads) // BATCH_SIZE)

    def __getitem__(self, position: int) -> Tensor:
        payloads = self.payloads[position * BATCH_SIZE : (position + 1) * BATCH_SIZE]
        return self.transform([decode_image(payload) for payload in payloads], [self.generator] * len(payloads))


def from_memory(images: Images, num_workers: int) -> Iterable[Tensor]:
    """An epoch without a loader."""
    payloads = Payloads(images)
    return (payloads[position] for position in range(len(payloads)))


def from_memory_in_loader(images: Images, num_workers: int) -> Iterable[Tensor]:
    """An epoch by a DataLoader's workers."""
    return DataLoader(Payloads(images), batch_size=None, num_workers=num_workers)


def from_ours(images: Images, num_workers: int) -> Iterable[Tensor]:
    """The training loader."""
    index = open_index(images.shards, "train")
    transform = build_transform(images.transform)
    loader = build_train_loader(index, transform, EpochOrder(BATCH_SIZE), loading=Loading(num_workers))
    return (batch.images for batch in loader)


def from_webdataset(images: Images, num_workers: int) -> Iterable[Tensor]:
    """The same tars and functions in WebDataset's pipeline."""
    urls = [str(path) for path in open_index(images.shards, "train").shard_paths]
    transform, generator = build_transform(images.transform), np.random.default_rng(0)

    def decoded(sample: dict[str, Any]) -> tuple[Tensor, int]:
        return decode_image(sample["jpg"] if "jpg" in sample else sample["png"]), int(sample["cls"])

    def collated(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        pixels, labels = zip(*samples, strict=True)
        return transform(pixels, [generator] * len(pixels)), torch.tensor(labels)

    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000).map(decoded)
    loader = DataLoader(pipeline.batched(BATCH_SIZE, collation_fn=collated), batch_size=None, num_workers=num_workers)
    return (pixels for pixels, _ in loader)


def from_imagefolder(images: Images, num_workers: int) -> Iterable[Tensor]:
    """The same images as files, by torchvision. Tensors from the start: faster than cropping in Pillow, and the pixels
    are those of the other loaders.
    """
    config = images.transform
    assert isinstance(config, RandomResizedCropConfig), "the only transform that torchvision has too"
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(config.size, scale=config.scale, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    dataset = ImageFolder(str(images.folder), transform)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=num_workers)
    return (pixels for pixels, _ in loader)


BATCHES: dict[str, Callable[[Images, int], Iterable[Tensor]]] = {
    "memory": from_memory,
    "in_loader": from_memory_in_loader,
    "ours": from_ours,
    "webdataset": from_webdataset,
    "imagefolder": from_imagefolder,
}


# ---- the large index -------------------------------------------------------------------------------------------------


class FirstBatch(NamedTuple):
    """From a new process to its first batch."""

    open_s: float
    batch_s: float  # order, loader and batch
    worker_bytes: int | None  # private memory of a worker


def measure_index(directory: Path, num_samples: int, repeats: int) -> list[Row]:
    """A row for each place in the epoch and number of workers."""
    large, small = directory / "large", directory / "small"
    write_large_index(large, num_samples)
    write_large_index(small, SAMPLES_PER_SHARD)
    columns = f"{'first batch':<24}{'workers':>8}{'open s':>10}{'batch s':>10}{'in all':>10}"
    print(f"\nindex of {num_samples:,} samples\n{columns}")
    rows = []
    last = num_samples - BATCH_SIZE
    for num_workers in (0, 1):
        starts = {"of the epoch": 0, "resumed at its end": last}
        rounds = [
            {place: in_new_process(large, start, num_workers) for place, start in starts.items()}
            for _ in range(repeats)
        ]
        for place in starts:
            times = [found[place] for found in rounds]
            row: Row = {
                "first_batch": place,
                "num_samples": num_samples,
                "workers": num_workers,
                "open_s": statistics.median(t.open_s for t in times),
                "batch_s": statistics.median(t.batch_s for t in times),
                "all_s": statistics.median(t.open_s + t.batch_s for t in times),
                "slowest_s": max(t.open_s + t.batch_s for t in times),
            }
            if place != "of the epoch":
                row["over_start"] = statistics.median(
                    found[place].batch_s / found["of the epoch"].batch_s for found in rounds
                )
            if num_workers:
                fewer = in_new_process(small, 0, num_workers).worker_bytes or 0
                row["worker_mib"] = (max(t.worker_bytes or 0 for t in times) - fewer) / MIB
            rows.append(row)
            print(
                f"{place:<24}{num_workers:>8}{row['open_s']:>10.2f}{row['batch_s']:>10.2f}{row['all_s']:>10.2f}"
                + (f"   a worker's private memory: {row['worker_mib']:.1f} MiB more" if num_workers else ""),
                flush=True,
            )
    return rows


def write_large_index(root: Path, num_samples: int) -> None:
    """An index over links to one shard of small images, which has all the samples of every link."""
    root.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "JPEG")
    samples = [ShardSample(sample_key("train", i), "jpg", stream.getvalue(), i, {}) for i in range(SAMPLES_PER_SHARD)]
    one = write_shard(root / shard_name("train", 0), samples)
    num_shards = -(-num_samples // SAMPLES_PER_SHARD)
    for i in range(1, num_shards):
        try:
            os.link(root / shard_name("train", 0), root / shard_name("train", i))
        except OSError:  # some file systems allow few links to a file
            shutil.copyfile(root / shard_name("train", 0), root / shard_name("train", i))
    files: list[tuple[str, ListedShard]] = [(shard_name("train", i), one) for i in range(num_shards)]
    classes = [(f"class {label}", label) for label in range(SAMPLES_PER_SHARD)]
    write_index(root, dataset="links", build={}, shards={"train": files}, classes={"train": classes})


def in_new_process(root: Path, start: int, num_workers: int) -> FirstBatch:
    """`first_batch` in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=new_process()) as pool:
        return pool.submit(first_batch, root, start, num_workers).result()


def first_batch(root: Path, start: int, num_workers: int) -> FirstBatch:
    """Open an index and load one batch of its epoch after the first `start` images."""
    start_as_a_program_does()
    clock = [time.perf_counter()]
    index: ShardIndex = open_index(root, "train")
    clock.append(time.perf_counter())
    transform = build_transform(RandomResizedCropConfig(name="random_resized_crop", size=32))
    loader = build_train_loader(
        index, transform, EpochOrder(BATCH_SIZE), RankShare(start=min(start, index.num_samples)), Loading(num_workers)
    )
    batches = iter(loader)
    next(batches)
    clock.append(time.perf_counter())
    workers = psutil.Process().children(recursive=True)
    worker_bytes = max((worker.memory_full_info().uss for worker in workers), default=None)
    return FirstBatch(clock[1] - clock[0], clock[2] - clock[1], worker_bytes)


# ---- what is printed -------------------------------------------------------------------------------------------------


def print_heading(images: Images) -> None:
    """The images and the names of the columns."""
    index = open_index(images.shards, "train")
    sizes = index.samples["nbytes"]
    print(
        f"\n{images.name}: {index.num_samples:,} images of {sizes.mean() / 1000:.1f} KB, {images.transform.name} to "
        f"{images.transform.size}, batches of {BATCH_SIZE}\n"
        f"{'loader':<14}{'workers':>8}{'images/s':>10}{'per worker':>12}{'/memory':>9}{'ours/it':>9}{'CPU ms':>9}"
        f"{'/memory':>9}{'MiB':>8}"
    )


def print_row(row: Row) -> None:
    """A line of the table."""
    print(
        f"{row['loader']:<14}{row['workers']:>8}{number(row['images_per_second'], 10, 0)}"
        f"{number(row['per_worker'], 12, 0)}{number(row['over_memory'], 9, 3)}{number(row['ours_over_it'], 9, 3)}"
        f"{number(row['cpu_ms'], 9, 3)}{number(row['cpu_over_memory'], 9, 3)}{number(row['resident_mib'], 8, 0)}",
        flush=True,
    )


def bars(rows: list[Row]) -> Iterator[str]:
    """One line for each bar whose rows were measured."""

    def line(text: str, measured: float, limit: float, *, at_least: bool) -> str:
        met = measured >= limit if at_least else measured <= limit
        return f"{'met   ' if met else 'missed'} {text}: {measured:.3f}, bar {'>=' if at_least else '<='} {limit:g}"

    for row in rows:
        if "loader" in row:
            text = f"{row['images']}, {row['workers']} workers: images/s of ours over {row['loader']}"
            if row["loader"] != "ours":
                limit = 0.95 if row["loader"] in ("memory", "in_loader") else 1.0
                yield line(text, row["ours_over_it"], limit, at_least=True)
        else:
            text = f"first batch {row['first_batch']}, {row['num_samples']:,} samples, {row['workers']} workers"
            yield line(f"{text}: s", row["all_s"], 2, at_least=False)
            if "over_start" in row:
                yield line(f"{text}: over the start's", row["over_start"], 1.1, at_least=False)
            if "worker_mib" in row:
                yield line(f"{text}: MiB of a worker for the index", row["worker_mib"], 50, at_least=False)


if __name__ == "__main__":
    main()
