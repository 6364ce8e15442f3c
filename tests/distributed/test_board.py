"""A whole run on two ranks, read back from TensorBoard's files: what is there, once, however often it was started."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from dist_proxygml.config import Config
from dist_proxygml.distributed.parallel import ParallelContext, run_on_rank_zero
from dist_proxygml.training.board import _is_shown, _names
from dist_proxygml.training.run import train
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import configuration, read_board

CLASS_SIZES = [5, 4, 6]  # 15 images: three steps an epoch, the last one of three images
EVALUATED = [0, 3, 6]


def configure(root: Path) -> Config:
    transform = {"name": "resize", "size": 8}
    return configuration(
        "shown",
        root / "runs",
        len(CLASS_SIZES),
        data={
            "shards": str(root / "noise"),
            "train_split": "test",  # the only one that the noise shards have
            "num_classes": len(CLASS_SIZES),
            "num_workers": 0,
            "train_transform": transform,
            "test_transform": transform,
        },
        proxies={"per_class": 2, "topk": 4},
        training={"epochs": 2, "batch_size": 6},
        evaluation={"kmeans_seeds": 0, "recall_at": [1, 2], "allow_seen_classes": True},
        checkpoint={"every_steps": 2},
        telemetry={"progress_bar": False, "log_every_steps": 1, "projector": 12},
    )


def files_of(run: Path, kind: str) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted((run / kind).glob("*.json"))}


def train_and_go_on(context: ParallelContext, root: Path) -> list[dict[str, Any]]:
    """Train to the end; lose the last steps and go on; start once more, with nothing to do."""
    config = configure(root)
    run, found = config.run_directory, []
    for number in range(3):
        if number == 1:
            run_on_rank_zero(context, shutil.rmtree, run / "checkpoints" / "step-000006")
            run_on_rank_zero(context, (run / "proxies" / "step-000005.json").touch)  # of a step that is lost as well
        train(config, context)
        written = os.stat(run / "tensorboard" / "projector_config.pbtxt").st_mtime_ns
        found.append({"proxies": files_of(run, "proxies"), "projector written": written})
    return found


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("board")
    write_noise_shards(root / "noise", CLASS_SIZES)
    return root / "runs" / "shown", run_ranks(train_and_go_on, 2, root, timeout=180)[0]


@pytest.mark.timeout(240)
def test_every_point_stands_there_once(starts: tuple[Path, Any]) -> None:
    run, _ = starts
    board = read_board(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind, steps in (("train", [1, 2, 3, 4, 5, 6]), ("evaluation", EVALUATED)):
        own = [line for line in lines if line["kind"] == kind]
        assert [line["step"] for line in own] == steps
        left_out = {"kind", "step", "epoch", "classification", "regularization", "lr_embedding"}  # or 0
        for name in own[0].keys() - left_out:
            points = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
            expected = [(line["step"], line[name]) for line in own]
            np.testing.assert_allclose(points, expected, rtol=1e-6, err_msg=name)
    tags = board.Tags()
    assert set(tags["histograms"]) == {
        "train/kept_positive_similarity",
        "train/kept_negative_similarity",
        "train/embedding_norm",
        "proxies/norm",
        "proxies/times_kept_as_negative",
    }
    for tag in tags["histograms"]:
        steps = [1, 2, 3, 4, 5, 6] if tag.startswith("train") else [3, 6]
        assert [event.step for event in board.Histograms(tag)] == steps, tag
    assert [event.step for event in board.Images("evaluation/retrieval")] == EVALUATED
    assert [event.step for event in board.Images("train/images")] == [0]
    assert [event.step for event in board.Scalars("proxies/dead_share")] == [6]  # none is dead before


def test_histograms_hold_a_steps_pairs_of_all_ranks(starts: tuple[Path, Any]) -> None:
    board = read_board(starts[0])
    images = [6, 6, 3, 6, 6, 3]
    for tag, per_image in (("positive", 2), ("negative", 2)):
        events = board.Histograms(f"train/kept_{tag}_similarity")
        assert [event.histogram_value.num for event in events] == [per_image * number for number in images]
    norms = [event.histogram_value for event in board.Histograms("train/embedding_norm")]
    assert all(norm.num in (1, 2, 3) for norm in norms)  # rank 0's images
    assert not any(abs(norm.max - 1) < 1e-3 for norm in norms)  # before they are brought to unit length
    assert [event.histogram_value.num for event in board.Histograms("proxies/norm")] == [6, 6]
    last = board.Images("evaluation/retrieval")[-1]
    assert (last.height, last.width) == (10 * 72, 9 * 72)


def test_the_run_is_one_row_of_hparams_with_its_final_metrics(starts: tuple[Path, Any]) -> None:
    run, _ = starts
    board = read_board(run)
    final = json.loads((run / "evaluation" / "step-000006.json").read_text())["metrics"]
    for name, value in final.items():
        last = board.Scalars(f"evaluation/{name}")[-1]
        assert (last.step, last.value) == (6, pytest.approx(value))
    assert len(board.PluginTagToContent("hparams")) == 3
    folders = {path.parent for path in (run / "tensorboard").rglob("events.out.*")}
    assert folders == {run / "tensorboard"}  # one run for TensorBoard
    counts = Counter(
        value.tag
        for path in (run / "tensorboard").glob("events.out.*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag.startswith("_hparams_")
    )
    assert counts["_hparams_/session_start_info"] == counts["_hparams_/experiment"] == 1


def test_the_projector_is_written_once_after_the_last_evaluation(starts: tuple[Path, Any]) -> None:
    run, (first, second, third) = starts
    assert first["projector written"] == second["projector written"] == third["projector written"]
    assert [folder.name for folder in (run / "tensorboard" / "projector").iterdir()] == ["step-000006"]
    folder = run / "tensorboard" / "projector" / "step-000006"
    assert len((folder / "metadata.tsv").read_text().splitlines()) == 1 + 12
    assert Image.open(folder / "sprite.png").size == (4 * 64, 4 * 64)


def test_statistics_of_the_proxies_are_written_at_every_evaluation(starts: tuple[Path, Any]) -> None:
    first, second, third = (start["proxies"] for start in starts[1])
    assert list(first) == ["step-000003.json", "step-000006.json"]  # there is no window before the first step
    for name, step in (("step-000003.json", 3), ("step-000006.json", 6)):
        found = first[name]
        assert (found["step"], found["window_steps"], found["num_images"]) == (step, 3, 15)
        assert (found["num_classes"], found["per_class"]) == (3, 2)
        assert sum(found["kept_positive"]["counts"]) == sum(found["kept_negative"]["counts"]) == 30
        for dead in found["dead_examples"]:
            assert dead["name"] == f"pattern {dead['class']} <&>"
        assert found["num_dead"] == len(found["dead_examples"])
    assert list(second) == list(first)
    # the window of a run that goes on begins where it does: after step 4 of 6
    assert second["step-000003.json"] == first["step-000003.json"]
    assert (second["step-000006.json"]["window_steps"], second["step-000006.json"]["num_images"]) == (2, 9)
    assert third == second


def test_histograms_become_rarer() -> None:
    shown = [number for number in range(1, 100_001) if _is_shown(number)]
    assert shown[:127] == list(range(1, 128))
    assert shown[127:130] == [128, 130, 132]
    assert len(shown) == 737
    assert _is_shown(65_536)
    assert not _is_shown(65_537)


def test_names_are_read_of_the_classes_that_are_asked_for(tmp_path: Path) -> None:
    table = tmp_path / "classes.jsonl"
    table.write_text('["a", 1, 5]\n["b c", 2, 5]\n["d", 3, 5]\nnever read')
    assert _names(table, [0, 2]) == ["a", "d"]
    assert _names(table, [1, 1]) == ["b c", "b c"]  # two proxies of a class
    assert _names(tmp_path / "none", [4, 7]) == ["4", "7"]  # a stream has no class table
