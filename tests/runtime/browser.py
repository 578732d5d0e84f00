"""A site in a real browser: Debian's chromium, driven by Playwright. What is missing skips a test, with the reason."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.commands.web import server
from runtime.errors import DependencyError


def launched(start: Any) -> Any:
    """A browser of a started Playwright."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
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
