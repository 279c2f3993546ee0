"""The benchmark's gate: figures of a service that does less than it should are void."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import lab as bench_lab
from bench import node_peer, sections
from bench.lab import SPEC, Lab, Void
from scripts import local_services
from test_publisher import in_arrays, make_messages
from tests.faults.mutants import Mutant


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    missing = local_services.missing_packages()
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with Lab(tmp_path_factory.mktemp("bench")) as running:
        yield running


def drain(lab: Lab, duplicates: int = 0, peer: bool = False, box: int = 1) -> bench_lab.Drain:
    messages = list(in_arrays(make_messages(300, 3, seed=1, duplicates=duplicates), box))
    with lab.queue(messages) as queue, lab.database() as url:
        return lab.drain(queue, url, messages, SPEC, peer=peer)


def test_the_figures_of_the_unmodified_service_stand(lab: Lab) -> None:
    """Those of a drain, of the bare consumer, and of votes that come when they are due."""
    measured = drain(lab, duplicates=20)
    assert (measured.messages, measured.rate > 0) == (360, True)
    messages = list(make_messages(300, 3, seed=1))
    with lab.queue(messages) as queue:
        assert lab.drain_bare(queue, len(messages), SPEC).rate > 0
    figure = sections._steady(lab, 200, 1, SPEC)
    assert 0 < figure["p50"] <= figure["p99"] <= figure["max"]


def test_figures_of_arrays_are_those_of_their_votes(lab: Lab) -> None:
    """Of the service, and of PostgreSQL alone, which has to pass the same gate."""
    assert drain(lab, duplicates=20, box=50).messages == 360
    messages = list(make_messages(300, 3, seed=1))
    with lab.queue() as queue, lab.database() as url:
        assert lab.write_alone(queue, url, messages, SPEC).messages == 300
    assert sections._steady(lab, 200, 1, SPEC, box=20)["p50"] > 0


CONSUMES_BEFORE_IT_SAYS_SO = """\
            self._client.start_consuming()
            for deliveries in self._client.receive(1.0):
                self._receive(deliveries)
            self._hand_off.flush()
            time.sleep(0.5)
"""
ADDED = "SELECT law_id, added.oui, added.non FROM added"
# what is left out: the replacement that does it, and why its figures are void
LAZY = {
    "each vote counted twice": (
        ("init_db.sql", ADDED, ADDED.replace("added.oui, added.non", "2 * added.oui, 2 * added.non")),
        "not those of the audit log",
    ),
    "voters exchanged": (
        (
            "database.py",
            "_array_or_null(hashes)",
            "_array_or_null(hashes[::-1])",
        ),
        "as they were published",
    ),
    "the time of writing for that of the vote": (
        (
            "init_db.sql",
            "    began_at := now();\n",
            "    began_at := now();\n    moments := array_fill(now(), ARRAY[cardinality(vote_ids)]);\n",
        ),
        "as they were published",
    ),
    "copies not recorded": (
        (
            "init_db.sql",
            "            WHERE outcome IN ('duplicate',",
            "            WHERE false AND outcome IN ('duplicate',",
        ),
        "copies are recorded",
    ),
    "a log that a crash empties": (
        ("init_db.sql", "CREATE TABLE IF NOT EXISTS vote_audit", "CREATE UNLOGGED TABLE IF NOT EXISTS vote_audit"),
        "not durable",
    ),
    "commits that do not wait for the log": (
        (
            "init_db.sql",
            "CREATE TABLE IF NOT EXISTS vote_audit",
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$;"
            " CREATE TABLE IF NOT EXISTS vote_audit",
        ),
        "does not keep what it has committed",
    ),
    "a clock that starts late": (
        ("aggregator.py", "            self._client.start_consuming()\n", CONSUMES_BEFORE_IT_SAYS_SO),
        "before the clock",
    ),
}


@pytest.mark.parametrize("what", LAZY)
def test_the_figures_of_a_service_that_does_less_are_void(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Whatever was left out would have made it faster."""
    replacement, why = LAZY[what]
    monkeypatch.setattr(bench_lab, "ROOT", Mutant(what, [replacement], []).build(tmp_path / "service"))
    with pytest.raises(Void, match=why):
        drain(lab, duplicates=20 if what == "copies not recorded" else 0)


def test_the_node_peer_is_held_to_the_same_gate(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures stand; those of one that counts too much are void."""
    missing = node_peer.install()
    if missing and "CI" not in os.environ:
        pytest.skip(missing)
    assert not missing
    assert drain(lab, peer=True).rate > 0
    assert drain(lab, peer=True, box=50).messages == 300
    text = (node_peer.PEER / "peer.js").read_text()
    assert "total.oui_count + EXCLUDED" in text
    (tmp_path / "peer.js").write_text(text.replace("total.oui_count + EXCLUDED", "1 + total.oui_count + EXCLUDED"))
    monkeypatch.setattr(node_peer, "PEER", tmp_path)
    with pytest.raises(Void, match="not those of the audit log"):
        drain(lab, peer=True)
