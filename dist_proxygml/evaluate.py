"""Evaluate a checkpoint: `deepspeed launchers/evaluate.py --run runs/demo_cpu`.

With the run's own shards and number of threads this repeats the numbers of the training run to the last digit. One that
was killed resumes with the images that it had not embedded yet.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dist_proxygml.cli import build_parser
from dist_proxygml.config import load_run_config
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.gpus import set_arithmetic
from dist_proxygml.distributed.parallel import (
    has_started,
    join_world,
    parse_arguments,
    run_launcher,
    run_on_rank_zero,
    run_on_rank_zero_for_long,
    run_together,
)
from dist_proxygml.protocols import LEGACY_PROTOCOLS, PROTOCOLS, shown_far

if TYPE_CHECKING:
    from dist_proxygml.evaluation.verification import Verification

EXAMPLES = """\
  deepspeed --num_gpus 2 launchers/evaluate.py --run runs/demo_cpu
  deepspeed launchers/evaluate.py --run runs/sop_8gpu --checkpoint step-000800 --data shards/other
  deepspeed launchers/evaluate.py --run runs/sop_8gpu --data shards/inshop --protocol inshop
  deepspeed launchers/evaluate.py --run runs/sop_8gpu --validation
  deepspeed launchers/evaluate.py --run runs/faces --split lfw --set evaluation.pairs.of=listed
  deepspeed launchers/evaluate.py --run runs/cub --protocol cub --legacy-proxygml --verify
"""


def _parser() -> argparse.ArgumentParser:
    options = ("--run", "--checkpoint", "--data", "--split", "--set", "--local_rank")
    parser = build_parser(None, __doc__, EXAMPLES, *options)
    parser.add_argument("--gallery-split", help="split that is searched (default: every image among all others)")
    parser.add_argument(
        "--protocol",
        choices=["custom", *PROTOCOLS],
        help="published protocol: its K and numbers of images (default: the run's, custom for other shards)",
    )
    parser.add_argument(
        "--validation", action="store_true", help="the classes that the run held out (data.validation_classes) instead"
    )
    parser.add_argument("--legacy-proxygml", action="store_true", help="also what the published evaluation gives")
    parser.add_argument("--verify", action="store_true", help="find ranks in two ways, which must agree")
    return parser


def main(given: Sequence[str] | None = None) -> None:
    """Parse, evaluate, print the table and store the result in the run's folder."""
    arguments = parse_arguments(_parser(), given)
    check_arguments(arguments)
    config = load_run_config(arguments.run, [*overrides(arguments), *arguments.set])
    split = config.data.test_split
    if split is None and not arguments.validation:
        raise ValueError(
            f"expected a split to evaluate, got none: run {config.name!r} has data.test_split null; name one with "
            "--split, or add --validation for the classes that it held out"
        )
    context = join_world(start_timeout=config.training.start_timeout)
    set_arithmetic(config.training, context.device)

    from dist_proxygml.checkpoint.folder import find_checkpoint, found_instead
    from dist_proxygml.checkpoint.writer import load_backbone
    from dist_proxygml.data.damage import DAMAGE_FILE
    from dist_proxygml.evaluation.embedding_pass import PassHooks, Split
    from dist_proxygml.evaluation.run import (
        block_folder,
        build_damage_log,
        build_evaluation_model,
        evaluate_model,
        result_suffix,
        store_evaluation,
    )
    from dist_proxygml.reporting.page import format_metrics
    from dist_proxygml.storage.run_folder import RunFolder
    from dist_proxygml.training.data import open_split, open_validation, trained_images

    checkpoints = RunFolder(arguments.run).checkpoints
    wanted = str(checkpoints / arguments.checkpoint) if arguments.checkpoint else "auto"
    checkpoint = run_on_rank_zero_for_long(context, find_checkpoint, checkpoints, wanted)
    if checkpoint is None:
        instead = run_on_rank_zero_for_long(context, found_instead, checkpoints)
        raise AgreedError(f"expected a whole checkpoint in {checkpoints}, {instead}")
    if arguments.validation:
        index = run_together(context, open_validation, config, checkpoint)
        trained_C: np.ndarray | None = np.full(index.num_classes, -1)
    else:
        index = run_together(context, lambda: open_split(config, str(split), shards=arguments.data))
        trained_C, problem = run_together(context, trained_images, checkpoint, index)
        if problem and context.is_main:
            print(f"which of the classes were trained is not known: {problem}")
    model = run_together(context, build_evaluation_model, config)
    run_together(context, load_backbone, checkpoint, model)
    model.to(context.device)
    has_started()
    damage_file = arguments.run / DAMAGE_FILE
    damage = build_damage_log(config, context, damage_file, split=index.split, num_images=index.num_samples)
    say = print if context.is_main else lambda _: None
    own = load_run_config(arguments.run)
    name = checkpoint.name + result_suffix(config, own, shards=arguments.data, digest=index.sha256)
    if arguments.validation:
        name = f"validation-{name}"
    blocks = block_folder(arguments.run, f"evaluate-{name}", say=print)
    result = evaluate_model(
        config,
        context,
        model,
        Split(index, damage, None if trained_C is None else trained_C >= 0, trained_C),
        verify=arguments.verify,
        hooks=PassHooks(blocks=blocks, say=say),
    )
    path = run_on_rank_zero(context, lambda: store_evaluation(arguments.run, name, result, with_embeddings=False))
    if context.is_main:
        print(format_metrics({checkpoint.name: result.metrics}, with_map=result.is_across_cameras))
        for line in legacy_lines(result.metrics):
            print(line)
        for line in pair_lines(result.pairs):
            print(line)
        if result.bounds:
            print(ties_line(result.bounds))
        print(f"classes: {result.class_set or 'which of them were trained is not known'}")
        print(f"written to {path}")
    blocks.remove(context)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: naming it.
    """
    others = ("data", "split", "gallery_split", "protocol", "legacy_proxygml")
    wrong = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name)]
    if arguments.validation and wrong:
        raise ValueError(
            f"expected --validation without {' and '.join(wrong)}: the classes that a run held out are part of its own "
            "training split; leave one of them out"
        )


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The run's settings that the command line changes. Other shards are no published test set unless it says so."""
    changed: dict[str, object] = {"checkpoint.keep_best": None}  # which may be of a metric that is not measured here
    protocol = arguments.protocol
    if protocol is None and (arguments.data or arguments.split):
        protocol = "custom"
    if protocol is not None:
        changed |= {"evaluation.protocol": protocol, "evaluation.gallery_split": None}
        if protocol not in LEGACY_PROTOCOLS:
            changed["evaluation.legacy_proxygml"] = False
        if protocol in PROTOCOLS:
            changed["evaluation.exclude_same"] = None  # the protocol says what is excluded
    if protocol in PROTOCOLS:
        changed["evaluation.recall_at"] = list(PROTOCOLS[protocol].recall_at)
        is_divided = PROTOCOLS[protocol].num_gallery is not None
        changed["data.test_split"] = "query" if is_divided else "test"
        changed["evaluation.gallery_split"] = "gallery" if is_divided else None
    if arguments.split:
        changed["data.test_split"] = arguments.split
    if arguments.gallery_split:
        changed["evaluation.gallery_split"] = arguments.gallery_split
    if arguments.legacy_proxygml:
        changed["evaluation.legacy_proxygml"] = True
    return [f"{key}={json.dumps(value)}" for key, value in changed.items()]


def legacy_lines(metrics: Mapping[str, float]) -> list[str]:
    """Lines with the published evaluation's metrics, if they were computed."""
    return [
        f"{name.removeprefix('legacy_')} as in the published evaluation: {100 * value:.2f}"
        for name, value in metrics.items()
        if name.startswith("legacy_")
    ]


def pair_lines(pairs: "Verification | None") -> list[str]:
    """How well pairs are told apart, if it was asked."""
    if pairs is None:
        return []
    lines = [f"pairs: {pairs.num_same:,} of the same class, {pairs.num_different:,} of different classes"]
    if pairs.num_left_out:
        lines[0] += f"; {pairs.num_left_out:,} left out, with a damaged image"
    for point in pairs.points:
        tar = 100 * point.num_same / pairs.num_same
        lines.append(f"TAR at FAR {shown_far(point.far)}: {tar:.2f}, score >= {point.threshold:.5f}")
    for far in pairs.not_measurable:
        needed = f"{math.ceil(1 / far):,} pairs of different classes"
        lines.append(f"TAR at FAR {shown_far(far)}: not measurable, it takes {needed}")
    if pairs.accuracies:
        mean, deviation = pairs.metrics["pair_accuracy"], pairs.metrics["pair_accuracy_sd"]
        lines.append(f"accuracy over {len(pairs.accuracies)} folds: {100 * mean:.2f} ± {100 * deviation:.2f}")
    return lines


def ties_line(bounds: Mapping[str, tuple[float, float]]) -> str:
    """How much ties could change."""
    name, (low, high) = max(bounds.items(), key=lambda item: item[1][1] - item[1][0])
    if 100 * (high - low) < 0.005:
        return "ties: no metric changes by 0.005 points whichever way they go"
    return f"ties: with all of them gone wrong or right, {name} is {100 * low:.2f} or {100 * high:.2f}"


if __name__ == "__main__":
    run_launcher(main)
