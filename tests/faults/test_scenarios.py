"""Single faults, on links, processes and the real servers: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab
from tests.faults.scenarios import SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_lost_or_counted_twice_through(lab: Lab, scenario: str) -> None:
    """... this."""
    SCENARIOS[scenario](lab)
