"""Types of options: numbers in a range, for `argparse`."""

import argparse
import math
from collections.abc import Callable


def number(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes whole numbers in a range."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            span = f"from {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {span}, got {text!r}")
        return value

    return whole_number


def share(text: str) -> float:
    """The type of an option that takes a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def positive(text: str) -> float:
    """The type of an option that takes a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
