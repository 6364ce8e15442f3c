"""Types of command line options that several commands share."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from dist_proxygml.storage.files import in_words


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `lowest` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}, got {text!r}")
        return number

    return parse


def share(text: str) -> float:
    """The type of an option that is a share of something: above 0 and at most 1."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return number


def cosine(text: str) -> float:
    """The type of an option that is a score of unit rows."""
    number = _number(text)
    if not -1 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from -1 to 1, got {text!r}")
    return number


def _number(text: str) -> float:
    """NaN for what is none, which no range holds."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command line and end the process with its status."""
    outlive_readers()
    sys.exit(main())


def refuse(error: Exception) -> int:
    """Print a user's mistake; returns the exit status for it."""
    print(f"error: {in_words(error)}", file=sys.stderr)
    return 2


def outlive_readers() -> None:
    """From now on what is printed goes nowhere once nobody reads it, as in `search ... | head`: a command comes to its
    end, with its status, and what it was to write is there.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = io.BufferedWriter(_UnreadOutput(stream.fileno(), "wb", closefd=False))
            options: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, **options))


class _UnreadOutput(io.FileIO):
    """A file that becomes /dev/null when its reader goes."""

    def write(self, data: Any) -> int:
        """Write, or seem to."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
