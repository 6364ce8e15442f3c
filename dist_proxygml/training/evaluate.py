"""Evaluations of the backbone during training: logged, stored and printed in one line."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dist_proxygml.backbones.lora import merged_weights
from dist_proxygml.data.damage import DAMAGE_FILE
from dist_proxygml.distributed.parallel import run_on_rank_zero
from dist_proxygml.distributed.preemption import StopSignals
from dist_proxygml.evaluation.embedding_pass import PassHooks, Split
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.evaluation.run import block_folder, build_evaluation_model, evaluate_model, store_evaluation
from dist_proxygml.reporting.telemetry import Telemetry
from dist_proxygml.storage.run_folder import step_name
from dist_proxygml.training.step import TrainState


@dataclass(frozen=True)
class EvaluatedSplit(Split):
    """A split to evaluate on."""

    is_validation: bool = False
    """Held-out classes, for model selection; otherwise the test split."""


def evaluate_run(
    state: TrainState,
    split: EvaluatedSplit,
    telemetry: Telemetry,
    run_directory: Path,
    *,
    signals: StopSignals | None = None,
) -> EvaluationResult:
    """Evaluate the state's backbone on a split; log and store the result. Called on all ranks.

    Raises:
        ValueError, StopRequested: as `evaluate`.
    """
    config, context = state.config, state.context
    name = step_name(state.step, of_validation=split.is_validation)
    blocks = block_folder(run_directory, name, say=telemetry.say)
    result = evaluate_model(
        config,
        context,
        backbone_of_one_rank(state),
        split,
        hooks=PassHooks(signals, blocks, telemetry.say, telemetry.follow),
    )
    if result.num_damaged:
        telemetry.say(f"skipped {result.num_damaged} damaged images, see {run_directory / DAMAGE_FILE}")
    # Logged before it is stored: a run killed in between repeats it, and whatever is stored is in the log.
    kind = "validation" if split.is_validation else "evaluation"
    telemetry.log_evaluation(state.step, state.epoch, result.metrics, kind=kind)
    # Only the embeddings of the test split are used later.
    run_on_rank_zero(
        context, lambda: store_evaluation(run_directory, name, result, with_embeddings=not split.is_validation)
    )
    blocks.remove(context)
    numbers = ", ".join(f"{key} {100 * value:.2f}" for key, value in result.metrics.items() if not key.endswith("_sd"))
    of_what = "validation classes: " if split.is_validation else ""
    telemetry.say(f"epoch {state.epoch}, step {state.step}: {of_what}{numbers}")
    return result


def backbone_of_one_rank(state: TrainState) -> nn.Module:
    """Return the state's backbone for forward passes without collectives, with averaged weights if there are any.
    Called on all ranks.

    Forward passes under ZeRO 3 are collective, but ranks that embed a split have different numbers of batches. Adapters
    are merged, as in the checkpoint, so that whoever evaluates that gets the same numbers.
    """
    if state.engine.zero_stage < 3 and state.average is None and state.config.backbone.lora is None:
        return state.engine.module
    model = build_evaluation_model(state.config)
    weights = (state.average or state.engine).full_state_dict()
    model.load_state_dict(merged_weights(weights, state.engine.module), assign=True)
    return model.to(state.context.device)
