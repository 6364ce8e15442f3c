"""Re-identification: names to persons and cameras, and cameras from the index to the evaluation."""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.datasets import PUBLISHED_COUNTS, count_images
from dist_proxygml.data.index import open_index
from dist_proxygml.data.reid import read_market1501, read_msmt17
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.embedding_pass import PassSettings, Split
from dist_proxygml.evaluation.evaluator import EvaluationResult, Settings, evaluate
from dist_proxygml.reporting.page import format_metrics
from dist_proxygml.shard import main
from tests.raw_downloads import market1501, msmt17, samples_of, write_image, write_lines
from tests.shards_of_noise import SIDE, Projection


@pytest.fixture
def market(tmp_path: Path) -> Path:
    market1501(tmp_path)
    return tmp_path / "Market-1501-v15.09.15"


@pytest.fixture
def shards(market: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    assert main(["build", "market1501", "--data", str(market), "--out", str(out), "--allow-partial"]) == 0
    return out


def evaluated(shards: Path, *, gallery: bool = True) -> EvaluationResult:
    return evaluate(
        Projection(),
        Split(open_index(shards, "query")),
        PassSettings(build_transform(ResizeConfig(name="resize", size=SIDE))),
        context=single_process(),
        gallery=Split(open_index(shards, "gallery")) if gallery else None,
        settings=Settings(recall_at=(1,), kmeans_seeds=(), exclude_same="camera"),
    )


def test_persons_and_cameras_are_those_of_the_names(market: Path) -> None:
    write_image(market / "bounding_box_test" / "-1_c1s1_000401_03.jpg", 1)  # junk
    dataset = read_market1501(market, allow_partial=True)
    assert [(i.split, i.source_id, i.class_name, i.info["camera"]) for i in dataset.images] == [
        ("train", 2, "0002", 1),
        ("train", 2, "0002", 2),
        ("train", 7, "0007", 6),
        ("query", 1, "0001", 1),
        ("query", 3, "0003", 3),
        ("gallery", 0, "distractors", 1),
        ("gallery", 0, "distractors", 4),
        ("gallery", 1, "0001", 1),
        ("gallery", 1, "0001", 2),
        ("gallery", 3, "0003", 5),
    ]
    assert dataset.notes == ("1 junk images (-1) were left out, as the protocol ignores them",)


def test_the_published_number_of_images_is_insisted_on(market: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="market1501 train: expected 12936 images of 751 classes"):
        read_market1501(market)
    counts = count_images(read_market1501(market, allow_partial=True))
    monkeypatch.setitem(PUBLISHED_COUNTS, "market1501", counts)  # type: ignore[index]
    assert len(read_market1501(market).images) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("query/0001.jpg", "expected a name like 0002_c1s1_000451_03.jpg, got query/0001.jpg"),
        ("query/1_c1.jpg", "expected a name like"),
        ("query/0000_c1s1_1.jpg", "is a distractor"),
        ("query/0002_c1s1_000000_00.jpg", "class 2 .* is in train and"),
    ],
)
def test_names_that_say_no_person_or_a_wrong_one_are_refused(market: Path, name: str, message: str) -> None:
    write_image(market / name, 1)
    with pytest.raises(ValueError, match=message):
        read_market1501(market, allow_partial=True)


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_both_releases_of_msmt17_are_read_and_its_persons_told_apart(tmp_path: Path, folders: tuple[str, str]) -> None:
    partial(msmt17, folders=folders)(tmp_path)
    dataset = read_msmt17(tmp_path, allow_partial=True)
    assert [(i.split, i.source_id, i.info["camera"]) for i in dataset.images] == [
        ("train", "train/0000", 1),
        ("train", "train/0001", 15),
        ("train", "train/0001", 2),  # of list_val.txt
        ("query", "test/0000", 4),
        ("query", "test/0001", 5),
        ("gallery", "test/0000", 12),
        ("gallery", "test/0001", 5),
    ]
    assert all(image.name.startswith(folders) for image in dataset.images)


@pytest.mark.parametrize("line", ["0000/0000_000.jpg 0", "0000/0000_000_01_x.jpg zero"])
def test_a_line_of_msmt17_without_person_or_camera_is_refused(tmp_path: Path, line: str) -> None:
    msmt17(tmp_path)
    write_lines(tmp_path / "MSMT17_V1" / "list_query.txt", [line])
    with pytest.raises(ValueError, match=r"list_query\.txt: expected a line like"):
        read_msmt17(tmp_path, allow_partial=True)


def test_cameras_are_in_the_index_in_the_order_of_the_samples(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cameras(split: str) -> list[int]:
        found = open_index(shards, split).cameras
        assert found is not None
        return found.tolist()

    expected = {
        split: [json.loads(sample["json"])["camera"] for sample in samples_of(shards, split)]
        for split in ("train", "query", "gallery")
    }
    assert {split: cameras(split) for split in expected} == expected
    assert expected["gallery"] != sorted(expected["gallery"])  # shuffled
    assert main(["info", str(shards)]) == 0
    assert "4 cameras" in capsys.readouterr().out  # of the gallery
    assert open_index(shards, "train").choose_classes(np.array([1]), name="validation").cameras == [6]
    # The index is made again of the tars alone.
    for path in shards.glob("index.*"):
        path.unlink()
    assert main(["index", str(shards)]) == 0
    assert {split: cameras(split) for split in expected} == expected


def test_cameras_of_other_samples_are_damage(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = shards / "index.cameras.query.npy"
    whole = table.read_bytes()
    table.write_bytes(whole[:-1] + b"\x07")
    assert main(["verify", str(shards)]) == 1
    assert "index.cameras.query.npy does not belong to" in capsys.readouterr().err
    table.unlink()
    assert main(["verify", str(shards)]) == 1
    assert "index.cameras.query.npy is missing" in capsys.readouterr().err
    np.save(table, np.array([[1, 1]]))
    document = json.loads((shards / "index.json").read_text())
    document["splits"]["query"]["cameras"]["sha256"] = hashlib.sha256(table.read_bytes()).hexdigest()
    (shards / "index.json").write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"index\.cameras\.query\.npy: expected the cameras of 2 samples, got \(1, 2\)"
    ):
        open_index(shards, "query")


def test_an_evaluation_leaves_out_the_own_camera_by_the_index(shards: Path) -> None:
    result = evaluated(shards)
    assert result.table is not None
    rows, labels = result.table.embeddings.double().numpy(), result.table.labels.numpy()
    cameras = np.concatenate([open_index(shards, split).cameras for split in ("query", "gallery")])  # type: ignore[misc]
    precisions = []
    for query in range(2):
        junk = (labels[2:] == labels[query]) & (cameras[2:] == cameras[query])
        order = np.argsort(-(rows[2:] @ rows[query]), kind="stable")
        order = order[~junk[order]]
        rank = 1 + (labels[2:][order] == labels[query]).argmax()
        precisions.append(1 / rank)  # one right answer is left to each
    assert result.metrics["map"] == sum(precisions) / 2
    assert result.num_queries == 2
    table = format_metrics({"after": result.metrics}, with_map=result.is_across_cameras)
    assert table.splitlines()[0].split()[-1] == "MAP"
    assert table.splitlines()[1].split()[-1] == f"{100 * result.metrics['map']:.2f}"


def test_shards_without_cameras_are_refused_with_the_remedy(shards: Path) -> None:
    document = json.loads((shards / "index.json").read_text())
    del document["splits"]["gallery"]["cameras"]
    (shards / "index.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"exclude_same expects .* for split 'gallery'; build the shards"):
        evaluated(shards)
