"""The finished part of an embedding pass on disk: an evaluation, or `embed`, that was interrupted resumes from it.

    runs/NAME/embeddings/step-000800.partial/test/000016-000031.block      of an evaluation
    embeddings/.NAME.partial/blocks/000016-000031.block                    of an `embed`
        sha256 of what follows, then safetensors: ids, labels, embeddings; batch numbers, damaged images, made_of

A block holds consecutive batches of one rank. Batches are cut on global boundaries and go through the network whole, so
any number of ranks may share out what is left, and the rows come out the same to the last bit (with as many threads a
rank). A block names all that its rows depend on; one that was made of something else, such as other weights, is removed
and what differs is named. A block whose bytes are not those that were written is reported, removed, and its images are
embedded again.

Chosen: a rank writes by the clock, when a quarter of a second and a fiftieth of the time that the pass has taken are
not on disk yet, or when 256 MiB are not. So a kill costs a fiftieth of the work, an hour is about 300 files, and a pass
of no time leaves no trace. A thread does it, so that the network does not wait for the disk. Declined: blocks of so
many images, which are minutes of work on one machine and milliseconds on another. An evaluation reports a block that
cannot be written and does without: it would only have saved time.

Dimension key: b images of some batches, D embedding.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dist_proxygml.data.damage import Damage
from dist_proxygml.data.order import evaluation_batches
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.gpus import start_thread
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_on_rank_zero, run_together
from dist_proxygml.storage.files import paths_in, publish

_DIGEST_BYTES = hashlib.sha256().digest_size
_SHARE_AT_RISK = 0.02  # of the time that a pass has taken: so much is not on disk before it is worth another block
_MOST_BYTES = 1 << 28  # of rows that wait for the disk, besides those that are being written


class BlockFolder:
    """Folder for the embeddings of a pass until its result is stored; each split has a folder of its own in it.

    Args:
        path: the folder; it need not exist.
        say: called on rank 0 with messages about what was found there.
        seconds: work of a rank between two blocks, at least; 0 writes each batch before the next one is embedded.
    """

    def __init__(self, path: Path, say: Callable[[str], object], seconds: float = 0.25) -> None:
        self.path, self.say, self.seconds = path, say, seconds
        self.last_writers: list[threading.Thread] = []
        """Of the last blocks of passes that are done: the search need not wait for the disk either."""

    def remove(self, context: ParallelContext) -> None:
        """Remove the folder, when the result is stored. Called on all ranks."""
        for writer in self.last_writers:
            writer.join()
        all_gather_object(context, None)
        if context.is_main:
            shutil.rmtree(self.path, ignore_errors=True)


class Block(NamedTuple):
    """The rows of some batches."""

    numbers: list[int]  # of the batches
    ids: Tensor  # int64 [b]
    labels: Tensor  # int64 [b]
    embeddings: Tensor  # float32 [b, D]
    damaged: list[Damage]  # images of these batches that have no row


class _Found(NamedTuple):
    """State of one file."""

    numbers: list[int]  # of its batches
    problem: str | None = None  # in what way its bytes are not those that were written
    other: Sequence[str] = ()  # what it was made of that this pass is not


class EmbeddingBlocks:
    """The blocks of one pass over one split. Built on all ranks; a context manager around the pass.

    Args:
        where: the folder, and where to report.
        split: name of the split.
        num_images, batch_size: of the pass.
        made_of: what a row depends on besides torch, by name, as JSON; asked for when it is needed.
        context: this process among its peers.
        keep_rows: whether `stored` has the rows; without them a pass of any length fits into memory.

    Attributes:
        stored: what this rank has read of an earlier pass; together the ranks have all of it, each row once.
        done: numbers of the batches that some rank has read.
        num_done: images of these.
        batches: ids of each batch that is left to this rank, as `evaluation_batches`.
    """

    def __init__(
        self,
        where: BlockFolder,
        split: str,
        *,
        num_images: int,
        batch_size: int,
        made_of: Callable[[], Mapping[str, Any]],
        context: ParallelContext,
        keep_rows: bool = True,
    ) -> None:
        self._where, self._folder = where, where.path / split
        self._context, self._keep_rows = context, keep_rows
        # As they come back from a file: a tuple is a list.
        self._made_of = functools.cache(lambda: json.loads(json.dumps({"torch": torch.__version__, **made_of()})))
        self._pending: list[Block] = []
        self._problem: OSError | None = None
        self._files: list[str] = []  # that this rank has read or written
        self.stored, self.done = self._open()
        shares = {"batch_size": batch_size, "rank": context.rank, "world_size": context.world_size}
        self.batches = evaluation_batches(num_images, **shares, done=self.done)
        self._numbers = iter([int(ids[0]) // batch_size for ids in self.batches])
        self.num_done = sum(min(batch_size, num_images - number * batch_size) for number in self.done)
        self._writer: threading.Thread | None = None
        self._started_at = self._began_to_write_at = time.monotonic()

    def add(self, batch: Batch, embeddings_bD: Tensor | None) -> None:
        """Take in the next batch of this rank, and write a block when it is time to; None where all of its images are
        damaged. No collective.
        """
        if embeddings_bD is None:
            embeddings_bD = torch.zeros(0, 0)
        block = Block([next(self._numbers)], batch.ids, batch.labels, embeddings_bD, list(batch.damaged))
        self._pending.append(block)
        if self._where.seconds == 0:
            self.write()
            return
        now = time.monotonic()
        least = max(self._where.seconds, _SHARE_AT_RISK * (now - self._started_at))
        is_writing = self._writer is not None and self._writer.is_alive()
        is_due = now - self._began_to_write_at >= least and not is_writing
        if is_due or sum(block.embeddings.nbytes for block in self._pending) >= _MOST_BYTES:
            self._began_to_write_at = now
            self._begin_to_write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        """Begin to write what is left of a pass that was long enough to be worth it; if the pass has failed, wait until
        it is done. No collective.
        """
        if time.monotonic() - self._started_at >= self._where.seconds:
            self._begin_to_write()
        if self._writer is not None:
            self._where.last_writers.append(self._writer)
            if failure is not None:
                self._writer.join()

    def write(self) -> None:
        """Write what is not written yet, and wait until it is done. No collective."""
        self._begin_to_write()
        if self._writer is not None:
            self._writer.join()

    def _begin_to_write(self) -> None:
        if self._writer is not None:
            self._writer.join()
        pending, self._pending = self._pending, []
        if pending and self._problem is None:
            self._writer = start_thread("blocks", self._try_to_write, pending)

    def _try_to_write(self, pending: Sequence[Block]) -> None:
        try:
            self._write(pending)
        except OSError as error:
            self._problem = error

    def raise_problem(self) -> None:
        """Raise what kept a block from being written. No collective."""
        if self._problem is not None:
            raise self._problem

    def tell_problems(self) -> None:
        """Say what could not be written. Called on all ranks."""
        own = None if self._problem is None else f"{self._problem} (on rank {self._context.rank})"
        problem = next(filter(None, all_gather_object(self._context, own)), None)
        if problem is not None:
            self._tell(f"embeddings could not be kept in {self._folder}: {problem}; a stop would cost the whole pass")

    def paths(self) -> list[Path]:
        """The files of all ranks, in the order of their batches, once everything is written. Called on all ranks."""
        names = itertools.chain(*all_gather_object(self._context, self._files))
        return [self._folder / name for name in sorted(names, key=lambda name: int(name.partition("-")[0]))]

    def _write(self, pending: Sequence[Block]) -> None:
        """Write batches; those of other blocks, which an earlier pass left, may lie between them."""
        for _, run in itertools.groupby(enumerate(pending), lambda entry: entry[1].numbers[0] - entry[0]):
            self._write_block([block for _, block in run])

    def _write_block(self, blocks: Sequence[Block]) -> None:
        filled = [block for block in blocks if len(block.ids)]
        parts = {name: [getattr(block, name).cpu() for block in filled] for name in ("ids", "labels", "embeddings")}
        numbers = [number for block in blocks for number in block.numbers]
        about = {
            "made_of": json.dumps(self._made_of()),
            "numbers": json.dumps(numbers),
            "damaged": json.dumps([damage for block in blocks for damage in block.damaged]),
        }
        # No tensors where all images are damaged: nobody knows D.
        content = save({name: torch.cat(tensors) for name, tensors in parts.items() if tensors}, metadata=about)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{numbers[0]:06d}-{numbers[-1]:06d}.block"
        with publish(self._folder / name) as stream:
            stream.write(hashlib.sha256(content).digest())
            stream.write(content)
        self._files.append(name)

    def _open(self) -> tuple[list[Block], frozenset[int]]:
        """Read what an earlier pass left, each file on one rank, and remove what is of no use. Called on all ranks."""
        names = run_on_rank_zero(self._context, self._list)
        if not names:
            return [], frozenset()
        own = names[self._context.rank :: self._context.world_size]
        read = run_together(self._context, lambda: {name: self._read(name) for name in own})
        parts = all_gather_object(self._context, {name: found for name, (found, _) in read.items()})
        found_in = {name: found for part in parts for name, found in part.items()}

        # In an order that all ranks share: two files may hold the same batch if two passes ran at once.
        taken: set[str] = set()
        done: set[int] = set()
        for name in names:
            numbers, problem, other = found_in[name]
            if problem is not None:
                self._tell(f"{self._folder / name} is damaged: {problem}; its images are embedded again")
            elif not other and done.isdisjoint(numbers):
                taken.add(name)
                done.update(numbers)
        others = [found.other for found in found_in.values() if found.other]
        if others:
            differing = " and ".join(sorted({name for other in others for name in other}))
            self._tell(f"{len(others)} blocks in {self._folder} are of other {differing}: removed, to be embedded anew")
        run_on_rank_zero(self._context, self._remove, [name for name in names if name not in taken])
        self._files += [name for name in own if name in taken]
        return [block for name, (_, block) in read.items() if name in taken and block is not None], frozenset(done)

    def _list(self) -> list[str]:
        """The files of blocks, without what a killed process left of one. On rank 0 only."""
        self._remove([path.name for path in paths_in(self._folder, "*.tmp-*")])
        return [path.name for path in paths_in(self._folder, "*.block")]

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # it would be passed over again
                (self._folder / name).unlink()

    def _read(self, name: str) -> tuple[_Found, Block | None]:
        try:
            made_of, block = read_block(self._folder / name)
        except ValueError as error:
            return _Found([], str(error)), None
        ours = self._made_of()
        if made_of != ours:
            differing = [name for name in {**ours, **made_of} if made_of.get(name) != ours.get(name)]
            return _Found([], other=differing if made_of else ["version"]), None
        if not self._keep_rows:
            block = block._replace(ids=torch.zeros(0), labels=torch.zeros(0), embeddings=torch.zeros(0, 0))
        return _Found(block.numbers), block

    def _tell(self, text: str) -> None:
        if self._context.is_main:
            self._where.say(text)


def weights_sha256(model: nn.Module) -> str:
    """sha256 of a network and of each number in it."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} {value.stride()}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_block(path: Path) -> tuple[dict[str, Any], Block]:
    """Read what a block was made of, and the block.

    Raises:
        ValueError: its bytes are not those that were written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None
    digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    found = hashlib.sha256(content).digest()
    if digest != found:
        raise ValueError(f"expected sha256 {digest.hex()[:12]}..., got {found.hex()[:12]}...")
    num_bytes = int.from_bytes(content[:8], "little")
    about, tensors = json.loads(content[8 : 8 + num_bytes])["__metadata__"], load(content)
    nothing = torch.zeros(0, dtype=torch.int64)
    block = Block(
        json.loads(about["numbers"]),
        ids=tensors.get("ids", nothing),
        labels=tensors.get("labels", nothing),
        embeddings=tensors.get("embeddings", torch.zeros(0, 0)),
        damaged=[Damage(*entry) for entry in json.loads(about["damaged"])],
    )
    return json.loads(about.get("made_of", "{}")), block  # an earlier version of this package said a hash
