"""The harness of tables of retrieval results: rows are trained by the real command, once, resumed where they were
stopped, and repeated with the same numbers.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import figures, retrieval
from benchmarks.tables import Row, Table
from benchmarks.tables.methods import METHODS
from benchmarks.tables.table import SHORT
from dist_proxygml.backbones.from_weights import fill_from_weights
from dist_proxygml.evaluation.compare import open_result
from dist_proxygml.faults import VARIABLE
from dist_proxygml.head import optim

pytestmark = pytest.mark.ci  # 40 s: ten starts of training

ROOT = Path(__file__).parents[2]
TINY = (*SHORT, "training.max_steps=4", "training.batch_size=16", "backbone.options.width=4", "schedule.warmup_steps=1")
TINY = (*TINY, "telemetry.log_every_steps=1")


def tiny(*, embedding_dims: tuple[int, ...] = (8, 16)) -> Table:
    rows = [
        Row(f"dim-{d}", {"dim": d}, (*TINY, f"backbone.embedding_dim={d}"), "configs/demo_cpu.json", (0,))
        for d in embedding_dims
    ]
    rows[-1] = rows[-1]._replace(ranks=2)
    return Table("tiny", "Does it run?", "docs/tiny.md", rows)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tiny.jsonl").read_text().splitlines()]


def test_rows_are_made_once_continued_where_they_were_stopped_and_repeated_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, places = tmp_path / "results", {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    assert not retrieval.make([tiny()], **places, minutes=0)  # the time is over before it begins
    assert not results.exists()

    # 1. The first row is told to stop in its second step, saves, and is no result; then it goes on to the end.
    monkeypatch.setenv(VARIABLE, "step.begin@0:1:signal=TERM")
    assert not retrieval.make([tiny()], **places)
    monkeypatch.delenv(VARIABLE)
    assert not results.exists()
    log = retrieval.log_of(next(retrieval.to_do([tiny()], **places)))
    assert "saved after step 2" in log.read_text()
    assert retrieval.make([tiny()], **places)
    assert "resuming" in log.read_text()
    first, second = lines_of(results)
    assert (first["row"], second["row"], first["steps"], second["steps"]) == ("dim-8", "dim-16", 4, 4)

    # 2. A line has what the run says of itself, and the command that repeats it.
    run = tmp_path / "runs" / "tiny" / "dim-16_seed-0"
    evaluation = open_result(run).result
    assert second["test"]["recall@1"] == round(evaluation.metrics["recall@1"], 6)
    assert second["validation"]["map@r"] > 0
    queries_C, hits_C = figures.unpack_hits(second["hits"])
    assert round(hits_C.sum() / queries_C.sum(), 6) == second["test"]["recall@1"]
    assert second["test"].keys() == second["validation"].keys()
    assert second["versions"]["torch"] == evaluation.protocol["versions"]["torch"]
    assert "head_ms" not in second, "other runs may have shared the machine"
    assert second["memory_mib"] > 100
    assert "backbone.embedding_dim=16 seed=0" in second["trains"]
    assert second["command"].endswith("--table tiny --row dim-16 --seed 0")

    # 3. What is finished is left alone; a row that is named is trained anew, also where its settings have not changed,
    # and continued where that was stopped.
    assert retrieval.make([tiny()], **places)
    assert len(lines_of(results)) == 2
    monkeypatch.setenv(VARIABLE, "step.begin@0:1:signal=TERM")
    assert not retrieval.make([tiny()], **places, rows=["dim-8"])
    monkeypatch.delenv(VARIABLE)
    log.write_text("")
    capsys.readouterr()
    assert retrieval.make([tiny()], **places, rows=["dim-8"])
    assert "; the same as before" in capsys.readouterr().out
    assert "resuming" in log.read_text()
    again = lines_of(results)[2]
    assert [again[name] for name in ("test", "validation", "loss")] == [
        first[name] for name in ("test", "validation", "loss")
    ]
    assert retrieval.finished(tiny(), results)["dim-8", 0] == again

    # 4. Other settings of a row are another run: its line does not count, and it is to do.
    other = tiny()
    other.rows[0] = other.rows[0]._replace(overrides=(*other.rows[0].overrides, "optimizer.proxies_lr=0.5"))
    assert set(retrieval.finished(other, results)) == {("dim-16", 0)}
    assert [run.name for run in retrieval.to_do([other], **places)] == ["dim-8_seed-0"]


def test_what_heads_take_is_measured_again_for_all_seeds_of_a_row(tmp_path: Path) -> None:
    # 100,000 x 64 float32 are 24.4 MiB: proxies, gradient and two moments of AdamW, or proxies and a number for each
    rows = [
        Row(name, {}, (*TINY, "data.num_classes=100000", "backbone.embedding_dim=64", *more.split()), seeds=(0, 1))
        for name, more in {
            "adam": "proxies.ratio=null proxies.negatives=all",
            "rowwise": "proxies.ratio=null proxies.topk=10 optimizer.proxies_name=rowwise_adagrad "
            "optimizer.proxies_weight_decay=0",
            "unfinished": "",
        }.items()
    ]
    table = Table("tiny", "How much?", "docs/tiny.md", rows)
    for run in retrieval.runs_of(table, tmp_path)[:4]:
        line = {"row": run.row.name, "seed": run.seed, "settings": run.settings, "loss": run.seed, "head_ms": 1e6}
        retrieval.append(table, line, tmp_path)
    retrieval.append(table, {"row": "adam", "seed": 0, "settings": "others", "head_ms": 1e6}, tmp_path)
    places = {"runs": tmp_path / "runs", "results": tmp_path}
    with pytest.raises(ValueError, match="adm"):
        retrieval.measure([table], retrieval.cost_of_head, **places, rows=["adm"])
    retrieval.measure([table], retrieval.cost_of_head, **places, rows=["adam"])
    assert [line["head_ms"] < 1e6 for line in lines_of(tmp_path)] == [True, True, False, False, False]
    retrieval.measure([table], retrieval.cost_of_head, **places)
    adam, same, rowwise, *_, other = lines_of(tmp_path)
    assert adam == same | {name: adam[name] for name in ("seed", "settings", "loss")}
    assert 4 * 24.4 < adam["head_mib"] < 5.5 * 24.4
    assert 24.4 < rowwise["head_mib"] < 2 * 24.4
    assert other["head_ms"] == 1e6


def test_what_a_step_takes_is_the_fastest_of_a_short_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [100.0, 400.0, 200.0]

    def train(run: retrieval.Run, *_: Any, **__: Any) -> bool:
        assert run.config.training.max_steps == 200
        run.folder.mkdir(parents=True)
        retrieval.log_of(run).touch()
        lines = [{"step": 50, "kind": "train", "images_per_second": rate} for rate in rates]
        (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return True

    monkeypatch.setattr(retrieval, "train", train)
    table = Table("tiny", "How long?", "docs/tiny.md", [Row("row", {}, TINY, seeds=(0,))])
    (run,) = retrieval.runs_of(table, tmp_path)
    retrieval.append(table, {"row": "row", "seed": 0, "settings": run.settings, "loss": 2.0}, tmp_path)
    places = {"runs": tmp_path / "runs", "results": tmp_path}
    retrieval.measure([table], retrieval.cost_of_step, **places)
    (line,) = lines_of(tmp_path)
    assert (line["loss"], line["step_ms"]) == (2.0, 1000 * 16 / 400)
    assert not list((tmp_path / "runs" / "tiny").iterdir())
    rates.clear()
    with pytest.raises(ValueError, match="row_short"):
        retrieval.measure([table], retrieval.cost_of_step, **places)


def test_what_a_head_takes_has_all_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step brings proxies to length 1, too, those of the kept classes where no others have moved."""
    importlib.import_module("dist_proxygml.training.step")  # which has the function that is replaced here
    brought: list[torch.Tensor | None] = []
    monkeypatch.setattr(optim, "bring_to_unit_length_", lambda proxies, classes_u: brought.append(classes_u))
    row_wise = ("optimizer.proxies_name=rowwise_adagrad", "optimizer.proxies_weight_decay=0", "proxies.unit_norm=true")
    for overrides, expected in (((), []), (row_wise[2:], [False] * 3), (row_wise, [True] * 3)):
        brought.clear()
        row = Row("row", {}, (*TINY, *overrides))
        retrieval.head_cost(retrieval.Run(tiny(), row, 0, Path()).config, num_repeats=1, warm_up=0)
        assert [classes_u is not None for classes_u in brought] == expected


def test_what_a_head_takes_is_of_batches_that_a_loss_of_pairs_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    step = importlib.import_module("dist_proxygml.training.step")
    totals: list[float] = []
    build = step.build_loss

    def build_watched(*arguments: Any) -> torch.nn.Module:
        loss = build(*arguments)
        loss.register_forward_hook(lambda module, inputs, output: totals.append(output.total.item()))
        return loss

    monkeypatch.setattr(step, "build_loss", build_watched)
    row = Row("row", {}, (*TINY, *METHODS["multi-similarity"].overrides.split()))
    retrieval.head_cost(retrieval.Run(tiny(), row, 0, Path()).config, num_repeats=4, warm_up=0)
    assert min(totals) > 0


def test_a_stopped_run_whose_colours_came_with_its_weights_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = json.dumps({"name": "timm/test_resnet", "embedding_dim": 8})
    table = Table(
        "tiny", "Does it go on?", "docs/tiny.md", [Row("timm", {}, (*SHORT, f"backbone={backbone}"), seeds=(0,))]
    )
    places = {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    run = next(retrieval.to_do([table], **places))
    run.folder.mkdir(parents=True)
    stored = run.folder / "config.json"
    stored.write_text(json.dumps(fill_from_weights(run.config).model_dump()))
    monkeypatch.setattr(retrieval, "train", lambda *_, **__: False)
    assert not retrieval.make([table], **places)
    assert stored.exists()
    table.rows[0] = table.rows[0]._replace(overrides=(*table.rows[0].overrides, "training.batch_size=16"))
    assert not retrieval.make([table], **places)
    assert not stored.exists()


def test_a_run_that_fails_says_why_and_is_no_result(tmp_path: Path) -> None:
    table = tiny(embedding_dims=(8,))
    table.rows[0] = table.rows[0]._replace(overrides=(*table.rows[0].overrides, "proxies.topk=1", "proxies.ratio=null"))
    with pytest.raises(ValueError, match="k = 1"):
        retrieval.make([table], runs=tmp_path / "runs", results=tmp_path)
    assert not (tmp_path / "tiny.jsonl").exists()
    with pytest.raises(ValueError, match="dim-9"):
        retrieval.make([table], runs=tmp_path / "runs", results=tmp_path, rows=["dim-9"])
    with pytest.raises(ValueError, match="--seed of 0, got 7"):
        retrieval.make([table], runs=tmp_path / "runs", results=tmp_path, seeds=[7])


def test_a_table_without_a_drawing_of_its_own_gets_a_line_for_each_row(tmp_path: Path) -> None:
    numbers = {"test": {"recall@1": 0.5, "map@r": 0.25}, "validation": {"map@r": 0.125}, "head_ms": 2.0}
    found = {("dim-8", 0): numbers | {"seconds": {"training": 3.0, "data": 1.5}, "memory_mib": 100}}
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "tiny.md"
    page.write_text("Before.\n<!-- table tiny -->old\n<!-- end of table tiny -->\nAfter.\n")
    assert figures.write_pages(tiny(), found, tmp_path) == [page]
    lines = page.read_text().splitlines()
    assert lines[0] == "Before."
    assert lines[-1] == "After."
    assert "| 8 | 1 | 50.00 ± n/a | 25.00 ± n/a | 12.50 ± n/a | 4.5 | 2 | 100 |" in lines
    assert "| 16 | 0 of 1 |  |  |  |  |  |  |" in lines
    assert figures.write_pages(tiny(), found, tmp_path) == []
    page.write_text("nothing")
    with pytest.raises(ValueError, match="table tiny"):
        figures.write_pages(tiny(), found, tmp_path)
