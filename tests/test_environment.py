import re
import sys
import tomllib
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = [Requirement(s) for s in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"\w", s)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
(CONDA_PYTHON,) = (line.partition("=")[2] for line in CONDA if str(line).startswith("python="))
SUPPORTED = SpecifierSet(PROJECT["requires-python"])
PYTHONS = [python for python in ("3.11", "3.12", "3.13", "3.14") if SUPPORTED.contains(f"{python}.1")]


def locked(python=None, platform="linux", **details):
    """Pins by name for a Python on a platform; without them, in this environment."""
    named = dict(python_version=python, python_full_version=f"{python}.1", sys_platform=platform)
    environment = default_environment() | (named if python else details)
    chosen = [line for line in LOCK if not line.marker or line.marker.evaluate(environment)]
    pins = {canonicalize_name(line.name): str(line.specifier) for line in chosen}
    assert len(pins) == len(chosen)
    return pins


def satisfies(requirement, pins):
    return requirement.specifier.contains(pins[canonicalize_name(requirement.name)].removeprefix("=="))


def direct_dependencies(*extras):
    """What a user asks for, with some of the extras."""
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_one_exact_version_that_satisfies_every_direct_dependency_on(platform, python):
    assert [line for line in LOCK if not re.fullmatch(r"==[\w.+!-]+", str(line.specifier))] == []
    pins, asked = (
        locked(python, platform),
        direct_dependencies(*PROJECT["optional-dependencies"].keys() - {"gpu"}),
    )
    assert [requirement for requirement in asked if not satisfies(requirement, pins)] == []


def test_conda_environment_lists_every_direct_dependency_with_the_pin_of_the_lock():
    assert CONDA_PYTHON in PYTHONS
    (pip,) = (part["pip"] for part in CONDA if isinstance(part, dict))
    pinned = [Requirement(line) for line in pip if not line.startswith("-")]
    listed = {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in pinned}
    assert listed.items() <= locked(CONDA_PYTHON).items()
    assert {canonicalize_name(r.name) for r in direct_dependencies("book", "test")} <= set(listed)


@pytest.mark.parametrize("name", [requirement.name for requirement in direct_dependencies("book", "test")])
def test_pip_without_our_overrides_can_install(name):
    """Only the extra `bench`, which pip alone refuses, may ask for what the others can't bear."""
    pins = locked(extra="")
    for requirement in map(Requirement, requires(name) or []):
        applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(requirement.name) in pins:
            assert satisfies(requirement, pins), requirement


@pytest.mark.skipif(
    not (Path(sys.prefix) / ".ready").exists(),
    reason="only the environment that make builds follows the lock",
)
def test_installed_versions_are_those_of_the_lock():
    installed = {canonicalize_name(one.name): f"=={one.version}" for one in distributions()}
    assert [pin for pin in locked().items() if pin not in installed.items()] == []
