"""The percentages of a law: one rule, held to by every output, against the same rule in fractions."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from math import floor

import pytest

import results_page
import seals
from database import Database, DatabaseUnavailable
from tests.harness import ROOT, Results

Pair = tuple[int, int]
Percents = tuple[str | None, str | None]

PAIRS = 10_000
MOST = 10**15  # what the tables take of each choice
SHOWN_BY_CHECK_DB = 100
RECONCILE = str(ROOT / "reconcile.py")

# 3.125 and 96.875 would both be rounded up; one vote of 20,000 and of 20,001; won by one vote; drawn; no vote at all
EXAMPLES: dict[Pair, Percents] = {
    (1, 31): ("3.13", "96.87"),
    (31, 1): ("96.87", "3.13"),
    (19_999, 1): ("99.99", "0.01"),
    (20_000, 1): ("99.995", "0.005"),
    (1, 20_000): ("0.005", "99.995"),
    (10_001, 10_000): ("50.002", "49.998"),
    (10_001, 9_999): ("50.005", "49.995"),
    (10**15, 10**15 - 1): ("50.00000000000003", "49.99999999999997"),
    (10**15, 1): ("99.9999999999999", "0.0000000000001"),
    (7, 7): ("50.00", "50.00"),
    (10**15, 10**15): ("50.00", "50.00"),
    (0, 3): ("0.00", "100.00"),
    (0, 0): (None, None),
}


def expected(oui: int, non: int) -> Percents:
    """The rule in fractions: the fewest decimals, two at least, that say nothing false of who has votes or leads."""
    if oui == non == 0:
        return None, None
    behind = Fraction(100 * min(oui, non), oui + non)
    for decimals in count(2):
        unit = 10**decimals
        rounded = floor(behind * unit + Fraction(1, 2))
        if (rounded > 0 or behind == 0) and (rounded < 50 * unit or behind == 50):
            break
    less, more = (f"{part // unit}.{part % unit:0{decimals}}" for part in (rounded, 100 * unit - rounded))
    return (less, more) if oui <= non else (more, less)


def random_pairs(rng: random.Random) -> list[Pair]:
    """Counts of all sizes, and those at which a rule may go wrong; the examples first."""

    def amount() -> int:
        return min(MOST, rng.randrange(10 ** rng.randint(1, 15) + 1))

    def halves() -> Pair:
        """A percentage that lies in the middle between two numbers, or a vote beside that."""
        unit = 10 ** rng.randint(2, 9)
        behind = (2 * rng.randrange(25 * unit) + 1) * rng.randint(1, 50)
        return behind, 200 * unit * rng.randint(1, 50) - behind + rng.choice((-1, 0, 0, 1))

    kinds = [
        lambda: (amount(), amount()),
        lambda: (rng.randrange(30), rng.randrange(30)),
        lambda: (0, amount()),
        lambda: (1, amount()),
        lambda: (n := amount(), n),
        lambda: (n := max(1, amount()), n - 1),
        lambda: (n := amount(), max(0, n - rng.randint(1, 1_000))),
        lambda: (rng.randrange(1_000), rng.choice((10**12, MOST))),
        lambda: (rng.choice((10**12, MOST)), rng.choice((10**12, 10**12 + 1, MOST - 1, MOST))),
        halves,
    ]
    pairs = list(EXAMPLES)
    while len(pairs) < PAIRS:
        oui, non = rng.choice(kinds)()
        if 0 <= oui <= MOST and 0 <= non <= MOST:
            pairs.append((oui, non) if rng.random() < 0.5 else (non, oui))
    return pairs


@pytest.fixture
def database(results: Results) -> Iterator[Database]:
    with Database(results.url, pool_min=1, pool_max=2, timeout=30, instance="replica-1") as database:
        database.initialise_schema()
        yield database


@pytest.fixture
def pairs(database: Database, results: Results) -> dict[str, Pair]:
    """The counts of 10,000 laws, by their law_id, as they stand in the database."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    pairs = {f"law-{number:05}": pair for number, pair in enumerate(random_pairs(random.Random(seed)))}
    oui, non = (list(counts) for counts in zip(*pairs.values(), strict=True))
    results.query(
        "INSERT INTO vote_results (law_id, oui_count, non_count)"
        " SELECT * FROM unnest(%s::text[], %s::bigint[], %s::bigint[])",
        *(list(pairs), oui, non),
    )
    return pairs


def run(results: Results, *command: str) -> str:
    """What a command of the project prints that reads this database."""
    done = subprocess.run(
        [sys.executable, *command],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "DATABASE_URL": results.url},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT / "tests",  # where no .env is
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def page_of(database: Database) -> results_page.Snapshot:
    cache = results_page.ResultsCache(database.read, DatabaseUnavailable)
    cache.refresh()
    assert cache.latest is not None
    return cache.latest


def in_json(text: str | bytes) -> dict[str, Percents]:
    """With the digits that stand there, which a float would not keep."""
    laws = json.loads(text, parse_float=lambda digits: digits)["laws"]
    return {law["law_id"]: (law["oui_percent"], law["non_percent"]) for law in laws}


def in_csv(text: str) -> dict[str, Percents]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return {row["law_id"]: (row["oui_percent"] or None, row["non_percent"] or None) for row in rows}


def in_table(text: str) -> dict[str, Percents]:
    """Of lines that begin with a law, without a title: law, oui, non, total, and percentages where there are votes."""
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("law-")]
    return {line[0]: (None, None) if line[3] == "0" else (line[4], line[5]) for line in lines}


@pytest.mark.parametrize(("oui", "non"), EXAMPLES)
def test_the_rule_is_that_of_the_documents(oui: int, non: int) -> None:
    """The oracle of this file against numbers worked out by hand."""
    assert expected(oui, non) == EXAMPLES[oui, non]


def test_every_output_says_the_same_digits(
    pairs: dict[str, Pair], database: Database, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """View, page, CSV, JSON and command line, of 10,000 laws."""
    monkeypatch.setitem(results_page.LIMITS, "laws", PAIRS)
    wanted = {law_id: expected(*pair) for law_id, pair in pairs.items()}
    page = page_of(database)
    outputs = {
        "the view": {
            law_id: percents
            for law_id, *percents in results.query(
                "SELECT law_id, oui_percent::text, non_percent::text FROM vote_statistics"
            )
        },
        "/results.json": in_json(page.json),
        "/results.csv": in_csv(page.csv.decode("utf-8-sig")),
        "results --json": in_json(run(results, RECONCILE, "results", "--json")),
        "results --csv": in_csv(run(results, RECONCILE, "results", "--csv")),
        "results": in_table(run(results, RECONCILE, "results")),
    }
    assert results.query(seals.SELECT_SHOWN_OTHERWISE) == []  # `verify` finds nothing false in them
    for name, said in outputs.items():
        assert said.keys() == pairs.keys(), name
        wrong = {pairs[law_id]: said[law_id] for law_id in pairs if tuple(said[law_id]) != wanted[law_id]}
        assert wrong == {}, name


def test_check_db_says_the_same_of_its_laws_and_of_all(pairs: dict[str, Pair], results: Results) -> None:
    """It prints the first hundred, and the sum of all."""
    printed = run(results, "-m", "scripts.check_db")
    first = list(pairs)[:SHOWN_BY_CHECK_DB]
    assert in_table(printed) == {law_id: expected(*pairs[law_id]) for law_id in first}
    (of_all,) = [line.split() for line in printed.splitlines() if line.startswith("  all ")]
    sums = [sum(counts) for counts in zip(*pairs.values(), strict=True)]
    assert of_all[1:] == [f"{number:,}" for number in (*sums, sum(sums))] + list(expected(*sums))


def test_small_counts_are_right_without_exception(database: Database, results: Results) -> None:
    """All pairs up to 120, and what the rule promises of each."""
    rows = results.query(
        "SELECT oui, non, vote_percent(oui, non)::text, vote_percent(non, oui)::text"
        " FROM generate_series(0, 120) AS oui, generate_series(0, 120) AS non"
    )
    assert [row for row in rows if row[2:] != expected(*row[:2])] == []
    for oui, non, *percents in rows[1:]:
        shown = [Fraction(percent) for percent in percents]
        assert sum(shown) == 100
        assert [percent == 0 for percent in shown] == [oui == 0, non == 0]
        assert (shown[0] > 50, shown[1] > 50) == (oui > non, non > oui)


def test_the_laws_that_are_left_out_have_percentages_too(database: Database, results: Results) -> None:
    """Those of their sum; here one vote against 20,000."""
    results.query(
        "INSERT INTO laws (law_id, title) SELECT 'law-' || n, 'On ' || n FROM generate_series(1, %s) AS n",
        results_page.MAX_LAWS,
    )
    results.query("INSERT INTO vote_results VALUES ('other-1', 12000, 0), ('other-2', 8000, 1)")
    *_, last = csv.DictReader(io.StringIO(page_of(database).csv.decode("utf-8-sig")))
    assert list(last.values())[:7] == ["__other__", "2 other laws", "20000", "1", "20001", "99.995", "0.005"]


STATES = """
    INSERT INTO vote_results VALUES ('law-0', 1, 2);
    INSERT INTO laws (law_id, title, status, opens_at, closes_at) VALUES
        ('law-1', '', 'open', NULL, NULL), ('law-2', '', 'closed', NULL, NULL), ('law-4', '', 'closed', NULL, NULL),
        ('law-3', '', 'open', NULL, '2020-01-01Z')
"""


def test_every_output_has_the_same_word_for_a_state(database: Database, results: Results) -> None:
    """A law that nothing is known of is open."""
    results.query(STATES)
    results.certify("law-4")
    wanted = dict(zip((f"law-{n}" for n in range(5)), ("open", "open", "closed", "closed", "certified"), strict=True))
    page = page_of(database)
    assert dict(results.query("SELECT law_id, status FROM vote_statistics")) == wanted
    for text in (page.json, run(results, RECONCILE, "results", "--json")):
        assert {law["law_id"]: law["status"] for law in json.loads(text)["laws"]} == wanted
    for table in (page.csv.decode("utf-8-sig"), run(results, RECONCILE, "results", "--csv")):
        assert {row["law_id"]: row["status"] for row in csv.DictReader(io.StringIO(table))} == wanted
    lines = [line.split() for line in run(results, RECONCILE, "results").splitlines() if line.startswith("law-")]
    assert {line[0] for line in lines if wanted[line[0]] in line} == set(wanted)
