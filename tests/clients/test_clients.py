"""Votes as common clients of RabbitMQ send them, with nothing set but what sending a body to a queue needs."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.local_services import LocalServices
from tests.harness import ROOT, Queue, Results, Service, vote, wait_settled

FOLDER = Path(__file__).parent
PACKAGES_OF_NODE = ROOT / ".venv/clients/node_modules"
SEND_SECONDS = 60


class Client(NamedTuple):
    """How a client is run: its command, what is added to it for gzip, and what the service then says of a message."""

    command: Sequence[str]
    module: str = ""  # of Python, that it needs
    reads_lines: bool = True  # each a message; else its whole input is one
    gzip: Sequence[str] = ("gzip",)
    reason: str = "content_encoding"
    votes: int = 200  # of each kind

    def missing(self) -> str:
        """What is not installed of it; empty where all is there."""
        if shutil.which(self.command[0]) is None:
            return self.command[0]
        if self.command[0] == "node" and not (PACKAGES_OF_NODE / "amqplib").is_dir():
            return "amqplib; run `make test-clients`, with npm on the PATH"
        return self.module if self.module and importlib.util.find_spec(self.module) is None else ""

    def send(self, queue: Queue, bodies: Sequence[str], more: Sequence[str] = ()) -> None:
        """Send each body as a message of its own, and return when the client has ended well."""
        inputs = ["".join(f"{body}\n" for body in bodies)] if self.reads_lines else bodies
        for text in inputs:
            filled = {"{url}": queue.url, "{queue}": queue.name, "{body}": text}
            subprocess.run(
                [*(filled.get(word, word) for word in self.command), *more],
                input=text,
                env={"PATH": os.environ["PATH"], "NODE_PATH": str(PACKAGES_OF_NODE)},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=SEND_SECONDS,
            )


KOMBU = (sys.executable, str(FOLDER / "send_kombu.py"), "{url}", "{queue}")
AMQP_PUBLISH = ("amqp-publish", "--url", "{url}", "--routing-key", "{queue}")
CLIENTS = {
    # kombu says gzip in a header of its own, and utf-8 all the same: what arrives is no text
    "kombu, objects": Client((*KOMBU, "object"), "kombu", reason="not_utf8"),
    "kombu, texts": Client((*KOMBU, "text"), "kombu"),
    "kombu, bytes": Client((*KOMBU, "bytes"), "kombu"),
    "aio-pika": Client((sys.executable, str(FOLDER / "send_aio_pika.py"), "{url}", "{queue}"), "aio_pika"),
    "amqplib": Client(("node", str(FOLDER / "send_amqplib.js"), "{url}", "{queue}")),
    "amqp-publish, lines": Client((*AMQP_PUBLISH, "--line-buffered"), gzip=("--content-encoding", "gzip")),
    "amqp-publish, a file": Client(AMQP_PUBLISH, reads_lines=False, votes=20),
    "amqp-publish, a word": Client((*AMQP_PUBLISH, "--body", "{body}"), reads_lines=False, votes=20),
}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    """Each client; one that is missing fails in CI and is skipped elsewhere."""
    client = CLIENTS[request.param]
    if missing := client.missing():
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"not installed: {missing}")
    return client


def stop_when_settled(services: LocalServices, service: Service, queue: Queue) -> None:
    """The service takes all there is and ends; what it had not acked would be on the queue again."""
    wait_settled(services, queue)  # what is still on its way to a service that stops goes back
    assert service.stop() == 0
    assert queue.ready() == 0


def test_votes_of_a_client_count_exactly(
    client: Client,
    services: LocalServices,
    start_service: Callable[..., Service],
    queue: Queue,
    results: Results,
) -> None:
    """vote_ids in both cases, one vote in each of them; votes named by their voter alone, all sent twice."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cast = rng.choices(("oui", "non"), k=3 * client.votes)
    lower = [vote(choice=choice) for choice in cast[::3]]
    upper = [vote(choice=choice, vote_id=str(uuid.uuid4()).upper()) for choice in cast[1::3]]
    again = [each | {"vote_id": each["vote_id"].lower()} for each in upper]
    voters = [
        {"law_id": "law-001", "choice": choice, "voter_hash": f"{rng.getrandbits(256):064x}"} for choice in cast[2::3]
    ]
    bodies = [json.dumps(each) for each in [*lower, *upper, *again, *voters, *voters]]
    rng.shuffle(bodies)
    service = start_service()  # which declares the queue

    client.send(queue, bodies)
    stop_when_settled(services, service, queue)

    assert results.totals() == results.audited() == {"law-001": (cast.count("oui"), cast.count("non"))}
    assert results.duplicates() == {"duplicate": 2 * client.votes}
    assert results.rejected() == {}


@pytest.mark.parametrize("client", ["kombu, objects", "aio-pika", "amqplib", "amqp-publish, lines"], indirect=True)
def test_what_a_client_sends_as_gzip_is_refused(
    client: Client,
    services: LocalServices,
    start_service: Callable[..., Service],
    queue: Queue,
    results: Results,
) -> None:
    """And kept with its reason; the votes beside it count."""
    service = start_service()
    client.send(queue, [json.dumps(vote()) for _ in range(10)])
    client.send(queue, [json.dumps(vote(choice="non")) for _ in range(10)], client.gzip)
    stop_when_settled(services, service, queue)
    assert results.totals() == {"law-001": (10, 0)}
    assert results.rejected() == {client.reason: 10}
