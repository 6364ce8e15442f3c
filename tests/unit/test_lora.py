"""Adapters: which layers have them, what is trained, and merged weights that give the same without peft."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_proxygml.backbones.build import EmbeddingModel, build_backbone
from dist_proxygml.backbones.image_size import check_images
from dist_proxygml.backbones.lora import add_adapters_, merged_weights, unused_adapters_refused
from dist_proxygml.config import BackboneConfig, LoraConfig
from tests.small_training import configuration

SMALL_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIG = BackboneConfig(name="timm/vit_tiny_patch16_224", embedding_dim=5, options=SMALL_VIT)
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(config: BackboneConfig = CONFIG) -> EmbeddingModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_backbone(config)


def adapted(**settings: Any) -> EmbeddingModel:
    model = build()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        add_adapters_(model, LoraConfig(**settings))
    return model


def test_adapters_of_the_attention_and_the_embedding_layer_are_trained_and_nothing_else() -> None:
    model = adapted(rank=3)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    expected: dict[str, tuple[int, ...]] = {"embedding.weight": (5, 16), "embedding.bias": (5,)}
    for number in range(2):
        for layer, out in (("qkv", 48), ("proj", 16)):
            name = f"trunk.blocks.{number}.attn.{layer}"
            expected |= {f"{name}.lora_A.default.weight": (3, 16), f"{name}.lora_B.default.weight": (out, 3)}
    assert trained == expected
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), build()(IMAGES), rtol=0, atol=0)  # B is 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_give_the_same_in_a_model_without_adapters(dtype: torch.dtype) -> None:
    model = adapted(rank=3, alpha=7.0, target_modules=["qkv", "mlp.fc1"]).to(dtype).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    plain = build().to(dtype).eval()
    before = plain.state_dict()
    merged = merged_weights(model.state_dict(), model)
    assert list(merged) == list(before)
    assert {value.dtype for value in merged.values()} == {dtype}
    by_hand = {name: value.double() for name, value in model.state_dict().items()}
    for name, value in merged.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.base_layer.weight" in by_hand and name.endswith(".weight"):
            a, b = by_hand[f"{layer}.lora_A.default.weight"], by_hand[f"{layer}.lora_B.default.weight"]
            exact = by_hand[f"{layer}.base_layer.weight"] + 7.0 / 3 * b @ a
            torch.testing.assert_close(value, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)
            assert not torch.equal(value, before[name])
    plain.load_state_dict(merged)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # the weights, of about 1, are rounded to 8 bits
    with torch.no_grad():
        torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=0, atol=tolerance)
        assert (model(IMAGES) - build().to(dtype).eval()(IMAGES)).abs().max() > 5 * tolerance


def test_weights_without_adapters_are_left_alone() -> None:
    model = build()
    merged = merged_weights(model.state_dict(), model)
    assert all(merged[name] is value or torch.equal(merged[name], value) for name, value in model.state_dict().items())


def test_dropout_is_before_the_adapters_and_in_training_alone() -> None:
    model = adapted(dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
        assert not torch.equal(model(IMAGES), model(IMAGES))
        model.eval()
        assert torch.equal(model(IMAGES), model(IMAGES))


def test_batch_norms_of_a_trunk_with_adapters_stay_in_evaluation_mode() -> None:
    config = BackboneConfig(name="timm/levit_128s", embedding_dim=5)
    model = build(config)
    add_adapters_(model, LoraConfig(target_modules=["qkv.linear"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "lora", "message"),
    [
        ({"name": "small_cnn"}, {}, r"attn\.qkv.*found none.*SmallCnn.*none.*target_modules"),
        ({"name": "torchvision/vit_b_16"}, {}, r"attn\.qkv.*encoder_layer_0\.mlp\.0.*target_modules"),
        ({"name": "timm/vit_tiny_patch16_224", "options": SMALL_VIT}, {"target_modules": ["qkv", "v"]}, r"named v for"),
        ({"name": "timm/vit_tiny_patch16_224", "options": SMALL_VIT}, {"target_modules": ["kv"]}, r"blocks\.0\.attn"),
    ],
)
def test_a_network_without_such_layers_is_refused(backbone: dict[str, Any], lora: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        add_adapters_(build(BackboneConfig(embedding_dim=5, **backbone)), LoraConfig(**lora))


def test_layers_whose_weights_are_read_and_not_called_are_refused() -> None:
    def check(config: BackboneConfig, targets: list[str] | None) -> None:
        model = build(config)
        add_adapters_(model, LoraConfig(target_modules=targets))
        with unused_adapters_refused(model):
            check_images(model, config, 2, size=16, setting="x")

    beit = CONFIG.model_copy(update={"name": "timm/beit_base_patch16_224"})
    with pytest.raises(ValueError, match=r"calls.*target_modules.*got blocks\.0\.attn\.qkv, blocks\.1\.attn\.qkv, wh"):
        check(beit, None)
    check(beit, ["attn.proj"])
    check(CONFIG, None)


def test_without_peft_it_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dist_proxygml.training.checks import check_run

    monkeypatch.setitem(sys.modules, "peft", None)
    backbone = CONFIG.model_dump() | {"pretrained": str(tmp_path / "weights.pth"), "lora": {}}
    config = configuration(backbone=backbone, runs_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"peft.*pip install 'dist_proxygml\[lora\]'"):
        check_run(config, world_size=1)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"lora": {}, "frozen_stages": 1, "pretrained": "x"}, "frozen_stages null with lora"),
        ({"lora": {}}, r"pretrained or checkpoint\.init_from with backbone\.lora"),
        ({"frozen_stages": 0}, r"pretrained or checkpoint\.init_from with backbone\.frozen_stages"),
        ({"lora": {"target_modules": []}, "pretrained": "x"}, r"target_modules"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(backbone: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration(backbone={"name": "small_cnn", "embedding_dim": 8} | backbone)


def test_adapters_have_no_moving_average() -> None:
    backbone = {"name": CONFIG.name, "options": SMALL_VIT, "pretrained": "timm", "lora": {"rank": 2}}
    training = {"epochs": 1, "batch_size": 12}
    configuration(backbone=backbone, training=training)
    with pytest.raises(ValueError, match=r"training\.ema_decay.*backbone\.lora"):
        configuration(backbone=backbone, training=training | {"ema_decay": 0.9})
