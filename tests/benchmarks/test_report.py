import json
from pathlib import Path

import pytest

from benchmarks.records import SCHEMA
from benchmarks.render import brief
from benchmarks.report import BLOCK, DOCUMENTS, RESULTS

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "CPU", "threads": 2, "date": "2026-01-01", "versions": {"python": "3.11", "torch": "2.13"}}


def test_the_tables_and_plots_of_the_documents_are_those_of_the_results(icnet, monkeypatch):
    """And no results on a CPU lie there that the documents do not show."""
    monkeypatch.chdir(ROOT)
    code, out, _ = icnet("bench", "report", "--check")
    assert (code, out) == (0, "")
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    shown = {match[2] for text in texts for match in BLOCK.finditer(text)}
    assert {path.stem for path in RESULTS.glob("*_cpu.json")} <= shown
    for text in texts:  # links to the plots lead from where the document lies
        document = DOCUMENTS[texts.index(text)]
        for match in BLOCK.finditer(text):
            for link in (line.split("](")[1][:-1] for line in match[0].splitlines() if line.startswith("![")):
                assert (document.parent / link).is_file()


@pytest.fixture
def latency_results():
    row = {"median_s": 0.2, "p90_s": 0.3, "p99_s": 0.3, "images_per_s": 5.0, "share_of_matrix_product": 0.9}
    row |= {"agrees": True, "mean_difference": 0.0}
    first = row | {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "peak_memory_bytes": 5e8}
    other = row | {"ratio": 2.25, "ratio_low": 2.0, "ratio_high": 2.5, "agrees": False}
    groups = [{"n": 5, "runners": {"paper": first, "ours": other}}]
    results = {"schema": SCHEMA, "kind": "latency", "machine": MACHINE, "interrupted": False, "first": "paper"}
    return results | {"not_run": {"x": "no x"}, "end_to_end": [], "groups": groups}


def test_a_document_that_differs_is_found_and_mended(icnet, tmp_path, latency_results):
    source = tmp_path / "results" / "latency_x.json"
    source.parent.mkdir(parents=True)
    source.write_text(json.dumps(latency_results))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- results: latency_x -->\nold\n<!-- end of results -->\nafter\n")
    report = ("bench", "report", page, "--results", source.parent)

    code, out, _ = icnet(*report, "--check")
    assert code == 1
    assert "page.md: differs from the results" in out
    assert "latency_x.png: differs from the results" in out
    assert "old" in page.read_text()
    assert icnet(*report)[0] == 0
    text = page.read_text()
    assert text.startswith(
        "before\n<!-- results: latency_x -->\nCPU, 2 threads; 2026-01-01; Python 3.11, torch 2.13.\n"
    )
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "](../results/latency_x.png)" in text
    assert "| ours | 2.25 [2.00, 2.50] (disagrees) |" in text
    heading, *rows = (line.split(" | ") for line in text.splitlines() if line.startswith("| "))
    memory = {row[1]: row[heading.index("MB")] for row in rows}
    assert memory == {"paper": "500", "ours": "–"}
    assert "GPU MB" not in text  # a column with nothing in it
    assert "- not run: x: no x" in text
    assert "interrupted" not in text
    assert "old" not in text
    assert icnet(*report, "--check")[0] == 0

    latency_results["groups"][0]["runners"]["ours"]["ratio"] = 123.45
    source.write_text(json.dumps(latency_results))
    assert icnet(*report, "--check")[0] == 1


def test_the_summary_of_a_comparison(icnet, tmp_path, latency_results):
    (tmp_path / "latency_x.json").write_text(json.dumps(latency_results))
    page = tmp_path / "README.md"
    page.write_text("<!-- results: latency_x summary -->\n<!-- end of results -->\n")
    assert icnet("bench", "report", page, "--results", tmp_path)[0] == 0
    text = page.read_text()
    assert "| runner | N = 5 |" in text
    assert "| ours | 200 (2.25×) disagrees |" in text
    assert "![" not in text
    assert not (tmp_path / "latency_x.png").exists()


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (None, "latency_x.json: can't be read as results"),
        ({"kind": "latency"}, f"latency_x.json: not results of schema {SCHEMA}"),
        ({"schema": SCHEMA, "kind": "speed"}, "no such kind of results; there are latency, "),
        ({"schema": SCHEMA, "kind": "latency"}, "latency_x.json: can't be read as results: KeyError: "),
    ],
)
def test_results_that_are_none_are_one_line(icnet, tmp_path, results, message):
    page = tmp_path / "page.md"
    page.write_text("<!-- results: latency_x -->\n<!-- end of results -->\n")
    if results is not None:
        (tmp_path / "latency_x.json").write_text(json.dumps(results))
    code, _, err = icnet("bench", "report", page, "--results", tmp_path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_reason_is_shown_without_the_librarys_trace():
    trace = (
        "RuntimeError: Exception from src/inference/src/cpp/core.cpp:132: Check 'newNode' failed at src/node.cpp:1626: "
        "Unsupported operation of type: Convolution name: node_conv2d_41 Details: Exception from src/conv.cpp:195: Not "
        "Implemented: Doesn't support dynamic weights shape Exception …"
    )
    found = brief(trace)
    assert found.startswith("RuntimeError: Unsupported operation of type: Convolution")
    assert found.endswith("Not Implemented: Doesn't support dynamic weights shape")
    assert ".cpp" not in found
    assert brief("not installed: pip install x") == "not installed: pip install x"
    assert len(brief("a " * 500)) <= 160
