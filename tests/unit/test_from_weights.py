"""What a configuration leaves to the weights is what timm and torchvision say, is stored, and changes nothing set."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize

from dist_proxygml import Embedder
from dist_proxygml.backbones import from_weights
from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.backbones.from_weights import fill_from_weights, input_facts, resolve_backbone, weight_source
from dist_proxygml.backbones.image_size import size_rule
from dist_proxygml.checkpoint.writer import _check_state
from dist_proxygml.config import BackboneConfig, Config, parse_config
from dist_proxygml.inference.embedder import model_difference
from dist_proxygml.training.checks import check_run
from dist_proxygml.training.prepare import comparable_settings
from tests.trained_runs import STEP, configuration, write_finished_run

UNKNOWN_CROP = {"name": "center_crop", "size": None, "resize": None, "interpolation": None}
UNKNOWN = {
    "train_transform": {"name": "random_resized_crop", "size": None, "interpolation": None},
    "test_transform": UNKNOWN_CROP,
}
TINY = {"depth": 1, "embed_dim": 12, "num_heads": 2}
NAMES = {
    "vit_small_patch14_dinov2": TINY,
    "vit_small_patch16_dinov3": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "vit_base_patch16_clip_224": TINY,
    "vit_base_patch16_siglip_224.webli": TINY,
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)},
    "tf_efficientnetv2_s": {},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)},
    "inception_v3": {},
}


def config(backbone: dict[str, Any], **data: Any) -> Config:
    sections = {"shards": "unused", "num_classes": 3, **UNKNOWN, **data}
    return configuration("small", Path("unused"), 3, backbone={"embedding_dim": 5, **backbone}, data=sections)


# ---- the registry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NAMES))
def test_images_are_prepared_as_timm_says(name: str) -> None:
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in NAMES[name].items()}
    filled = fill_from_weights(config({"name": f"timm/{name}", "options": options}))
    network = timm.create_model(name, **NAMES[name])
    resize, crop, _, normalize = create_transform(**resolve_data_config({}, model=network)).transforms
    assert isinstance(crop, CenterCrop)
    assert isinstance(normalize, Normalize)
    test, train = filled.data.test_transform, filled.data.train_transform
    size = [test.size] * 2
    assert size == list(crop.size) == [train.size] * 2
    assert test.resize == resize.size  # type: ignore[union-attr]
    assert {test.interpolation, train.interpolation} == {resize.interpolation.value}  # type: ignore[union-attr]
    assert torch.equal(torch.tensor(filled.backbone.mean), torch.as_tensor(normalize.mean))
    assert torch.equal(torch.tensor(filled.backbone.std), torch.as_tensor(normalize.std))
    assert fill_from_weights(filled) is filled


def test_all_weights_of_torchvision_were_prepared_as_is_filled_in() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) > 50
    for name in names:
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        filled = fill_from_weights(config({"name": f"torchvision/{name}"}))
        test = filled.data.test_transform
        assert [[test.size], [test.resize]] == [preset.crop_size, preset.resize_size], name  # type: ignore[union-attr]
        assert InterpolationMode(test.interpolation) == preset.interpolation  # type: ignore[union-attr]
        assert [filled.backbone.mean, filled.backbone.std] == [tuple(preset.mean), tuple(preset.std)]
        # What earlier versions took for all of them, and what a run of theirs is opened with.
        if name != "efficientnet_v2_l":
            assert (filled.backbone.mean, filled.backbone.std) == from_weights.IMAGENET


def test_what_is_set_stays_and_is_the_size_that_the_crop_is_worked_out_for() -> None:
    known = {"name": "center_crop", "size": 96, "resize": 100, "interpolation": "bilinear"}
    given = {"name": "timm/vit_base_patch16_clip_224", "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    filled = fill_from_weights(config(given, test_transform=known))
    assert (filled.backbone.mean, filled.backbone.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert filled.data.test_transform == config(given, test_transform=known).data.test_transform
    smaller = fill_from_weights(config(given, test_transform=UNKNOWN_CROP | {"size": 100}))
    assert (smaller.data.test_transform.size, smaller.data.test_transform.resize) == (100, 105)  # type: ignore[union-attr]
    built_for = fill_from_weights(config({"name": "timm/vit_small_patch14_dinov2", "options": {"img_size": 126}}))
    assert built_for.data.train_transform.size == 126


def test_a_configuration_of_before_keeps_its_images_and_its_numbers() -> None:
    old = {"train_transform": {"name": "random_resized_crop"}, "test_transform": {"name": "center_crop"}}
    before = config({"name": "timm/test_resnet"}, **old)
    filled = fill_from_weights(before)
    assert filled.data == before.data
    assert filled.data.test_transform.model_dump() == {"name": "center_crop", "resize": 256, "size": 224}
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.manual_seed(0)
    first = build_backbone(before.backbone)
    torch.manual_seed(0)
    assert torch.equal(first(images), build_backbone(filled.backbone)(images))


@pytest.mark.parametrize(
    ("name", "expected"), [("bn_inception", (224, 256, "bilinear")), ("iresnet50", (112, 112, "bilinear"))]
)
def test_networks_of_this_project_say_it_too(name: str, expected: tuple[int, int, str]) -> None:
    test = fill_from_weights(config({"name": name})).data.test_transform
    assert (test.size, test.resize, test.interpolation) == expected  # type: ignore[union-attr]


def test_where_nobody_knows_the_settings_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"data\.train_transform\.size and data\.train_transform\.interpolation.*small_cnn"
    ):
        fill_from_weights(config({"name": "small_cnn"}))
    odd = "timm/deit3_small_patch16_224"
    cfg = {"input_size": (3, 224, 192), "interpolation": "bicubic"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_weights, "_registered", lambda name: cfg)
        with pytest.raises(ValueError, match=r"\[192, 224\].*deit3"):
            input_facts(BackboneConfig(name=odd))


def test_colours_are_those_of_the_configuration(tmp_path: Path) -> None:
    colours = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    for name in ("timm/test_resnet", "torchvision/resnet18", "small_cnn"):
        model = build_backbone(BackboneConfig(name=name, embedding_dim=5, **colours))  # type: ignore[arg-type]
        pixel = torch.tensor([51, 102, 255], dtype=torch.uint8).view(1, 3, 1, 1)
        expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (1 - 0.3) / 2.0]).view(1, 3, 1, 1)
        torch.testing.assert_close(model.preprocessing.apply(pixel), expected)
    with pytest.raises(ValueError, match=r"backbone\.mean.*bn_inception"):
        build_backbone(BackboneConfig(name="bn_inception", **colours))  # type: ignore[arg-type]


# ---- folders and the Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network of timm's as its users store it: other colours than its architecture's, another size, five classes."""
    torch.manual_seed(1)
    network = timm.create_model("test_vit", img_size=32, num_classes=5)
    made = tmp_path / "weights"
    made.mkdir()
    save_file(network.state_dict(), made / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 0.8}
    cfg |= {"mean": [0.3, 0.4, 0.5], "std": [0.1, 0.2, 0.3], "classifier": "head", "first_conv": "patch_embed.proj"}
    about = {"architecture": "test_vit", "num_classes": 5, "model_args": {"num_classes": 5}, "pretrained_cfg": cfg}
    (made / "config.json").write_text(json.dumps(about))
    return made


@pytest.mark.parametrize("spelling", ["timm/local-dir:{}", "timm/test_vit"])
def test_a_folder_gives_network_weights_and_preparation_and_is_not_needed_again(folder: Path, spelling: str) -> None:
    is_plain = spelling == "timm/test_vit"
    given = {"name": spelling.format(folder), "pretrained": f"local-dir:{folder}" if is_plain else "timm"}
    filled = fill_from_weights(config(given))
    backbone, test = filled.backbone, filled.data.test_transform
    assert (backbone.name, backbone.pretrained) == ("timm/test_vit", f"local-dir:{folder}")
    assert (backbone.mean, backbone.std) == ((0.3, 0.4, 0.5), (0.1, 0.2, 0.3))
    assert backbone.options == {"img_size": 32}
    assert (test.size, test.resize, test.interpolation) == (32, 40, "bicubic")  # type: ignore[union-attr]
    model = build_backbone(BackboneConfig(embedding_dim=5, **given))  # as given: the same
    stored = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    kept = {name: value for name, value in stored.items() if not name.startswith("head.")}
    assert model.trunk.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in model.trunk.state_dict().items())
    shutil.rmtree(folder)
    rebuilt = build_backbone(backbone, load_pretrained=False)
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.preprocessing == model.preprocessing
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(rebuilt.eval()(images), model.eval()(images))
    assert fill_from_weights(filled) is filled


@pytest.mark.parametrize("prefix", ["hf-hub", "hf_hub"])
def test_a_name_of_the_hub_is_read_once(folder: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, file: str, *, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(from_weights, "hf_hub_download", download)
    resolved = resolve_backbone(BackboneConfig(name=f"timm/{prefix}:me/mine@v1", pretrained="timm"))
    assert (resolved.name, resolved.pretrained) == ("timm/test_vit", "hf-hub:me/mine@v1")
    assert resolved.mean == (0.3, 0.4, 0.5)
    assert asked == [("me/mine", "config.json", "v1")]
    assert resolve_backbone(resolved) is resolved
    build_backbone(resolved, load_pretrained=False)
    assert len(asked) == 1
    random = resolve_backbone(BackboneConfig(name=f"timm/{prefix}:me/mine", pretrained=None))
    assert (random.pretrained, random.std) == (None, (0.1, 0.2, 0.3))


def test_sources_are_told_from_files_and_names() -> None:
    assert weight_source("hf_hub:a/b") == weight_source("hf-hub:a/b") == "hf-hub:a/b"
    assert weight_source("local-dir:a b") == "local-dir:a b"
    assert [weight_source(text) for text in ("resnet50", "weights/a.pth", "hf-hub:", "C:/a", "")] == [None] * 5


def test_mistakes_name_the_source_and_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(from_weights, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"hf-hub:me/mine.*no route.*local-dir"):
        resolve_backbone(BackboneConfig(name="timm/hf_hub:me/mine"))
    with pytest.raises(ValueError, match=r"local-dir:/nowhere"):
        resolve_backbone(BackboneConfig(name="timm/local-dir:/nowhere"))
    with pytest.raises(ValueError, match=r"timm/test_resnet at backbone\.pretrained.*timm/test_vit"):
        resolve_backbone(BackboneConfig(name="timm/test_resnet", pretrained=f"local-dir:{folder}"))
    with pytest.raises(ValueError, match=r"local-dir.*torchvision/resnet18"):
        build_backbone(BackboneConfig(name="torchvision/resnet18", pretrained=f"local-dir:{folder}"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"architecture": "vit_of_tomorrow"}))
    with pytest.raises(ValueError, match=r"'vit_of_tomorrow'.*newer timm"):
        resolve_backbone(BackboneConfig(name=f"timm/local-dir:{folder}"))


def test_the_size_of_a_folder_s_images_can_be_changed(folder: Path) -> None:
    given = {"name": f"timm/local-dir:{folder}", "pretrained": "timm", "options": {"img_size": 48}}
    model = build_backbone(BackboneConfig(embedding_dim=5, **given))
    stored = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=48)
    assert torch.equal(model.trunk.pos_embed, stored.pos_embed)
    assert model(torch.zeros(2, 3, 48, 48, dtype=torch.uint8)).shape == (2, 5)


def test_a_weight_file_is_resampled_to_another_size_as_timm_does_it(folder: Path) -> None:
    file = str(folder / "model.safetensors")
    options = {"img_size": 48}
    model = build_backbone(BackboneConfig(name="timm/test_vit", embedding_dim=5, pretrained=file, options=options))
    expected = timm.create_model(
        "test_vit", img_size=48, num_classes=5, pretrained=True, pretrained_cfg_overlay={"file": file, "num_classes": 5}
    )
    assert torch.equal(model.trunk.pos_embed, expected.pos_embed)
    assert model.trunk.pos_embed.shape[1] == 10


def test_layers_that_the_weights_do_not_have_are_refused(folder: Path) -> None:
    given = {"name": f"timm/local-dir:{folder}", "pretrained": "timm", "embedding_dim": 5}
    with pytest.raises(ValueError, match=r'fc_norm\.bias.*"fc_norm": false'):
        build_backbone(BackboneConfig(options={"global_pool": "avg"}, **given))
    pooled = build_backbone(BackboneConfig(options={"global_pool": "avg", "fc_norm": False}, **given)).eval()
    stored = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(pooled.trunk(pixels), stored.forward_features(pixels)[:, 1:].mean(dim=1))
    learned = build_backbone(BackboneConfig(options={"global_pool": "map"}, **given))
    assert any(name.startswith("attn_pool.") for name, _ in learned.trunk.named_parameters())
    with pytest.raises(ValueError, match=r"blocks\.\d+\."):
        build_backbone(BackboneConfig(options={"depth": 9}, **given))


# ---- what a run stores -----------------------------------------------------------------------------------------------


def test_a_run_starts_with_values(folder: Path) -> None:
    backbone = {"name": f"timm/local-dir:{folder}", "pretrained": "timm"}
    checked = check_run(config(backbone), world_size=1)
    written = json.loads(json.dumps(checked.config.model_dump()))
    assert written["data"]["test_transform"] == UNKNOWN_CROP | {"size": 32, "resize": 40, "interpolation": "bicubic"}
    assert written["backbone"]["std"] == [0.1, 0.2, 0.3]
    assert parse_config(written, source="the test") == checked.config
    assert comparable_settings(checked.config)["backbone.mean"] == [0.3, 0.4, 0.5]


def earlier_run(path: Path) -> Path:
    """A run of a version that stored neither colours nor interpolation."""
    transform = {"name": "center_crop", "size": 32, "resize": 40}
    data = {"shards": "unused", "num_classes": 3, "train_transform": transform | {"name": "resize"}}
    data["train_transform"].pop("resize")  # type: ignore[attr-defined]
    data["test_transform"] = transform
    return write_finished_run(path, backbone={"name": "timm/test_resnet", "embedding_dim": 5}, data=data)


def test_an_earlier_run_opens_and_resumes_and_its_embeddings_stay_comparable(tmp_path: Path) -> None:
    run = earlier_run(tmp_path)
    raw = json.loads((run / "config.json").read_text())
    assert "mean" not in raw["backbone"]
    assert "interpolation" not in raw["data"]["test_transform"]
    before = Embedder.from_run(run, device="cpu")
    filled = fill_from_weights(parse_config(raw, source="the test"))
    assert filled.backbone.mean == (0.5, 0.5, 0.5)
    checkpoint = run / "checkpoints" / f"step-{STEP:06d}"
    _check_state(checkpoint, {**comparable_settings(filled), "seed": 0} | rest(checkpoint, filled))
    other = filled.model_copy(update={"backbone": filled.backbone.model_copy(update={"mean": (0.4, 0.5, 0.5)})})
    with pytest.raises(ValueError, match=r"backbone\.mean was \[0\.5.*is \[0\.4"):
        _check_state(checkpoint, {**comparable_settings(other), "seed": 0} | rest(checkpoint, other))
    (run / "config.json").write_text(json.dumps(filled.model_dump()))  # as a resumed run writes it
    after = Embedder.from_run(run, device="cpu")
    assert model_difference(before.about, after.about) is None
    images = np.random.default_rng(0).integers(0, 256, (2, 50, 41, 3), dtype=np.uint8)
    assert np.array_equal(before.embed(images), after.embed(images))


def rest(checkpoint: Path, changed: Config) -> dict[str, Any]:
    """Settings of the checkpoint that are not compared when a run resumes; the tests' runs store all."""
    stored = json.loads((checkpoint / "state.json").read_text())["settings"]
    return {name: value for name, value in stored.items() if name not in comparable_settings(changed)}


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data.test_transform", {"interpolation": "bicubic"}),
        ("backbone", {"mean": [0.5, 0.4, 0.5], "std": [0.5, 0.5, 0.5]}),
        ("backbone", {"embedding_norm": "layer_norm"}),
    ],
)
def test_a_run_s_configuration_that_was_edited_is_refused(tmp_path: Path, section: str, change: dict[str, Any]) -> None:
    run = earlier_run(tmp_path)
    raw = json.loads((run / "config.json").read_text())
    place = raw
    for name in section.split("."):
        place = place[name]
    place.update(change)
    (run / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"expected {section}\.{next(iter(change))}"):
        Embedder.from_run(run, device="cpu")


def test_a_bicubic_run_that_was_edited_to_the_default_is_refused(tmp_path: Path) -> None:
    data = {"shards": "unused", "num_classes": 3, "train_transform": {"name": "resize", "size": 16}}
    data["test_transform"] = {"name": "resize", "size": 16, "interpolation": "bicubic"}
    run = write_finished_run(tmp_path, data=data)
    Embedder.from_run(run, device="cpu")
    raw = json.loads((run / "config.json").read_text())
    del raw["data"]["test_transform"]["interpolation"]
    (run / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"expected data\.test_transform\.interpolation 'bicubic', got 'area'"):
        Embedder.from_run(run, device="cpu")


# ---- the documentation -----------------------------------------------------------------------------------------------


def documented() -> list[list[str]]:
    page = Path(__file__).parents[2] / "docs" / "backbones.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `") and line.count("|") == 7]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]  # without the head


@pytest.mark.ci
def test_the_table_of_the_documentation_holds() -> None:
    rows = documented()
    assert len(rows) == 15
    for name, parameters, num_features, sides, cut, _ in rows:
        backbone = BackboneConfig(name=name.strip("`"))
        with torch.device("meta"):
            model = build_backbone(backbone)
        millions = sum(parameter.numel() for parameter in model.trunk.parameters()) / 1e6
        assert f"{millions:.1f} M" == parameters, name
        layer = next(module for module in model.embedding.modules() if isinstance(module, torch.nn.Linear))
        assert str(layer.in_features) == num_features, name
        fixed, multiple = size_rule(backbone)
        resampled = ", or `img_size`" if name.startswith("`timm/") else ""
        rule = f"{fixed}{resampled}" if fixed else "any" if multiple == 1 else f"multiples of {multiple}"
        assert rule == sides, name
        facts = input_facts(resolve_backbone(backbone))
        assert facts is not None
        assert f"{facts.resize(facts.size)} / {facts.size} {facts.interpolation}" == cut, name
