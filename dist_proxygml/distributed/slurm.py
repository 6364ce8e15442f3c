"""Translate srun's environment variables into those of torch.distributed.

    srun --nodes 2 --ntasks-per-node 8 python launchers/train.py --config configs/sop_8gpu.json

srun numbers its tasks and names their hosts; rank 0 runs on the first host. srun does not provide a free port, so the
port is a function of job and restart count: every task computes the same one, other jobs on the host a different one,
and a requeued job does not wait for its previous port. Pure functions of an environment.

Only a step's variables (SLURM_STEP_...) are read, which only srun sets: SLURM_PROCID and SLURM_NTASKS are also set in a
batch script outside srun, where a plain python is a world of one. Declined: discovery through MPI, which needs mpi4py
and a SLURM built with PMIx."""

import re
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below 32768, where Linux's ephemeral ports begin


def process_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task started by srun.

    Empty outside srun and where another launcher has set the rank. MASTER_ADDR and MASTER_PORT are kept if set.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    # A second srun in a job gets another port, since its step number is the next.
    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    port = rendezvous_port(int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"]), restarts)
    tasks_per_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def rendezvous_port(job: int, restarts: int) -> int:
    """Compute the rendezvous port of a job: the same for all its ranks, a different one after a restart."""
    return _FIRST_PORT + (job * 31 + restarts) % _NUM_PORTS


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM host list: "gpu[007-009,12],login1" -> "gpu007"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"expected a list of hosts such as gpu[1-4], got {nodes!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def expand_counts(counts: str) -> list[int]:
    """Expand SLURM's tasks per node: "4(x2),1" -> [4, 4, 1]."""
    runs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run) for run in counts.split(",")]
    if None in runs:
        raise ValueError(f'expected numbers of tasks such as "4(x2),1", got {counts!r}')
    return [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]
