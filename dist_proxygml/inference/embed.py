"""Embed a folder of images or a split of shards into a folder of embeddings, on any number of ranks.

    .OUT.partial/blocks/*.block     what each rank has embedded (evaluation/blocks.py)
    .OUT.partial/folder/            the folder of embeddings, which rank 0 writes from the blocks, in order

The images of a forward pass do not depend on the number of ranks, nor on what an earlier call did: the folder is the
same to the last byte, on CPUs with as many threads a rank. A call that was cut short resumes with the images that are
missing, on any number of ranks.

Chosen: the ranks work for half a minute before they meet, so that all of them learn soon that one has failed, and none
waits for a slower one. Declined: rows written straight to their place in one file, which network file systems do not
promise to several writers; the blocks take as much room again until the folder is published.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dist_proxygml.cli import printable
from dist_proxygml.data.damage import Damage
from dist_proxygml.data.pipeline import BatchLoader
from dist_proxygml.data.sources import ImageRecord, ImageSource, OnBad
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import (
    LostPeerError,
    ParallelContext,
    all_gather_object,
    peer_problem,
    run_on_rank_zero,
    run_on_rank_zero_for_long,
    run_together,
    single_process,
)
from dist_proxygml.evaluation.blocks import BlockFolder, EmbeddingBlocks, read_block
from dist_proxygml.faults import fault_point
from dist_proxygml.inference.embedder import COMPARED, Embedder, loading_processes
from dist_proxygml.inference.embeddings import KIND, write_embeddings
from dist_proxygml.storage.files import is_folder, remove
from dist_proxygml.storage.folder import check_is_free, partial_path
from dist_proxygml.storage.lock import FolderLock

_SECONDS_OF_A_ROUND = 30.0


def embed_to_folder(
    embedder: Embedder,
    source: ImageSource,
    out: Path,
    *,
    context: ParallelContext | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    on_bad: OnBad = "fail",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Embed all images of a source into a folder; return its manifest. Called on all ranks; None: this process alone.

    Raises:
        ValueError: `out` is in use, an image cannot be used (with "fail"), an embedding is zero or not finite, the
            ranks do not see the same files, or one has gone.
    """
    context = context or single_process()
    batch_size = batch_size or embedder.batch_size
    dim, num_images = embedder.embedding_dim, source.num_images
    data = run_together(context, source.about)
    if any(other != data for other in all_gather_object(context, data)):
        raise AgreedError(
            f"expected the same images on all ranks, found other ones on some below {data['location']}; put them where "
            "all machines see them, and do not change them meanwhile"
        )
    with _taken(context, Path(os.path.realpath(out)), overwrite=overwrite) as (partial, final):  # a link stays one
        folder = BlockFolder(partial, _say)
        blocks = EmbeddingBlocks(
            folder,
            "blocks",
            num_images=num_images,
            batch_size=batch_size,
            made_of=lambda: {
                **{name.removesuffix("_sha256"): embedder.about[name] for name in COMPARED},
                "images": data,
                "batch size": batch_size,
                "device": embedder.device.type,
            },
            context=context,
            keep_rows=False,
        )
        if blocks.num_done and context.is_main:
            _say(f"resuming: {blocks.num_done:,} of {num_images:,} images are embedded already")
        left_out = all_gather_object(context, [damage for block in blocks.stored for damage in block.damaged])
        if on_bad == "fail" and (found := [damage for part in left_out for damage in part]):
            raise AgreedError(": ".join(found[0]))
        num_ranks = all_gather_object(context, socket.gethostname()).count(socket.gethostname())
        num_workers = loading_processes(num_images, num_workers, num_ranks=num_ranks)
        loader = source.loader(embedder.transform, blocks.batches, num_workers=num_workers, on_bad=on_bad)
        _embed_shares(embedder, source, loader, blocks, context)
        paths = blocks.paths()
        manifest = run_on_rank_zero_for_long(
            context,
            lambda: write_embeddings(
                partial / "folder",
                final,
                _parts(paths, source, dim),
                embedding_dim=dim,
                about={"model": embedder.about, "data": data, "batch_size": batch_size},
            ),
        )
        folder.remove(context)
    return manifest


def _embed_shares(
    embedder: Embedder, source: ImageSource, loader: BatchLoader, blocks: EmbeddingBlocks, context: ParallelContext
) -> None:
    """Embed the batches of each rank's loader into blocks, until all are done. Called on all ranks."""
    total, hidden, batches = source.num_images, not context.is_main, iter(loader)

    def work() -> tuple[bool, int]:
        """Embed for a while; return whether this rank has finished, and the number of images. No collective."""
        num_images, until = 0, time.monotonic() + _SECONDS_OF_A_ROUND
        for batch in batches:
            fault_point("embed.batch")
            names = [source.record(number).id for number in batch.ids.tolist()]
            rows_bD = embedder.embed_prepared(batch.images, names=names)
            blocks.add(batch, torch.from_numpy(rows_bD) if names else None)
            blocks.raise_problem()
            num_images += len(names) + len(batch.damaged)
            bar.update(len(names) + len(batch.damaged))
            if time.monotonic() >= until:
                return False, num_images
        return True, num_images

    is_done = False
    with tqdm(total=total, initial=blocks.num_done, desc="embedding", unit=" images", disable=hidden) as bar:
        try:
            while not is_done:
                rounds = all_gather_object(context, run_together(context, work))
                bar.update(sum(num_images for _, num_images in rounds[1:]))
                is_done = all(done for done, _ in rounds)
        finally:
            blocks.write()
    run_together(context, blocks.raise_problem)


@contextmanager
def _taken(context: ParallelContext, out: Path, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Keep others from `out`; gives the folder of what is unfinished, and `out`. Called on all ranks.

    Raises:
        ValueError: it is in use, not all ranks see it, or later one has gone.
    """
    partial, locks = partial_path(out), list[FolderLock]()

    def take() -> None:
        check_is_free(out, KIND, overwrite=overwrite)
        locks.append(FolderLock(out, elsewhere="name another folder"))
        if (partial / "done.jsonl").exists():
            _say(f"embedding anew: an older version of this package left {partial}, which this one does not resume")
            remove(partial)
        partial.mkdir(exist_ok=True)

    try:
        run_on_rank_zero(context, take)
        run_together(context, _check_is_shared, partial)
        yield partial, out
        for lock in locks:
            lock.release(is_done=True)
    except RuntimeError as error:
        problem = peer_problem(error)
        if problem is None:
            raise
        raise LostPeerError(
            f"another rank has gone or does not answer, says rank {context.rank}: {problem}; look at that rank's log; "
            "the same command resumes with what is finished"
        ) from None
    finally:
        for lock in locks:
            lock.release()


def _check_is_shared(partial: Path) -> None:
    if not is_folder(partial):
        raise ValueError(
            f"expected the folder that rank 0 has made at {partial}, found none on {socket.gethostname()}; name a "
            "folder with --out that all machines see"
        )


def _parts(
    paths: Sequence[Path], source: ImageSource, embedding_dim: int
) -> Iterator[tuple[np.ndarray, list[ImageRecord], list[Damage]]]:
    """Read the rows of each block, with names and the images that were skipped."""
    num_images = 0
    for path in tqdm(paths, desc="writing", unit="block", delay=2.0):
        try:
            _, block = read_block(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; the same command embeds its images again") from None
        num_images += len(block.ids) + len(block.damaged)
        rows_bD = block.embeddings.numpy().reshape(-1, embedding_dim)  # [0, 0] where all images are damaged
        yield rows_bD, [source.record(number) for number in block.ids.tolist()], block.damaged
    assert num_images == source.num_images


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
