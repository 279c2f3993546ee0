"""The node peer, bench/peer/peer.js, as a process that is measured like the service."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lab.service import ROOT, ServiceProcess

PEER = ROOT / "bench" / "peer"
INSTALLED = ROOT / ".local" / "bench" / "peer"  # its packages, as the lock file names them
LOCK = "package-lock.json"
INSTALL_SECONDS = 180.0


class NodePeer(ServiceProcess):
    """It says that it consumes, and ends after SIGTERM, as the service does; it has no port."""

    def __init__(self, log: Path, settings: Mapping[str, str], prefetch: int, batch: int) -> None:
        super().__init__(log, {"NODE_PATH": str(INSTALLED / "node_modules"), **settings})
        self._command = ["node", str(PEER / "peer.js"), str(prefetch), str(batch)]


def versions() -> dict[str, str]:
    """Of node and of the peer's clients; nothing where there is no node."""
    if shutil.which("node") is None:
        return {}
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {"node": node.removeprefix("v"), **json.loads((PEER / "package.json").read_text())["dependencies"]}


def install() -> str:
    """Have npm fetch its packages, unless they are there already. Returns why there is no peer; else nothing."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    done, lock = INSTALLED / "done", (PEER / LOCK).read_text()
    if done.exists() and done.read_text() == lock:
        return ""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    INSTALLED.mkdir(parents=True)
    for name in ("package.json", LOCK):
        shutil.copy(PEER / name, INSTALLED)
    command = ["npm", "ci", "--loglevel=error", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        subprocess.run(
            command, cwd=INSTALLED, check=True, capture_output=True, env=dict(os.environ), timeout=INSTALL_SECONDS
        )
    except subprocess.CalledProcessError as exc:
        return f"npm ci fails: {exc.stderr.decode(errors='replace').strip()}"
    except subprocess.TimeoutExpired:
        return f"npm ci takes more than {INSTALL_SECONDS:.0f} s"
    done.write_text(lock)
    return ""
