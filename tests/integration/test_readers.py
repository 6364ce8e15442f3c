"""What every reader builds can be trained on and evaluated."""

import json
from pathlib import Path

import pytest

from dist_proxygml.config import parse_config
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.shard import main
from dist_proxygml.training.run import train
from tests.harness import run_ranks
from tests.raw_readers import READERS

NUM_STEPS = 5


def train_on(context: ParallelContext, shards: Path, test_split: str, gallery_split: str | None) -> Path:
    raw = {
        "name": "readers",
        "runs_dir": str(shards.parent / "runs"),
        "data": {
            "shards": str(shards),
            "test_split": test_split,
            "num_workers": 0,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 4, "options": {"width": 4}},
        "proxies": {"ratio": 0.9},
        "optimizer": {"backbone_lr": 1e-3, "proxies_lr": 1e-2},
        "training": {"epochs": 9, "max_steps": NUM_STEPS, "batch_size": 2},
        "evaluation": {"gallery_split": gallery_split, "kmeans_seeds": 0, "recall_at": [1]},
        "telemetry": {"progress_bar": False, "log_every_steps": 1},
    }
    return train(parse_config(raw, source="the test"), context)


OFTEN = ("imagefolder", "recordio", "table")  # the others are built by tests of their own, and trained on alike


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.ci) for name in READERS]
)
def test_what_a_reader_builds_is_trained_on_for_five_steps(name: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (tmp_path / "raw").mkdir()
    assert main(["build", *READERS[name](tmp_path / "raw"), "--out", str(shards)]) == 0
    assert main(["verify", "--deep", str(shards)]) == 0
    splits = json.loads((shards / "index.json").read_text())["splits"]
    pair = ("query", "gallery") if "query" in splits else ("test", None)
    (run,) = run_ranks(train_on, 1, shards, *pair, timeout=180)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, NUM_STEPS + 1))
    *_, evaluation = [line for line in lines if line["kind"] == "evaluation"]
    assert evaluation["step"] == NUM_STEPS
