"""Gradient checkpointing changes what is kept and no digit; networks that cannot are refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.backbones.gradient_checkpointing import BlockSwitch, find_blocks, is_recomputation, saved_bytes
from dist_proxygml.config import BackboneConfig

CASES: dict[str, tuple[dict[str, Any], int, float]] = {  # settings, side of the images, least saving
    "small_cnn": ({"name": "small_cnn", "options": {"width": 4, "residual_blocks": [1, 0, 0, 1]}}, 32, 0.6),
    "bn_inception": ({"name": "bn_inception"}, 64, 0.6),
    "iresnet18": ({"name": "iresnet18", "options": {"dropout": 0.3}, "batch_norm": "frozen"}, 112, 0.4),
    "timm": ({"name": "timm/test_vit", "options": {"img_size": 32, "proj_drop_rate": 0.3}}, 32, 0.4),
    "timm, cut": ({"name": "timm/test_resnet", "options": {"out_indices": [3]}, "pool": 2}, 64, 0.1),
    "torchvision": ({"name": "torchvision/shufflenet_v2_x0_5"}, 64, 0.3),
    "torchvision, cut": ({"name": "torchvision/resnet18", "options": {"return_node": "layer2"}, "pool": 2}, 64, 0.4),
    "frozen": ({"name": "small_cnn", "options": {"width": 4}, "batch_norm": "frozen"}, 32, 0.4),
}


def trained(settings: dict[str, Any], side: int, *, is_checkpointed: bool) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept for the backward pass, and embeddings, gradients and buffers of a training pass."""
    torch.manual_seed(0)
    config = BackboneConfig(**settings, embedding_dim=8, gradient_checkpointing=is_checkpointed)
    model = build_backbone(config, load_pretrained=False)
    images = torch.randint(256, (3, 3, side, side), dtype=torch.uint8)
    outputs: list[Tensor] = []
    torch.manual_seed(1)  # of dropout

    def forward() -> Tensor:
        outputs.append(model(images))
        return outputs[0]

    kept = saved_bytes(forward)
    (outputs[0] * torch.arange(8)).sum().backward()
    found = {"embeddings": outputs[0].detach(), "next draw": torch.rand(1)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return kept, found | dict(model.named_buffers()) | {"in evaluation": model.eval()(images).detach()}


@pytest.mark.parametrize("case", CASES)
def test_less_is_kept_and_all_digits_stay(case: str) -> None:
    settings, side, saving = CASES[case]
    kept, expected = trained(settings, side, is_checkpointed=False)
    kept_less, found = trained(settings, side, is_checkpointed=True)
    assert kept_less < (1 - saving) * kept
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    if settings.get("batch_norm") != "frozen" and "small_cnn" in case:
        assert {int(value) for name, value in found.items() if name.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize(
    ("name", "options"),
    [("torchvision/alexnet", {}), ("timm/inception_v4", {}), ("raw_pixels", {})],
)
def test_networks_that_cannot_are_refused(name: str, options: dict[str, Any]) -> None:
    dim = 3072 if name == "raw_pixels" else 8
    config = BackboneConfig(name=name, options=options, embedding_dim=dim, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        build_backbone(config, load_pretrained=False)


def test_a_cut_inside_a_block_is_refused() -> None:
    options = {"return_node": "layer1.0.relu"}
    build_backbone(BackboneConfig(name="torchvision/resnet18", options=options, embedding_dim=8, pool=2))
    with pytest.raises(ValueError, match="gradient_checkpointing it must not"):
        build_backbone(
            BackboneConfig(
                name="torchvision/resnet18", options=options, embedding_dim=8, pool=2, gradient_checkpointing=True
            )
        )


def test_blocks_are_the_outermost_modules_in_a_chain() -> None:
    layer = nn.Linear(2, 2)

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Sequential(layer, nn.ReLU()))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(layer, nn.ReLU())  # not in a chain itself
            self.stages = nn.ModuleList([nn.Sequential(Unit(), Unit()), nn.Sequential(layer, nn.ReLU())])

    network = Network()
    first, second = network.stages[0]
    assert find_blocks(network) == [first, second, network.stages[1]]
    assert find_blocks(nn.Sequential(layer, nn.ReLU())) == []


def test_a_recomputation_knows_that_it_is_one_and_a_copy_checkpoints_its_own_blocks() -> None:
    seen: list[bool] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_recomputation())
            return self.layer(x).sin()

    model = nn.Sequential(Block(), nn.Flatten())
    switch = BlockSwitch(find_blocks(model))
    model(torch.ones(1, 2)).sum().backward()
    assert seen == [False]
    switch(True)
    model(torch.ones(1, 2)).sum().backward()
    assert seen == [False, False, True]
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].layer.weight)
    assert not torch.equal(other(torch.ones(1, 2)), model(torch.ones(1, 2)))
    with torch.no_grad():
        model(torch.ones(1, 2))
    assert not seen[-1]
