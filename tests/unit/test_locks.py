"""The lock files hold what requirements*.txt name, each with hashes, and say nothing of where it comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("requirements", "requirements-dev")

Pins = dict[str, str]


@pytest.mark.parametrize("name", NAMES)
def test_the_lock_has_every_pin_in_its_version(name: str) -> None:
    """Red: `make lock`."""
    assert _pins(ROOT / f"{name}.txt").items() <= _pins(ROOT / f"{name}.lock").items()


def test_the_image_gets_nothing_that_is_not_named() -> None:
    """The four packages need no others."""
    assert _pins(ROOT / "requirements.lock") == _pins(ROOT / "requirements.txt")


def test_tests_run_with_what_the_image_has() -> None:
    """Every package of the image's lock stands in the other one, down to its hashes."""
    everything = _requirements(ROOT / "requirements-dev.lock")
    assert set(_requirements(ROOT / "requirements.lock")) <= set(everything)


@pytest.mark.parametrize("name", NAMES)
def test_every_package_of_the_lock_has_hashes_and_no_address(name: str) -> None:
    """pip refuses a file in which one has none; an address would name a registry that others may not have."""
    text = (ROOT / f"{name}.lock").read_text()
    for requirement in _requirements(ROOT / f"{name}.lock"):
        pin, *hashes = requirement.split(" --hash=")
        assert re.fullmatch(r"[a-z0-9-]+==[\w.!+]+( ; .+)?", pin), pin
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), pin
    assert "://" not in text and not re.search(r"^\s*-(?!-hash)", text, re.M)


def _requirements(path: Path) -> list[str]:
    """Each requirement on one line, without comments."""
    lines = re.sub(r"\\\n\s*", "", path.read_text()).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _pins(path: Path) -> Pins:
    """Each package and its version, and those of the files that it includes."""
    pins: Pins = {}
    for requirement in _requirements(path):
        if requirement.startswith("-r "):
            pins |= _pins(path.with_name(requirement[3:]))
            continue
        package, version = requirement.partition(" ")[0].split("==")
        pins[re.sub("[-_.]+", "-", package).lower()] = version
    return pins
