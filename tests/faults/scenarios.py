"""Single faults with a story, each a function that raises Violation where the promise is broken.

The tests run them on the service as it is; the mutants run them on services that are broken on purpose.
"""

from __future__ import annotations

import threading

from test_publisher import make_messages
from tests.faults.lab import Lab
from tests.faults.proxy import Link
from tests.harness import wait_until


def publish_copies(lab: Lab) -> None:
    """A quiet stream in which every second message is a copy."""
    lab.replica()
    lab.publish(make_messages(200, seed=3, duplicates=100))
    lab.check()


def reconnect_while_a_commit_is_out(lab: Lab) -> None:
    """The second batch is committed when the connection that delivered it is gone, and its tags mean other votes.

    Were it acked all the same, votes that nobody has counted yet would be gone from the queue; so the replica dies as
    soon as it sends an ack.
    """
    replica = lab.replica(BATCH_TIMEOUT_SECONDS="60")
    reconnected = threading.Event()

    def reconnect(link: Link) -> None:
        """The reply to COMMIT waits until the same messages are delivered again on a new channel."""
        replica.broker.cut_all()
        link.stall()
        reconnected.set()

    def die(link: Link) -> None:
        replica.kill()
        link.cut()

    replica.database.on(
        "audit seen", lambda _: replica.database.on("commit answered", reconnect), nth=2
    )  # the tags of the second batch are 21 to 40
    lab.publish(make_messages(150, seed=4))
    _require(reconnected.wait(20), "the second batch is committed")
    replica.broker.wait_for("redelivery forwarded", 60)
    replica.broker.on("ack forwarded", die)
    replica.database.release()
    wait_until(
        lambda: not replica.is_running() or replica.says("settlement dropped, channel replaced"), "it goes on", 20
    )
    wait_until(lambda: not replica.is_running(), "the next ack", 20)
    lab.heal()
    replica.stop()  # to flush what waits for its timer
    replica.start_and_wait()
    lab.wait_for_all_published()
    replica.stop()
    replica.start_and_wait()
    lab.check()
