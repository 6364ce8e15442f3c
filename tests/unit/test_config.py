"""Configurations: what is accepted, and the message for everything that is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.config import Config, load_config, load_run_config, parse_config
from dist_proxygml.distributed.engine import engine_settings

ROOT = Path(__file__).resolve().parents[2]

SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "data": {
        "shards": "shards/demo",
        "num_classes": 10,
        "train_transform": {"name": "random_resized_crop"},
        "test_transform": {"name": "center_crop"},
    },
    "backbone": {"name": "small_cnn"},
    "proxies": {"ratio": 0.5},
    "optimizer": {"backbone_lr": 1e-3, "proxies_lr": 1e-2},
    "training": {"epochs": 3, "batch_size": 24},
}


def changed(**changes: Any) -> dict[str, Any]:
    """SMALLEST with `section__key=value` changed."""
    raw: dict[str, Any] = json.loads(json.dumps(SMALLEST))
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return raw


def message_of(raw: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^the test ") as caught:
        parse_config(raw, source="the test")
    return str(caught.value)


def test_the_metric_of_the_best_checkpoint_is_one_that_is_measured() -> None:
    for metric in (
        "recall@1",
        "recall@8",
        "map@r",
        "r_precision",
        "map",
        "mrr",
        "precision@1_macro",
        "nmi",
        "ami",
        "f1",
    ):
        assert parse_config(changed(checkpoint__keep_best=metric), source="the test").checkpoint.keep_best == metric
    assert "checkpoint.keep_best" in message_of(changed(checkpoint__keep_best="loss"))
    assert "the evaluation measures recall@1, recall@2" in message_of(changed(checkpoint__keep_best="recall@3"))
    assert "'nmi', but" in message_of(changed(checkpoint__keep_best="nmi", evaluation__kmeans_seeds=0))
    raw = changed(evaluation__protocol="sop", evaluation__kmeans_seeds=0, evaluation__legacy_proxygml=True)
    assert parse_config(raw, source="the test").evaluation.metrics[-2:] == ["legacy_recall@100", "legacy_recall@1000"]
    raw["checkpoint"] = {"keep_best": "legacy_recall@100"}
    assert "checkpoint.keep_best" in message_of(raw)


@pytest.mark.parametrize(("protocol", "recall_at"), [("cub", [1, 2, 4, 8]), ("sop", [1, 10, 100, 1000])])
def test_a_published_protocol_brings_its_k(protocol: str, recall_at: list[int]) -> None:
    config = parse_config(changed(evaluation__protocol=protocol), source="the test")
    assert config.evaluation.recall_at == recall_at
    assert parse_config(config.model_dump(), source="the test") == config  # as a run stores it
    message = message_of(changed(evaluation__protocol=protocol, evaluation__recall_at=[1, 5]))
    assert f"'{protocol}' reports Recall@K for K {recall_at}, got recall_at [1, 5]; remove recall_at" in message


def test_a_run_or_a_file_that_is_not_there_gets_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one/config.json", "configs/mine.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    for wrong in ("runs/two", "runs"):
        with pytest.raises(ValueError, match=rf"folder of a run at {wrong}, .* there are: runs/one$"):
            load_run_config(Path(wrong))
    with pytest.raises(ValueError, match=r"configs/mine\.json, .*demo_cpu"):
        load_config("mine")


def test_in_shop_searches_a_gallery_and_the_others_do_not() -> None:
    config = load_config(ROOT / "configs" / "paper" / "inshop.json")
    assert (config.data.test_split, config.evaluation.gallery_split) == ("query", "gallery")
    assert config.evaluation.recall_at == [1, 10, 20, 30, 40, 50]
    assert "'inshop' expects a gallery_split, got None" in message_of(changed(evaluation__protocol="inshop"))
    message = message_of(changed(evaluation__protocol="cub", evaluation__gallery_split="gallery"))
    assert "'cub' expects no gallery_split, got 'gallery'; remove it" in message
    assert "cub, cars, sop with legacy_proxygml, got 'custom'" in message_of(changed(evaluation__legacy_proxygml=True))
    assert "every query would find itself; remove evaluation.gallery_split" in message_of(
        changed(evaluation__gallery_split="test")
    )


def test_re_identification_leaves_out_the_querys_own_camera() -> None:
    def excluded(**settings: object) -> str | None:
        return parse_config(changed(**settings), source="the test").evaluation.excluded

    assert excluded() is None
    assert excluded(evaluation__exclude_same="camera") == "camera"
    market = {"evaluation__protocol": "market1501", "evaluation__gallery_split": "gallery"}
    assert excluded(**market) == excluded(**market, evaluation__exclude_same="camera") == "camera"
    assert "evaluation" in message_of(changed(evaluation__exclude_same="clothes"))
    message = message_of(changed(evaluation__protocol="cub", evaluation__exclude_same="camera"))
    assert "'cub' excludes the query alone, got exclude_same 'camera'" in message


@pytest.mark.parametrize(("wanted", "num_held_out"), [(None, 0), (3, 3), (0.25, 2), (0.36, 4), (9, 9)])
def test_validation_classes_are_a_number_or_a_share_and_the_bank_has_the_others(
    wanted: float | int | None, num_held_out: int
) -> None:
    config = parse_config(changed(data__validation_classes=wanted), source="the test")
    assert (config.num_validation_classes, config.num_trained_classes) == (num_held_out, 10 - num_held_out)
    assert config.num_trained_classes == 10 - num_held_out
    assert config.data.num_classes == 10


@pytest.mark.parametrize("wanted", [1, 10, 0.99, 0.1, -3, 0])
def test_validation_classes_that_leave_nothing_to_train_or_to_retrieve_are_refused(wanted: float | int) -> None:
    message = message_of(changed(data__validation_classes=wanted))
    assert "to hold out at least 2 and not all of the 10 classes of data.num_classes, got" in message
    assert str(wanted) in message


@pytest.mark.parametrize("wanted", [1.0, -0.5, 2.5])
def test_a_share_of_validation_classes_lies_between_none_and_all(wanted: float) -> None:
    assert "to be a share between 0 and 1 or a whole number" in message_of(changed(data__validation_classes=wanted))


def test_a_sampling_power_of_1_is_none() -> None:
    powers = [
        parse_config(changed(data__sampling_power=power), source="the test").data.sampling_power for power in (1, 0)
    ]
    assert powers == [None, 0]


def test_a_stream_has_no_validation_classes() -> None:
    stream = {"urls": "train-000000.tar", "samples_per_epoch": 100}
    raw = changed(data__validation_classes=2, data__mode="stream", data__stream=stream)
    assert "expected no validation_classes with a stream, got 2" in message_of(raw)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.name)
def test_every_configuration_of_the_project_is_valid_and_named_like_its_file(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("config", "num_classes", "per_class", "weight", "proxies_lr", "batch_norm"),
    [
        ("cub", 100, 12, 0.3, 0.03, "frozen"),
        ("cars", 98, 12, 0.3, 0.03, "frozen"),
        ("sop", 11_318, 1, 0.0, 0.3, "train"),
    ],
)
def test_published_settings_are_those_of_the_paper(
    config: str, num_classes: int, per_class: int, weight: float, proxies_lr: float, batch_norm: str
) -> None:
    c = load_config(ROOT / "configs" / "paper" / f"{config}.json")
    assert (c.data.num_classes, c.proxies.per_class, c.proxies.ratio) == (num_classes, per_class, 0.05)
    assert (c.proxies.regularization_weight, c.proxies.scale) == (weight, 1.0)
    assert (c.optimizer.name, c.optimizer.eps, c.optimizer.backbone_lr) == ("adam", 0.01, 1e-4)
    assert (c.optimizer.proxies_lr, c.backbone.batch_norm) == (proxies_lr, batch_norm)
    assert (c.optimizer.weight_decay, c.optimizer.proxies_weight_decay) == (1e-4, 1e-4)
    assert (c.schedule.name, c.schedule.milestones, c.schedule.gamma) == ("step", [20, 40], 0.1)
    assert (c.training.epochs, c.training.batch_size, c.training.frozen_trunk_epochs) == (50, 32, [2])
    assert (c.backbone.name, c.backbone.embedding_dim) == ("bn_inception", 512)
    assert c.data.train_transform.model_dump() == {
        "name": "random_resized_crop",
        "size": 224,
        "scale": (0.08, 1.0),
        "flip": True,
    }
    assert c.data.test_transform.model_dump() == {"name": "center_crop", "resize": 256, "size": 224}


STREAM = {"urls": "train-{000000..000003}.tar", "samples_per_epoch": 100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proxies__rato": 0.1}, "proxies.rato: unknown key; did you mean 'ratio'?"),
        ({"sed": 1}, "sed: unknown key; did you mean 'seed'?"),
        ({"data__test_transform__sise": 3}, "did you mean 'size'?"),
        ({"data__test_transform__name": "crop"}, "data.test_transform"),
        ({"training__epochs": "three"}, "training.epochs: input should be a valid integer"),
        ({"training__epochs": 0}, "training.epochs: input should be greater than or equal to 1, got 0"),
        ({"proxies__ratio": 1.5}, "proxies.ratio: input should be less than or equal to 1, got 1.5"),
        ({"proxies__topk": 3}, "one of proxies.ratio and proxies.topk"),
        ({"schedule__name": "step"}, "only 'step' has milestones"),
        ({"training__frozen_trunk_epochs": [4]}, "lie outside 1..3"),
        ({"deepspeed__optimizer": {"type": "Adam"}}, "use the section optimizer"),
        ({"deepspeed__amp": {"enabled": True}}, "fp16 or bf16"),
        ({"deepspeed__gradient_allreduce_op": "sum"}, "deepspeed.gradient_allreduce_op"),
        ({"deepspeed__managed_gradient_accumulation": False}, "must step together"),
        ({"deepspeed__compile": {"deepcompile": True}}, "remove it and use training.compile"),
        ({"deepspeed__activation_checkpointing": {"cpu_checkpointing": True}}, "use backbone.gradient_checkpointing"),
        ({"deepspeed__gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
        ({"data__train_transform__flip": "no"}, "flip: input should be a valid boolean"),
        ({"data__num_classes": "10"}, "data.num_classes: input should be a valid integer"),
        ({"training__epochs": True}, "training.epochs: input should be a valid integer"),
        ({"deepspeed__train_batch_size": 48}, "training.batch_size is 24 but deepspeed.train_batch_size is 48"),
        (
            {"deepspeed__gradient_accumulation_steps": 0},
            "gradient_accumulation_steps to be a whole number of at least 1",
        ),
        ({"name": "../elsewhere"}, "name: string should match pattern"),
        ({"optimizer__backbone_lr": float("nan")}, "optimizer.backbone_lr"),
        ({"data__mode": "stream"}, 'got mode "stream" without it'),
        ({"data__stream": STREAM}, 'got mode "indexed" with it'),
        (
            {"data__mode": "stream", "data__stream": STREAM, "data__num_classes": None},
            "expected data.num_classes with a stream, which has no index that says it",
        ),
        (
            {"data__mode": "stream", "data__stream": STREAM, "data__images_per_class": 2, "data__drop_last": True},
            "expected none of images_per_class, drop_last with a stream",
        ),
        (
            {"data__mode": "stream", "data__stream": STREAM, "proxies__initialization": "class_mean"},
            "got class_mean, which needs every image of the index",
        ),
        (
            {"data__mode": "stream", "data__stream": {**STREAM, "samples_per_epoch": 23}},
            "samples_per_epoch of at least training.batch_size (24), got 23",
        ),
        ({"data__images_per_class": 5}, "a multiple of data.images_per_class, got 24 and 5"),
        ({"data__repeated_augmentation": 5}, "a multiple of data.repeated_augmentation, got 24 and 5"),
        ({"data__repeated_augmentation": 1}, "data.repeated_augmentation: input should be greater than or equal to 2"),
        (
            {"data__repeated_augmentation": 2, "data__images_per_class": 3},
            "expected no repeated_augmentation with images_per_class, which says itself how often",
        ),
        (
            {"data__repeated_augmentation": 2, "data__train_transform": {"name": "resize", "size": 8}},
            "got 'resize', which makes every copy of an image the same; take random_resized_crop or affine_jitter",
        ),
        (
            {"data__sampling_power": 0, "data__images_per_class": 3},
            "expected no sampling_power with images_per_class, which says itself how often",
        ),
        (
            {"data__sampling_power": 0.5, "data__shuffle_window": 3},
            "expected no shuffle_window with sampling_power, whose draws come from all shards, got 3",
        ),
        ({"data__sampling_power": 1.5}, "data.sampling_power: input should be less than or equal to 1, got 1.5"),
        (
            {
                "data__mode": "stream",
                "data__stream": STREAM,
                "data__repeated_augmentation": 2,
                "data__sampling_power": 0,
            },
            "expected none of repeated_augmentation, sampling_power with a stream",
        ),
        (
            {"data__test_transform": {"name": "random_resized_crop", "augment": [{"name": "RandAugment"}]}},
            "expected no test_transform.augment, got 'RandAugment'",
        ),
        (
            {"data__train_transform": {"name": "random_resized_crop", "augment": [{"num_ops": 2}]}},
            "data.train_transform.random_resized_crop.augment.0.name: required, but missing",
        ),
        ({"data__cache_limit": "20 GB"}, "data.cache_limit"),
        ({"data__max_damaged": 1.5}, "data.max_damaged"),
    ],
)
def test_a_mistake_is_explained(changes: dict[str, Any], message: str) -> None:
    assert message in message_of(changed(**changes))


def test_all_mistakes_are_told_at_once() -> None:
    text = message_of(changed(proxies__rato=1, training__epochs="x"))
    assert "rato" in text
    assert "training.epochs" in text


def test_a_missing_key_is_named() -> None:
    raw = changed()
    del raw["optimizer"]["proxies_lr"]
    assert "optimizer.proxies_lr: required, but missing" in message_of(raw)


def test_overrides_are_json_where_they_can_be_and_text_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(SMALLEST))
    changes = ["seed=3", "data.shards=/some/where", "deepspeed.bf16.enabled=true", "schedule.warmup_steps=5"]
    config = load_config(path, changes)
    assert (config.seed, config.data.shards, config.schedule.warmup_steps) == (3, "/some/where", 5)
    assert config.deepspeed == {"bf16": {"enabled": True}}
    with pytest.raises(ValueError, match=r"--set.*KEY=VALUE"):
        load_config(path, ["seed"])
    with pytest.raises(ValueError, match=r"--set seed\.deeper=1"):
        load_config(path, ["seed=1", "seed.deeper=1"])


def test_a_file_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{]")
    with pytest.raises(ValueError, match=r"real\.json"):
        load_config(tmp_path / "reel.json")
    with pytest.raises(ValueError, match=r"JSON in .*\.json"):
        load_config(tmp_path / "real.json")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(SMALLEST).replace('"ratio": 0.5', '"ratio": 0.5, "topk": null, "ratio": 0.1')
    (tmp_path / "twice.json").write_text(text)
    with pytest.raises(ValueError, match=r"twice\.json.*'ratio'"):
        load_config(tmp_path / "twice.json")


@pytest.mark.parametrize(
    ("encoding", "named"), [("utf-16", "UTF-16"), ("latin-1", "another encoding"), ("utf-8-sig", None)]
)
def test_a_file_is_read_in_utf_8_with_or_without_a_mark_and_another_encoding_is_named(
    tmp_path: Path, encoding: str, named: str | None
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(changed(runs_dir="café"), ensure_ascii=False), encoding=encoding)
    if named is None:
        assert load_config(path).runs_dir == "café"
    else:
        with pytest.raises(ValueError, match=rf"odd\.json.*UTF-8.*{named}"):
            load_config(path)


def test_what_a_plain_ascii_locale_cannot_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(changed(runs_dir="café")))
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    with pytest.raises(ValueError, match=r"ascii.*LC_ALL"):
        load_config(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 10**22),
        ("seed", 10**400),
        ("training__batch_size", 2**63),
        ("deepspeed__gradient_clipping", float("nan")),
        ("backbone__options", {"width": [float("inf")]}),
    ],
)
def test_a_number_that_64_bits_do_not_hold_is_refused_by_its_key(key: str, value: Any) -> None:
    message = message_of(changed(**{key: value}))
    assert key.replace("__", ".") in message
    assert "expected a finite number of at most 2^62" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"gradient_clipping": "auto"}, 'a value for deepspeed.gradient_clipping, got "auto"'),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            'deepspeed.zero_optimization.reduce_bucket_size, got "a',
        ),
        ({"gradient_clipping": -1}, "deepspeed.gradient_clipping to be a number of at least 0, got -1"),
        ({"bf16": True}, 'deepspeed.bf16 to be an object such as {"enabled": true}, got True'),
        ({"fp16": {"enabled": 1}}, "deepspeed.fp16.enabled to be true or false, got 1"),
        ({"zero_optimization": True}, "deepspeed.zero_optimization to be an object, got True"),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage 0, 1, 2 or 3, got 4"),
        ({"prescale_gradients": "yes"}, "deepspeed.prescale_gradients to be true or false, got 'yes'"),
    ],
)
def test_a_value_that_deepspeed_would_stumble_over_is_refused(section: dict[str, Any], expected: str) -> None:
    assert expected in message_of(changed(deepspeed=section))


@pytest.mark.parametrize("key", ["proxies__memory_budget", "evaluation__memory_budget", "data__cache_limit"])
@pytest.mark.parametrize("size", ["0 B", "0.5 B", "9" * 400 + " TiB"])
def test_a_number_of_bytes_that_nothing_fits_or_fills_is_refused(key: str, size: str) -> None:
    message = message_of(changed(**{key: size}))
    assert f"{key.replace('__', '.')}: expected from 1 B to 2^62 bytes, got {size[:40]}; change it" in message
    assert len(message) < 300


def test_no_number_of_ranks_is_proposed_where_none_divides() -> None:
    config = parse_config(changed(training__batch_size=64, deepspeed__gradient_accumulation_steps=3), source="a test")
    with pytest.raises(ValueError, match=r"\b3\b.*deepspeed\.gradient_accumulation_steps"):
        config.micro_batch_size(1)


def test_the_batch_divides_over_ranks_and_micro_batches() -> None:
    config = parse_config(changed(deepspeed__gradient_accumulation_steps=2), source="the test")
    assert [config.micro_batch_size(ranks) for ranks in (1, 2, 3)] == [12, 6, 4]
    with pytest.raises(ValueError, match=r"\b5 ranks.*\b2 micro-batches.*\b10\b"):
        config.micro_batch_size(5)
    stated = parse_config(changed(deepspeed__train_micro_batch_size_per_gpu=8), source="the test")
    assert stated.micro_batch_size(3) == 8
    with pytest.raises(ValueError, match=r"train_micro_batch_size_per_gpu.*\b8\b"):
        stated.micro_batch_size(2)


def test_deepspeed_gets_its_section_as_it_is_and_the_batch_sizes() -> None:
    section = {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    config = parse_config(changed(deepspeed=section), source="the test")
    settings = engine_settings(config, 3)
    assert section.items() <= settings.items()
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [settings[size] for size in sizes] == [24, 8, 1]


def test_the_resolved_configuration_reads_back_as_the_same() -> None:
    config = parse_config(SMALLEST, source="the test")
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["evaluation.gallery_split=gallery"], r"data\.test_split.*evaluation\.gallery_split 'gallery', got null"),
        (["evaluation.protocol=cub"], r"data\.test_split.*evaluation\.protocol 'cub', got null"),
    ],
)
def test_what_needs_a_test_split_is_refused_without_one(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(ROOT / "configs" / "demo_cpu.json", ["data.test_split=null", *changes])


def test_without_a_test_split_only_validation_classes_are_evaluated() -> None:
    def is_evaluated(*changes: str) -> bool:
        return load_config(ROOT / "configs" / "demo_cpu.json", changes).is_evaluated

    assert is_evaluated()
    assert not is_evaluated("data.test_split=null", "checkpoint.keep_best=recall@1")
    assert is_evaluated("data.test_split=null", "data.validation_classes=0.1")
