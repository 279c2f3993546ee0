"""What `pip install .` puts among the packages of an environment."""

from __future__ import annotations

import tomllib

from tests.harness import ROOT


def test_every_module_is_in_the_package() -> None:
    """Else a command of it ends with ModuleNotFoundError."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    modules = {path.name for path in ROOT.glob("*.py")}
    assert set(wheel["only-include"]) == modules | {"init_db.sql", "web"}
