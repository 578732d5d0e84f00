"""Screenshots for docs/browser.md, or the speed and memory of a site.

python -m tests.runtime.show_site SITE [--speed GROUPS | --report PAGE]. SITE is what `make web` builds, with its
samples; PAGE is a report of `icnet predict`. The pictures go to docs/. The numbers are printed as JSON: seconds and
memory with WebAssembly on one thread, and on all cores.
"""

import argparse
import io
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.machine import header
from runtime.commands.web import ORT
from tests.runtime.browser import Visit, launched, serving

DOCS = Path(__file__).parents[2] / "docs"
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1100, "height": 860}},
    "dark": {"viewport": {"width": 1100, "height": 860}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 860}, "device_scale_factor": 1, "is_mobile": True},
}
MAPPED = "document.querySelectorAll('[data-kind=map]:enabled').length"  # new cards have none


def sample(visit: Visit, number: int) -> float:
    """Map a sample group; the seconds until its first map."""
    begin = time.monotonic()
    visit.page.locator("#samples button").nth(number).click()
    visit.wait(f"{MAPPED} > 0")
    first = time.monotonic() - begin
    visit.wait(f"{MAPPED} === document.querySelectorAll('.card').length && document.body.dataset.state === 'idle'")
    return first


def shoot(browser: Any, url: str) -> None:
    for name, options in VIEWS.items():
        visit = Visit(browser, url, **options).started()
        sample(visit, 0)
        if name == "phone":
            visit.page.evaluate("document.getElementById('tools').scrollIntoView()")
        keep(visit, f"browser_{name}.webp")


def keep(visit: Visit, name: str) -> None:
    """Save a picture of what is in sight."""
    picture = Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB")
    picture.save(DOCS / name, quality=80, method=6)
    visit.context.close()


def renderer() -> tuple[float, float]:
    """Memory in MB and CPU time in seconds of the largest of the browser's pages."""
    found = [(0.0, 0.0)]
    for process in [path for path in Path("/proc").iterdir() if path.name.isdigit()]:
        try:
            if b"--type=renderer" not in (process / "cmdline").read_bytes():
                continue
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            pages = int((process / "statm").read_text().split()[1])
        except OSError:  # it has ended
            continue
        cpu = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        found.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, cpu))
    return max(found)


def measure(browser: Any, url: str, threads: int, groups: int) -> dict[str, Any]:
    """Map sample groups in one tab, one after the other."""
    begin = time.monotonic()
    visit = Visit(browser, f"{url}?engine=wasm&threads={threads}").started()
    loaded = time.monotonic() - begin
    samples = visit.page.locator("#samples button").count()
    first, images, seconds, network, cpu, memory = 0.0, [], [], [], [], []
    for number in range(groups):
        begin, before = time.monotonic(), renderer()[1]
        to_map = sample(visit, number % samples)
        whole = time.monotonic() - begin
        first = first or loaded + to_map
        images.append(visit.page.locator(".card").count())
        seconds.append(whole / images[-1])
        network.append(float(visit.page.locator("#engine").get_attribute("data-milliseconds")) / 1000)
        memory.append(round(renderer()[0]))
        cpu.append((renderer()[1] - before) / images[-1])
    assert visit.problems == []
    engine = visit.page.inner_text("#engine")
    visit.context.close()
    return {
        "engine": engine.partition(".")[0],
        "seconds_to_load": round(loaded, 2),
        "seconds_to_first_map": round(first, 2),  # from opening the page, nothing cached
        "images_per_second": round(1 / statistics.median(seconds), 3),  # with reading and the detector
        "seconds_per_image": round(statistics.median(seconds), 3),
        "network_seconds_per_image": round(statistics.median(network), 3),
        "cpu_seconds_per_image": round(statistics.median(cpu), 3),
        "images": images,
        "memory_mb": memory,  # of the page's process after each group
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--speed", type=int, metavar="GROUPS", help="measure so many groups, by 1 thread and by all")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="take a picture of this report only")
    args = parser.parse_args()
    with sync_playwright() as started, serving(args.site) as url:
        browser = launched(started)
        if args.report is not None:
            visit = Visit(browser, args.report.absolute().as_uri(), viewport={"width": 1100, "height": 640})
            visit.wait("document.body.dataset.level === '128'")
            keep(visit, "report.webp")
        elif args.speed is None:
            shoot(browser, url)
        else:
            cores = os.cpu_count() or 1
            machine = header("latency", cores)["machine"]
            size = sum(file.stat().st_size for file in args.site.rglob("*") if file.is_file())
            runs = [measure(browser, url, threads, args.speed) for threads in sorted({1, cores})]
            found = {"cpu": machine["cpu"], "cores": cores, "chromium": browser.version, "package": ORT}
            print(json.dumps(found | {"site_mb": round(size / 1e6, 1), "runs": runs}, indent=1))
        browser.close()


if __name__ == "__main__":
    main()
