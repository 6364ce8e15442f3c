"""Progress of an evaluation: given to whoever follows it, else a bar of its own after five seconds.

In a terminal the bar moves twice a second; in a file it is a line every 15 seconds.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

Follower = Callable[[str, int, int], object]
"""Takes what is being done, how many are done, and of how many."""


@contextlib.contextmanager
def progress(
    what: str, total: int, *, unit: str, is_shown: bool, follower: Follower | None = None
) -> Iterator[Callable[[int], object]]:
    """Yield a function that takes the number of those just done. `is_shown` is for one rank."""
    if follower is None:
        pace = 0.5 if sys.stderr.isatty() else 15.0
        with tqdm(
            total=total, desc=what, unit=unit, delay=5.0, mininterval=pace, disable=not is_shown, leave=False
        ) as bar:
            yield bar.update
        return
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        follower(what, done, total)

    advance(0)
    yield advance
