"""What makes an exported file pass or fail: embeddings, Recall@1, whether it runs; and which images decide that."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.config import BackboneConfig, Config, load_config, load_run_config
from dist_proxygml.data import remote
from dist_proxygml.inference import export_check
from dist_proxygml.inference.export_check import (
    CheckImages,
    ExportDiffersError,
    FileCheck,
    check_file,
    check_images,
    embed_all,
    format_checks,
    original_backbone,
)
from dist_proxygml.training.data import open_split
from tests.trained_runs import configuration, write_finished_run

DEMO = Path(__file__).parents[2] / "shards" / "demo"


def unit_rows(*degrees: float) -> Tensor:
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def images_of(labels: list[int] | None, count: int) -> CheckImages:
    """Images whose first pixel is their number, so that an `embed` knows which one it got."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 1, 1)
    return CheckImages(images, None if labels is None else torch.tensor(labels), "images of the test")


def check(original_nD: Tensor, exported_nD: Tensor, labels: list[int] | None) -> FileCheck:
    def embed(images: Tensor) -> Tensor:
        return exported_nD[images[:, 0, 0, 0].long()]

    images = images_of(labels, len(original_nD))
    return check_file(lambda: embed, original_nD, images, file="a.onnx", format="onnx", precision="float32")


def test_equal_embeddings_pass_and_recall_counts_by_hand() -> None:
    # Nearest to 0, 10, 25, 45, 70 degrees are 10, 0, 10, 25, 45: wrong for the third only. The sixth is alone.
    rows = unit_rows(0, 10, 25, 45, 70, 180)
    found = check(rows, rows, [0, 0, 1, 1, 1, 2])
    assert (found.largest_difference, found.recall_at_1, found.recall_at_1_exported) == (0.0, 4 / 5, 4 / 5)
    assert found.recall_difference == 0.0
    assert found.num_images == 6
    assert found.passed


def test_an_embedding_that_is_off_by_more_than_the_limit_fails() -> None:
    rows = unit_rows(0, 10, 90, 100)
    for offset, passes in ((0.9e-4, True), (1.2e-4, False), (math.nan, False)):
        other = rows.clone()
        other[2, 1] += offset
        found = check(rows, other, [0, 0, 1, 1])
        assert found.passed is passes, offset
        assert check(rows, other, None).passed is passes  # also where images have no labels
    assert math.isnan(found.largest_difference)
    assert found.recall_at_1_exported is None
    assert "TOO FAR" in format_checks([found])


def test_another_nearest_neighbour_fails_though_the_embeddings_are_close() -> None:
    # The second is nearer to the first by 0.004 degrees, then to the third: 7e-5 in an embedding, 2e-5 in similarity.
    original, exported = unit_rows(0, 19.998, 40), unit_rows(0, 20.002, 40)
    found = check(original, exported, [0, 0, 1])
    assert found.largest_difference < export_check.LIMIT
    assert (found.recall_at_1, found.recall_at_1_exported) == (1.0, 0.5)
    assert not found.passed


def test_the_last_bit_does_not_decide_what_is_a_tie_either() -> None:
    # The second image leads by TIE less or more than nothing, so that one of both sides calls it right.
    for lead, other in ((-1.1e-5, -0.9e-5), (-0.9e-5, -1.1e-5)):
        original, exported = (
            F.normalize(torch.tensor([[0.6 + side, 0.8], [1.0, 0.0], [0.6, -0.8]], dtype=torch.float64)).float()
            for side in (lead * 0.64**-1, other * 0.64**-1)
        )
        found = check(original, exported, [0, 0, 1])
        assert found.recall_difference == 0.0
        assert found.passed


def test_two_copies_of_an_image_do_not_decide() -> None:
    # The first and the third are one image in two classes; the last bit says which one the second is nearer to.
    original = unit_rows(0, 10, 0)
    exported = original.clone()
    exported[2, 0] -= 1e-6
    found = check(original, exported, [0, 1, 1])
    assert found.recall_at_1 == found.recall_at_1_exported
    assert found.passed


def test_a_file_that_does_not_run_or_gives_something_else_is_no_export() -> None:
    rows = unit_rows(0, 10)
    images = images_of([0, 0], 2)

    def broken() -> export_check.Embed:
        raise RuntimeError("no kernel for Foo(99)")

    with pytest.raises(ExportDiffersError, match=r"a\.onnx.*: no kernel for Foo\(99\)"):
        check_file(broken, rows, images, file="a.onnx", format="onnx", precision="float32")
    with pytest.raises(ExportDiffersError, match=r"a\.onnx.*torch\.float32 \[2, 1\].*float32 \[2, 2\]"):
        check(rows, rows[:, :1], [0, 0])
    with pytest.raises(ExportDiffersError, match=r"torch\.float64"):
        check(rows, rows.double(), [0, 0])


def test_batches_are_of_several_sizes_and_in_order() -> None:
    for count, expected in ((1, [1]), (3, [1, 2]), (80, [1, 5, 64, 10]), (70, [1, 5, 64])):
        sizes = []

        def embed(images: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(images))
            return images[:, 0, 0].float()

        images = images_of(None, count).images
        torch.testing.assert_close(embed_all(embed, images, name="x", first_batches=(1, 5)), images[:, 0, 0].float())
        assert sizes == expected


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "small_cnn", "pool": 2, "options": {"width": 4}},
        {"name": "torchvision/resnet18", "options": {"return_node": "layer1"}},
        {"name": "timm/vit_tiny_patch16_224", "options": {"img_size": 16, "depth": 2}},
    ],
    ids=lambda backbone: backbone["name"],
)
def test_weights_in_safetensors_come_back_into_a_backbone_of_each_family(
    backbone: dict[str, Any], tmp_path: Path
) -> None:
    config = config_on("unused").model_copy(update={"backbone": BackboneConfig(embedding_dim=4, **backbone)})
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        trained = build_backbone(config.backbone)
        trained(torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8))  # statistics of its own
        save_file(trained.state_dict(), tmp_path / "backbone.safetensors")
    embed = original_backbone(config, tmp_path)
    assert not embed.training
    assert torch.equal(torch.get_rng_state(), before)
    for count in (1, 5):
        images = check_images(config).images[:count]
        with torch.no_grad():
            assert torch.equal(embed(images), trained.eval()(images))


# ---- images ----------------------------------------------------------------------------------------------------------


def config_on(shards: Path | str) -> Config:
    config = configuration("run", Path("runs"), 7)
    return config.model_copy(update={"data": config.data.model_copy(update={"shards": str(shards)})})


def test_the_sample_is_made_of_whole_classes_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "NUM_IMAGES", 40)
    monkeypatch.setattr(export_check, "IMAGES_PER_CLASS", 5)
    sample = check_images(config_on(DEMO))
    assert sample.labels is not None
    assert sample.images.shape == (40, 3, 16, 16)
    assert sample.images.dtype == torch.uint8
    _, counts = np.unique(sample.labels, return_counts=True)
    assert counts.max() == 5
    assert (counts >= 4).sum() >= len(counts) - 1  # the last class may be cut
    assert sample.source == f"40 images of {len(counts)} classes of demo, split test"
    again = check_images(config_on("nowhere"), data=str(DEMO))
    assert torch.equal(again.images, sample.images)
    assert torch.equal(again.labels, sample.labels)


def test_images_are_those_that_an_evaluation_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_proxygml.data.index import open_index
    from dist_proxygml.data.pipeline import build_evaluation_loader
    from dist_proxygml.data.transforms import Resize

    index = open_index(DEMO, "test")
    monkeypatch.setattr(export_check, "NUM_IMAGES", 6)
    sample = check_images(config_on(DEMO))
    all_images = torch.cat([batch.images for batch in build_evaluation_loader(index, Resize(16), batch_size=512)])
    of_class = all_images[torch.from_numpy(index.labels) == sample.labels[0]]
    assert any(torch.equal(image, sample.images[0]) for image in of_class)


def test_without_shards_images_are_random_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    sample = check_images(config_on("/secret/folder"))
    assert sample.labels is None
    assert sample.images.shape == (64, 3, 16, 16)
    assert sample.source == "64 random images, as the run's test images were not there"
    assert "the run's own cannot be had" in capsys.readouterr().err
    assert "/secret/folder" not in sample.source
    with pytest.raises(ValueError, match="nowhere"):  # what was asked for by name must be there
        check_images(config_on("unused"), data="nowhere")


def test_no_command_runs_that_the_folder_of_a_run_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.0)
    run = write_finished_run(tmp_path)
    command = f"pipe:touch {tmp_path}/pwned #{{}}"
    stored = json.loads((run / "config.json").read_text())
    stored["data"]["shards"] = command
    (run / "config.json").write_text(json.dumps(stored))
    config = load_run_config(run)
    assert check_images(config).labels is None
    assert "expected a location that runs no command" in capsys.readouterr().err
    with pytest.raises(ValueError, match="out of a file"):
        open_split(config, "test")
    assert not (tmp_path / "pwned").exists()
    for typed in (load_run_config(run, [f"data.shards={command}"]), load_config(run / "config.json")):
        (tmp_path / "pwned").unlink(missing_ok=True)
        with pytest.raises(ValueError, match="could not be fetched"):
            open_split(typed, "test")
        assert (tmp_path / "pwned").exists()


def test_embeddings_of_random_images_are_compared_without_recall() -> None:
    rows = F.normalize(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    found = check(rows, rows, None)
    assert (found.recall_at_1, found.recall_difference, found.passed) == (None, None, True)
    assert format_checks([found]).splitlines()[1].split()[-3:] == ["-", "-", "-"]
