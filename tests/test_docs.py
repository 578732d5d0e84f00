"""README and the pages, where a machine can check them: links, command lines, Python blocks, figures."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import icnet_cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs", "weights", "tests/data/bird", "tests/data/pasted")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
COMMAND_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(icnet [^`]+|--[a-z][^`]*)`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of a command line's command, and the words that follow the command."""
    command = next((c for c in (" ".join(words[:2]), words[0]) if c in icnet_cli.COMMANDS), None)
    assert command is not None, f"no command {words[:2]}"
    return make_parser(command), words[len(command.split()) :]


@cache
def make_parser(command: str) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise AssertionError(message)

    parser = Parser(prog=f"icnet {command}", allow_abbrev=False)
    importlib.import_module(icnet_cli.COMMANDS[command][0]).add_arguments(parser)
    return parser


@cache
def all_options() -> frozenset[str]:
    """Every option of every command, and those of Python's, pip's and others' commands that pages may name."""
    options = {o for command in icnet_cli.COMMANDS for a in make_parser(command)._actions for o in a.option_strings}
    triton = {
        "--exit-timeout-secs",
        "--http-address",
        "--grpc-address",
        "--metrics-address",
        "--model-control-mode",
    }
    return frozenset(options | triton | {"--help", "--version", "--weightQuantBits", "--speed"})


def command_lines(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = [body.replace("\\\n", " ") for language, body in BLOCK.findall(text) if not language]
    lines = [line.strip().removeprefix(".venv/bin/") for body in blocks for line in body.splitlines()]
    return [line for line in lines if line.startswith("icnet ")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = Path(os.path.normpath(page.parent / file)) if file else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_linked() -> None:
    """No page of docs/ is out of README's reach."""
    linked = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= linked


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=name)
def test_command_lines_parse(page: Path) -> None:
    for line in command_lines(page):
        parser, words = parser_of(shlex.split(line, comments=True)[1:])
        try:
            parser.parse_args(words)
        except AssertionError as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=name)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    for code in INLINE.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        words = code.split()
        known = all_options()
        if words[0] == "icnet":
            if words[1] in ("--version", "--help") or words[1].isupper():
                continue
            if words[1:] not in ([family] for family in {c.split()[0] for c in icnet_cli.COMMANDS if " " in c}):
                known = frozenset(o for a in parser_of(words[1:])[0]._actions for o in a.option_strings)
        for word in words:
            option = word.rstrip(",.;:").split("=")[0]
            assert not option.startswith("--") or option in known, code


def test_make_targets_in_the_text_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.+)", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) <= targets
    named = {target for page in PAGES for target in re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8"))}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert language in ("", "python", "mermaid"), language
        if language == "python":
            for node in ast.walk(ast.parse(body)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_files_and_names_that_architecture_gives_exist() -> None:
    """Every file is there; a name beside a file is in it: `FILE`, `NAME` or `FILE`: `NAME` or `NAME` (`FILE`)."""
    text = BLOCK.sub("", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    files = set(re.findall(r"`(\w+/[\w/]+\.py)`", text))
    missing = {file for file in files if not (ROOT / file).is_file()}
    assert files
    assert not missing
    named = re.findall(r"`(\w+/[\w/]+\.py)`(?:, |: )`([\w.]+)`(?!:)", text)
    named += [(file, name) for name, file in re.findall(r"`([\w.]+)` \(`([\w/]+\.py)`\)", text)]
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert name.endswith(".py") or re.search(rf"(def|class) {part}\b|^{part}\b", source, re.MULTILINE), name


@pytest.mark.parametrize(
    ("page", "results", "rows"),
    [
        ("docs/evaluate.md", "heldout", {"SISMs": 0, "demo checkpoint, FP32": 1, "demo checkpoint, FP16": 2}),
        ("weights/README.md", "heldout", {"SISMs": 0, "demo checkpoint, FP32": 1, "demo checkpoint, FP16": 2}),
        ("docs/int8.md", "int8", {"FP32": 1, "FP16": 2, "INT8, `minmax`": 3, "INT8, `percentile`": 4}),
        ("docs/int8.md", "int8", {"INT8, `entropy` (default)": 5}),
    ],
)
def test_scores_are_those_of_the_results(page: str, results: str, rows: dict[str, int]) -> None:
    """A row S, max F, max E, MAE is that of the n-th maps in weights/RESULTS.json."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (dataset,) = json.loads((ROOT / f"weights/{results}.json").read_text())["datasets"]
    for label, n in rows.items():
        scores = " | ".join(f"{dataset['maps'][n][key]:.3f}" for key in ("s", "max_f", "max_e", "mae"))
        assert f"| {label} | {scores} |" in text
