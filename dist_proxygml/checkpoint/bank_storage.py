"""How the bank's tensors lie in a checkpoint: files of torch.distributed.checkpoint, one for each tensor of each rank.

Torch's own writer and reader, with two changes. The table of contents is the same in every save of the same numbers.
And a part is read from its mapped file straight to where it goes, the rows that are asked for and no others: torch's
reader takes memory for the whole part first, and computes a checksum beside the manifest's sha256.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class BankWriter(dcp.FileSystemWriter):
    """Writes a file for each tensor, which threads can write, hash and verify side by side.

    Nothing is flushed: who hashes the files does that meanwhile.
    """

    def __init__(self, directory: Path) -> None:
        threads = torch.get_num_threads()
        super().__init__(directory, single_file_per_rank=False, sync_files=False, thread_count=threads)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table in the order of the names, not of the threads."""
        super().finish(metadata, [sorted(own, key=lambda written: str(written.index)) for own in results])

    def storage_meta(self) -> None:
        """No number of the save, and no path."""


class BankReader(dcp.FileSystemReader):
    """Reads what `BankWriter` wrote, with as many threads as torch uses."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Set the tensors that the planner names to what the plan asks for.

        Raises:
            OSError, RuntimeError, UnpicklingError: a file cannot be read.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(lambda item: self._read(item, planner), plan.items))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        stored = self.storage_data[item.storage_index]
        assert item.type == LoadItemType.TENSOR
        assert stored.offset == 0, "a file for each tensor"
        part: Tensor = torch.load(
            self._directory / stored.relative_path, mmap=True, map_location="cpu", weights_only=True
        )
        for dimension, (first, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dimension, first, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(part)
        planner.commit_tensor(item, target)
