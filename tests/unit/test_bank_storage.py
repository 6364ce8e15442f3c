"""The bank's tensors on disk: the same table of contents whatever the threads do, and rows read from where they lie."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from dist_proxygml.checkpoint.bank_storage import BankReader, BankWriter
from dist_proxygml.checkpoint.model import TrainedModel


def test_the_table_of_contents_does_not_depend_on_the_order_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(FileSystemWriter, "finish", lambda _, metadata, results: seen.append(results))
    written = [WriteResult(MetadataIndex(name, [0, 0]), 1, None) for name in ("b", "a", "c")]
    BankWriter(tmp_path).finish(Metadata({}), [written])
    assert [[result.index.fqn for result in own] for own in seen[0]] == [["a", "b", "c"]]


def stored(directory: Path) -> dict[str, Tensor]:
    """Write two tensors and a step counter."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "proxies": torch.randn(5, 2, 3, generator=generator),
        "optimizer.exp_avg": torch.randn(5, 2, 3, generator=generator),
        "optimizer.step": torch.tensor(7.0),
    }
    dcp.save(tensors, storage_writer=BankWriter(directory), no_dist=True)
    return tensors


def test_what_was_written_is_read_to_the_last_bit_and_by_torch_as_well(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    for reader in (BankReader(tmp_path), dcp.FileSystemReader(tmp_path)):
        read = {name: torch.full_like(value, torch.nan) for name, value in tensors.items()}
        dcp.load(read, storage_reader=reader, no_dist=True)
        assert all(torch.equal(read[name], value) for name, value in tensors.items())


class _Into(DefaultLoadPlanner):
    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.target


def read_rows(directory: Path, first: int, target: Tensor) -> None:
    reader = BankReader(directory)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    item = ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex("proxies"),
        dest_offsets=torch.Size((0, 0, 0)),
        storage_index=MetadataIndex("proxies", torch.Size((0, 0, 0))),
        storage_offsets=torch.Size((first, 0, 0)),
        lengths=target.shape,
    )
    reader.read_data(LoadPlan([item]), _Into(target)).wait()


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    proxies = stored(tmp_path)["proxies"]
    target = torch.zeros(2, 2, 3)
    read_rows(tmp_path, 3, target)
    assert torch.equal(target, proxies[3:5])


def test_what_was_read_stays_when_the_files_are_gone(tmp_path: Path) -> None:
    proxies = stored(tmp_path)["proxies"]
    target = torch.zeros(5, 2, 3)
    read_rows(tmp_path, 0, target)
    for path in tmp_path.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(target, proxies)


class _Runs:
    """In a pickle: code that runs when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_table_of_contents_runs_no_code_and_names_no_file_elsewhere(tmp_path: Path) -> None:
    stored(tmp_path / "bank")
    path, marker = tmp_path / "bank" / ".metadata", tmp_path / "pwned"
    elsewhere = pickle.loads(path.read_bytes())
    for place in elsewhere.storage_data.values():
        place.relative_path = str(tmp_path / "elsewhere")
    for hidden in (_Runs(marker), Metadata({}, storage_data=_Runs(marker)), elsewhere, {"proxies": 1}):
        path.write_bytes(pickle.dumps(hidden))
        with pytest.raises(ValueError, match=r"\.metadata.*table of contents"):
            TrainedModel(tmp_path, 1, {}).bank()
        with pytest.raises(ValueError, match="table of contents"):
            BankReader(tmp_path / "bank").read_metadata()
    assert not marker.exists()


def test_a_bank_with_a_gap_is_refused(tmp_path: Path) -> None:
    stored(tmp_path / "bank")
    path = tmp_path / "bank" / ".metadata"
    contents = pickle.loads(path.read_bytes())
    assert TrainedModel(tmp_path, 1, {}).bank().shape == (5, 2, 3)
    (chunk,) = contents.state_dict_metadata["proxies"].chunks
    chunk.sizes = torch.Size((4, 2, 3))
    path.write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match=r"every proxy.*bank"):
        TrainedModel(tmp_path, 1, {}).bank()


def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    stored(tmp_path)
    for path in tmp_path.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RuntimeError):
        read_rows(tmp_path, 0, torch.zeros(5, 2, 3))
