"""Every step of a batch times kill, error and stall: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab
from tests.faults.scenarios import MOMENTS


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_lost_or_counted_twice_when(lab: Lab, moment: str) -> None:
    """... this happens."""
    MOMENTS[moment](lab)
