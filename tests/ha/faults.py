"""What can be done to brokers and databases that are several; each fault returns its end, as in tests/faults."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import psycopg2

from scripts.local_cluster import RabbitMQNode
from scripts.local_services import LocalServicesError
from tests.faults import faults as single
from tests.faults.faults import Undo, nothing
from tests.faults.proxy import Link
from tests.ha.lab import HaLab
from tests.harness import wait_until

Fault = Callable[[HaLab, random.Random], Undo]


# --- the broker's nodes: one at a time, since two of three must live ---


def _node(lab: HaLab, rng: random.Random, leader: bool) -> RabbitMQNode | None:
    nodes = lab.cluster.nodes
    if not all(node.is_running() and not node.is_frozen() for node in nodes):
        return None
    with contextlib.suppress(LocalServicesError):
        return lab.cluster.leader(lab.queue.name) if leader else rng.choice(lab.cluster.followers(lab.queue.name))
    return None


def _kill_node(lab: HaLab, rng: random.Random, leader: bool) -> Undo:
    node = _node(lab, rng, leader)
    if node is None:
        return nothing
    node.kill()
    lab.events.append("leader lost" if leader else "follower lost")
    return node.start


def _freeze_node(lab: HaLab, rng: random.Random, leader: bool) -> Undo:
    node = _node(lab, rng, leader)
    if node is None:
        return nothing
    node.freeze()
    lab.events.append("leader frozen" if leader else "follower frozen")
    return node.thaw


def kill_leader(lab: HaLab, rng: random.Random) -> Undo:
    """SIGKILL of the node that leads the queue, later start."""
    return _kill_node(lab, rng, leader=True)


def kill_follower(lab: HaLab, rng: random.Random) -> Undo:
    """SIGKILL of another one."""
    return _kill_node(lab, rng, leader=False)


def freeze_leader(lab: HaLab, rng: random.Random) -> Undo:
    """SIGSTOP of the node that leads the queue, later SIGCONT."""
    return _freeze_node(lab, rng, leader=True)


def freeze_follower(lab: HaLab, rng: random.Random) -> Undo:
    """SIGSTOP of another one."""
    return _freeze_node(lab, rng, leader=False)


# --- the pair ---


def promote_the_standby(lab: HaLab, rng: random.Random) -> Undo:
    """The primary is killed and the standby promoted; the end makes a new standby."""
    if lab.pair.standby.is_retired():
        return nothing
    lab.promote()
    return lab.pair.heal


def freeze_standby(lab: HaLab, rng: random.Random) -> Undo:
    """Commits wait, until the watchdog cuts them."""
    if lab.pair.standby.is_retired() or not lab.pair.standby.is_running():
        return nothing
    lab.pair.freeze_standby()
    lab.events.append("standby away")
    return lab.pair.heal


def lose_what_the_standby_never_got(lab: HaLab, rng: random.Random) -> Undo:
    """The standby is away, the commits that wait for it are cut off, and then the primary is lost."""
    if lab.pair.standby.is_retired() or not lab.pair.standby.is_running():
        return nothing
    lab.pair.standby.stop()
    lab.events.append("standby away")
    with contextlib.suppress(AssertionError):  # nothing may be on its way
        wait_until(lambda: lab.waiting_commits() > 0, "a commit waits for the standby", 3)
    for _ in range(3):
        rng.choice([terminate_waiting, cancel_waiting, restart_primary])(lab, rng)
    lab.promote()
    return lab.pair.heal


def terminate_waiting(lab: HaLab, rng: random.Random) -> Undo:
    """pg_terminate_backend of the commits that wait for the standby: they have happened, and nobody is told."""
    _signal_waiting(lab, "pg_terminate_backend")
    return nothing


def cancel_waiting(lab: HaLab, rng: random.Random) -> Undo:
    """pg_cancel_backend of them: they answer as if all were well, with a warning."""
    _signal_waiting(lab, "pg_cancel_backend")
    return nothing


def _signal_waiting(lab: HaLab, function: str) -> None:
    with contextlib.suppress(psycopg2.Error):
        lab.results.query(
            f"SELECT {function}(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            " AND datname = current_database() AND application_name LIKE 'vote-aggregator %'"
        )


def restart_primary(lab: HaLab, rng: random.Random) -> Undo:
    """Stopped at once and started: what waited for the standby is visible then."""
    lab.pair.primary.stop("immediate")
    lab.pair.primary.start()
    return nothing


# --- links, replicas and refusals, as in tests/faults ---


def cut_after_the_commit(lab: HaLab, rng: random.Random) -> Undo:
    """It happened, and its reply never arrives."""
    for proxy in rng.choice(lab.replicas).databases:
        proxy.on("votes seen", lambda _, proxy=proxy: proxy.on("commit answered", Link.cut))
    return nothing


def cut_around_an_ack(lab: HaLab, rng: random.Random) -> Undo:
    """The link to the broker is reset before or after the ack is forwarded."""
    moment = rng.choice(["ack seen", "ack forwarded"])
    for proxy in rng.choice(lab.replicas).brokers:
        proxy.on(moment, Link.cut)
    return nothing


def cut_all_links(lab: HaLab, rng: random.Random) -> Undo:
    """Every connection of one replica is reset."""
    for proxy in rng.choice(lab.replicas).proxies:
        proxy.cut_all()
    return nothing


def _refuse(lab: HaLab, definition: str, sqlstate: str) -> Undo:
    """A trigger on vote_audit that raises this SQLSTATE. Its maker waits for no standby, which may be away."""
    sql = (
        "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'it is refused' USING ERRCODE = '{sqlstate}'; END $$;"
        f"DROP TRIGGER IF EXISTS refuse ON vote_audit; CREATE {definition} EXECUTE FUNCTION refuse()"
    )
    with contextlib.suppress(psycopg2.Error):
        lab.without_standby(sql)
    return lambda: single.retry(lambda: lab.without_standby("DROP TRIGGER IF EXISTS refuse ON vote_audit"))


AT_THE_INSERT = "TRIGGER refuse AFTER INSERT ON vote_audit FOR EACH STATEMENT"
AT_THE_COMMIT = "CONSTRAINT TRIGGER refuse AFTER INSERT ON vote_audit DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"


def disk_full(lab: HaLab, rng: random.Random) -> Undo:
    """Every insert of a vote fails."""
    return _refuse(lab, AT_THE_INSERT, "53100")


def disk_full_at_commit(lab: HaLab, rng: random.Random) -> Undo:
    """Every COMMIT of a vote fails."""
    return _refuse(lab, AT_THE_COMMIT, "53100")


def unknown_fault(lab: HaLab, rng: random.Random) -> Undo:
    """Every insert fails with a code that does not say whose fault it is."""
    return _refuse(lab, AT_THE_INSERT, "XX000")


def revoke_the_right(lab: HaLab, rng: random.Random) -> Undo:
    """42501, as after a REVOKE; the lab's role is a superuser, so a trigger says it."""
    return _refuse(lab, AT_THE_INSERT, "42501")


def lock_the_table(lab: HaLab, rng: random.Random) -> Undo:
    """LOCK TABLE in a session that goes on until the end."""
    connection = psycopg2.connect(lab.results.url, connect_timeout=3)
    connection.cursor().execute("SET lock_timeout = '10s'; LOCK TABLE vote_audit")
    return connection.close


REFUSALS: dict[str, Fault] = {
    "a full disk": disk_full,
    "a refused COMMIT": disk_full_at_commit,
    "a revoked right": revoke_the_right,
    "a locked table": lock_the_table,
    "a fault that no list knows": unknown_fault,
    "a frozen standby": freeze_standby,
}

# How often each is drawn for a schedule.
WEIGHTS: dict[Fault, int] = {
    kill_leader: 5,
    freeze_leader: 4,
    kill_follower: 2,
    freeze_follower: 2,
    promote_the_standby: 4,
    lose_what_the_standby_never_got: 4,
    freeze_standby: 3,
    terminate_waiting: 2,
    cancel_waiting: 2,
    restart_primary: 3,
    single.kill_replica: 3,
    single.shut_down_replica: 2,
    single.freeze_replica: 2,
    cut_after_the_commit: 5,
    cut_around_an_ack: 3,
    cut_all_links: 3,
    disk_full: 2,
    disk_full_at_commit: 2,
    unknown_fault: 1,
}
