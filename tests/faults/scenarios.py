"""Single faults with a story, each a function that raises Violation where the promise is broken.

The tests run them on the service as it is; the mutants run them on services that are broken on purpose.
"""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from test_publisher import INVALID, make_messages
from tests.faults import faults
from tests.faults.arrays import Array, array_of_law, fits_in_an_array, in_arrays, rivals_of
from tests.faults.faults import Fault
from tests.faults.lab import Lab
from tests.faults.moments import PAIR_FAULTS, STEPS, Pair, try_moment, try_pair
from tests.faults.oracle import Violation, check_order
from tests.faults.proxy import AT_ONCE, Link
from tests.harness import wait_until

Scenario = Callable[[Lab], None]

FAULT_SECONDS = 1.5


def must(condition: Callable[[], object], what: str, timeout: float = 30) -> None:
    """Wait for what the service owes. Raises Violation where it does not come within ``timeout`` seconds."""
    try:
        wait_until(condition, what, timeout)
    except AssertionError as exc:
        raise Violation(str(exc)) from exc


def publish_copies(lab: Lab) -> None:
    """A quiet stream in which every second message is a copy."""
    lab.replica()
    lab.publish(make_messages(200, seed=3, duplicates=100))
    lab.check()


def publish_arrays(lab: Lab) -> None:
    """Arrays and single votes, all there when the replica starts, so that it writes two batches at a time; no fault."""
    lab.publish(in_arrays(make_messages(700, seed=15, duplicates=20, invalid=7), seed=15))
    lab.publish(in_arrays(make_messages(700, seed=16), seed=16, rivals=0))  # no copies: each batch can be of a pair
    replica = lab.replica()
    lab.check()
    expected = check_order(lab.results, lab.ledger())
    told = Counter({"counted": sum(replica.samples("votes_aggregated_total").values())})
    told += Counter({labels[0]: number for labels, number in replica.samples("votes_duplicate_total").items()})
    if told != expected:
        raise Violation(f"the metrics say {told}, it was {expected}")
    if not replica.database.reached[AT_ONCE]:
        raise Violation("no two batches were written at the same time: the scenario shows nothing")


def live_through(fault: Fault, lab: Lab) -> None:
    """A stream to two replicas, and in the middle of it one fault that lasts for a while."""
    rng = random.Random(fault.__name__)
    for _ in range(2):
        lab.replica(wait=False)
    for replica in lab.replicas:
        replica.wait_ready()
    messages = list(in_arrays(make_messages(1_500, 3, seed=5, duplicates=5, invalid=2), seed=5))
    lab.publish_behind(messages, rate=len(messages) / 2)
    must(lambda: lab.results.counted() > 50, "it counts")
    with faults.while_it_lasts(lab, fault, rng):
        time.sleep(FAULT_SECONDS)
    lab.heal()
    lab.check()


def reconnect_while_a_commit_is_out(lab: Lab) -> None:
    """A batch is committed when the connection that delivered it is gone, and its tags mean other votes by then.

    Were it acked all the same, votes that nobody has counted would be gone from the queue. So the replica dies as soon
    as it sends such an ack, before it can count them.
    """
    # one batch at a time: of two, both would be redelivered under the tags that they had
    replica = lab.replica(BATCH_TIMEOUT_SECONDS="60", DB_TIMEOUT_SECONDS="60", DB_POOL_MIN="1", DB_POOL_MAX="1")
    held: list[Link] = []

    def hold(link: Link) -> None:
        link.stall()
        held.append(link)

    # the second batch: on the channel that delivers it, its tags are 21 to 40; on the next one those are later votes
    replica.database.on("votes seen", lambda _: replica.database.on("commit answered", hold), nth=2)
    lab.publish(make_messages(150, seed=4))
    must(lambda: held, "the second batch is committed, and its reply held")
    # else both are delivered again, under the tags that they had
    must(lambda: lab.unsettled() == 130, "the first batch is acked")
    replica.broker.cut_all()
    must(lambda: replica.broker.reached["redelivery forwarded"] >= 40, "the votes are delivered again")

    def die(link: Link) -> None:
        replica.kill()
        link.close()  # a reset could overtake the ack

    replica.broker.on("ack forwarded", die)
    replica.database.release()
    must(lambda: not replica.is_running(), "the next ack")
    replica.start_and_wait()
    lab.finish_batches()
    lab.check()


def publish_copies_of_old_votes(lab: Lab) -> None:
    """Batches that seem new: their copies are of votes that were counted before."""
    messages = list(make_messages(100, seed=13))
    lab.replica()
    lab.publish(messages)
    lab.wait_at_rest()
    for old in range(0, 100, 20):
        lab.publish([*messages[old : old + 3], *make_messages(17, seed=14 + old)])
        lab.wait_at_rest()
    lab.check()


def fail_the_totals(lab: Lab, copies: int) -> None:
    """The identities are inserted and what comes after them fails, again and again, as on a disk that is full."""
    lab.replica()
    lab.results.query(
        "CREATE SEQUENCE calls;"
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF nextval('calls') <= 3 THEN"
        " RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END IF; RETURN NULL; END $$;"
        "CREATE TRIGGER fail AFTER INSERT ON vote_results FOR EACH STATEMENT EXECUTE FUNCTION fail()"
    )
    lab.publish(make_messages(100, seed=6, duplicates=copies))
    lab.check()


def outlast_the_retries(lab: Lab) -> None:
    """The database is away for longer than a batch is retried."""
    replica = lab.replica()
    lab.publish(make_messages(30, seed=7))
    lab.wait_at_rest()
    replica.database.refuse(True)
    replica.database.cut_all()
    lab.publish(make_messages(100, seed=8))
    must(
        lambda: (
            replica.says("not consuming, what was delivered is held")
            or replica.says("unsettled messages given back to the broker")
            or lab.all_acked()
        ),
        "it holds",
    )
    lab.heal()
    lab.check()


def give_up_a_batch_and_go_on(lab: Lab) -> None:
    """A batch is given up while the server answers: a later ack on the same channel would ack it too."""
    lab.replica(MAX_RETRIES="0", HOLD_SECONDS="0.1")
    lab.results.query(
        "CREATE SEQUENCE calls;"
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF nextval('calls') BETWEEN 2 AND 9 THEN"
        " RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END IF; RETURN NULL; END $$;"
        "CREATE TRIGGER fail AFTER INSERT ON vote_audit FOR EACH STATEMENT EXECUTE FUNCTION fail()"
    )
    lab.publish(make_messages(200, seed=9))
    lab.check()


def freeze_the_database_in_the_middle_of_a_commit(lab: Lab) -> None:
    """SIGSTOP of all of PostgreSQL as COMMIT arrives: no limit of the server's own can help."""
    replica = lab.replica()
    frozen: list[int] = []

    def freeze(link: Link) -> None:
        pids = [lab.services.postgres.postmaster_pid]
        pids += [pid for (pid,) in lab.results.query("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")]
        faults.signal_all(pids, signal.SIGSTOP)
        frozen.extend(pids)

    thread = threading.Thread(target=lab.publish, args=(make_messages(100, seed=10),))
    replica.database.on("votes seen", lambda _: replica.database.on("commit seen", freeze))
    thread.start()
    try:
        must(lambda: replica.says("database hangs, connection cut"), "the watchdog cuts the connection")
        must(lambda: replica.get("/readyz")[0] == 503, "it is not ready")
    finally:
        faults.signal_all(frozen, signal.SIGCONT)
        thread.join()
    must(replica.is_ready, "it is ready again", 15)
    lab.check()


def delete_the_empty_queue(lab: Lab) -> None:
    """The queue is deleted and declared again while nothing is in it; the consumers are cancelled by the broker."""
    for _ in range(2):
        lab.replica()
    lab.publish(make_messages(50, seed=11, duplicates=20))
    lab.wait_at_rest()
    lab.queue.delete()
    lab.publish(make_messages(50, seed=12, duplicates=20))
    lab.check()


def publish_rivals_at_once(lab: Lab) -> None:
    """Of two arrays that come together the second disputes each vote of the first: the first counts, as it came.

    The connection of the first batch is slow, so that the second would win if it did not wait.
    """
    pair = Pair(lab.replica(), lab)
    pair.replica.database.on("votes seen", lambda link: link.delay(0.5) if link is pair.first else None, times=100)
    votes = [vote for vote in make_messages(60, seed=17) if b"voter_hash" in vote.body]
    disputed = [
        Array.of(votes, random.Random(1)),
        Array.of([next(rivals_of(vote, random.Random(3))) for vote in votes], random.Random(2)),
    ]
    pair.publish(disputed)
    lab.check()
    check_order(lab.results, lab.ledger())


def refuse_votes_of_arrays(lab: Lab) -> None:
    """The database takes neither of two batches that are written at once, for one vote of each; others are unreadable.

    All their neighbours count, each of these is kept, and no message is rejected for them.
    """
    pair = Pair(lab.replica(), lab)
    lab.results.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'no such law' USING ERRCODE = '22023'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON vote_audit FOR EACH ROW WHEN (NEW.law_id LIKE 'poison-%')"
        " EXECUTE FUNCTION refuse()"
    )
    unreadable = [message for message in make_messages(100, seed=18, invalid=44) if message.kind == INVALID]
    unreadable = [message for message in unreadable if fits_in_an_array(message)]
    rng = random.Random(18)
    arrays = []
    for number in range(4):
        poison = array_of_law(f"poison-{number}", 1, seed=50 + number).elements[0]
        refused = poison._replace(kind=INVALID, id=hashlib.sha256(poison.body).hexdigest())
        elements = [*array_of_law(f"law-{number}", 40, seed=60 + number).elements, refused, *unreadable[number::4]]
        rng.shuffle(elements)
        arrays.append(Array.of(elements, rng))
    pair.publish(arrays)
    lab.check()
    seen = lab.hits()
    if not seen[AT_ONCE]:
        raise Violation("no two batches were written at the same time: the scenario shows nothing")
    if seen["reject seen"] + seen["nack seen"]:
        raise Violation("an array was rejected, and its votes had counted")


def refuse_the_second_for_long(lab: Lab) -> None:
    """Of two batches the database takes the first and refuses the second, for longer than a replica holds it.

    It goes back once, and nothing is fetched before such votes can be written: a quorum queue drops what comes back
    too often.
    """
    replica = lab.replica(MAX_RETRIES="0", HOLD_SECONDS="0.1", RETRY_BACKOFF_MAX_SECONDS="0.2")
    pair = Pair(replica, lab)
    lab.results.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'permission denied' USING ERRCODE = '42501'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON vote_audit FOR EACH ROW WHEN (NEW.law_id = 'law-2')"
        " EXECUTE FUNCTION refuse()"
    )
    pair.publish([array_of_law("law-1", 40, seed=31), array_of_law("law-2", 40, seed=32)])

    def tries() -> int:
        return sum(line["message"] == "database not usable" for line in replica.lines())

    must(lambda: tries() >= 5 or lab.hits()["redelivery forwarded"] > 4, "it has tried again and again")
    if lab.hits()["redelivery forwarded"] > 2:
        raise Violation(f"two messages were delivered again {lab.hits()['redelivery forwarded']} times")
    lab.results.query("DROP TRIGGER refuse ON vote_audit")
    lab.check()


def stop_in_the_middle_of_two_writes(lab: Lab, is_hung: bool, **settings: str) -> None:
    """SIGTERM while two batches are written; where one of the two connections hangs it ends in time all the same."""
    replica = lab.replica(**settings)
    pair = Pair(replica, lab)
    process = replica.process
    assert process is not None

    def stop() -> None:
        process.terminate()
        if is_hung:
            assert pair.second is not None
            pair.second.stall()

    pair.meet(stop)
    must(lambda: process.poll() is not None, "it ends after SIGTERM", 20)
    for line in ("batcher failed", "shutdown hangs, leaving at once"):
        if replica.says(line):
            raise Violation(f"it says {line!r}")
    if process.returncode != 0:
        raise Violation(f"its exit code is {process.returncode}")
    lab.heal()
    lab.check()


def replace_the_channel_while_a_write_hangs(lab: Lab) -> None:
    """A batch hangs in the database, its channel is lost, and the next channel brings its votes and others again.

    It is given up with what the next channel has brought by then, and the replica goes on.
    """
    replica = lab.replica(DB_TIMEOUT_SECONDS="5")

    def hang(link: Link) -> None:
        link.stall()
        replica.broker.cut_all()

    replica.database.on("votes seen", hang)
    lab.publish(make_messages(300, seed=22))
    must(lambda: lab.hits()["redelivery forwarded"] > 0, "the next channel brings them again")
    must(lambda: replica.says("database hangs, connection cut"), "the watchdog cuts the connection")
    lab.heal()
    lab.check()
    if replica.says("batcher failed"):
        raise Violation("its batcher has failed")


def write_one_batch_at_a_time(lab: Lab) -> None:
    """A replica that may have one connection writes arrays with it, also through a lost reply to a COMMIT."""
    replica = lab.replica(DB_POOL_MIN="1", DB_POOL_MAX="1")
    faults.cut_after_the_commit(lab, random.Random(1))
    lab.publish(in_arrays(make_messages(600, seed=19, duplicates=5, invalid=2), seed=19))
    lab.check()
    if replica.database.reached[AT_ONCE]:
        raise Violation("it has written two batches at the same time")


SCENARIOS: dict[str, Scenario] = {
    "copies in a quiet stream": publish_copies,
    "arrays in a quiet stream": publish_arrays,
    "a reconnect while a commit is out": reconnect_while_a_commit_is_out,
    "copies of old votes in a quiet stream": publish_copies_of_old_votes,
    "the totals fail after the audit": partial(fail_the_totals, copies=100),
    "the totals of new votes fail": partial(fail_the_totals, copies=0),
    "the database is away for longer than the retries": outlast_the_retries,
    "a batch is given up and the next is not": give_up_a_batch_and_go_on,
    "the database is frozen in the middle of a commit": freeze_the_database_in_the_middle_of_a_commit,
    "the empty queue is deleted": delete_the_empty_queue,
    "the second of two batches disputes the first": publish_rivals_at_once,
    "each of two batches has a vote that is refused": refuse_votes_of_arrays,
    "the second of two batches is refused for long": refuse_the_second_for_long,
    "a shutdown in the middle of two writes": partial(stop_in_the_middle_of_two_writes, is_hung=False),
    "a shutdown while one of two writes hangs": partial(stop_in_the_middle_of_two_writes, is_hung=True),
    "a shutdown while one of two writes hangs for long": partial(
        stop_in_the_middle_of_two_writes, is_hung=True, DB_TIMEOUT_SECONDS="60"
    ),
    "a channel replaced while a write hangs": replace_the_channel_while_a_write_hangs,
    "one connection to the database": write_one_batch_at_a_time,
}

# every single fault in the middle of a stream, and every moment of a batch, by the name that the reports use
SCENARIOS |= {fault.__name__.replace("_", " "): partial(live_through, fault) for fault in faults.WEIGHTS}
MOMENTS: dict[str, Scenario] = {
    f"a replica {step.name} and {fault}": partial(try_moment, step=step, fault=fault)
    for step in STEPS
    for fault in ("is killed", "gets an error", "is stalled")
}
MOMENTS |= {
    f"of two batches the {held} {step}, the other is committed, and {fault}": partial(
        try_pair, held=held, moment=moment, fault=fault
    )
    for held in ("first", "second")
    for fault, steps in PAIR_FAULTS.items()
    for step, moment in steps.items()
}
