"""Runs that hold classes out: what is trained, evaluated, stored and gone on with; also when evaluations are killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_proxygml.checkpoint.model import open_trained
from dist_proxygml.config import Config, parse_config
from dist_proxygml.data.index import ClassEntry, open_index
from dist_proxygml.data.order import draw_classes
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.evaluation.best import select_results
from dist_proxygml.training.data import count_classes, open_training_data, open_validation
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards

REPOSITORY = Path(__file__).parents[2]
CLASS_SIZES = [5, 4, 6, 2, 7, 3, 5, 4]  # 36 images
HELD_OUT = sorted(draw_classes(8, seed=0)[:3].tolist())


def configuration(root: Path, *, data: dict[str, Any] | None = None, epochs: int = 2, **changes: Any) -> Config:
    raw = {
        "name": "held-out",
        "runs_dir": str(root / "runs"),
        "data": {
            "shards": str(root / "shards"),
            "train_split": "test",  # the only one that the noise shards have
            "num_classes": len(CLASS_SIZES),
            "validation_classes": 3,
            "num_workers": 0,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
            **(data or {}),
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 6, "options": {"width": 4}},
        "proxies": {"per_class": 2, "topk": 5, "initialization": "class_mean"},
        "optimizer": {"backbone_lr": 1e-3, "proxies_lr": 0.05},
        "training": {"epochs": epochs, "batch_size": 6},
        "evaluation": {"batch_size": 2, "recall_at": [1, 2], "kmeans_seeds": 0, "allow_seen_classes": True},
        "checkpoint": {"keep_best": "map@r", "keep_last": 1},
        "telemetry": {"progress_bar": False, "log_every_steps": 1},
    }
    return parse_config(raw | changes, source="the test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held-out")
    write_noise_shards(path / "shards", CLASS_SIZES)
    return path


@pytest.mark.parametrize("validation_classes", [None, 3])
def test_some_classes_train_of_those_that_are_not_held_out_and_fewer_are_a_part_of_more(
    root: Path, validation_classes: int | None
) -> None:
    names = {}
    for number in (2, 4):
        config = configuration(root, data={"train_classes": number, "validation_classes": validation_classes})
        opened = open_training_data(config)
        assert opened.index is not None
        assert opened.index.chosen is not None
        assert opened.index.num_classes == config.num_trained_classes == number
        assert opened.index.num_samples == sum(CLASS_SIZES[label] for label in opened.index.chosen.labels)
        names[number] = {entry.name for entry in opened.index.classes}
        held_out = set() if opened.validation is None else {entry.name for entry in opened.validation.classes}
        assert len(held_out) == (validation_classes or 0)
        assert not held_out & names[number]
    assert names[2] < names[4]
    most = 8 - (validation_classes or 0)
    with pytest.raises(ValueError, match=f"expected data.train_classes up to {most}"):
        configuration(root, data={"train_classes": most + 1, "validation_classes": validation_classes})


def train_all(context: ParallelContext, root: Path) -> dict[str, list[tuple[int, int, int]]]:
    """A run of two epochs, the same for a third one, one with class-balanced batches, one without validation classes
    that starts from the first; of each the shard, the offset and the label of every image that this rank trained on.
    """
    from dist_proxygml.training import loop
    from dist_proxygml.training.run import train

    seen: list[tuple[int, int]] = []
    train_step = loop.train_step

    def recorded(state: Any, micro_batches: Any, **options: Any) -> Any:
        for batch in micro_batches:
            seen.extend(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
        return train_step(state, micro_batches, **options)

    loop.train_step = recorded
    trained = {}
    quick = {"at_start": False, "every_epochs": 0, "recall_at": [1], "kmeans_seeds": 0, "batch_size": 2}
    quick["allow_seen_classes"] = True
    start = {"init_from": str(root / "runs" / "held-out")}
    for what, config in {
        "two epochs": configuration(root),
        "a third": configuration(root, epochs=3),
        "balanced": configuration(
            root, name="balanced", data={"images_per_class": 2}, epochs=1, evaluation=quick, checkpoint={}
        ),
        "all": configuration(
            root, name="all", data={"validation_classes": None}, epochs=1, evaluation=quick, checkpoint=start
        ),
    }.items():
        seen.clear()
        train(config, context)
        data = open_training_data(config)
        assert data.index is not None
        rows = [data.index.samples[sample_id].item() for sample_id, _ in seen]
        trained[what] = [(row[0], row[2], label) for row, (_, label) in zip(rows, seen, strict=True)]
    return trained


@pytest.fixture(scope="module")
def trained(root: Path) -> dict[str, list[tuple[int, int, int]]]:
    """What both ranks trained on."""
    ranks = run_ranks(train_all, 2, root, timeout=180)
    return {what: [image for rank in ranks for image in rank[what]] for what in ranks[0]}


Trained = dict[str, list[tuple[int, int, int]]]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("what", "epochs"), [("two epochs", 2), ("a third", 1), ("balanced", None), ("all", 1)])
def test_no_image_of_a_validation_class_is_trained_and_all_others_are(
    root: Path, trained: Trained, what: str, epochs: int | None
) -> None:
    index = open_index(root / "shards", "test")
    held_out = [] if what == "all" else HELD_OUT
    new_label = {old: new for new, old in enumerate(label for label in range(8) if label not in held_out)}
    expected = [
        (shard, offset, new_label[label])
        for shard, label, offset, *_ in index.samples.tolist()
        if label not in held_out
    ]
    if epochs is None:
        assert set(trained[what]) <= set(expected)
        assert len(trained[what]) == len(expected) // 6 * 6
    else:
        assert sorted(trained[what]) == sorted(expected * epochs)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["held-out", "balanced"])
def test_the_bank_has_the_trained_classes_and_its_table_their_names(root: Path, trained: Trained, name: str) -> None:
    model = open_trained(root / "runs" / name)
    assert model.bank().shape == (5, 2, 6)
    names = [entry.name for entry in open_index(root / "shards", "test").classes]
    assert [entry.name for entry in model.classes()] == [names[c] for c in range(8) if c not in HELD_OUT]
    assert [entry.label for entry in model.classes()] == list(range(5))


@pytest.mark.timeout(240)
def test_both_splits_are_evaluated_and_logged_each_time(root: Path, trained: Trained) -> None:
    run = root / "runs" / "held-out"
    num_trained = sum(size for label, size in enumerate(CLASS_SIZES) if label not in HELD_OUT)
    steps = [-(-num_trained // 6) * epoch for epoch in range(4)]
    names = {f"{prefix}step-{step:06d}.json" for step in steps for prefix in ("", "validation-")}
    assert {path.name for path in (run / "evaluation").iterdir()} == names
    results = {name: json.loads((run / "evaluation" / name).read_text()) for name in names}
    for name, result in results.items():
        of_validation = name.startswith("validation")
        assert result["num_classes"] == (3 if of_validation else 8)
        assert result["num_images"] == (36 - num_trained if of_validation else 36)
        assert result["protocol"]["data"]["split"] == ("validation classes of test" if of_validation else "test")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind, prefix in (("evaluation", ""), ("validation", "validation-")):
        logged = {line["step"]: line["map@r"] for line in lines if line["kind"] == kind}
        assert logged == {step: results[f"{prefix}step-{step:06d}.json"]["metrics"]["map@r"] for step in steps}
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").glob("events.*"))
    assert b"validation/map@r" in events
    assert b"evaluation/map@r" in events
    assert [path.name for path in (run / "embeddings").iterdir()] == [f"step-{steps[-1]:06d}.npz"]


@pytest.mark.timeout(240)
def test_the_checkpoint_that_is_best_on_validation_classes_is_kept_and_named(root: Path, trained: Trained) -> None:
    run = root / "runs" / "held-out"
    selected = select_results(run)
    assert list(selected) == ["last", "best on validation classes", "best on test"]
    scores = {
        int(path.stem.split("-")[-1]): json.loads(path.read_text())["metrics"]["map@r"]
        for path in (run / "evaluation").glob("validation-*")
    }
    del scores[0]
    best = max(scores, key=lambda step: (scores[step], step))
    assert selected["best on validation classes"].step == best
    # the last evaluation comes after the last save, which so knows of the others only
    of_saves = max(sorted(scores)[:-1], key=lambda step: (scores[step], step))
    kept = {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}
    assert kept == {of_saves, max(scores)}


@pytest.mark.timeout(240)
def test_the_validation_classes_are_evaluated_again_with_the_same_numbers(
    root: Path, trained: Trained, tmp_path: Path
) -> None:
    run = shutil.copytree(root / "runs" / "held-out", tmp_path / "run")
    (stored,) = sorted((run / "evaluation").glob("validation-*"))[-1:]
    expected = stored.read_text()
    stored.unlink()
    command = [sys.executable, "launchers/evaluate.py", "--run", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}  # as many as the ranks had

    def evaluate(*options: str) -> "subprocess.CompletedProcess[str]":
        told = [*command, *options]
        return subprocess.run(told, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=180)

    done = evaluate("--validation")
    assert done.returncode == 0, done.stderr
    assert stored.read_text() == expected
    assert f"written to {stored}" in done.stdout
    refused = evaluate("--validation", "--split", "test")
    assert refused.returncode == 2
    assert "expected --validation without --split" in refused.stderr
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    others = (configuration(root, data={"validation_classes": 2}), configuration(root, seed=1))
    for config, name in zip(others, ("class table", "seed"), strict=True):
        with pytest.raises(ValueError, match=rf"{name}.*data\.shards"):
            open_validation(config, checkpoint)
    (checkpoint,) = (root / "runs" / "all" / "checkpoints").glob("step-*")
    with pytest.raises(ValueError, match="'held-out'"):
        open_validation(configuration(root), checkpoint)


def train_without_telling(context: ParallelContext, config: Config) -> None:
    from dist_proxygml.training.run import train

    train(config, context)


@pytest.mark.timeout(240)
def test_the_best_is_kept_where_checkpoints_come_at_other_steps_than_evaluations(root: Path) -> None:
    checkpoint = {"keep_best": "map@r", "keep_last": 1, "every_steps": 1000}
    evaluation = {"batch_size": 8, "recall_at": [1], "kmeans_seeds": 0, "at_start": False, "allow_seen_classes": True}
    config = configuration(root, name="rare", epochs=3, checkpoint=checkpoint, evaluation=evaluation)
    run_ranks(train_without_telling, 1, config, timeout=180)
    scores = {
        int(path.stem.split("-")[-1]): json.loads(path.read_text())["metrics"]["map@r"]
        for path in (config.run_directory / "evaluation").glob("validation-*")
    }
    before_last = max(sorted(scores)[:-1], key=lambda step: (scores[step], step))
    kept = {int(path.name.removeprefix("step-")) for path in (config.run_directory / "checkpoints").glob("step-*")}
    assert len(scores) == 3
    assert kept == {before_last, max(scores)}


def start_and_be_killed(context: ParallelContext, root: Path, fault: str) -> None:
    os.environ |= {"RANK": str(context.rank), "DIST_PROXYGML_FAULT": fault}
    train_with_blocks(context, root)


def train_with_blocks(context: ParallelContext, root: Path) -> list[str]:
    """Train, keeping each batch of an evaluation; what is said of that."""
    from dist_proxygml.evaluation.blocks import BlockFolder
    from dist_proxygml.training import evaluate
    from dist_proxygml.training.run import train

    said: list[str] = []

    def block_folder(run_directory: Path, name: str, *, say: object) -> BlockFolder:
        return BlockFolder(run_directory / "embeddings" / f"{name}.partial", said.append, seconds=0.0)

    evaluate.block_folder = block_folder
    train(configuration(root, name="killed"), context)
    return said


@pytest.mark.ci
@pytest.mark.timeout(240)
def test_a_run_that_is_killed_in_evaluations_goes_on_in_the_middle_of_them(root: Path, trained: Trained) -> None:
    num_held_out = sum(CLASS_SIZES[label] for label in HELD_OUT)
    batches = -(-num_held_out // 2)
    own = batches - batches // 2  # of rank 1, of the validation classes
    # Before the first step, in the test split, whose second half has 9 batches; no checkpoint is there.
    with pytest.raises(RuntimeError):
        run_ranks(start_and_be_killed, 2, root, f"evaluate.batch@1:{own + 9}:kill9", timeout=180)
    folder = root / "runs" / "killed" / "embeddings" / "step-000000.partial" / "test"
    first = {path.name for path in folder.iterdir()}
    assert len(first & {f"{number:06d}-{number:06d}.block" for number in range(9, 18)}) == 8

    # After the first epoch, on the validation classes.
    left_of_first = 18 - len(first)
    own_of_first = left_of_first - left_of_first // 2
    with pytest.raises(RuntimeError):
        run_ranks(start_and_be_killed, 2, root, f"evaluate.batch@1:{own + own_of_first + own}:kill9", timeout=180)
    embeddings = root / "runs" / "killed" / "embeddings"
    (partial,) = [path for path in embeddings.iterdir() if path.name.endswith(".partial")]
    assert partial.name.startswith("validation-step-")
    num_done = len(list(partial.rglob("*.block")))
    assert 0 < num_done < batches

    (said,) = run_ranks(train_with_blocks, 1, root, timeout=180)
    assert said == [f"{2 * num_done} of {num_held_out} images of validation classes of test are embedded already"]
    assert [path.name for path in embeddings.iterdir()] == [f"step-{max(steps_of(root, 'killed')):06d}.npz"]
    # Up to there two ranks have trained, as in the other run; at step 0 the evaluation was that of three starts.
    step = int(partial.stem.rpartition("-")[2])
    for name in ("step-000000", "validation-step-000000", f"validation-step-{step:06d}", f"step-{step:06d}"):
        killed, undisturbed = (root / "runs" / run / "evaluation" / f"{name}.json" for run in ("killed", "held-out"))
        assert killed.read_text() == undisturbed.read_text(), name


def steps_of(root: Path, run: str) -> list[int]:
    return [int(path.stem.split("-")[-1]) for path in (root / "runs" / run / "evaluation").iterdir()]


def test_the_split_depends_on_seed_and_index_alone(root: Path) -> None:
    def held_out(**changes: Any) -> list[str]:
        data = open_training_data(configuration(root, **changes))
        assert data.index is not None
        assert data.validation is not None
        assert not {entry.name for entry in data.index.classes} & {entry.name for entry in data.validation.classes}
        assert data.index.num_samples + data.validation.num_samples == 36
        assert data.identity()["class table"] == data.index.class_table_sha256
        return [entry.name for entry in data.validation.classes]

    assert held_out() == [f"pattern {label} <&>" for label in HELD_OUT]
    assert held_out(name="other", training={"epochs": 9, "batch_size": 12}, data={"shuffle_window": 1}) == held_out()
    assert held_out(seed=1) != held_out()


def test_another_number_of_classes_is_refused_with_what_it_counts(root: Path) -> None:
    with pytest.raises(ValueError, match=r"num_classes.*\b5\b.*\b8\b.*validation"):
        open_training_data(configuration(root, data={"num_classes": 5}))


def test_a_share_counts_the_classes_that_the_shards_have_where_nobody_says_a_number(root: Path) -> None:
    config = count_classes(configuration(root, data={"num_classes": None, "validation_classes": 0.375}))
    assert (config.num_validation_classes, config.num_trained_classes) == (3, 5)
    data = open_training_data(config)
    assert data.validation is not None
    assert [entry.name for entry in data.validation.classes] == [f"pattern {label} <&>" for label in HELD_OUT]
    config = count_classes(configuration(root, data={"num_classes": None, "validation_classes": 8}))
    with pytest.raises(ValueError, match=r"\b2\b.*\b8\b"):
        open_training_data(config)


def test_a_start_from_a_model_that_has_seen_the_validation_classes_is_told(root: Path) -> None:
    from dist_proxygml.training.run import _trained_before

    data = open_training_data(configuration(root))
    assert data.index is not None
    assert data.validation is not None

    def told(classes: tuple[ClassEntry, ...]) -> str | None:
        model = SimpleNamespace(path="runs/first", has_class_names=True, classes=lambda: classes)
        return _trained_before(SimpleNamespace(model=model), data)  # type: ignore[arg-type]

    assert told(data.index.classes) is None
    assert told((*data.index.classes, data.validation.classes[1])) == (
        "1 of the 3 validation classes have been trained by runs/first: their metrics are optimistic"
    )
