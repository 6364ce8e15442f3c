"""The commands of docs/tutorial.md, as they stand there, on a folder of photographs; then the Python examples.

Only training gets overrides, for time: a small network with random weights, since none can be fetched, and few steps.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.data.index import open_index
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize
from tests.harness import free_port

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = 16
SHORT = (
    "backbone.name=torchvision/resnet18",
    "backbone.pretrained=null",
    "backbone.embedding_dim=32",
    "data.train_transform.size=64",
    "data.test_transform.resize=64",
    "data.test_transform.size=64",
    "data.num_workers=0",
    "proxies.ratio=0.3",
    "training.max_steps=3",
    "training.batch_size=16",
    "evaluation.kmeans_seeds=1",
)


def sections() -> list[str]:
    """The numbered sections of the tutorial."""
    return re.findall(r"^## \d\. .*?(?=^## |\Z)", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The first command of each of them."""
    found = []
    for section in sections():
        block = re.search(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        assert block is not None, section
        found.append(shlex.split(block[1].replace("\\\n", " ")))
    return found


def python_examples(document: str) -> list[str]:
    """The examples that need a trained model, and so are marked py, not python."""
    return re.findall(r"^```py\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def export_images(folder: Path) -> None:
    """Embedded images of some classes, in a folder for each class."""
    index = open_index(ROOT / "shards" / "demo", "test")
    images = ShardImages(index, Resize(1))
    for label in range(NUM_CLASSES):
        place = folder / index.classes[label].name
        place.mkdir(parents=True)
        for number, sample in enumerate(np.flatnonzero(index.labels == label).tolist()):
            pixels = images.image(sample).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(place / f"{number}.png")


@pytest.mark.timeout(600)
def test_the_tutorial_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_images(tmp_path / "photos")
    classes = sorted((tmp_path / "photos").iterdir())
    num_images = len(list((tmp_path / "photos").rglob("*.png")))
    num_tested = sum(len(list(folder.iterdir())) for folder in classes[NUM_CLASSES // 2 :])
    query = sorted((tmp_path / "photos").rglob("*.png"))[7]
    for name in ("query.jpg", "a.jpg", "b.png"):  # files are known by their content
        (tmp_path / name).write_bytes(query.read_bytes())
    for folder in ("launchers", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    told = []
    for command in commands():
        if command[0] == "deepspeed":
            command = [*command[:1], "--master_port", str(free_port()), *command[1:], *SHORT]  # --set stands last
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        told.append(done.stdout)
    build, train, report, embed, index, search = told

    assert f"train: {num_images - num_tested} images, {NUM_CLASSES // 2} classes, 1 shards," in build
    assert f"images of {NUM_CLASSES // 2} classes to train on" in train
    for table in (train, report):
        assert re.search(r"^percent +Recall@1 .*\nbefore training .*\nafter training ", table, re.MULTILINE)
        assert f"report: {tmp_path}/runs/photos/report.html" in table
    assert embed == f"{num_images} embeddings of dimension 32 by photos, step 3, written to embeddings/photos\n"
    assert index == (
        f"flat index of {num_images} rows of dimension 32, written to indexes/photos\n"
        "recall@10 against an exact search: 1.0000\n"
    )
    lines = search.splitlines()
    assert lines[0] == "query.jpg"
    assert lines[1] == f"   1   1.0000  {query.relative_to(tmp_path / 'photos')}"
    assert len(lines) == 6
    assert (tmp_path / "found.html").read_text().count("<img ") == 6

    # The numbers are the evaluation's: those of the test classes, found by label in the run's own table.
    stored = np.load(tmp_path / "runs" / "photos" / "embeddings" / "step-000003.npz")["embeddings"]
    rows = np.load(tmp_path / "embeddings" / "photos" / "embeddings.npy")
    nearest = np.linalg.norm(rows[:, None] - stored[None], axis=2).min(axis=0)
    assert len(stored) == num_tested
    assert nearest.max() < 1e-5

    monkeypatch.chdir(tmp_path)
    (example,) = python_examples("docs/retrieval.md")
    exec(compile(example.replace("runs/wide", "runs/photos"), "example", "exec"), {})  # the run of the tutorial
