"""Each broken service is found by a scenario that the real one passes. HA_MUTANTS=all tries more of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.local_cluster import PostgresPair, RabbitMQCluster
from tests.faults.mutants import Mutant
from tests.faults.oracle import Violation
from tests.ha.lab import HaLab
from tests.ha.mutants import MORE_MUTANTS, MUTANTS
from tests.ha.scenarios import SCENARIOS

PATIENCE_SECONDS = 20.0  # some mutants are found by never coming to rest


TRIED = MUTANTS + (MORE_MUTANTS if os.environ.get("HA_MUTANTS") == "all" else [])


@pytest.mark.parametrize("mutant", TRIED, ids=lambda mutant: mutant.name)
def test_the_suite_finds(
    cluster: RabbitMQCluster, pair: PostgresPair, tmp_path: Path, mutant: Mutant, capsys: pytest.CaptureFixture[str]
) -> None:
    """... this one, by the oracle's own word and not by an accident."""
    root = mutant.build(tmp_path / "service")
    for number, name in enumerate(mutant.found_by):
        try:
            with HaLab(cluster, pair, tmp_path / f"lab-{number}", root, PATIENCE_SECONDS) as lab:
                SCENARIOS[name](lab)
        except Violation as violation:
            with capsys.disabled():
                print(f"\n{mutant.name:<58} {name}: {str(violation)[:140]}", end="")
            return
    pytest.fail(f"no scenario has found it, tried: {', '.join(mutant.found_by)}")
