"""What a reader copies from README and pages runs word for word, each snippet in a folder of its own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib import pyplot as plt
from pages import markdown, page
from typer.testing import CliRunner

import modelsim as ms
from modelsim.__main__ import app

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "book").glob("*.[mi][dp]*"))]
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1 *$", re.M | re.S)

NOT_RUN = {
    r"^(make|conda) ": "makes an environment or the book",
    r"^dask |^from dask_|tcp://": "needs other machines",
    r"modelsim (train|distill)\b": "trains, for minutes or hours",
    r"\bms\.fit\(ms\.build\(": "trains six networks, for minutes",
    r"modelsim transfer [^\n]*\$": "attacks with many settings or many networks, for minutes or hours",
    r"imagefolder:": "needs ImageNet, and a GPU",
    r"for s in 1 2; do": "attacks twice and predicts all test images, for minutes",
    r"data/\w+/make\.py": "trains and attacks, for hours",
    r"bench_\w+\.py": "takes times, for ten minutes",
    r"modelsim plan --zoo imagenet69": "traces large networks, for minutes, or needs a GPU",
}
"""What in a snippet keeps it from being run, and why; all else is run."""


class Snippet(NamedTuple):
    source: str
    language: str
    text: str

    def __str__(self):
        return f"{self.source}: {self.text.splitlines()[0][:40]}"


def fences(text):
    """All fenced blocks but MyST's directives, as (language, text)."""
    found = [(language.strip(), body) for _, language, body in FENCE.findall(text)]
    return [(language, body) for language, body in found if not language.startswith("{")]


def reasons(text):
    return [why for pattern, why in NOT_RUN.items() if re.search(pattern, text, re.M)]


ALL = [
    Snippet(path.relative_to(ROOT).as_posix(), *found) for path in SOURCES for found in fences(markdown(path))
]
RUN = [snippet for snippet in ALL if not reasons(snippet.text)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ms.data_directory())
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


def run_python(snippet):
    """Alone if it imports the package, else after the imports, functions and constants of its page."""
    alone = "import modelsim" in snippet.text or not snippet.source.endswith(".ipynb")
    names = {} if alone else vars(page(Path(snippet.source).stem))
    exec(compile(snippet.text, str(snippet), "exec"), names)


def run_shell(text):
    lines = text.replace("\\\n", " ").splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    if re.search(r"[|&;<>$`*]", text) or any(c[:3] != ["python", "-m", "modelsim"] for c in commands):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(["bash", "-euc", text], check=True, env=os.environ | {"PATH": path})
        return
    for command in commands:  # in this process, which has imported everything
        result = CliRunner().invoke(app, command[3:])
        assert result.exit_code == 0, (command, result.output)


@pytest.mark.parametrize("snippet", RUN, ids=str)
def test_snippet_runs_word_for_word(snippet, folder):
    try:
        run_python(snippet) if snippet.language == "python" else run_shell(snippet.text)
    except ms.PublishedScoresUnavailable as error:
        pytest.skip(str(error))


def test_every_source_is_read_and_every_snippet_is_of_a_language_that_is_run():
    assert {path.suffix for path in SOURCES} == {".md", ".ipynb"}
    assert len(SOURCES) == 2 + len([*(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("*.ipynb")])
    assert {snippet.language for snippet in ALL} <= {"", "bash", "python"}
    assert {"README.md", "book/running.md", "book/one_pair.ipynb"} <= {s.source for s in RUN}


def test_every_reason_keeps_a_snippet_from_being_run():
    kept = [why for snippet in ALL for why in reasons(snippet.text)]
    assert {*kept} == {*NOT_RUN.values()}


def test_fences_are_told_from_directives_and_from_each_other():
    text = "```{glue:md} a\n:format: myst\n```\n\n```bash\nls\n```\n\nText.\n\n````\n```\n````\n"
    assert fences(text) == [("bash", "ls\n"), ("", "```\n")]


@pytest.mark.parametrize("text", ["python -m modelsim score nowhere", "false | cat; false", "pyton x"])
def test_snippet_that_fails_is_noticed(text, folder):
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        run_shell(text)
