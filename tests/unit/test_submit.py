"""The submit command up to the queue, and what its job does with signals and restarts; needs no SLURM."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from dist_proxygml.checkpoint.folder import MANIFEST_FILE
from dist_proxygml.cluster import submit
from dist_proxygml.cluster.job import TrainingJob
from dist_proxygml.cluster.status import JobState, ask_job, follow_slurm, is_preempted, log_of
from dist_proxygml.config import Config, load_config, parse_config
from dist_proxygml.distributed.slurm import expand_counts, first_host, process_variables, rendezvous_port
from dist_proxygml.storage.run_folder import step_name
from dist_proxygml.submit import main

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "demo_cpu.json")
SRUN = {
    "SLURM_JOB_ID": "712",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


# ---- what SLURM says -------------------------------------------------------------------------------------------------


def test_a_task_of_srun_is_named_by_its_step() -> None:
    found = process_variables(SRUN)
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "6",  # of this srun, not of the allocation
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": found["MASTER_PORT"],
    }


def test_another_launcher_a_batch_script_and_no_slurm_at_all_are_left_alone() -> None:
    assert process_variables({**SRUN, "RANK": "0"}) == {}
    batch_script = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert process_variables(batch_script) == {}
    assert process_variables({}) == {}


def test_an_address_that_the_user_has_set_is_kept() -> None:
    found = process_variables({**SRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "29500")


def test_the_port_is_the_same_for_all_ranks_and_another_for_another_restart_step_and_job() -> None:
    port = process_variables(SRUN)["MASTER_PORT"]
    assert process_variables({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == port
    others = [{"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "714"}]
    assert port not in [process_variables({**SRUN, **other})["MASTER_PORT"] for other in others]
    ports = [rendezvous_port(job, restarts) for job in range(1, 300) for restarts in range(31)]
    assert len(set(ports)) == len(ports)
    assert all(1024 < rendezvous_port(job, 0) < 32768 for job in (1, 999, 123_456_789))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("a[3],b[1-2]", "a3"),
        ("login1,gpu[1-2]", "login1"),
        ("rack[2-3]n[05,07].hpc", "rack2n05.hpc"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_tasks_of_each_node() -> None:
    assert expand_counts("4(x2),1") == [4, 4, 1]
    with pytest.raises(ValueError, match="tasks"):
        expand_counts("4(x")


# ---- before submission -----------------------------------------------------------------------------------------------


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[set[str], str]:
    """The #SBATCH options and the srun command of the batch script."""
    assert main(["--config", CONFIG, "--dry-run", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith("srun ")]
    assert len(commands) == 1
    assert lines.index(commands[0]) == len(lines) - 1  # its status is the job's
    return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}, commands[0]


def test_the_batch_script_has_a_task_for_each_gpu_and_all_that_was_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--cpus-per-task",
        "6",
        "--partition",
        "long",
        "--time",
        "1-12",
    ]
    arguments += ["--constraint", "a100&nvlink", "--sbatch", "mem=64G", "account=vision", "exclusive"]
    options, command = dry_run(capsys, *arguments, "--set", f"runs_dir={tmp_path / 'runs'}", "name=wide")
    assert {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=6"} <= options
    assert {"--partition=long", "--time=2160", "--constraint='a100&nvlink'", "--mem=64G", "--account=vision"} <= options
    assert "--exclusive" in options
    assert {"--requeue", "--signal=USR2@120", "--open-mode=append", "--job-name=wide"} <= options
    jobs = tmp_path / "runs" / "wide.jobs"
    assert f"--output={jobs}/%j_0_log.out" in options
    assert f"--output {jobs}/%j_%t_log.out" in command
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=6", "--unbuffered"} <= set(command.split())
    assert sys.executable in command
    assert not any("error" in option for option in options), "one log for each rank"
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


def test_a_job_on_cpus_asks_for_no_gpu_and_a_short_one_is_signalled_in_its_middle(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, _ = dry_run(capsys, "--tasks-per-node", "2", "--time", "3")
    assert {"--nodes=1", "--ntasks-per-node=2", "--time=3", "--signal=USR2@90"} <= options
    assert not any("gpu" in option or "partition" in option for option in options)


@pytest.mark.parametrize(("num_workers", "given", "cores"), [(8, None, 10), (0, None, 2), (3, "5", 5), (3, "4", 4)])
def test_a_rank_gets_a_core_for_each_data_worker_and_two_for_itself_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], num_workers: int, given: str | None, cores: int
) -> None:
    option = [] if given is None else ["--cpus-per-task", given]
    arguments = ["--config", CONFIG, "--dry-run", "--tasks-per-node", "2", *option]
    settings = ["data.cache_images=false", f"data.num_workers={num_workers}"]
    assert main([*arguments, "--set", *settings]) == 0
    told = capsys.readouterr()
    assert f"#SBATCH --cpus-per-task={cores}\n" in told.out
    assert f"--kill-on-bad-exit=1 --cpus-per-task={cores} " in told.out
    assert ("data.num_workers + 2 = 5" in told.err) == (given == "4")


def test_all_mistakes_are_told_at_once_and_nothing_is_submitted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--config", CONFIG, "--nodes", "3", "--gpus-per-node", "1", "--cpus-per-task", "0", "--time", "soon"]
    arguments += ["--sbatch", "=64G", "--resume", "nowhere/step-7", "--set", f"runs_dir={tmp_path / 'runs'}"]
    assert main([*arguments, "training.epochs=many", "proxies.rato=0.1"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    for part in (
        "training.epochs: input should be a valid integer",
        "did you mean 'ratio'?",
        "--cpus-per-task of at least 1, got 0",
        "expected --time in minutes",
        "got 'soon'",
        "NAME=VALUE",
        "nowhere/step-7",
    ):
        assert part in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "3", "--gpus-per-node", "1"], "training.batch_size 64 does not divide over 3 ranks"),
        (["--nodes", "2", "--tasks-per-node", "5"], "does not divide over 10 ranks"),
        (["--gpus-per-node", "2", "--tasks-per-node", "2"], "got both"),
        ([], "got neither"),
        (["--gpus-per-node", "-1"], "--gpus-per-node of at least 1, got -1"),
        (["--cluster", "local", "--nodes", "2", "--tasks-per-node", "1"], "this machine alone, got --nodes 2"),
        (["--cluster", "debug", "--tasks-per-node", "2"], "use --cluster local for several"),
        (["--cluster", "local", "--tasks-per-node", "2", "--dry-run"], "only --cluster slurm has"),
        (["--tasks-per-node", "1", "--time", "0"], "at least one minute"),
        (["--tasks-per-node", "1", "--sbatch", "exclusive="], "or NAME such as exclusive, got 'exclusive='"),
        (
            ["--tasks-per-node", "1", "--sbatch", "nodes=4"],
            "without nodes, which is decided here, got 'nodes=4'; use --no",
        ),
        (["--tasks-per-node", "1", "--sbatch", "ntasks_per_node=4"], "use --gpus-per-node or --tasks-per-node"),
        (["--tasks-per-node", "1", "--sbatch", "signal=USR1@10"], "got 'signal=USR1@10'; remove it"),
    ],
)
def test_a_mistake_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", CONFIG, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_slurm_is_told_of_the_other_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    runs = tmp_path / "runs"
    assert main(["--config", CONFIG, "--tasks-per-node", "1", "--set", f"runs_dir={runs}"]) == 2
    assert "found no sbatch; submit from a login node, or use --cluster local or debug" in capsys.readouterr().err
    assert not runs.exists()


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("90", 90),
        ("30:00", 30),
        ("00:30", 1),
        ("12:00:00", 720),
        ("1:00:01", 61),
        ("2-0", 2880),
        ("1-00:30", 1470),
        ("1-01:01:30", 1502),
    ],
)
def test_time_limits_are_read_as_slurm_writes_them(limit: str, minutes: int) -> None:
    assert submit.parse_minutes(limit) == minutes


def test_a_mistake_is_told_before_torch_is_there() -> None:
    program = """
import runpy, sys
sys.argv = ["launchers/submit.py", "--config", "configs/demo_cpu.json", "--gpus-per-node", "7", "--dry-run"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ending:
    assert ending.code == 2
assert not {"torch", "deepspeed", "faiss", "webdataset"} & sys.modules.keys()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "does not divide over 7 ranks" in done.stderr


@pytest.mark.parametrize("change", ["data.test_split=train", 'deepspeed={"zero_optimization": {"stag": 2}}'])
def test_what_the_start_would_refuse_never_waits_in_a_queue(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: str
) -> None:
    given = ["--config", CONFIG, "--tasks-per-node", "2", "--set", f"runs_dir={tmp_path}", change]
    given.append(f"data.shards={ROOT / 'shards' / 'demo'}")
    for how in (["--dry-run"], [], ["--cluster", "local"]):
        assert main([*given, *how]) == 2
        assert capsys.readouterr().err.startswith("error: expected")
    assert not any(tmp_path.iterdir())


# ---- the job ---------------------------------------------------------------------------------------------------------


def make_job(tmp_path: Path, *, resume: str = "auto") -> tuple[TrainingJob, Config]:
    config = load_config(CONFIG, [f"runs_dir={tmp_path}"])
    return TrainingJob(config, source=CONFIG, resume=resume, uses_gpus=False, cpus_per_task=None, grace=1.0), config


def publish(config: Config, step: int, *, at: float) -> None:
    manifest = config.run_directory / "checkpoints" / step_name(step) / MANIFEST_FILE
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    os.utime(manifest, (at, at))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.name)
def test_the_settings_that_travel_are_those_that_were_validated(path: Path) -> None:
    validated = load_config(path, ["seed=3"])
    job = TrainingJob(validated, source=str(path), resume="auto", uses_gpus=True, cpus_per_task=8, grace=100.0)
    arrived = pickle.loads(cloudpickle.dumps(job))
    assert parse_config(json.loads(json.dumps(arrived.settings)), source=str(path)) == validated


@pytest.mark.parametrize("uses_gpus", [True, False])
def test_a_job_insists_on_the_gpus_that_it_asked_for(uses_gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(
        **{"USR_SIG": "USR2", "raw_job_id": "7", "global_rank": 0, "num_tasks": 2, "local_rank": 0, "num_nodes": 1}
    )
    monkeypatch.setattr("dist_proxygml.cluster.job.submitit.JobEnvironment", lambda: task)
    monkeypatch.setattr("dist_proxygml.cluster.job.signal.signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", environment := dict(os.environ))
    devices: list[str] = []
    monkeypatch.setattr(TrainingJob, "run", lambda self, *_, device: devices.append(device))
    config = load_config(CONFIG)
    TrainingJob(config, source=CONFIG, resume="auto", uses_gpus=uses_gpus, cpus_per_task=None, grace=1.0)()
    assert devices == ["cuda" if uses_gpus else "cpu"]
    assert (environment.get("CUDA_VISIBLE_DEVICES") == "") == (not uses_gpus)


def test_a_restart_continues_what_the_job_saved_and_not_what_lay_there_before(tmp_path: Path) -> None:
    job, config = make_job(tmp_path, resume="never")
    assert not job.has_started(config)
    publish(config, 40, at=job.submitted_at - 60)
    assert not job.has_started(config)
    publish(config, 10, at=job.submitted_at + 60)
    assert job.has_started(config)


def test_a_job_that_saves_nothing_between_its_restarts_gives_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job, config = make_job(tmp_path)
    for step in range(1, 8):  # as long as it advances it goes on
        publish(config, step, at=job.submitted_at + step)
        delayed = job.checkpoint()
        assert delayed is not None
        job = pickle.loads(cloudpickle.dumps(delayed)).function
    assert job.checkpoint() is not None
    assert job.checkpoint() is not None
    assert job.checkpoint() is None
    assert "error: 3 restarts without a newer checkpoint" in capfd.readouterr().err


# submitit's handler says "requeue" or refuses; is_preempted is replaced, which asks SLURM.
STOPPED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from signal import SIGTERM, SIGUSR2
from types import SimpleNamespace
import submitit
from dist_proxygml.cluster import job

cluster, rank, state, what = sys.argv[1:]

def handler(number, frame):
    assert number == SIGUSR2
    print("requeue", flush=True)
    if state == "refused":
        raise submitit.core.utils.UncompletedJobError("timed-out too many times")
    sys.exit(-1)

job.is_preempted = lambda job_id: state == "preempted"
paths = SimpleNamespace(folder=Path("."))
task = SimpleNamespace(USR_SIG="USR2", cluster=cluster, job_id="1", global_rank=int(rank), paths=paths)
requeue = job.Requeue(task, handler, grace=1.0)
if what == "hangs":
    requeue.give_up()
else:
    requeue.after({"TERM": {SIGTERM}, "USR2": {SIGUSR2}, "both": {SIGTERM, SIGUSR2}}[what])
print("ends")
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("cluster", "rank", "state", "what", "status", "output"),
    [
        ("slurm", 0, "running", "USR2", 255, "requeue"),
        ("slurm", 0, "running", "both", 255, "requeue"),
        ("slurm", 1, "running", "USR2", 0, ""),  # waits for rank 0 to end the job
        ("slurm", 0, "running", "TERM", 75, "ends"),  # scancel: the job does not come back
        ("slurm", 0, "preempted", "TERM", 255, "requeue"),
        ("local", 0, "preempted", "TERM", 75, "ends"),  # SLURM is not asked
        ("slurm", 0, "refused", "USR2", 75, "requeue"),
        ("slurm", 0, "running", "hangs", 255, "requeue"),
    ],
)
def test_a_stopped_job_is_requeued_by_rank_0_if_its_signal_asks_for_it(
    tmp_path: Path, cluster: str, rank: int, state: str, what: str, status: int, output: str
) -> None:
    command = [sys.executable, "-c", STOPPED, cluster, str(rank), state, what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (status, output), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == (["75"] if status == 75 else [])
    assert ("not stopped in time" in done.stderr) == (what == "hangs")


# The signal comes when submitit has started the task, and before the libraries are imported.
EARLY = """
import os, signal, sys, time, types
from types import SimpleNamespace
from dist_proxygml.cluster import job
from dist_proxygml.config import load_config

def train(config, context, *, resume, signals):
    deadline = time.monotonic() + 20
    while signals.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
    print("stopped by", signals.received.name if signals.received else None, flush=True)

class Requeue(job.Requeue):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        os.kill(os.getpid(), signal.SIGUSR2)

assert "torch" not in sys.modules
sys.modules["dist_proxygml.training.run"] = types.ModuleType("dist_proxygml.training.run")
sys.modules["dist_proxygml.training.run"].train = train
job.Requeue = Requeue
paths = SimpleNamespace(folder=__import__("pathlib").Path("."))
task = SimpleNamespace(USR_SIG="USR2", cluster="slurm", job_id="7", raw_job_id="7", global_rank=0, local_rank=0)
task.num_tasks, task.num_nodes, task.hostnames, task.paths = 1, 1, ["here"], paths
job.submitit.JobEnvironment = lambda: task
signal.signal(signal.SIGUSR2, lambda number, frame: print("submitit's handler, too early", flush=True))
config = load_config(sys.argv[1], [])
job.TrainingJob(config, source="", resume="auto", uses_gpus=False, cpus_per_task=1, grace=60.0)()
"""


@pytest.mark.timeout(240)
def test_a_signal_that_comes_before_the_libraries_are_there_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EARLY, str(ROOT / CONFIG)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "stopped by SIGUSR2"), done.stderr


@pytest.mark.parametrize(("minutes", "delay", "grace"), [(1, 30, 15), (4, 120, 100), (600, 120, 100)])
def test_the_signal_comes_early_enough_and_leaves_time_to_requeue(minutes: int, delay: int, grace: float) -> None:
    assert submit.signal_delay(minutes) == delay
    assert submit.grace_of(delay) == grace


# ---- after submission ------------------------------------------------------------------------------------------------


def answer(folder: Path, program: str, text: str, *, status: int = 0) -> None:
    """Put a program into `folder` that prints `text`."""
    path = folder / program
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    path.chmod(0o755)


def test_the_state_of_a_job_comes_from_the_controller_then_from_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    shown = "JobId=7 JobName=a\n   JobState={} Reason={} Dependency=(null)\n   ExitCode={}\n   PreemptTime={}"
    answer(tmp_path, "scontrol", shown.format("RUNNING", "None", "0:0", "None"))
    assert ask_job("7") == JobState("RUNNING", "None", 0)
    assert not is_preempted("7")
    answer(tmp_path, "scontrol", shown.format("RUNNING", "None", "0:0", "2026-11-23T10:00:00"))
    assert is_preempted("7")
    answer(tmp_path, "scontrol", shown.format("CANCELLED", "None", "0:15", "2026-11-23T10:00:00"))
    assert not is_preempted("7"), "scancel is no preemption"
    answer(tmp_path, "scontrol", "", status=1)
    answer(tmp_path, "sacct", "CANCELLED by 0|0:15")
    assert ask_job("7") == JobState("CANCELLED", "None", 128 + signal.SIGTERM)
    answer(tmp_path, "sacct", "", status=1)
    assert ask_job("7") is None


@pytest.mark.parametrize(
    ("reason", "hopeless"),
    [
        ("PartitionConfig", True),
        ("PartitionTimeLimit", True),
        ("QOSMaxCpuPerJobLimit", True),
        ("AssocMaxNodePerJobLimit", True),
        ("Resources", False),
        ("Priority", False),
        ("BeginTime", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("ReqNodeNotAvail", False),
    ],
)
def test_only_reasons_that_no_waiting_resolves_are_hopeless(reason: str, hopeless: bool) -> None:
    assert JobState("PENDING", reason, 0).is_hopeless == hopeless
    assert not JobState("RUNNING", reason, 0).is_hopeless


def test_following_a_job_shows_its_log_waits_through_a_requeue_and_ends_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(tmp_path, "7", 0)
    states = iter(
        [
            JobState("RUNNING", "None", 0),
            JobState("NODE_FAIL", "None", 1),
            JobState("PENDING", "BeginTime", 0),
            JobState("RUNNING", "None", 0),
            JobState("FAILED", "NonZeroExitCode", 143),
            JobState("FAILED", "NonZeroExitCode", 143),
        ]
    )

    def next_state(job_id: str) -> JobState:
        with open(log, "a") as file:
            file.write("step\n")
        return next(states)

    monkeypatch.setattr("dist_proxygml.cluster.status.ask_job", next_state)
    monkeypatch.setattr("dist_proxygml.cluster.status.time.sleep", lambda seconds: None)
    log_of(tmp_path, "7", 1).write_text("here\nerror: shards are\n  damaged\nthere\n")
    assert follow_slurm("7", tmp_path, 2) == 2  # the message tells more than the peer's SIGTERM
    output = capsys.readouterr()
    assert output.out == "step\n" * 6
    assert "error: shards are\n  damaged\n" in output.err
    assert "PENDING BeginTime" in output.err
    assert "there" not in output.err
