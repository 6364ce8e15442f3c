"""Fault injection: makes a chosen process fail at a chosen point, to see that a run survives it.

    DIST_PROXYGML_FAULT="save.publish@1:3:kill9" deepspeed launchers/train.py ...

means: when rank 1 reaches the point save.publish for the third time, it is killed. Several faults are separated by
commas. Without the variable a point costs one lookup. docs/fault_tolerance.md lists the points and results.

    kill9       SIGKILL to this process                      raise      an OSError, as of a failing disk
    enospc      an OSError "no space left on device"         stop       SIGSTOP to this process: it hangs
    signal=USR2 that signal to this process (TERM, USR1)     sleep=S    S seconds go by
    nan         the caller must corrupt its numbers

Declined: a switch in the configuration. A fault belongs to one start of a run, and must not travel with its settings.
"""

import collections
import errno
import functools
import os
import re
import signal
import time
from typing import NamedTuple

VARIABLE = "DIST_PROXYGML_FAULT"
POINTS = (
    "start.join",
    "start.engine",
    "save.begin",
    "save.engine",
    "save.bank",
    "save.files",
    "save.manifest",
    "save.publish",
    "save.published",
    "save.latest",
    "save.forget",
    "step.begin",
    "step.loss",
    "step.update",
    "evaluate.batch",
    "evaluate.search",
    "embed.batch",
)
_ACTIONS = r"kill9|raise|enospc|stop|nan|signal=(?:TERM|USR1|USR2|INT)|sleep=[0-9.]+"


class Fault(NamedTuple):
    """One thing that goes wrong."""

    point: str
    rank: int
    passage: int  # from 1: at which passage of the point
    action: str


def parse_faults(text: str) -> list[Fault]:
    """The faults that the variable describes.

    Raises:
        ValueError: no such point or action, or not POINT@RANK:PASSAGE:ACTION.
    """
    faults = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(rf"([\w.]+)@(\d+):(\d+):({_ACTIONS})", part.strip())
        if match is None or match[1] not in POINTS or match[3] == "0":
            raise ValueError(
                f"expected {VARIABLE}=POINT@RANK:PASSAGE:ACTION such as save.publish@1:3:kill9, got {part!r}; points: "
                f"{', '.join(POINTS)}; actions: kill9, raise, enospc, stop, nan, signal=TERM|USR1|USR2|INT, sleep=S"
            )
        faults.append(Fault(match[1], int(match[2]), int(match[3]), match[4]))
    return faults


_passages: collections.Counter[str] = collections.Counter()


@functools.cache
def own_faults() -> tuple[Fault, ...]:
    """Return the faults to inject into this process."""
    rank = int(os.environ.get("RANK", "0"))
    return tuple(fault for fault in parse_faults(os.environ.get(VARIABLE, "")) if fault.rank == rank)


def fault_point(point: str) -> bool:
    """Point at which this process may be made to fail.

    Returns:
        Whether the caller is to make its numbers NaN.

    Raises:
        OSError: the actions raise and enospc.
        ValueError: the variable says nothing that can be done.
    """
    faults = own_faults()
    if not faults:
        return False
    _passages[point] += 1
    actions = [f.action for f in faults if (f.point, f.passage) == (point, _passages[point])]
    return any([_do(action, point) for action in actions])


def _do(action: str, point: str) -> bool:
    name, _, value = action.partition("=")
    if name == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "signal":
        os.kill(os.getpid(), getattr(signal, f"SIG{value}"))
    elif name == "sleep":
        time.sleep(float(value))
    elif name == "raise":
        raise OSError(errno.EIO, f"injected at {point}")
    elif name == "enospc":
        raise OSError(errno.ENOSPC, f"injected at {point}")
    return name == "nan"
