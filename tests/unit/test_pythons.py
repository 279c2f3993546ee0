"""scripts/pythons.py finds what differs between interpreters; the interpreters here are scripts that answer for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.debian import DebianFailed
from scripts.pythons import Interpreter, VerdictsDiffer, check, differences

TABLE = ["empty\tnot_json", "a vote\tvote 1"]


def interpreter(folder: Path, verdicts: list[str], tests: str = "echo 5 passed in 1.00s") -> Interpreter:
    """One that calls itself 3.99.1."""
    python, table = folder / "python", folder / "table"
    table.write_text("".join(f"{line}\n" for line in verdicts))
    python.write_text(
        f"#!/bin/sh\ncase $2 in pytest) {tests} ;; tests.unit.verdict_table) cat {table} ;; *) echo 3.99.1 ;; esac\n"
    )
    python.chmod(0o755)
    return Interpreter("3.99", "a script", str(python))


def test_equal_verdicts_and_green_tests_are_told_in_a_line(tmp_path: Path) -> None:
    """Which Python it was, and how much was compared."""
    told = check(interpreter(tmp_path, TABLE), TABLE)
    assert told.startswith("3.99.1 (a script): 5 passed in 1.00s; 2 verdicts, all as on ")


def test_another_verdict_fails_and_shows_both(tmp_path: Path) -> None:
    """The names of the bodies, too."""
    with pytest.raises(VerdictsDiffer, match=r"(?m)^- a vote\tvote 1\n\+ a vote\ttoo_deep$"):
        check(interpreter(tmp_path, [TABLE[0], "a vote\ttoo_deep"]), TABLE)


@pytest.mark.parametrize("found", [TABLE[:1], [*TABLE, "one more\tnot_json"], TABLE[::-1], [*TABLE, TABLE[0]], []])
def test_a_table_with_other_lines_is_another_one(found: list[str]) -> None:
    """Fewer, more, in another order, one twice, none."""
    assert differences(TABLE, found)


def test_a_red_test_fails_with_its_words(tmp_path: Path) -> None:
    """What pytest printed is in the error."""
    with pytest.raises(DebianFailed, match="1 failed"):
        check(interpreter(tmp_path, TABLE, "echo 1 failed; exit 1"), TABLE)
