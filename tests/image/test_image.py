"""The Dockerfile is built and the image is run, without an engine: `make image-test`.

python:3.11-slim cannot be had without a registry, so a base of that name is made with debootstrap; it has Debian's
Python 3.11. buildah builds on it and runs the result in a chroot, on this machine's own network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import check_deploy, local_services
from scripts.local_services import LocalServices, Process
from test_publisher import Publisher, make_messages
from tests.harness import ROOT, Queue, Results, check_exact, wait_settled, wait_until

PROGRAMS = ("buildah", "debootstrap")
BASE_PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_TOOLS = ("gcc", "cc", "g++", "make", "ld", "git", "dpkg-buildpackage")


class Image:
    """The built image, and one container of it."""

    def __init__(self, directory: Path) -> None:
        self._options = ["--root", f"{directory}/root", "--runroot", f"{directory}/run", "--storage-driver", "vfs"]
        self.directory = directory
        self.container = ""

    def buildah(self, *arguments: str, timeout: float = 600) -> str:
        """What buildah prints; AssertionError with its words where it fails."""
        done = subprocess.run(self._command(*arguments), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stderr[-3000:]}"
        return done.stdout.strip()

    def build(self) -> None:
        base = self.directory / "base"
        debootstrap = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", str(base)]
        done = subprocess.run(debootstrap, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        (base / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        shutil.copy(CERTIFICATES, base / CERTIFICATES.relative_to("/"))  # it trusts whom this machine trusts
        (base / "etc/pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n")
        scratch = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", scratch, str(base), "/")
        self.buildah("commit", "--quiet", "--rm", scratch, "python:3.11-slim")
        shutil.rmtree(base)
        build = ["build", "--isolation", "chroot", "--pull-never", "--format", "docker", "--tag", "vote-aggregator"]
        self.buildah(*build, str(ROOT))
        self.container = self.buildah("from", "--pull-never", "vote-aggregator")

    def config(self) -> dict[str, Any]:
        docker: dict[str, Any] = json.loads(self.buildah("inspect", self.container))["Docker"]["config"]
        return docker

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._run(command, environment), capture_output=True, text=True, timeout=120)

    def start(self, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """The image's own entrypoint, in the background."""
        with log.open("wb") as output:
            command = self._run(self.config()["Entrypoint"], environment)
            return subprocess.Popen(command, stdout=output, stderr=output)

    def files(self) -> Path:
        return Path(self.buildah("mount", self.container))

    def _run(self, command: Any, environment: dict[str, str]) -> list[str]:
        settings = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        return self._command("run", "--isolation", "chroot", *settings, self.container, "--", *command)

    def _command(self, *arguments: str) -> list[str]:
        return ["buildah", *self._options, *arguments]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image, built from the Dockerfile as it stands."""
    check_deploy.install_programs({program: program for program in PROGRAMS})
    missing = [program for program in PROGRAMS if check_deploy._which(program) is None]
    if missing or os.geteuid() != 0:
        reason = f"not installed: {', '.join(missing)} (apt-get install)" if missing else "needs root"
        assert "CI" not in os.environ, reason
        pytest.skip(reason)
    image = Image(tmp_path_factory.mktemp("image"))
    started = time.monotonic()
    image.build()
    print(f"\nbuilt in {time.monotonic() - started:.0f} s, the base included")
    yield image
    image.buildah("rm", "--all")
    shutil.rmtree(image.directory)


def test_the_service_is_not_root(image: Image) -> None:
    """A fixed uid without a shell, and nothing of the service is its own to write."""
    assert image.run("id", "-u").stdout.strip() == "10001"
    assert image.run("touch", "/app/aggregator.py").returncode != 0


def test_the_image_holds_no_build_tools_tests_or_secrets(image: Image) -> None:
    """Only the service, its packages and Python."""
    files = image.files()
    let_in = re.findall(r"^!([^/\n]+)", (ROOT / ".dockerignore").read_text(), re.M)
    expected = {path.name for pattern in let_in for path in ROOT.glob(pattern)} - {"requirements.lock"}
    assert {path.name for path in (files / "app").iterdir()} == expected
    for tool in BUILD_TOOLS:
        assert not any((files / folder / tool).exists() for folder in ("usr/bin", "usr/local/bin", "bin", "venv/bin"))
    packages = {path.name.partition("-")[0] for path in files.glob("venv/lib/*/site-packages/*.dist-info")}
    assert packages == {"pika", "prometheus_client", "psycopg2_binary", "python_dotenv"}
    assert not any(files.glob("**/.env")) and not any(files.glob("root/.cache/*"))
    assert not re.search("PASSWORD|_URL", " ".join(image.config()["Env"]))
    kilobytes = {folder: _kilobytes(files / folder) for folder in ("venv", "app")}
    print(f"\nsize: {_kilobytes(files) / 1024:.0f} MB, of them beyond the base {sum(kilobytes.values()) / 1024:.1f} MB")


def _kilobytes(folder: Path) -> int:
    return int(subprocess.run(["du", "-sk", folder], check=True, capture_output=True, text=True).stdout.split()[0])


def test_check_config_tells_right_settings_from_wrong_ones(image: Image) -> None:
    """Exit code 2 without its variables, 0 with them."""
    wrong = image.run(*image.config()["Entrypoint"], "--check-config")
    assert (wrong.returncode, "RABBITMQ_PASSWORD is not set" in wrong.stderr) == (2, True)
    settings = {"RABBITMQ_PASSWORD": "x", "POSTGRES_PASSWORD": "y"}
    assert image.run(*image.config()["Entrypoint"], "--check-config", **settings).returncode == 0


def test_the_container_counts_tells_its_health_and_stops_at_sigterm(
    image: Image, services: LocalServices, queue: Queue, results: Results, tmp_path: Path
) -> None:
    """From the private servers of this machine; HEALTHCHECK's own command is what is asked."""
    kind, *health_check = image.config()["Healthcheck"]["Test"]
    assert kind == "CMD"
    port = str(local_services._free_ports(1)[0])
    assert image.run(*health_check, METRICS_PORT=port).returncode != 0, "healthy, and nothing runs"
    settings = {"AMQP_URL": queue.url, "DATABASE_URL": results.url, "RABBITMQ_QUEUE": queue.name, "METRICS_PORT": port}
    started = time.monotonic()
    container = image.start(tmp_path / "log", **settings)
    try:
        wait_until(lambda: _is_ready(port), "the container is ready")
        print(f"\nready {time.monotonic() - started:.1f} s after its start")
        messages = list(make_messages(1_000, 3, 5, 20, 5))
        Publisher([queue.url], queue.name).publish(messages)
        wait_settled(services, queue)
        check_exact(results, messages)
        assert image.run(*health_check, METRICS_PORT=port).returncode == 0
        sealed = image.run("python", "reconcile.py", "seal", DATABASE_URL=results.url)
        assert sealed.returncode == 0, sealed.stderr
        _service_in(container).send(15)
        assert container.wait(40) == 0, (tmp_path / "log").read_text()
    finally:
        for process in Process(container.pid, "").descendants() if container.poll() is None else []:
            process.kill()
        container.kill()
        container.wait()


def _service_in(container: subprocess.Popen[bytes]) -> Process:
    """The service's own process, to which an engine would send the signal."""
    processes = Process(container.pid, "").descendants()
    found = [p for p in processes if _command_line(p).endswith("python aggregator.py") and not p.descendants()]
    assert len(found) == 1, [_command_line(process) for process in processes]
    return found[0]


def _command_line(process: Process) -> str:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def _is_ready(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
