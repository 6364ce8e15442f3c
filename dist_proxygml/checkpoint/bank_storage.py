"""Storage of the bank's tensors: files of torch.distributed.checkpoint, one per tensor and rank.

Torch's own writer and reader, with three changes. The table of contents is the same in every save of the same numbers.
It is a pickle, from which only the classes of a table of contents are loaded, so an untrusted bank cannot run code. And
only the requested rows of a part are copied from its mapped file straight to their destination: torch's reader first
allocates memory for the whole part, and computes a checksum besides the manifest's sha256.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dist_proxygml.distributed.gpus import thread_pool

_CLASSES = {
    "torch": {"Size", "float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},  # a layout by its name
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _Contents(pickle.Unpickler):
    """Unpickles a table of contents and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few classes of a table of contents."""
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of contents does")
        return super().find_class(module, name)


class BankWriter(dcp.FileSystemWriter):
    """Writes a file per tensor, so that threads can write, hash and verify them in parallel.

    Nothing is flushed here; that happens when the files are hashed.
    """

    def __init__(self, directory: Path) -> None:
        # Torch's own threads would use GPU 0; on GPUs a single one, the caller's, overlaps copies with writes.
        threads = 1 if torch.cuda.is_initialized() else torch.get_num_threads()
        super().__init__(directory, single_file_per_rank=False, sync_files=False, thread_count=threads)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table sorted by name, independent of the order of threads."""
        super().finish(metadata, [sorted(own, key=lambda written: str(written.index)) for own in results])

    def storage_meta(self) -> None:
        """Omit the save's id and path."""


class BankReader(dcp.FileSystemReader):
    """Reads what `BankWriter` wrote, with as many threads as torch uses."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the table of contents.

        Raises:
            ValueError: the file is missing or invalid.
        """
        path = self._directory / ".metadata"
        try:
            with open(path, "rb") as stream:
                contents = _Contents(stream).load()
            for entry in contents.state_dict_metadata.values():
                for sizes in (entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))):
                    if not isinstance(sizes, torch.Size):
                        raise TypeError(f"{sizes!r} is no size")
            for stored in contents.storage_data.values():
                if stored.offset != 0 or Path(stored.relative_path).name != stored.relative_path:
                    raise ValueError(f"{stored.relative_path!r} is no file of a tensor")
        except Exception as error:  # an invalid pickle may raise any type
            raise ValueError(f"{path} is no table of contents of a stored bank: {error!r}; copy it again") from None
        found: Metadata = contents
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load what the plan asks for into the planner's tensors.

        Raises:
            OSError, RuntimeError, UnpicklingError: a file cannot be read.
        """
        with thread_pool(torch.get_num_threads()) as threads:
            list(threads.map(lambda item: self._read(item, planner), plan.items))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        stored = self.storage_data[item.storage_index]
        assert item.type == LoadItemType.TENSOR
        path = self._directory / stored.relative_path
        part = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        if not isinstance(part, Tensor):
            raise pickle.UnpicklingError(f"{path} holds {type(part).__name__}, expected a tensor")
        for dimension, (first, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dimension, first, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(part)
        planner.commit_tensor(item, target)
