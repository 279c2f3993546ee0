"""The service as a process: the one way to start it, to wait until it is ready, and to end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from scripts.local_services import _signals_held, end_with_this_program

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 30.0
STOP_SECONDS = 40.0  # more than SHUTDOWN_TIMEOUT_SECONDS and a slow machine need
POLL_SECONDS = 0.02


class ServiceFailed(AssertionError):
    """It ended, or did not become ready or stop in time; the message has the end of its log."""


def command(root: Path = ROOT) -> list[str]:
    """What runs the aggregator.py of this folder."""
    return [sys.executable, str(root / "aggregator.py")]


def launch(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Run it in ``folder``, where the service looks for .env, with just this environment.

    It writes to ``output``, or to where we write. Should this program be killed, it is killed too.
    """
    with _signals_held():  # raised between the two it would leave a process that nobody knows
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        end_with_this_program(pid=process.pid)
    return process


class ServiceProcess:
    """One replica with a log in a file, and its metrics on a free port unless told otherwise.

    As a context manager it is ready at the beginning, and at the end it is gone.
    """

    def __init__(self, log: Path, settings: Mapping[str, str], root: Path = ROOT) -> None:
        """``settings`` are all of its environment, but for a few defaults; ``root`` is the folder of aggregator.py."""
        self.name = log.stem
        self.log = log
        self._command = command(root)
        self._environment = {"PATH": os.environ["PATH"], "METRICS_PORT": "0", "INSTANCE_NAME": self.name, **settings}
        self._log_offset = 0  # of the present process, since a restart appends
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            return self.start_and_wait()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self._log_offset = log.tell()
            self.process = launch(self._command, self._environment, self.log.parent, log)
        return self

    def start_and_wait(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def lines(self) -> list[dict[str, Any]]:
        """The log of the present process, each line parsed."""
        if not self.log.exists():
            return []
        text = self.log.read_bytes()[self._log_offset :].decode("utf-8", "replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def says(self, message: str) -> dict[str, Any] | None:
        """The latest line with this message; None where there is none yet."""
        return next((line for line in reversed(self.lines()) if line["message"] == message), None)

    def wait_says(self, message: str) -> dict[str, Any]:
        """Wait for such a line. Raises ServiceFailed."""
        line: dict[str, Any] = self._wait(lambda: self.says(message), f"does not say {message!r}", READY_SECONDS)
        return line

    @property
    def port(self) -> int:
        """Where its pages and metrics are. Raises ServiceFailed."""
        return int(self.wait_says("starting")["fields"]["METRICS_PORT"])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET; status 0 where nobody answers."""
        try:
            with urllib.request.urlopen(self.address + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()
        except OSError:
            return 0, ""

    def is_ready(self) -> bool:
        return self.get("/readyz")[0] == 200

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Raises ServiceFailed where it ends instead, or takes longer."""
        self._wait(self.is_ready, "is not ready", timeout)

    def _wait(self, condition: Callable[[], Any], what: str, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while self.is_running():
            if answer := condition():
                return answer
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{self.name} {what} after {timeout:.0f} s; {self.log_tail()}")
            time.sleep(POLL_SECONDS)
        code = "no process" if self.process is None else f"exit code {self.process.returncode}"
        raise ServiceFailed(f"{self.name} does not run ({code}); {self.log_tail()}")

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n  ".join([f"the end of {self.log}:", *lines[-10:]])

    def signal(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    def kill(self) -> None:
        """SIGKILL, also where the process is stopped; returns when it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """SIGTERM; the exit code. Killed, and ServiceFailed raised, where that takes over ``timeout`` seconds."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServiceFailed(f"{self.name} does not stop within {timeout:.0f} s; {self.log_tail()}") from None
