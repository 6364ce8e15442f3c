"""A first configuration: it is valid, fits shards and machine, says why, and replaces nothing."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.config import load_config
from dist_proxygml.init import PRESETS, main
from dist_proxygml.training import presets
from dist_proxygml.training.presets import Machine, suggest
from tests.shards_of_noise import write_noise_shards, write_query_and_gallery

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "shards" / "demo")
GIB = 1 << 30
LAPTOP, ONE_GPU, EIGHT_GPUS = (
    Machine("cpu", 1, 8 * GIB, 4),
    Machine("cuda", 1, 80 * GIB, 16),
    Machine("cuda", 8, GIB, 64),
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights can be fetched, and runs/ is another folder."""
    monkeypatch.setattr(presets, "can_fetch_weights", lambda name: False)
    monkeypatch.chdir(tmp_path)


def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)


def test_a_configuration_is_written_explained_and_followed_by_the_next_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_weights(monkeypatch)
    out = tmp_path / "configs" / "mine.json"
    assert main([DEMO, "--out", str(out), "--device", "cpu", "--set", "seed=7", "training.batch_size=50"]) == 0
    told = capsys.readouterr().out
    config = load_config(out)
    assert (config.name, config.seed, config.data.num_classes) == ("mine", 7, 549)
    assert (config.backbone.name, config.data.test_transform.size) == ("small_cnn", 64)
    raw = json.loads(out.read_text())
    explained = " ".join(line.partition("  # ")[0] for line in told.splitlines() if "  # " in line).split(" ")
    for section, settings in raw.items():
        for key in settings if isinstance(settings, dict) else ():
            whole = f"{section}.{key}="
            assert len([word for word in explained if word.startswith(whole)]) == 1 or key == "shards", whole
    assert "training.batch_size=64" not in explained
    assert "2,977 images of 549 classes" in told
    assert "64 pixels on the shorter side" in told
    assert "training takes about" in told
    commands = [line.strip() for line in told.partition("next:\n")[2].splitlines()]
    assert commands[1] == f"python -m dist_proxygml.train --config {shlex.quote(str(out))}"
    assert [command.split()[2].removeprefix("dist_proxygml.") for command in commands] == (
        ["train", "train", "evaluate", "embed", "index", "search", "serve"]
    )
    assert f"--run {config.run_directory}" in commands[2]


def test_the_next_commands_search_the_gallery_and_evaluate_only_what_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_query_and_gallery(tmp_path / "shards", [4] * 6)
    given = ["shards", "--device", "cpu", "--set", "data.train_split=gallery", "backbone.name=small_cnn"]
    assert main([*given, "--out", "a.json"]) == 0
    assert "--split gallery " in capsys.readouterr().out
    assert main([*given, "data.test_split=null", "--out", "b.json"]) == 0
    told = capsys.readouterr().out
    assert "embed --run runs/b --data shards --split gallery" in told
    assert ".evaluate" not in told


def test_an_earlier_file_is_replaced_only_if_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_weights(monkeypatch)
    out = tmp_path / "mine.json"
    out.write_text("mine")
    assert main([DEMO, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    monkeypatch.setattr(presets, "estimate_seconds", lambda *_, **__: 1.0)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert main(["--data", DEMO, "--out", str(out), "--overwrite", "--device", "cpu"]) == 0
    assert "warning: runs/mine is there already" in capsys.readouterr().out
    assert load_config(out).name == "mine"


@pytest.mark.parametrize(
    ("out", "override", "message"),
    [
        ("mine", "seed=1", "mine.json"),
        ("mine.json", "training=1", "training"),
        ("mine.json", "data=1", "data=1"),
        ("mine.json", "backbone.name=timm/resnet5", "timm/resnet50"),
        ("mine.json", "data.test_split=nowhere", "nowhere"),
    ],
)
def test_a_mistake_writes_nothing(
    out: str, override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([DEMO, "--out", out, "--set", override]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_no_shards_yet_get_the_command_that_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "wren").mkdir(parents=True)
    (tmp_path / "birds.csv").write_text("image,label")
    assert main(["photos", "--out", "mine.json"]) == 2
    assert "shard build imagefolder --data photos --out shards/photos`" in capsys.readouterr().err
    assert main(["birds.csv", "--out", "mine.json"]) == 2
    assert "shard build table --table birds.csv --out shards/birds`" in capsys.readouterr().err


def settings_of(suggestion: Any) -> dict[str, Any]:
    config = suggestion.config
    return {
        "backbone": config.backbone.name,
        "pretrained": config.backbone.pretrained,
        "transform": config.data.train_transform.name,
        "proxies": config.proxies.initialization,
    }


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("small-images", {"transform": "affine_jitter", "proxies": "published"}),
        ("photos", {"transform": "random_resized_crop", "proxies": "published"}),
        ("many-classes", {"transform": "affine_jitter", "proxies": "class_mean"}),
    ],
)
def test_every_preset_gives_a_run_that_can_start(preset: str, expected: dict[str, str]) -> None:
    assert preset in PRESETS
    made = suggest(DEMO, "mine", LAPTOP, preset=preset)
    assert settings_of(made) == {"backbone": "timm/tf_efficientnet_lite0", "pretrained": "package", **expected}
    assert made.num_ranks == 1


def test_a_gpu_gets_a_larger_network_and_as_many_images_as_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "can_fetch_weights", lambda name: True)
    made = suggest(DEMO, "mine", ONE_GPU, preset="photos")
    assert settings_of(made)["backbone"] == "timm/resnet50"
    assert settings_of(made)["pretrained"] == "timm"
    monkeypatch.setattr(presets, "can_fetch_weights", lambda name: False)
    assert settings_of(suggest(DEMO, "mine", ONE_GPU, preset="photos"))["pretrained"] == "package"
    assert made.config.training.batch_size == 64
    small = suggest(DEMO, "mine", EIGHT_GPUS, preset="photos").config
    assert small.training.batch_size == 32  # 0.6 GiB of activations at 64 pixels


def test_another_network_comes_with_weights_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["backbone.name=timm/resnet18", "training.epochs=3"]
    made = suggest(DEMO, "mine", LAPTOP, preset="photos", overrides=overrides)
    assert (made.config.backbone.name, made.config.backbone.pretrained) == ("timm/resnet18", None)
    assert made.config.training.epochs == 3
    assert not any(settings.startswith("training.epochs") for settings, _ in made.choices)
    monkeypatch.setattr(presets, "can_fetch_weights", lambda name: name == "resnet18")
    made = suggest(DEMO, "mine", LAPTOP, preset="photos", overrides=overrides)
    assert made.config.backbone.pretrained == "timm"


def test_a_run_on_cpus_ends_within_hours_whatever_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suggest(DEMO, "mine", LAPTOP).config.training.epochs == 20
    monkeypatch.setitem(presets._MOST_IMAGES, "cpu", 10_000)
    assert suggest(DEMO, "mine", LAPTOP).config.training.epochs == 3
    monkeypatch.setitem(presets._MOST_IMAGES, "cpu", 1_000)
    monkeypatch.setitem(presets._MOST_EVALUATED, "cpu", 1_000)
    monkeypatch.setitem(presets._MOST_KMEANS, "cpu", 1)
    config = suggest(DEMO, "mine", LAPTOP).config
    assert (config.training.epochs, config.training.max_steps) == (1, 1_000 // 64)
    assert (config.evaluation.every_epochs, config.evaluation.kmeans_seeds) == (0, 0)


def test_the_same_split_of_classes_twice_is_allowed_and_said() -> None:
    made = suggest(DEMO, "mine", LAPTOP, overrides=["data.test_split=train"])
    assert made.config.evaluation.allow_seen_classes
    assert any("in both splits" in reason for _, reason in made.choices)


def test_shards_without_a_test_split_hold_out_classes_or_train_on_all(tmp_path: Path) -> None:
    write_noise_shards(tmp_path / "many", [5] * 12)
    write_noise_shards(tmp_path / "few", [3] * 12)
    made = suggest(str(tmp_path / "many"), "mine", LAPTOP)
    data = made.config.data
    assert (data.train_split, data.test_split, data.validation_classes) == ("test", None, 2)
    assert made.config.checkpoint.keep_best == "recall@1"
    assert made.config.proxies.topk == 10  # of the classes that train
    data = suggest(str(tmp_path / "few"), "mine", LAPTOP).config.data
    assert (data.test_split, data.validation_classes) == (None, None)
    whole = suggest(str(tmp_path / "many"), "mine", LAPTOP, overrides=["data.validation_classes=null"])
    assert (whole.config.data.validation_classes, whole.config.proxies.topk) == (None, 12)


@pytest.mark.parametrize(
    ("num_classes", "images", "expected"),
    [(100, 5, (1, 25, 4)), (100, 30, (4, 28, 1)), (1_000, 30, (1, 50, 4)), (9_000, 12, (1, 450, 4))],
)
def test_k_is_a_twentieth_of_the_proxies_and_at_least_24_of_others_and_scores_of_classes_grow_as_four(
    num_classes: int, images: int, expected: tuple[int, int, float]
) -> None:
    draft = presets._Draft("mine", "shards/mine")
    presets._choose_proxies(draft, num_classes, images, rate=0.02)
    proxies = draft.raw["proxies"]
    assert (proxies["per_class"], proxies["topk"], proxies["scale"]) == expected


@pytest.mark.parametrize(("num_classes", "topk"), [(12, 12), (10_000, 500), (20_000, 1000), (1_000_000, 1000)])
def test_k_of_many_classes_is_a_twentieth_and_at_most_a_thousand(num_classes: int, topk: int) -> None:
    draft = presets._Draft("mine", "shards/mine")
    presets._choose_many_proxies(draft, num_classes)
    assert draft.raw["proxies"]["topk"] == topk


@pytest.mark.parametrize(
    ("num_classes", "training", "expected"),
    [
        (549, {"epochs": 40, "batch_size": 64}, ("class_mean", 4)),
        (10_000, {"epochs": 1, "batch_size": 64}, ("class_mean", 2)),  # 50,000 images train: 25,000 may be embedded
        (10_000, {"epochs": 20, "batch_size": 100, "max_steps": 300}, ("class_mean", 1)),
        (10_000, {"epochs": 20, "batch_size": 100, "max_steps": 199}, ("unit", None)),
    ],
)
def test_class_means_are_taken_of_at_most_half_as_many_images_as_train(
    num_classes: int, training: dict[str, int], expected: tuple[str, int | None]
) -> None:
    draft = presets._Draft("mine", "shards/mine")
    draft.choose("", proxies={"initialization": "unit"}, training=training)
    presets._choose_class_means(draft, num_classes, 5 * num_classes)
    proxies = draft.raw["proxies"]
    assert (proxies["initialization"], proxies.get("class_mean_images")) == expected


def test_so_few_test_images_lower_k(tmp_path: Path) -> None:
    write_noise_shards(tmp_path / "shards", [2, 2, 3])
    made = suggest(
        str(tmp_path / "shards"), "mine", LAPTOP, overrides=["data.train_split=test", "data.test_split=test"]
    )
    assert made.config.evaluation.recall_at == [1, 2, 4]


def test_a_gallery_beside_the_queries_is_searched(tmp_path: Path) -> None:
    write_query_and_gallery(tmp_path / "shards", [4] * 6)
    made = suggest(str(tmp_path / "shards"), "mine", LAPTOP, overrides=["data.train_split=gallery"])
    assert (made.config.data.test_split, made.config.evaluation.gallery_split) == ("query", "gallery")

    write_query_and_gallery(tmp_path / "more", [4] * 6, whole=("test", "train"))
    made = suggest(str(tmp_path / "more"), "mine", LAPTOP, overrides=["evaluation.allow_seen_classes=true"])
    data, evaluation = made.config.data, made.config.evaluation
    assert (data.train_split, data.test_split, evaluation.gallery_split) == ("train", "query", "gallery")


def test_some_of_the_classes_get_the_settings_of_so_few() -> None:
    whole, part = (suggest(DEMO, "mine", LAPTOP, overrides=o).config for o in ([], ["data.train_classes=100"]))
    assert (whole.proxies.topk, part.proxies.topk) == (28, 25)
    assert part.training.epochs > whole.training.epochs


def rates_of(suggestion: Any) -> tuple[float, float | None, float]:
    optimizer = suggestion.config.optimizer
    return optimizer.backbone_lr, optimizer.embedding_lr, optimizer.proxies_lr


def test_learning_rates_are_the_same_whatever_the_batch_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = load_config(ROOT / "configs" / "emoji_cpu.json").optimizer  # by trials: tests/unit/test_recipes_table.py
    for overrides in ([], ["training.batch_size=1024"]):
        made = suggest(DEMO, "mine", LAPTOP, overrides=overrides)
        assert rates_of(made) == (tuned.backbone_lr, tuned.backbone_lr, tuned.proxies_lr)
        said = [
            settings for settings, reason in made.choices if "whatever the batch (docs/learning_rates.md)" in reason
        ]
        assert [settings.split()[1] for settings in said] == [f"optimizer.backbone_lr={tuned.backbone_lr}"]
    without_weights(monkeypatch)
    small = suggest(DEMO, "mine", LAPTOP)
    assert rates_of(small) == (0.002, None, 0.02)
    assert small.config.proxies.initialization == "class_mean"
    assert any("whatever the batch" in reason for _, reason in small.choices)
