"""Checkpoints under faults: damage is found and passed over, a kill leaves what was there, one rank fails for all.

Chosen: a rank is killed or made to fail before a named function, in processes of its own, so that nothing depends on
when something happens.
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from dist_proxygml.checkpoint import writer as checkpoint_module
from dist_proxygml.checkpoint.folder import (
    Retention,
    RunState,
    SavedCheckpoint,
    checkpoint_to_continue,
    checkpoints_to_forget,
    find_checkpoint,
    published_checkpoints,
    verify_checkpoint,
)
from dist_proxygml.checkpoint.writer import save_checkpoint
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, single_process
from dist_proxygml.storage import folder as published_folder
from tests.harness import run_ranks
from tests.small_checkpoints import KEEP_TWO, SETTINGS, PlainEngine, Saver, contents, names_in, parts, step

# ---- damage ----------------------------------------------------------------------------------------------------------


def save_two(context: ParallelContext, directory: Path) -> None:
    engine, loss, optimizer = parts(context, 1, seed=0)
    for number in (1, 2):
        step(context, engine, loss, optimizer, seed=number)
        state = RunState(number, 0, 6 * number, context.world_size, SETTINGS)
        saved = save_checkpoint(
            directory,
            state=state,
            engine=engine,
            loss=loss,
            bank_optimizer=optimizer,
            context=context,
            retention=Retention(keep_last=2),
        )
        assert saved == (directory / f"step-{number:06d}", [])


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints as two ranks with ZeRO stage 1 write them."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    run_ranks(save_two, 2, directory, timeout=180)
    return directory


@pytest.mark.timeout(240)
def test_the_manifest_lists_every_file_and_nothing_else(two_checkpoints: Path) -> None:
    newest = two_checkpoints / "step-000002"
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    found = contents(newest)
    del found["MANIFEST.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    assert all((newest / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    assert (manifest["step"], manifest["world_size"]) == (2, 2)
    assert manifest["written_with"]["torch"] == torch.__version__
    assert verify_checkpoint(newest) == []


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)  # the manifest's last brace


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "pattern",
    [
        "engine/*model_states.pt",
        "engine/*rank_1*optim_states.pt",
        "bank/__1_0.distcp",
        "bank/.metadata",
        "backbone.safetensors",
        "random-rank-001.pt",
        "state.json",
        "MANIFEST.json",
    ],
)
def test_a_damaged_file_of_the_newest_checkpoint_is_named_and_the_one_before_is_continued(
    two_checkpoints: Path, tmp_path: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)
    newest, previous = directory / "step-000002", directory / "step-000001"
    (path,) = newest.glob(pattern)
    damage(path)
    # a flipped bit of the manifest shows in the file that the changed line is about
    named = "step-000002" if path.name == "MANIFEST.json" else str(path.relative_to(newest))

    with pytest.raises(ValueError, match=named):
        find_checkpoint(directory, str(newest))
    with pytest.raises(ValueError, match=named):
        checkpoint_to_continue(directory, str(newest))
    with pytest.warns(UserWarning, match=named):
        assert find_checkpoint(directory, "auto") == previous
    found, (report,) = checkpoint_to_continue(directory, "auto")
    assert found == previous
    assert named in report
    assert report.endswith("passed over, now step-000002.damaged")
    assert names_in(directory) == ["latest", "step-000001", "step-000002.damaged"]
    assert checkpoint_to_continue(directory, "auto") == (previous, [])


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', '{"version": 1, "files": {"a": 1}}', '{"version": 2}'])
def test_a_manifest_that_is_none_is_a_problem_and_no_crash(tmp_path: Path, content: str) -> None:
    (tmp_path / "MANIFEST.json").write_text(content)
    (problem,) = verify_checkpoint(tmp_path)
    assert problem.startswith("MANIFEST.json")


def test_without_a_whole_checkpoint_a_run_starts_anew_and_says_why(tmp_path: Path) -> None:
    save = Saver(single_process(), tmp_path)
    for number in (1, 2):
        cut(save(number).path / "state.json")
    found, reports = checkpoint_to_continue(tmp_path, "auto")
    assert found is None
    assert [report.split(" ")[1] for report in reports] == [str(tmp_path / f"step-00000{n}") for n in (2, 1)]


def test_sizes_are_seen_without_reading_and_changed_bits_only_by_reading(tmp_path: Path) -> None:
    path = Saver(single_process(), tmp_path)(1).path
    flip_a_bit(path / "state.json")
    assert verify_checkpoint(path, deep=False) == []
    assert "state.json has sha256" in verify_checkpoint(path)[0]
    cut(path / "state.json")
    assert "state.json has" in verify_checkpoint(path, deep=False)[0]


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_rename(suffix: str) -> None:
    """Die before the rename of a path that ends so."""
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        if str(source).endswith(suffix):
            die()
        rename(source, target)

    os.rename = watched


def die_at_deletion(suffix: str) -> None:
    """Die when half of a folder that ends so is deleted."""
    delete = shutil.rmtree

    def watched(path: Path, ignore_errors: bool = False) -> None:
        if str(path).endswith(suffix) and path.exists():
            (path / "state.json").unlink()
            die()
        delete(path, ignore_errors)

    shutil.rmtree = watched


MOMENTS: dict[str, Callable[[], None]] = {
    "before the engine's part": lambda: setattr(PlainEngine, "save", die),
    "before the bank": lambda: setattr(checkpoint_module, "_dcp_save", die),
    "before the files": lambda: setattr(checkpoint_module, "_write_own", die),
    "before the hashes": lambda: setattr(checkpoint_module, "hash_files", die),
    "before the manifest": lambda: setattr(checkpoint_module, "_write_manifest", die),
    "before it is published": lambda: die_at_rename(".partial"),
    "before the pointer": lambda: setattr(checkpoint_module, "tidy_up", die),
    "before an old one goes": lambda: die_at_rename("step-000001"),
    "while an old one goes": lambda: die_at_deletion(".step-000001.deleted"),
    "while the replaced one goes": lambda: die_at_deletion(".step-000002.replaced"),
}


def save_until_killed(context: ParallelContext, directory: Path, moment: str, killed_rank: int, last: int) -> None:
    save = Saver(context, directory)
    save(1)
    save(2)
    all_gather_object(context, None)
    if context.rank == killed_rank:
        MOMENTS[moment]()
    save(last)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("moment", "killed_rank", "last", "newest"),
    [
        ("before the engine's part", 1, 3, 2),
        ("before the bank", 1, 3, 2),
        ("before the files", 0, 3, 2),
        ("before the hashes", 1, 3, 2),
        ("before the manifest", 0, 3, 2),
        ("before it is published", 0, 3, 2),
        ("before it is published", 0, 2, 2),  # the earlier one of the step is out of the way by then
        ("while the replaced one goes", 0, 2, 2),
        ("before the pointer", 0, 3, 3),
        ("before an old one goes", 0, 3, 3),
        ("while an old one goes", 0, 3, 3),
    ],
)
def test_a_killed_save_leaves_whole_checkpoints_and_the_run_goes_on(
    tmp_path: Path, moment: str, killed_rank: int, last: int, newest: int
) -> None:
    with pytest.raises(RuntimeError):
        run_ranks(save_until_killed, 2, tmp_path, moment, killed_rank, last, timeout=180)
    found, passed_over = checkpoint_to_continue(tmp_path, "auto")
    assert (found, passed_over) == (tmp_path / f"step-{newest:06d}", [])
    assert all(verify_checkpoint(path) == [] for path in published_checkpoints(tmp_path))
    assert not [name for name in names_in(tmp_path) if name.startswith(".") or ".tmp" in name]
    # the run comes to the step again
    save = Saver(single_process(), tmp_path)
    assert save(last).problems == []
    assert verify_checkpoint(tmp_path / f"step-{last:06d}") == []
    assert names_in(tmp_path) == ["latest", f"step-{last - 1:06d}", f"step-{last:06d}"]


@pytest.mark.parametrize("owner", [os, published_folder])
def test_a_checkpoint_that_cannot_take_the_place_of_an_earlier_one_leaves_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    save = Saver(single_process(), tmp_path)
    save(1)
    before = contents(tmp_path)
    rename, flush = os.rename, published_folder.flush

    def failing_rename(source: Path, target: Path) -> None:
        if target.name == "step-000001" and ".partial" in source.name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    def failing_flush(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        flush(path)

    monkeypatch.setattr(owner, *(("rename", failing_rename) if owner is os else ("flush", failing_flush)))
    with pytest.raises(AgreedError, match=r"step-000001.*Input/output error"):
        save(1)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    assert save(1).problems == []
    assert contents(tmp_path) != before


# ---- one rank fails --------------------------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("the library failed")


def fails_on_rank_1(context: ParallelContext, directory: Path) -> dict[str, tuple[str, bool]]:
    """Of each way to fail on one rank the error, and whether all was left as it was; a whole checkpoint at the end."""
    save = Saver(context, directory)
    save(1)
    before = contents(directory)
    adam = save.optimizer.state[save.loss.proxies]
    momentum = torch.zeros(4, 5)
    save.engine.optimizer.state[save.engine.module.weight]["momentum_buffer"] = momentum
    failures: dict[str, tuple[Any, str, Any]] = {
        "bank, no space": (FileSystemWriter, "write_data", no_space),
        "bank, library": (FileSystemWriter, "write_data", refuse),
        "files, no space": (torch, "save", no_space),
        "files, library": (torch, "save", refuse),
        "hashes": (published_folder, "_describe", no_space),
    }
    numbers = {
        "proxies": save.loss.proxies.data,
        "exp_avg_sq": adam["exp_avg_sq"],
        "backbone weight": save.engine.module.weight.data,
        "backbone mean": save.engine.module.mean,
        "momentum_buffer": momentum,
    }
    found = {}
    engine_save = PlainEngine.save
    PlainEngine.save = lambda *_: None  # its torch.save is not what fails here
    for what, (owner, name, failing) in failures.items():
        original = getattr(owner, name)
        if context.rank == 1:
            setattr(owner, name, failing)
        found[what] = error_of(save, 2), contents(directory) == before
        setattr(owner, name, original)
    PlainEngine.save = engine_save
    for bad in (float("nan"), float("-inf")):
        for what, tensor in numbers.items():
            element = tensor.flatten()[3].clone()
            if context.rank == 1:
                tensor.view(-1)[3] = bad
            found[f"{what} {bad}"] = error_of(save, 2), contents(directory) == before
            tensor.view(-1)[3] = element
    for what, name in {"manifest": "_write_manifest", "publish": "publish_folder"}.items():
        original = getattr(checkpoint_module, name)
        if context.is_main:
            setattr(checkpoint_module, name, no_space)
        found[f"{what} on rank 0"] = error_of(save, 2), contents(directory) == before
        setattr(checkpoint_module, name, original)
    assert save(2) == (directory / "step-000002", [])
    return found


def error_of(save: Saver, number: int) -> str:
    """What a save that fails raises on this rank, when the others are done with it as well."""
    with pytest.raises(AgreedError) as failure:
        save.save(number)
    all_gather_object(save.context, None)
    return str(failure.value)


@pytest.mark.timeout(240)
def test_one_rank_that_fails_fails_all_with_one_error_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    first, second = run_ranks(fails_on_rank_1, 2, tmp_path, timeout=180)
    assert first == second
    assert all(untouched for _, untouched in first.values()), first
    for what, (message, _) in first.items():
        assert "step-000002 was not written, " in message
        assert "(on rank 0)" in message if "on rank 0" in what else "(on rank 1)" in message, (what, message)
        if "no space" in what or what == "hashes":
            assert "No space left on device" in message
        if "library" in what:
            assert "RuntimeError: the library failed" in message
        if "nan" in what or "inf" in what:
            assert f"NaN or infinity in {'' if what.startswith(('proxies', 'backbone')) else 'the '}" in message
            assert what.split(" ")[0] in message
    assert len(first) == 17
    assert names_in(tmp_path) == ["latest", "step-000001", "step-000002"]
    assert verify_checkpoint(tmp_path / "step-000002") == []


def save_with_little_space(context: ParallelContext, directory: Path) -> list[str]:
    """A save in which one rank may not write files of more than 512 bytes, for each rank; then one that works."""
    engine, loss, optimizer = parts(context, 1, seed=0)
    step(context, engine, loss, optimizer, seed=1)

    def save() -> SavedCheckpoint:
        return save_checkpoint(
            directory,
            state=RunState(1, 0, 6, context.world_size, SETTINGS),
            engine=engine,
            loss=loss,
            bank_optimizer=optimizer,
            context=context,
            retention=KEEP_TWO,
        )

    messages = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for rank in range(context.world_size):
        if context.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        with pytest.raises(AgreedError) as failure:
            save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        all_gather_object(context, None)
        messages.append(str(failure.value))
        assert names_in(directory) == []
    save()
    return messages


@pytest.mark.timeout(240)
def test_a_rank_whose_part_of_the_engine_cannot_be_written_keeps_no_rank_waiting(tmp_path: Path) -> None:
    first, second = run_ranks(save_with_little_space, 2, tmp_path, timeout=180)
    assert first == second
    for rank, message in enumerate(first):
        assert "could not be written, is the disk full?" in message
        assert f"(on rank {rank})" in message
        assert ("model_states.pt", "optim_states.pt")[rank] in message
    assert verify_checkpoint(tmp_path / "step-000001") == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(AgreedError, match=r"step-000001.*checkpoints"):
        Saver(single_process(), tmp_path / "checkpoints")(1)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "scores", "forgotten"),
    [
        (Retention(1), {}, [3, 6, 9, 12, 15]),
        (Retention(3), {}, [3, 6, 9]),
        (Retention(9), {}, []),
        (Retention(1, keep_every=6), {}, [3, 9, 15]),
        (Retention(1, keep_every=5), {}, [3, 9]),  # 6 is the first from 5 on, 12 from 10, 15 from 15
        (Retention(1, keep_every=100), {}, [3, 6, 9, 12, 15]),
        (Retention(1, keep_best="recall@1"), {6: 0.5, 9: 0.4, 12: 0.1}, [3, 9, 12, 15]),
        (Retention(2, keep_every=9, keep_best="recall@1"), {3: 0.5, 6: 0.5}, [3, 12]),  # of equal ones the newest
    ],
)
def test_the_newest_every_so_many_and_the_best_are_kept(
    retention: Retention, scores: dict[int, float], forgotten: list[int]
) -> None:
    assert checkpoints_to_forget([3, 6, 9, 12, 15, 18], retention, scores=scores) == forgotten


def test_what_is_kept_does_not_depend_on_what_was_deleted_before() -> None:
    retention, kept = Retention(2, keep_every=7), []
    for number in range(3, 60, 3):
        kept.append(number)
        kept = sorted(set(kept) - set(checkpoints_to_forget(kept, retention, scores={})))
    at_once = checkpoints_to_forget(range(3, 60, 3), retention, scores={})
    assert kept == sorted(set(range(3, 60, 3)) - set(at_once)) == [9, 15, 21, 30, 36, 42, 51, 54, 57]


@pytest.mark.parametrize("prefix", ["", "validation-"])
def test_a_run_keeps_its_best_checkpoint_by_its_evaluations(tmp_path: Path, prefix: str) -> None:
    evaluations = tmp_path / "evaluation"
    evaluations.mkdir()
    directory = tmp_path / "checkpoints"
    save = Saver(single_process(), directory)
    retention = Retention(keep_last=1, keep_best="recall@1", by_validation=prefix == "validation-")
    kept = {}
    for number, score in enumerate([float("nan"), 0.8, 0.3, 0.5, 0.9, 0.1], start=1):
        assert save(number, retention).problems == []
        kept[number] = [path.name[-1] for path in published_checkpoints(directory)]
        document = json.dumps({"metrics": {"recall@1": score}})
        (evaluations / f"{prefix}step-{number:06d}.json").write_text(document)
        if prefix:  # the test split says the contrary
            (evaluations / f"step-{number:06d}.json").write_text(document.replace(str(score), str(1 - score)))
    assert kept == {1: ["1"], 2: ["2"], 3: ["2", "3"], 4: ["2", "4"], 5: ["2", "5"], 6: ["5", "6"]}
    (evaluations / f"{prefix}step-000005.json").write_text('{"metrics": {')  # as a killed run leaves it
    (problem,) = save(7, retention).problems
    assert problem.startswith("recall@1 of step-000005 cannot be read from")


def test_what_cannot_be_deleted_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Saver(single_process(), tmp_path)
    save(1)
    delete = shutil.rmtree

    def failing(path: Path, ignore_errors: bool = False) -> None:
        if str(path).endswith(".deleted") and path.exists():
            raise OSError(errno.EBUSY, "Device or resource busy")
        delete(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", failing)
    saved = save(2, Retention(keep_last=1))
    assert saved.path == tmp_path / "step-000002"
    assert saved.problems == [f"{tmp_path / 'step-000001'} could not be deleted: [Errno 16] Device or resource busy"]
    monkeypatch.undo()
    assert (tmp_path / "latest").read_text() == "step-000002\n"
    assert names_in(tmp_path) == [".step-000001.deleted", "latest", "step-000002"]
    checkpoint_to_continue(tmp_path, "auto")
    assert names_in(tmp_path) == ["latest", "step-000002"]


def test_a_checkpoint_that_lost_bytes_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    save = Saver(single_process(), tmp_path)
    save(1)
    cut(save(2).path / "backbone.safetensors")
    (problem,) = save(3).problems
    assert "step-000002 is damaged: backbone.safetensors has" in problem
    assert names_in(tmp_path) == ["latest", "step-000001", "step-000002", "step-000003"]


# ---- oddities --------------------------------------------------------------------------------------------------------


def deny(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("function", ["listdir", "stat"])
def test_what_cannot_be_looked_at_is_refused_and_nothing_is_moved(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test runs as root where modes hold nobody back; that of the whole start is in tests/unit/test_prepare.py."""
    path = Saver(single_process(), tmp_path)(1).path
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, deny)
        for look in (
            lambda: checkpoint_to_continue(tmp_path, "auto"),
            lambda: checkpoint_to_continue(tmp_path, str(path)),
            lambda: find_checkpoint(tmp_path, "auto"),
            lambda: published_checkpoints(tmp_path),
        ):
            with pytest.raises(ValueError, match="Permission denied"):
                look()
    assert contents(tmp_path) == before


@pytest.mark.timeout(240)
def test_oddities_in_the_folder_do_not_hide_the_older_checkpoint(tmp_path: Path) -> None:
    save = Saver(single_process(), tmp_path)
    older, newer = save(1).path, save(2).path
    (newer / "MANIFEST.json").write_text("[" * 200_000)
    for name in (".step-000040.partial", ".step-000003.deleted", "step-000002.damaged", "step-000050", "step-x"):
        (tmp_path / name).touch()
    (tmp_path / ".step-000007.replaced").symlink_to(tmp_path / "nowhere")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    found, (told,) = checkpoint_to_continue(tmp_path, "auto")
    assert found == older
    assert "MANIFEST.json" in told
    assert told.endswith("passed over, now step-000002.damaged")
    (problem,) = save(50).problems
    assert "latest could not be written: " in problem
    assert checkpoint_to_continue(tmp_path, "auto") == (tmp_path / "step-000050", [])
    assert names_in(tmp_path) == ["latest", "step-000001", "step-000002.damaged", "step-000050", "step-x"]


@pytest.mark.parametrize("changes", [{"step": "2"}, {"step": 1e30}, {"epoch": 10**30}, {"settings": []}, {"more": 1}])
def test_a_state_that_says_something_else_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    save = Saver(single_process(), tmp_path)
    older, newer = save(1).path, save(2).path
    state, manifest = (json.loads((newer / name).read_text()) for name in ("state.json", "MANIFEST.json"))
    content = json.dumps(state | changes).encode()
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newer / "state.json").write_bytes(content)
    (newer / "MANIFEST.json").write_text(json.dumps(manifest))
    found, (told,) = checkpoint_to_continue(tmp_path, "auto")
    assert found == older
    assert "state.json says something else than step" in told
