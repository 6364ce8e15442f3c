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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dist_proxygml.cli import printable
from dist_proxygml.data.damage import Damage
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
from dist_proxygml.inference.embedder import Embedder, loading_processes
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
    out = Path(os.path.realpath(out))  # a link stays one
    data = run_together(context, source.about)
    if any(other != data for other in all_gather_object(context, data)):
        raise AgreedError(
            f"expected the same images on all ranks, found other ones on some below {data['location']}; put them where "
            "all machines see them, and do not change them meanwhile"
        )
    locks: list[FolderLock] = []
    run_on_rank_zero(context, _take, out, overwrite, locks)
    try:
        manifest = _embed(embedder, source, out, data, context, batch_size, num_workers, on_bad)
        for lock in locks:
            lock.release(is_done=True)
        return manifest
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


def _take(out: Path, overwrite: bool, locks: list[FolderLock]) -> None:
    """Keep others out, and make the folder of what is not finished. On rank 0 only."""
    check_is_free(out, KIND, overwrite=overwrite)
    locks.append(FolderLock(out, elsewhere="name another folder"))
    partial = partial_path(out)
    if (partial / "done.jsonl").exists():
        _tell(f"embedding anew: an older version of this package left {partial}, which this one does not resume")
        remove(partial)
    partial.mkdir(exist_ok=True)


def _embed(
    embedder: Embedder,
    source: ImageSource,
    out: Path,
    data: dict[str, Any],
    context: ParallelContext,
    batch_size: int,
    num_workers: int | None,
    on_bad: OnBad,
) -> dict[str, Any]:
    partial = partial_path(out)
    run_together(context, _check_is_shared, partial)
    folder = BlockFolder(partial, _tell)
    blocks = EmbeddingBlocks(
        folder,
        "blocks",
        num_images=source.num_images,
        batch_size=batch_size,
        made_of=lambda: {
            "weights": embedder.about["weights_sha256"],
            "backbone": embedder.about["backbone"],
            "preprocessing": embedder.about["preprocessing"],
            "images": data,
            "batch size": batch_size,
            "device": embedder.device.type,
        },
        context=context,
        keep_rows=False,
    )
    if blocks.num_done and context.is_main:
        _tell(f"resuming: {blocks.num_done:,} of {source.num_images:,} images are embedded already")
    left_out = [damage for block in blocks.stored for damage in block.damaged]
    if on_bad == "fail" and (found := [damage for part in all_gather_object(context, left_out) for damage in part]):
        raise AgreedError(": ".join(found[0]))

    # 1. Each rank its share, until all are done.
    num_ranks = all_gather_object(context, socket.gethostname()).count(socket.gethostname())
    batches = iter(
        source.loader(
            embedder.transform,
            batch_size=batch_size,
            rank=context.rank,
            world_size=context.world_size,
            done=blocks.done,
            num_workers=loading_processes(source.num_images, num_workers, num_ranks=num_ranks),
            on_bad=on_bad,
        )
    )
    total = source.num_images
    hidden = not context.is_main
    try:
        with tqdm(total=total, initial=blocks.num_done, desc="embedding", unit=" images", disable=hidden) as bar:

            def work() -> tuple[bool, int]:
                """Whether this rank's share is done; images of this round. No collective."""
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
            while not is_done:
                rounds = all_gather_object(context, run_together(context, work))
                bar.update(sum(num_images for _, num_images in rounds[1:]))
                is_done = all(done for done, _ in rounds)
    finally:
        blocks.write()
    run_together(context, blocks.raise_problem)

    # 2. One folder of all blocks.
    paths = blocks.paths()

    dim, about = embedder.embedding_dim, {"model": embedder.about, "data": data, "batch_size": batch_size}

    def write() -> dict[str, Any]:
        return write_embeddings(partial / "folder", out, _parts(paths, source, dim), embedding_dim=dim, about=about)

    manifest = run_on_rank_zero_for_long(context, write)
    folder.remove(context)
    return manifest


def _check_is_shared(partial: Path) -> None:
    if not is_folder(partial):
        raise ValueError(
            f"expected the folder that rank 0 has made at {partial}, found none on {socket.gethostname()}; name a "
            "folder with --out that all machines see"
        )


def _parts(
    paths: Sequence[Path], source: ImageSource, embedding_dim: int
) -> Iterator[tuple[np.ndarray, list[ImageRecord], list[Damage]]]:
    """The rows of each block, with names and what was left out."""
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


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
