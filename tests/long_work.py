"""Work that takes one rank longer than the others wait for each other, without taking any time."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from dist_proxygml.distributed import parallel

_NUM_SIGNS = 3


@contextlib.contextmanager
def lasting(*functions: tuple[ModuleType, str]) -> Iterator[None]:
    """Each of these functions of a module ends only when this rank has exchanged signs with the others while it worked;
    one that they wait for in silence fails.
    """
    gather, signs = parallel.gather_objects, threading.Semaphore(0)

    def counted(value: Any, *, group: Any) -> list[Any]:
        signs.release()
        return gather(value, group=group)

    def lengthened(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def work(*args: Any, **options: Any) -> Any:
            while signs.acquire(blocking=False):  # of before
                pass
            for _ in range(_NUM_SIGNS):
                assert signs.acquire(timeout=10), f"ranks wait in silence for {function.__name__}"
            return function(*args, **options)

        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "gather_objects", counted)
        patch.setattr(parallel, "_SECONDS_BETWEEN_SIGNS", 0.01)
        for module, name in functions:
            patch.setattr(module, name, lengthened(getattr(module, name)))
        yield
