"""IResNet: numbers of parameters, the residual unit by hand, and the weights of insightface's arcface_torch by name."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.backbones.iresnet import Depth, IResNet, Unit, depths
from dist_proxygml.config import BackboneConfig

SMALL = Depth(1, 2, 1, 1)


@pytest.mark.parametrize(
    ("name", "millions"),  # as published with a linear layer of 25,088 x 512
    [("iresnet18", 24.0), ("iresnet34", 34.1), ("iresnet50", 43.6), ("iresnet100", 65.2), ("iresnet200", 118.8)],
)
def test_the_number_of_parameters_is_the_published_one(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = IResNet(depths()[name], 512)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    layers = 2 if name == "iresnet100" else None  # 49 units of two, the stem and the linear layer are 100
    assert len(convolutions) == 1 + 2 * sum(depths()[name])
    assert layers is None or len(convolutions) + 1 == 100


def expected_names(depth: Depth) -> set[str]:
    """What arcface_torch calls its tensors, written out from its documentation of a backbone.pth."""

    def norm(name: str) -> list[str]:
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{part}" for part in parts]

    names = ["conv1.weight", *norm("bn1"), "prelu.weight", *norm("bn2"), "fc.weight", "fc.bias", *norm("features")]
    for stage, num_units in enumerate(depth, start=1):
        for unit in range(num_units):
            prefix = f"layer{stage}.{unit}"
            names += [f"{prefix}.{conv}.weight" for conv in ("conv1", "conv2", "prelu")]
            names += [name for norm_name in ("bn1", "bn2", "bn3") for name in norm(f"{prefix}.{norm_name}")]
            if unit == 0:
                names += [f"{prefix}.downsample.0.weight", *norm(f"{prefix}.downsample.1")]
    return set(names)


def test_tensors_have_the_names_and_shapes_of_arcface_torch() -> None:
    state = IResNet(SMALL, 7).state_dict()
    assert set(state) == expected_names(SMALL)
    shapes = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,), "layer1.0.downsample.0.weight": (64, 64, 1, 1)}
    shapes |= {"layer2.0.conv1.weight": (128, 64, 3, 3), "layer2.0.bn1.weight": (64,), "fc.weight": (7, 25088)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def reference_unit(x: Tensor, state: dict[str, Tensor], *, stride: int) -> Tensor:
    """BN-Conv-BN-PReLU-Conv-BN, and the shortcut, in evaluation mode."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, offset = (
            state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + offset

    y = norm(F.conv2d(norm(x, "bn1"), state["conv1.weight"], padding=1), "bn2")
    y = torch.where(y > 0, y, state["prelu.weight"].view(1, -1, 1, 1) * y)
    y = norm(F.conv2d(y, state["conv2.weight"], stride=stride, padding=1), "bn3")
    if "downsample.0.weight" in state:
        x = norm(F.conv2d(x, state["downsample.0.weight"], stride=stride), "downsample.1")
    return x + y


@pytest.mark.parametrize(("num_outputs", "stride"), [(5, 1), (5, 2), (8, 2)])
def test_a_unit_is_the_one_of_the_paper(num_outputs: int, stride: int) -> None:
    torch.manual_seed(0)
    unit = Unit(5, num_outputs, stride=stride).double().eval()
    assert (unit.downsample is None) == (num_outputs == 5 and stride == 1)
    for name, value in unit.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.5 if name.endswith("running_var") else -0.3))
    x = torch.randn(2, 5, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(unit(x), reference_unit(x, unit.state_dict(), stride=stride))


@pytest.fixture
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_proxygml.backbones.build.depths", lambda: {"iresnet18": Depth(1, 1, 1, 1)})


def stored(path: Path, embedding_dim: int) -> IResNet:
    torch.manual_seed(3)
    network = IResNet(Depth(1, 1, 1, 1), embedding_dim)
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_()
    torch.save(network.state_dict(), path)
    return network.eval()


@pytest.mark.usefixtures("tiny_names")
def test_a_backbone_pth_gives_its_embeddings(tmp_path: Path) -> None:
    network = stored(tmp_path / "backbone.pth", 8)
    config = BackboneConfig(name="iresnet18", embedding_dim=8, pretrained=str(tmp_path / "backbone.pth"))
    model = build_backbone(config).eval()
    images = torch.randint(256, (2, 3, 112, 112), dtype=torch.uint8)
    with torch.no_grad():
        expected = F.normalize(network((images / 255 - 0.5) / 0.5))
        torch.testing.assert_close(model(images), expected)
    assert sum(parameter.numel() for parameter in model.embedding.parameters()) == 25088 * 8 + 3 * 8
    assert [parameter.requires_grad for parameter in model.embedding.parameters()] == [True, True, False, True]
    assert all(parameter.requires_grad for parameter in model.trunk.parameters())
    again = build_backbone(config, load_pretrained=False)
    again.load_state_dict(model.state_dict())


@pytest.mark.usefixtures("tiny_names")
def test_for_another_dimension_its_embedding_layer_starts_anew(tmp_path: Path) -> None:
    network = stored(tmp_path / "backbone.pth", 8)
    config = BackboneConfig(name="iresnet18", embedding_dim=5, pretrained=str(tmp_path / "backbone.pth"))
    model = build_backbone(config)
    assert model.embedding.fc.weight.shape == (5, 25088)  # type: ignore[union-attr]
    assert torch.equal(model.trunk.layer3[0].conv2.weight, network.layer3[0].conv2.weight)  # type: ignore[union-attr, index]
    state = torch.load(tmp_path / "backbone.pth")
    del state["bn2.bias"]
    torch.save(state, tmp_path / "backbone.pth")
    for dim in (5, 8):
        with pytest.raises(ValueError, match=r"bn2\.bias"):
            build_backbone(config.model_copy(update={"embedding_dim": dim}))


@pytest.mark.usefixtures("tiny_names")
def test_it_trains_all_but_the_scale_of_its_last_norm() -> None:
    torch.manual_seed(0)
    model = build_backbone(BackboneConfig(name="iresnet18", embedding_dim=4, options={"dropout": 0.5}))
    images = torch.randint(256, (4, 3, 112, 112), dtype=torch.uint8)
    first, second = model(images), model(images)
    assert not torch.equal(first, second)  # dropout
    (first[:, 0]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["embedding.features.weight"]
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("dropout", [1.0, -0.1, "much", True])
def test_a_dropout_that_is_no_share_is_refused(dropout: object) -> None:
    with pytest.raises(ValueError, match=r"backbone\.options\.dropout"):
        build_backbone(BackboneConfig(name="iresnet18", options={"dropout": dropout}))
