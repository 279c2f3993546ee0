"""scripts/debian.py, as far as no tree is needed: what it runs, what it returns, and that it leaves nothing running."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import debian
from scripts.local_services import Process, _processes
from tests.harness import ROOT, wait_until

ON_DEBIAN_13 = "import sys; from scripts import debian; debian.this_release = lambda: 'trixie'; sys.exit(debian.main())"
# with a Ctrl-C that is not ignored, as it is in what a script has started in the background
RUNS = """
import signal, sys
from scripts import debian
signal.signal(signal.SIGINT, signal.default_int_handler)
debian.exit_on_signals()
debian._run_to_the_end(sys.argv[1:])
"""


@pytest.mark.parametrize(("argument", "code"), [("-k=nothing_of_that_name", 5), ("--no-such-option", 4)])
def test_on_debian_13_itself_pytest_runs_where_it_is_and_its_exit_code_counts(argument: str, code: int) -> None:
    """The arguments are pytest's, too."""
    command = [sys.executable, "-c", ON_DEBIAN_13, "trixie", "-p", "no:cacheprovider", "-q", "tests/unit/test_votes.py"]
    done = subprocess.run([*command, argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr


def test_an_unknown_release_is_an_error_that_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is made."""
    assert debian.main(["woody"]) == 1
    assert capsys.readouterr().err == "woody: none of bookworm, trixie, other\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_it_runs_ends_with_it(tmp_path: Path, signum: signal.Signals) -> None:
    """Also what has left its parent."""
    alone = [word for word in debian.ALONE if word != "--mount"]  # which the root of a tree cannot
    if subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        pytest.skip("name spaces need root, and a container that may make them")
    pids = tmp_path / "pids"
    script = f"setsid sleep 600 & echo $! >{pids}.new; mv {pids}.new {pids}; wait"
    command = [sys.executable, "-c", RUNS, *alone, *debian.INIT, "sh", "-c", script]
    with subprocess.Popen(command, cwd=ROOT) as program:
        family: list[Process] = []
        try:
            wait_until(pids.exists, "it runs")
            own = next(process for process, _parent in _processes(program.pid))
            family = own.descendants()
            assert any(b"sleep" in Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in family)
        finally:
            program.send_signal(signum)
    wait_until(lambda: not any(process.is_alive() for process in family), "all of them end")


def test_the_same_is_made_once_and_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where it has failed."""
    (tmp_path / "tests").mkdir()
    tree = debian.Tree("trixie", tmp_path)
    monkeypatch.setattr(debian.Tree, "command", lambda _self, _folder, *words: list(words))
    mark = tmp_path / "mark"

    def make(content: str, command: str) -> int:
        debian._once(tree, Path("/"), "lock", content, [["sh", "-c", command]])
        return len(mark.read_text())

    add = f"printf x >>{mark}"
    assert [make("one", add), make("one", add), make("two", add), make("two", add)] == [1, 1, 2, 2]
    with pytest.raises(debian.DebianFailed, match="exit code 3"):
        make("three", f"{add}; exit 3")
    assert make("three", add) == 4
