"""Types of command line options that several commands share."""

import argparse
from collections.abc import Callable


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
