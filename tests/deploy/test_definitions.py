"""What deploy/rabbitmq/definitions.sh prints. No broker is needed; one reads it in integration/test_few_rights.py."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rabbitmq_client import queue_arguments
from tests.harness import ROOT

USERS = {"SERVICE_USER": "s", "SERVICE_PASSWORD": "1", "PUBLISHER_USER": "p", "PUBLISHER_PASSWORD": "2"}


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    """The script with these variables, and the users."""
    environment = {"PATH": os.environ["PATH"], **USERS, **variables}
    script = ROOT / "deploy/rabbitmq/definitions.sh"
    return subprocess.run(["bash", script], capture_output=True, text=True, env=environment, check=False)


def definitions(**variables: str) -> dict[str, Any]:
    """What it prints."""
    done = run(**variables)
    assert (done.returncode, done.stderr) == (0, "")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("version", ["3.10.8", "3.13.7", "4.0.5", "4.1.0-rc.1", "4", "10.2", ""])
def test_the_queue_is_the_one_that_the_service_declares(queue_type: str, version: str) -> None:
    """Type and arguments are those of rabbitmq_client.py on a broker of that version; an empty one means 4."""
    printed = definitions(RABBITMQ_QUEUE_TYPE=queue_type, RABBITMQ_VERSION=version, RABBITMQ_MAX_PRIORITY="5")
    major = int(version.split(".")[0] or 4)
    assert printed["queues"][0] == {
        "name": "votes.aggregation",
        "vhost": "/",
        "durable": True,
        "auto_delete": False,
        "arguments": queue_arguments(queue_type, 5, (major,)),
    }


KEEP = {"dead-letter-exchange": "a.b.dead-letters"}
KEEP_SURELY = {**KEEP, "dead-letter-strategy": "at-least-once", "overflow": "reject-publish"}


@pytest.mark.parametrize(
    ("queue_type", "version", "definition"),
    [
        ("quorum", "4.1.2", {**KEEP_SURELY, "delivery-limit": -1}),
        ("quorum", "3.13.7", KEEP_SURELY),
        ("classic", "4.1.2", KEEP),
        ("", "4.1.2", KEEP),
    ],
)
def test_a_policy_keeps_what_falls_out_and_lifts_the_limit_of_a_quorum_queue_from_4_on(
    queue_type: str, version: str, definition: dict[str, Any]
) -> None:
    """Before 4 there is no limit, and -1 would be one. Where the type is not known other policies go first."""
    printed = definitions(RABBITMQ_QUEUE_TYPE=queue_type, RABBITMQ_VERSION=version, RABBITMQ_QUEUE="a.b")
    assert printed["policies"] == [
        {
            "name": "a.b.keep",
            "vhost": "/",
            "pattern": "^a\\.b$",
            "apply-to": "queues",
            "definition": definition,
            "priority": 1 if queue_type else -1,
        }
    ]
    assert {queue["name"] for queue in printed["queues"]} - {"a.b"} == {"a.b.dead", "a.b.rejected"}


def test_without_a_type_the_vote_queue_is_not_among_them() -> None:
    """The service declares it then."""
    queues = definitions(RABBITMQ_QUEUE_TYPE="")["queues"]
    assert [queue["name"] for queue in queues] == ["votes.aggregation.dead", "votes.aggregation.rejected"]


def test_a_queue_without_priorities_has_no_such_argument() -> None:
    """As the service declares it."""
    queue = definitions(RABBITMQ_QUEUE_TYPE="classic", RABBITMQ_MAX_PRIORITY="0")["queues"][0]
    assert (
        queue["arguments"] == queue_arguments("classic", 0, (4,)) == {"x-queue-type": "classic", "x-queue-version": 2}
    )


def test_the_type_is_taken_in_any_case() -> None:
    """As the service takes it."""
    queue = definitions(RABBITMQ_QUEUE_TYPE="Quorum")["queues"][0]
    assert queue["arguments"]["x-queue-type"] == "quorum"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RABBITMQ_QUEUE_TYPE", "qurum"),
        ("RABBITMQ_QUEUE_TYPE", "stream"),
        ("RABBITMQ_QUEUE_TYPE", "classic quorum"),
        ("RABBITMQ_VERSION", "four"),
        ("RABBITMQ_VERSION", "v4"),
        ("RABBITMQ_VERSION", "04"),
        ("RABBITMQ_VERSION", "4,1"),
        ("RABBITMQ_MAX_PRIORITY", "-1"),
        ("RABBITMQ_MAX_PRIORITY", "01"),
        ("RABBITMQ_MAX_PRIORITY", "256"),
        ("RABBITMQ_MAX_PRIORITY", "ten"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_printed(name: str, value: str) -> None:
    """A broker with half of its definitions would be worse than none."""
    done = run(**{name: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name} is '{value}': accepted is ")


def test_passwords_may_be_in_files(tmp_path: Path) -> None:
    """Their first lines, with every character as it is; one that is in neither form is an error."""
    (tmp_path / "secret").write_text("a$b`c\\d\r\nnot this\n")
    hashed = definitions(SERVICE_PASSWORD="", SERVICE_PASSWORD_FILE=str(tmp_path / "secret"))["users"][0][
        "password_hash"
    ]
    salted = base64.b64decode(hashed)
    assert salted[4:] == hashlib.sha256(salted[:4] + b"a$b`c\\d").digest()
    for wrong in ({"SERVICE_PASSWORD": ""}, {"PUBLISHER_PASSWORD": "", "PUBLISHER_PASSWORD_FILE": str(tmp_path / "x")}):
        assert run(**wrong).returncode != 0
