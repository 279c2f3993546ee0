"""Each broken service is found by a scenario that the real one passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.local_services import LocalServices
from tests.faults.lab import Lab
from tests.faults.mutants import MUTANTS, Mutant
from tests.faults.oracle import Violation

PATIENCE_SECONDS = 15.0  # some mutants are found by never coming to rest


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_suite_finds(
    services: LocalServices, tmp_path: Path, mutant: Mutant, capsys: pytest.CaptureFixture[str]
) -> None:
    """... this one, by the oracle's own word and not by an accident."""
    root = mutant.build(tmp_path / "service")
    for number, (name, scenario) in enumerate(mutant.scenarios().items()):
        with Lab(services, tmp_path / f"lab-{number}", root, PATIENCE_SECONDS) as lab:
            try:
                scenario(lab)
            except Violation as violation:
                with capsys.disabled():
                    print(f"\n{mutant.name:<58} {name}: {str(violation)[:140]}", end="")
                return
    pytest.fail(f"no scenario has found it, tried: {', '.join(mutant.found_by)}")
