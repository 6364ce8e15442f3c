"""The embedding pass: every image of a split through the model exactly once, on all ranks, into one
table.

Each rank embeds the batches that its loader gives it; the rows are gathered, sorted by sample id
and checked, so every rank ends with the same table. What is embedded can be kept on disk (blocks.py),
so that an interrupted pass resumes later. No padding and no sampler that repeats images
to make ranks even: repeated rows are sure hits in a gallery. Rows are brought to unit length in
float32 outside autocast, whatever precision the forward pass ran in.

Dimension key: b images of a batch, n images of the split, D embedding.
"""

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_proxygml.data.damage import Damage, DamageLog
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import Batch, build_evaluation_loader
from dist_proxygml.data.transforms import Transform
from dist_proxygml.distributed.collectives import AgreedError, gather_rows_on_host
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_together
from dist_proxygml.distributed.preemption import StopRequested, StopSignals
from dist_proxygml.evaluation.blocks import BlockFolder, EmbeddingBlocks, weights_sha256
from dist_proxygml.evaluation.progress import Follower, progress
from dist_proxygml.faults import fault_point
from dist_proxygml.storage.files import publish

_MOST_BYTES_WAITING = 64 << 20


class EmbeddingTable(NamedTuple):
    """One row per image of a split, in the order of the split's index."""

    embeddings: Tensor  # float32 [n, D], unit rows, on the CPU
    labels: Tensor  # int64 [n]
    ids: Tensor  # int64 [n], ascending: 0 .. n - 1 unless damaged images were skipped


@dataclass(frozen=True)
class Split:
    """Images that are embedded.

    Attributes:
        index: they.
        damage: where damaged ones are counted and skipped; None: they are an error.
        seen: bool [C], which classes the model was trained on; None: unknown.
        trained_images: int64 [C], how many images of each class it was trained on, none where negative; None: unknown.
    """

    index: ShardIndex
    damage: DamageLog | None = None
    seen: np.ndarray | None = None
    trained_images: np.ndarray | None = None


@dataclass(frozen=True)
class PassSettings:
    """Settings of the pass from images to rows.

    Attributes:
        transform: how an image becomes a row of a batch.
        batch_size: images of one forward pass of one rank.
        num_workers: loader processes of each rank.
        preprocessing: the transform's settings, for the record: rows of other ones are not those of this pass. Needed
            where blocks are kept.
    """

    transform: Transform
    batch_size: int = 64
    num_workers: int = 0
    preprocessing: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PassHooks:
    """Requests to stop, stored blocks and progress messages of a pass.

    Attributes:
        signals: requests to stop that this process receives; such a rank waits for the others with its part undone.
        blocks: where what is embedded is kept until the caller, who has stored the result, removes it.
        say: takes lines for people; give it on one rank.
        follower: is given the progress instead of a bar.
    """

    signals: StopSignals | None = None
    blocks: BlockFolder | None = None
    say: Callable[[str], object] = lambda _: None
    follower: Follower | None = None


def embed_split(
    model: nn.Module, split: Split, settings: PassSettings, *, context: ParallelContext, hooks: PassHooks
) -> EmbeddingTable:
    """Embed the images of a split; with blocks those that an earlier pass did not come to. Called on all ranks.

    Raises:
        ValueError, StopRequested: as `embed`.
    """
    index, batch_size, skip_damaged = split.index, settings.batch_size, split.damage is not None
    kept = None
    if hooks.blocks is not None:
        assert settings.preprocessing is not None, "blocks without the settings of the transform"

        def made_of() -> dict[str, Any]:
            return {
                "weights": weights_sha256(model),
                "index": index.sha256,
                "class table": index.class_table_sha256,
                "split": index.split,
                "preprocessing": dict(settings.preprocessing or {}),
                "batch size": batch_size,
                "damaged images": "skip" if skip_damaged else "fail",
                "device": context.device.type,
            }

        kept = EmbeddingBlocks(
            hooks.blocks,
            index.split,
            num_images=index.num_samples,
            batch_size=batch_size,
            made_of=made_of,
            context=context,
        )
        if kept.done and context.is_main:
            hooks.blocks.say(f"{kept.num_done:,} of {index.num_samples:,} images of {index.split} are embedded already")
    loader = build_evaluation_loader(
        index,
        settings.transform,
        batch_size=batch_size,
        rank=context.rank,
        world_size=context.world_size,
        num_workers=settings.num_workers,
        pin_memory=context.device.type == "cuda",
        skip_damaged=skip_damaged,
        done=frozenset() if kept is None else kept.done,
    )
    with progress(
        f"embedding {index.split}", len(loader), unit=" batches", is_shown=context.is_main, follower=hooks.follower
    ) as advance:

        def counted() -> Iterator[Batch]:
            for batch in loader:
                yield batch
                advance(1)

        return embed(
            model,
            counted(),
            context=context,
            num_samples=index.num_samples,
            describe=index.describe,
            damage=split.damage,
            signals=hooks.signals,
            blocks=kept,
        )


def embed(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    context: ParallelContext,
    num_samples: int,
    describe: Callable[[int], str] | None = None,
    damage: DamageLog | None = None,
    signals: StopSignals | None = None,
    blocks: EmbeddingBlocks | None = None,
) -> EmbeddingTable:
    """Embed a split: this rank's batches here, the other ranks' batches there, one table everywhere.

    Called on all ranks. The model runs in evaluation mode without gradients; the mode of each of its modules is
    restored.

    Args:
        model: images uint8 [b, 3, H, W] -> embeddings [b, D], on `context.device`.
        loader: this rank's batches; together the ranks' batches hold each id 0 .. num_samples - 1 once. May be empty.
        context: this process among its peers.
        num_samples: number of images n of the split.
        describe: what to call a sample in a message besides its id, such as `ShardIndex.describe`.
        damage, signals: as in `Split` and `PassHooks`.
        blocks: what an earlier pass did, so that it is not in `loader`, and where this one keeps what it does.

    Raises:
        StopRequested: on every rank, when one was asked to stop.
        ValueError: on every rank, when an id is missing, repeated or out of range, when an embedding is zero or not
            finite, or when more images are damaged than `damage` allows.
    """
    # 1. This rank's part. No collectives in here: a damaged image stops one rank only.
    local, left_out = run_together(context, _embed_batches, model, loader, context.device, signals, blocks)
    if blocks is not None:
        blocks.tell_problems()
    if signals is not None:
        try:
            signals.agree(context)
        except StopRequested:
            if blocks is not None:
                blocks.write()
            raise
    num_left_out = 0
    if damage is not None:
        damage.add(left_out)
        num_left_out = sum(all_gather_object(context, len(left_out)))

    # 2. A rank without a batch does not know D; it still takes part in every collective.
    shapes = all_gather_object(context, tuple(local.embeddings.shape))
    row_counts = [rows for rows, _ in shapes]
    width = max(columns for _, columns in shapes)
    if row_counts[context.rank] == 0:
        local = local._replace(embeddings=local.embeddings.new_zeros(0, width))

    # 3. The same table everywhere, checked everywhere: what is wrong is wrong on all ranks.
    rows = EmbeddingTable(
        *(
            gather_rows_on_host(part, row_counts=row_counts, device=context.device, group=context.group)
            for part in local
        )
    )
    order_n = torch.argsort(rows.ids, stable=True)
    table = EmbeddingTable(*(part[order_n] for part in rows))
    check_table(table, num_samples=num_samples, num_left_out=num_left_out, describe=describe)
    return table


def check_table(
    table: EmbeddingTable, *, num_samples: int, num_left_out: int = 0, describe: Callable[[int], str] | None = None
) -> None:
    """Refuse a table that metrics must not be computed from.

    Raises:
        ValueError: ids other than 0 .. num_samples - 1 in order, but for `num_left_out` of them, or rows that are zero
            or not finite (named by their ids).
    """
    expected_n = torch.arange(num_samples)
    ascends = bool((table.ids.diff() > 0).all())
    in_range = bool(torch.isin(table.ids, expected_n).all())
    if not (ascends and in_range and table.ids.numel() + num_left_out == num_samples):
        found, counts = table.ids.unique(return_counts=True)
        raise AgreedError(
            f"expected each of the {num_samples} images of the split exactly once, got "
            f"{table.ids.numel()} rows; "
            f"missing ids: {_some(expected_n[~torch.isin(expected_n, found)])}; repeated ids: "
            f"{_some(found[counts > 1])}; "
            f"unknown ids: {_some(found[~torch.isin(found, expected_n)])}; the ranks' loaders must "
            "cut the split up, not sample from it"
        )
    # Unit rows were asked for: anything shorter than a half was zero.
    zero_n = torch.linalg.vector_norm(table.embeddings, dim=1) < 0.5
    unusable = {
        "not finite": (
            ~table.embeddings.isfinite().all(dim=1),
            "has the model diverged? Lower the learning rate, or look at these images",
        ),
        "zero": (
            zero_n,
            "they have no direction to compare; look at the model's last layers, or at them",
        ),
    }
    for problem, (bad_n, remedy) in unusable.items():
        if bad_n.any():
            bad = table.ids[bad_n]  # other numbers than those of the rows, where images were skipped
            first = "" if describe is None else f", the first is {describe(int(bad[0]))}"
            raise AgreedError(
                f"the embeddings of {bad.numel()} of {num_samples} images are {problem} (ids "
                f"{_some(bad)}{first}); "
                f"{remedy}"
            )


def save_table(table: EmbeddingTable, path: Path) -> Path:
    """Write the table as a numpy archive with the arrays embeddings, labels and ids; complete or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as stream:
        np.savez(stream, **{name: value.numpy() for name, value in table._asdict().items()})
    return path


def load_table(path: Path) -> EmbeddingTable:
    """Read a table that `save_table` wrote.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return EmbeddingTable(*(torch.from_numpy(arrays[name]) for name in EmbeddingTable._fields))
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a table of embeddings ({error}); run the evaluation again to write it"
        ) from error


def _embed_batches(
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device,
    signals: StopSignals | None,
    blocks: EmbeddingBlocks | None,
) -> tuple[EmbeddingTable, list[Damage]]:
    rows, labels, ids = _HostRows(), [], []
    left_out: list[Damage] = []
    for block in [] if blocks is None else blocks.stored:
        left_out += block.damaged
        if len(block.ids) == 0:
            continue
        rows.add(block.embeddings)
        labels.append(block.labels)
        ids.append(block.ids)
    keeping = contextlib.nullcontext() if blocks is None else blocks
    with torch.inference_mode(), _evaluation_mode(model), keeping:
        for batch in loader:
            fault_point("evaluate.batch")
            if signals is not None and signals.received:
                break
            left_out += batch.damaged
            if len(batch.ids):
                output_bD = model(batch.images.to(device, non_blocking=True))
                with torch.autocast(device.type, enabled=False):
                    rows_bD = F.normalize(output_bD.float(), dim=1)
                rows.add(rows_bD)
                labels.append(batch.labels)
                ids.append(batch.ids)
            if blocks is not None:
                blocks.add(batch, rows_bD if len(batch.ids) else None)
    if not labels:
        nothing = torch.zeros(0, dtype=torch.int64)
        return EmbeddingTable(torch.zeros(0, 0), nothing, nothing), left_out
    # Made outside inference mode, these are ordinary tensors, which collectives may write to.
    return EmbeddingTable(torch.cat(rows.take()), torch.cat(labels), torch.cat(ids)), left_out


class _HostRows:
    """Rows on their way to the host: a GPU never holds a table, nor is it waited for after every batch."""

    def __init__(self) -> None:
        self._arrived: list[Tensor] = []
        self._waiting: list[Tensor] = []

    def add(self, rows_bD: Tensor) -> None:
        self._waiting.append(rows_bD)
        if sum(rows.nbytes for rows in self._waiting) >= _MOST_BYTES_WAITING:
            self._fetch()

    def take(self) -> list[Tensor]:
        """All rows, in order, on the CPU."""
        self._fetch()
        return self._arrived

    def _fetch(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._arrived += [rows.cpu() for rows in waiting]


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; afterwards each module is in the mode it was in, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _some(ids: Tensor, most: int = 10) -> str:
    """The first ids of a list, readable: "3, 17, 90 and 5 more"."""
    if ids.numel() == 0:
        return "none"
    listed = ", ".join(str(number) for number in ids[:most].tolist())
    return listed if ids.numel() <= most else f"{listed} and {ids.numel() - most} more"
