"""What the command line of the evaluation changes of a run's settings, what it prints beside the table, and in which
order a result is stored.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_proxygml import evaluate
from dist_proxygml.checkpoint import folder
from dist_proxygml.checkpoint.model import BACKBONE_FILE
from dist_proxygml.config import load_config
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluate import _parser, legacy_lines, overrides, pair_lines, ties_line
from dist_proxygml.evaluation import run as evaluation_run
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable, load_table
from dist_proxygml.evaluation.evaluator import EvaluationResult, PairSettings
from dist_proxygml.evaluation.run import measured, result_settings, result_suffix
from dist_proxygml.evaluation.verification import Histogram, OperatingPoint, Verification
from dist_proxygml.storage.run_folder import step_name
from dist_proxygml.training import evaluate as training
from tests.harness import run_command
from tests.long_work import lasting
from tests.trained_runs import STEP, write_finished_run

ROOT = Path(__file__).resolve().parents[2]


def test_no_command_runs_that_the_folder_of_a_run_names(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    stored = json.loads((run / "config.json").read_text())
    stored["data"]["shards"] = f"pipe:touch {tmp_path}/pwned\x1b[2J #{{}}"
    (run / "config.json").write_text(json.dumps(stored))
    ended = run_command("launchers/evaluate.py", "--run", str(run))
    assert ended.returncode == 2
    assert "error: expected a location that runs no command" in ended.stderr
    assert "\x1b" not in ended.stderr
    assert not list(tmp_path.glob("pwned*"))


def test_a_checkpoint_that_takes_long_to_verify_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged one, which is verified once more to say what is wrong with it."""
    run = write_finished_run(tmp_path)
    (run / "checkpoints" / step_name(STEP) / BACKBONE_FILE).write_bytes(b"damage")
    monkeypatch.setattr(evaluate, "join_world", lambda **_: single_process())
    monkeypatch.setattr(evaluate, "set_arithmetic", lambda *_: None)  # which would stay
    with (
        lasting((folder, "verify_checkpoint")),
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(AgreedError, match="found damaged ones only"),
    ):
        evaluate.main(["--run", str(run)])


def evaluated_with(folder: Path, config: str, *arguments: str) -> tuple[str, str | None, str, list[int], bool]:
    """Split, gallery split, protocol, K and whether the published evaluation is repeated."""
    path = folder / "config.json"
    path.write_text(load_config(ROOT / "configs" / f"{config}.json").model_dump_json())  # as a run stores it
    resolved = load_config(path, overrides(_parser().parse_args(["--run", "runs/any", *arguments])))
    of = resolved.evaluation
    return resolved.data.test_split, of.gallery_split, of.protocol, of.recall_at, of.legacy_proxygml


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ("sop_8gpu", [], ("test", None, "sop", [1, 10, 100, 1000], False)),
        ("sop_8gpu", ["--data", "shards/other"], ("test", None, "custom", [1, 10, 100, 1000], False)),
        ("sop_8gpu", ["--split", "train"], ("train", None, "custom", [1, 10, 100, 1000], False)),
        ("demo_cpu", ["--protocol", "cub", "--legacy-proxygml"], ("test", None, "cub", [1, 2, 4, 8], True)),
        ("sop_8gpu", ["--protocol", "inshop"], ("query", "gallery", "inshop", [1, 10, 20, 30, 40, 50], False)),
        ("sop_8gpu", ["--protocol", "market1501"], ("query", "gallery", "market1501", [1, 5, 10], False)),
        ("paper/inshop", ["--protocol", "custom"], ("query", None, "custom", [1, 10, 20, 30, 40, 50], False)),
        ("paper/cub", ["--split", "q", "--gallery-split", "g"], ("q", "g", "custom", [1, 2, 4, 8], False)),
    ],
)
def test_the_command_line_changes_split_gallery_and_protocol_together(
    tmp_path: Path, config: str, arguments: list[str], expected: tuple[str, str | None, str, list[int], bool]
) -> None:
    assert evaluated_with(tmp_path, config, *arguments) == expected


def test_a_protocol_says_itself_whether_the_own_camera_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    by_camera = ["evaluation.protocol=custom", "evaluation.exclude_same=camera"]
    path.write_text(load_config(ROOT / "configs" / "sop_8gpu.json", by_camera).model_dump_json())

    def excluded(*arguments: str) -> str | None:
        return load_config(path, overrides(_parser().parse_args(["--run", "any", *arguments]))).evaluation.excluded

    assert excluded() == excluded("--split", "other") == excluded("--protocol", "msmt17") == "camera"
    assert excluded("--protocol", "cub") is None


def test_what_cannot_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="legacy_proxygml, got 'custom'"):
        evaluated_with(tmp_path, "demo_cpu", "--legacy-proxygml")


def test_a_run_that_keeps_the_best_by_a_metric_is_evaluated_without_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    own = load_config(ROOT / "configs" / "demo_cpu.json", ["checkpoint.keep_best=nmi"])
    path.write_text(own.model_dump_json())
    of_command = overrides(_parser().parse_args(["--run", "runs/any"]))
    assert load_config(path, [*of_command, "evaluation.kmeans_seeds=0"]).evaluation.kmeans_seeds == 0
    assert result_settings(load_config(path, of_command)) == result_settings(own)


def test_a_way_to_search_changes_no_number_and_anything_else_may() -> None:
    path = ROOT / "configs" / "demo_cpu.json"
    own = result_settings(load_config(path))
    ways = ["evaluation.search=counter", "evaluation.gallery=sharded", "evaluation.memory_budget=1 GiB"]
    ways += ["data.num_workers=3", "data.cache_images=false", "data.cache_directory=elsewhere"]
    assert result_settings(load_config(path, ways)) == own
    assert result_settings(load_config(path, ["evaluation.recall_at=[1]"])) != own
    assert result_settings(load_config(path, ["data.test_transform.size=24"])) != own


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        ([], [], ""),
        ([], ["evaluation.search=counter", "data.num_workers=3"], ""),
        (["--split", "train"], [], "-on-sop-train"),
        (["--split", "q", "--gallery-split", "g"], [], "-on-sop-q-in-g"),
        (["--data", "elsewhere/cub"], [], "-on-cub-0123abcd-test"),
        (["--data", "elsewhere/sop", "--protocol", "sop"], [], "-on-sop-0123abcd-test-as-sop"),
        ([], ["data.test_transform.size=256"], r"-on-sop-test-as-sop-with-[0-9a-f]{8}"),
        (["--protocol", "inshop"], [], r"-on-sop-query-in-gallery-as-inshop-with-[0-9a-f]{8}"),  # other K
    ],
)
def test_a_result_that_measured_something_else_has_a_name_of_its_own(
    tmp_path: Path, arguments: list[str], settings: list[str], expected: str
) -> None:
    own = load_config(ROOT / "configs" / "sop_8gpu.json")
    path = tmp_path / "config.json"
    path.write_text(own.model_dump_json())
    given = _parser().parse_args(["--run", "runs/any", *arguments])
    config = load_config(path, [*overrides(given), *settings])
    found = result_suffix(config, load_config(path), shards=given.data, digest="0123abcd4567")
    assert re.fullmatch(expected, found), found


def test_pairs_are_among_result_settings_and_without_them_names_stay() -> None:
    path = ROOT / "configs" / "demo_cpu.json"
    own, with_pairs = load_config(path), load_config(path, ["evaluation.pairs={}"])
    fewer = load_config(path, ["evaluation.pairs.far=[0.1]"])
    assert "pairs" not in result_settings(own)["evaluation"]
    assert len({result_suffix(each, own, shards=None, digest="") for each in (own, with_pairs, fewer)}) == 3


def test_pairs_are_measured_on_validation_classes_unless_they_are_listed() -> None:
    path = ROOT / "configs" / "demo_cpu.json"
    test, validation = (SimpleNamespace(split=split) for split in ("test", "validation"))
    every = load_config(path, ["evaluation.pairs.far=[0.1]"])
    assert measured(every, test).pairs == measured(every, validation).pairs == PairSettings(False, (0.1,))
    listed = load_config(path, ['evaluation.pairs={"of": "listed", "far": [0.1]}', "checkpoint.keep_best=recall@1"])
    assert measured(listed, test).pairs == PairSettings(True, (0.1,), "recall@1")
    assert measured(listed, validation).pairs is None


def test_what_pairs_say_is_printed_with_what_is_not_measurable() -> None:
    points = [OperatingPoint(1e-3, 0.5, 30, 2), OperatingPoint(0.1, 0.25, 40, 200)]
    pairs = Verification(40, 2000, points, [1e-4], [], Histogram(0, [40], [2000]), [0.75, 0.25], num_left_out=3)
    assert pair_lines(pairs) == [
        "pairs: 40 of the same class, 2,000 of different classes; 3 left out, with a damaged image",
        "TAR at FAR 1e-3: 75.00, score >= 0.50000",
        "TAR at FAR 1e-1: 100.00, score >= 0.25000",
        "TAR at FAR 1e-4: not measurable, it takes 10,000 pairs of different classes",
        "accuracy over 2 folds: 50.00 ± 35.36",
    ]
    assert pair_lines(None) == []


def test_other_settings_have_other_names() -> None:
    own = load_config(ROOT / "configs" / "sop_8gpu.json")
    changes = (["evaluation.kmeans_seeds=1"], ["evaluation.kmeans_seeds=2"], ["data.test_transform.size=256"])
    others = [load_config(ROOT / "configs" / "sop_8gpu.json", change) for change in changes]
    assert len({result_suffix(other, own, shards=None, digest="") for other in others}) == 3


def test_the_help_has_examples() -> None:
    assert "examples:" in _parser().format_help()


def test_numbers_of_the_published_evaluation_are_printed_apart() -> None:
    lines = legacy_lines({"recall@1": 0.5, "legacy_recall@1": 0.25, "legacy_nmi": 0.75})
    assert lines == ["recall@1 as in the published evaluation: 25.00", "nmi as in the published evaluation: 75.00"]


def test_the_metric_that_ties_change_most_is_named() -> None:
    bounds = {"recall@1": (0.78, 0.78), "map@r": (0.4, 0.4)}
    assert ties_line(bounds) == "ties: no metric changes by 0.005 points whichever way they go"
    bounds["map"] = (0.1, 0.2)
    assert ties_line(bounds) == "ties: with all of them gone wrong or right, map is 10.00 or 20.00"


def killed(*arguments: Any, **options: Any) -> Any:
    raise OSError("killed here")


def result_of_two_images() -> EvaluationResult:
    table = EmbeddingTable(torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1]))
    return EvaluationResult({"recall@1": 1.0}, {"recall@1": (1.0, 1.0)}, 2, 1, 2, 0, 0, {}, table)


def test_a_result_counts_as_stored_when_its_embeddings_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = evaluation_run.store_evaluation(tmp_path, "step-000004", result_of_two_images(), with_embeddings=True)
    assert EvaluationResult.from_json(stored.read_text()) == result_of_two_images()
    assert load_table(tmp_path / "embeddings" / "step-000004.npz").ids.tolist() == [0, 1]
    monkeypatch.setattr(evaluation_run, "save_table", killed)
    with pytest.raises(OSError, match="killed here"):
        evaluation_run.store_evaluation(tmp_path, "step-000008", result_of_two_images(), with_embeddings=True)
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["step-000004.json"]


def test_embeddings_replace_earlier_ones_and_what_a_killed_writer_left(tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    folder.mkdir()
    for name in ("step-000004.npz", "step-000004.npz.tmp-1", "step-000002.npz.partial"):
        (folder / name).touch()
    (folder / "validation-step-000004.partial").mkdir()
    evaluation_run.store_evaluation(tmp_path, "step-000008", result_of_two_images(), with_embeddings=True)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000008.npz", "validation-step-000004.partial"]


def test_a_result_is_logged_before_it_counts_as_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, str]] = []
    telemetry: Any = SimpleNamespace(
        say=lambda text: None,
        follow=lambda what, done, total: None,
        log_evaluation=lambda step, epoch, metrics, *, kind: logged.append((step, kind)),
    )
    engine = SimpleNamespace(zero_stage=0, module=torch.nn.Identity())
    config = load_config(ROOT / "configs" / "demo_cpu.json")
    state: Any = SimpleNamespace(config=config, context=single_process(), step=4, epoch=1, engine=engine, average=None)
    split: Any = SimpleNamespace(index=None, damage=None, is_validation=True)
    monkeypatch.setattr(training, "evaluate_model", lambda *arguments, **options: result_of_two_images())
    monkeypatch.setattr(training, "store_evaluation", killed)
    with pytest.raises(ValueError, match="killed here"):
        training.evaluate_run(state, split, telemetry, tmp_path)
    assert logged == [(4, "validation")]
