"""README.md, and docs/QUICKSTART.md without Docker, followed to the letter."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts import local_services
from scripts.local_services import LocalServices
from tests.harness import ROOT, wait_until

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".local", ".env", ".secrets", "__pycache__", ".*_cache", ".hypothesis"
)
# may be asked again: the last votes are counted within a second
READS = ("make check-db", "make metrics", "make reconcile")


@dataclass
class Step:
    """A command of the page, what it shows, and whether it is to run beside those that follow."""

    command: str
    output: list[str]
    in_background: bool


MAKES = re.compile(r"`(?:\w+=\S+ )?(make [a-z0-9-]+)")
PAGES = {
    "README.md": (ROOT / "README.md").read_text(),
    "docs/QUICKSTART.md": (ROOT / "docs/QUICKSTART.md").read_text().partition("## With Docker")[0],
}


def steps(page: str) -> list[Step]:
    """The commands of the page, in their order."""
    found = []
    for kind, block in re.findall(r"^```console([^\n]*)\n(.*?)^```", PAGES[page], re.M | re.S):
        command, *output = block.splitlines()
        assert command.startswith("$ "), block
        found.append(Step(command[2:], [line for line in output if line], "terminal-of-its-own" in kind))
    return found


def missing_lines(step: Step, printed: str) -> list[str]:
    """The lines of the page that are not in what was printed, whatever the numbers and the widths of columns are."""
    lines = {_without_numbers(line) for line in printed.splitlines()}
    return [line for line in step.output if _without_numbers(line) not in lines]


def _without_numbers(line: str) -> str:
    line = re.sub(r"\S+(?=/\.local/)", "", line)  # the folder is the reader's own
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,.e+]*", "N", line)).strip()


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A copy of the project with the packages of this one, so that `make install` has nothing to download."""
    missing = local_services.missing_packages()
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")
    root = tmp_path / "project"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT)
    (root / ".venv").symlink_to(ROOT / ".venv")
    yield root
    servers = LocalServices(root / ".local")
    if servers.exists():
        servers.stop()


@pytest.mark.parametrize("page", PAGES)
def test_a_stranger_can_follow_the_page(clone: Path, tmp_path: Path, page: str) -> None:
    """Each command succeeds and prints what the page shows, and Ctrl-C ends the service with 0."""
    settings = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    log = tmp_path / "run.log"
    service: subprocess.Popen[bytes] | None = None

    def run(step: Step) -> str:
        done = subprocess.run(step.command, shell=True, cwd=clone, env=settings, capture_output=True, timeout=300)
        assert done.returncode == 0, f"{step.command}: {(done.stdout + done.stderr).decode()}"
        return done.stdout.decode()

    try:
        subprocess.run(["make", "install"], check=True, cwd=clone, env=settings)
        for step in steps(page):
            if step.in_background:
                settings["METRICS_PORT"] = str(local_services._free_ports(1)[0])  # 8001 may be taken here
                with log.open("wb") as output:
                    service = subprocess.Popen(
                        step.command,
                        shell=True,
                        cwd=clone,
                        env=settings,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                wait_until(lambda: '"consuming"' in log.read_text(), "the service consumes", 60)
                assert missing_lines(step, log.read_text()) == []
            elif step.command.startswith(READS):
                wait_until(lambda step=step: not missing_lines(step, run(step)), f"{step.command} prints its lines")
            else:
                assert missing_lines(step, run(step)) == [], step.command
        assert service is not None
        os.killpg(service.pid, signal.SIGINT)  # what Ctrl-C does
        service.wait(60)
        assert '"stopped"' in log.read_text()
        assert LocalServices(clone / ".local").exists() == (page == "README.md")  # make services-up leaves them
        if page == "README.md":
            run(Step("make services-down", [], False))
            assert not LocalServices(clone / ".local").exists()
    finally:
        print(log.read_text() if log.exists() else "not started")
        if service is not None and service.poll() is None:
            os.killpg(service.pid, signal.SIGTERM)
            service.wait(60)


def test_the_live_demo_shows_its_page_until_ctrl_c(clone: Path, tmp_path: Path) -> None:
    """With its laws on it; then all that was confirmed is counted, and nothing stays."""
    log, folder = tmp_path / "demo.log", tmp_path / "temporary"
    folder.mkdir()
    settings = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "TMPDIR": str(folder)}
    with log.open("wb") as output:
        demo = subprocess.Popen(
            ["make", "demo-live"], cwd=clone, env=settings, stdout=output, stderr=output, start_new_session=True
        )
        try:
            (address,) = wait_until(lambda: re.findall(r"^  (http://\S+/)$", log.read_text(), re.M), "its address", 120)
            with urllib.request.urlopen(f"{address}results.json", timeout=10) as answer:
                assert len(json.load(answer)["laws"]) == 6
            os.killpg(demo.pid, signal.SIGINT)
            demo.wait(90)
        finally:
            if demo.poll() is None:
                os.killpg(demo.pid, signal.SIGTERM)
                demo.wait(60)
    assert re.search(r"votes confirmed, all of them counted$", log.read_text(), re.M), log.read_text()
    assert list(folder.iterdir()) == []


def test_every_command_that_the_pages_name_is_run() -> None:
    """By these tests, by those of the stack (`make docker-test`, which reads the same section), or by .ci/run."""
    text = "".join((ROOT / page).read_text() for page in PAGES)
    named = set(MAKES.findall(text))
    here = {step.command.partition(" ARGS")[0] for page in PAGES for step in steps(page)}
    here |= {"make demo-live", "make services-down"}
    with_docker = set(MAKES.findall(text.partition("## With Docker")[2]))
    by_ci = set(re.findall(r"^ *(make [a-z0-9-]+)", (ROOT / ".ci/run").read_text(), re.M))
    in_part = {"make test-debian13", "make bench"}  # by .ci/run's own call of scripts.debian, and by test_bench.py
    assert named - here - with_docker - by_ci == in_part


def test_the_pages_are_read_as_they_stand() -> None:
    """All their commands are found, so that none goes untried."""
    assert [step.command for step in steps("docs/QUICKSTART.md")] == [
        "make install",
        "make demo",
        "make run",
        'make publish-test-votes ARGS="--seed 1"',
        "make check-db",
        "make metrics",
    ]
    assert [step.command for step in steps("README.md")] == [
        "make demo",
        "make services-up",
        ".venv/bin/python aggregator.py",
        ".venv/bin/python test_publisher.py -n 1000 --seed 1",
        "make check-db",
        "make reconcile",
    ]
    for page, text in PAGES.items():
        assert "\n$ " not in re.sub(r"^```console.*?^```", "", text, flags=re.M | re.S), page


def test_a_line_that_is_not_printed_is_found() -> None:
    """Numbers may differ, words may not."""
    step = Step("make check-db", ["law-001   136", "rejected: none"], False)
    assert missing_lines(step, "law-001     9,999.5\n") == ["rejected: none"]
