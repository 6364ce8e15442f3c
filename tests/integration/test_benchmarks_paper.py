"""The paper's experiments on downloads of made-up images: shards, runs, and a table beside what is published."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import paper
from benchmarks.paper import PAPER, PUBLISHED, Experiment, Outcome, compare, main, read_outcome, show
from dist_proxygml.cluster import sweep
from dist_proxygml.cluster.grid import Spread
from dist_proxygml.cluster.status import finished_mark
from dist_proxygml.config import load_config
from tests.harness import run_command
from tests.raw_downloads import cars_devkit, cub, inshop, sop, write_image, write_lines

ROOT = Path(__file__).parents[2]
TINY = (
    "backbone.name=small_cnn",
    "backbone.pretrained=null",
    "backbone.options.width=4",
    "backbone.embedding_dim=8",
    "proxies.per_class=2",
    "proxies.ratio=1",
    "data.num_workers=0",
    'data.train_transform={"name": "resize", "size": 16}',
    'data.test_transform={"name": "resize", "size": 16}',
    "training.batch_size=2",
    "training.epochs=2",
    "evaluation.at_start=false",
    "telemetry.progress_bar=false",
    "telemetry.projector=false",
)


def on(folder: Path, *names: str, settings: tuple[str, ...] = TINY) -> list[str]:
    """A trial with one seed on the CPU, of what lies in folder/raw."""
    where = ["--data", str(folder / "raw"), "--out", str(folder / "out"), "--gpus", "0", "--seeds", "1"]
    return [*where, "--dataset", *names, "--set", *settings]


def experiment(name: str, **given: Any) -> Experiment:
    arguments = ["--data", "downloads", "--dataset", name, "--out", "out", "--gpus", "0"]
    parsed = paper._parser().parse_args(arguments)
    vars(parsed).update(given)
    return Experiment(name, parsed, Path("out", name))


def larger_sop(root: Path) -> None:
    """With a second image of a test class, or nothing can be found."""
    sop(root)
    folder = root / "Stanford_Online_Products"
    with (folder / "Ebay_test.txt").open("a") as stream:
        stream.write("6 11319 1 bicycle_final/111011319_6.JPG\n")
    write_image(folder / "bicycle_final/111011319_6.JPG", 6)


def larger_inshop(root: Path) -> None:
    """With a second class to train, or there is no negative."""
    inshop(root)
    table, name = root / "Eval" / "list_eval_partition.txt", "img/MEN/Denim/id_00000009/01_1_front.jpg"
    number, header, *lines = table.read_text().splitlines()
    write_lines(table, [str(int(number) + 1), header, *lines, f"{name}     id_00000009       train"])
    write_image(root / "Img" / name, 9)


# ---- the numbers -----------------------------------------------------------------------------------------------------


def outcome(seed: int, best: tuple[float, float], last: tuple[float, float]) -> Outcome:
    both = [
        {"legacy_nmi": nmi, "nmi": 0.01, "legacy_recall@1": recall, "recall@1": 0.02} for nmi, recall in (best, last)
    ]
    return Outcome(seed, both[1], both[0], 40 + seed, 18)


def test_our_numbers_stand_beside_the_published_ones_and_a_difference_within_the_interval_is_a_tie() -> None:
    last = (0.7, 0.65)
    outcomes = [outcome(0, (0.708, 0.660), last), outcome(1, (0.710, 0.666), last), outcome(2, (0.712, 0.675), last)]
    text = show(experiment("cub"), outcomes)
    assert "| best | 71.00 ± 0.20 | 66.70 ± 0.75 |  |  |  |" in text  # sqrt((0.7² + 0.1² + 0.8²) / 2)
    assert "| last | 70.00 ± 0.00 | 65.00 ± 0.00 |" in text
    assert "| ProxyGML, published | 69.8 | 66.6 | 77.6 | 86.4 |  |" in text
    assert "| best - ProxyGML | +1.20 | +0.10, a tie |  |  |  |" in text
    assert "| best - multi-similarity |  | +1.00, a tie |" in text  # 4.30 * 0.75 / sqrt(3) = 1.86
    assert "of 18 epochs: 40, 41, 42." in text
    assert "3 of 3 seeds" in text
    assert "NOT comparable" not in text
    assert "NOT comparable" in show(experiment("cub", allow_partial=True), outcomes)
    assert "training.epochs=2" in show(experiment("cub", set=["training.epochs=2"]), outcomes)
    assert "published neither numbers nor settings" in show(experiment("inshop"), outcomes)


@pytest.mark.parametrize(
    ("ours", "published", "said"),
    [
        (Spread(0.66, 0.0017, (0.0,) * 3), 66.4, "-0.40, a tie"),  # 4.303 * 0.17 / sqrt(3) = 0.422
        (Spread(0.66, 0.0016, (0.0,) * 3), 66.4, "-0.40"),  # 0.397
        (Spread(0.66, 0.003, (0.0,) * 5), 66.4, "-0.40"),  # 2.776 * 0.3 / sqrt(5) = 0.372
        (Spread(0.67, None, ()), 66.4, "+0.60, of one seed"),
        (Spread(0.67, 0.1, ()), None, ""),
        (None, 66.4, ""),
    ],
)
def test_a_difference_says_what_it_is_worth(ours: Spread | None, published: float | None, said: str) -> None:
    assert compare(ours, published) == said


def test_the_page_lists_what_is_published() -> None:
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
    for method in (PAPER, "SoftTriple", "multi-similarity"):
        (line,) = re.findall(rf"^\| {method} \| (.*) \|$", page, flags=re.MULTILINE)
        published = [PUBLISHED[dataset, method] for dataset in ("cub", "cars", "sop")]
        assert line == " | ".join(f"{recall}, {'none' if nmi is None else nmi}" for nmi, recall, *_ in published)


def test_the_best_is_chosen_among_the_published_epochs_by_what_they_published_and_the_last_by_nobody(
    tmp_path: Path,
) -> None:
    recalls = {0: 0.99, 1: 0.3, 20: 0.8, 35: 0.5, 44: 0.6, 45: 0.6, 50: 0.4}
    lines = [
        {"kind": kind, "step": 10 * epoch, "epoch": epoch, "legacy_recall@1": value, "recall@1": 1 - value}
        for kind, factor in (("evaluation", 1), ("validation", 0.5))
        for epoch, recall in recalls.items()
        for value in (factor * recall,)
    ]
    lines.insert(3, {"kind": "train", "step": 5, "epoch": 1, "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_outcome(tmp_path, 7)
    assert (found.seed, found.best_epoch, found.num_compared) == (7, 45, 5)  # of equal ones the newest
    assert found.best == {"legacy_recall@1": 0.6, "recall@1": 0.4}
    assert found.last == {"legacy_recall@1": 0.4, "recall@1": 0.6}
    with pytest.raises(ValueError, match="found none"):
        read_outcome(tmp_path / "nowhere", 0)


@pytest.mark.parametrize("name", ["cub", "cars", "sop", "inshop"])
def test_what_is_trained_are_the_settings_of_the_paper(name: str) -> None:
    ours, theirs = experiment(name).config, load_config(ROOT / "configs" / "paper" / f"{name}.json")
    assert ours.evaluation.every_epochs == 1
    assert ours.evaluation.protocol == name
    assert ours.evaluation.legacy_proxygml == (name != "inshop")
    assert ours.training.epochs == max(paper.PUBLISHED_EPOCHS)
    data = {"data": theirs.data.model_copy(update={"shards": f"out/shards/{name}"}), "evaluation": ours.evaluation}
    assert ours.model_dump() == theirs.model_copy(update=data).model_dump()
    assert experiment(name, set=["evaluation.every_epochs=5"]).config.evaluation.every_epochs == 5


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda raw: (raw / "CUB_200_2011/classes.txt").unlink(), ["looked for images.txt", "classes.txt", "--data"]),
        (lambda raw: (raw / "CUB_200_2011/images").rename(raw / "elsewhere"), ["looked for", "images (CUB_200_2011)"]),
        (lambda raw: next(raw.rglob("*.jpg")).unlink(), ["1 of the 5 images", "--allow-partial"]),
        (lambda raw: None, ["expected 5864 images of 100 classes as published, got 3 of 2"]),
    ],
    ids=["no list", "no folder", "no image", "other counts"],
)
def test_a_wrong_root_is_refused_before_anything_is_written(
    harm: Callable[[Path], Any], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cub(tmp_path / "raw")
    harm(tmp_path / "raw")
    assert main(on(tmp_path, "cub")) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in said), error
    assert not (tmp_path / "out").exists()


def test_missing_weights_and_a_second_data_set_that_is_missing_are_found_before_the_first_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cub(tmp_path / "raw")
    weights = (f"backbone.pretrained={tmp_path}/bn.pth",)
    assert main([*on(tmp_path, "cub", settings=weights), "--allow-partial"]) == 2
    assert f"weights of BN-Inception at {tmp_path}/bn.pth, found no such file" in capsys.readouterr().err
    assert main([*on(tmp_path, "cub", "sop"), "--allow-partial"]) == 2
    assert "Ebay_train.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cub(tmp_path / "raw")
    assert main([*on(tmp_path, "cub"), "--seeds", "5", "--gpus", "3", "--allow-partial", "--dry-run"]) == 0
    build, train = capsys.readouterr().out.splitlines()
    shards = tmp_path / "out" / "shards" / "cub"
    assert build == f"python -m dist_proxygml.shard build cub200 --data {tmp_path}/raw --out {shards} --allow-partial"
    assert "launchers/sweep.py" in train
    assert "--seeds 5" in train
    assert "--gpus-per-node 1 --parallel 3" in train
    assert not (tmp_path / "out").exists()


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:k = 4 keeps at most as many negatives as positives:UserWarning")  # of two classes
def test_a_download_becomes_a_table_and_a_second_call_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def start(of: sweep.Sweep, jobs: sweep.StartedJobs, run: sweep.Run, arguments: Any, slot: int) -> Any:
        """Forks what submitit starts, to save imports."""
        started.append(run.point.name)
        config = tmp_path / f"{run.point.name}.json"
        config.write_text(json.dumps(run.job.settings))
        done = run_command("launchers/train.py", "--config", str(config), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout + done.stderr
        jobs.add("local", {run.point.name: "1"})
        mark = finished_mark(of.jobs_folder / run.point.name, "1", 0)
        mark.parent.mkdir(parents=True)
        mark.write_text("0")
        return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr(sweep, "start", start)
    cub(tmp_path / "raw")
    out, arguments = tmp_path / "out", [*on(tmp_path, "cub"), "--allow-partial"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert started == ["seed-0"]
    assert "| ProxyGML, published | 69.8 | 66.6 | 77.6 | 86.4 |  |" in said
    (line,) = map(json.loads, (out / "cub.jsonl").read_text().splitlines())
    assert (line["dataset"], line["seed"], line["num_compared"]) == ("cub", 0, 2)
    evaluation = json.loads((out / "cub/seed-0/evaluation/step-000004.json").read_text())
    assert line["last"] == evaluation["metrics"]
    assert line["versions"] == evaluation["protocol"]["versions"]
    assert f"| last | {100 * line['last']['nmi']:.2f} ± n/a | {100 * line['last']['recall@1']:.2f} ± n/a |" in said

    known = [line | {"commit": "of the run"}, line | {"seed": 4}]
    (out / "cub.jsonl").write_text("".join(json.dumps(each) + "\n" for each in known))
    index = (out / "shards/cub/index.json").stat()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert started == ["seed-0"], "nothing again"
    assert "nothing to do" in said
    assert (out / "shards/cub/index.json").stat() == index
    assert [*map(json.loads, (out / "cub.jsonl").read_text().splitlines())] == known, "a commit of today, or seeds less"
    assert (out / "cub.md").read_text() in said


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "layout", "row"),
    [
        ("cars", cars_devkit, "| ProxyGML, published | 72.4 | 85.5 | 91.8 | 95.3 |  |"),
        ("sop", larger_sop, "| ProxyGML, published | 90.2 | 78.0 | 90.6 | 96.2 |  |"),
        ("inshop", larger_inshop, "| Proxy-Anchor, published |  | 91.9 |  |"),
    ],
)
def test_one_command_is_enough(name: str, layout: Callable[[Path], None], row: str, tmp_path: Path) -> None:
    layout(tmp_path / "raw")
    command = [sys.executable, "-m", "benchmarks.paper", *on(tmp_path, name), "--allow-partial"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert row in done.stdout
    (run,) = csv.DictReader((tmp_path / "out" / name / "results.csv").read_text().splitlines())
    assert run["status"] == "finished"
    assert json.loads((tmp_path / "out" / f"{name}.jsonl").read_text())["last"]["recall@1"] == float(run["recall@1"])
