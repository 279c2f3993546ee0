"""The version has one home, observability.VERSION; what cannot read it there says the same."""

from __future__ import annotations

import re

from observability import VERSION
from tests.harness import ROOT


def test_every_image_is_of_this_version() -> None:
    """The image's own label, and each place that names it."""
    files = [ROOT / "Dockerfile", ROOT / "docker-compose.yml", *(ROOT / "deploy/kubernetes").glob("*.yaml")]
    named = [
        (file.name, found)
        for file in files
        for found in re.findall(r'image\.version="([^"]+)"|vote-aggregator:([\w.-]+)', file.read_text())
    ]
    assert {name for name, _ in named} >= {"Dockerfile", "docker-compose.yml", "deployment.yaml", "sealer.yaml"}
    assert {"".join(found) for _, found in named} == {VERSION}


def test_the_changelog_has_this_version_on_top() -> None:
    """Below what is not released yet."""
    headings = re.findall(r"^## (\d\S*)", (ROOT / "docs/CHANGELOG.md").read_text(), re.M)
    assert headings[0] == VERSION
