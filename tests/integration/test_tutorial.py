"""The commands of docs/tutorial.md, as they stand there, on a table of photographs; then the Python examples.

Only training gets overrides, for time: few steps.
"""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.config import load_config
from dist_proxygml.data.index import open_index
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = 16
SHORT = ("training.max_steps=3", "evaluation.kmeans_seeds=1")


def commands() -> list[list[str]]:
    """The commands of the tutorial's blocks, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def python_examples(document: str) -> list[str]:
    """The examples that need a trained model, and so are marked py, not python."""
    return re.findall(r"^```py\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def export_images(folder: Path) -> int:
    """Embedded images of some classes in one folder, and beside it a table of them; returns how many there are."""
    index = open_index(ROOT / "shards" / "demo", "test")
    images = ShardImages(index, Resize(1))
    folder.mkdir()
    chosen = np.flatnonzero(index.labels < NUM_CLASSES).tolist()
    with open(folder.with_suffix(".csv"), "w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "label"])
        for number, sample in enumerate(chosen):
            name = f"{folder.name}/IMG_{number:04d}.jpg"
            pixels = images.image(sample).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize((160, 160)).save(folder.parent / name, quality=95)
            rows.writerow([name, index.classes[index.labels[sample]].name])
    return len(chosen)


def served(command: list[str], folder: Path, environment: dict[str, str], query: Path) -> dict[str, object]:
    """Start the server, ask it once for images like one, end it by Ctrl-C; returns the answer."""
    process = subprocess.Popen(
        [*command, "--port", "0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        told = ""
        while not (found := re.search(r"at (http://\S+) ", told)):
            line = process.stdout.readline()
            assert line, told
            told += line
        with urllib.request.urlopen(f"{found[1]}/api/search?k=3", data=query.read_bytes(), timeout=60) as answer:
            content: dict[str, object] = json.load(answer)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
        process.stdout.close()
    return content


@pytest.mark.timeout(900)
def test_the_tutorial_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_images = export_images(tmp_path / "photos")
    query = tmp_path / "photos" / "IMG_0007.jpg"
    for name in ("query.jpg", "a.jpg", "b.png"):  # files are known by their content
        (tmp_path / name).write_bytes(query.read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

    told: dict[str, list[str]] = {}
    answer: dict[str, object] = {}
    listed = commands()
    assert len(listed) == 9 + 2
    for command in listed:
        program = command[2].removeprefix("dist_proxygml.")
        if program == "serve":
            answer = served(command, tmp_path, environment, query)
            continue
        if program == "train":
            command = [*command, *(() if "--set" in command else ("--set",)), *SHORT]  # --set stands last
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        told.setdefault(program, []).append(done.stdout)

    half = NUM_CLASSES // 2
    found = re.findall(r"^(\w+): (\d+) images, (\d+) classes, 1 shards,", "".join(told["shard"]), re.MULTILINE)
    assert [(split, int(classes)) for split, _, classes in found] == (
        [("train", half), ("test", half), ("train", NUM_CLASSES)]
    )
    num_trained, num_tested = int(found[0][1]), int(found[1][1])
    assert num_trained + num_tested == int(found[2][1]) == num_images
    config = load_config(tmp_path / "configs" / "photos.json")
    assert "python -m dist_proxygml.train --config configs/photos.json\n" in told["init"][0]
    assert f"images of {half} classes to train on" in told["train"][0]
    for table in (told["train"][0], told["report"][0]):
        assert re.search(r"^percent +Recall@1 .*\nbefore training .*\nafter training ", table, re.MULTILINE)
        assert f"report: {tmp_path}/runs/photos/report.html" in table
    assert "written to runs/photos/evaluation/step-000003.json" in told["evaluate"][0]
    dim = config.backbone.embedding_dim
    assert told["embed"] == [
        f"{num_images} embeddings of dimension {dim} by photos, step 3, written to embeddings/photos\n"
    ]
    assert told["index"][0].startswith(
        f"flat index of {num_images} rows of dimension {dim}, written to indexes/photos\n"
        "recall@10 against an exact search: 1.0000\n"
    )
    lines = told["search"][0].splitlines()
    assert lines[:2] == ["query.jpg", "   1   1.00000  IMG_0007.jpg"]
    assert len(lines) == 6
    assert (tmp_path / "found.html").read_text().count("<img ") == 6
    matches = answer["matches"]
    assert isinstance(matches, list)
    assert [match["id"] for match in matches] == [line.split()[2] for line in lines[1:4]]
    assert f"{num_images} images of {NUM_CLASSES} classes to train on" in told["train"][1]

    # The numbers are the evaluation's: those of the test classes, found by label in the run's own table.
    stored = np.load(tmp_path / "runs" / "photos" / "embeddings" / "step-000003.npz")["embeddings"]
    rows = np.load(tmp_path / "embeddings" / "photos" / "embeddings.npy")
    nearest = np.linalg.norm(rows[:, None] - stored[None], axis=2).min(axis=0)
    assert len(stored) == num_tested
    assert nearest.max() < 1e-5

    monkeypatch.chdir(tmp_path)
    (example,) = python_examples("docs/retrieval.md")
    exec(compile(example.replace("runs/wide", "runs/photos"), "example", "exec"), {})  # the run of the tutorial
