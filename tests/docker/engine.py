"""A Docker engine of the tests' own: dockerd in a temporary folder, and stand-ins for the images of registries.

No image is pulled. Debian's packages are put into trees by debootstrap, which are kept as tar files in
.local/docker-test, and `images/Dockerfile` makes of these what docker-compose.yml names.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from scripts.local_services import Process, _processes
from tests.harness import ROOT, wait_until

IMAGES = Path(__file__).parent / "images"
CACHE = ROOT / ".local/docker-test"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PROGRAMS = {
    "dockerd": "docker.io",
    "docker": "docker-cli",  # a package of its own from Debian 13 on
    "iptables": "iptables",
    "ip": "iproute2",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "curl": "curl",
    "watch": "procps",
}
TREES = {
    "trixie": "postgresql-17 rabbitmq-server prometheus prometheus-alertmanager prometheus-postgres-exporter"
    " python3 wget",
    "bookworm": "python3 python3-venv python3-pip",
}
FIREWALL = ("nat", "filter")  # the tables of it that dockerd writes to
STOP_SECONDS = 60


class EngineError(Exception):
    """The engine, or an image for it, cannot be had here; the text says why."""


class Engine:
    """dockerd with its own data, socket, bridge and processes; ``close`` leaves nothing of them."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="votes-docker-"))
        self._dockerd: subprocess.Popen[bytes] | None = None
        self._bridge = f"votes{os.getpid()}"[:15]
        self._firewall: dict[str, list[str]] = {}
        self._forwards = Path("/proc/sys/net/ipv4/ip_forward").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """What docker and docker-compose need to reach it; nothing of the user's own settings."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "DOCKER_HOST": f"unix://{self.directory}/docker.sock",
            "DOCKER_BUILDKIT": "0",  # Debian 12 has no buildx
            "COMPOSE_DOCKER_CLI_BUILD": "0",
        }

    def start(self) -> None:
        """Raises EngineError where an engine runs already, or this one does not start."""
        others = [process.pid for process, _ in _processes() if _name(process) == "dockerd"]
        if others:
            raise EngineError(
                f"dockerd runs already (pid {others[0]}): two would take each other's firewall rules away"
            )
        self._firewall = {table: _rules(table) for table in FIREWALL}
        network = random.SystemRandom().randrange(200, 250)
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"10.{network}.0.1/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        options = {
            "data-root": f"{self.directory}/data",
            "exec-root": f"{self.directory}/exec",
            "pidfile": f"{self.directory}/pid",
            "host": f"unix://{self.directory}/docker.sock",
            "bridge": self._bridge,
            "default-address-pool": f"base=10.{network}.128.0/17,size=24",
        }
        log = self.directory / "dockerd.log"
        with log.open("wb") as output:
            command = ["dockerd", *(f"--{name}={value}" for name, value in options.items())]
            # in a session of its own, so that Ctrl-C does not end it before its containers are gone
            self._dockerd = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        wait_until(lambda: self._dockerd.poll() is not None or self._answers(), "dockerd answers or ends", 60)  # type: ignore[union-attr]
        if self._dockerd.poll() is not None:
            raise EngineError(f"dockerd does not start:\n{log.read_text()[-3000:]}")

    def docker(self, *arguments: str, stdin: Any = None) -> str:
        """What docker prints. Raises EngineError with its words where it fails."""
        return _run("docker", *arguments, env=self.environment, stdin=stdin)

    def close(self) -> None:
        """End it with every container, and take away its folder, bridges, firewall rules and mounts."""
        try:
            if self._dockerd is not None and self._dockerd.poll() is None:
                with suppress(EngineError):
                    containers = self.docker("ps", "--all", "--quiet").split()
                    if containers:
                        self.docker("rm", "--force", "--volumes", *containers)
                    self.docker("network", "prune", "--force")
                self._dockerd.send_signal(signal.SIGTERM)
                try:
                    self._dockerd.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    Process(self._dockerd.pid, "").kill()
            for process in self.processes():
                process.kill()
        finally:
            for mount in reversed(self.mounts()):
                _run("umount", "--lazy", mount)
            shutil.rmtree(self.directory)
            self._clean_the_network()

    def processes(self) -> list[Process]:
        """Those that name its folder in their command: the engine, containerd and what stands over containers."""
        return [process for process, _ in _processes() if str(self.directory) in _command(process)]

    def mounts(self) -> list[str]:
        lines = Path("/proc/mounts").read_text().splitlines()
        return [line.split()[1] for line in lines if str(self.directory) in line.split()[1]]

    def _answers(self) -> bool:
        try:
            self.docker("version")
        except EngineError:
            return False
        return True

    def _clean_the_network(self) -> None:
        if not self._firewall:
            return  # nothing was changed
        _run("ip", "link", "delete", self._bridge)
        for table, before in self._firewall.items():
            new = [rule.split() for rule in _rules(table) if rule not in before]
            for rule in new:
                if rule[0] == "-A":
                    _run("iptables", "-t", table, "-D", *rule[1:])
            for rule in new:
                if rule[0] == "-N":
                    _run("iptables", "-t", table, "-X", rule[1])
            for policy in before:
                if policy.startswith("-P"):
                    _run("iptables", "-t", table, *policy.split())
        Path("/proc/sys/net/ipv4/ip_forward").write_text(self._forwards)


def make_images(engine: Engine) -> None:
    """Import the trees, making those that are not kept from an earlier run, and build what stands in for each image."""
    for tree, file in _trees(engine.directory).items():
        with file.open("rb") as tar:
            engine.docker("import", "-", tree, stdin=tar)
    context = engine.directory / "context"
    shutil.copytree(IMAGES, context)
    shutil.copy(CERTIFICATES, context)  # whom this machine trusts
    # and where it gets its packages
    pip = {"cert": str(CERTIFICATES), "index-url": os.environ.get("PIP_INDEX_URL")}
    (context / "pip.conf").write_text(
        "[global]\n" + "".join(f"{name} = {value}\n" for name, value in pip.items() if value)
    )
    for name in sorted(names_of_images()):
        target = name.partition(":")[0].rpartition("/")[2]
        engine.docker("build", "--quiet", "--target", target, "--tag", name, str(context))
    shutil.rmtree(context)


def names_of_images() -> set[str]:
    """Those that docker-compose.yml and the Dockerfile ask a registry for."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    return {service["image"] for service in services if "/vote-aggregator:" not in service["image"]} | {
        "python:3.11-slim"
    }


def _trees(directory: Path) -> dict[str, Path]:
    """The tar file of each tree. The name follows from what is in it."""
    files = {
        tree: CACHE / f"{tree}-{hashlib.sha256(packages.encode()).hexdigest()[:8]}.tar"
        for tree, packages in TREES.items()
    }
    failures: list[str] = []

    def make(tree: str) -> None:
        try:
            _make_tree(directory / tree, tree, files[tree])
        except EngineError as exc:
            failures.append(str(exc))

    threads = [threading.Thread(target=make, args=[tree]) for tree, file in files.items() if not file.exists()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise EngineError(failures[0])
    return files


def _make_tree(root: Path, suite: str, file: Path) -> None:
    print(f"making a tree of Debian's {suite} (some minutes, the first time) ...", file=sys.stderr)
    _run("debootstrap", "--variant=minbase", "--include=ca-certificates", suite, str(root))
    (root / "etc/dpkg/dpkg.cfg.d/fast").write_text("force-unsafe-io\n")
    start_nothing = root / "usr/sbin/policy-rc.d"
    start_nothing.write_text("#!/bin/sh\nexit 101\n")
    start_nothing.chmod(0o755)
    apt = ["chroot", str(root), "apt-get"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(*apt, "install", "-y", "-qq", "--no-install-recommends", *TREES[suite].split(), env=environment)
    _run(*apt, "clean")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        _run("tar", "--directory", str(root), "--create", "--file", str(part), ".")
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    shutil.rmtree(root)


def _rules(table: str) -> list[str]:
    return _run("iptables", "-t", table, "-S").splitlines()


def _run(*command: str, env: Mapping[str, str] | None = None, stdin: Any = None) -> str:
    done = subprocess.run(
        command, env=env, stdin=stdin or subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )
    if done.returncode != 0:
        raise EngineError(f"{' '.join(command[:3])} fails: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def _name(process: Process) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process.pid}/comm").read_text().strip()
    return ""


def _command(process: Process) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
