"""The unit tests and the table of verdicts on every Python that the service supports: `make test-pythons`.

    .venv/bin/python -m scripts.pythons [VERSION ...]

An interpreter is this machine's own where it has one, else that of the Debian release whose python3 it is: a tree of
that release is made with debootstrap (Debian, as root) and kept in .local/pythons. Nothing is mounted or left running.
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

from scripts import check_deploy
from scripts.local_services import exit_on_signals

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".local" / "pythons"

# Each supported version, and the Debian release whose python3 it is, if any.
SUITES = {"3.11": "bookworm", "3.12": None, "3.13": "trixie", "3.14": "forky"}
OWN = "{}.{}".format(*sys.version_info)

DEBOOTSTRAP_SCRIPT = "/usr/share/debootstrap/scripts/sid"  # of every suite here; an older debootstrap lacks their names
PACKAGES = "python3,python3-venv,ca-certificates"

# What pip needs of this machine in such a tree, to install from where this machine does.
NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt")
PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "~/.config/pip", "~/.pip")
FILE_VARIABLES = ("PIP_CONFIG_FILE", "PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")

# In name spaces of its own: what a command mounts and starts ends with it.
ALONE = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
NOT_COPIED = (".git", ".venv", ".local", ".env", ".hypothesis", "*_cache", "__pycache__")

UNIT_TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit")
VERDICTS = ("-m", "tests.unit.verdict_table")


class PythonFailed(Exception):
    """It cannot be had, or something failed on it."""


@dataclass(frozen=True)
class Interpreter:
    """One Python: the commands that its programs are run with, and the folders as they see them."""

    version: str
    origin: str
    python: str
    project: Path = ROOT
    environment: Path | None = None  # where a virtual environment is to be made; None: python is one that stands
    tree: Path | None = None  # in which all that is; None: this machine

    def run(self, *command: object) -> str:
        """What it prints. Raises PythonFailed, with the last lines, where it does not end well."""
        words = [str(word) for word in command]
        if self.tree is None:
            return _run(words, cwd=self.project)
        enter = [*ALONE, f"--mount-proc={self.tree}/proc", "chroot", str(self.tree)]
        return _run([*enter, "/usr/bin/env", "-C", str(self.project), *words])

    def install(self) -> Interpreter:
        """The same in a new virtual environment with the locked packages."""
        if self.environment is None:
            return self
        self.run(self.python, "-m", "venv", "--clear", self.environment)
        python = f"{self.environment}/bin/python"
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--root-user-action", "ignore"]
        self.run(*pip, "--no-compile", "--require-hashes", "-r", "requirements-dev.lock")
        return Interpreter(self.version, self.origin, python, self.project, tree=self.tree)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them one after the other; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(SUITES)} (default: all)")
    asked = parser.parse_args(arguments).versions
    if unknown := sorted(set(asked) - set(SUITES)):
        parser.error(f"not supported: {', '.join(unknown)}")
    exit_on_signals()
    expected = _run([sys.executable, *VERDICTS], cwd=ROOT).splitlines()
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
        except PythonFailed as exc:
            print(f"{version}: FAILED\n{exc}", flush=True)
            failed += 1
        else:
            print(f"{told} ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if failed else 0


def check(interpreter: Interpreter, expected: list[str]) -> str:
    """Run the unit tests and compare the table of verdicts with ``expected``; returns what there is to tell.

    Raises PythonFailed.
    """
    installed = interpreter.install()
    full = installed.run(installed.python, "-c", "import platform; print(platform.python_version())").strip()
    tests = installed.run(installed.python, *UNIT_TESTS).splitlines()[-1]
    found = installed.run(installed.python, *VERDICTS).splitlines()
    if different := differences(expected, found):
        raise PythonFailed("\n".join([f"verdicts of {OWN} (-) and {full} (+):", *different]))
    return f"{full} ({interpreter.origin}): {tests}; {len(found)} verdicts, all as on {OWN}"


def differences(expected: Sequence[str], found: Sequence[str]) -> list[str]:
    """Each line that only one of two tables has: the first one's with a minus, the second one's with a plus."""
    only = [*(f"- {line}" for line in expected if line not in found)]
    only += [f"+ {line}" for line in found if line not in expected]
    return only or ([] if list(expected) == list(found) else ["the same lines in another order, or not as often"])


# --- where an interpreter is to be had -------------------------------------------------------------------------------


def find(version: str) -> Interpreter | None:
    """The interpreter of that version; None where there is none to be had. Raises PythonFailed."""
    if version == OWN:
        return Interpreter(version, "this one", sys.executable)
    if python := _on_this_machine(version):
        return Interpreter(version, python, python, environment=HOME / version)
    suite = SUITES[version]
    if suite is None:
        return None
    tree = _tree(suite)
    project = Path("/project")
    shutil.rmtree(tree / "project", ignore_errors=True)
    shutil.copytree(ROOT, tree / "project", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
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


def _tree(suite: str) -> Path:
    """The root of that release of Debian with its python3: made where there is none. Raises PythonFailed."""
    tree = HOME / suite
    if not tree.exists():
        check_deploy.install_programs({"debootstrap": "debootstrap"})
        if os.geteuid() != 0 or shutil.which("debootstrap") is None:
            raise PythonFailed(f"Debian {suite} is made by debootstrap (apt-get install), as root")
        unfinished = HOME / f"{suite}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        debootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
        _run([*ALONE, *debootstrap, suite, str(unfinished), _debian_mirror(), DEBOOTSTRAP_SCRIPT])
        unfinished.rename(tree)
    variables = [os.environ[name] for name in FILE_VARIABLES if name in os.environ]
    for path in [Path(name).expanduser() for name in (*NETWORK_FILES, *PIP_FILES, *variables)]:
        there = tree / path.relative_to("/")
        if path.is_dir():
            shutil.copytree(path, there, dirs_exist_ok=True)
        elif path.is_file():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
    return tree


def _debian_mirror() -> str:
    """Where this machine gets Debian's packages from. Raises PythonFailed."""
    wanted = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    found = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    if not found:
        raise PythonFailed("apt knows no mirror of Debian (apt-get update)")
    return found[0]


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise PythonFailed(f"exit code {done.returncode}: {' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
