"""Faults with a story on brokers and databases that are several. Each raises Violation where the promise is broken."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from functools import partial

from test_publisher import Message, make_messages
from tests.faults.arrays import in_arrays
from tests.faults.faults import while_it_lasts
from tests.faults.oracle import Violation
from tests.faults.proxy import DOWN, Link
from tests.faults.scenarios import must
from tests.ha import faults
from tests.ha.faults import REFUSALS, Fault
from tests.ha.lab import HOLD_SECONDS, HaLab

Scenario = Callable[[HaLab], None]

GIVE_BACKS = 25  # of a service that gives back each failing batch: more than the queue's limit of 20
RETURNS_AT_MOST = 2
SIGKILLS = 30


def outlast_refusals(fault: Fault, lab: HaLab) -> None:
    """The database refuses for as long as 25 periods of holding. Nothing is lost, and hardly anything is returned."""
    for _ in range(2):
        lab.replica()
    lab.publish(make_messages(40, seed=1, duplicates=20))
    lab.wait_at_rest()
    with while_it_lasts(lab, fault, random.Random(1)):  # type: ignore[arg-type]
        lab.publish(make_messages(100, seed=2))
        time.sleep(GIVE_BACKS * HOLD_SECONDS)  # the refusal is the waiting
    lab.heal()
    lab.check()
    if lab.most_returns() > RETURNS_AT_MOST:
        raise Violation(f"a message was returned {lab.most_returns()} times, at most {RETURNS_AT_MOST} were meant")


def die_again_and_again(lab: HaLab) -> None:
    """A replica is killed 30 times with votes in its hands: returns by nature. It is said before a limit would act."""
    replica = lab.replica(BATCH_TIMEOUT_SECONDS="60")  # which 15 votes wait for, since they fill no batch
    lab.publish(make_messages(15, seed=3))
    alarms = 0
    for number in range(SIGKILLS):
        must(lambda: lab.hits()["deliver forwarded"] >= 15 * (number + 1), f"delivery number {number + 1}")  # noqa: B023
        if number == 15:
            must(lambda: replica.says(RETURNED_OFTEN), "it says that messages were returned many times")
            alarms = int(replica.metric("delivery_count_max"))
        replica.kill()
        if number + 1 < SIGKILLS:
            replica.start()
    lab.heal()
    lab.finish_batches()
    lab.check()
    if not 10 <= alarms < 20:
        raise Violation(f"the gauge said {alarms} after 16 deaths")


RETURNED_OFTEN = (
    "a message was returned to the queue many times: beyond its delivery limit the broker drops it, "
    "a confirmed vote too"
)  # fmt: skip


def lose_the_primary(cut: Fault, votes: int, lab: HaLab) -> None:
    """Rows that only the primary has are recognised as counted; then the primary is lost, and all that was acked.

    ``cut`` is what ends the wait of the commits for the standby. Of more ``votes`` than the 20 of a batch a second one
    waits for the locks of the first. A restart rolls it back, so that it has to wait for the standby, and the first one
    for it: nothing would be acked, whatever a service makes of its copies.
    """
    lab.replica(BATCH_TIMEOUT_SECONDS="0.2", HOLD_SECONDS="60")  # it is the batch itself that comes again
    lab.publish(make_messages(40, seed=4))
    lab.wait_at_rest()
    lab.pair.standby.stop()
    lab.publish(make_messages(votes, seed=5))
    must(lambda: lab.waiting_commits() > 0, "a commit waits for the standby")
    cut(lab, random.Random(1))
    # long enough for what was cut to be tried again, and, in a service that does not wait, to be acked
    visible = lab.results.value("SELECT count(*) FROM vote_audit")
    until = time.monotonic() + 8
    while time.monotonic() < until and not lab.all_acked():
        time.sleep(0.2)
    if visible <= 40:
        raise Violation("no row became visible: the scenario shows nothing")
    lab.promote()
    lab.heal()
    lab.check()


def publish_arrays_behind(lab: HaLab, votes: Iterable[Message]) -> None:
    """Publish them in the background within three seconds, most of them in arrays."""
    messages = list(in_arrays(votes, seed=6))
    lab.publish_behind(messages, rate=len(messages) / 3)


def lose_a_node(fault: Fault, lab: HaLab) -> None:
    """A node of the broker dies or freezes in the middle of a stream, and comes back."""
    for _ in range(2):
        lab.replica()
    publish_arrays_behind(lab, make_messages(2_000, seed=6, duplicates=10))
    must(lambda: lab.results.counted() > 50, "it counts")
    with while_it_lasts(lab, fault, random.Random(2)):  # type: ignore[arg-type]
        time.sleep(4)
    lab.heal()
    lab.check()
    if not lab.events:
        raise Violation("no node was hit: the scenario shows nothing")


def fail_over_in_a_stream(lab: HaLab) -> None:
    """The primary is killed in the middle of a stream and the standby promoted."""
    for _ in range(2):
        lab.replica()
    publish_arrays_behind(lab, make_messages(2_000, seed=7, duplicates=10, invalid=2))
    must(lambda: lab.results.counted() > 50, "it counts")
    lab.promote()
    lab.heal()
    lab.check()


def cancel_with_a_burst_on_its_way(lab: HaLab) -> None:
    """Votes are on their way to a replica when its first batch begins to be held, and it goes on afterwards.

    Were they dropped, the ack of a later vote on the same channel would cover them.
    """
    replica = lab.replica(RABBITMQ_PREFETCH_COUNT="500", HOLD_SECONDS="60", MAX_RETRIES="0")
    lab.publish(make_messages(1, seed=12))
    must(lambda: lab.results.counted() == 1, "it consumes")
    with while_it_lasts(lab, faults.disk_full, random.Random(1)):  # type: ignore[arg-type]
        for proxy in replica.brokers:
            proxy.black_hole(True, DOWN)
        lab.publish(make_messages(60, seed=10))
        must(lambda: lab.queue.ready() == 0, "all are on their way")
        for proxy in replica.brokers:
            proxy.on("deliver forwarded", lambda link: link.stall(DOWN), nth=20)  # a batch is 20
            proxy.release()
        must(lambda: lab.hits()["cancel forwarded"] > 0, "it holds a batch, and cancels its consumer")
        for proxy in replica.brokers:
            proxy.release()
        must(lambda: lab.hits()["deliver forwarded"] > 60, "what was on its way has come")
    must(replica.is_ready, "it goes on")
    lab.publish(make_messages(60, seed=11))
    lab.heal()
    lab.check()


def refuse_the_queue(lab: HaLab) -> None:
    """The queue is absent, and its declaration refused: the error says why, and not that a queue is missing."""
    lab.cluster.ctl("add_user", lab.queue.name, "password")
    lab.cluster.ctl("set_permissions", lab.queue.name, "^$", ".*", ".*")
    urls = [f"amqp://{lab.queue.name}:password@{url.partition('@')[2]}" for url in lab.queue.urls]
    lab.queue.delete()
    lab.queue.url = ",".join(urls)
    try:
        replica = lab.replica(wait=False)
        must(lambda: replica.says("broker lost"), "it is refused")
    finally:
        lab.queue.url = lab.services.rabbitmq.url()
        lab.cluster.ctl("delete_user", lab.queue.name)
    (line, *_) = [line for line in replica.lines() if line["message"] == "broker lost"]
    if line["level"] != "ERROR" or "ACCESS_REFUSED" not in line["fields"]["error"]:
        raise Violation(f"it says {line}")


def refuse_one_vote(lab: HaLab) -> None:
    """A trigger fails for one vote with a code that no list knows: the others count, and that one is kept."""
    messages = list(make_messages(100, seed=8))
    culprit = messages[37].id
    lab.replica()
    lab.results.query(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.vote_id = '{culprit}' THEN RAISE EXCEPTION 'cache lookup failed' USING ERRCODE = 'XX000'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON vote_audit FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    lab.publish(messages)
    lab.wait_at_rest()
    kept = lab.results.query("SELECT reason, detail FROM rejected_messages")
    if kept != [("refused_by_database", "SQLSTATE XX000")] or lab.results.counted() != 99:
        raise Violation(f"{lab.results.counted()} of 99 counted, kept are {kept}")
    if lab.most_returns():
        raise Violation(f"innocent votes were returned {lab.most_returns()} times")


def hold_while_the_link_of_one_is_broken(lab: HaLab) -> None:
    """One replica cannot reach the database and another can: what the first holds is counted by the second."""
    broken = lab.replica(BATCH_TIMEOUT_SECONDS="0.2")
    for proxy in broken.databases:
        proxy.refuse(True)
        proxy.cut_all()
    lab.publish(make_messages(60, seed=9))
    lab.replica()
    lab.wait_at_rest()
    if lab.most_returns() > RETURNS_AT_MOST:
        raise Violation(f"a message was returned {lab.most_returns()} times")
    lab.heal()
    lab.check()


def cut_the_copies(lab: HaLab) -> None:
    """A batch of nothing but copies is written while the standby is away: its ack waits, as that of new votes does."""
    messages = list(make_messages(20, seed=11))
    replica = lab.replica()
    lab.publish(messages)
    lab.wait_at_rest()
    lab.pair.standby.stop()
    lab.publish(messages)
    must(lambda: lab.waiting_commits() > 0 or lab.all_acked(), "the commit of the copies waits")
    if lab.all_acked():
        raise Violation("a batch of nothing but copies was acked while the standby was away")
    for proxy in replica.databases:
        proxy.on("commit seen", Link.cut)
    lab.heal()
    lab.check()


SCENARIOS: dict[str, Scenario] = {
    **{f"{name} for 25 periods of holding": partial(outlast_refusals, fault) for name, fault in REFUSALS.items()},
    "the primary restarted without its standby, then lost": partial(lose_the_primary, faults.restart_primary, 20),
    "a waiting commit ended, then the primary lost": partial(lose_the_primary, faults.terminate_waiting, 100),
    "a waiting commit cancelled, then the primary lost": partial(lose_the_primary, faults.cancel_waiting, 100),
    "copies while the standby is away": cut_the_copies,
    "the primary lost in a stream": fail_over_in_a_stream,
    "the leader of the queue killed": partial(lose_a_node, faults.kill_leader),
    "the leader of the queue frozen": partial(lose_a_node, faults.freeze_leader),
    "a follower killed": partial(lose_a_node, faults.kill_follower),
    "a follower frozen": partial(lose_a_node, faults.freeze_follower),
    "a burst on its way when a batch begins to be held": cancel_with_a_burst_on_its_way,
    "one vote with a fault that no list knows": refuse_one_vote,
    "a queue that is refused and absent": refuse_the_queue,
    "a replica whose own link is broken": hold_while_the_link_of_one_is_broken,
}
