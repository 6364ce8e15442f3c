"""The launchers on the embedded shards: train, stop, resume, evaluate, and every way to be refused.

The run that most tests look at, and one that fails, are started by the real deepspeed command, others by the harness.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_proxygml.data.index import open_index
from dist_proxygml.data.pipeline import EpochOrder
from dist_proxygml.faults import VARIABLE
from tests.harness import free_port, run_command

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/demo_cpu.json"
# 20 steps of the demo: 2 optimizer steps a second are enough for a test on two busy cores
SHORT = (
    "training.max_steps=20",
    "training.batch_size=32",
    "checkpoint.every_steps=10",
    "telemetry.log_every_steps=1",
    "evaluation.kmeans_seeds=1",
    "schedule.warmup_steps=0",
)
QUICK = ("evaluation.at_start=false", "evaluation.raw_pixels=false")


def train(*arguments: str, num_ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ("launchers/train.py", "--config", CONFIG, *arguments)
    return run_command(*command, num_ranks=num_ranks, timeout=240, **variables)


def evaluate(*arguments: str, num_ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_command("launchers/evaluate.py", *arguments, num_ranks=num_ranks, timeout=240, **variables)


def train_with_deepspeed(*settings: str) -> subprocess.CompletedProcess[str]:
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "launchers/train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(
        [*command, "--config", CONFIG, "--set", *settings],
        cwd=ROOT,
        env=environment,
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )


def lines(run_directory: Path, kind: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 20 steps on two ranks."""
    runs = tmp_path_factory.mktemp("runs")
    done = train_with_deepspeed(f"runs_dir={runs}", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recall@1" in done.stdout.lower()
    assert "report.html" in done.stdout
    return runs / "demo_cpu"


@pytest.mark.timeout(300)
def test_a_run_leaves_everything_that_it_promises(trained: Path) -> None:
    training, evaluations = lines(trained, "train"), lines(trained, "evaluation")
    assert [line["step"] for line in training] == list(range(1, 21))
    assert [line["step"] for line in evaluations] == [0, 20]
    losses = [line["loss"] for line in training]
    assert sum(losses[10:]) < sum(losses[:10])
    assert {
        "classification",
        "regularization",
        "kept_classes",
        "lr_backbone",
        "lr_proxies",
        "gradient_norm_backbone",
    } <= training[0].keys()
    assert {"gradient_norm_proxies", "images_per_second", "memory_gib"} <= training[0].keys()
    assert evaluations[-1]["recall@1"] != evaluations[0]["recall@1"]
    pixels = json.loads((trained / "evaluation" / "pixels.json").read_text())
    assert pixels["metrics"]["recall@1"] == pytest.approx(0.362, abs=0.002)  # measured apart from the trainer
    names = [path.name for path in sorted((trained / "checkpoints").iterdir())]
    assert names == ["latest", "step-000010", "step-000020"]
    assert "<html" in (trained / "report.html").read_text()
    assert json.loads((trained / "config.json").read_text())["training"]["max_steps"] == 20


@pytest.mark.timeout(300)
def test_tensorboard_reads_the_scalars_and_images_back(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    losses = [scalar.value for scalar in events.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in lines(trained, "train")], rel=1e-6)
    assert len(events.Scalars("evaluation/recall@1")) == 2
    assert events.Tags()["images"]


@pytest.mark.timeout(300)
def test_a_stopped_run_resumes_with_the_same_losses(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "demo_cpu")
    shutil.rmtree(tmp_path / "demo_cpu" / "checkpoints" / "step-000020")
    done = train("--set", f"runs_dir={tmp_path}", *SHORT, num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming" in done.stdout
    first, again = lines(trained, "train"), lines(tmp_path / "demo_cpu", "train")
    assert [line["step"] for line in again] == list(range(1, 21))  # steps that were done again stand there once
    assert [line["images_per_second"] for line in again[10:]] != [line["images_per_second"] for line in first[10:]]
    for expected, got in zip(first, again, strict=True):
        assert (got["loss"], got["kept_classes"], got["lr_proxies"]) == (
            expected["loss"],
            expected["kept_classes"],
            expected["lr_proxies"],
        )
    assert lines(tmp_path / "demo_cpu", "evaluation")[-1] == lines(trained, "evaluation")[-1]


@pytest.mark.timeout(300)
def test_a_run_that_resumes_on_one_rank_goes_apart_as_slowly_as_rounding_does(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "demo_cpu")
    shutil.rmtree(tmp_path / "demo_cpu" / "checkpoints" / "step-000020")
    done = train("--set", f"runs_dir={tmp_path}", *SHORT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rank(s) on cpu; resuming" in done.stdout
    first, again = lines(trained, "train"), lines(tmp_path / "demo_cpu", "train")
    expected, got = [[line["loss"] for line in run] for run in (first, again)]
    assert got[:10] == expected[:10]
    assert got[10] == pytest.approx(expected[10], rel=1e-6)  # the same images and weights: float32's rounding
    # then what docs/benchmarks/2026-11-29-elastic-resume.md measured, and found after moving weights by one ulp as well
    assert got == pytest.approx(expected, rel=5e-3)
    before, after = [lines(run, "evaluation")[-1]["recall@1"] for run in (trained, tmp_path / "demo_cpu")]
    assert after == pytest.approx(before, abs=0.02)  # two seeds are as far apart


@pytest.mark.timeout(300)
def test_evaluating_a_checkpoint_repeats_the_run_to_the_last_digit(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    stored = tmp_path / "copy" / "evaluation" / "step-000020.json"
    expected = json.loads(stored.read_text())
    stored.unlink()
    done = evaluate("--run", str(tmp_path / "copy"), num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(stored.read_text()) == expected
    # another number of ranks, the same number of threads a rank: the same numbers; an older checkpoint: its own
    stored.unlink()
    older = tmp_path / "copy" / "evaluation" / "step-000010.json"
    done = evaluate("--run", str(tmp_path / "copy"), "--checkpoint", "step-000010")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(older.read_text())["metrics"] != expected["metrics"]
    arguments = ["--run", str(tmp_path / "copy"), "--checkpoint", "step-000020"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    done = evaluate(*arguments, "--verify", OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(stored.read_text()) == expected
    assert "faiss and counter agree on the ranks of all" in done.stdout
    done = evaluate(*arguments, "--protocol", "cub")
    assert done.returncode == 2
    assert "error: protocol 'cub' is that of CUB-200-2011: expected 100 classes" in done.stderr


@pytest.mark.timeout(300)
def test_a_finished_run_is_shown_again_and_never_continued_under_other_settings(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "demo_cpu")
    evaluation = tmp_path / "demo_cpu" / "evaluation" / "step-000020.json"
    evaluation.unlink()  # as if the run had been killed in its last evaluation
    command = ["--set", f"runs_dir={tmp_path}", *SHORT]
    done = train(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after training" in done.stdout
    assert evaluation.exists()
    assert len(lines(tmp_path / "demo_cpu", "train")) == 20
    configuration = (tmp_path / "demo_cpu" / "config.json").read_text()
    done = train(*command, "seed=1", "proxies.class_score=max", "proxies.ratio=0.1")
    assert done.returncode == 2
    changed = "proxies.class_score was unset, is max; proxies.ratio was 0.05, is 0.1; seed was 0, is 1."
    assert f"other settings: {changed}" in done.stderr
    assert (tmp_path / "demo_cpu" / "config.json").read_text() == configuration


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_zero_3_in_bf16_trains_and_its_checkpoint_gives_the_same_numbers(tmp_path: Path) -> None:
    changes = ["deepspeed.zero_optimization.stage=3", "deepspeed.bf16.enabled=true", "evaluation.at_start=false"]
    changes += ["evaluation.raw_pixels=false", "training.max_steps=4"]
    done = train("--set", f"runs_dir={tmp_path}", *SHORT, *changes, num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = tmp_path / "demo_cpu" / "evaluation" / "step-000004.json"
    expected = json.loads(stored.read_text())
    assert expected["protocol"]["data"]["weights"] == ["torch.bfloat16"]
    stored.unlink()
    done = evaluate("--run", str(tmp_path / "demo_cpu"), num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(stored.read_text()) == expected


@pytest.mark.timeout(300)
def test_a_signal_to_one_rank_ends_all_ranks_and_what_was_trained_is_saved(tmp_path: Path) -> None:
    changes = [f"runs_dir={tmp_path}", *SHORT, "evaluation.at_start=false", "evaluation.raw_pixels=false"]
    done = train("--set", *changes, num_ranks=2, **{VARIABLE: "step.update@1:3:signal=TERM"})
    assert done.returncode == 75, done.stdout + done.stderr
    steps = [line["step"] for line in lines(tmp_path / "demo_cpu", "train")]
    # A thread takes the signal, on a busy machine a step or two later, and it is looked at before a step.
    assert steps == list(range(1, len(steps) + 1))
    assert 3 <= len(steps) <= 6
    names = [path.name for path in sorted((tmp_path / "demo_cpu" / "checkpoints").iterdir())]
    assert names == ["latest", f"step-{steps[-1]:06d}"]


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_starting_anew_moves_the_earlier_run_aside(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "demo_cpu")
    changes = ["training.max_steps=1", "evaluation.at_start=false"]
    done = train("--resume", "never", "--set", f"runs_dir={tmp_path}", *SHORT, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines(tmp_path / "demo_cpu", "train")) == 1
    assert (tmp_path / "demo_cpu.1" / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["evaluation.recall_at=[5000]"], "change evaluation.recall_at"),
        (["deepspeed.gradient_cliping=1"], "did you mean 'gradient_clipping'?"),
        (["proxies.rato=0.1"], "did you mean 'ratio'?"),
        (["training.epochs=many"], "training.epochs: input should be a valid integer"),
        (["proxies.ratio=0.0001"], "raise proxies.ratio"),
        (["data.num_classes=500"], "data.num_classes is 500, but the split 'train' of shards/demo has 549 classes"),
        (["data.shards=shards/nowhere"], "shards/nowhere"),
        (["training.batch_size=7", "deepspeed.gradient_accumulation_steps=2"], "does not divide over 1 ranks x 2"),
        (["deepspeed.train_batch_size=128"], "deepspeed.train_batch_size is 128"),
        (["deepspeed.optimizer.type=Adam"], "use the section optimizer"),
        (["runs_dir=README.md"], "runs_dir=FOLDER"),
        (["backbone.name=timm/resnet5O"], "timm/resnet50"),
        (["backbone.pretrained=weights/none.pth"], "weights/none.pth"),
    ],
)
def test_a_mistake_is_refused_in_one_message_and_nothing_is_written(
    tmp_path: Path, changes: list[str], message: str
) -> None:
    runs = [] if any("runs_dir" in change for change in changes) else [f"runs_dir={tmp_path / 'runs'}"]
    done = train("--set", *runs, *changes)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(300)
def test_two_ranks_refuse_with_one_message(tmp_path: Path) -> None:
    done = train("--set", f"runs_dir={tmp_path / 'runs'}", "training.batch_size=63", num_ranks=2)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("does not divide over 2 ranks") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(300)
def test_a_damaged_image_is_named_by_the_rank_that_meets_it_and_ends_all_ranks(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(ROOT / "shards" / "demo", shards)
    for shard in sorted(shards.glob("train-*.tar")):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 0xFF  # the size stays, the crc does not
        shard.write_bytes(content)
    done = train_with_deepspeed(f"runs_dir={tmp_path}", f"data.shards={shards}", *QUICK)
    assert done.returncode != 0
    assert "crc32" in done.stderr + done.stdout
    assert "train-00000" in done.stderr + done.stdout


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_damaged_images_are_skipped_named_and_counted_in_class_balanced_training_on_two_ranks(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(ROOT / "shards" / "demo", shards)
    trained, tested = open_index(shards, "train"), open_index(shards, "test")
    first_step = EpochOrder(batch_size=32, images_per_class=4).of(trained)[:32]
    damaged = [(trained, int(first_step[0])), (trained, int(first_step[31])), (tested, 5)]
    for index, sample_id in damaged:
        row = index.samples[sample_id]
        with open(index.shard_paths[row["shard"]], "r+b") as shard:
            shard.seek(int(row["offset"]) + 40)
            shard.write(b"?!")
    changes = [f"runs_dir={tmp_path}", f"data.shards={shards}", *SHORT, "training.max_steps=2"]
    changes += [
        "proxies.initialization=class_mean",
        "data.images_per_class=4",
        "data.damaged_images=skip",
        "data.num_workers=1",
        "data.cache_images=false",
    ]
    done = train("--set", *changes, num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in batches of 8 classes x 4 images (the first epoch visits 8" in done.stdout
    run_directory = tmp_path / "demo_cpu"
    named = [json.loads(line)["image"] for line in (run_directory / "damaged.jsonl").read_text().splitlines()]
    assert sorted(named) == sorted(index.describe(sample_id) for index, sample_id in damaged)
    assert [line["damaged_images"] for line in lines(run_directory, "train")] == [2, 2]
    result = json.loads((run_directory / "evaluation" / "step-000002.json").read_text())
    assert (result["num_images"], result["num_damaged"]) == (2980, 1)
    assert "<img" in (run_directory / "report.html").read_text()


@pytest.mark.timeout(300)
def test_a_stopped_run_goes_on_at_its_image_with_another_batch_size_and_number_of_ranks(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "demo_cpu")
    shutil.rmtree(tmp_path / "demo_cpu" / "checkpoints" / "step-000020")
    changes = [f"runs_dir={tmp_path}", *SHORT, "training.batch_size=48"]
    done = train("--set", *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-000010 in epoch 1 after 320 of its images" in done.stdout
    # 2,977 images are 63 steps of 48, and the 2,657 that are left 56 of them: this is where step 7 would begin
    assert [line["step"] for line in lines(tmp_path / "demo_cpu", "train")] == list(range(1, 24))
    state = json.loads((tmp_path / "demo_cpu" / "checkpoints" / "step-000023" / "state.json").read_text())
    assert (state["epoch"], state["consumed"]) == (0, 320 + 13 * 48)


@pytest.mark.timeout(240)
def test_a_run_that_was_made_shorter_than_it_is_ends_at_once(trained: Path, tmp_path: Path) -> None:
    """The 20 steps of 32 images that are done are 40 of 16: beyond the last one."""
    shutil.copytree(trained, tmp_path / "demo_cpu")
    command = ["--set", f"runs_dir={tmp_path}", *SHORT]
    done = train(*command, "training.batch_size=16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after training" in done.stdout
    assert len(lines(tmp_path / "demo_cpu", "train")) == 20


@pytest.mark.timeout(300)
def test_a_rest_that_does_not_divide_is_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "demo_cpu")
    shutil.rmtree(tmp_path / "demo_cpu" / "checkpoints" / "step-000020")
    configuration = (tmp_path / "demo_cpu" / "config.json").read_text()
    # 2,977 images are 229 steps of 13, but the 2,657 that are left are not
    changes = [f"runs_dir={tmp_path}", *SHORT, "training.batch_size=13", "deepspeed.gradient_accumulation_steps=13"]
    done = train("--set", *changes)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "leave 9 for one step, which has 13 slots" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "demo_cpu" / "config.json").read_text() == configuration


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_a_stream_of_plain_shards_trains(tmp_path: Path) -> None:
    changes = [f"runs_dir={tmp_path}", *SHORT, "training.max_steps=3", "evaluation.at_start=false"]
    changes += ["data.mode=stream", "data.stream.urls=shards/demo/train-{000000..000005}.tar"]
    changes += ["data.stream.samples_per_epoch=2977", "data.cache_images=false", "data.num_workers=1"]
    changes += ["proxies.initialization=published"]  # class means need an index
    done = train("--set", *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a stream of 549 classes, 2,976 images an epoch" in done.stdout
    assert len(lines(tmp_path / "demo_cpu", "train")) == 3
    again = train("--set", f"runs_dir={tmp_path}", *SHORT)
    assert again.returncode == 2
    assert "data.mode was stream, is indexed" in again.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.name)
def test_every_configuration_validates_and_plans_without_data_or_gpu(path: Path) -> None:
    command = ["--config", str(path), "--dry-run", "2"]
    if json.loads(path.read_text())["data"].get("num_classes") is None:
        command += ["--set", "data.num_classes=100"]  # else its shards would say it
    done = run_command("launchers/train.py", *command)
    assert done.returncode == 0, done.stderr
    resolved, _, plan = done.stdout.partition("plan of the head")
    assert json.loads(resolved)["name"] == path.stem
    assert "bank optimizer state" in plan
    assert "messages per step" in plan
