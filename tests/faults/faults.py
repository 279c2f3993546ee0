"""What can be done to a running lab, each fault with its end: on links, on processes, on the real servers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psycopg2

from scripts.local_services import LocalServicesError
from tests.faults.lab import Lab, Replica
from tests.faults.oracle import Violation
from tests.faults.proxy import AT_ONCE, DOWN, UP, Link, TcpProxy
from tests.harness import wait_until

Undo = Callable[[], None]
Fault = Callable[[Lab, random.Random], Undo]

# RabbitMQ 3.10.8 lost a durable queue that was one or two seconds old in 2 of 40 kills, and none of 15 at four seconds
QUEUE_SETTLES_SECONDS = 4.0
USUAL_WATERMARK = ("set_vm_memory_high_watermark", "absolute", "1GB")
BATCH_MOMENTS = ("votes seen", "votes answered", "commit seen", "commit answered")


def nothing() -> None:
    """The end of a fault that is over at once."""


def _replica(lab: Lab, rng: random.Random) -> Replica:
    return rng.choice(lab.replicas)


def _proxy(lab: Lab, rng: random.Random) -> TcpProxy:
    replica = _replica(lab, rng)
    return rng.choice([replica.broker, replica.database])


# --- processes ---


def kill_replica(lab: Lab, rng: random.Random) -> Undo:
    """SIGKILL, and a new process."""
    replica = _replica(lab, rng)
    replica.kill()

    def undo() -> None:
        if not replica.is_running():
            replica.start()

    return undo


def shut_down_replica(lab: Lab, rng: random.Random) -> Undo:
    """SIGTERM, and a new process once it has ended, which it must in time."""
    replica = _replica(lab, rng)
    process = replica.process
    assert process is not None
    process.terminate()

    def undo() -> None:
        try:
            wait_until(lambda: process.poll() is not None, f"{replica.name} ends after SIGTERM", 20)
        except AssertionError as exc:
            raise Violation(str(exc)) from exc
        if replica.process is process:  # else another fault's end has started it
            replica.start()

    return undo


def freeze_replica(lab: Lab, rng: random.Random) -> Undo:
    """SIGSTOP, later SIGCONT: a replica that wakes up with an old idea of the world."""
    replica = _replica(lab, rng)
    process = replica.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    return _ends_by_itself(rng, lambda: process.send_signal(signal.SIGCONT))


# --- links ---


def cut_at_a_moment_of_a_batch(lab: Lab, rng: random.Random) -> Undo:
    """The link to the database is reset exactly there."""
    _replica(lab, rng).database.on(rng.choice(BATCH_MOMENTS), Link.cut)
    return nothing


def cut_after_the_commit(lab: Lab, rng: random.Random) -> Undo:
    """It happened, and its reply never arrives."""
    replica = _replica(lab, rng)
    replica.database.on("votes seen", lambda _: replica.database.on("commit answered", Link.cut))
    return nothing


def cut_around_an_ack(lab: Lab, rng: random.Random) -> Undo:
    """The link to the broker is reset before or after the ack of a committed batch is forwarded."""
    _replica(lab, rng).broker.on(rng.choice(["ack seen", "ack forwarded"]), Link.cut)
    return nothing


def kill_at_a_moment_of_a_batch(lab: Lab, rng: random.Random) -> Undo:
    """SIGKILL exactly there."""
    replica = _replica(lab, rng)

    def kill(link: Link) -> None:
        replica.kill()
        link.cut()

    replica.database.on(rng.choice(BATCH_MOMENTS), kill)
    return nothing


def cut_one_of_two_batches(lab: Lab, rng: random.Random) -> Undo:
    """Of those written at the same time: one connection is reset before its votes are sent, or with its COMMIT."""
    _at_a_moment_of_one_of_two(_replica(lab, rng), rng, Link.cut)
    return nothing


def stall_one_of_two_batches(lab: Lab, rng: random.Random) -> Undo:
    """No byte of one passes any more, until the service ends that connection."""
    _at_a_moment_of_one_of_two(_replica(lab, rng), rng, Link.stall)
    return nothing


def kill_in_one_of_two_batches(lab: Lab, rng: random.Random) -> Undo:
    """SIGKILL exactly there."""
    replica = _replica(lab, rng)

    def kill(link: Link) -> None:
        replica.kill()
        link.cut()

    _at_a_moment_of_one_of_two(replica, rng, kill)
    return nothing


def _at_a_moment_of_one_of_two(replica: Replica, rng: random.Random, action: Callable[[Link], object]) -> None:
    moment = rng.choice(["votes seen", "commit seen", "commit answered", "commit delivered"])
    if moment == "votes seen":
        replica.database.on(AT_ONCE, action)
    else:
        replica.database.on(AT_ONCE, lambda _: replica.database.on(moment, action))


def cut_all_links(lab: Lab, rng: random.Random) -> Undo:
    """Every connection of one replica to one server is reset."""
    _proxy(lab, rng).cut_all()
    return nothing


def black_hole(lab: Lab, rng: random.Random) -> Undo:
    """No byte passes, in both directions or in one."""
    proxy = _proxy(lab, rng)
    proxy.black_hole(True, *rng.choice([(), (UP,), (DOWN,)]))
    return lambda: proxy.black_hole(False)


def refuse(lab: Lab, rng: random.Random) -> Undo:
    """Connections are reset, and new ones refused."""
    proxy = _proxy(lab, rng)
    proxy.refuse(True)
    proxy.cut_all()
    return lambda: proxy.refuse(False)


def trickle(lab: Lab, rng: random.Random) -> Undo:
    """Some thousand bytes pass one at a time."""
    _proxy(lab, rng).trickle(3_000)
    return nothing


def delay(lab: Lab, rng: random.Random) -> Undo:
    """Every chunk waits."""
    proxy = _proxy(lab, rng)
    proxy.delay(rng.uniform(0.001, 0.05))
    return lambda: proxy.delay(0)


# --- the database server ---


def terminate_backends(lab: Lab, rng: random.Random) -> Undo:
    """pg_terminate_backend of every connection of the replicas."""
    _try_sql(
        lab,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'vote-aggregator %'",
    )
    return nothing


def kill_one_backend(lab: Lab, rng: random.Random) -> Undo:
    """kill -9 of one server process: PostgreSQL throws everybody out and recovers."""
    with contextlib.suppress(psycopg2.Error, ProcessLookupError):
        backends = lab.results.query(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'vote-aggregator %'"
        )
        if backends:
            os.kill(rng.choice(backends)[0], signal.SIGKILL)
    return nothing


def stop_postgres_at_once(lab: Lab, rng: random.Random) -> Undo:
    """pg_ctl stop -m immediate, later start: crash recovery."""
    lab.services.postgres.stop("immediate")
    return lab.services.postgres.start


def freeze_postgres(lab: Lab, rng: random.Random) -> Undo:
    """SIGSTOP of the postmaster and of every server process, later SIGCONT."""
    if not lab.services.postgres.is_running():
        return nothing
    pids = [lab.services.postgres.postmaster_pid]
    with contextlib.suppress(psycopg2.Error):
        pids += [pid for (pid,) in lab.results.query("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")]
    signal_all(pids, signal.SIGSTOP)
    return _ends_by_itself(rng, lambda: signal_all(pids, signal.SIGCONT))


def read_only(lab: Lab, rng: random.Random) -> Undo:
    """default_transaction_read_only, as after a failover to a standby."""
    name = lab.results.url.rpartition("/")[2]
    _try_sql(lab, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    terminate_backends(lab, rng)

    def undo() -> None:
        _sql(lab, f"ALTER DATABASE {name} RESET default_transaction_read_only")
        terminate_backends(lab, rng)  # a session keeps the default it was born with

    return undo


def lock_a_table(lab: Lab, rng: random.Random) -> Undo:
    """LOCK TABLE in a session that does not end."""
    table = rng.choice(["vote_audit", "vote_results"])
    with contextlib.suppress(psycopg2.Error):
        connection = psycopg2.connect(lab.results.url, connect_timeout=3)
        try:
            connection.cursor().execute(f"SET lock_timeout = '3s'; LOCK TABLE {table}")
        except psycopg2.Error:
            connection.close()
        else:
            return _ends_by_itself(rng, connection.close)
    return nothing


def disk_full(lab: Lab, rng: random.Random) -> Undo:
    """A trigger raises 53100 on every insert of a vote."""
    return _failing_trigger(lab, "TRIGGER disk_full AFTER INSERT ON vote_audit FOR EACH STATEMENT")


def disk_full_at_commit(lab: Lab, rng: random.Random) -> Undo:
    """The same, deferred, so that it is COMMIT that fails."""
    return _failing_trigger(
        lab, "CONSTRAINT TRIGGER disk_full AFTER INSERT ON vote_audit DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
    )


def _failing_trigger(lab: Lab, definition: str) -> Undo:
    _try_sql(
        lab,
        "CREATE OR REPLACE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$;"
        f"DROP TRIGGER IF EXISTS disk_full ON vote_audit; CREATE {definition} EXECUTE FUNCTION disk_full()",
    )
    return lambda: _sql(lab, "DROP TRIGGER IF EXISTS disk_full ON vote_audit")


# --- the broker ---


def close_all_broker_connections(lab: Lab, rng: random.Random) -> Undo:
    """rabbitmqctl close_all_connections, the publisher's too."""
    _try_ctl(lab, "close_all_connections", "fault")
    return nothing


def stop_broker_application(lab: Lab, rng: random.Random) -> Undo:
    """rabbitmqctl stop_app, later start_app."""
    _try_ctl(lab, "stop_app")
    return lambda: _ctl(lab, "start_app")


def kill_broker(lab: Lab, rng: random.Random) -> Undo:
    """kill -9, later start; not in the first seconds of a queue, which RabbitMQ may forget with all that is in it."""
    time.sleep(max(0.0, lab.declared_at + QUEUE_SETTLES_SECONDS - time.monotonic()))
    lab.services.rabbitmq.kill()
    return lab.services.rabbitmq.start


def memory_alarm(lab: Lab, rng: random.Random) -> Undo:
    """The broker blocks everybody who publishes."""
    _try_ctl(lab, "set_vm_memory_high_watermark", "0.000001")
    return lambda: _ctl(lab, *USUAL_WATERMARK)


def _ends_by_itself(rng: random.Random, end: Undo) -> Undo:
    """End a fault by a clock of its own: the end of another one may have to wait for it."""
    timer = threading.Timer(rng.uniform(0.5, 4.0), end)
    timer.start()
    return timer.join


def signal_all(pids: list[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _sql(lab: Lab, sql: str) -> None:
    """Run it to end a fault; where another fault has stopped the server, that one is ended first."""
    lab.services.postgres.start()
    retry(lambda: lab.results.query(f"SET transaction_read_only = off; {sql}"))


def _ctl(lab: Lab, *arguments: str) -> None:
    """The same for the broker."""
    if not lab.services.rabbitmq.is_running():  # it may run, and its application not
        lab.services.rabbitmq.start()
    retry(lambda: lab.services.rabbitmq.ctl("start_app"))
    retry(lambda: lab.services.rabbitmq.ctl(*arguments))


def restore_servers(lab: Lab) -> None:
    """End whatever may still last on the servers, so that the next lab finds them whole."""
    lab.services.postgres.start()
    _ctl(lab, *USUAL_WATERMARK)


def _try_sql(lab: Lab, sql: str) -> None:
    with contextlib.suppress(psycopg2.Error):
        lab.results.query(sql)


def _try_ctl(lab: Lab, *arguments: str) -> None:
    with contextlib.suppress(LocalServicesError):
        lab.services.rabbitmq.ctl(*arguments)


def retry(action: Callable[[], object]) -> None:
    """Until the server takes it: another fault may hold it back."""

    def succeeds() -> bool:
        try:
            action()
        except (psycopg2.Error, LocalServicesError):
            return False
        return True

    wait_until(succeeds, "the fault can be ended", 60)


@contextlib.contextmanager
def while_it_lasts(lab: Lab, fault: Fault, rng: random.Random) -> Iterator[None]:
    """A fault for the length of a block."""
    undo = fault(lab, rng)
    try:
        yield
    finally:
        undo()


# How often each is drawn. The restarts of servers take long, so they are drawn less.
WEIGHTS: dict[Fault, int] = {
    kill_replica: 4,
    shut_down_replica: 4,
    freeze_replica: 3,
    cut_at_a_moment_of_a_batch: 6,
    cut_after_the_commit: 8,
    cut_around_an_ack: 6,
    kill_at_a_moment_of_a_batch: 5,
    cut_one_of_two_batches: 4,
    stall_one_of_two_batches: 3,
    kill_in_one_of_two_batches: 3,
    cut_all_links: 4,
    black_hole: 4,
    refuse: 3,
    trickle: 2,
    delay: 2,
    terminate_backends: 3,
    kill_one_backend: 2,
    stop_postgres_at_once: 2,
    freeze_postgres: 2,
    read_only: 2,
    lock_a_table: 2,
    disk_full: 2,
    disk_full_at_commit: 2,
    close_all_broker_connections: 3,
    stop_broker_application: 2,
    kill_broker: 2,
    memory_alarm: 2,
}
