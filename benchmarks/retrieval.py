"""Tables of retrieval results: rows that the real training command makes, kept with all that is needed to repeat them.

    python -m benchmarks.retrieval --list                             tables, and which of their rows are finished
    python -m benchmarks.retrieval --table learning_rates --minutes 30
    python -m benchmarks.retrieval --table learning_rates --row batch-64_linear --seed 1
    python -m benchmarks.retrieval --figures                          tables and pictures of docs/, from the results
    python -m benchmarks.retrieval --table negatives --head-costs     what heads take, when nothing else runs
    python -m benchmarks.retrieval --table negatives --step-times     and whole steps

benchmarks/tables/ declares the tables: rows of a configuration and overrides, each with several seeds. A row trains
by launchers/train.py, which also evaluates; one at a time, in forked processes (one per rank) that have torch loaded.
Its result is a line of benchmarks/results/TABLE.jsonl, which is committed; a finished row is skipped. What is
interrupted, by Ctrl-C, --minutes or a kill, continues from its checkpoint when the same command is called again. --row
repeats a row that is finished, and says whether its numbers are the same. Every rank has one thread, unless
OMP_NUM_THREADS says otherwise: with another number of threads the last bits are others.

A line counts for a row while the settings are the same, those that the configuration leaves out aside; the newest
counts. Its numbers:

    test, validation    of the last evaluation: on the test split, and on classes that are neither trained nor tested
    curve               test Recall@1 by step, where it was evaluated more than once
    hits                right first answers of each test class (packed, see hits_of), of which intervals are drawn
    loss                mean of the last five logged steps
    seconds             of all starts of the run, by phase; the machine may have been shared
    head_ms, head_mib   of the loss, its gradients and the update of the proxies, with random unit embeddings and
                        labels: the fastest of 30 repeats, and the most that torch's allocator holds of it, proxies and
                        the optimizer's state included; measured by --head-costs alone, when nothing else runs
    step_ms             of a whole step, images included: the fastest 50 of 200; by --step-times alone, likewise
    memory_mib          peak of the training process, with all that is preloaded in it

Settings are picked by `validation` alone; `test` is for what was picked.

Declined: cluster/sweep.py, which trains the whole of a grid, where a row here may set anything, such as a warm-up that
follows from its batch size; its SLURM jobs.
"""

import argparse
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import runpy
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from benchmarks import efficiency
from benchmarks.figures import pack_hits, write_pages
from benchmarks.tables import TABLES, Row, Table
from dist_proxygml.backbones.from_weights import fill_from_weights
from dist_proxygml.cluster.grid import FREE_SECTIONS, is_same_run, last_evaluation, trained_settings
from dist_proxygml.config import Config, load_config
from dist_proxygml.evaluation.compare import open_result, query_scores
from dist_proxygml.storage.files import publish_text, read_document, read_log, remove
from dist_proxygml.storage.lock import FolderLock, locked_file
from dist_proxygml.storage.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STOPPED_STATUS = 75  # of distributed/parallel.py, which needs torch: the run was asked to stop, and has saved
PRELOADED_MODULES = ["torch._dynamo", "deepspeed", "faiss", "sklearn.metrics", "dist_proxygml.training.run"]
NUM_LOSSES = 5

Line = dict[str, Any]


class Run(NamedTuple):
    """A row with one of its seeds."""

    table: Table
    row: Row
    seed: int
    runs: Path

    @property
    def name(self) -> str:
        """Also that of its folder."""
        return f"{self.row.name}_seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it trains."""
        return self.runs / self.table.name / self.name

    @property
    def overrides(self) -> list[str]:
        """What --set gets."""
        place = (f"seed={self.seed}", f"name={self.name}", f"runs_dir={self.folder.parent}")
        return [*(text.replace("{seed}", str(self.seed)) for text in self.row.overrides), *place]

    @property
    def arguments(self) -> list[str]:
        """What launchers/train.py gets."""
        return ["--config", self.row.config, "--set", *self.overrides]

    @property
    def command(self) -> list[str]:
        """What trains it outside of this harness, but for its folder."""
        program, modules = "launchers/train.py", ", ".join(self.row.imports)
        start = ["python", program]
        if modules:
            start = ["python", "-c", f"import runpy, {modules}; runpy.run_path('{program}', run_name='__main__')"]
        if self.row.ranks > 1:
            start = ["deepspeed", "--num_gpus", str(self.row.ranks), program]
        return [*start, *_without_place(self.arguments)]

    @property
    def config(self) -> Config:
        """What it trains; a ValueError if the settings are wrong."""
        return load_config(ROOT / self.row.config, self.overrides)

    @property
    def settings(self) -> str:
        """Hash of what is set, defaults left out: a setting that is new later changes nothing."""
        given = self.config.model_dump(mode="json", exclude_unset=True, exclude=FREE_SECTIONS)
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


# ---- the results -----------------------------------------------------------------------------------------------------


def results_file(table: Table, folder: Path = RESULTS) -> Path:
    """Where the results of a table are."""
    return folder / f"{table.name}.jsonl"


def finished(table: Table, folder: Path = RESULTS) -> dict[tuple[str, int], Line]:
    """The newest line of each run of the table that has one under its present settings, by row and seed."""
    wanted = {(run.row.name, run.seed): run.settings for run in runs_of(table, Path())}
    found = {}
    log = read_log(results_file(table, folder), {"row": str, "seed": int, "settings": str})
    for _, line in log.records:
        key = (line["row"], line["seed"])
        if wanted.get(key) == line["settings"]:
            found[key] = line
    return {key: found[key] for key in wanted if key in found}


def append(table: Table, line: Line, folder: Path) -> None:
    """Add a line, whole or not at all."""
    rewrite(table, folder, lambda lines: [*lines, line])


def rewrite(table: Table, folder: Path, change: Callable[[list[Line]], list[Line]]) -> None:
    """Change the lines of a table; other processes that want to wait meanwhile."""
    path = results_file(table, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(path.with_name(f".{path.name}.lock"), wait=True):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = change([json.loads(line) for line in text.splitlines()])
        publish_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def runs_of(table: Table, runs: Path) -> list[Run]:
    """All runs of a table, seed by seed within a row."""
    return [Run(table, row, seed, runs) for row in table.rows for seed in row.seeds]


def line_of(run: Run, commit: str) -> Line:
    """The line of a finished run, from its folder.

    Raises:
        ValueError: it has no evaluation, or logged no step.
    """
    folder = RunFolder(run.folder)
    tested, validated = last_evaluation(run.folder), folder.evaluations(of_validation=True)
    if tested is None:
        raise ValueError(f"expected an evaluation in {run.folder}, found none; look at {log_of(run)}")
    last = folder.evaluations() or validated
    document, facts = read_document(last[max(last)]), read_document(folder.facts)
    logged = [line for _, line in read_log(folder.metrics, {"step": int, "kind": str}).records if "loss" in line]
    if not logged:
        raise ValueError(
            f"expected logged steps in {run.folder}, found none; lower telemetry.log_every_steps of its row"
        )
    validation = read_document(validated[max(validated)])["metrics"] if validated else {}
    recall = {step: read_document(path)["metrics"]["recall@1"] for step, path in sorted(folder.evaluations().items())}
    return {
        "table": run.table.name,
        "row": run.row.name,
        "seed": run.seed,
        "settings": run.settings,
        "test": _rounded(tested.metrics) if folder.evaluations() else {},
        "validation": _rounded(validation),
        "curve": {str(step): round(value, 6) for step, value in recall.items()} if len(recall) > 1 else {},
        "hits": pack_hits(hits_of(run.folder)) if folder.evaluations() else "",
        "loss": round(statistics.fmean(line["loss"] for line in logged[-NUM_LOSSES:]), 9),
        "steps": max(last),
        "seconds": {name: round(value, 1) for name, value in facts["seconds"].items()},
        "memory_mib": round(max(1024 * line.get("gpu_memory_gib", line["memory_gib"]) for line in logged)),
        "commit": commit,
        "device": _device(facts["device"]),
        "versions": document["protocol"]["versions"] | {"python": platform.python_version()},
        "command": f"python -m benchmarks.retrieval --table {run.table.name} --row {run.row.name} --seed {run.seed}",
        "trains": shlex.join(run.command),
    }


def hits_of(run_directory: Path) -> np.ndarray:
    """Queries of each test class, by label, and how many have a right first answer: [2, classes]."""
    scores, class_Q = query_scores(open_result(run_directory))
    _, class_Q = np.unique(class_Q, return_inverse=True)
    return np.stack([np.bincount(class_Q), np.bincount(class_Q, weights=scores["recall@1"])]).astype(np.uint16)


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in metrics.items()}


def _without_place(arguments: Sequence[str]) -> list[str]:
    return [text for text in arguments if not text.startswith("runs_dir=")]


def _commit() -> str:
    """The commit, with a plus behind it if what trains is not as committed."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    code = ("dist_proxygml", "launchers", "configs", "benchmarks", ":(exclude)benchmarks/results")
    changed = git("status", "--porcelain", "--", *code)
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def _device(described: str) -> str:
    """What the run says of it, and the name of the processor."""
    if not described.startswith("CPU"):
        return described
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{described}, {named or platform.machine()}"


# ---- one run ---------------------------------------------------------------------------------------------------------


def log_of(run: Run) -> Path:
    """What the run says goes there."""
    return run.folder.with_name(f"{run.name}.log")


def train(run: Run, context: ForkServerContext, *, deadline: float | None) -> bool:
    """Train, or go on where it has saved, to the end or to the deadline of `time.monotonic()`; whether it is finished.

    Raises:
        ValueError: it failed.
        KeyboardInterrupt: as given, once the run has saved.
    """
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(
            target=_train_here, args=(run.arguments, str(log_of(run)), dict(os.environ) | variables, run.row.imports)
        )
        for variables in _variables_of_ranks(run.row.ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.terminate()  # nothing to one that has ended
        for process in processes:
            process.join()
    statuses = {process.exitcode for process in processes}
    if not statuses <= {0, STOPPED_STATUS, -signal.SIGTERM}:  # SIGTERM before it listened
        said = log_of(run).read_text(encoding="utf-8", errors="replace")[-2000:]
        raise ValueError(f"{run.name} ended with status {statuses}; {log_of(run)} ends with:\n{said}")
    return statuses == {0}


def _variables_of_ranks(num_ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank; nothing to one that is alone."""
    if num_ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    world = address | {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _train_here(arguments: list[str], log: str, environment: dict[str, str], imports: Sequence[str]) -> None:
    """Be launchers/train.py, in the environment of whoever asked."""
    os.environ.clear()  # that of the server that forked it
    os.environ.update(environment)
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which asks for a save
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # of data loading processes, as in any other process
    sys.argv = ["launchers/train.py", *arguments]
    os.chdir(ROOT)
    for module in imports:
        importlib.import_module(module)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end_with_parent() -> None:
    """Ask this process to save and stop once the one that started it has gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a forked process"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def head_cost(config: Config, imports: Sequence[str] = (), *, num_repeats: int = 30, warm_up: int = 5) -> Line:
    """Milliseconds and MiB of a step's head: loss, its gradients, the update of the proxies.

    As many images of a class come in a step as the run draws: a loss of pairs has nothing to do without.
    """
    for module in imports:
        importlib.import_module(module)
    import torch
    import torch.nn.functional as F

    from dist_proxygml.distributed.parallel import single_process
    from dist_proxygml.head.loss import ProxyLoss
    from dist_proxygml.head.optim import bring_to_unit_length_
    from dist_proxygml.training.data import count_classes
    from dist_proxygml.training.optim import build_bank_optimizer
    from dist_proxygml.training.step import build_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = count_classes(config)
    size, of_class = config.training.batch_size // config.accumulation, config.data.images_per_class or 1

    def steps(count: int) -> list[float]:
        loss = build_loss(config, single_process(device))
        parameters = [loss.proxies] if isinstance(loss, ProxyLoss) else list(loss.parameters())
        scale = loss.log_scale if isinstance(loss, ProxyLoss) else None
        optimizer = build_bank_optimizer(config.optimizer, parameters, scale)
        generator = torch.Generator().manual_seed(0)
        taken = []
        for number in range(count):
            rows_BD = F.normalize(torch.randn(size, config.backbone.embedding_dim, generator=generator), dim=1)
            labels_B = torch.randint(config.num_trained_classes, (size // of_class,), generator=generator)
            labels_B = labels_B.repeat_interleave(of_class).to(device)
            embeddings_BD = rows_BD.to(device).requires_grad_()
            loss.draw = number
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss(embeddings_BD, labels_B).total.backward()
            optimizer.step()
            if isinstance(loss, ProxyLoss) and config.proxies.unit_norm:
                gradient = loss.proxies.grad
                kept_classes = gradient.indices()[0] if gradient is not None and gradient.is_sparse else None
                bring_to_unit_length_(loss.proxies.detach(), classes_u=kept_classes)
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return taken

    taken = steps(warm_up + num_repeats)[warm_up:]
    num_bytes = peak_allocation(lambda: steps(2))  # the second finds the optimizer's state
    return {"head_ms": round(1000 * min(taken), 3), "head_mib": round(num_bytes / 2**20, 1)}


def peak_allocation(function: Callable[[], object]) -> int:
    """Most bytes that torch's allocator holds of what a function allocates; exact, and the function is slower."""
    import torch

    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))
    events = [event["args"] for event in trace["traceEvents"] if event["name"] == "[memory]"]
    return max(event["Total Allocated"] for event in events)


# ---- the command -----------------------------------------------------------------------------------------------------


def make(
    tables: Sequence[Table],
    *,
    runs: Path,
    results: Path = RESULTS,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    minutes: float | None = None,
) -> bool:
    """Train what is to do, one run at a time, and keep the results; named rows are repeated. Whether all is done.

    Raises:
        ValueError: a run failed, or another process is at it.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    commit, context = _commit(), forks()  # which load what is there now
    runs.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(runs / "tables", elsewhere="name another folder with --runs")
    for run in to_do(tables, runs=runs, results=results, rows=rows, seeds=seeds):
        if deadline is not None and time.monotonic() > deadline:
            return False
        earlier, trained = finished(run.table, results).get((run.row.name, run.seed)), trained_settings(run.folder)
        is_ended = earlier is not None and not RunFolder(run.folder).checkpoints.exists()
        if is_ended or (trained is not None and not is_same_run(trained, fill_from_weights(run.config))):
            remove(run.folder)
        if not train(run, context, deadline=deadline):
            print(f"{run.table.name} {run.name}: stopped, the same command goes on with it", flush=True)
            return False
        line = line_of(run, commit)
        append(run.table, line, results)
        remove(RunFolder(run.folder).checkpoints)  # what else there is stays, for `report compare`
        said = "" if earlier is None else f"; {'the same' if _is_same(line, earlier) else 'NOT the same'} as before"
        print(f"{run.table.name} {run.name}: {shown(line)}{said}", flush=True)
    lock.release(is_done=True)
    return True


def measure(
    tables: Sequence[Table],
    cost_of: Callable[[Run, ForkServerContext], Line],
    *,
    runs: Path,
    results: Path = RESULTS,
    rows: Sequence[str] = (),
) -> None:
    """Measure what finished rows take, once for all seeds of a row.

    Raises:
        ValueError: there is no such row, or another process is at it.
    """
    check_rows(tables, rows)
    runs.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(runs / "tables", elsewhere="name another folder with --runs")  # of what runs beside it, no time
    context = forks()
    for table in tables:
        done = finished(table, results)
        for row in table.rows:
            of_row = [line for (name, _), line in done.items() if name == row.name]
            if not of_row or (rows and row.name not in rows):
                continue
            cost = cost_of(Run(table, row, of_row[0]["seed"], runs), context)
            rewrite(table, results, partial(_with_cost, of_row=of_row, cost=cost))
            print(f"{table.name} {row.name}: {', '.join(f'{name} {cost[name]:.1f}' for name in cost)}", flush=True)
    lock.release(is_done=True)


def _with_cost(lines: list[Line], of_row: list[Line], cost: Line) -> list[Line]:
    return [line | cost if line in of_row else line for line in lines]


def cost_of_head(run: Run, context: ForkServerContext) -> Line:
    """What its head takes."""
    return in_a_process(context, head_cost, run.config, run.row.imports)


def cost_of_step(run: Run, context: ForkServerContext) -> Line:
    """Milliseconds of a step, of a short run of its own."""
    short = ("training.max_steps=200", "telemetry.log_every_steps=50")
    run = run._replace(row=run.row._replace(name=f"{run.row.name}_short", overrides=(*run.row.overrides, *short)))
    remove(run.folder)
    is_done = train(run, context, deadline=None)
    log = read_log(RunFolder(run.folder).metrics, {"step": int, "kind": str})
    rates = [line["images_per_second"] for _, line in log.records if "images_per_second" in line]
    if not is_done or not rates:
        raise ValueError(f"expected logged steps of {run.row.name}, got none; name rows of 200 steps with --row")
    remove(run.folder)
    log_of(run).unlink()
    return {"step_ms": round(1000 * run.config.training.batch_size / max(rates), 1)}


def forks() -> ForkServerContext:
    """Where processes come from that have torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    return context


def in_a_process(context: ForkServerContext, function: Callable[..., Line], *arguments: Any) -> Line:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def check_rows(tables: Sequence[Table], rows: Sequence[str], seeds: Sequence[int] = ()) -> None:
    """Raise a ValueError where a row is in none of the tables, or a seed of none of these rows."""
    known = {row.name: row.seeds for table in tables for row in table.rows}
    if unknown := [name for name in rows if name not in known]:
        raise ValueError(f"expected --row of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    wanted = {seed for name in rows or known for seed in known[name]}
    if others := [str(seed) for seed in seeds if seed not in wanted]:
        raise ValueError(f"expected --seed of {', '.join(map(str, sorted(wanted)))}, got {', '.join(others)}")


def to_do(
    tables: Sequence[Table], *, runs: Path, results: Path = RESULTS, rows: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Iterator[Run]:
    """The runs that have no result, or, of named rows, all.

    Raises:
        ValueError: there is no such row or seed.
    """
    check_rows(tables, rows, seeds)
    for table in tables:
        done = finished(table, results)
        for run in runs_of(table, runs):
            if (seeds and run.seed not in seeds) or (rows and run.row.name not in rows):
                continue
            if rows or (run.row.name, run.seed) not in done:
                yield run


def shown(line: Line) -> str:
    """The numbers of a line, for a person."""
    parts = [
        f"{split} R@1 {100 * line[split]['recall@1']:.2f} MAP@R {100 * line[split]['map@r']:.2f}"
        for split in ("test", "validation")
        if line[split]
    ]
    return f"{', '.join(parts)}, loss {line['loss']:.3f}, {sum(line['seconds'].values()):.0f} s"


def _is_same(line: Line, other: Line) -> bool:
    same_loss = math.isclose(line["loss"], other["loss"], rel_tol=0, abs_tol=1e-5)  # lines used to have five digits
    return same_loss and all(line[name] == other[name] for name in ("test", "validation"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(given: Sequence[str] | None = None) -> int:
    """Carry out the command line; returns the exit status: 1 if something is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=sorted(TABLES), default=sorted(TABLES), help="default: all")
    parser.add_argument("--row", nargs="+", default=[], metavar="ROW", help="these rows only, finished or not")
    parser.add_argument("--seed", nargs="+", type=int, default=[], help="these seeds only")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tables", help="folder to train in")
    parser.add_argument("--list", action="store_true", help="show tables, rows and results, start nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what is to do, start nothing")
    parser.add_argument("--figures", action="store_true", help="write tables and pictures of docs/, start nothing")
    parser.add_argument("--head-costs", action="store_true", help="measure heads of finished rows, train nothing")
    parser.add_argument("--step-times", action="store_true", help="measure steps of finished rows, 200 of each")
    arguments = parser.parse_args(given)
    costs = [*[cost_of_head] * arguments.head_costs, *[cost_of_step] * arguments.step_times]
    if costs and arguments.seed:
        parser.error("expected --head-costs and --step-times without --seed: a row takes as much with every seed")
    tables = [TABLES[name] for name in arguments.table]
    runs = arguments.runs.absolute()
    chosen: dict[str, Any] = {"runs": runs, "rows": arguments.row, "seeds": arguments.seed}
    try:
        if arguments.list:
            for table in tables:
                _list(table)
        elif arguments.dry_run:
            for run in to_do(tables, **chosen):
                print(shlex.join(run.command))
        elif arguments.figures:
            changed = [path for table in tables for path in write_pages(table, finished(table), ROOT)]
            for path in [*changed, *efficiency.write(ROOT)]:
                print(path.relative_to(ROOT))
        else:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server that forks: it counts threads but once
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of memory says that there is no GPU
            signal.signal(signal.SIGTERM, _interrupt)
            if not costs:
                return 0 if make(tables, minutes=arguments.minutes, **chosen) else 1
            for cost_of in costs:
                measure(tables, cost_of, runs=runs, rows=arguments.row)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where the run has saved", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _list(table: Table) -> None:
    done = finished(table)
    num_runs = len(runs_of(table, Path()))
    print(f"{table.name}: {table.question} {len(done)} of {num_runs} runs are finished")
    for row in table.rows:
        lines = [done[row.name, seed] for seed in row.seeds if (row.name, seed) in done]
        print(f"  {row.name}: {len(lines)} of {len(row.seeds)} seeds")
        for line in lines:
            print(f"    seed {line['seed']}: {shown(line)}")


if __name__ == "__main__":
    sys.exit(main())
