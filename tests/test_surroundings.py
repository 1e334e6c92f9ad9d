"""The package not installed, and the Makefile at paths with spaces."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
import yaml

import modelsim as ms
from modelsim import distillation

ROOT = Path(__file__).resolve().parents[1]


def test_there_is_one_version_also_where_the_package_is_only_on_the_path(tmp_path, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "modelsim.__version__"}
    assert "version" not in project["project"]
    assert ms.__version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    find = importlib.metadata.distribution

    def distribution(name):
        if name == "modelsim":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    of_study = json.loads(tiny.transfer(tmp_path).attrs["versions"])["modelsim"]
    of_students = distillation._settings(distillation.Setting(), None, [])["version of modelsim"]
    assert of_study == of_students == ms.__version__


NOTING = """#!{python}
import os, shutil, sys
from pathlib import Path
with open({calls!r}, "a") as calls:
    print(sys.argv[0], *sys.argv[1:3], os.environ.get("MPLCONFIGDIR", ""), file=calls)
if sys.argv[1:3] == ["-m", "venv"]:
    Path(sys.argv[3], "bin").mkdir(parents=True)
    shutil.copy(sys.argv[0], Path(sys.argv[3], "bin", "python"))
"""
"""In place of Python: notes how it was called; asked for a virtual environment, it copies itself there."""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Run make in a copy of what it reads, at a path with a space; return `folder, run`."""
    if shutil.which("make") is None or os.name == "nt":
        pytest.skip("there is no make")
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    folder = tmp_path / "a b"
    folder.mkdir()
    python, noted = folder / "my python", folder / "calls"
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    python.write_text(NOTING.format(python=sys.executable, calls=str(noted)))
    python.chmod(0o755)

    def run(target, venv):
        given = ["make", target, f"PYTHON={python}", f"VENV={venv}"]
        done = subprocess.run(given, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        calls = noted.read_text().splitlines()
        noted.unlink()
        return [call.strip() for call in calls]

    return folder, run


@pytest.mark.parametrize("venv", ["", "{folder}/my venv", ".venv"])
def test_make_uses_a_python_and_makes_once_an_environment_at_paths_with_a_space(venv, make):
    folder, run = make
    given, venv = folder / "my python", venv.format(folder=folder)
    python = f"{venv}/bin/python" if venv else str(given)
    checks = [f"{python} -m {what}" for what in ("ruff", "ruff", "mypy", "pytest")]
    calls = run("test", venv)
    assert calls[-4:] == checks
    assert (f"{given} -m venv" in calls) == bool(venv)
    assert run("test", venv) == checks
    assert run("bench", venv) == [f"{python} tests/bench_attacks.py"]
    of_book = run("book", venv)
    assert len(of_book) == 4
    # Fonts are listed where no home is needed.
    assert all(call.startswith(python) and call.endswith("book/_build/matplotlib") for call in of_book)
