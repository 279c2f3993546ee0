"""What stands in the database, at a glance: what `make check-db` runs.

The database is read from the environment and .env, as the service does it (DATABASE_URL or POSTGRES_*).
Exit codes: 0 printed, 1 the database cannot be reached or has no tables yet, 2 wrong settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import psycopg2

from config import InvalidSettings, database_url, environment, redact_url
from reconcile import printable

CONNECT_SECONDS = 5

TOTALS = """
    SELECT law_id, oui_count, non_count, total_count, oui_percent::text, non_percent::text,
           coalesce(title, '')
    FROM vote_statistics ORDER BY law_id LIMIT 100
"""
SUM_OF_TOTALS = """
    SELECT laws, oui, non, oui + non, vote_percent(oui, non)::text, vote_percent(non, oui)::text
    FROM (SELECT count(*) AS laws,
                 coalesce(sum(oui_count), 0)::bigint AS oui,
                 coalesce(sum(non_count), 0)::bigint AS non
          FROM vote_statistics) AS all_laws
"""
DUPLICATES = """
    SELECT reason, count(*), count(DISTINCT vote_id), to_char(max(detected_at), 'YYYY-MM-DD HH24:MI:SS')
    FROM ONLY duplicate_attempts GROUP BY reason ORDER BY 2 DESC, 1
"""
REJECTED = """
    SELECT reason, count(*), sum(times_seen)::bigint, to_char(max(last_seen_at), 'YYYY-MM-DD HH24:MI:SS')
    FROM ONLY rejected_messages GROUP BY reason ORDER BY 2 DESC, 1
"""


def main() -> int:
    """Print totals, duplicates and rejected messages and return the exit code."""
    try:
        url = database_url(environment())
    except InvalidSettings as exc:
        print(*exc.faults, "or start local servers with: make run", sep="\n", file=sys.stderr)
        return 2
    try:
        connection = psycopg2.connect(
            url, connect_timeout=CONNECT_SECONDS, application_name="check-db", client_encoding="UTF8"
        )
        try:
            connection.set_session(isolation_level="REPEATABLE READ", readonly=True)  # all of one moment
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL search_path = public, pg_temp")
                queries = {name: _fetch(cursor, name) for name in (TOTALS, SUM_OF_TOTALS, DUPLICATES, REJECTED)}
        finally:
            connection.close()
    except psycopg2.errors.UndefinedTable:
        print(f"{redact_url(url)} has no tables yet: the service makes them when it starts", file=sys.stderr)
        return 1
    except psycopg2.Error as exc:
        first_line = str(exc).strip().partition("\n")[0]
        print(f"cannot read {redact_url(url)}: {first_line}", file=sys.stderr)
        return 1
    print(report(queries[TOTALS], queries[SUM_OF_TOTALS][0], queries[DUPLICATES], queries[REJECTED]))
    return 0


def _fetch(cursor: Any, query: str) -> list[tuple[Any, ...]]:
    cursor.execute(query)
    rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


def report(
    totals: Sequence[tuple[Any, ...]],
    sums: tuple[Any, ...],
    duplicates: Sequence[tuple[Any, ...]],
    rejected: Sequence[tuple[Any, ...]],
) -> str:
    """The page that is printed, of the rows of the queries above."""
    laws, *of_all = sums
    lines = ["votes counted", _row("law", "oui", "non", "total", "oui %", "non %")]
    lines += [
        f"{_row(law_id, oui_count, non_count, count, oui_percent, non_percent)}  {title}".rstrip()
        for law_id, oui_count, non_count, count, oui_percent, non_percent, title in totals
    ]
    if laws > len(totals):
        lines.append(f"  ... and {laws - len(totals):,} more laws")
    lines += [_row("all", *of_all), ""]
    lines += _reasons("not counted, duplicates", ("attempts", "votes"), duplicates)
    lines += ["", *_reasons("not counted, rejected", ("messages", "times seen"), rejected)]
    return "\n".join(map(printable, lines))


def _reasons(title: str, columns: tuple[str, str], rows: Sequence[tuple[Any, ...]]) -> list[str]:
    if not rows:
        return [f"{title}: none"]
    lines = [title, f"{'  reason':<26} {columns[0]:>11} {columns[1]:>11}  last seen"]
    return lines + [f"  {reason:<24} {number:>11,} {other:>11,}  {last}" for reason, number, other, last in rows]


def _row(law_id: str, *cells: Any) -> str:
    return f"  {law_id:<24} " + " ".join(f"{_cell(cell):>11}" for cell in cells)


def _cell(cell: Any) -> str:
    """A heading, a number of votes, or a percentage, which is unknown where nobody has voted."""
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


if __name__ == "__main__":
    sys.exit(main())
