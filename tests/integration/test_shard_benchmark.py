"""The benchmark of building shards, at a size that takes no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(240)
def test_the_benchmark_of_shards_times_tar_and_every_number_of_workers(tmp_path: Path) -> None:
    sizes = ("--num-images", "61", "--repeats", "1", "--workers", "1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.shards", *sizes, "--json", tmp_path / "rows.jsonl", "--folder", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["way"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert list(rows) == ["tar", "build 1", "command 1"]
    assert rows["tar"]["of_tar"] == 1
    assert 0 < rows["build 1"]["seconds"] < rows["command 1"]["seconds"]
    assert rows["tar"]["bytes"] > 61 * 50_000
    assert "of tar's rate or more" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]  # the images are gone
