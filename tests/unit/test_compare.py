"""Two evaluations side by side: what is printed, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.report import main

PROTOCOL: dict[str, Any] = {
    "format": 1,
    "data": {
        "split": "test",
        "preprocessing": {"name": "resize", "size": 32},
        "left_out": [],
        "forward_batch_size": 64,
    },
    "clustering": None,
    "versions": {"numpy": "2.0.0", "torch": "2.14.1"},
}


def write(path: Path, protocol: dict[str, Any], **metrics: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {name.replace("_at_", "@"): value for name, value in metrics.items()}
    path.write_text(EvaluationResult(metrics, {}, 9, 3, 9, 0, 0, protocol).to_json())
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """PROTOCOL with `section__key=value` changed."""
    protocol = copy.deepcopy(PROTOCOL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = protocol
        for parent in parents:
            section = section[parent]
        section[last] = value
    return protocol


def test_a_run_stands_for_its_last_evaluation_and_differences_are_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write(run / "evaluation" / "step-000900.json", PROTOCOL, recall_at_1=0.1)
    write(run / "evaluation" / "step-001000.json", PROTOCOL, recall_at_1=0.5, nmi=0.25)
    write(run / "evaluation" / "validation-step-002000.json", PROTOCOL, recall_at_1=0.9)
    other = write(tmp_path / "other.json", PROTOCOL, recall_at_1=0.625, mrr=0.5)
    assert main(["compare", str(run), str(other)]) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        f"A: {run}, step 1000",
        f"B: {other}",
        "",
        "percent A B B - A",
        "recall@1 50.00 62.50 +12.50",
        "nmi 25.00 - -",
        "mrr - 50.00 -",
    ]
    assert err == ""


def test_other_protocols_are_refused_and_every_entry_that_differs_is_named_with_both_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "one.json", PROTOCOL, recall_at_1=0.5)
    protocol = changed(data__preprocessing={"name": "resize", "size": 64}, data__left_out=[3, 5], protocol="query")
    two = write(tmp_path / "two.json", protocol, recall_at_1=0.6)
    assert main(["compare", str(one), str(two)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    listed = [line.strip() for line in err.splitlines() if line.startswith("  ")]
    assert listed == [
        "data.left_out: [] | [3, 5]",
        "data.preprocessing.size: 32 | 64",
        'protocol: (not there) | "query"',
    ]
    assert err.startswith("error: ")
    assert "add --force" in err

    assert main(["compare", str(one), str(two), "--force"]) == 0
    out, err = capsys.readouterr()
    assert "+10.00" in out
    assert err.startswith("warning: ")
    assert "data.preprocessing.size: 32 | 64" in err
    assert "do not measure the same thing" in err


def test_of_long_values_the_difference_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = list(range(1000))
    one = write(tmp_path / "one.json", changed(data__left_out=images), recall_at_1=0.5)
    two = write(tmp_path / "two.json", changed(data__left_out=[*images[:100], 7]), recall_at_1=0.6)
    assert main(["compare", str(one), str(two)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left_out" in line]
    first, second = line.removeprefix("  data.left_out: ").split(" | ")
    assert first == "..., 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, ..."
    assert second == "..., 93, 94, 95, 96, 97, 98, 99, 7]"


def test_what_moves_last_digits_is_told_and_refuses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.json", PROTOCOL, recall_at_1=0.5)
    protocol = changed(versions__numpy="2.1.0", data__forward_batch_size=8, data__weights=["torch.bfloat16"])
    two = write(tmp_path / "two.json", protocol, recall_at_1=0.6)
    assert main(["compare", str(one), str(two)]) == 0
    out, err = capsys.readouterr()
    assert "+10.00" in out
    reasons = (
        'data.forward_batch_size: 64 | 8; data.weights: (not there) | ["torch.bfloat16"]; numpy: "2.0.0" | "2.1.0"'
    )
    assert err == f"note: also different, A | B: {reasons}\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file or directory; correct the path"),
        (lambda path: path.mkdir(), "found no evaluation/step-N.json"),
        (lambda path: path.write_text("{}"), "expected the JSON of an evaluation"),
        (lambda path: path.write_text('{"metrics": {}, "bounds": []}'), "expected the JSON of an evaluation"),
    ],
)
def test_what_is_no_evaluation_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    one = write(tmp_path / "one.json", PROTOCOL, recall_at_1=0.5)
    make(tmp_path / "two")
    assert main(["compare", str(one), str(tmp_path / "two")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert str(tmp_path / "two") in err
    assert message in err


def test_neither_a_run_nor_a_comparison_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "expected --run RUN or compare A B" in capsys.readouterr().err
