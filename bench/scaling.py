"""What a vote takes on disk, and what one hot row lets through: the figures of docs/SCALING.md.

    .venv/bin/python -m bench.scaling [--rows 500000] [--seconds 5]

On a PostgreSQL of its own with its default settings. The second part uses pgbench, a program of PostgreSQL.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg2

from database import SCHEMA_FILE
from scripts import local_services
from scripts.local_services import PostgresServer, exit_on_signals

CONNECTIONS = (1, 2, 4, 8)

# random identities, every second vote with a voter_hash of 64 characters
FILL = """
    INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, instance, redelivered)
    SELECT gen_random_uuid(), 'law-' || to_char(n %% 20, 'FM000'), CASE WHEN n %% 3 = 0 THEN 'oui' ELSE 'non' END,
           now(), CASE WHEN n %% 2 = 0 THEN encode(sha256(n::text::bytea), 'hex') END,
           'aggregator-0123456789ab:1', false
    FROM generate_series(1, %s) AS n
"""
BYTES = """
    SELECT pg_relation_size('vote_audit') / count(*), pg_relation_size('vote_audit_pkey') / count(*),
           pg_relation_size('vote_audit_law_voter') / count(voter_hash), pg_relation_size('vote_audit_txid') / 1024
    FROM vote_audit
"""
UPSERT = """
    INSERT INTO vote_results (law_id, oui_count, non_count) VALUES ('{law}', 1, 0)
    ON CONFLICT (law_id) DO UPDATE SET oui_count = vote_results.oui_count + EXCLUDED.oui_count;
"""


def main() -> int:
    """Measure and print; the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=500_000, help="votes in the audit log (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="of each run of pgbench (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="votes-bench-") as folder:
        exit_on_signals()
        with PostgresServer(Path(folder) / "postgres") as server:
            print_bytes(server.url(), options.rows)
            print_upserts(server.url(), Path(folder), options.seconds)
    return 0


def print_bytes(url: str, rows: int) -> None:
    """Fill the audit log and divide the sizes of its parts by its rows."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(SCHEMA_FILE.read_text(encoding="utf-8"))
        cursor.execute(FILL, (rows,))
        cursor.execute("VACUUM vote_audit")
        cursor.execute(BYTES)
        (sizes,) = cursor.fetchall()
    connection.close()
    print(f"bytes a vote, of {rows:,}, every second one with a voter_hash: row {sizes[0]}, primary key {sizes[1]}")
    print(f"  index of law and voter {sizes[2]} for each that has one, index of transactions {sizes[3]} KiB in all")


def print_upserts(url: str, folder: Path, seconds: int) -> None:
    """Upserts of one row a transaction, from several connections, on one law and on a law each."""
    print(f"upserts a second, {seconds} s each\n  connections  one law  each its own")
    for connections in CONNECTIONS:
        rates = [upserts(url, folder, seconds, connections, law) for law in ("hot", "own-:client_id")]
        print(f"  {connections:11}  {rates[0]:7,.0f}  {rates[1]:12,.0f}")


def upserts(url: str, folder: Path, seconds: int, connections: int, law: str) -> float:
    """Transactions a second, as pgbench says."""
    script = folder / "upsert.sql"
    script.write_text(" ".join(UPSERT.format(law=law).split()) + "\n")
    program = local_services._find_program("pgbench", local_services._find_postgres())
    command = [program, "--no-vacuum", f"--client={connections}", f"--jobs={connections}", f"--time={seconds}"]
    done = subprocess.run(
        [*command, f"--file={script}", url],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


if __name__ == "__main__":
    sys.exit(main())
