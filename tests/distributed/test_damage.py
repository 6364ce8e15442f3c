"""Damaged images are counted over all ranks, named once, and end the run on all of them when there are too many."""

import json
from pathlib import Path

import pytest

from dist_proxygml.data.damage import Damage, DamageLog
from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks


def find_damage(context: ParallelContext, path: Path) -> tuple[list[str], int, str]:
    settings = {"split": "train", "num_images": 25, "max_share": 0.1, "context": context}  # 2.5 images: 3
    log = DamageLog(path, **settings)
    on_rank_1 = [Damage("a", "crc32"), Damage("b", "cut")] if context.rank == 1 else []
    new = [damage.image for damage in log.add(on_rank_1)]
    new += [damage.image for damage in log.add([Damage("b", "cut")])]  # both ranks, known already
    new += [damage.image for damage in log.add([])]
    new += [damage.image for damage in log.add([Damage("c", "cut")])]  # both ranks, new
    try:
        log.add([Damage("d", "empty")] if context.rank == 0 else [])
    except ValueError as error:
        message = str(error)
        with pytest.raises(ValueError, match=r"4 of 25"):  # and so does the next start of the run
            DamageLog(path, **settings)
        other_split = DamageLog(path, **settings | {"split": "test"})
        return new, len(log) + len(other_split), message
    raise AssertionError("expected the fourth damaged image to be one too many")


def test_damage_is_counted_once_over_all_ranks_until_there_is_too_much(tmp_path: Path) -> None:
    path = tmp_path / "run" / "damaged.jsonl"
    for new, number, message in run_ranks(find_damage, 2, path):
        assert new == ["a", "b", "c"]
        assert number == 4
        assert f"4 of 25 images are damaged (see {path}), the last d: empty; data.max_damaged allows 3" in message
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["image"] for line in lines] == ["a", "b", "c", "d"]
    assert lines[0] == {"split": "train", "image": "a", "reason": "crc32"}


def count_known(context: ParallelContext, path: Path) -> int:
    return len(DamageLog(path, split="train", num_images=10, max_share=0.5, context=context))


def test_a_restarted_run_knows_what_was_found_before_but_for_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    lines = [
        json.dumps({"split": split, "image": f"{split} {i}", "reason": "cut"})
        for split in ("train", "test")
        for i in (1, 2)
    ]
    path.write_text("\n".join([*lines, lines[0], '{"split": "train", "ima']))
    assert run_ranks(count_known, 2, path) == [2, 2]
