"""What runs in the processes of `icnet batch`: an actor has one Predictor, and gets some groups at a time."""

import argparse
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from runtime.commands import outputs
from runtime.commands.batch_table import SCHEMA, Row, fetch, file_name, group_of
from runtime.commands.predict import Work, engine_of, open_predictor
from runtime.errors import ICNetError, InputError, one_line
from runtime.groups import check_names
from runtime.stream import Task

OK, FAILED = "ok", "failed"
UNUSABLE = "unusable"  # the status of all groups if an actor can't start
MAX_DEATHS = 2  # of processes that computed one group alone; a third is not risked


class Tally:
    """An actor that counts what was begun. It outlives the others, so it can tell a group that ends its process."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """Count a beginning; how many of the same there were before."""
        self._begun[what] += 1
        return self._begun[what] - 1


class GroupActor:
    """What Ray Data calls with some groups at a time.

    Args:
        args: the options of `icnet batch`; paths are absolute.
        detector: what makes missing SISMs, as `open_predictor` takes it.
        tally: a `Tally`.
        scratch: where temporary folders are made; None for the machine's own place.
    """

    def __init__(self, args: argparse.Namespace, detector: str | Path | None, tally: Any, scratch: str | None) -> None:
        self._args, self._tally, self._scratch = args, tally, scratch
        self._engine = engine_of(args.model)
        self._problem: ICNetError | None = None
        try:
            self._predictor = open_predictor(args, detector, banks_only=False)
            self._work = Work(args, self._predictor, outputs.chosen(args))
        except ICNetError as problem:
            self._problem = problem

    def __call__(self, call: pa.Table) -> pa.Table:
        """A row with the outcome of each group in `call`, whose columns are those of `Row`."""
        rows: list[Row] = call.to_pylist()
        if self._problem is not None:
            found = [self._outcome(row, UNUSABLE, self._problem) for row in rows]
        elif self._begins(f"call {rows[0]['group']}"):  # it ended a process: which of its groups did?
            found = [outcome for row in rows for outcome in self._alone(row)]
        else:
            found = self._outcomes(rows, self._args.resume)
        return pa.Table.from_pylist(found, SCHEMA)

    def _begins(self, what: str) -> int:
        before: int = ray.get(self._tally.begin.remote(what))
        return before

    def _alone(self, row: Row) -> list[dict[str, Any]]:
        if (deaths := self._begins(f"group {row['group']}")) >= MAX_DEATHS:
            error = InputError(f"{row['group']}: the process that computes it died {deaths} times")
            return [self._outcome(row, FAILED, error)]
        return self._outcomes([row], True)  # what an earlier process has finished is right

    def _outcomes(self, rows: Sequence[Row], resume: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        try:
            with tempfile.TemporaryDirectory(prefix="icnet-", dir=self._scratch) as scratch:
                found += self._run(rows, resume, Path(scratch))
        except Exception as error:  # no group stops the others, whatever is wrong with it
            if len(rows) > 1:
                return [outcome for row in rows for outcome in self._outcomes([row], True)]
            what = f"{rows[0]['group']}: {type(error).__name__}: {one_line(error)}"
            return [self._outcome(rows[0], FAILED, ICNetError(what))]
        return found

    def _run(self, rows: Sequence[Row], resume: bool, scratch: Path) -> Iterator[dict[str, Any]]:
        in_work: deque[tuple[Row, float]] = deque()
        finished: list[Row] = []

        def tasks() -> Iterator[Task[outputs.Fullness | None] | ICNetError]:
            for number, row in enumerate(rows):
                begun = time.monotonic()
                try:
                    group = self._fetched(row, scratch / str(number))
                    results = self._work.results(group)
                    if resume and results.finished():
                        finished.append(row)
                        continue
                    task = self._work.begin(group, results)
                except ICNetError as error:
                    in_work.append((row, begun))
                    yield error
                else:
                    in_work.append((row, begun))
                    yield task

        for outcome in self._predictor.pipeline.stream(tasks(), pack=self._args.pack):
            row, begun = in_work.popleft()
            error = outcome if isinstance(outcome, ICNetError) else None
            yield self._outcome(row, FAILED if error else OK, error, time.monotonic() - begun)
        yield from (self._outcome(row, OK) for row in finished)

    def _fetched(self, row: Row, folder: Path) -> Any:
        """The group of a row, with local files.

        Raises:
            InputError: one can't be read, or two have one name.
        """
        check_names(row["group"], [Path(file_name(image)) for image in row["images"]])
        names = Counter(file_name(sism) for sism in row["sisms"])
        if twice := [name for name, count in names.items() if count > 1]:
            raise InputError(f"{row['group']}: two SISMs are called {twice[0]}; rename one")
        places = [(source, folder / kind) for kind in ("images", "sisms") for source in row[kind]]  # type: ignore[literal-required]
        files = self._predictor.pipeline.workers.run([partial(fetch, *place) for place in places])
        return group_of(row, files[: len(row["images"])], files[len(row["images"]) :])

    def _outcome(
        self, row: Row, status: str, error: ICNetError | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        said = None if error is None else str(error)
        return {"group": row["group"], "status": status, "error": said, "seconds": seconds, "engine": self._engine}
