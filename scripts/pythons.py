"""The unit tests and the table of verdicts on every Python that the service supports: `make test-pythons`.

    .venv/bin/python -m scripts.pythons [VERSION ...]

An interpreter is this machine's own where it has one, else that of the Debian release whose python3 it is: a tree of
that release is made with debootstrap (Debian, as root) and kept in .local/debian. Nothing is mounted or left running.
Each time the locked packages are installed anew. Exit code 1 where a test fails or a verdict is not as on the Python
that runs this, or where a VERSION that was asked for cannot be had.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import debian
from scripts.debian import DebianFailed, Tree
from scripts.local_services import exit_on_signals

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".local" / "pythons"

# Each supported version, and the Debian release whose python3 it is, if any.
SUITES = {"3.11": "bookworm", "3.12": None, "3.13": "trixie", "3.14": "forky"}
OWN = "{}.{}".format(*sys.version_info)

UNIT_TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit")
VERDICTS = ("-m", "tests.unit.verdict_table")


class VerdictsDiffer(Exception):
    """It takes a message for something else than the Python that runs this."""


@dataclass(frozen=True)
class Interpreter:
    """One Python: the commands that its programs are run with, and the folders as they see them."""

    version: str
    origin: str
    python: str
    project: Path = ROOT
    environment: Path | None = None  # where a virtual environment is to be made; None: python is one that stands
    tree: Tree | None = None  # in which all that is; None: this machine

    def run(self, *command: object) -> str:
        """What it prints. Raises DebianFailed, with the last lines, where it does not end well."""
        if self.tree is None:
            return debian.run([str(word) for word in command], cwd=self.project)
        return debian.run(self.tree.command(self.project, *command))

    def install(self) -> Interpreter:
        """The same in a new virtual environment with the locked packages."""
        if self.environment is None:
            return self
        for command in debian.environment_commands(self.python, self.environment):
            self.run(*command)
        python = f"{self.environment}/bin/python"
        return Interpreter(self.version, self.origin, python, self.project, tree=self.tree)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them one after the other; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(SUITES)} (default: all)")
    asked = parser.parse_args(arguments).versions
    if unknown := sorted(set(asked) - set(SUITES)):
        parser.error(f"not supported: {', '.join(unknown)}")
    exit_on_signals()
    expected = debian.run([sys.executable, *VERDICTS], cwd=ROOT).splitlines()
    failed = 0
    for version in asked or SUITES:
        started = time.monotonic()
        try:
            interpreter = find(version)
            if interpreter is None:
                print(f"{version}: not on this machine, and no release of Debian's has it", flush=True)
                failed += bool(asked)
                continue
            told = check(interpreter, expected)
        except (DebianFailed, VerdictsDiffer) as exc:
            print(f"{version}: FAILED\n{exc}", flush=True)
            failed += 1
        else:
            print(f"{told} ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if failed else 0


def check(interpreter: Interpreter, expected: list[str]) -> str:
    """Run the unit tests and compare the table of verdicts with ``expected``; returns what there is to tell.

    Raises DebianFailed where a command fails, VerdictsDiffer.
    """
    installed = interpreter.install()
    full = installed.run(installed.python, "-c", "import platform; print(platform.python_version())").strip()
    tests = installed.run(installed.python, *UNIT_TESTS).splitlines()[-1]
    found = installed.run(installed.python, *VERDICTS).splitlines()
    if different := differences(expected, found):
        raise VerdictsDiffer("\n".join([f"verdicts of {OWN} (-) and {full} (+):", *different]))
    return f"{full} ({interpreter.origin}): {tests}; {len(found)} verdicts, all as on {OWN}"


def differences(expected: Sequence[str], found: Sequence[str]) -> list[str]:
    """Each line that only one of two tables has: the first one's with a minus, the second one's with a plus."""
    only = [*(f"- {line}" for line in expected if line not in found)]
    only += [f"+ {line}" for line in found if line not in expected]
    return only or ([] if list(expected) == list(found) else ["the same lines in another order, or not as often"])


# --- where an interpreter is to be had -------------------------------------------------------------------------------


def find(version: str) -> Interpreter | None:
    """The interpreter of that version; None where there is none to be had. Raises DebianFailed."""
    if version == OWN:
        return Interpreter(version, "this one", sys.executable)
    if python := _on_this_machine(version):
        return Interpreter(version, python, python, environment=HOME / version)
    suite = SUITES[version]
    if suite is None:
        return None
    tree = debian.tree_of(suite)
    project = Path("/project")
    tree.copy_project(project)
    return Interpreter(version, f"Debian {suite}", "/usr/bin/python3", project, Path("/venv"), tree)


def _on_this_machine(version: str) -> str | None:
    """A python of that version, on PATH or one of pyenv's, that can make virtual environments."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python{version}")]
    question = f"import ensurepip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", question], capture_output=True).returncode == 0:
            return str(candidate)
    return None


if __name__ == "__main__":
    sys.exit(main())
