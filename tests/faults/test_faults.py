"""A bounded sample of the fault cases. All of them: `make faults`. A failure says how to repeat it."""

import faulthandler
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.faults.__main__ import KINDS, run_case
from tests.faults.lab import TIME_OUT, Lab
from tests.helpers import random_network, write_exports

SAMPLES = [kind for kind in KINDS.values() if kind.sample]


@pytest.fixture(scope="module")
def lab(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    @cache
    def other() -> Path:
        return write_exports(tmp_path_factory.mktemp("other"), random_network(1 / 32, seed=1))

    with Lab(exports, other, tmp_path_factory.mktemp("lab")) as lab:
        for folder in (lab.folder, *lab.folder.parents):  # for the cases that run without privileges
            if folder.stat().st_mode & 0o005 != 0o005:
                folder.chmod(0o755)
        yield lab


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.name)
def test_sample(lab: Lab, kind) -> None:
    failures = []
    for seed in range(kind.sample):
        faulthandler.dump_traceback_later(4 * TIME_OUT, exit=True, file=sys.__stderr__)  # a hang in native code
        try:
            failures.append(run_case(lab, kind, seed))
        finally:
            faulthandler.cancel_dump_traceback_later()
    found = [failure for failure in failures if failure is not None]
    assert not found, f"{len(found)} of {kind.sample} cases failed:\n" + "\n".join(found)
