import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if re.match(r"\w", line)
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
CONDA_PINS = [
    line for part in CONDA if isinstance(part, dict) for line in part["pip"] if not line.startswith("-")
]


def supported(python):
    return SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.1")


def locked(**environment):
    """Pins by name in an environment; without details, in this one."""
    chosen = [
        line for line in LOCK if not line.marker or line.marker.evaluate(default_environment() | environment)
    ]
    pins = {canonicalize_name(line.name): str(line.specifier) for line in chosen}
    assert len(pins) == len(chosen)
    return pins


def direct_dependencies(*extras):
    """What a user asks for, with some of the extras."""
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("requirement", LOCK, ids=str)
def test_lock_pins_one_exact_version(requirement):
    assert re.fullmatch(r"==[\w.+!-]+", str(requirement.specifier))


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", [p for p in ("3.11", "3.12", "3.13", "3.14") if supported(p)])
def test_lock_satisfies_every_direct_dependency_on(platform, python):
    pins = locked(python_version=python, python_full_version=f"{python}.1", sys_platform=platform)
    for requirement in direct_dependencies(*PROJECT["optional-dependencies"]):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.removeprefix("==")), requirement


def test_every_conda_pin_is_that_of_the_lock():
    (python,) = (line.partition("=")[2] for line in CONDA if str(line).startswith("python="))
    pins = locked(python_version=python, python_full_version=f"{python}.1", sys_platform="linux")
    for requirement in map(Requirement, CONDA_PINS):
        assert pins[canonicalize_name(requirement.name)] == str(requirement.specifier), requirement.name


def test_conda_environment_lists_every_direct_dependency():
    listed = {canonicalize_name(Requirement(line).name) for line in CONDA_PINS}
    assert {canonicalize_name(r.name) for r in direct_dependencies("book", "test")} <= listed


@pytest.mark.parametrize("name", [requirement.name for requirement in direct_dependencies("book", "test")])
def test_pip_without_our_overrides_can_install(name):
    """Only the extra `bench`, which pip alone refuses, may ask for what the others can't bear."""
    pins = locked(extra="")
    for requirement in map(Requirement, requires(name) or []):
        applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
        if applies and (pin := pins.get(canonicalize_name(requirement.name))):
            assert requirement.specifier.contains(pin.removeprefix("==")), requirement


def test_python_of_the_conda_environment_is_supported():
    (python,) = (line.partition("=")[2] for line in CONDA if str(line).startswith("python="))
    assert supported(python)


@pytest.mark.skipif(
    not (Path(sys.prefix) / ".ready").exists(),
    reason="only the environment that make builds follows the lock",
)
def test_installed_versions_are_those_of_the_lock():
    differing = {}
    for name, pin in locked().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        if f"=={installed}" != pin:
            differing[name] = (installed, pin)
    assert differing == {}
