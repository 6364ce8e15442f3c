"""What is exported of a network of timm's opens in timm and gives the same numbers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config

from dist_proxygml import Embedder
from dist_proxygml.backbones import timm_folder
from dist_proxygml.checkpoint.model import open_trained
from dist_proxygml.inference.export_folder import export
from tests.trained_runs import write_finished_run

CROP = {"name": "center_crop", "size": 32, "resize": 40}


def exported(folder: Path, backbone: dict[str, Any], *, transform: dict[str, Any] = CROP, **changes: Any) -> Path:
    data = {"shards": "unused", "num_classes": 3, "train_transform": {"name": "resize", "size": 32}}
    data["test_transform"] = transform
    run = write_finished_run(folder / "runs", backbone={"embedding_dim": 5, **backbone}, data=data, **changes)
    export_without_bank(run, folder / "export")
    return folder / "export"


def export_without_bank(run: Path, out: Path) -> None:
    """The runs of these tests have no bank."""

    class Bank:
        shape = (3, 2, 5)

        def parts(self) -> list[tuple[int, int]]:
            return [(0, 3)]

        def read_(self, rows_xND: torch.Tensor, *, first: int) -> None:
            rows_xND.fill_(first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_proxygml.checkpoint.model.TrainedModel.bank", lambda self: Bank())
        export(run, out)


def noise(count: int = 3) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def features(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """As timm's users do it."""
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        return network((images / 255 - mean) / std)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {"drop_rate": 0.2}),
        ("test_convnext", {}),
        ("test_vit", {"img_size": 32}),
    ],
)
def test_a_model_of_timm_s_gives_the_embeddings_before_they_have_length_1(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    folder = exported(tmp_path, {"name": f"timm/{name}", "options": options})
    assert open_trained(folder).export["timm_embedding"] == "classifier"
    expected = Embedder.from_run(folder, device="cpu").embed_prepared(noise())
    np.testing.assert_allclose(F.normalize(features(folder, noise())), expected, atol=2e-6)
    description = json.loads((folder / "config.json").read_text())
    assert (description["architecture"], description["num_classes"]) == (name, 5)


def test_an_embedding_that_timm_has_no_place_for_stays_beside_the_trunk(tmp_path: Path) -> None:
    folder = exported(
        tmp_path, {"name": "timm/deit_tiny_distilled_patch16_224", "options": {"img_size": 32, "depth": 1}}
    )
    assert open_trained(folder).export["timm_embedding"] == "beside"
    check_card(folder)


def test_weights_that_timm_would_use_otherwise_are_not_called_its_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm_folder, "_agrees", lambda *_: False)
    folder = exported(tmp_path, {"name": "timm/test_resnet"})
    assert open_trained(folder).export["timm_embedding"] == "beside"
    check_card(folder)


def test_a_classifier_is_tried_before_it_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def other_head(*given: Any, num_classes: int, **options: Any) -> torch.nn.Module:
        network = create(*given, num_classes=num_classes, **options)
        if num_classes:
            network.forward_head = lambda maps: network.fc(2 * maps.mean(dim=(2, 3)))
        return network

    monkeypatch.setattr(timm_folder.timm, "create_model", other_head)
    folder = exported(tmp_path, {"name": "timm/test_resnet"})
    assert open_trained(folder).export["timm_embedding"] == "beside"


def check_card(folder: Path) -> None:
    """The card's last block gives the embeddings."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert "timm.create_model" in blocks[-1]
    names: dict[str, Any] = {"images": noise().numpy()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(blocks[-1], "card", "exec"), names)
    expected = Embedder.from_run(folder, device="cpu").embed_prepared(noise())
    np.testing.assert_allclose(names["embeddings"], expected, atol=2e-6)


def test_the_card_s_code_for_timm_gives_the_embeddings(tmp_path: Path) -> None:
    check_card(exported(tmp_path, {"name": "timm/test_resnet"}))


@pytest.mark.parametrize(
    "transform", [CROP, CROP | {"interpolation": "bicubic"}, {"name": "resize", "size": 32, "interpolation": "bicubic"}]
)
def test_the_card_prepares_images_as_the_run_does(tmp_path: Path, transform: dict[str, Any]) -> None:
    folder = exported(tmp_path, {"name": "timm/test_resnet"}, transform=transform)
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    pixels = np.random.default_rng(0).integers(0, 256, (61, 50, 3), dtype=np.uint8)
    for name in ("first.png", "second.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(compile(blocks[0], "card", "exec"), names)
    expected = Embedder.from_run(folder, device="cpu").transform([torch.from_numpy(pixels).permute(2, 0, 1)], ())[0]
    difference = names["images"][0].astype(int) - expected.numpy().astype(int)
    assert abs(difference).max() <= 2  # Pillow rounds otherwise


def test_a_layer_norm_is_in_the_card_and_a_generalised_mean_is_not_written(tmp_path: Path) -> None:
    folder = exported(tmp_path / "norm", {"name": "timm/test_resnet", "embedding_norm": "layer_norm"})
    assert open_trained(folder).export["timm_embedding"] == "beside"
    check_card(folder)
    folder = exported(tmp_path / "gem", {"name": "timm/test_resnet", "pooling": "gem"})
    assert open_trained(folder).export["timm_embedding"] is None
    Embedder.from_run(folder, device="cpu").embed_prepared(noise())


@pytest.mark.parametrize("transform", [CROP, {"name": "resize", "size": 32}, CROP | {"interpolation": "bicubic"}])
def test_timm_prepares_an_image_as_the_run_does_or_nearly(tmp_path: Path, transform: dict[str, Any]) -> None:
    folder = exported(tmp_path, {"name": "timm/test_resnet"}, transform=transform)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    prepare = create_transform(**resolve_data_config({}, model=network))
    ramp = np.linspace(0, 255, 80 * 64).reshape(80, 64)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2).astype(np.uint8))
    with torch.inference_mode():
        found = F.normalize(network(prepare(image)[None]))
    expected = Embedder.from_run(folder, device="cpu").embed(image)
    assert float((found.numpy() * expected).sum()) > 0.999


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "timm/test_resnet", "options": {"out_indices": [2]}},
        {"name": "timm/test_resnet", "pool": 2},
        {"name": "torchvision/resnet18"},
        {"name": "small_cnn"},
    ],
)
def test_what_is_no_whole_network_of_timm_s_is_not_written_for_it(tmp_path: Path, backbone: dict[str, Any]) -> None:
    folder = exported(tmp_path, backbone)
    assert open_trained(folder).export["timm_embedding"] is None
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "config.json").exists()
