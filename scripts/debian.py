"""Tests in a tree of another Debian release, with its Python and its servers: `make test-debian13`.

    .venv/bin/python -m scripts.debian SUITE [ARGUMENT ...]    bookworm, trixie, or other: the one this machine is not

On a machine of that release the tests run where they are. Else (Debian, as root) a tree of it is made with debootstrap
and kept in .local/debian; a copy of the project is tested there, in a virtual environment with the locked packages.
Nothing is left running or mounted, however this ends. The arguments are pytest's; without a folder or a file of tests
among them the unit, integration and fault tests run. The exit code is pytest's, or 1 where the tree cannot be had.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts import local_services
from scripts.local_services import LocalServicesError, end_with_this_program, exit_on_signals

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".local" / "debian"

TESTED = ("bookworm", "trixie")
TESTS = ("tests/unit", "tests/integration", "tests/faults")
NEEDS_NPM = "tests/integration/test_bench.py::test_the_node_peer_is_held_to_the_same_gate"
NOT_COPIED = (".git", ".venv", ".local", ".env", ".hypothesis", "*_cache", "__pycache__")

DEBOOTSTRAP_SCRIPT = "/usr/share/debootstrap/scripts/sid"  # of every suite here; an older debootstrap lacks their names
PACKAGES = "python3,python3-venv,ca-certificates"
PACKAGES_OF_TESTS = ("rabbitmq-server", "postgresql", "pgbouncer", "haproxy", "prometheus", "make", "curl", "procps")

# What pip needs of this machine in such a tree, to install from where this machine does.
NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt")
PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "~/.config/pip", "~/.pip")
FILE_VARIABLES = ("PIP_CONFIG_FILE", "PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")

# In name spaces of its own: what a command mounts, starts and shares (PostgreSQL's memory) ends with it.
ALONE = ("unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child")
INIT = ("/bin/sh", "-c", '"$@"; exit $?', "sh")  # the first process of a name space: it takes in what others leave


class DebianFailed(Exception):
    """A tree cannot be had, or a command failed in it."""


@dataclass(frozen=True)
class Tree:
    """One release of Debian in a folder, with its python3."""

    suite: str
    root: Path

    def command(self, folder: Path, *words: object) -> list[str]:
        """The command that runs these words in ``folder`` of the tree, which is named as the tree sees it."""
        enter = [*ALONE, f"--mount-proc={self.root}/proc", "chroot", str(self.root), *INIT]
        settings = ["HOME=/root", "LANG=C.UTF-8"]
        return [*enter, "/usr/bin/env", "-C", str(folder), *settings, *(str(word) for word in words)]

    def copy_project(self, folder: Path) -> None:
        """Put this checkout, without what is made in it, into ``folder`` of the tree, in the place of an older one."""
        there = self.root / folder.relative_to("/")
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(ROOT, there, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests; returns the exit code."""
    suite, *given = (sys.argv[1:] if arguments is None else arguments) or ["no release"]
    own = this_release()
    if suite == "other":
        suite = next(other for other in reversed(TESTED) if other != own)
    if suite not in TESTED:
        print(f"{suite}: none of {', '.join(TESTED)}, other", file=sys.stderr)
        return 1
    chosen = [*given] if any(word.startswith("tests") for word in given) else [*TESTS, *given]
    exit_on_signals()
    if suite == own:
        return _run_to_the_end([sys.executable, "-m", "pytest", "-n", "2", *chosen])
    try:
        tree = tree_of(suite)
        with _locked(HOME / f"{suite}.tests"):
            return _test(tree, chosen)
    except DebianFailed as exc:
        print(exc, file=sys.stderr)
        return 1


def environment_commands(python: str, environment: Path) -> list[list[str]]:
    """What makes a new virtual environment of ``python`` with the locked packages, run in a copy of the project."""
    pip = [f"{environment}/bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip += ["--root-user-action", "ignore", "--no-compile", "--require-hashes", "-r", "requirements-dev.lock"]
    return [[python, "-m", "venv", "--clear", str(environment)], pip]


def this_release() -> str:
    """The code name of the release that this machine runs; empty where it tells none."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def _test(tree: Tree, arguments: list[str]) -> int:
    """Run pytest in the tree, with servers from its packages; returns its exit code. Raises DebianFailed."""
    project, environment = Path("/tests/project"), Path("/tests/environment")
    _remove_remains(tree)
    tree.copy_project(project)
    script = "import sys; from scripts import local_services; local_services.install(sys.argv[1:])"
    install = ["/usr/bin/python3", "-c", script, *PACKAGES_OF_TESTS]
    _once(tree, project, "packages", " ".join(PACKAGES_OF_TESTS), [install])
    lock = (ROOT / "requirements-dev.lock").read_text()
    _once(tree, project, "lock", lock, environment_commands("/usr/bin/python3", environment))
    (tree.root / "tests/project/.venv").symlink_to(environment)  # where tests that follow the documents look for it
    (tree.root / "tests/environment/installed").touch()
    print(f"Debian {tree.suite}, in {tree.root}:", flush=True)
    pytest = [f"{environment}/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "--basetemp=/tests/tmp"]
    pytest += ["-n", "2", "--deselect", NEEDS_NPM]
    return _run_to_the_end(tree.command(project, "CI=true", *pytest, *arguments))


def _remove_remains(tree: Tree) -> None:
    """What tests that were killed have left outside of their own folder, which pytest empties itself."""
    for folder, pattern in (("var/tmp", "votes-*"), ("dev/shm", "PostgreSQL.*")):
        for path in (tree.root / folder).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _once(tree: Tree, project: Path, name: str, content: str, commands: list[list[str]]) -> None:
    """Run these where they have not been run in this tree with this ``content`` before. Raises DebianFailed."""
    done = tree.root / "tests" / name
    if done.exists() and done.read_text() == content:
        return
    done.unlink(missing_ok=True)
    for command in commands:
        run(tree.command(project, *command))
    done.write_text(content)


def _run_to_the_end(command: Sequence[str]) -> int:
    """Its exit code; it ends with this program, even where that is killed."""
    with subprocess.Popen(command, cwd=ROOT) as child:
        end_with_this_program(pid=child.pid)
        try:
            return child.wait()
        except BaseException:
            child.kill()
            raise


# --- the trees -------------------------------------------------------------------------------------------------------


def tree_of(suite: str) -> Tree:
    """The tree of that release, with what pip needs of this machine: made where there is none. Raises DebianFailed."""
    with _locked(HOME / suite):
        tree = _made(suite)
        variables = [os.environ[name] for name in FILE_VARIABLES if name in os.environ]
        for path in [Path(name).expanduser() for name in (*NETWORK_FILES, *PIP_FILES, *variables)]:
            there = tree.root / path.relative_to("/")
            if path.is_dir():
                shutil.copytree(path, there, dirs_exist_ok=True)
            elif path.is_file():
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, there)
    return tree


def _made(suite: str) -> Tree:
    tree = Tree(suite, HOME / suite)
    if not tree.root.exists():
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise DebianFailed(f"Debian {suite} is made by debootstrap, as root on Debian or Ubuntu")
        if shutil.which("debootstrap") is None:
            try:
                local_services.install(["debootstrap"])
            except LocalServicesError as exc:
                raise DebianFailed(str(exc)) from exc
        unfinished = HOME / f"{suite}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        debootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
        run([*ALONE, *debootstrap, suite, str(unfinished), _mirror(), DEBOOTSTRAP_SCRIPT])
        unfinished.rename(tree.root)
    return tree


def _mirror() -> str:
    """Where this machine gets Debian's packages from. Raises DebianFailed."""
    wanted = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    found = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    if not found:
        raise DebianFailed("apt knows no mirror of Debian (apt-get update)")
    return found[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other program of this checkout is in a block with the same ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str], cwd: Path | None = None) -> str:
    """What it prints. Raises DebianFailed, with its last lines, where it does not end well."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise DebianFailed(f"exit code {done.returncode}: {' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
