"""The lab for one test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_services import LocalServices
from tests.faults.lab import Lab


@pytest.fixture
def lab(services: LocalServices, tmp_path: Path) -> Iterator[Lab]:
    """Replicas behind proxies, a publisher with a ledger, and the oracle."""
    with Lab(services, tmp_path) as lab:
        yield lab
