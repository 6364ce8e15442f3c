"""Names in the folder of a run."""

from pathlib import Path

from dist_proxygml.storage.run_folder import RunFolder, by_step, step_in, step_name


def test_what_belongs_to_a_step_is_found_under_the_name_that_it_was_given(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    steps = (30, 1_000_000, 2)
    for step in steps:
        for of_validation in (False, True):
            path = run.evaluation(step_name(step, of_validation=of_validation))
            path.parent.mkdir(exist_ok=True)
            path.touch()
            assert step_in(path.name) == step
    others = ("pixels", f"{step_name(99)}-on-shards-test", "evaluate-step-000099", "step-", "step-000099.json.tmp-7")
    for name in others:
        run.evaluation(name).touch()
    assert step_in(others[1]) == 99
    assert [step_in(name) for name in ("pixels.json", "evaluate-step-000099.json", "step-.json")] == [None] * 3
    for of_validation in (False, True):
        found = run.evaluations(of_validation=of_validation)
        assert list(found) == sorted(steps)  # by number, not by letters
        assert found[30] == run.evaluation(step_name(30, of_validation=of_validation))
    assert by_step(run.checkpoints) == {}
