"""What pyproject.toml says: the package that `pip install .` makes, and how tests are found."""

from __future__ import annotations

import subprocess
import sys
import tomllib

from tests.harness import ROOT


def test_every_module_is_in_the_package() -> None:
    """Else a command of it ends with ModuleNotFoundError."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    modules = {path.name for path in ROOT.glob("*.py")}
    assert set(wheel["only-include"]) == modules | {"init_db.sql", "web"}


def test_all_tests_can_be_collected_together() -> None:
    """As `pytest tests/` does: files of one name in two folders are two files."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
