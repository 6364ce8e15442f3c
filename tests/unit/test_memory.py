"""Memory that is left, as machines and control groups report it."""

from pathlib import Path

import pytest
import torch

from dist_proxygml.distributed import memory
from dist_proxygml.distributed.memory import available_memory


def test_this_machine_has_memory_left() -> None:
    assert 1 << 20 < available_memory(torch.device("cpu")) < 1 << 50


def group(folder: Path, *, limit: str, used: int, droppable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - droppable}\ninactive_file {droppable}\n")


def test_every_control_group_around_the_process_counts_and_file_pages_are_free(tmp_path: Path) -> None:
    group(tmp_path / "job" / "step", limit="1000", used=700, droppable=200)
    group(tmp_path / "job", limit="5000", used=4800, droppable=50)
    group(tmp_path, limit="max", used=9000, droppable=0)
    own = tmp_path / "own"
    own.write_text("4:memory:/ignored\n0::/job/step\n")
    assert sorted(memory._left_in_control_groups(tmp_path, own)) == [250, 500]


def test_what_torch_keeps_of_a_gpu_is_given_back_before_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"free": 10}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.update(free=70))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["free"], 80))
    assert available_memory(torch.device("cuda", 0)) == 70


def test_a_machine_without_control_groups_sets_no_limit(tmp_path: Path) -> None:
    assert memory._left_in_control_groups(tmp_path, tmp_path / "absent") == []
    own = tmp_path / "own"
    own.write_text("0::/nowhere\n")
    assert memory._left_in_control_groups(tmp_path / "absent", own) == []
