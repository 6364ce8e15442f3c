"""The plan of a run against numbers worked out by hand."""

import re
from pathlib import Path

import pytest

from dist_proxygml.config import Config, load_config
from dist_proxygml.distributed.parallel import status_of
from dist_proxygml.plan import main
from dist_proxygml.training import run_plan
from dist_proxygml.training.run_plan import BackboneMemory, plan_backbone, plan_run
from tests.shards_of_noise import write_noise_shards

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo_cpu.json"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def demo(*changes: str) -> Config:
    return load_config(DEMO, list(changes))


def planned(arguments: list[str]) -> int:
    """The exit status of the command."""
    return status_of(lambda: main(arguments))


def test_steps_and_evaluations_follow_from_the_index() -> None:
    plan = plan_run(demo(), world_size=1, bank_bytes=0)
    # 2,977 images: 46 batches of 64, and 33 images left, more than half a batch
    assert (plan.steps_per_epoch, plan.num_steps, plan.num_test_images) == (47, 47 * 40, 2981)
    assert plan.num_evaluations == 6  # before the first step, after every eighth epoch, and after the last, the 40th
    assert plan.gallery_bytes == 2981 * 128 * 4
    often = plan_run(demo("evaluation.every_epochs=3", "evaluation.at_start=false"), world_size=1, bank_bytes=0)
    assert often.num_evaluations == 13 + 1  # after epochs 3, 6, ... 39, and after the last
    short = plan_run(demo("training.max_steps=94", "evaluation.every_epochs=1"), world_size=1, bank_bytes=0)
    assert (short.num_steps, short.num_evaluations) == (94, 1 + 2)  # epoch 2 is the last


def test_images_of_class_means_are_counted(tmp_path: Path) -> None:
    write_noise_shards(tmp_path / "shards", [5, 1, 4, 2])
    changes = [f"data.shards={tmp_path}/shards", "data.train_split=test", "data.num_classes=4"]
    plain = plan_run(demo(*changes, "proxies.initialization=unit"), world_size=1, bank_bytes=0)
    assert plain.num_class_mean_images == 0
    assert "class means" not in str(plain)
    means = [*changes, "proxies.initialization=class_mean", "proxies.class_mean_images=3"]
    plan = plan_run(demo(*means), world_size=1, bank_bytes=0)
    assert plan.num_class_mean_images == 3 + 1 + 3 + 2
    assert re.search(r"images of class means +9\n", str(plan))
    some = plan_run(demo("proxies.initialization=class_mean", "data.train_classes=100"), world_size=1, bank_bytes=0)
    assert some.num_class_mean_images <= 4 * 100
    for unknown in ("data.num_classes=1000", f"data.shards={tmp_path}/others"):  # as many as there may be
        config = demo(*means, unknown)
        assert plan_run(config, world_size=1, bank_bytes=0).num_class_mean_images == 3 * config.num_classes


def test_without_shards_the_published_counts_are_taken_and_named(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "paper" / "sop.json", [f"data.shards={tmp_path}/sop", "training.epochs=3"])
    plan = plan_run(config, world_size=8, bank_bytes=0)
    assert (plan.steps_per_epoch, plan.num_steps) == (1861, 3 * 1861)  # 59,551 images in batches of 32
    assert plan.gallery_bytes == 60_502 * 512 * 4
    assert "published counts of sop" in str(plan)


def test_without_shards_of_a_known_data_set_the_numbers_stay_open(tmp_path: Path) -> None:
    config = demo(f"data.shards={tmp_path}", "training.max_steps=70")
    plan = plan_run(config, world_size=1, bank_bytes=0)
    assert (plan.steps_per_epoch, plan.num_steps, plan.num_evaluations, plan.gallery_bytes) == (None, 70, None, None)
    assert "index.json is not there: build the shards" in str(plan)
    assert "unknown" in str(plan)
    # other classes than those published: not that data set
    other = load_config(ROOT / "configs" / "paper" / "sop.json", ["data.num_classes=7", f"data.shards={tmp_path}/sop"])
    assert plan_run(other, world_size=8, bank_bytes=0).steps_per_epoch is None


def test_validation_classes_are_embedded_instead_of_trained() -> None:
    plan = plan_run(demo("data.validation_classes=0.5"), world_size=1, bank_bytes=0)
    assert plan.steps_per_epoch is not None
    assert plan.num_test_images is not None
    held_out = plan.num_test_images - 2981
    assert 1000 < held_out < 2000
    assert abs(plan.steps_per_epoch - (2977 - held_out) / 64) < 1


def test_a_plan_may_ask_for_more_classes_than_the_shards_have() -> None:
    assert plan_run(demo("data.num_classes=1000000"), world_size=1, bank_bytes=0).steps_per_epoch == 47


@pytest.mark.parametrize(
    ("stage", "half", "expected"),
    [
        (0, False, (4000, 3200, 6400)),
        (1, False, (4000, 3200, 2134)),
        (2, False, (4000, 1067, 2134)),
        (3, False, (1334, 1067, 2134)),
        (0, True, (2000, 1600, 9600)),
        (3, True, (667, 534, 3200)),
    ],
)
def test_the_backbone_by_zero_stage(stage: int, half: bool, expected: tuple[int, int, int]) -> None:
    """A thousand numbers, 800 of them trained, on three ranks."""
    settings = f'deepspeed={{"zero_optimization": {{"stage": {stage}}}, "bf16": {{"enabled": {str(half).lower()}}}}}'
    memory = plan_backbone(demo(settings), num_parameters=1000, num_trained=800, world_size=3)
    assert memory == BackboneMemory(*expected)


@pytest.mark.parametrize(("stage", "half", "expected"), [(0, False, 3200), (1, True, 1067), (3, False, 1067)])
def test_averaged_weights_are_counted_with_the_backbone_that_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, stage: int, half: bool, expected: int
) -> None:
    monkeypatch.setattr(run_plan, "_count_parameters", lambda config: (1000, 800))
    section = f'deepspeed={{"zero_optimization": {{"stage": {stage}}}, "bf16": {{"enabled": {str(half).lower()}}}}}'
    plain, averaged = (
        plan_run(demo(section, *more), world_size=3, bank_bytes=0) for more in ((), ("training.ema_decay=0.99",))
    )
    assert (plain.backbone.average, plain.evaluated_bytes) == (0, 0)
    assert (averaged.backbone.average, averaged.evaluated_bytes) == (expected, 4000)
    assert averaged.backbone.total == plain.backbone.total + expected
    # the file of the backbone is float32, instead of half as large
    assert averaged.checkpoint_bytes == plain.checkpoint_bytes + (2000 if half else 0)
    assert "averaged weights" in str(averaged)
    assert "averaged weights" not in str(plain)


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state() -> None:
    whole = plan_run(demo(), world_size=1, bank_bytes=0)
    assert "trained of them" not in str(whole)
    frozen = demo("backbone.pretrained=weights.pth", "backbone.frozen_stages=1")
    plan = plan_run(frozen, world_size=1, bank_bytes=0)
    stem_and_stage = (27 * 24 + 2 * 24) + (9 * 24 * 48 + 2 * 48)  # 3 x 3 convolutions and their BatchNorm
    assert (plan.num_parameters, plan.num_trained) == (whole.num_parameters, whole.num_parameters - stem_and_stage)
    assert plan.backbone == BackboneMemory(4 * plan.num_parameters, 4 * plan.num_trained, 8 * plan.num_trained)
    assert f"trained of them{plan.num_trained:>29,}" in str(plan)
    vit = '{"name": "timm/vit_tiny_patch16_224", "embedding_dim": 128, "pretrained": "timm", "lora": {"rank": 2}}'
    adapted = plan_run(demo(f"backbone={vit}"), world_size=1, bank_bytes=0)
    adapters = 12 * (2 * (192 + 576) + 2 * (192 + 192))  # A and B of qkv and proj, in each block
    assert adapted.num_trained == adapters + 192 * 128 + 128


def test_checkpoints_are_counted_and_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_plan, "_count_parameters", lambda config: (1000, 800))
    plan = plan_run(demo(), world_size=2, bank_bytes=50)
    assert plan.checkpoint_bytes == 2 * 4000 + 6400 + 50  # weights twice, two moments, the bank with its own
    assert plan.num_checkpoints == 2 + 1  # keep_last, and the one that is being written
    kept = plan_run(demo("checkpoint.keep_every=500", "checkpoint.keep_best=recall@1"), world_size=2, bank_bytes=50)
    assert kept.num_checkpoints == 2 + 1 + 1880 // 500 + 1
    assert kept.needed_bytes == 7 * 14_450


def test_the_command_refuses_checkpoints_that_do_not_fit_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 20 << 20}))
    assert planned(["--config", str(DEMO), "--memory", "1 GiB"]) == 1
    told = capsys.readouterr()
    assert "steps per epoch" in told.out
    assert "expected room for 3 checkpoints of 10.1 MiB, together 30.4 MiB, got 20.0 MiB in runs" in told.err


def test_memory_and_disk_are_apart() -> None:
    lines = str(plan_run(demo(), world_size=1, bank_bytes=0)).splitlines()
    titles = [line.removesuffix(":") for line in lines if not line.startswith("  ")]
    assert titles == [
        "plan of the run (counts of shards/demo)",
        "memory of the backbone, per rank, without activations",
        "disk, in runs",
    ]
    disk = lines[lines.index("disk, in runs:") :]
    assert [line[:32].strip() for line in disk[1:]] == ["a checkpoint", "checkpoints", "together", "left"]


def test_a_run_without_a_test_split_evaluates_nothing_or_its_validation_classes() -> None:
    alone = plan_run(demo("data.test_split=null"), world_size=1, bank_bytes=0)
    assert (alone.num_steps, alone.num_evaluations, alone.num_test_images) == (47 * 40, 0, 0)
    held_out = plan_run(demo("data.test_split=null", "data.validation_classes=0.5"), world_size=1, bank_bytes=0)
    assert held_out.num_evaluations == 6
    assert held_out.num_test_images is not None
    assert 1000 < held_out.num_test_images < 2000
