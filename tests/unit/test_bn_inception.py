"""BN-Inception against counts, names and map sizes worked out from its publication."""

from pathlib import Path

import pytest
import torch

from dist_proxygml.backbones.bn_inception import BNInception
from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.config import BackboneConfig


@pytest.fixture(scope="module")
def network() -> BNInception:
    torch.manual_seed(0)
    return BNInception().eval()


def test_it_has_the_published_number_of_parameters(network: BNInception) -> None:
    classifier = 1024 * 1000 + 1000
    assert sum(p.numel() for p in network.parameters()) + classifier == 11_295_240


def test_its_layers_have_the_names_and_shapes_of_the_published_file(network: BNInception) -> None:
    state = network.state_dict()
    # 3 convolutions, 8 blocks of 7, 2 of 5; each has weight, bias and BatchNorm's five tensors.
    assert len(state) == (3 + 8 * 7 + 2 * 5) * 7
    shapes = {
        "conv1_7x7_s2.weight": [64, 3, 7, 7],
        "conv1_7x7_s2.bias": [64],
        "conv1_7x7_s2_bn.running_mean": [64],
        "conv2_3x3_reduce.weight": [64, 64, 1, 1],
        "conv2_3x3.weight": [192, 64, 3, 3],
        "inception_3a_1x1.weight": [64, 192, 1, 1],
        "inception_3a_1x1_bn.weight": [64],
        "inception_3a_3x3_reduce.weight": [64, 192, 1, 1],
        "inception_3a_double_3x3_reduce.weight": [64, 192, 1, 1],
        "inception_3a_double_3x3_1.weight": [96, 64, 3, 3],
        "inception_3a_double_3x3_2_bn.running_var": [96],
        "inception_3c_3x3.weight": [160, 128, 3, 3],
        "inception_4a_1x1.weight": [224, 576, 1, 1],
        "inception_4e_double_3x3_2.weight": [256, 256, 3, 3],
        "inception_5a_1x1.weight": [352, 1056, 1, 1],
        "inception_5b_pool_proj.weight": [128, 1024, 1, 1],
        "inception_5b_pool_proj_bn.bias": [128],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes
    assert "inception_3c_1x1.weight" not in state
    assert "inception_4e_pool_proj.weight" not in state


@pytest.mark.parametrize(
    ("side", "first_block", "last"),
    [
        (
            224,
            28,
            7,
        ),  # 112 after the convolution; pools 56 and 28, where rounding down gives 55, 27
        (112, 14, 4),  # an odd map, 7, at the last reduction
        (65, 8, 2),  # 33; 16, 8
    ],
)
def test_pools_round_up(network: BNInception, side: int, first_block: int, last: int) -> None:
    seen: list[torch.Size] = []
    layer = network.get_submodule("inception_3a_1x1")
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        feature_map = network(torch.zeros(1, 3, side, side))
    hook.remove()
    assert seen == [(1, 192, first_block, first_block)]
    assert feature_map.shape == (1, 1024, last, last)
    assert feature_map.min() >= 0


@pytest.mark.parametrize(
    ("block", "num_inputs", "first_pooled", "corner"),
    [("inception_3a", 192, 64 + 64 + 96, 4 / 9), ("inception_5b", 1024, 352 + 320 + 224, 1.0)],
    ids=["average", "max"],
)
def test_the_last_block_pools_by_maximum_and_the_others_average_with_zeros(
    block: str, num_inputs: int, first_pooled: int, corner: float
) -> None:
    network = BNInception().eval()
    projection = network.get_submodule(f"{block}_pool_proj")
    with torch.no_grad():
        projection.weight.zero_()
        projection.bias.zero_()
        projection.weight[0, 0] = 1.0
        output = network._inception(block, network.blocks[block], torch.ones(1, num_inputs, 5, 5))
    # Behind the other three branches; BatchNorm at its initial values divides by sqrt(1 + 1e-5).
    assert output[0, first_pooled, 0, 0].item() == pytest.approx(corner, rel=1e-4)
    assert output[0, first_pooled, 2, 2].item() == pytest.approx(1.0, rel=1e-4)


def test_a_reducing_block_passes_its_pooled_input_through() -> None:
    network = BNInception().eval()
    x = torch.arange(320 * 9.0).view(1, 320, 3, 3)
    with torch.no_grad():
        output = network._inception("inception_3c", network.blocks["inception_3c"], x)
    assert output.shape == (1, 576, 2, 2)
    # Windows of 3x3 with step 2 on a 3x3 map: the second one holds the last row or column only.
    torch.testing.assert_close(output[:, 256:, 0, 0], x[:, :, 2, 2])
    torch.testing.assert_close(output[:, 256:, 1, 1], x[:, :, 2, 2])


def test_a_file_like_the_published_one_loads(network: BNInception, tmp_path: Path) -> None:
    published = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    published["last_linear.weight"] = torch.zeros(1000, 1024)
    published["last_linear.bias"] = torch.zeros(1000)
    path = tmp_path / "bn_inception.pth"
    torch.save(published, path, _use_new_zipfile_serialization=False)
    torch.manual_seed(1)
    model = build_backbone(BackboneConfig(name="bn_inception", embedding_dim=7, pretrained=str(path)))
    for name, tensor in model.trunk.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name
