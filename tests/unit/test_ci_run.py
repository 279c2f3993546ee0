""".ci/run with programs that do nothing but say their names: what fails in either of its two rows fails the whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT, wait_until

FIRST, SECOND = ("make test ARGS=-n 2", "make test-ha"), ("make test-pythons", "make image-test")

# Where WAITS is begun, it says its pid and waits to be killed. Where FAILS is begun, that waits for WAITS, and fails.
PROGRAM = """#!/bin/sh
said="$(basename "$0") $*"
echo "$said"
case "$said" in
    "$WAITS") echo $$ >"$FOLDER/new" && mv "$FOLDER/new" "$FOLDER/pid"; exec sleep 600 ;;
    "$FAILS") while [ -n "$WAITS" ] && [ ! -e "$FOLDER/pid" ]; do sleep 0.02; done; exit 1 ;;
esac
"""


def ci_run(folder: Path, waits: str = "", fails: str = "") -> subprocess.CompletedProcess[str]:
    """It ends, whatever it starts."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    for name in ("make", "apt-get", "npm", "amqp-publish", ".venv/bin/python"):
        program = folder / (name if "/" in name else f"bin/{name}")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(PROGRAM)
        program.chmod(0o755)
    settings = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "FOLDER": str(folder), "WAITS": waits, "FAILS": fails}
    return subprocess.run([folder / ".ci/run"], env=settings, capture_output=True, text=True, timeout=60)


def test_both_rows_are_run_and_their_output_kept(tmp_path: Path) -> None:
    """The second one's in one piece, at the end."""
    done = ci_run(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    places = [lines.index(next(line for line in lines if line.startswith(words))) for words in FIRST + SECOND]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["make test-faults ARGS=-n 2", "make test-clients"])
def test_what_fails_in_either_row_fails_the_whole_and_is_shown(tmp_path: Path, name: str) -> None:
    """And nothing comes after it in its row."""
    done = ci_run(tmp_path, fails=name)
    assert done.returncode != 0
    assert name in done.stdout
    assert ("make test-ha" if "faults" in name else "make image-test") not in done.stdout


def test_the_second_row_is_ended_where_the_first_one_fails(tmp_path: Path) -> None:
    """Nothing is left running."""
    done = ci_run(tmp_path, waits="make test-browser", fails="make test-attack ARGS=-n 2")
    assert done.returncode != 0
    pid = int((tmp_path / "pid").read_text())
    wait_until(
        lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes(), "gone"
    )
