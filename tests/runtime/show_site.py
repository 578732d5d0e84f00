"""Screenshots for docs/browser.md, or the speed and memory of a site.

python -m tests.runtime.show_site SITE [--speed GROUPS]. SITE is what `make web` builds, with its samples. The pictures
go to docs/; the numbers are printed.
"""

import argparse
import io
import os
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.runtime.browser import Visit, launched, serving

DOCS = Path(__file__).parents[2] / "docs"
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1100, "height": 860}},
    "dark": {"viewport": {"width": 1100, "height": 860}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 860}, "device_scale_factor": 1, "is_mobile": True},
}


def sample(visit: Visit, number: int) -> None:
    visit.page.locator("#samples button").nth(number).click()
    visit.wait("document.body.dataset.state === 'busy' || document.querySelector('.card') !== null")
    visit.ready("maps ready")


def shoot(browser: Any, url: str) -> None:
    for name, options in VIEWS.items():
        visit = Visit(browser, url, **options).started()
        sample(visit, 0)
        picture = Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB")
        picture.save(DOCS / f"browser_{name}.webp", quality=80, method=6)
        visit.context.close()


def renderer() -> tuple[float, float]:
    """Memory in MB and CPU time in seconds of the largest of the browser's pages."""
    found = [(0.0, 0.0)]
    for process in [path for path in Path("/proc").iterdir() if (path / "cmdline").exists()]:
        if process.name.isdigit() and b"--type=renderer" in (process / "cmdline").read_bytes():
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            pages = int((process / "statm").read_text().split()[1])
            found.append(
                (pages * os.sysconf("SC_PAGE_SIZE") / 1e6, sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"))
            )
    return max(found)


def measure(browser: Any, url: str, threads: int, groups: int) -> None:
    begin = time.monotonic()
    visit = Visit(browser, f"{url}?engine=wasm&threads={threads}").started()
    start = time.monotonic() - begin
    count = visit.page.locator("#samples button").count()
    times, memory = [], []
    for number in range(groups):
        before = renderer()[1]
        sample(visit, number % count)
        visit.wait("document.getElementById('engine').dataset.milliseconds !== undefined")
        size = visit.page.locator(".card").count()
        times.append(float(visit.page.locator("#engine").get_attribute("data-milliseconds")) / 1000)
        memory.append(round(renderer()[0]))
        cpu = (renderer()[1] - before) / size
        print(f"{threads} threads, {size} images: {times[-1]:.2f} s each, {cpu:.2f} s of CPU each", flush=True)
    median = statistics.median(times)
    print(f"{threads} threads: models loaded after {start:.1f} s; median {median:.2f} s an image; MB: {memory}")
    visit.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--speed", type=int, metavar="GROUPS", help="measure so many groups, by 1 and 2 threads")
    args = parser.parse_args()
    with sync_playwright() as started, serving(args.site) as url:
        browser = launched(started)
        if args.speed is None:
            shoot(browser, url)
        else:
            measure(browser, url, 1, args.speed)
            measure(browser, url, 2, args.speed)
        browser.close()


if __name__ == "__main__":
    main()
