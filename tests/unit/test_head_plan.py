"""The plan of the head against numbers worked out by hand."""

from pathlib import Path

import pytest

from dist_proxygml.config import load_config
from dist_proxygml.plan import format_bytes, plan_head

ROOT = Path(__file__).resolve().parents[2]


def test_the_plan_of_stanford_online_products_on_eight_ranks() -> None:
    plan = plan_head(load_config(ROOT / "configs" / "sop_8gpu.json"), world_size=8)
    assert (plan.num_proxies, plan.topk, plan.selection) == (11_318, 566, "candidates")
    assert plan.bank_bytes == 1415 * 512 * 4  # 11,318 classes over 8 ranks, the largest share
    assert plan.optimizer_bytes == 2 * plan.bank_bytes
    # 7/8 of: embeddings and their gradient, 566 candidates, threshold and quota, five numbers; for each of 32 images
    assert plan.received_bytes_per_step == round(7 / 8 * 32 * (512 * 8 + 566 * 4 + 16 + 20))


def test_the_regulariser_adds_class_sums_and_their_gradient() -> None:
    path = ROOT / "configs" / "cub_1gpu.json"
    without = plan_head(load_config(path, ["proxies.regularization_weight=0"]), world_size=4)
    plan = plan_head(load_config(path), world_size=4)
    sums = 100 * 512 * 4
    assert plan.received_bytes_per_step - without.received_bytes_per_step == 3 / 4 * 2 * sums
    assert plan.similarity_bytes - without.similarity_bytes == 2 * sums


def test_one_rank_sends_nothing() -> None:
    plan = plan_head(load_config(ROOT / "configs" / "cub_1gpu.json"), world_size=1)
    assert (plan.received_bytes_per_step, plan.messages_per_step) == (0, 0)
    assert plan.bank_bytes == 100 * 12 * 512 * 4


def test_accumulation_repeats_the_messages_of_a_micro_batch() -> None:
    path = ROOT / "configs" / "demo_cpu.json"
    once = plan_head(load_config(path), world_size=2)
    twice = plan_head(load_config(path, ["deepspeed.gradient_accumulation_steps=2"]), world_size=2)
    assert twice.messages_per_step == 2 * once.messages_per_step


def test_no_negatives_is_refused() -> None:
    with pytest.raises(ValueError, match="raise the ratio"):
        plan_head(load_config(ROOT / "configs" / "cub_1gpu.json", ["proxies.ratio=0.01"]), world_size=1)


def test_bytes_are_formatted_with_binary_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 * 2**20, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
