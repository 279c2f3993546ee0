"""The model of the protocol holds, each broken variant of it is found out, and its checker tells when it is not so."""

from __future__ import annotations

import importlib.util
import itertools
import os
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

CHECK = Path(__file__).parents[2] / "docs" / "model" / "check.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_check", CHECK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load()
# checks of one build together, since building takes longest
BUILDS = [
    [each.name for each in checks]
    for _, checks in itertools.groupby((each for each in check.CHECKS if not each.large), lambda each: each.defines)
]


@pytest.fixture
def spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that takes the temporary files; skips, or fails in CI, where spin or gcc is missing."""
    missing = check.missing_programs()
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("names", BUILDS, ids=lambda names: names[0] if len(names) == 1 else "reached")
def test_spin_finds_what_it_has_to_find(spin: Path, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(names) == 0
    *results, summary = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in results] == names
    assert all(line.endswith(": as expected") for line in results)
    assert summary.startswith(f"{len(names)} checks in ") and summary.endswith("all as expected")
    assert list(spin.iterdir()) == []


def test_every_broken_variant_is_to_be_found_broken() -> None:
    broken = {
        "ACK_BEFORE_COMMIT": "lost",
        "NO_IDENTITY": "counted twice",
        "ACK_ANY_CHANNEL": "lost",
        "NO_RECORD_FOR_COPIES": "lost",
        "NO_HOLD": "dropped by the delivery limit",
        "NO_TRIAL_WRITE": "dropped by the delivery limit",
    }
    assert {each.name: each.expected for each in check.CHECKS if each.name in broken} == broken
    assert all(name in each.defines for name in broken for each in check.CHECKS if each.name == name)


def test_a_story_ends_with_the_step_that_breaks_the_promise(spin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--story", "ACK_ANY_CHANNEL"]) == 0
    steps = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert steps[0].startswith("1. replica ")
    assert "message 1 is acked by replica" in steps[-1]


def test_a_result_that_is_not_the_expected_one_is_an_error(
    spin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = next(each for each in check.CHECKS if each.name == "NO_IDENTITY")._replace(expected=check.LOST)
    monkeypatch.setattr(check, "CHECKS", (wrong,))
    assert check.main([]) == 1
    assert "counted twice: NOT as expected (lost)" in capsys.readouterr().out


def test_a_situation_that_is_never_reached_is_an_error(
    spin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an incident nothing is given back: a model in which nothing goes wrong proves nothing."""
    give_back = next(each for each in check.CHECKS if each.name == "give_back")
    never = give_back._replace(defines=(*give_back.defines, "INCIDENTS=0", "FAULTS=0"))
    monkeypatch.setattr(check, "CHECKS", (never,))
    assert check.main([]) == 1
    assert "no violation: NOT as expected" in capsys.readouterr().out


def test_a_missing_program_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.main([]) == 2
    error = capsys.readouterr().err
    assert "spin, gcc" in error and "apt-get install spin gcc" in error


def test_a_model_that_spin_cannot_read_is_an_error(
    spin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = spin / "votes.pml"
    broken.write_text("active proctype {")
    monkeypatch.setattr(check, "MODEL", broken)
    assert check.main(["NO_IDENTITY"]) == 2
    assert "spin failed" in capsys.readouterr().err
