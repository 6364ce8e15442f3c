"""Jobs of the submit command really train: in this process, on this machine, and in a SLURM of two nodes.

The SLURM is a real one that this file starts. Chosen: each node is a network, host name and /etc/hosts of its own, so
that a rank that looks for its peers at localhost fails as it would on a cluster; the daemons run from a temporary
folder with a key of their own, and nothing else of the machine is touched. No accounting: the controller remembers long
enough. Needs root, the right to make network namespaces, and `apt-get install slurmctld slurmd slurm-client munge
iproute2` with /usr/sbin on the PATH; these tests run where DIST_PROXYGML_NEEDS_SLURM is set, and are skipped elsewhere.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "nsenter", "unshare")
NODES = ("node1", "node2")
BRIDGE = "pgmlslurm"
SUBNET = "10.213.78"
PORT = 16910
SETTINGS = (
    "training.max_steps=40",
    "training.batch_size=32",
    "checkpoint.every_steps=2",
    "telemetry.log_every_steps=1",
    "telemetry.progress_bar=false",
    "evaluation.kmeans_seeds=0",
    "evaluation.at_start=false",
    "evaluation.raw_pixels=false",
    "schedule.warmup_steps=0",
)
# Runs in the namespaces of a node: {name}, {hosts} and {configuration} are filled in.
START_NODE = """
hostname {name}
mount --bind {hosts} /etc/hosts
exec slurmd -D -f {configuration} -N {name}
"""


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def remove_networks() -> None:
    for node in NODES:
        run("ip", "netns", "del", f"pgml-{node}", check=False)
    run("ip", "link", "del", BRIDGE, check=False)


def make_networks() -> None:
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for number, node in enumerate(NODES, start=1):
        namespace, cable = f"pgml-{node}", f"pgml-{number}"
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "link", "set", cable, "master", BRIDGE, "up")
        run("ip", "-n", namespace, "addr", "add", f"{SUBNET}.{10 + number}/24", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        run("ip", "-n", namespace, "link", "set", "lo", "up")


def write_configuration(folder: Path) -> Path:
    host = run("hostname", "-s").strip()
    nodes = [
        f"NodeName={node} NodeHostname={node} NodeAddr={SUBNET}.{10 + number} Port={PORT + 1 + number} CPUs=2"
        for number, node in enumerate(NODES, start=1)
    ]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}({SUBNET}.1)",
        f"SlurmctldPort={PORT + 1}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",  # a requeued job waits for so long and a little more
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "KillWait=5",
        *nodes,
        "PartitionName=main Nodes=ALL Default=YES MaxTime=2:00:00",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    version = tuple(int(part) for part in run("slurmd", "-V").split()[1].split(".")[:2])
    plugin = "disabled" if version >= (23, 2) else "cgroup/v1"  # the one that starts where there are no cgroups
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
    addresses = [f"{SUBNET}.1 {host}", *(f"{SUBNET}.{10 + n} {node}" for n, node in enumerate(NODES, start=1))]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses]) + "\n")
    return folder / "slurm.conf"


def start_daemons(folder: Path, configuration: Path) -> Iterator[subprocess.Popen[bytes]]:
    """munged, slurmctld and a slurmd per node, in the foreground of processes of ours."""
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "SLURM_CONF": str(configuration), "HOME": "/root"}

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        with open(folder / f"{name}.out", "wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    yield start("munged", "munged", "--foreground", f"--seed-file={folder}/munge.seed", *options)
    wait_for((folder / "munge.socket").exists, seconds=10, what="munged")
    yield start("slurmctld", "slurmctld", "-D", "-f", str(configuration))
    for node in NODES:
        script = START_NODE.format(name=node, hosts=folder / "hosts", configuration=configuration)
        enter = ("nsenter", f"--net=/run/netns/pgml-{node}", "unshare", "--uts", "--ipc", "--mount")
        yield start(node, *enter, "sh", "-ec", script)


def has_idle_nodes() -> bool:
    return run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split() == ["idle"] * len(NODES)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A running SLURM, named by SLURM_CONF in this process; its folder."""
    if "DIST_PROXYGML_NEEDS_SLURM" not in os.environ:
        pytest.skip("starts a SLURM on this machine; set DIST_PROXYGML_NEEDS_SLURM=1")
    missing = [
        program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    reason = f"no {', '.join(missing)} on this machine" if missing else "root makes the nodes" if os.geteuid() else ""
    if not reason:
        remove_networks()  # of a test that was killed
        try:
            make_networks()
        except AssertionError as error:
            reason = f"no networks for the nodes: {error}"
            remove_networks()
    if reason:
        pytest.fail(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds unix sockets
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        try:
            folder.chmod(0o755)
            (folder / "state").mkdir()
            (folder / "munge.key").touch(mode=0o600)
            (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
            configuration = write_configuration(folder)
            patch.setenv("SLURM_CONF", str(configuration))
            for daemon in start_daemons(folder, configuration):
                daemons.append(daemon)
            wait_for(has_idle_nodes, seconds=30, what=f"idle nodes; see {folder}")
            yield folder
            run("scancel", "--full", "--user=root", check=False)
            wait_for(lambda: not run("squeue", "--noheader"), seconds=30, what="the last jobs")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
            remove_networks()
    shutil.rmtree(folder)


def submit(*arguments: str, settings: tuple[str, ...]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [
        sys.executable,
        "launchers/submit.py",
        "--config",
        "configs/demo_cpu.json",
        *arguments,
        "--set",
        *settings,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def field(job_id: str, name: str) -> str:
    words = run("scontrol", "show", "job", job_id).split()
    return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_job_on_two_nodes_is_requeued_by_its_signal_and_by_scontrol_and_ends_complete(
    cluster: Path, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "demo_cpu" / "checkpoints"
    options = ("--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "60", "--wait")
    process = submit(*options, settings=(f"runs_dir={tmp_path}", *SETTINGS))
    assert process.stdout is not None
    job_id = process.stdout.readline().split()[1]

    # 1. The job's own signal, as before the time limit and at preemption: it puts itself back into the queue.
    wait_for((checkpoints / "step-000002" / "state.json").exists, seconds=60, what="a checkpoint")
    run("scancel", f"--signal={signal.SIGUSR2.value}", job_id)
    wait_for(lambda: field(job_id, "Restarts") == "1", seconds=30, what="the first restart")
    # 2. Put back from outside once it has moved on.
    steps = count_steps(tmp_path)
    wait_for(lambda: count_steps(tmp_path) > steps + 2, seconds=90, what="steps after the restart")
    run("scontrol", "requeue", job_id)
    output, errors = process.communicate(timeout=150)

    assert process.returncode == 0, output + errors
    assert field(job_id, "Restarts") == "2"
    assert not (tmp_path / "demo_cpu.1").exists(), "a restart has started anew"
    log = (tmp_path / "demo_cpu.jobs" / f"{job_id}_0_log.out").read_text()
    assert log.count("starting anew") == 1
    assert log.count("continuing") == 2
    assert "2 rank(s)" in log
    assert "report.html" in output  # the log of rank 0 was shown
    state = json.loads((checkpoints / "step-000040" / "state.json").read_text())
    assert state["step"] == 40


def count_steps(runs: Path) -> int:
    lines = (runs / "demo_cpu" / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line)["kind"] == "train" for line in lines)


@pytest.mark.timeout(120)
def test_what_can_never_start_is_reported_and_what_slurm_refuses_is_passed_on(cluster: Path, tmp_path: Path) -> None:
    settings = (f"runs_dir={tmp_path}", "training.batch_size=99")
    waiting = submit("--nodes", "99", "--tasks-per-node", "1", settings=settings)
    output, errors = waiting.communicate(timeout=60)
    assert waiting.returncode == 1, output + errors
    assert "will never start: its reason is PartitionConfig" in errors
    refused = submit("--partition", "nowhere", "--tasks-per-node", "1", settings=settings)
    output, errors = refused.communicate(timeout=60)
    assert refused.returncode == 2, output + errors
    assert "invalid partition specified: nowhere" in errors
    assert "Traceback" not in errors


def short(runs: Path, *changes: str) -> tuple[str, ...]:
    return (f"runs_dir={runs}", *SETTINGS, "training.max_steps=2", *changes)


@pytest.mark.timeout(180)
def test_a_local_job_trains_on_two_ranks_and_leaves_a_log_of_each(tmp_path: Path) -> None:
    process = submit(
        "--cluster", "local", "--tasks-per-node", "2", "--cpus-per-task", "1", "--wait", settings=short(tmp_path)
    )
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, output + errors
    assert "2 rank(s) on cpu" in output
    assert count_steps(tmp_path) == 2
    assert (tmp_path / "demo_cpu" / "report.html").exists()
    assert len(list((tmp_path / "demo_cpu.jobs").glob("*_log.out"))) == 2


@pytest.mark.timeout(180)
def test_a_debug_job_trains_in_the_process_that_was_called(tmp_path: Path) -> None:
    process = submit("--cluster", "debug", settings=short(tmp_path))
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, output + errors
    assert "1 rank(s)" in output
    assert count_steps(tmp_path) == 2
    assert not (tmp_path / "demo_cpu.jobs").exists()


@pytest.mark.timeout(180)
def test_a_mistake_that_only_the_job_can_find_gives_its_message_and_status_two(tmp_path: Path) -> None:
    options = ("--cluster", "local", "--tasks-per-node", "1", "--wait")
    process = submit(*options, settings=short(tmp_path, "data.num_classes=500"))
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 2, output + errors
    assert errors.count("error: data.num_classes is 500, but the split 'train'") == 1
    assert "Traceback" not in output + errors
    assert not (tmp_path / "demo_cpu").exists()
