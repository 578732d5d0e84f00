"""A site in a real browser: chromium, Debian's or Playwright's. Where it is missing, tests are skipped with the reason.

In CI its absence is a failure.
"""

import io
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.commands.web import npm_package, server
from runtime.errors import DependencyError

AXE = "axe-core@4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"


def launched(start: Any) -> Any:
    """A browser of a started Playwright."""
    chromium = shutil.which("chromium") or start.chromium.executable_path
    if not Path(chromium).exists():
        missing = pytest.fail if "GITHUB_ACTIONS" in os.environ else pytest.skip
        missing("there is no chromium: apt-get install chromium, or playwright install chromium")
    return start.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a site."""
    with server(folder, 0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/"
        finally:
            running.shutdown()
            thread.join()


def serious(visit: "Visit") -> list[str]:
    """What axe-core finds serious or critical in light or dark colours."""
    package = or_skip(lambda: npm_package(*AXE))
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        axe = script.read().decode()
    visit.page.evaluate(axe)
    problems = []
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)
        found = visit.page.evaluate("axe.run()")
        problems += [v["id"] for v in found["violations"] if v["impact"] in ("serious", "critical")]
        assert len(found["passes"]) > 20
    return problems


def or_skip(get: Callable[[], Any]) -> Any:
    """What `get` returns; skip where something is not installed."""
    try:
        return get()
    except DependencyError as error:
        pytest.skip(str(error))


class Visit:
    """A page with a site open in it. Whatever it asks the network for, and all that its console shows, is noted."""

    def __init__(self, browser: Any, url: str, before: str = "", **options: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.set_default_timeout(120_000)
        if before:
            self.page.add_init_script(before)
        self.page.goto(url)

    def wait(self, condition: str, seconds: float = 120) -> None:
        """Wait until an expression is true. Playwright's own way needs eval, which the site's policy bars."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            if time.monotonic() > end:
                pytest.fail(f"{condition}: not in {seconds} s; {self.status}; {self.messages}; {self.problems}")
            self.page.wait_for_timeout(50)

    def ready(self, text: str) -> None:
        """Wait until the status has this text."""
        self.wait(f"document.getElementById('status').textContent.includes({text!r})")

    def started(self) -> "Visit":
        """Wait until the models are loaded."""
        self.wait("document.getElementById('engine').textContent !== ''")
        return self

    def choose(self, images: list[Any], sisms: list[Any] = ()) -> None:  # type: ignore[assignment]
        """Give it files, and wait for all maps. SISMs come first, so that nothing is computed twice."""
        if sisms:
            self.page.set_input_files("#sisms", sisms)
            self.wait(f"document.getElementById('messages').children.length >= {len(sisms)}")
        self.page.set_input_files("#images", images)
        self.idle(len(images))

    def idle(self, seen: int) -> None:
        """Wait until `seen` photographs are mapped, or refused with a message."""
        count = "document.querySelectorAll('.card').length + document.getElementById('messages').children.length"
        self.wait(f"{count} >= {seen} && document.body.dataset.state !== 'busy'")

    def clear(self) -> None:
        """Take everything out of the page, as after loading it."""
        self.page.evaluate("document.getElementById('clear').click()")
        self.page.evaluate("document.getElementById('messages').replaceChildren()")
        self.page.locator("#threshold").evaluate("slider => { slider.value = 128 }")
        self.ready("Choose photographs")

    @property
    def messages(self) -> list[str]:
        return self.page.locator("#messages p").all_inner_texts()

    @property
    def status(self) -> str:
        text: str = self.page.inner_text("#status")
        return text

    def download(self, selector: str) -> Path:
        """Click, and take the file that comes."""
        with self.page.expect_download() as coming:
            self.page.click(selector)
        return Path(coming.value.path())
