"""Every step of a batch, by where the proxies see it, times what can go wrong there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from test_publisher import make_messages
from tests.faults.lab import Lab, Replica
from tests.faults.oracle import Violation
from tests.faults.proxy import Link, TcpProxy


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


def try_moment(lab: Lab, step: Step, fault: str) -> None:
    """Let ``fault`` happen at ``step`` of a batch in the middle of a stream; heal; ask the oracle. Raises Violation."""
    replica = lab.replica()
    lab.publish(make_messages(60, seed=1, duplicates=20, invalid=5))
    happened = arm(replica, step, act(replica, step, fault))
    lab.publish(make_messages(120, seed=2, duplicates=20, invalid=5))
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
