"""Damaged images are counted over all ranks, named once, and end the run on all of them when there are too many."""

import json
from pathlib import Path

from dist_proxygml.data.damage import Damage, DamageLog
from dist_proxygml.parallel import ParallelContext
from tests.harness import run_ranks


def find_damage(context: ParallelContext, path: Path) -> tuple[list[str], int, str]:
    log = DamageLog(path, num_images=25, max_share=0.1, context=context)  # 2.5 images: 3
    on_rank_1 = [Damage("a", "crc32"), Damage("b", "cut")] if context.rank == 1 else []
    new = [damage.image for damage in log.add(on_rank_1)]
    new += [damage.image for damage in log.add([Damage("b", "cut")])]  # both ranks, known already
    new += [damage.image for damage in log.add([])]
    new += [damage.image for damage in log.add([Damage("c", "cut")])]  # both ranks, new
    try:
        log.add([Damage("d", "empty")] if context.rank == 0 else [])
    except ValueError as error:
        return new, len(log), str(error)
    raise AssertionError("expected the fourth damaged image to be one too many")


def test_damage_is_counted_once_over_all_ranks_until_there_is_too_much(tmp_path: Path) -> None:
    path = tmp_path / "run" / "damaged.jsonl"
    for new, number, message in run_ranks(find_damage, 2, path):
        assert new == ["a", "b", "c"]
        assert number == 4
        assert "4 of 25 images are damaged, the last d: empty; data.max_damaged allows 3" in message
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["image"] for line in lines] == ["a", "b", "c", "d"]
    assert lines[0] == {"image": "a", "reason": "crc32"}
