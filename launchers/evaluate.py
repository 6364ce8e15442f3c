"""Evaluate a checkpoint: `deepspeed launchers/evaluate.py --run runs/demo_cpu`.

With the run's own shards and number of threads this repeats the numbers of the training run to the last digit. One that
was killed goes on with the images that it had not embedded yet.
"""

import argparse
from pathlib import Path

from dist_proxygml.collectives import AgreedError
from dist_proxygml.config import load_config
from dist_proxygml.parallel import join_world, on_main, parse_arguments, run_launcher, run_together

EXAMPLES = """examples:
  deepspeed --num_gpus 2 launchers/evaluate.py --run runs/demo_cpu
  deepspeed launchers/evaluate.py --run runs/sop_8gpu --checkpoint step-000800 --data shards/other
"""


def main() -> None:
    """Parse, evaluate, print the table and store the result in the run's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of a training run")
    parser.add_argument(
        "--checkpoint", help="name of a checkpoint of that run, such as step-000800 (default: the newest)"
    )
    parser.add_argument("--data", help="folder of other shards (default: the run's own)")
    parser.add_argument("--split", help="split of the shards (default: the run's test split)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    arguments = parse_arguments(parser)
    config = load_config(arguments.run / "config.json")
    context = join_world()

    from dist_proxygml.checkpoint import find_checkpoint, load_backbone
    from dist_proxygml.data.damage import DAMAGE_FILE
    from dist_proxygml.evaluation.report import format_metrics
    from dist_proxygml.training import (
        block_folder,
        build_damage_log,
        build_evaluation_model,
        evaluate_model,
        store_evaluation,
    )
    from dist_proxygml.training_data import open_split

    checkpoints = arguments.run / "checkpoints"
    wanted = str(checkpoints / arguments.checkpoint) if arguments.checkpoint else "auto"
    checkpoint = on_main(context, find_checkpoint, checkpoints, wanted)
    if checkpoint is None:
        raise AgreedError(f"expected a checkpoint in {checkpoints}, found none; train the run first")
    split = arguments.split or config.data.test_split
    index = run_together(context, lambda: open_split(config, split, shards=arguments.data))
    model = run_together(context, build_evaluation_model, config)
    run_together(context, load_backbone, checkpoint, model)
    model.to(context.device)
    damage = build_damage_log(config, context, arguments.run / DAMAGE_FILE, split=split, num_images=index.num_samples)
    is_own = arguments.data is None and arguments.split is None
    name = checkpoint.name if is_own else f"{checkpoint.name}-on-{Path(index.location).name}-{split}"
    blocks = block_folder(arguments.run, f"evaluate-{name}", say=print)
    result = evaluate_model(config, context, model, index, damage=damage, blocks=blocks)
    if context.is_main:
        path = store_evaluation(arguments.run, name, result, with_embeddings=False)
        print(format_metrics({checkpoint.name: result.metrics}))
        print(f"written to {path}")
    blocks.remove(context)


if __name__ == "__main__":
    run_launcher(main)
