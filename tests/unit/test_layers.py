"""Which layer a parameter is of, and what follows: learning rates, weight decay, frozen stages."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from dist_proxygml.backbones.build import EmbeddingModel, build_backbone
from dist_proxygml.backbones.layers import layers_of, parameter_groups
from dist_proxygml.config import BackboneConfig

D = 0.5  # powers of it are exact
SMALL_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
VIT = "timm/vit_tiny_patch16_224"


def build(name: str, **settings: Any) -> EmbeddingModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_backbone(BackboneConfig(name=name, embedding_dim=5, **settings))


def settings_by_name(
    model: EmbeddingModel, name: str, *, layer_decay: float | None, matrices: bool
) -> dict[str, tuple[float, bool]]:
    groups = parameter_groups(
        model.trunk, [model.embedding], name, layer_decay=layer_decay, decays_matrices_only=matrices
    )
    found = {id(p): (group.lr_factor, group.decays) for group in groups for p in group.parameters}
    assert sum(len(group.parameters) for group in groups) == len(found)  # each once
    return {key: found[id(p)] for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "options", "classifier"),
    [
        ("vit_tiny_patch16_224", SMALL_VIT, "head"),
        ("vit_tiny_patch16_224", SMALL_VIT | {"global_pool": "avg", "reg_tokens": 2}, "head"),  # with fc_norm
        ("beit_base_patch16_224", SMALL_VIT, "head"),
        ("eva02_tiny_patch14_224", SMALL_VIT, "head"),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 2, 1)}, "head.fc"),
        ("swinv2_tiny_window8_256", {"embed_dim": 12, "depths": (1, 1, 2, 1)}, "head.fc"),
        ("convnext_atto", {"depths": (1, 2, 1, 1), "dims": (4, 8, 8, 8)}, "head.fc"),
        ("resnet18", {}, "fc"),
        ("tf_efficientnet_lite0", {}, "classifier"),
    ],
)
def test_networks_of_timm_learn_as_its_own_groups_say(name: str, options: dict[str, Any], classifier: str) -> None:
    with torch.device("meta"):
        whole: Any = timm.create_model(name, num_classes=5, **options)
        model = build(f"timm/{name}", options=options)
    exempt = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()
    groups = param_groups_layer_decay(whole, weight_decay=1.0, no_weight_decay_list=exempt, layer_decay=D)
    by_id = {id(p): (group["lr_scale"], group["weight_decay"] > 0) for group in groups for p in group["params"]}
    expected = {key: by_id[id(p)] for key, p in whole.named_parameters()}
    found = settings_by_name(model, f"timm/{name}", layer_decay=D, matrices=True)
    for key, value in found.items():
        module, _, own = key.partition(".")
        assert value == expected[own if module == "trunk" else f"{classifier}.{own}"], key
    assert len(found) == len(expected)
    assert len({factor for factor, _ in found.values()}) > 3


def test_block_i_of_n_learns_at_d_to_the_n_minus_i() -> None:
    found = settings_by_name(build(VIT, options=SMALL_VIT), VIT, layer_decay=D, matrices=True)
    assert {key: found[f"trunk.{key}"] for key in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {
        "cls_token": (D**4, False),
        "pos_embed": (D**4, False),
        "patch_embed.proj.weight": (D**4, True),
    }
    for number in range(3):
        assert found[f"trunk.blocks.{number}.attn.qkv.weight"] == (D ** (3 - number), True)
        assert found[f"trunk.blocks.{number}.attn.qkv.bias"] == (D ** (3 - number), False)
        assert found[f"trunk.blocks.{number}.norm1.weight"] == (D ** (3 - number), False)
    assert found["trunk.norm.weight"] == (D, False)  # of the last block
    assert (found["embedding.weight"], found["embedding.bias"]) == ((1.0, True), (1.0, False))


@pytest.mark.parametrize("trunk", ["whole", "cut", "map"])
def test_a_trunk_that_uses_a_part_of_a_network_has_its_layers(trunk: str) -> None:
    cut = {"pool": 2, "options": {"out_indices": [2]}}
    names = {
        "whole": ("timm/resnet18", {}),
        "cut": ("timm/resnet18", cut),
        "map": ("torchvision/resnet18", {"pool": 2, "options": {"return_node": "layer2"}}),
    }
    name, settings = names[trunk]
    model = build(name, **settings)
    layers = layers_of(model.trunk, name, coarse=False, setting="")
    prefix = "" if trunk == "whole" else "model."
    numbers = [layers.number[f"{prefix}{key}.weight"] for key in ("conv1", "layer1.0.conv1", "layer2.1.conv2")]
    assert numbers == [0, 1, 4]
    assert layers.embedding == (9 if trunk == "whole" else 5)


@pytest.mark.parametrize(
    ("name", "num_blocks", "num_stages", "blocks"),
    [
        ("torchvision/resnet18", 8, 4, {"bn1.bias": 0, "layer1.1.conv1.weight": 2, "layer4.1.bn2.weight": 8}),
        ("torchvision/regnet_y_400mf", 16, 4, {"stem.0.weight": 0, "trunk_output.block2.block2-1.f.a.0.weight": 3}),
        (
            "torchvision/vit_b_16",
            12,
            12,
            {
                "class_token": 0,
                "encoder.pos_embedding": 0,
                "conv_proj.weight": 0,
                "encoder.layers.encoder_layer_0.mlp.0.weight": 1,
                "encoder.layers.encoder_layer_11.ln_1.weight": 12,
                "encoder.ln.weight": 12,
            },
        ),
        (
            "torchvision/swin_t",
            12,
            4,
            {
                "features.0.0.weight": 0,
                "features.1.1.attn.qkv.weight": 2,
                "features.2.reduction.weight": 3,
                "features.2.norm.weight": 3,
                "features.3.0.norm1.weight": 3,
                "features.7.1.mlp.0.weight": 12,
                "norm.weight": 12,
            },
        ),
        (
            "torchvision/convnext_tiny",
            18,
            4,
            {"features.0.1.bias": 0, "features.2.1.weight": 4, "features.3.0.layer_scale": 4, "classifier.0.bias": 19},
        ),
        ("torchvision/efficientnet_b0", 8, 8, {"features.0.0.weight": 0, "features.2.1.block.0.0.weight": 2}),
        ("torchvision/mobilenet_v3_small", 12, 12, {"features.12.0.weight": 12, "classifier.0.weight": 13}),
        ("bn_inception", 10, 3, {"conv2_3x3_bn.weight": 0, "inception_3c_3x3.weight": 3, "inception_4a_1x1.weight": 4}),
        ("iresnet18", 8, 4, {"prelu.weight": 0, "layer1.0.bn1.bias": 1, "layer2.1.conv1.weight": 4, "bn2.weight": 8}),
        ("small_cnn", 3, 3, {"0.0.weight": 0, "2.1.bias": 2}),
    ],
)
def test_other_networks_have_their_blocks_in_order(
    name: str, num_blocks: int, num_stages: int, blocks: dict[str, int]
) -> None:
    with torch.device("cpu" if "regnet" in name else "meta"):  # its constructor calculates with tensors
        model = build(name)
    layers = layers_of(model.trunk, name, coarse=False, setting="")
    assert {key: layers.number[key] for key in blocks} == blocks
    assert layers.embedding == num_blocks + 1
    assert set(layers.number.values()) >= set(range(num_blocks + 1))
    assert layers_of(model.trunk, name, coarse=True, setting="").embedding == num_stages + 1


def test_other_networks_have_no_decay_on_positions_tokens_tables_and_scales() -> None:
    with torch.device("meta"):
        models = {name: build(f"torchvision/{name}") for name in ("vit_b_16", "swin_v2_t", "convnext_tiny")}
    exempt = set()
    for name, model in models.items():
        found = settings_by_name(model, f"torchvision/{name}", layer_decay=None, matrices=True)
        shapes = {key: p.ndim for key, p in model.named_parameters()}
        exempt |= {key.rpartition(".")[2] for key, (_, decays) in found.items() if not decays and shapes[key] > 1}
        assert not any(decays for key, (_, decays) in found.items() if shapes[key] == 1)
        assert {key for key, (_, decays) in found.items() if decays and not key.endswith("weight")} == set()
    assert exempt == {"class_token", "pos_embedding", "logit_scale", "layer_scale"}


@pytest.mark.parametrize("layer_decay", [None, 1.0])
def test_without_the_settings_there_are_trunk_and_embedding_and_together_all(layer_decay: float | None) -> None:
    model = build("small_cnn")
    groups = parameter_groups(
        model.trunk, [model.embedding], "small_cnn", layer_decay=layer_decay, decays_matrices_only=False
    )
    assert [group[1:] for group in groups] == [(False, 1.0, True), (True, 1.0, True)]
    assert [id(p) for group in groups for p in group.parameters] == [id(p) for p in model.parameters()]


# ---- frozen stages ---------------------------------------------------------------------------------------------------


def test_frozen_stages_have_no_gradient_and_keep_their_statistics() -> None:
    model = build("timm/resnet18", frozen_stages=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.training
    model.keeps_lengths = True
    model(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    frozen = ("trunk.conv1", "trunk.bn1", "trunk.layer1", "trunk.layer2")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(frozen), name
        assert (parameter.grad is None) is name.startswith(frozen), name
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    trained = {name for name in norms if not name.startswith(frozen)}
    counted = {name.rpartition(".")[0] for name in moved}
    assert counted == trained != norms
    model.eval().train()
    assert {name for name in norms if model.get_submodule(name).training} == trained


def test_a_scale_that_is_never_trained_does_not_freeze_its_batch_norm() -> None:
    model = build("iresnet18", frozen_stages=0)
    last = model.embedding.get_submodule("features")
    assert not last.weight.requires_grad
    assert last.training
    assert not model.trunk.get_submodule("bn1").training
    assert model.trunk.get_submodule("bn2").training


def test_no_stage_is_the_stem_alone_and_all_leave_the_head() -> None:
    def trained(**settings: Any) -> set[str]:
        model = build(VIT, options=SMALL_VIT | {"global_pool": "avg"}, **settings)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    stem = {"trunk.pos_embed", "trunk.cls_token", "trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias"}
    assert trained() - trained(frozen_stages=0) == stem
    assert {name.split(".")[2] for name in trained(frozen_stages=2) if "blocks" in name} == {"2"}
    head = {"trunk.fc_norm.weight", "trunk.fc_norm.bias", "embedding.weight", "embedding.bias"}
    assert trained(frozen_stages=3) == head
    with pytest.raises(ValueError, match=r"backbone\.frozen_stages of at most 3 .* got 4"):
        build(VIT, options=SMALL_VIT, frozen_stages=4)


@pytest.mark.parametrize("name", ["torchvision/vgg11", "timm/pit_ti_224"])
def test_a_network_of_unknown_order_is_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=rf"backbone\.frozen_stages null with {name}"):
        build(name, frozen_stages=1)
    with torch.device("meta"):
        model = build(name)
    with pytest.raises(ValueError, match=rf"optimizer\.layer_decay null with {name}"):
        parameter_groups(model.trunk, [model.embedding], name, layer_decay=0.9, decays_matrices_only=False)
    parameter_groups(model.trunk, [model.embedding], name, layer_decay=None, decays_matrices_only=True)
