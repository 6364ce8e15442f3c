"""A graph gives what its backbone gives, for any number of images, and tells nothing of where it was written."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_proxygml.backbones.build import EmbeddingModel, Preprocessing, build_backbone
from dist_proxygml.config import BackboneConfig
from dist_proxygml.inference import graph
from dist_proxygml.inference.graph import check_onnx, open_onnx, write_onnx

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs ONNX: pip install '.[export]'",
)

# Float32 sums in another order; measured 4e-8 to 2e-6 over all kinds of backbones.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def build(name: str, **settings: Any) -> EmbeddingModel:
    """A backbone whose BatchNorm layers have statistics that change what they are given."""
    torch.manual_seed(0)
    model = build_backbone(BackboneConfig(name=name, embedding_dim=7, **settings))
    model(random_images(8, 32, seed=1))
    return model.eval()


def random_images(count: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


class Corner(nn.Module):
    """A trunk that gives the first pixel as it came."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 0, 0]


BACKBONES = [
    ("small_cnn", {"pool": 2, "channels_last": True, "options": {"width": 4}}),
    ("torchvision/resnet18", {"options": {"return_node": "layer2"}, "pool": 3}),  # 4 x 4 to 3 x 3: cells overlap
    ("timm/vit_tiny_patch16_224", {"options": {"img_size": 32, "depth": 2}}),
    pytest.param("bn_inception", {}, marks=pytest.mark.ci),
]


@needs_onnx
@pytest.mark.parametrize(("name", "settings"), BACKBONES, ids=lambda value: value if isinstance(value, str) else None)
def test_an_onnx_graph_gives_what_the_backbone_gives_for_any_number_of_images(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = build(name, **settings)
    opset = write_onnx(model, tmp_path / "a.onnx", side=32)
    assert opset >= graph.FIRST_OPSET
    embed = open_onnx(tmp_path / "a.onnx")
    for count in (1, 5):
        images = random_images(count, 32)
        with torch.no_grad():
            torch.testing.assert_close(embed(images), model(images), **TOLERANCE)
    with pytest.raises(Exception, match="invalid dimensions"):  # not silently something else
        embed(random_images(1, 48))
    # The exporter notes at every node which line of which file it comes from.
    content = (tmp_path / "a.onnx").read_bytes()
    assert not [text for text in (b"stack_trace", b".py", b"site-packages") if text in content]


@needs_onnx
def test_mean_deviation_and_order_of_colours_are_in_the_graph(tmp_path: Path) -> None:
    model = EmbeddingModel(
        Corner(),
        embedding=nn.Identity(),
        preprocessing=Preprocessing((10.0, 20.0, 40.0), (1.0, 2.0, 4.0), value_range=255.0, order="BGR"),
    ).eval()
    write_onnx(model, tmp_path / "a.onnx", side=2)
    red, green, blue = 240, 120, 60
    images = torch.tensor([red, green, blue], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 2, 2).contiguous()
    expected = torch.tensor([[(blue - 10) / 1, (green - 20) / 2, (red - 40) / 4]])  # 50, 50, 50
    torch.testing.assert_close(open_onnx(tmp_path / "a.onnx")(images), expected / expected.norm())


@needs_onnx
def test_the_operator_set_is_the_one_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("small_cnn", options={"width": 2, "strides": [2], "residual_blocks": [0]})
    assert write_onnx(model, tmp_path / "a.onnx", side=32, opset=21) == 21
    import onnx

    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == 21
    last = onnx.defs.onnx_opset_version()
    for opset in (17, last + 1):
        with pytest.raises(ValueError, match=rf"--opset.*\b18 to {last}\b.*\b{opset}\b"):
            check_onnx(opset=opset, runs=False)
    check_onnx(opset=last, runs=True)

    # torch keeps another one when its converter fails, and only logs that
    with pytest.raises(ValueError, match=r"\b17\b.*\b18\b"):
        write_onnx(model, tmp_path / "b.onnx", side=32, opset=17)
    assert not (tmp_path / "b.onnx").exists()


@needs_onnx
def test_weights_that_one_file_cannot_hold_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_BYTES_IN_ONE_FILE", 1000)
    model = build("small_cnn", options={"width": 4, "strides": [2, 2], "residual_blocks": [0, 0]})
    write_onnx(model, tmp_path / "a.onnx", side=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    images = random_images(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_onnx(tmp_path / "a.onnx")(images), model(images), **TOLERANCE)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"--format onnx.*onnxscript.*\[export\]"):
        check_onnx(opset=None, runs=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"--format onnx --verify.*onnxscript.*onnxruntime"):
        check_onnx(opset=None, runs=True)


class Decides(nn.Module):
    """A trunk that looks at the pixels to decide what to do."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3)) if pixels.sum() > 0 else pixels.amax(dim=(2, 3))


@needs_onnx
def test_a_network_that_decides_by_its_input_is_no_onnx(tmp_path: Path) -> None:
    model = EmbeddingModel(
        Decides(), embedding=nn.Identity(), preprocessing=Preprocessing((0.0,) * 3, (1.0,) * 3)
    ).eval()
    with pytest.raises(ValueError, match=r"ONNX.*--format safetensors"):
        write_onnx(model, tmp_path / "a.onnx", side=4)
    assert not (tmp_path / "a.onnx").exists()
