"""The folder of a run that is started again: what is closed or odd in it is refused, or named and passed over."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_proxygml.checkpoint.folder import read_state
from dist_proxygml.checkpoint.model import TrainedModel
from dist_proxygml.checkpoint.writer import _check_state
from dist_proxygml.config import Config, load_config
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.storage.run_folder import step_name
from dist_proxygml.training.prepare import comparable_settings, find_continuation, prepare_run_directory
from tests.closed_folders import closed
from tests.trained_runs import STEP, configuration, write_finished_run

FOLDERS = ("checkpoints", "evaluation", "embeddings", "proxies", "tensorboard")
LOGS = ("metrics.jsonl", "damaged.jsonl", "nonfinite.jsonl")
RESULT = EvaluationResult({"recall@1": 0.5}, {}, 3, 2, 3, 0, 0, {})
EARLIER_SETTINGS = {  # of a checkpoint of configs/demo_cpu.json, saved when there was no other head than ProxyGML
    **{"seed": 0},
    **{"data.mode": "indexed", "data.stream": None, "data.train_split": "train", "data.num_classes": 549},
    **{"data.validation_classes": None, "data.shuffle_window": None, "data.images_per_class": None},
    **{"data.drop_last": False},
    **{"data.train_transform.name": "affine_jitter", "data.train_transform.size": 32},
    **{"data.train_transform.degrees": 15.0, "data.train_transform.log_scale": 0.2},
    **{"data.train_transform.shift": 0.12, "data.train_transform.shear": 0.0},
    **{"data.train_transform.brightness": 0.2, "data.train_transform.contrast": 0.3},
    **{"data.train_transform.saturation": 0.6, "data.train_transform.hue": 0.0},
    **{"data.train_transform.flip": False, "data.train_transform.fill": 255},
    **{"data.test_transform.name": "resize", "data.test_transform.size": 32},
    **{"backbone.name": "small_cnn", "backbone.embedding_dim": 128, "backbone.pretrained": None},
    **{"backbone.pool": 4, "backbone.batch_norm": "train", "backbone.channels_last": True},
    **{"backbone.options.width": 24},
    **{"proxies.per_class": 1, "proxies.ratio": 0.05, "proxies.topk": None},
    **{"proxies.regularization_weight": 0.3, "proxies.scale": 1.0, "proxies.regularization_anchors": None},
    **{"proxies.memory_budget": "256 MiB", "proxies.matmul_dtype": "float32"},
    **{"proxies.initialization": "published", "proxies.unit_norm": False},
    **{"optimizer.name": "adamw", "optimizer.backbone_lr": 0.002, "optimizer.embedding_lr": None},
    **{"optimizer.proxies_name": None, "optimizer.proxies_momentum": 0.0, "optimizer.proxies_lr": 0.02},
    **{"optimizer.weight_decay": 0.01, "optimizer.proxies_weight_decay": 0.0, "optimizer.eps": 1e-08},
    **{"optimizer.betas": [0.9, 0.999], "optimizer.proxies_clip_norm": None},
    **{"schedule.name": "cosine", "schedule.milestones": [], "schedule.gamma": 0.1, "schedule.warmup_steps": 50},
    **{"training.epochs": 40, "training.max_steps": None, "training.frozen_trunk_epochs": []},
    **{"deepspeed.zero_optimization.stage": 0},
}


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    mode = path.stat().st_mode
    path.chmod(0o555)
    try:
        yield
    finally:
        path.chmod(mode)


def make_run(run: Path) -> None:
    for name in FOLDERS:
        (run / name).mkdir(parents=True)
    for name in LOGS:
        (run / name).touch()


@pytest.mark.parametrize("name", ["", *FOLDERS, *LOGS])
def test_what_is_closed_to_this_user_is_named_before_anything_is_moved(folder: Path, name: str) -> None:
    make_run(folder / "run")
    for shut in (closed, read_only):
        with (
            shut(folder / "run" / name),
            pytest.raises(ValueError, match="read"),
        ):
            find_continuation(folder / "run", "auto")
    assert find_continuation(folder / "run", "auto") == (None, [])
    assert sorted(os.listdir(folder / "run")) == sorted([*FOLDERS, *LOGS])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_what_is_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    make_run(run)
    (run / name).unlink() if name in LOGS else (run / name).rmdir()
    os.mkfifo(run / name)
    with pytest.raises(ValueError, match=rf"/{name}\b.*something else"):
        find_continuation(run, "auto")
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=rf"link.*{name}\b"):
        find_continuation(run, "auto")
    assert find_continuation(run, "never") == (None, [])


def test_damaged_results_and_logs_are_set_aside_and_the_others_stay(tmp_path: Path) -> None:
    config = configuration("run", tmp_path, 3)
    run = config.run_directory
    make_run(run)
    for name in ("step-000001", "step-000002", "step-000009", "validation-step-000001", "pixels"):
        (run / "evaluation" / f"{name}.json").write_text(RESULT.to_json())
    for name in ("step-000002", "pixels", "step-x", "notes"):
        (run / "evaluation" / f"{name}.json").write_bytes(b"\xff")
    (run / "evaluation" / "validation-step-000001.json").write_text(
        RESULT.to_json().replace("0.5", json.dumps("a half"))
    )
    (run / "proxies" / "step-000001.json").write_text("[" * 200_000)
    (run / "damaged.jsonl").write_bytes(b'{"split": "train", "image": "a", "reason": "b"}\n\xff\n{"split": "tr')
    aside, odd = prepare_run_directory(config, None, 5)
    assert aside is None
    assert sorted(os.listdir(run / "evaluation")) == [
        "notes.json",
        "pixels.json.damaged",
        "step-000001.json",
        "step-000002.json.damaged",
        "step-x.json",
        "validation-step-000001.json.damaged",
    ]
    assert os.listdir(run / "proxies") == ["step-000001.json.damaged"]
    assert len((run / "damaged.jsonl").read_text().splitlines()) == 1
    assert [text.partition("passed over, now ")[2] for text in odd] == [
        "pixels.json.damaged",
        "step-000002.json.damaged",
        "validation-step-000001.json.damaged",
        "step-000001.json.damaged",
        "in damaged.jsonl.odd",
    ]
    assert prepare_run_directory(config, None, 5) == (None, [])


def test_an_unreadable_result_is_not_taken_for_a_damaged_one(tmp_path: Path, folder: Path) -> None:
    config = configuration("run", folder, 3)
    make_run(config.run_directory)
    path = config.run_directory / "evaluation" / "step-000001.json"
    path.write_text(RESULT.to_json())
    with closed(path), pytest.raises(ValueError, match=r"step-000001\.json.*Permission denied"):
        prepare_run_directory(config, None, 5)
    assert path.exists()


def test_a_run_without_a_budget_resumes_where_256_mib_was_the_default() -> None:
    def budget(*overrides: str) -> object:
        settings = comparable_settings(load_config("configs/demo_cpu.json", overrides))
        return settings.get("proxies.memory_budget")

    weight = "proxies.regularization_weight=0.3"
    assert budget("proxies.regularization_weight=0") is None  # it changes no number
    assert budget(weight) == budget(weight, "proxies.memory_budget=256 MiB") == "256 MiB"
    assert budget(weight, "proxies.memory_budget=64 MiB") == "64 MiB"
    assert budget(weight, "proxies.regularization_anchors=5") is None


def test_a_run_is_what_its_checkpoint_was_trained_with_however_it_was_trained(tmp_path: Path) -> None:
    """What is evaluated, exported and served is compared with the checkpoint; the memory that training took is not."""
    plain = configuration("run", tmp_path, 3).backbone.model_dump(mode="json")
    checkpoint = {"init_from": "another run"}  # whoever freezes starts from weights

    def of(**backbone: object) -> Config:
        return configuration("run", tmp_path, 3, backbone={**plain, **backbone}, checkpoint=checkpoint)

    for config in (
        of(gradient_checkpointing=True),
        of(frozen_stages=1, gradient_checkpointing=True, matryoshka_dims=[2]),
        of(lora={"rank": 2}),
    ):
        model = TrainedModel(tmp_path, 3, comparable_settings(config))
        model.check_config(config, source=tmp_path)
        for name, value in (("embedding_norm", "layer_norm"), ("matryoshka_dims", [1]), ("pooling", "gem")):
            edited = config.model_copy(update={"backbone": config.backbone.model_copy(update={name: value})})
            with pytest.raises(ValueError, match=rf"expected backbone\.{name} .*restore that file"):
                model.check_config(edited, source=tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"train_micro_batch_size_per_gpu": 3},  # on two ranks
        {"wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True, "steps_per_print": 5},
        {"comms_logger": {"enabled": True}, "flops_profiler": {"enabled": True, "module_depth": 1}},
    ],
)
def test_a_run_goes_on_whatever_deepspeed_prints_and_on_how_many_ranks(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    stated: dict[str, object] = {"train_micro_batch_size_per_gpu": 6}

    def compared(deepspeed: dict[str, object]) -> dict[str, object]:
        return comparable_settings(configuration("small", tmp_path, 3, deepspeed=deepspeed))

    assert compared(stated) == compared(changed) == compared({})
    checkpoint = write_finished_run(tmp_path, deepspeed=stated) / "checkpoints" / step_name(STEP)
    stored = read_state(checkpoint)
    settings = compared(stated) | {"deepspeed.train_micro_batch_size_per_gpu": 6}  # as earlier versions recorded them
    (checkpoint / "state.json").write_text(json.dumps(asdict(replace(stored, settings=settings))))
    _check_state(checkpoint, compared(changed))
    with pytest.raises(ValueError, match=r"deepspeed\.gradient_clipping was unset, is 1"):
        _check_state(checkpoint, compared({**changed, "gradient_clipping": 1}))


def test_new_ways_to_draw_and_augment_images_are_compared_only_where_they_are_used(tmp_path: Path) -> None:
    plain = configuration("run", tmp_path, 3).data.model_dump(mode="json")

    def compared(**data: object) -> dict[str, object]:
        return comparable_settings(configuration("run", tmp_path, 3, data={**plain, **data}))

    crop = {"name": "random_resized_crop", "size": 32, "scale": [0.2, 1.0], "flip": True}
    for name, value in (("sampling_power", 0.5), ("repeated_augmentation", 2)):
        assert f"data.{name}" not in compared()
        assert compared(train_transform=crop, **{name: value})[f"data.{name}"] == value
    steps = [{"name": "RandAugment", "num_ops": 1}]
    assert "data.train_transform.augment" not in compared(train_transform=crop)
    assert compared(train_transform={**crop, "augment": steps})["data.train_transform.augment"] == steps


def test_a_checkpoint_of_an_earlier_version_has_the_settings_that_a_run_has_now() -> None:
    then = ["proxies.regularization_weight=0.3", "proxies.scale=1", "proxies.initialization=published"]
    assert comparable_settings(load_config("configs/demo_cpu.json", then)) == EARLIER_SETTINGS
    used = ["proxies.negatives=sampled", "proxies.share=0.5", "proxies.ratio=null", "proxies.learn_scale=true"]
    used += ["proxies.regularization_weight=0", "training.ema_decay=0.9", "training.float32_matmul=high"]
    used.append("proxies.class_mean_images=1")  # those of a start that is over
    found = comparable_settings(load_config("configs/demo_cpu.json", used))
    assert {name: value for name, value in found.items() if name not in EARLIER_SETTINGS} == {
        **{"proxies.negatives": "sampled", "proxies.share": 0.5, "proxies.learn_scale": True},
        **{"training.ema_decay": 0.9, "training.float32_matmul": "high"},
    }
