"""The paper's experiments: from the downloads of its data sets to a table of our numbers beside the published ones.

    download -> shards -> a sweep over seeds of configs/paper/NAME.json -> OUT/NAME.jsonl, OUT/NAME.md

Everything is checked before anything is written. Shards of the same images are used again, and runs are those of
launchers/sweep.py: Ctrl-C lets them save, the same command goes on, and nothing is trained twice.

Published numbers are each the best of the evaluated epochs (1, 2, 35 to 50) on the test split itself. So every epoch is
evaluated here: `best` is the one of those epochs with the best Recall@1, as optimistic as what is published and
comparable with it; `last` is what a run comes to if nobody chooses. Both are computed as the authors' evaluation does
where it has a way of its own (`evaluation.legacy_proxygml`).

Chosen: a GPU for each seed, as many at a time as there are GPUs, since batches of 32 are small. Declined: several ranks
a run; SLURM, but --dry-run prints the command of the sweep, which takes `--cluster slurm`.
"""

import argparse
import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import half_width, markdown, spread
from dist_proxygml import shard, sweep
from dist_proxygml.cli import add_options, at_least, build_parser, command, run_command, said_by
from dist_proxygml.cluster.grid import Spread, format_spread
from dist_proxygml.config import Config, load_config
from dist_proxygml.data.published import read_cars196, read_cub200, read_inshop, read_sop
from dist_proxygml.protocols import LEGACY_PROTOCOLS, PROTOCOLS
from dist_proxygml.storage.files import publish_text, read_document, read_log
from dist_proxygml.storage.run_folder import RunFolder

PUBLISHED_EPOCHS = frozenset({1, 2, *range(35, 51)})  # that the authors evaluated, and chose from
READERS = {"cub": read_cub200, "cars": read_cars196, "sop": read_sop, "inshop": read_inshop}

# NMI and recall at the first K of the protocol, in percent, of BN-Inception with 512 dimensions, as the authors of
# ProxyGML list them. They have none on In-Shop: that is of Proxy-Anchor's authors.
PAPER = "ProxyGML"
PUBLISHED: Mapping[tuple[str, str], tuple[float | None, ...]] = {
    ("cub", PAPER): (69.8, 66.6, 77.6, 86.4),
    ("cub", "SoftTriple"): (69.3, 65.4, 76.4, 84.5),
    ("cub", "multi-similarity"): (None, 65.7, 77.0, 86.3),
    ("cars", PAPER): (72.4, 85.5, 91.8, 95.3),
    ("cars", "SoftTriple"): (70.1, 84.5, 90.7, 94.5),
    ("cars", "multi-similarity"): (None, 84.1, 90.4, 94.0),
    ("sop", PAPER): (90.2, 78.0, 90.6, 96.2),
    ("sop", "SoftTriple"): (92.0, 78.3, 90.3, 95.9),
    ("sop", "multi-similarity"): (None, 78.2, 90.5, 96.0),
    ("inshop", "Proxy-Anchor"): (None, 91.9),
}

EXAMPLES = """\
  python -m benchmarks.paper --data downloads --dataset cub
  python -m benchmarks.paper --data downloads --dataset cub cars sop inshop --out runs/paper
  python -m benchmarks.paper --data downloads --dataset cub --set backbone.pretrained=bn_inception.pth --dry-run
"""


class Experiment(NamedTuple):
    """A data set with the paper's settings for it, and what the command line says."""

    name: str
    given: argparse.Namespace
    folder: Path  # of its runs; results lie beside it

    @property
    def overrides(self) -> list[str]:
        """What the comparison needs beside them; what the user sets has the last word."""
        is_legacy = self.name in LEGACY_PROTOCOLS and not self.given.allow_partial
        ours = [f"data.shards={self.folder.with_name('shards') / self.name}", "evaluation.every_epochs=1"]
        ours += ["evaluation.kmeans_seeds=1", f"evaluation.legacy_proxygml={json.dumps(is_legacy)}"]
        if self.given.allow_partial:  # a protocol insists on its numbers of images, and few of them have no K beyond 1
            ours += ["data.num_classes=null", "evaluation.protocol=custom", "evaluation.recall_at=[1]"]
        return [*ours, *self.given.set]

    @property
    def config(self) -> Config:
        """All settings; a ValueError if they are wrong."""
        return load_config(f"paper/{self.name}", self.overrides)

    @property
    def build(self) -> list[str]:
        """What `shard` gets."""
        names = ["build", PROTOCOLS[self.name].dataset, "--data", str(self.given.data)]
        return [*names, "--out", self.config.data.shards, *["--allow-partial"] * self.given.allow_partial]

    @property
    def train(self) -> list[str]:
        """What `sweep` gets."""
        num_seeds, num_gpus = self.given.seeds, self.given.gpus
        where = ["--gpus-per-node", "1", "--parallel", str(min(num_gpus, num_seeds))]
        where = ["--cluster", "local", "--time", "90-00:00:00", *(where if num_gpus else ["--tasks-per-node", "1"])]
        seeds = ["--seeds", str(num_seeds), "--out", str(self.folder)]
        return ["--config", f"paper/{self.name}", *seeds, *where, "--set", *self.overrides]

    def check(self) -> None:
        """Find what is wrong before anything is written.

        Raises:
            ValueError: a setting; weights, lists or images that are missing, or other images than published.
        """
        backbone = self.config.backbone
        if backbone.name == "bn_inception" and backbone.pretrained and not Path(backbone.pretrained).is_file():
            raise ValueError(
                f"expected the ImageNet weights of BN-Inception at {backbone.pretrained}, found no such file; put "
                "bn_inception-52deb4733.pth there, or say where it is: --set backbone.pretrained=FILE"
            )
        READERS[self.name](self.given.data, allow_partial=self.given.allow_partial)


# ---- what it came to -------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """A finished seed; metrics are shares of 1 by name."""

    seed: int
    last: dict[str, float]
    best: dict[str, float]
    best_epoch: int
    num_compared: int  # epochs that `best` was chosen from


def read_outcome(run_directory: Path, seed: int) -> Outcome:
    """What a run came to.

    Raises:
        ValueError: it logged no evaluation.
    """
    log = read_log(RunFolder(run_directory).metrics, {"kind": str, "step": int, "epoch": int})
    tested = {line["step"]: line for _, line in log.records if line["kind"] == "evaluation" and line["step"]}
    if not tested:
        raise ValueError(f"expected evaluations in {run_directory}, found none; remove it, and it is trained again")
    last = tested[max(tested)]
    compared = [line for line in tested.values() if line["epoch"] in PUBLISHED_EPOCHS] or [last]
    best = max(compared, key=lambda line: (metric(line, "recall@1") or 0, line["step"]))
    last_metrics, best_metrics = (
        {name: value for name, value in line.items() if name not in ("kind", "step", "epoch")} for line in (last, best)
    )
    return Outcome(seed, last_metrics, best_metrics, best["epoch"], len(compared))


def metric(numbers: Mapping[str, float], name: str) -> float | None:
    """A metric as the authors' evaluation computes it, if it has a way of its own; None where it was not measured."""
    return numbers.get(f"legacy_{name}", numbers.get(name))


def keep_results(experiment: Experiment) -> list[Outcome]:
    """The seeds that the sweep calls finished, stored as lines of OUT/NAME.jsonl with what they were made with. Lines
    of other seeds stay, and one that is there already: it knows the commit.
    """
    with (experiment.folder / "results.csv").open(encoding="utf-8", newline="") as stream:
        seeds = [int(row["seed"]) for row in csv.DictReader(stream) if row["status"] == "finished"]
    path = experiment.folder.with_suffix(".jsonl")
    outcomes: list[Outcome] = []
    lines: dict[int, dict[str, Any]] = {line["seed"]: line for _, line in read_log(path, {"seed": int}).records}
    for seed in seeds:
        run = RunFolder(experiment.folder / f"seed-{seed}")
        outcomes.append(read_outcome(run.path, seed))
        line: dict[str, Any] = {"dataset": experiment.name, **outcomes[-1]._asdict()}
        if line.items() <= lines.get(seed, {}).items():
            continue
        line |= {name: read_document(run.facts)[name] for name in ("device", "seconds")}
        line["commit"] = (
            said_by("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty") or "unknown"
        )
        line["versions"] = read_document(max(run.evaluations().items())[1])["protocol"]["versions"]
        line["trains"] = shlex.join(["python", "launchers/sweep.py", *experiment.train])
        lines[seed] = line
    publish_text(path, "".join(json.dumps(lines[seed]) + "\n" for seed in sorted(lines)))
    return outcomes


# ---- the table -------------------------------------------------------------------------------------------------------


def show(experiment: Experiment, outcomes: Sequence[Outcome]) -> str:
    """Our numbers beside the published ones in Markdown, and what a reader has to know of them."""
    protocol, given = PROTOCOLS[experiment.name], experiment.given
    names = ["nmi", *(f"recall@{k}" for k in protocol.recall_at)]
    best = [_spread([metric(outcome.best, name) for outcome in outcomes]) for name in names]
    last = [_spread([metric(outcome.last, name) for outcome in outcomes]) for name in names]
    rows = [["best", *map(format_spread, best)], ["last", *map(format_spread, last)]]
    published = {method: numbers for (dataset, method), numbers in PUBLISHED.items() if dataset == experiment.name}
    for method, numbers in published.items():
        padded = [*numbers, *[None] * (len(names) - len(numbers))]
        rows.append([f"{method}, published", *("" if number is None else f"{number:.1f}" for number in padded)])
        rows.append([f"best - {method}", *map(compare, best, padded)])
    epochs = ", ".join(str(outcome.best_epoch) for outcome in outcomes)
    notes = [
        f"Percent, mean ± standard deviation over {len(outcomes)} of {given.seeds} seeds (of a sample, n - 1). A "
        "difference within the 95 % interval of the mean (Student's t) is a tie.",
        "best is what compares with the published numbers: like them the best of several looks at the test split, so "
        f"optimistic. By Recall@1, of {outcomes[0].num_compared} epochs: {epochs}.",
        "last does not compare with them: nobody has chosen it, and none is published.",
    ]
    if PAPER not in published:
        notes.append(f"The authors of {PAPER} published neither numbers nor settings for this data set.")
    if given.allow_partial:
        notes.append("NOT comparable: --allow-partial takes what images there are, and not the published protocol.")
    if given.set:
        notes.append(f"NOT comparable if these change what is trained or measured: {shlex.join(given.set)}")
    header = ["", *(name.upper() if name == "nmi" else name.capitalize() for name in names)]
    listed = "\n".join(f"- {note}" for note in notes)
    return f"## {protocol.title}\n\n{markdown(header, rows)}\n\n{listed}\n"


def _spread(values: Sequence[float | None]) -> Spread | None:
    measured = [value for value in values if value is not None]
    return spread(measured) if len(measured) == len(values) else None


def compare(ours: Spread | None, published: float | None) -> str:
    """Ours less the published one, in percent: "+0.31", "-0.12, a tie"; empty where one is missing."""
    if ours is None or published is None:
        return ""
    difference = 100 * ours.mean - published
    if ours.deviation is None:
        return f"{difference:+.2f}, of one seed"
    is_tie = abs(difference) <= 100 * half_width(ours.deviation, len(ours.values))
    return f"{difference:+.2f}{', a tie' * is_tie}"


# ---- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(None, __doc__, EXAMPLES)
    parser.prog = "python -m benchmarks.paper"
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help="folder of the unpacked downloads")
    parser.add_argument("--dataset", nargs="+", choices=tuple(READERS), required=True, help="one or several")
    parser.add_argument("--seeds", type=at_least(1), default=3, metavar="K", help="seeds 0 to K-1 (default 3)")
    gpus = "seeds at a time, each on a GPU; 0: on CPUs, one at a time (default: the GPUs that there are)"
    parser.add_argument("--gpus", type=at_least(0), metavar="N", help=gpus)
    add_options(parser, "--out", required=False, default=Path("runs/paper"), help="folder to write (runs/paper)")
    add_options(parser, "--set", help="override settings, for a trial: training.epochs=2")
    partial = "a trial with what images there are; measures Recall@1 and NMI"
    parser.add_argument("--allow-partial", action="store_true", help=partial)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the commands, start nothing")
    return parser


@command(_parser, stopped="stopped; the same command goes on")
def main(given: argparse.Namespace) -> int:
    """Check, build, train, compare; returns the exit status: 0, 1 if a run has failed, 2 after a user's mistake."""
    if given.gpus is None:
        import torch

        given.gpus = torch.cuda.device_count()
    experiments = [Experiment(name, given, given.out / name) for name in dict.fromkeys(given.dataset)]
    for experiment in experiments:
        experiment.check()
    if given.dry_run:
        for experiment in experiments:
            print(shlex.join(["python", "-m", "dist_proxygml.shard", *experiment.build]))
            print(shlex.join(["python", "launchers/sweep.py", *experiment.train]))
        return 0
    for experiment in experiments:  # all, before a sweep listens to Ctrl-C
        if status := shard.main(experiment.build):
            return status
    worst = 0
    for experiment in experiments:
        print(f"training {given.seeds} seeds; tail -F {experiment.folder}/jobs/*/*_log.out", flush=True)
        status = sweep.main(experiment.train)
        if status not in (0, 1):
            return status
        worst = max(worst, status)
        if outcomes := keep_results(experiment):
            text = show(experiment, outcomes)
            publish_text(experiment.folder.with_suffix(".md"), text)
            print(f"\n{text}\nwritten to {experiment.folder}.md and .jsonl", flush=True)
    return worst


if __name__ == "__main__":
    run_command(main)
