"""An evaluation that was cut short goes on with the images that it had not embedded, and comes to the same numbers."""

import hashlib
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.damage import DamageLog
from dist_proxygml.data.index import ShardIndex, open_index
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.distributed.preemption import StopRequested, StopSignals
from dist_proxygml.evaluation.blocks import Block, BlockFolder, EmbeddingBlocks
from dist_proxygml.evaluation.embedding_pass import PassHooks, PassSettings, Split
from dist_proxygml.evaluation.evaluator import EvaluationResult, Settings, evaluate
from tests.harness import run_ranks
from tests.shards_of_noise import SIDE, Projection, write_noise_shards

CLASS_SIZES = [9, 13, 3, 1, 12, 5, 7, 13, 9, 8]  # 80 images, 40 batches of 2
SPOILT = [4, 6, 7, 79]  # of the fourth batch both images, of the last one


class Counting(Projection):
    """Counts the images that it embeds; asks to stop when it has embedded so many."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        super().__init__()
        self.num_embedded = 0
        self.stop_after = stop_after
        self.signals = StopSignals()

    def forward(self, images: Tensor) -> Tensor:
        self.num_embedded += len(images)
        if self.stop_after is not None and self.num_embedded >= self.stop_after:
            self.signals.received = signal.SIGTERM
        return super().forward(images)


def evaluated(
    context: ParallelContext,
    root: Path,
    model: Counting,
    *,
    seconds: float = 0.0,
    kept: str = "kept",
    said: list[str] | None = None,
) -> EvaluationResult:
    index = open_index(root / "shards", "test")
    log = DamageLog(root / "damaged.jsonl", split="test", num_images=80, max_share=0.1, context=context)
    return evaluate(
        model,
        Split(index, log),
        PassSettings(
            build_transform(ResizeConfig(name="resize", size=SIDE)),
            batch_size=2,
            preprocessing={"name": "resize", "size": SIDE},
        ),
        context=context,
        settings=Settings(kmeans_seeds=(0,)),
        hooks=PassHooks(model.signals, BlockFolder(root / kept, [].append if said is None else said.append, seconds)),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Shards, four of whose images are damaged."""
    index = write_noise_shards(tmp_path / "shards", CLASS_SIZES)
    for sample_id in SPOILT:
        row = index.samples[sample_id]
        with open(index.shard_paths[row["shard"]], "r+b") as shard:
            shard.seek(int(row["offset"]) + 30)
            shard.write(b"?!")
    return tmp_path


def undisturbed(root: Path) -> EvaluationResult:
    (root / "damaged.jsonl").unlink(missing_ok=True)
    return evaluated(single_process(), root, Counting(), kept="elsewhere")


def is_same(one: EvaluationResult, other: EvaluationResult) -> bool:
    assert one.table is not None
    assert other.table is not None
    tables_agree = all(torch.equal(a, b) for a, b in zip(one.table, other.table, strict=True))
    return tables_agree and one.to_json() == other.to_json()


def names_of_damaged(root: Path) -> list[str]:
    return sorted(json.loads(line)["image"] for line in (root / "damaged.jsonl").read_text().splitlines())


def start_and_be_killed(context: ParallelContext, root: Path, fault: str) -> None:
    os.environ |= {"RANK": str(context.rank), "DIST_PROXYGML_FAULT": fault}
    evaluated(context, root, Counting())


def go_on(context: ParallelContext, root: Path) -> tuple[EvaluationResult, int, list[str]]:
    model, said = Counting(), []  # type: ignore[var-annotated]
    result = evaluated(context, root, model, said=said)
    return result, model.num_embedded, said


@pytest.mark.parametrize("world_size", [1, 3])
def test_after_a_kill_only_what_was_not_embedded_is_embedded(root: Path, world_size: int) -> None:
    with pytest.raises(RuntimeError):  # at the last but one batch of rank 1
        run_ranks(start_and_be_killed, 2, root, "evaluate.batch@1:19:kill9")
    blocks = list((root / "kept" / "test").glob("*.block"))
    first_batches = [int(path.name.split("-")[0]) for path in blocks]
    assert sum(number >= 20 for number in first_batches) == 18  # of 20; how far rank 0 came is a matter of chance
    (root / "kept" / "test" / "000039-000039.block.tmp-17").write_bytes(b"half a block")
    (root / "damaged.jsonl").unlink(missing_ok=True)

    ranks = run_ranks(go_on, world_size, root)
    # The damaged images of batches 2 and 3 (ids 4, 6, 7) and 39 are in no row.
    num_left = sum(2 - sum(i // 2 == number for i in SPOILT) for number in range(40) if number not in first_batches)
    assert sum(num_embedded for _, num_embedded, _ in ranks) == num_left
    assert ranks[0][2] == [f"{2 * len(blocks)} of 80 images of test are embedded already"]
    assert not list((root / "kept" / "test").glob("*.tmp-*"))
    named = names_of_damaged(root)
    expected = undisturbed(root)
    assert expected.num_damaged == len(named) == 4
    assert named == names_of_damaged(root)
    assert all(is_same(result, expected) for result, _, _ in ranks)


def stop(context: ParallelContext, root: Path) -> int:
    """Rank 0 is told to stop in the middle of its part."""
    model = Counting(stop_after=12 if context.rank == 0 else None)
    with pytest.raises(StopRequested):
        evaluated(context, root, model, seconds=1000.0)
    return model.num_embedded


def test_a_stop_keeps_everything_that_was_embedded_before_it(root: Path) -> None:
    num_embedded = run_ranks(stop, 2, root)
    assert num_embedded == [13, 39]  # of 37 and 39
    ((result, rest, said),) = run_ranks(go_on, 1, root)
    assert rest == 37 - 13
    assert is_same(result, undisturbed(root))
    assert said == ["56 of 80 images of test are embedded already"]  # 8 batches of rank 0, one of them of damaged ones


def test_blocks_of_other_weights_or_settings_are_removed_and_damaged_ones_told_of(root: Path) -> None:
    alone = single_process()
    evaluated(alone, root, Counting())
    folder = root / "kept" / "test"
    blocks = sorted(folder.glob("*.block"))
    assert len(blocks) == 40
    with open(blocks[5], "r+b") as stream:
        stream.seek(200)
        stream.write(b"?!")
    blocks[6].write_bytes(blocks[6].read_bytes()[:-1])
    blocks[7].write_bytes(b"")
    again, said = Counting(), []  # type: ignore[var-annotated]
    result = evaluated(alone, root, again, said=said)
    assert again.num_embedded == 6
    assert is_same(result, undisturbed(root))
    assert [f"{path} is damaged: expected sha256" in text for path, text in zip(blocks[5:], said, strict=False)] == [
        True,
        True,
        True,
        False,
    ]
    assert said[3] == "74 of 80 images of test are embedded already"
    assert len(list(folder.glob("*.block"))) == 40

    other, said = Counting(), []
    with torch.no_grad():
        other.weights_FD[17, 3] += 1e-6
    evaluated(alone, root, other, said=said)
    assert other.num_embedded == 76
    assert said == [f"40 blocks in {folder} are of other weights: removed, to be embedded anew"]


def test_two_blocks_of_one_batch_are_taken_once(root: Path) -> None:
    evaluated(single_process(), root, Counting())
    folder = root / "kept" / "test"
    (folder / "000012-000012.block").rename(folder / "000011-000012.block")
    content = (folder / "000011-000012.block").read_bytes()
    (folder / "000013-000020.block").write_bytes(content)
    ((result, num_embedded, _),) = run_ranks(go_on, 1, root)
    assert num_embedded == 0
    assert is_same(result, undisturbed(root))


def test_a_pass_that_takes_no_time_leaves_no_trace(root: Path) -> None:
    evaluated(single_process(), root, Counting(), seconds=1000.0)
    assert not (root / "kept").exists()


def test_blocks_that_cannot_be_written_are_told_of_and_change_nothing(root: Path) -> None:
    (root / "kept").write_text("in the way")
    said: list[str] = []
    result = evaluated(single_process(), root, Counting(), said=said)
    assert is_same(result, undisturbed(root))
    (problem,) = said
    assert problem.startswith(f"embeddings could not be kept in {root / 'kept' / 'test'}: ")
    assert "on rank 0" in problem


def test_a_block_is_the_hash_of_a_safetensors_file_and_that_file(root: Path) -> None:
    """The format that other programs would read; also that ids are those of the index."""
    from safetensors.torch import load

    result = evaluated(single_process(), root, Counting())
    index: ShardIndex = open_index(root / "shards", "test")
    content = (root / "kept" / "test" / "000010-000010.block").read_bytes()
    assert content[:32] == hashlib.sha256(content[32:]).digest()
    tensors = load(content[32:])
    assert tensors["ids"].tolist() == [20, 21]
    assert tensors["labels"].tolist() == index.labels[20:22].tolist()
    assert result.table is not None
    assert torch.equal(tensors["embeddings"], result.table.embeddings[result.table.ids.tolist().index(20) :][:2])


def kept_alone(folder: Path, num_images: int, *, seconds: float = 0.25, **made_of: object) -> EmbeddingBlocks:
    return EmbeddingBlocks(
        BlockFolder(folder, print, seconds),
        "test",
        num_images=num_images,
        batch_size=1,
        made_of=lambda: made_of,
        context=single_process(),
    )


def one_image(number: int) -> Batch:
    return Batch(torch.zeros(1, 3, 1, 1), torch.zeros(1), torch.tensor([number]), 1, 1)


def test_a_block_holds_consecutive_batches_and_is_written_before_memory_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kept_alone(tmp_path, 4, seconds=0.0)
    for number in range(4):
        first.add(one_image(number), torch.zeros(1, 4))
    for name in ("000000-000000", "000003-000003"):
        (tmp_path / "test" / f"{name}.block").unlink()

    second = kept_alone(tmp_path, 1_000_003, seconds=1000.0)
    assert (sorted(second.done), second.num_done) == ([1, 2], 2)
    monkeypatch.setattr("dist_proxygml.evaluation.blocks._MOST_BYTES", 64)  # four rows
    for number in (0, 3, 4, 5, 6):
        second.add(one_image(number), torch.zeros(1, 4))
    assert second._writer is not None
    second._writer.join()
    assert [path.stem for path in second.paths()] == [
        "000000-000000",
        "000001-000001",
        "000002-000002",
        "000003-000005",
    ]
    second._numbers = iter([999_999, 1_000_000])
    for number in (999_999, 1_000_000):
        second.add(one_image(number), torch.zeros(1, 4))
        second.write()
    assert [path.stem for path in second.paths()][-2:] == ["999999-999999", "1000000-1000000"]  # by number


def test_what_a_block_was_made_of_differently_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ({"weights": 1, "size": (3, 3)}, {"weights": 1, "size": (3, 3)}, {"weights": 2, "size": (4, 4)}):
        kept = kept_alone(tmp_path, 2, seconds=0.0, **more)
        if not kept.done:
            kept.add(one_image(0), torch.zeros(1, 4))
    assert capsys.readouterr().out == (
        f"1 blocks in {tmp_path / 'test'} are of other size and weights: removed, to be embedded anew\n"
    )


def test_blocks_are_written_by_the_clock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image a second; the disk hangs from the 201st second to the 230th."""
    from dist_proxygml.evaluation import blocks

    clock, disk = SimpleNamespace(now=0.0), threading.Event()
    monkeypatch.setattr(blocks, "time", SimpleNamespace(monotonic=lambda: clock.now))
    kept = kept_alone(root / "kept", 300)
    write, written = kept._write, []

    def recorded(pending: list[Block]) -> None:
        written.append([block.numbers[0] for block in pending])
        if clock.now > 200:
            disk.wait()
        write(pending)

    monkeypatch.setattr(kept, "_write", recorded)
    for number in range(300):
        clock.now += 1.0
        if number == 230:
            disk.set()
        if kept._writer is not None and not 200 <= number < 230:
            kept._writer.join()
        kept.add(one_image(number), torch.zeros(1, 4))
    with kept:
        pass
    kept._writer.join()
    assert [number for numbers in written for number in numbers] == list(range(300))
    lengths = [len(numbers) for numbers in written]
    assert lengths[:50] == [1] * 50
    assert set(lengths[50:75]) == {2}  # from the 50th second on a fiftieth of the time is more than one
    assert max(lengths) > 25
    assert len(list((root / "kept" / "test").glob("*.block"))) == len(written)
