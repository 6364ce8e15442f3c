"""A real SLURM with a few nodes on this one machine, with accounting: to try jobs on, and for the tests.

    sudo python3 tools/slurm_cluster.py install    # Debian, Ubuntu: the packages, without starting their services
    sudo python3 tools/slurm_cluster.py start      # again: brings back what has died
    eval "$(python3 tools/slurm_cluster.py env)"   # then sinfo, sbatch, launchers/submit.py ...
    sudo python3 tools/slurm_cluster.py fail node2 # its cable is pulled and all its processes are killed
    sudo python3 tools/slurm_cluster.py stop       # ends the jobs, leaves nothing behind

Chosen: each node is a host of its own as far as programs can tell, with its network, host name, /etc/hosts and /dev/shm
(namespaces), so that a rank that looks for its peers at localhost fails as it would on a cluster. Where namespaces are
not allowed the nodes are addresses of the loopback device, which adds their names to /etc/hosts until `stop`. All else
lies in one folder; no user, service or cgroup is needed. Accounting is slurmdbd on a MariaDB that listens on a file.
Declined: containers, which the machines that run tests may not have, and several clusters in one folder.

Needs nothing but Python and the packages. The waits that clusters measure in minutes are seconds here.
"""

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server-core", "mariadb-client-core")
PACKAGES += ("iproute2", "util-linux")
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db")
PROGRAMS += ("my_print_defaults", "ip", "nsenter", "unshare")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOCK = Path("/run/dist_proxygml-slurm.lock")

CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is put back into the queue waits cred_expire seconds, 120 if not said otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# One on each node: who asks for it (gres=slot:1) loses it to whoever asks for it in the partition "urgent".
GresTypes=slot
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=2-00:00:00 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
"""
ACCOUNTING = """\
DbdHost={host}
DbdAddr={address}
DbdPort={accounting_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""
# In the namespaces of a node: its name, the folder.
START_NODE = """
hostname "$0"
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs -o size=2g tmpfs /dev/shm
exec slurmd -D -f "$1/slurm.conf" -N "$0"
"""


class ClusterError(Exception):
    """Why there is no cluster, for the user."""


# ---- programs and processes ------------------------------------------------------------------------------------------


def run(*command: str, check: bool = True, environment: dict[str, str] | None = None) -> str:
    """What a command prints.

    Raises:
        ClusterError: it failed or is not there.
    """
    environment = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/root"} | (environment or {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{' '.join(command)}: {error}") from None
    if check and done.returncode:
        raise ClusterError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout


def wait_for(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Return as soon as the condition holds.

    Raises:
        ClusterError: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


def missing_programs() -> list[str]:
    """What is not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def install() -> None:
    """Install the packages that are missing.

    Raises:
        ClusterError: they cannot be installed here.
    """
    if not missing_programs():
        return
    if os.geteuid():
        raise ClusterError(f"no {', '.join(missing_programs())}; only root can install them")
    if shutil.which("apt-get", path=PATH) is None:
        raise ClusterError(f"no {', '.join(missing_programs())}, and no apt-get to install {' '.join(PACKAGES)} with")
    policy = Path("/usr/sbin/policy-rc.d")  # the packages ask it whether to start their services
    is_ours = not policy.exists()
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]
    apt += ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20"]
    try:
        if is_ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                [*apt, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120
            )
        if done.returncode:
            raise ClusterError(f"apt-get: {done.stderr.strip()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"apt-get: {error}") from None
    finally:
        if is_ours:
            policy.unlink(missing_ok=True)
    if missing_programs():
        raise ClusterError(f"apt-get has not brought {', '.join(missing_programs())}")


# ---- the cluster -----------------------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """A cluster by what decides its names, addresses and ports."""

    folder: Path
    number: int
    """Among the clusters of this machine."""
    nodes: tuple[str, ...]
    has_namespaces: bool

    @property
    def configuration(self) -> Path:
        """What SLURM_CONF names."""
        return self.folder / "slurm.conf"

    @property
    def port(self) -> int:
        """The first of its ports: slurmctld's, then slurmdbd's and those of the nodes."""
        return 16900 + 20 * self.number

    @property
    def bridge(self) -> str:
        """The switch that connects the nodes."""
        return f"pgml{self.number}"

    def address(self, node: str | None = None) -> str:
        """Of a node, or of the controller."""
        last = 11 + self.nodes.index(node) if node else 1
        return f"10.213.{self.number}.{last}" if self.has_namespaces else f"127.0.0.{last}"

    def namespace(self, node: str) -> str:
        """The name of a node's network."""
        return f"{self.bridge}-{node}"

    def cable(self, node: str) -> str:
        """The bridge's end of what connects a node with it."""
        return f"{self.bridge}-{self.nodes.index(node) + 1}"

    def save(self) -> None:
        """For whoever asks the folder later."""
        text = json.dumps([self.number, self.nodes, self.has_namespaces])
        (self.folder / "cluster.json").write_text(text)


def read_cluster(folder: Path) -> Cluster | None:
    """The cluster of a folder, whether it runs or not."""
    try:
        number, nodes, has_namespaces = json.loads((folder / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    return Cluster(folder, number, tuple(nodes), has_namespaces)


def processes(cluster: Cluster, node: str | None = None) -> list[int]:
    """Daemons and jobs of the cluster, or of one of its nodes.

    SLURM names the node in every task's environment, and here in the daemons' as well. Clients do not have it.
    """
    wanted = {f"SLURM_CONF={cluster.configuration}".encode()}
    if node:
        wanted.add(f"SLURMD_NODENAME={node}".encode())
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = set(path.read_bytes().split(b"\0"))
        except OSError:
            continue
        if wanted <= variables and any(variable.startswith(b"SLURMD_NODENAME=") for variable in variables):
            found.append(int(path.parent.name))
    return found


def kill(cluster: Cluster, node: str | None = None) -> None:
    """Kill what `processes` finds, and what those start meanwhile."""

    def is_gone() -> bool:
        left = processes(cluster, node)
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return not left

    wait_for(is_gone, seconds=20, what="the processes to end")


def is_running(cluster: Cluster, daemon: str) -> bool:
    """Whether a daemon that `start_daemon` has started lives."""
    try:
        process = int((cluster.folder / f"{daemon}.started").read_text())
    except FileNotFoundError:
        return False
    return process in processes(cluster)


def start_daemon(cluster: Cluster, daemon: str, *command: str, node: str = "controller") -> None:
    """Start a daemon that stays in the foreground of a process of its own, unless it runs already."""
    if is_running(cluster, daemon):
        return
    environment = {
        "PATH": PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(cluster.configuration),
        "SLURMD_NODENAME": node,
        "MYSQL_UNIX_PORT": str(cluster.folder / "mariadb.socket"),
    }
    with open(cluster.folder / "log" / daemon, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    (cluster.folder / f"{daemon}.started").write_text(str(process.pid))


def client(cluster: Cluster, *command: str, check: bool = True) -> str:
    """What one of SLURM's own commands prints."""
    return run(*command, check=check, environment={"SLURM_CONF": str(cluster.configuration)})


# ---- networks --------------------------------------------------------------------------------------------------------


def remove_networks(cluster: Cluster) -> None:
    """What `make_networks` has made; no matter what of it is there."""
    for node in cluster.nodes:
        run("ip", "link", "del", cluster.cable(node), check=False)  # with its network it would go later than we do
        run("ip", "netns", "del", cluster.namespace(node), check=False)
    run("ip", "link", "del", cluster.bridge, check=False)


def make_networks(cluster: Cluster) -> None:
    """A bridge, and for each node a network that a cable connects with it.

    Raises:
        ClusterError: this machine does not allow it.
    """
    run("ip", "link", "add", cluster.bridge, "type", "bridge")
    run("ip", "addr", "add", f"{cluster.address()}/24", "dev", cluster.bridge)
    run("ip", "link", "set", cluster.bridge, "up")
    for node in cluster.nodes:
        namespace, cable = cluster.namespace(node), cluster.cable(node)
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "link", "set", cable, "master", cluster.bridge, "up")
        run("ip", "-n", namespace, "addr", "add", f"{cluster.address(node)}/24", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        run("nsenter", f"--net=/run/netns/{namespace}", "unshare", "--uts", "--ipc", "--mount", "true")


def host_lines(cluster: Cluster) -> list[str]:
    """The nodes for /etc/hosts."""
    return [f"{cluster.address(node)} {node} # {cluster.bridge}" for node in cluster.nodes]


def write_own_hosts(cluster: Cluster, *, wanted: bool) -> None:
    """The lines of this cluster in this machine's /etc/hosts, or none. In place: a container's cannot be replaced."""
    hosts = Path("/etc/hosts")
    own = host_lines(cluster)
    kept = [line for line in hosts.read_text().splitlines() if line not in own]
    hosts.write_text("\n".join([*kept, *(own if wanted else [])]) + "\n")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """While clusters take their numbers, or give them back.

    Raises:
        ClusterError: we are not root.
    """
    if os.geteuid():
        raise ClusterError("only root can do that: a cluster makes networks, and its nodes run jobs of any user")
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_free(cluster: Cluster) -> bool:
    """Whether no other cluster of this machine has its number."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", cluster.port))
    except OSError:
        return False
    return not Path("/sys/class/net", cluster.bridge).exists()


def plan_cluster(folder: Path, nodes: tuple[str, ...], network: str) -> Cluster:
    """A new cluster with its networks, which no other cluster on this machine has.

    Raises:
        ClusterError: none is possible.
    """
    for number in range(10):
        cluster = Cluster(folder, number, nodes, has_namespaces=network != "loopback")
        if is_free(cluster):
            break
    else:
        raise ClusterError("this machine has ten clusters already")
    if cluster.has_namespaces:
        try:
            make_networks(cluster)
        except ClusterError as error:
            remove_networks(cluster)
            if network == "namespaces":
                raise
            print(f"nodes cannot have networks of their own: {error}", flush=True)
            cluster = cluster._replace(has_namespaces=False)
    return cluster


# ---- start and stop --------------------------------------------------------------------------------------------------


def write_configuration(cluster: Cluster) -> None:
    """All files that the daemons read."""
    folder, host = cluster.folder, socket.gethostname().partition(".")[0]
    node_lines = [
        f"NodeName={node} NodeHostname={node if cluster.has_namespaces else host} NodeAddr={cluster.address(node)} "
        f"Port={cluster.port + 2 + number} CPUs=8 Gres=slot:1"
        for number, node in enumerate(cluster.nodes)
    ]
    values = {
        "folder": folder,
        "host": host,
        "address": cluster.address(),
        "port": cluster.port,
        "accounting_port": cluster.port + 1,
        "nodes": "\n".join(node_lines),
    }
    cluster.configuration.write_text(CONFIGURATION.format(**values))
    (folder / "gres.conf").write_text("AutoDetect=off\nName=slot Count=1\n")
    version = tuple(int(part) for part in run("slurmd", "-V").split()[1].split(".")[:2])
    plugin = "disabled" if version >= (23, 2) else "cgroup/v1"  # the one that starts where there are no cgroups
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
    (folder / "hosts").write_text(
        f"127.0.0.1 localhost\n{cluster.address()} {host}\n" + "\n".join(host_lines(cluster)) + "\n"
    )
    secret = {"slurmdbd.conf": ACCOUNTING.format(**values).encode(), "munge.key": secrets.token_bytes(1024)}
    for name, content in secret.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)


def start(folder: Path, *, num_nodes: int, network: str) -> Cluster:
    """Start a cluster in the folder, or what has died of the one that is there.

    Raises:
        ClusterError: it does not start; nothing is left of a new one but its folder.
    """
    if missing_programs():
        raise ClusterError(f"no {', '.join(missing_programs())}; run `{sys.argv[0]} install`")
    if len(str(folder)) > 70:
        raise ClusterError(f"{folder} is too long a name: the folder holds sockets, whose names have 108 bytes")
    if folder.exists() and folder.stat().st_uid != 0:
        raise ClusterError(f"{folder} is somebody else's; name another one with --folder")
    cluster = read_cluster(folder)
    if cluster and is_running(cluster, "slurmctld"):
        start_daemons(cluster)
        return cluster
    if cluster:
        stop(cluster)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name in ("state", "log"):
        (folder / name).mkdir(exist_ok=True)
    cluster = plan_cluster(folder, tuple(f"node{number}" for number in range(1, num_nodes + 1)), network)
    cluster.save()
    write_configuration(cluster)
    try:
        start_daemons(cluster)
    except ClusterError as error:
        logs = "".join(f"\n==> {path}\n{path.read_text()[-1500:]}" for path in sorted((folder / "log").iterdir()))
        stop(cluster)
        raise ClusterError(f"{error}{logs}") from None
    return cluster


def start_daemons(cluster: Cluster) -> None:
    """All daemons, from munged to the nodes; ends when the nodes are there."""
    folder = cluster.folder
    # 1. Who may talk to whom.
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "log/munged.log"}
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    start_daemon(cluster, "munged", "munged", "--foreground", f"--seed-file={folder}/munge.seed", *options)
    # 2. Accounting. What is in it need not survive this machine.
    database = ("--no-defaults", "--user=root", f"--datadir={folder}/database", "--skip-name-resolve")
    database += ("--innodb-log-file-size=8M", "--innodb-flush-method=nosync", "--innodb-doublewrite=0")
    if not (folder / "database").exists():
        ways_in = ("--auth-root-authentication-method=socket", "--auth-root-socket-user=root", "--skip-test-db")
        run("mariadb-install-db", *database, *ways_in)
    start_daemon(
        cluster,
        "mariadbd",
        *("mariadbd", *database, f"--socket={folder}/mariadb.socket", f"--pid-file={folder}/mariadbd.pid"),
        *("--skip-networking", "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"),
    )
    wait_for((folder / "munge.socket").exists, seconds=20, what="munged")
    wait_for((folder / "mariadb.socket").exists, seconds=30, what="mariadbd")
    start_daemon(cluster, "slurmdbd", "slurmdbd", "-D")
    wait_for(lambda: answers(cluster, "sacctmgr", "--noheader", "list", "cluster"), seconds=30, what="slurmdbd")
    # 3. The controller and the nodes.
    start_daemon(cluster, "slurmctld", "slurmctld", "-D", "-f", str(cluster.configuration))
    if not cluster.has_namespaces:
        write_own_hosts(cluster, wanted=True)
    for node in cluster.nodes:
        if cluster.has_namespaces:
            run("ip", "link", "set", cluster.cable(node), "up")
            run("ip", "-n", cluster.namespace(node), "link", "set", "eth0", "up")
            spaces = ("nsenter", f"--net=/run/netns/{cluster.namespace(node)}", "unshare", "--uts", "--ipc", "--mount")
            command = (*spaces, "sh", "-ec", START_NODE, node, str(folder))
        else:
            command = ("slurmd", "-D", "-f", str(cluster.configuration), "-N", node)
        start_daemon(cluster, f"slurmd-{node}", *command, node=node)
    wait_for(lambda: has_all_nodes(cluster), seconds=60, what="the nodes")


def answers(cluster: Cluster, *command: str) -> bool:
    """Whether a client gets an answer."""
    try:
        client(cluster, *command)
    except ClusterError:
        return False
    return True


def has_all_nodes(cluster: Cluster) -> bool:
    """Whether all nodes take jobs."""
    states = client(cluster, "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).split()
    return len(states) == len(cluster.nodes) and set(states) <= {"idle", "mixed", "allocated", "completing"}


def stop(cluster: Cluster) -> None:
    """End the jobs and the daemons; remove the networks and the folder."""
    if is_running(cluster, "slurmctld"):
        client(cluster, "scancel", "--full", "--user=root", check=False)
        try:
            wait_for(lambda: not client(cluster, "squeue", "--noheader", check=False), seconds=10, what="the jobs")
        except ClusterError:
            pass  # they are killed with the rest
    kill(cluster)
    if cluster.has_namespaces:
        remove_networks(cluster)
    else:
        write_own_hosts(cluster, wanted=False)
    shutil.rmtree(cluster.folder)


def fail(cluster: Cluster, node: str) -> None:
    """Take a node away as a power failure does. `start` brings it back."""
    if node not in cluster.nodes:
        raise ClusterError(f"expected one of {', '.join(cluster.nodes)}, got {node}")
    if cluster.has_namespaces:
        run("ip", "-n", cluster.namespace(node), "link", "set", "eth0", "down")
    kill(cluster, node)


# ---- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/dist_proxygml-slurm"), help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="install the packages with apt-get; does nothing where all is there")
    starting = commands.add_parser("start", help="start the cluster, or what has died of it")
    starting.add_argument("--nodes", type=int, default=2, help="default: 2")
    starting.add_argument("--network", choices=("auto", "namespaces", "loopback"), default="auto")
    starting.add_argument("--hold", action="store_true", help="stop it at a line, or the end, of standard input")
    commands.add_parser("env", help="print what a shell needs to use it")
    failing = commands.add_parser("fail", help="make a node fail")
    failing.add_argument("node")
    commands.add_parser("stop", help="stop it and remove its folder")
    arguments = parser.parse_args()
    try:
        act(arguments, arguments.folder.resolve())
    except ClusterError as error:
        sys.exit(f"error: {error}")


def act(arguments: argparse.Namespace, folder: Path) -> None:
    """One command.

    Raises:
        ClusterError: it cannot be done.
    """
    if arguments.command == "install":
        return install()
    if arguments.command == "start":
        with one_at_a_time():
            cluster = start(folder, num_nodes=arguments.nodes, network=arguments.network)
        where = "networks of their own" if cluster.has_namespaces else "this machine's network"
        print(f"SLURM runs: {', '.join(cluster.nodes)} in {where}; SLURM_CONF={cluster.configuration}", flush=True)
        if arguments.hold:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            try:
                sys.stdin.readline()
            finally:
                with one_at_a_time():
                    stop(cluster)
        return None
    found = read_cluster(folder)
    if found is None:
        raise ClusterError(f"there is no cluster in {folder}")
    if arguments.command == "env":
        print(f"export SLURM_CONF={found.configuration}")
    else:
        with one_at_a_time():
            if arguments.command == "fail":
                fail(found, arguments.node)
            else:
                stop(found)
    return None


if __name__ == "__main__":
    main()
