"""Every step of a batch times kill, error and stall: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab
from tests.faults.moments import FAULTS, STEPS, Step, try_moment


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_replica_loses_nothing_when_it(lab: Lab, step: Step, fault: str) -> None:
    """... is at this step and this happens."""
    try_moment(lab, step, fault)
