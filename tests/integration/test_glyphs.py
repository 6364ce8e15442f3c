"""The configuration of the data set of glyphs trains on the fonts that come with matplotlib."""

import json
from pathlib import Path

import matplotlib
import pytest

from dist_proxygml.config import load_config
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.shard import main
from dist_proxygml.training.run import train
from tests.harness import run_ranks

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]
FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")


def run_of(context: ParallelContext, folder: Path) -> Path:
    # An epoch is 7 steps here, so warm-up and learning rates of a long one would not get off the ground.
    changes = [
        *(f"data.shards={folder / 'shards'}", f"runs_dir={folder / 'runs'}", "data.num_workers=0"),
        *("training.epochs=12", "schedule.warmup_steps=5", "data.train_classes=200", "telemetry.progress_bar=false"),
    ]
    return train(load_config(ROOT / "configs" / "glyphs_cpu.json", changes), context)


@pytest.mark.timeout(240)
def test_unseen_letters_are_found_across_typefaces(tmp_path: Path) -> None:
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [str(fonts / f"{name}.ttf") for name in FONTS]
    build = ["build", "glyphs", "--fonts", *files, "--out", str(tmp_path / "shards")]
    assert main(build) == 0
    splits = json.loads((tmp_path / "shards" / "index.json").read_text())["splits"]
    assert splits["train"]["num_classes"] >= 200
    assert splits["gallery"]["num_samples"] == splits["query"]["num_samples"] == splits["query"]["num_classes"]
    assert "Bitstream" in (tmp_path / "shards" / "LICENSES.txt").read_text()

    (run,) = run_ranks(run_of, 1, tmp_path, timeout=200)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line["recall@1"] for line in lines if line["kind"] == "evaluation"]
    assert after > before + 0.1
