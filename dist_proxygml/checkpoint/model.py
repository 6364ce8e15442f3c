"""A trained model on disk, independent of its run: a checkpoint, or an export of one (export.py).

    runs/NAME/checkpoints/step-000800/   backbone.safetensors, bank/ of torch.distributed.checkpoint, state.json
    runs/NAME/classes.jsonl              the class of each row of the bank, written when the run starts
    exports/NAME/                        backbone.safetensors, bank.safetensors, classes.jsonl, export.json, README.md

A class table has the format of the index's (data/index.py), so a lost one can be replaced by a copy of that file. Its
hash is verified against the checkpoint. Rows of the bank are read without a process group: each rank reads what it
needs, one stored part at a time, from mapped files.

Declined: names inside every checkpoint, tens of megabytes each for a million classes.

Dimension key: C classes of the stored bank, c classes of this rank of the run that reads, N proxies per class, D
embedding.
"""

import bisect
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dist_proxygml.backbones.from_weights import with_colours
from dist_proxygml.checkpoint.bank_storage import BankReader
from dist_proxygml.checkpoint.folder import MANIFEST_FILE, find_checkpoint, found_instead, read_state
from dist_proxygml.config import OF_TRAINING, Config, flattened
from dist_proxygml.data.index import ClassEntry, ShardIndex, class_table_name, class_table_sha256
from dist_proxygml.storage.files import parse_json, publish
from dist_proxygml.storage.folder import SealedKind, open_sealed
from dist_proxygml.storage.run_folder import RunFolder, step_in

CLASSES_FILE = "classes.jsonl"
EXPORT_FILE = "export.json"
CARD_FILE = "README.md"  # of an export: for people, who may edit it
BACKBONE_FILE = "backbone.safetensors"
BANK_FILE = "bank.safetensors"
PROXIES = "proxies"  # the bank's name in a checkpoint, and its tensor's in an export
EXPORT = SealedKind(
    "dist-proxygml-export",
    remedy="export it again (python -m dist_proxygml.export --overwrite), or copy it again",
    entries={"run": str, "step": int, "settings": dict, "backbone": dict, "preprocessing": dict},
    manifest_file=EXPORT_FILE,
    editable=(CARD_FILE,),
)
_BYTES_AT_A_TIME = 64 << 20  # of an export's bank


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint or an export whose files have been verified."""

    path: Path
    step: int
    settings: dict[str, Any]
    """The settings that the numbers depend on, by name, as in RunState."""
    export: dict[str, Any] | None = None
    """The metadata of an export; None for a checkpoint."""

    @property
    def has_class_names(self) -> bool:
        """False if it was trained on a stream."""
        return "class table" in self.settings

    @property
    def pml_loss(self) -> str | None:
        """loss.name, where it was trained with a loss of pytorch-metric-learning, and so has no bank."""
        return self.settings.get("loss.name")

    def class_table(self) -> Path:
        """Path of its class table, which may be missing."""
        own, of_run = self.path / CLASSES_FILE, self.path.parent.parent / CLASSES_FILE
        return own if self.export or own.is_file() else of_run

    def classes(self) -> tuple[ClassEntry, ...]:
        """Read the class of each row of the bank, in the order of rows.

        Raises:
            ValueError: it was trained on a stream, or its class table is missing or belongs to other classes.
        """
        if not self.has_class_names:
            raise ValueError(
                f"{self.path} has no class names: it was trained on a stream, which has none; set "
                "checkpoint.init_proxies to false to take over its backbone only"
            )
        table, expected = self.class_table(), str(self.settings["class table"])
        of_shards = class_table_name(self.settings.get("data.train_split", "train"))
        has_all = all(self.settings.get(f"data.{name}_classes") is None for name in ("validation", "train"))
        remedy = (
            f"copy {CLASSES_FILE} of the run's folder"
            f"{f', or {of_shards} of the shards that it was trained on,' if has_all else ''} to "
            f"{self.path / CLASSES_FILE}; an export (python -m dist_proxygml.export) brings its own"
        )
        if not table.is_file():
            raise ValueError(f"expected the class names of {self.path} at {table}, found none; {remedy}")
        try:
            classes = read_class_table(table)
            found = class_table_sha256(classes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{table} is not a table of classes ({error}); {remedy}") from None
        if found != expected:
            raise ValueError(
                f"{table} is not the class table of {self.path}: expected sha256 {expected[:12]}..., got "
                f"{found[:12]}...; {remedy}"
            )
        return classes

    def check_config(self, config: Config, *, source: Path) -> None:
        """Refuse a configuration that was edited since this was trained.

        Raises:
            ValueError: a setting that embeddings depend on differs; the message names it.
        """
        transform = config.data.test_transform.model_dump(mode="json")
        parts = {"backbone": config.backbone.of_trained_model(), "data": {"test_transform": transform}}
        now = with_colours(dict(flattened(parts)))
        unsaid = {f"backbone.{name}": value for name, value in config.backbone.unsaid.items()}
        unsaid = {name: value for name, value in unsaid.items() if name.partition(".")[2] not in OF_TRAINING}
        unsaid |= {f"data.test_transform.{name}": value for name, value in config.data.test_transform.unsaid.items()}
        trained = with_colours(self.settings)
        compared = {name: now.get(name, unsaid.get(name)) for name in [*now, *(unsaid.keys() - now.keys())]}
        expected = {name: trained.get(name, unsaid.get(name)) for name in compared if name in trained or name in unsaid}
        differing = [name for name in expected if expected[name] != compared[name]]
        if differing:
            listed = ", ".join(f"{name} {expected[name]!r}, got {compared[name]!r}" for name in differing)
            raise ValueError(f"{source} is not what {self.path} was trained with: expected {listed}; restore that file")

    def bank(self) -> "StoredBank":
        """Open the bank.

        Raises:
            ValueError: it cannot be read, or there is none.
        """
        if self.pml_loss is not None:
            raise ValueError(
                f"expected proxies in {self.path}, got a model that was trained with {self.pml_loss}, which has none "
                "by class; set checkpoint.init_proxies to false to take over its backbone only"
            )
        return _ExportedBank(self.path / BANK_FILE) if self.export else _CheckpointBank(self.path / "bank")


class StoredBank(Protocol):
    """A bank on disk, read one part at a time."""

    shape: tuple[int, int, int]
    """(C, N, D)."""

    def parts(self) -> list[tuple[int, int]]:
        """Return the parts it is stored in, or best read in, as ranges [first, stop) of its C rows."""

    def read_(self, rows_xND: Tensor, *, first: int) -> None:
        """Read the rows from `first` on, all of one part, into a tensor.

        Raises:
            ValueError: they cannot be read.
        """


def open_trained(path: Path) -> TrainedModel:
    """Open a checkpoint, a run's folder (its newest complete checkpoint) or an export, and verify every file except an
    export's card, which may be edited.

    Raises:
        ValueError: the path is none of these, a file fails verification, or an export has no safetensors weights.
    """
    if (path / EXPORT_FILE).is_file():
        return _open_export(path)
    checkpoints = RunFolder(path).checkpoints
    if checkpoints.is_dir():
        checkpoint = find_checkpoint(checkpoints, "auto")
        if checkpoint is None:
            raise ValueError(f"expected a whole checkpoint in {checkpoints}, {found_instead(checkpoints)}")
    elif (path / MANIFEST_FILE).is_file() or step_in(path.name) is not None:
        checkpoint = find_checkpoint(path.parent, str(path))
        assert checkpoint is not None
    else:
        found = "a folder without any of their files" if path.is_dir() else "no folder"
        raise ValueError(
            f"expected a checkpoint (step-N), a run's folder or an export at {path}, found {found}; correct the path"
        )
    state = read_state(checkpoint)
    return TrainedModel(checkpoint, state.step, state.settings)


def read_class_table(path: Path) -> tuple[ClassEntry, ...]:
    """Read a class table, in the order of labels; about 3 s for a million classes.

    Raises:
        ValueError, TypeError: the file is not a class table.
    """
    rows = parse_json(b"[" + b",".join(path.read_bytes().splitlines()) + b"]")
    return tuple(ClassEntry(label, *row) for label, row in enumerate(rows))


def write_class_table(run_directory: Path, index: ShardIndex | None) -> None:
    """Write the class table of the training split into the run's folder, replacing one that may be damaged; a stream
    has none. On rank 0 only.
    """
    if index is not None:
        with publish(run_directory / CLASSES_FILE) as stream:
            index.write_class_table(stream)


# ---- an export -------------------------------------------------------------------------------------------------------


def _open_export(path: Path) -> TrainedModel:
    about = open_sealed(path, EXPORT)
    formats = about.get("formats", ["safetensors"])
    if not isinstance(formats, list) or "safetensors" not in formats:
        listed = ", ".join(map(str, formats)) if isinstance(formats, list) else formats
        raise ValueError(
            f"expected weights and proxies in the export {path}, found a graph only ({listed}); export it "
            "again with --format safetensors,onnx or the like"
        )
    return TrainedModel(path, about["step"], about["settings"], export=about)


class _ExportedBank:
    """The tensor "proxies" of a safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                num_classes, per_class, embedding_dim = file.get_slice(PROXIES).get_shape()
                dtype = file.get_slice(PROXIES).get_dtype()
            if dtype not in ("F64", "F32", "F16", "BF16") or 0 in (per_class, embedding_dim):
                raise ValueError(f"proxies of {dtype} [{num_classes}, {per_class}, {embedding_dim}]")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; {EXPORT.remedy}") from None
        self.shape = (num_classes, per_class, embedding_dim)

    def parts(self) -> list[tuple[int, int]]:
        num_classes, per_class, embedding_dim = self.shape
        step = max(1, _BYTES_AT_A_TIME // (4 * per_class * embedding_dim))
        return [(first, min(first + step, num_classes)) for first in range(0, num_classes, step)]

    def read_(self, rows_xND: Tensor, *, first: int) -> None:
        try:
            with safe_open(self._path, framework="pt") as file:
                rows_xND.copy_(file.get_slice(PROXIES)[first : first + len(rows_xND)])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._path} cannot be read: {error}") from None


# ---- a checkpoint ----------------------------------------------------------------------------------------------------


class _CheckpointBank:
    """The tensor "proxies" in a folder of torch.distributed.checkpoint, in the parts that its ranks wrote.

    Its reader is used without its planning, which is collective.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reader = BankReader(directory)
        contents = self._reader.read_metadata()
        self._reader.set_up_storage_reader(contents, True)
        entry = contents.state_dict_metadata.get(PROXIES)
        if not isinstance(entry, TensorStorageMetadata) or len(entry.size) != 3:
            raise ValueError(f"expected proxies [classes, N, D] in {directory}, got {entry}; copy the checkpoint again")
        num_classes, per_class, embedding_dim = entry.size
        self.shape = (num_classes, per_class, embedding_dim)
        self._chunks = sorted((chunk for chunk in entry.chunks if chunk.sizes[0]), key=lambda chunk: chunk.offsets[0])
        starts, ends = [start for start, _ in self.parts()], [end for _, end in self.parts()]
        if [*starts, num_classes] != [0, *ends] or any(tuple(c.sizes[1:]) != self.shape[1:] for c in self._chunks):
            raise ValueError(f"expected every proxy in {directory} once, got {entry.chunks}; copy the checkpoint again")

    def parts(self) -> list[tuple[int, int]]:
        return [(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in self._chunks]

    def read_(self, rows_xND: Tensor, *, first: int) -> None:
        chunk = self._chunks[bisect.bisect([start for start, _ in self.parts()], first) - 1]
        item = ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(PROXIES),
            dest_offsets=torch.Size((0, 0, 0)),
            storage_index=MetadataIndex(PROXIES, chunk.offsets),
            storage_offsets=torch.Size((first - chunk.offsets[0], 0, 0)),
            lengths=rows_xND.shape,
        )
        try:
            self._reader.read_data(LoadPlan([item]), _Into(rows_xND)).wait()
        except (OSError, LookupError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self._directory} cannot be read: {error!r}") from None


class _Into(DefaultLoadPlanner):
    """A planner that reads everything into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self._target
