"""A verifier in another language, made after docs/VERIFY.md alone: it agrees with ours on what is true."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest

import reconcile
import seals
from database import Database
from scripts.local_services import LocalServices
from tests.conftest import empty_database
from tests.harness import Queue, Results, vote
from tests.integration.test_audit_log import count, some_votes
from tests.verifier.documents import Document, Documents

VERIFIER = Path(__file__).with_name("verify.js")
SEED = int(os.environ.get("VERIFIER_SEED") or random.SystemRandom().randrange(10**6))
VOTES = 100_000


@pytest.fixture(scope="module")
def node() -> str:
    program = shutil.which("node")
    if program is None and "CI" not in os.environ:
        pytest.skip("node is not installed")
    return program or "node"


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_node(node: str) -> Run:
    """Runs the verifier."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [node, str(VERIFIER), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_the_verifier_is_short_and_needs_no_package() -> None:
    """So that somebody who wants to know what it does can read it."""
    text = VERIFIER.read_text()
    assert len(text.splitlines()) < 150
    assert text.count("require(") == text.count('require("node:') == 3


def test_true_documents_are_accepted_and_altered_ones_refused(run_node: Run, tmp_path: Path) -> None:
    """By Node, and of proofs by our own check, too: each of more than forty."""
    print("VERIFIER_SEED =", SEED)
    documents = Documents(SEED)

    def ends(document: Document, *published: str) -> int:
        file = tmp_path / "document.json"
        file.write_text(document.json)
        return run_node(document.kind, file, *published).returncode

    mixed = Documents(SEED, formats=(1, 1, 2, 3, 3))
    for true in (mixed.proof(), mixed.chain(), mixed.hashes()):
        assert ends(true) == ends(true, true.published) == 0
    assert seals.check_proof(json.loads(mixed.proof().json), mixed.published) == mixed.published
    for true in (documents.proof(), documents.chain(), documents.hashes()):
        assert ends(true) == ends(true, true.published) == ends(true, documents.seals[1].name(), true.published) == 0
    assert seals.check_proof(json.loads(documents.proof().json), documents.published) == documents.published
    altered = documents.altered()
    assert len({document.name for document in altered}) == len(altered) >= 40
    for document in altered:
        assert ends(document, document.published) == 1, document.name
        if document.kind == "proof":
            with pytest.raises(ValueError):
                seals.check_proof(json.loads(document.json), document.published)


def test_all_checks_agree_on_the_form_of_documents(
    run_node: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is made up as a whole so that all hashes fit is refused where docs/VERIFY.md does not know its form."""
    print("VERIFIER_SEED =", SEED)
    documents = Documents(SEED)
    file = tmp_path / "document.json"

    def ends(kind: str) -> set[int]:
        """The exit codes of those that check such a document."""
        done = run_node(kind, file)
        assert done.stderr == ""
        return {done.returncode, *([reconcile.main(["check-proof", str(file)])] if kind == "proof" else [])}

    wrong = {}
    for document in documents.malformed():
        file.write_text(document.json)
        wrong[document.name] = ends(document.kind)
    for name, content in documents.no_json():
        file.write_bytes(content)
        wrong[name] = ends("proof") - {2}  # a file that cannot be read
    assert {name: codes for name, codes in wrong.items() if codes - {1}} == {}
    for document in documents.unusual():
        file.write_text(document.json)
        assert ends(document.kind) == {0}, document.name


def test_wrong_usage_is_exit_code_2(run_node: Run) -> None:
    """And no verdict."""
    for wrong in ((), ("proof",), ("nonsense", "x"), ("export", "x"), ("proof", "x", "1:xyz")):
        done = run_node(*wrong)
        assert (done.returncode, done.stdout) == (2, ""), wrong


# --- whole logs ------------------------------------------------------------------------------------------------------


def verify(results: Results, published: str) -> list[str]:
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        return [problem.text for problem in seals.verify(conn, [published]).problems]


def export(results: Results, folder: Path) -> tuple[Path, Path]:
    files = folder / "audit.jsonl", folder / "seals.json"
    with (
        contextlib.closing(psycopg2.connect(results.url)) as conn,
        files[0].open("w") as out,
        files[1].open("w") as more,
    ):
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        reconcile.export_audit(conn, out, more)
    return files


def certify(results: Results, services: LocalServices, queue: Queue) -> None:
    broker = {
        "AMQP_URL": queue.url,
        "RABBITMQ_QUEUE": queue.name,
        "RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url(),
    }
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        reconcile.certify(conn, "law-c", broker, "a test", settle_seconds=0)


def seal(results: Results, votes_a_seal: int = seals.VOTES_A_SEAL) -> list[seals.Seal]:
    with seals.sealing_session(results.url) as (reader, writer):
        return seals.seal(reader, writer, votes_a_seal)


def test_an_export_of_many_votes_is_verified(
    run_node: Run, database: Database, results: Results, tmp_path: Path
) -> None:
    """With every form that a field may have; and each of the alterations of its files is found."""
    for batch in range(20):
        results.query(
            "INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, instance, redelivered)"
            " SELECT gen_random_uuid(), 'law-' || n %% 7, CASE WHEN n %% 3 = 0 THEN 'oui' ELSE 'non' END,"
            " CASE WHEN n %% 5 > 0 THEN now() - n * interval '1 ms 10 us' END,"
            " CASE WHEN n %% 2 = 0 THEN md5(random()::text) END, E'a\\\\b\\t\\n\\x01é\\u2028\"', n %% 11 = 0"
            " FROM generate_series(1, %s) AS n",
            VOTES // 20,
        )
        assert batch < 20
    results.query(
        "INSERT INTO vote_results SELECT law_id, count(*) FILTER (WHERE choice = 'oui'),"
        " count(*) FILTER (WHERE choice = 'non') FROM vote_audit GROUP BY law_id"
    )
    made = seal(results, VOTES // 6)
    assert verify(results, made[-1].name()) == []
    audit, chain = export(results, tmp_path)
    done = run_node("export", audit, chain, made[-1].name(), made[0].name())
    assert (done.returncode, done.stdout) == (
        0,
        f"{VOTES} votes in {len(made)} seals computed anew, 0 not sealed; newest seal {made[-1].name()}\n",
    )
    print("VERIFIER_SEED =", SEED)
    chance = random.Random(SEED)
    lines = audit.read_text().rstrip("\n").split("\n")
    at = chance.randrange(VOTES)
    vote = json.loads(lines[at])
    for changed in (
        [*lines[:at], *lines[at + 1 :]],
        [*lines[:at], lines[at], *lines[at:]],
        [*lines[:at], json.dumps(vote | {"choice": "non" if vote["choice"] == "oui" else "oui"}), *lines[at + 1 :]],
        [*lines[:at], json.dumps(vote | {"instance": "b"}), *lines[at + 1 :]],
        lines[::-1],
    ):
        audit.write_text("\n".join(changed) + "\n")
        assert run_node("export", audit, chain).returncode == 1


def test_an_export_in_another_form_is_refused(
    run_node: Run, database: Database, results: Results, tmp_path: Path
) -> None:
    """Also where a reader that takes more than it should would compute the same hashes, and in votes without a seal."""
    count(database, *some_votes(1))
    (made,) = seal(results)
    count(database, *some_votes(2))
    audit, chain = export(results, tmp_path)
    lines = audit.read_text().rstrip("\n").split("\n")
    sealed, unsealed = json.loads(lines[0]), json.loads(lines[-1])
    at = sealed["recorded_at"].replace("T", " ").replace("+00:00", "+00")
    for change in ({"redelivered": int(sealed["redelivered"])}, {"txid": str(sealed["txid"])}, {"recorded_at": at}):
        audit.write_text("\n".join([json.dumps(sealed | change), *lines[1:]]) + "\n")
        assert run_node("export", audit, chain, made.name()).returncode == 1, change
    other = "NON" if unsealed["choice"] == "non" else "OUI"
    for change in ({"choice": other}, {"vote_id": unsealed["vote_id"].upper()}, {"instance": "\ud800"}):
        audit.write_text("\n".join([*lines[:-1], json.dumps(unsealed | change)]) + "\n")
        assert run_node("export", audit, chain, made.name()).returncode == 1, change
    text = json.dumps(unsealed | {"instance": "\ufffd"}, ensure_ascii=False).encode()
    audit.write_bytes("\n".join(lines[:-1]).encode() + b"\n" + text.replace("\ufffd".encode(), b"\xff"))
    assert run_node("export", audit, chain, made.name()).returncode == 1
    audit.write_text("\n".join(lines) + "\n")
    assert run_node("export", audit, chain, made.name()).returncode == 0


FITTING = (
    "UPDATE vote_results AS r SET oui_count = oui, non_count = non FROM (SELECT law_id,"
    " count(*) FILTER (WHERE choice = 'oui') AS oui, count(*) FILTER (WHERE choice = 'non') AS non"
    " FROM vote_audit GROUP BY law_id) AS a WHERE a.law_id = r.law_id"
)
A_ROW = "(SELECT vote_id FROM vote_audit WHERE txid < (SELECT max(to_txid) FROM audit_seals) ORDER BY random() LIMIT 1)"
A_SEAL = "WHERE seal_id = (SELECT 1 + floor(random() * 4))"  # one; without SELECT a number for each row, and maybe none
TAMPERED = {
    "nothing": "SELECT",
    **{
        f"{column} of a row": f"UPDATE vote_audit SET {column} = {value} WHERE vote_id = {A_ROW}; {FITTING}"
        for column, value in {
            "vote_id": "gen_random_uuid()",
            "law_id": "'law-9'",
            "choice": "CASE choice WHEN 'oui' THEN 'non' ELSE 'oui' END",
            "voted_at": "coalesce(voted_at, now()) + interval '1 microsecond'",
            "recorded_at": "recorded_at - interval '1 microsecond'",
            "voter_hash": "md5(random()::text)",
            "instance": "instance || E'\\t'",
            "redelivered": "NOT redelivered",
            "txid": "txid + (random() * 3)::int + 1",
        }.items()
    },
    "a row removed": f"DELETE FROM vote_audit WHERE vote_id = {A_ROW}; {FITTING}",
    "a row added": "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered, txid)"
    f" SELECT gen_random_uuid(), 'law-1', 'oui', 'x', false, from_txid FROM audit_seals {A_SEAL}; {FITTING}",
    "a row of no transaction": "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered, txid)"
    f" VALUES (gen_random_uuid(), 'law-1', 'oui', 'x', false, 1::bigint << 52); {FITTING}",
    "a row below all": "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered, txid)"
    f" VALUES (gen_random_uuid(), 'law-1', 'oui', 'x', false, -1); {FITTING}",
    "a row that is not sealed removed": "DELETE FROM vote_audit WHERE txid >= (SELECT max(to_txid) FROM audit_seals)",
    **{
        f"{column} of a seal": f"UPDATE audit_seals SET {column} = {value} {A_SEAL}"
        for column, value in {
            "from_txid": "from_txid + 1",
            "to_txid": "to_txid - 1",
            "votes": "votes + 1",
            "merkle_root": "sha256('x')",
            "leaves_hash": "sha256('x')",
            "sealed_at": "sealed_at + interval '1 s'",
            "previous_hash": "sha256('x')",
            "records_hash": "sha256('x')",
            "salt": "sha256('x')",
            "seal_hash": "sha256('x')",
        }.items()
    },
    "a seal removed": f"DELETE FROM audit_seals {A_SEAL}",
    "the newest seal removed": "DELETE FROM audit_seals WHERE seal_id = 4",
    "a total": "UPDATE vote_results SET oui_count = oui_count + 1 WHERE law_id = 'law-1'",
    "a total of a law without votes": "INSERT INTO vote_results VALUES ('law-8', 1, 0)",
    "a total of zero": "INSERT INTO vote_results VALUES ('law-8', 0, 0)",
    "a sealed total": "UPDATE sealed_totals SET oui_count = oui_count + 1 WHERE law_id = 'law-1'",
    "a certificate removed": "DELETE FROM certified_results; UPDATE laws SET status = 'closed'",
    "who certified": "UPDATE certified_results SET certified_by = 'x', certificate ="
    " certificate || jsonb_build_object('certified_by', 'x')",
    "a certified result": "UPDATE certified_results SET oui_count = 7",
    "a certified result in its JSON": """UPDATE certified_results SET certificate = certificate || '{"oui": 7}'""",
    "a recount removed": "DELETE FROM recounts",
    "a recount altered": "UPDATE recounts SET recounted_by = 'x'",
    "a recount of no transaction": "UPDATE recounts SET txid = 1::bigint << 52",
}


def test_it_agrees_with_verify_on_every_tampered_copy(
    run_node: Run, database: Database, results: Results, services: LocalServices, idle_queue: Queue, tmp_path: Path
) -> None:
    """With four seals, a certificate, a recount, and votes that are not sealed yet; each copy is altered in one way."""
    for number in range(4):
        count(database, *some_votes(number), *([vote("law-c")] if number == 1 else []))
        if number == 2:
            results.query("INSERT INTO laws VALUES ('law-c', E'Loi \"c\" \\\\ é\n', NULL, now(), 'closed')")
            seal(results)
            certify(results, services, idle_queue)
        if number == 3:
            results.query("UPDATE vote_results SET oui_count = 77 WHERE law_id = 'law-1'")
            with contextlib.closing(psycopg2.connect(results.url)) as conn:
                reconcile.recount(conn, None, "a test\twith a tab")
        *_, made = seal(results)
    count(database, *some_votes(9, 3))
    database.close()
    print("VERIFIER_SEED =", SEED)
    verdicts = {}
    for name, change in TAMPERED.items():
        with empty_database(services, results) as copy:
            off = "".join(
                f"ALTER TABLE {table} DISABLE TRIGGER ALL;"
                for table in ("vote_audit", "audit_seals", "vote_results", "recounts", "certified_results", "laws")
            )
            copy.query(f"SELECT setseed({SEED / 10**6}); {off} {change}")
            problems = verify(copy, made.name())
            done = run_node("export", *export(copy, tmp_path), made.name())
            assert (done.returncode, done.stderr) == (1 if problems else 0, ""), (name, problems, done.stdout)
            verdicts[name] = not problems
    assert [name for name, is_true in verdicts.items() if is_true] == ["nothing", "a total of zero"]
