"""Every step of a batch, by where the proxies see it, times what can go wrong there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from test_publisher import Message, make_messages
from tests.faults.arrays import array_of_law, in_arrays
from tests.faults.lab import Lab, Replica
from tests.faults.oracle import Violation
from tests.faults.proxy import AT_ONCE, DOWN, Link, TcpProxy
from tests.harness import wait_until


class Step(NamedTuple):
    """A step of a batch: the link and the moment that show it, and the link that an error or a stall then hits."""

    name: str
    seen_by: str
    moment: str
    hits: str


STEPS = (
    Step("has received a batch", "broker", "deliver forwarded", "broker"),
    Step("has decoded a batch", "database", "votes seen", "database"),
    Step("has counted the votes", "database", "votes answered", "database"),
    Step("is about to commit", "database", "commit seen", "database"),
    Step("has sent its commit", "database", "commit answered", "database"),  # it happened, and the reply is held
    Step("has the reply to its commit", "database", "commit delivered", "broker"),
    Step("is sending its ack", "broker", "ack seen", "broker"),
    Step("has sent its ack", "broker", "ack forwarded", "broker"),
)


HOLDS = {"is about to commit": "commit seen", "has sent its commit": "commit answered"}
DIES_AT_ITS_ACK = "the replica dies at its next ack"
PAIR_FAULTS = {
    "the replica is killed": HOLDS,
    "it gets an error": HOLDS,
    "it is stalled": HOLDS,
    DIES_AT_ITS_ACK: {"is about to commit": "commit seen"},
}
HELD_BACK_SECONDS = 0.3  # the votes of a batch that is written alone, so that another can join it


def try_moment(lab: Lab, step: Step, fault: str) -> None:
    """Let ``fault`` happen at ``step`` of a batch in the middle of a stream; heal; ask the oracle. Raises Violation."""
    replica = lab.replica()
    lab.publish(make_messages(60, seed=1, duplicates=20, invalid=5))
    happened = arm(replica, step, act(replica, step, fault))
    lab.publish(make_messages(40, seed=2, duplicates=20, invalid=5))
    lab.publish(in_arrays(make_messages(500, seed=3, duplicates=5, invalid=2), seed=3))
    if not happened.wait(30):
        raise Violation(f"the service never {step.name}")
    if fault == "is stalled":
        lab.wait_at_rest()  # the service frees itself of a stall; what it left behind may then end too
    lab.heal()
    lab.check()


def arm(replica: Replica, step: Step, action: Callable[[Link], object]) -> threading.Event:
    """Have ``action`` happen once, at this step of a batch that holds votes. Returns the event that says it did.

    A COMMIT alone may be that of a probe; so one is waited for only from the votes of a batch on.
    """
    happened = threading.Event()
    proxy: TcpProxy = getattr(replica, step.seen_by)
    # the 10th: in the middle of a batch
    start = ("deliver seen", 10) if step.seen_by == "broker" else ("votes seen", 1)

    def happen(link: Link) -> None:
        action(link)
        happened.set()

    proxy.on(start[0], lambda _: proxy.on(step.moment, happen), nth=start[1])
    return happened


def act(replica: Replica, step: Step, fault: str) -> Callable[[Link], object]:
    """What to do at the moment, with the link that it was seen on."""

    def kill(link: Link) -> None:
        replica.kill()
        link.cut()

    if fault == "is killed":
        return kill
    if step.hits != step.seen_by:
        other: TcpProxy = getattr(replica, step.hits)
        return (lambda _: other.cut_all()) if fault == "gets an error" else (lambda _: other.stall_all())
    return Link.cut if fault == "gets an error" else Link.stall


class Pair:
    """Two batches that a replica writes at the same time, in the middle of a stream of arrays."""

    def __init__(self, replica: Replica, lab: Lab) -> None:
        self.replica = replica
        self._lab = lab
        self.first: Link | None = None
        self.second: Link | None = None
        self._met = threading.Event()
        replica.database.on("votes seen", self._see_alone)
        lab.publish(make_messages(1, seed=20))
        wait_until(
            lambda: lab.results.counted() == 1 and lab.all_acked(), "the first batch, which is alone, is settled"
        )

    def _see_alone(self, link: Link) -> None:
        self.first = link  # a batch that is alone has the connection that the first of two has

    def meet(self, action: Callable[[], object]) -> None:
        """Have ``action`` happen when both are about to be sent to the server, and publish a stream of arrays."""
        proxy = self.replica.database

        def hold_back(link: Link) -> None:
            if not self._met.is_set():
                link.delay(HELD_BACK_SECONDS)

        def meet(link: Link) -> None:
            (self.second,) = {link, *link.others_writing()} - {self.first}
            self._met.set()
            action()

        proxy.on("votes seen", hold_back, times=1_000)
        proxy.on(AT_ONCE, meet)
        # of a law each: else one would wait for the other's end, since both change the law's row of totals
        self.publish(array_of_law(f"law-{number}", 40, seed=number) for number in range(100, 108))

    def publish(self, messages: Iterable[Message]) -> None:
        """Publish them so that the replica gets all at once."""
        self.replica.broker.black_hole(True, DOWN)
        self._lab.publish(messages)
        try:
            wait_until(lambda: self._lab.queue.ready() == 0, "all are on their way")
        finally:
            self.replica.broker.black_hole(False, DOWN)

    def hold(self, held: Link, moment: str, action: Callable[[], object]) -> None:
        """Hold one of the two at this moment until the other is committed, and its reply is there; then act."""
        proxy = self.replica.database
        come: set[Link] = set()

        def come_to(link: Link) -> None:
            come.add(link)
            if link is held:
                link.stall()
            if come == {self.first, self.second}:
                action()

        def hold_at(link: Link) -> None:
            if link is held and link not in come:
                come_to(link)

        def committed(link: Link) -> None:
            if link in (self.first, self.second) and link is not held and link not in come:
                come_to(link)

        proxy.on(moment, hold_at, times=1_000)
        proxy.on("commit delivered", committed, times=1_000)


def try_pair(lab: Lab, held: str, moment: str, fault: str) -> None:
    """Of two batches the first or the second comes to ``moment`` and no further, and the other is committed.

    Then ``fault`` happens; heal; ask the oracle. Raises Violation.
    """
    replica = lab.replica()
    pair = Pair(replica, lab)
    happened = threading.Event()

    def begin() -> None:
        link = pair.first if held == "first" else pair.second
        assert link is not None

        def happen() -> None:
            if fault == "the replica is killed":
                replica.kill()
                replica.database.cut_all()
            elif fault == "it gets an error":
                link.cut()
            if fault != DIES_AT_ITS_ACK:
                happened.set()

        def die(ack: Link) -> None:
            replica.kill()
            ack.close()  # a reset could overtake the ack
            happened.set()

        if fault == DIES_AT_ITS_ACK:
            replica.broker.on("ack forwarded", die)
        pair.hold(link, moment, happen)

    pair.meet(begin)
    if not happened.wait(30):
        raise Violation(f"of two batches the {held} never came to {moment!r} while the other was committed")
    if fault == "it is stalled":
        lab.wait_at_rest()  # the service frees itself of a stall; what it left behind may then end too
    lab.heal()
    lab.check()
