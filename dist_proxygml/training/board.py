"""TensorBoard content of a run besides its curves, and the statistics of its proxies.

    at the start        HParams: the settings; its metrics are the last points of the curves of the evaluation
    on logged steps     histograms: similarities of kept positives and negatives, lengths of embeddings before they are
                        normalisation (rank 0's images)
    at each evaluation  a picture of queries and their neighbours; proxies/step-NNNNNN.json; lengths of the proxies, how
                        often they were kept as a negative, how many are dead
    at the end          the projector

Rank 0 writes, and no failure here ends a run: an image that cannot be shown is reported. Histograms are written at
every logged step at first, then less and less often, 737 times in 100,000 logged steps: they are larger than curves,
and TensorBoard shows 500 of them.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_proxygml.checkpoint.model import CLASSES_FILE
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.distributed.parallel import run_on_rank_zero
from dist_proxygml.evaluation.embedding_pass import load_table
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.head.statistics import ProxyStatistics, bin_edges, write_proxy_use
from dist_proxygml.reporting.gallery import retrieval_gallery
from dist_proxygml.reporting.projector import MAX_POINTS, has_projection, write_projection
from dist_proxygml.reporting.telemetry import Telemetry
from dist_proxygml.storage.run_folder import RunFolder, step_name
from dist_proxygml.training.step import TrainState


class Board:
    """TensorBoard output of one start of a run. Its methods are called on all ranks, except `show_projection`.

    Args:
        state: the training state; its loss gets an observer, its embedding layer a hook.
        telemetry: the log.
        settings: the configuration, flat.
        test_index: the split that is evaluated, if there is one.
        gallery: the split searched in, if it is another one.
    """

    def __init__(
        self,
        state: TrainState,
        telemetry: Telemetry,
        *,
        settings: Mapping[str, object],
        test_index: ShardIndex | None,
        gallery: ShardIndex | None,
    ) -> None:
        self._state = state
        self._telemetry = telemetry
        self._test_index = test_index
        self._gallery = gallery
        self._is_logged = False
        self._embeddings_bD: Tensor | None = None
        loss = state.loss
        self._statistics = None
        if loss.topk is not None:  # otherwise there are no kept pairs
            self._statistics = ProxyStatistics(
                loss.partition, loss.proxies_per_class, device=loss.proxies.device, group=loss.group
            )
            loss.observer = self._statistics.observe
        if state.context.is_main:
            state.engine.module.get_submodule("embedding").register_forward_hook(self._keep_embeddings)
        if state.step == 0:  # a resumed run has written them
            kind = "evaluation" if test_index is not None else "validation"
            measured = state.config.evaluation.metrics if state.config.is_evaluated else []
            telemetry.log_settings(settings, [f"{kind}/{name}" for name in measured])

    def begin_step(self, *, is_logged: bool) -> None:
        """Begin a step."""
        self._is_logged = is_logged
        if self._statistics is not None:
            self._statistics.begin_step(is_logged=is_logged)

    def show_step(self) -> None:
        """Write the histograms of the last logged step."""
        step = self._state.step
        if not _is_shown(step // self._state.config.telemetry.log_every_steps):
            return
        if self._statistics is not None:
            similarities, edges = self._statistics.take_similarities(), bin_edges()
            self._telemetry.log_counts("train/kept_positive_similarity", similarities.positive, edges, step)
            self._telemetry.log_counts("train/kept_negative_similarity", similarities.negative, edges, step)
        if self._embeddings_bD is not None:
            norm_b = torch.linalg.vector_norm(self._embeddings_bD.float(), dim=1)
            self._telemetry.log_values("train/embedding_norm", norm_b, step)
            self._embeddings_bD = None

    def show_proxies(self) -> None:
        """Write the proxy use since the last evaluation; called before each. Does nothing if no step was taken, or all
        proxies are used."""
        if self._statistics is None or self._statistics.window_steps == 0:
            return
        step, run_directory = self._state.step, self._state.config.run_directory
        sampled = self._statistics.sample(self._state.loss.proxies.detach())
        use = self._statistics.close_window()
        path = RunFolder(run_directory).proxies(step)
        run_on_rank_zero(
            self._state.context,
            lambda: write_proxy_use(
                path, use, step=step, names_of=lambda labels: _names(run_directory / CLASSES_FILE, labels)
            ),
        )
        self._telemetry.log_values("proxies/norm", sampled.norm, step)
        self._telemetry.log_values("proxies/times_kept_as_negative", sampled.times_kept, step)
        self._telemetry.log_number("proxies/dead_share", use.num_dead / (use.num_classes * use.per_class), step)

    def show_evaluation(self, result: EvaluationResult) -> None:
        """Show queries and their neighbours."""
        table = result.table if result.num_queries else None  # nobody has a right answer in a verification set
        if self._state.context.is_main and table is not None and self._test_index is not None:
            try:
                picture = retrieval_gallery(table, self._test_index, gallery=self._gallery)
            except ValueError as error:
                self._telemetry.say(f"TensorBoard gets no picture of the retrieval: {error}")
            else:
                self._telemetry.log_images("evaluation/retrieval", picture[None], self._state.step)

    def show_projection(self) -> None:
        """Write the projector of the finished run, if it is wanted and missing. On rank 0 only."""
        config, name = self._state.config, step_name(self._state.step)
        folder = RunFolder(config.run_directory)
        wanted, board, path = config.telemetry.projector, folder.board, folder.embeddings(name)
        if wanted is False or self._test_index is None or not path.is_file() or has_projection(board, name):
            return
        try:
            write_projection(
                board,
                name,
                load_table(path),
                self._test_index,
                gallery=self._gallery,
                num_points=MAX_POINTS if wanted is True else wanted,
                progress_bar=config.telemetry.progress_bar,
            )
        except ValueError as error:
            print(f"TensorBoard gets no projector: {error}", flush=True)

    def _keep_embeddings(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        if self._is_logged and layer.training:
            self._embeddings_bD = output.detach()


def _is_shown(number: int) -> bool:
    """Whether the number-th logged step (from 1) has histograms: all up to 127, then every second up to 255, every
    fourth up to 511, and so on. The steps are the same for a resumed run.
    """
    return number % (1 << max(0, number.bit_length() - 7)) == 0


def _names(class_table: Path, labels: Sequence[int]) -> list[str]:
    """Return the names of classes by ascending label; their numbers where the run has no class table."""
    if not labels or not class_table.is_file():
        return [str(label) for label in labels]
    with class_table.open(encoding="utf-8") as lines:
        found = {
            label: json.loads(line)[0] for label, line in enumerate(islice(lines, labels[-1] + 1)) if label in labels
        }
    return [found[label] for label in labels]
