"""How far a training is: a bar on a terminal, a line now and then elsewhere; and its learning rate."""

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 100  # written in all where there is no terminal
MEMORY = 0.98  # of the running means


def half_cosine(step: int, steps: int, warmup: float = 0.03) -> float:
    """Share of the highest learning rate: up in a straight line, then down to 0 along half a cosine."""
    rise = max(int(warmup * steps), 1)
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))


class Steps:
    """The progress of a training, with running means of what is measured."""

    def __init__(self, title: str, steps: int, done: int = 0) -> None:
        self._steps, self._done, self._title = steps, done, title
        self._means: dict[str, float] = {}
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(*columns, *left, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(title, total=steps, completed=done)

    def advance(self, **measured: float) -> None:
        """One step is done, and this was measured in it."""
        self._done += 1
        for name, value in measured.items():
            self._means[name] = MEMORY * self._means.get(name, value) + (1 - MEMORY) * value
        text = ", ".join(f"{name} {mean:.3f}" for name, mean in self._means.items())
        self._bar.update(self._task, completed=self._done, description=f"{self._title}: {text}")
        if not self._console.is_terminal and (self._done % max(self._steps // LINES, 1) == 0):
            print(f"{self._title}: step {self._done} of {self._steps}, {text}", flush=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()
