"""The finished part of an embedding pass on disk: an interrupted pass resumes where it stopped.

    runs/NAME/embeddings/step-000800.partial/test/000016-000031.block
        sha256 of what follows, then safetensors: ids, labels, embeddings; batch numbers, damaged images, key

A block holds some of the batches of one rank. Batches are cut on global boundaries and go through the network whole, so
any number of ranks may share out what is left, and the table comes out the same to the last bit. The key hashes
everything that a row depends on: a block with another one is of other weights or images, and is removed. A block whose
bytes are not those that were written is reported, removed, and its images are embedded again.

Chosen: a rank writes by the clock, when a quarter of a second and a fiftieth of the time that the pass has taken are
not on disk yet. So a kill costs a fiftieth of the work, an hour is about 300 files, and a pass of no time leaves no
trace. A thread does it, so that the network does not wait for the disk. Declined: blocks of so many images, which are
minutes of work on one machine and milliseconds on another. A block that cannot be written is reported and skipped: it
would only have saved time.

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
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_on_rank_zero, run_together
from dist_proxygml.storage.files import paths_in, publish

_DIGEST_BYTES = hashlib.sha256().digest_size
_SHARE_AT_RISK = 0.02  # of the time that a pass has taken: so much is not on disk before it is worth another block


class BlockFolder:
    """Folder for the embeddings of an evaluation until its result is stored; each split has a folder of its own in it.

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
        """Remove all blocks, when the result is stored. Called on all ranks."""
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
    is_other: bool = False  # it belongs to a pass with another key


class EmbeddingBlocks:
    """The blocks of one pass over one split. Built on all ranks; a context manager around the pass.

    Args:
        where: the folder, and where to report.
        split: name of the split.
        key: of this pass, as `pass_key`; asked for when it is needed.
        context: this process among its peers.

    Attributes:
        stored: what this rank has read of an earlier pass; together the ranks have all of it, each row once.
        done: numbers of the batches that some rank has read.
    """

    def __init__(self, where: BlockFolder, split: str, *, key: Callable[[], str], context: ParallelContext) -> None:
        self._where, self._folder = where, where.path / split
        self._context = context
        self._key = functools.cache(key)
        self._pending: list[Block] = []
        self._problem: str | None = None
        self.stored, self.done = self._open()
        self._writer: threading.Thread | None = None
        self._started_at = self._began_to_write_at = time.monotonic()

    def add(self, number: int, batch: Batch, embeddings_bD: Tensor | None) -> None:
        """Take in a batch of this rank, and write a block when it is time to; None where all of its images are damaged.
        No collective.
        """
        if embeddings_bD is None:
            embeddings_bD = torch.zeros(0, 0)
        self._pending.append(Block([number], batch.ids, batch.labels, embeddings_bD, list(batch.damaged)))
        if self._where.seconds == 0:
            self.write()
            return
        now = time.monotonic()
        least = max(self._where.seconds, _SHARE_AT_RISK * (now - self._started_at))
        is_writing = self._writer is not None and self._writer.is_alive()
        if now - self._began_to_write_at >= least and not is_writing:
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
            self._writer = threading.Thread(target=self._try_to_write, args=(pending,), name="blocks", daemon=True)
            self._writer.start()

    def _try_to_write(self, pending: Sequence[Block]) -> None:
        try:
            self._write(pending)
        except OSError as error:
            self._problem = f"{error} (on rank {self._context.rank})"

    def tell_problems(self) -> None:
        """Say what could not be written. Called on all ranks."""
        problem = next(filter(None, all_gather_object(self._context, self._problem)), None)
        if problem is not None:
            self._tell(f"embeddings could not be kept in {self._folder}: {problem}; a stop would cost the whole pass")

    def _write(self, pending: Sequence[Block]) -> None:
        filled = [block for block in pending if len(block.ids)]
        parts = {name: [getattr(block, name).cpu() for block in filled] for name in ("ids", "labels", "embeddings")}
        numbers = [number for block in pending for number in block.numbers]
        about = {
            "key": self._key(),
            "numbers": json.dumps(numbers),
            "damaged": json.dumps([damage for block in pending for damage in block.damaged]),
        }
        # No tensors where all images are damaged: nobody knows D.
        content = save({name: torch.cat(tensors) for name, tensors in parts.items() if tensors}, metadata=about)
        self._folder.mkdir(parents=True, exist_ok=True)
        with publish(self._folder / f"{numbers[0]:06d}-{numbers[-1]:06d}.block") as stream:
            stream.write(hashlib.sha256(content).digest())
            stream.write(content)

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
            numbers, problem, is_other = found_in[name]
            if problem is not None:
                self._tell(f"{self._folder / name} is damaged: {problem}; its images are embedded again")
            elif not is_other and done.isdisjoint(numbers):
                taken.add(name)
                done.update(numbers)
        num_others = sum(found.is_other for found in found_in.values())
        if num_others:
            self._tell(f"{num_others} blocks in {self._folder} are of other weights, images or settings: removed")
        run_on_rank_zero(self._context, self._remove, [name for name in names if name not in taken])
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
            content = (self._folder / name).read_bytes()
        except OSError as error:
            return _Found([], f"it cannot be read: {error.strerror}"), None
        digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        found = hashlib.sha256(content).digest()
        if digest != found:
            return _Found([], f"expected sha256 {digest.hex()[:12]}..., got {found.hex()[:12]}..."), None
        about, tensors = _unpacked(content)
        if about["key"] != self._key():
            return _Found([], is_other=True), None
        numbers = json.loads(about["numbers"])
        nothing = torch.zeros(0, dtype=torch.int64)
        block = Block(
            numbers,
            ids=tensors.get("ids", nothing),
            labels=tensors.get("labels", nothing),
            embeddings=tensors.get("embeddings", torch.zeros(0, 0)),
            damaged=[Damage(*entry) for entry in json.loads(about["damaged"])],
        )
        return _Found(numbers), block

    def _tell(self, text: str) -> None:
        if self._context.is_main:
            self._where.say(text)


def pass_key(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """sha256 of what the rows of a pass depend on: the network, each number in it, and `settings`, which is JSON.

    Not the number of threads, on which the last bit of a row may depend: it changes with the number of ranks.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(f"{torch.__version__}\n{model!r}".encode())
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} {value.stride()}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unpacked(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors document."""
    num_bytes = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + num_bytes])["__metadata__"], load(content)
