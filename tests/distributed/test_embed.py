"""Several ranks embed one folder: the same bytes for any number of them, and for any that was stopped in between."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.sources import OnBad, open_source
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.evaluation.blocks import BlockFolder
from dist_proxygml.inference import embed
from dist_proxygml.inference.embed import embed_to_folder
from dist_proxygml.inference.embedder import Embedder
from dist_proxygml.inference.embeddings import open_embeddings
from tests.harness import run_command, run_ranks
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import write_finished_run

FILES = ("embeddings.npy", "ids.jsonl", "manifest.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """49 images, 17 batches of 3."""
    return write_noise_shards(tmp_path_factory.mktemp("noise"), [14, 19, 16])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images, of which the last is none."""
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        image = Image.fromarray(generator.integers(0, 256, (12, 18, 3), dtype=np.uint8))
        image.save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "z.png").write_bytes(b"no image")
    return tmp_path / "photos"


def embedded(
    context: ParallelContext, run: Path, data: Path, out: Path, on_bad: OnBad = "fail", fault: str = "", size: int = 3
) -> tuple[int, list[str]]:
    """How many images this rank embedded, and what it said; each batch is on disk before the next, and is a round."""
    os.environ |= {"RANK": str(context.rank), "DIST_PROXYGML_FAULT": fault}
    embed.BlockFolder = functools.partial(BlockFolder, seconds=0.0)  # type: ignore[misc]
    embed._SECONDS_OF_A_ROUND = 0.0
    embedder, num_embedded, said = Embedder.from_run(run, device="cpu"), 0, list[str]()
    embed._say = said.append
    real = embedder.embed_prepared

    def counted(images: object, **names: object) -> np.ndarray:
        nonlocal num_embedded
        rows = real(images, **names)  # type: ignore[arg-type]
        num_embedded += len(rows)
        return rows

    embedder.embed_prepared = counted  # type: ignore[method-assign]
    embed_to_folder(embedder, open_source(data), out, context=context, batch_size=size, on_bad=on_bad)
    return num_embedded, said


def contents(folder: Path) -> list[bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return [(folder / name).read_bytes() for name in FILES]


def test_the_bytes_do_not_depend_on_the_number_of_ranks(run: Path, shards: ShardIndex, tmp_path: Path) -> None:
    ranks = {n: run_ranks(embedded, n, run, shards.root, tmp_path / str(n)) for n in (1, 2, 3)}
    assert {n: [share for share, _ in of_ranks] for n, of_ranks in ranks.items()} == {
        1: [49],
        2: [24, 25],
        3: [15, 18, 16],
    }
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]
    assert [record.sample for record in open_embeddings(tmp_path / "2").records] == list(range(49))


@pytest.mark.parametrize("world_size", [1, 3])
def test_after_the_kill_of_one_rank_only_what_is_missing_is_embedded(
    run: Path, shards: ShardIndex, tmp_path: Path, world_size: int
) -> None:
    # Rank 1 at its fourth of nine batches, rank 0 soon after; either end may be heard of first.
    with pytest.raises((RuntimeError, ValueError), match=r"rank 1|another rank has gone"):
        run_ranks(embedded, 2, run, shards.root, tmp_path / "out", "fail", "embed.batch@1:4:kill9")
    assert not (tmp_path / "out").exists()
    blocks = [path.name for path in (tmp_path / ".out.partial" / "blocks").glob("*.block")]
    assert sorted(name for name in blocks if name >= "000008") == [f"{n:06d}-{n:06d}.block" for n in (8, 9, 10)]
    ranks = run_ranks(embedded, world_size, run, shards.root, tmp_path / "out")
    assert sum(share for share, _ in ranks) == 49 - 3 * len(blocks)
    assert ranks[0][1] == [f"resuming: {3 * len(blocks)} of 49 images are embedded already"]
    run_ranks(embedded, 1, run, shards.root, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_image_that_one_rank_cannot_use_ends_all_and_may_be_left_out(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"z.png: the image does not decode: .*\(on rank 1\)"):
        run_ranks(embedded, 2, run, photos, tmp_path / "out", "fail", "", 1)
    # Of eleven batches each rank had finished five.
    ranks = run_ranks(embedded, 3, run, photos, tmp_path / "out", "skip", "", 1)
    assert ranks == [(0, ["resuming: 10 of 11 images are embedded already"]), (0, []), (0, [])]
    run_ranks(embedded, 1, run, photos, tmp_path / "one", "skip", "", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert [damage["image"] for damage in open_embeddings(tmp_path / "out").manifest["left_out"]] == [
        str(photos / "z.png")
    ]


def embedded_apart(context: ParallelContext, run: Path, photos: Path, out: Path, what: str) -> None:
    """Rank 1 is on a machine that sees other images, or another place to write."""
    if context.rank == 1 and what == "images":
        (photos.parent / "others").mkdir()
        (photos / "0.png").rename(photos.parent / "others" / "0.png")
        photos = photos.parent / "others"
    if context.rank == 1 and what == "--out":
        out = out.with_name("elsewhere")
    embed_to_folder(Embedder.from_run(run, device="cpu"), open_source(photos), out, context=context)


@pytest.mark.parametrize("what", ["images", "--out"])
def test_machines_that_do_not_share_their_files_are_refused(run: Path, photos: Path, tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        run_ranks(embedded_apart, 2, run, photos, tmp_path / "out", what)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_on_all_ranks_when_one_dies_and_resumes_and_says_everything_once(
    run: Path, shards: ShardIndex, tmp_path: Path
) -> None:
    options = ["--run", str(run), "--data", str(shards.root), "--batch-size", "3", "--device", "cpu"]
    two_ranks = functools.partial(
        run_command, "dist_proxygml/embed.py", *options, "--out", str(tmp_path / "2"), num_ranks=2, OMP_NUM_THREADS="1"
    )
    killed = two_ranks(DIST_PROXYGML_FAULT="embed.batch@1:2:kill9")
    assert killed.returncode == 75, killed.stderr
    assert "error: another rank has gone or does not answer, says rank 0" in killed.stderr
    assert "Traceback" not in killed.stderr
    done = two_ranks()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"49 embeddings of dimension 4 by small, step 30, written to {tmp_path / '2'}\n"
    again = two_ranks()
    assert again.returncode == 2
    assert again.stderr.count("error: ") == 1
    assert "add --overwrite (on rank 0)" in again.stderr
    run_ranks(embedded, 1, run, shards.root, tmp_path / "1")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
