"""The package not installed, used from another folder, at paths with spaces, with odd names and numbers."""

import importlib.metadata
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import tiny
import yaml

import modelsim as ms
from modelsim import distillation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def not_installed(monkeypatch):
    """No metadata of this package, as where it is only on the path."""
    find = importlib.metadata.distribution

    def distribution(name):
        if name == "modelsim":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "modelsim.__version__"}
    assert "version" not in project["project"]
    assert ms.__version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]


def test_studies_and_students_are_made_by_a_package_that_is_only_on_the_path(not_installed, tmp_path):
    study = tiny.transfer(tmp_path)
    settings = distillation._settings(distillation.Setting(), None, [])
    of_study = json.loads(study.attrs["versions"])["modelsim"]
    assert of_study == settings["version of modelsim"] == ms.__version__


def test_study_is_read_from_where_it_was_opened(tmp_path, monkeypatch):
    tiny.transfer(tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    study = ms.open_study("study")
    monkeypatch.chdir("/")
    assert study.perturbation.shape == (3, 12, 1, 8, 8)
    assert abs(study.perturbation.values).max() > 0


def test_study_is_found_from_every_folder_of_a_clone_and_the_nearest_wins(tmp_path, monkeypatch):
    clone, outside = tmp_path / "clone", tmp_path / "elsewhere"
    for folder in (clone / "book" / "deep", outside):
        folder.mkdir(parents=True)
    tiny.transfer(clone / "data" / "study")
    for folder in (clone, clone / "book", clone / "book" / "deep"):
        monkeypatch.chdir(folder)
        assert ms.open_study("data/study").sizes["source"] == 3
    del (zoo := tiny.zoo())[next(iter(zoo))]
    tiny.transfer(clone / "book" / "data" / "study", zoo=zoo)
    assert ms.open_study("data/study").sizes["source"] == 2
    monkeypatch.chdir(outside)
    with pytest.raises(FileNotFoundError, match=r"elsewhere nor from a folder above it: give the path"):
        ms.open_study("data/study")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(zoo={"": tiny.linear(0)}), ValueError, "names of models must not be empty, got ''"),
        (dict(zoo={3: tiny.linear(0)}), TypeError, "names of models must be strings, got 3"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(batch_size=2.0), TypeError, "batch_size must be a whole number, got 2.0"),
        (dict(workers=0), ValueError, "workers must be at least 1, got 0"),
        (dict(workers=1.5), TypeError, "workers must be a whole number, got 1.5"),
        (dict(attack=partial(tiny.attack, eps=math.nan)), ValueError, "eps=nan"),
        (dict(attack=partial(tiny.attack, eps=math.inf)), ValueError, "eps=inf"),
    ],
)
def test_study_of_odd_names_or_numbers_is_refused_before_anything_is_written(
    changed, error, message, tmp_path
):
    with pytest.raises(error, match=message):
        tiny.transfer(tmp_path / "study", **changed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "error"), [("", ValueError), (7, TypeError)])
def test_classifier_of_an_odd_name_is_not_compared(name, error, tmp_path, images, zoo):
    study = tiny.transfer(tmp_path)
    with pytest.raises(error, match=f"names of models .* got {name!r}"):
        ms.compare(tiny.linear(0), study, name=name, images=images, zoo=zoo, attack=tiny.attack)


def test_command_that_makes_an_absent_study_can_be_pasted_where_the_path_has_a_space(tmp_path):
    with pytest.raises(FileNotFoundError, match="no study at") as caught:
        ms.open_study(tmp_path / "a b")
    command = shlex.split(str(caught.value).split("`")[1])
    assert command[-2:] == ["--out", str(tmp_path / "a b")]


@pytest.fixture
def spaced(tmp_path):
    """A copy of what make reads and a program in place of Python, both at paths with a space.

    The program notes how it was called; asked for a virtual environment, it copies itself there.
    """
    if shutil.which("make") is None or os.name == "nt":
        pytest.skip("there is no make")
    folder = tmp_path / "a b"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    script = f"""#!{sys.executable}
import shutil, sys
from pathlib import Path
with open({str(folder / "calls")!r}, "a") as calls:
    print(sys.argv[0], *sys.argv[1:3], file=calls)
if sys.argv[1:3] == ["-m", "venv"]:
    Path(sys.argv[3], "bin").mkdir(parents=True)
    shutil.copy(sys.argv[0], Path(sys.argv[3], "bin", "python"))
"""
    (folder / "my python").write_text(script)
    (folder / "my python").chmod(0o755)
    return folder


def make(folder, *arguments):
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return calls


CHECKS = ["ruff", "ruff", "mypy", "pytest"]


def test_make_uses_a_python_whose_path_has_a_space(spaced):
    python = spaced / "my python"
    assert make(spaced, "test", f"PYTHON={python}", "VENV=") == [f"{python} -m {what}" for what in CHECKS]
    assert make(spaced, "bench", f"PYTHON={python}", "VENV=") == [f"{python} tests/bench_attacks.py"]


@pytest.mark.parametrize("environment", ["my venv", "{folder}/my venv", ".venv"])
def test_make_makes_an_environment_at_a_path_with_a_space_once(spaced, environment):
    python, environment = spaced / "my python", environment.format(folder=spaced)
    calls = make(spaced, "test", f"PYTHON={python}", f"VENV={environment}")
    checks = [f"{environment}/bin/python -m {what}" for what in CHECKS]
    assert f"{python} -m venv" in calls
    assert calls[-4:] == checks
    assert make(spaced, "test", f"PYTHON={python}", f"VENV={environment}") == checks


def test_book_lists_its_fonts_where_no_home_is_needed(spaced):
    python = spaced / "my python"
    noting = python.read_text().replace("print(sys.argv[0]", 'import os; print(os.environ["MPLCONFIGDIR"]')
    python.write_text(noting)
    calls = make(spaced, "book", f"PYTHON={python}", "VENV=")
    assert {call.partition(" -c")[0].partition(" tests")[0] for call in calls} == {
        f"{spaced}/book/_build/matplotlib"
    }
