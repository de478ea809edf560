"""The documentation does what it says: every command and python block of every page is run.

In order, in a folder of its own for each page, on the shipped models:

    ```bash                    commands
    ```python                  code; the blocks of a page share their names
    ```yaml title="own.yaml"   a file, written before what follows it
    ```text title="prints"     what the block above prints; `...` stands for anything

Other blocks are only read. `<!-- not run: REASON -->` above a block leaves it out; the reasons are
few. A `prints` that begins as an error line does belongs to a command that ends with exit code 2.
"""

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lorax_gen import cli
from lorax_gen.documents import read_json

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
RUN = ("bash", "python")
REASONS = (
    "installs", "needs the hub", "needs a bucket", "needs a GPU", "needs a TPU",
    "needs several hosts", "needs torch", "needs libtpu", "needs SmolLM2",
    "takes minutes", "takes hours",
)  # fmt: skip
# Commands run as they are written, but for the sizes that the test adds.
SMALLER = {
    "demo": {"--questions": "1"},
    "demo tasks": {"--questions": "1", "--steps": "2"},
    "evaluate": {"--questions": "1"},
    "train": {"--run.steps": "2", "--data.families": "clock"},
    "train own-tasks": {"--run.steps": "2"},
}


class Block(NamedTuple):
    language: str
    title: str
    text: str
    line: int
    not_run: str | None

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.title and self.not_run is None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    pattern = (
        r"(?:^<!-- not run: *(?P<why>[^\n]*?) *-->\n\s*?)?"
        r'^```(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?\n(?P<text>.*?)^```$'
    )
    return [
        Block(
            found["language"],
            found["title"] or "",
            found["text"],
            text.count("\n", 0, found.start("text")) + 1,
            found["why"],
        )
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


# --- running -------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_command(line: str) -> int:
    """Ours in this process, for it has compiled much already; the exit code."""
    words = shlex.split(line, comments=True)
    if words[0] != "lorax-gen" or any(re.search("[|<>&;$]", word) for word in words):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-c", line], env=env, capture_output=True, text=True, timeout=120
        )
        print(done.stdout + done.stderr, end="")
        return done.returncode
    words = words[1:]
    given = {word.partition("=")[0] for word in words}
    own = words[0] == "train" and Path(words[1]).is_file()  # its sizes are in the file
    sizes = SMALLER.get(" ".join(words[:2])) or SMALLER.get(words[0], {})
    for option, size in sizes.items():
        words += [] if own or option in given else [option, size]
    try:
        cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run_block(block: Block, page: str, names: dict, expected: str) -> str:
    """Runs a block and returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if block.language == "python":
            # As many lines down as the block stands, so that a traceback names the page's line.
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            return printed.getvalue()
        for line in commands(block.text):
            code = run_command(line)
            wanted = 2 if expected.startswith("lorax-gen: error: ") else 0
            assert code == wanted, f"{page}, {line}: exit code {code}\n{printed.getvalue()}"
    return printed.getvalue()


def same_text(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, but for white space and what `...` hides."""

    def tidy(text: str) -> str:
        return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())

    parts = map(re.escape, tidy(shown).split("..."))
    return re.fullmatch(".*?".join(parts), tidy(printed), re.DOTALL) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, names = blocks(page.read_text()), {"__name__": page.stem}
    for i, block in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        if block.title and block.title != "prints":
            file = Path(block.title)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.runs:
            shown = after.text if after is not None and after.title == "prints" else ""
            printed = run_block(block, page.name, names, shown)
            if shown:
                assert same_text(shown, printed), (
                    f"{page.name}, line {block.line} prints\n{printed}"
                )


# --- reading -------------------------------------------------------------------------------------


def test_what_is_not_run_says_why_and_is_less_than_what_is():
    found = [block for page in PAGES for block in blocks(page.read_text())]
    left_out = [block for block in found if block.not_run is not None]
    for block in left_out:
        assert block.not_run.startswith(REASONS) and block.language in RUN, block
    assert len(left_out) < sum(block.runs for block in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_or_marker_is_overlooked(page):
    text, found = page.read_text(), blocks(page.read_text())
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(found)
    markers = re.findall(r"^\s*<!--", text, re.MULTILINE)
    assert len(markers) == sum(block.not_run is not None for block in found)
    assert {block.language for block in found} <= {*RUN, "yaml", "json", "text"}
    for previous, block in itertools.pairwise([None, *found]):
        assert block.title != "prints" or previous.runs, block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs_and_without_traces_of_a_machine(path):
    cells = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream", "display_data", "execute_result",
    }  # fmt: skip
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert path.stat().st_size < 300_000
    assert str(Path.home()) not in path.read_text()


# --- the test itself -----------------------------------------------------------------------------


def test_blocks_are_found_with_their_titles_and_markers():
    text = (
        "# A page\n\n```bash\nls\n```\n\n<!-- not run: needs a TPU -->\n```python\nx\n```\n"
        '\n```yaml title="own.yaml"\nprompts: 8\n```\n'
    )
    first, second, third = blocks(text)
    assert first == ("bash", "", "ls\n", 4, None) and first.runs
    assert second == ("python", "", "x\n", 9, "needs a TPU") and not second.runs
    assert (third.title, third.text, third.not_run) == ("own.yaml", "prompts: 8\n", None)


@pytest.mark.parametrize(
    "shown, printed, same",
    [
        ("a\nb", "a  \nb\n", True),
        ("a\n...\nb", "a\nx\ny\nb", True),
        ("differs by ... of 2", "differs by 1.0e-5 of 2", True),
        ("a\nb", "a\nc", False),
        ("a", "a\nb", False),
        ("a.c", "abc", False),
    ],
)
def test_printed_text_is_compared_but_for_dots(shown, printed, same):
    assert same_text(shown, printed) is same


def test_a_command_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = Block("bash", "", "lorax-gen verify nothing.safetensors\n", 1, None)
    with pytest.raises(AssertionError, match="exit code 2"):
        run_block(block, "page", {}, "")
    assert "nothing.safetensors" in run_block(block, "page", {}, "lorax-gen: error: no such file")
