"""Streams in which most votes come many to a message, with what only arrays can hold."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from test_publisher import DUPLICATE, INVALID, VOTE, Message, make_messages

ARRAY = "array"
MOST_VOTES = 200  # in an array
MOST_BYTES = 60_000
MOST_BYTES_OF_ELEMENT = 10_000


class Array(Message):
    """A message that holds many. Its ``id`` is the SHA-256 of its body, that of an invalid element of its own text."""

    elements: Sequence[Message] = ()

    @classmethod
    def of(cls, elements: Sequence[Message], rng: random.Random) -> Self:
        """Written with white space here and there; its message_id is a UUID, which must mean nothing."""
        body = b",".join(rng.choice([b"", b"", b" ", b"\r\n\t"]) + element.body for element in elements)
        body = b"[" + body + rng.choice([b"]", b" ]\n"])
        message_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        array = cls(ARRAY, hashlib.sha256(body).hexdigest(), "", "", body, message_id)
        array.elements = elements
        return array

    def entries(self) -> list[tuple[str, str, str, str, str | None, int]]:
        """Of each element what an oracle has to know: its id, law, choice, kind, voter and place."""
        return [
            (element.id, element.law_id, element.choice, element.kind, _voter(element), place)
            for place, element in enumerate(self.elements, start=1)
        ]


def _voter(element: Message) -> str | None:
    return None if element.kind == INVALID else json.loads(element.body).get("voter_hash")


def in_arrays(messages: Iterable[Message], seed: int, rivals: float = 0.03) -> Iterator[Message]:
    """The same votes, copies and invalid messages in their order, in arrays of 1 to 200 and some of them by themselves.

    ``rivals`` of the votes in arrays have a conflict (the same identity, the other choice), and as many a second vote
    of their voter, in the same array or in the next; with them every tenth array comes twice. What would make an array
    unreadable as a whole stays by itself, or takes an array with it in which nothing may count.
    """
    rng = random.Random(f"arrays of {seed}")
    held: list[Message] = []
    later: list[Message] = []
    size = _size(rng)
    for message in messages:
        if message.kind == INVALID and not fits_in_an_array(message):
            yield _refused(message, rng) if rng.random() < 0.5 else message
        elif not held and rng.random() < 0.2:
            yield message
        else:
            held.append(message)
            if message.kind == VOTE and rng.random() < rivals:
                rng.choice([held, later]).extend(rivals_of(message, rng))
        if len(held) >= size or sum(len(message.body) + 4 for message in held) > MOST_BYTES - MOST_BYTES_OF_ELEMENT:
            array = Array.of(held, rng)
            yield array
            if rivals and rng.random() < 0.1:
                yield array
            held, later, size = later, [], _size(rng)
    if held or later:
        yield Array.of(held + later, rng)


def array_of_law(law_id: str, votes: int, seed: int) -> Array:
    """An array of so many different votes on one law."""
    made = make_messages(votes, laws=1, seed=seed)
    elements = [
        vote._replace(law_id=law_id, body=vote.body.replace(vote.law_id.encode(), law_id.encode())) for vote in made
    ]
    return Array.of(elements, random.Random(seed))


def fits_in_an_array(message: Message) -> bool:
    """Whether an array that holds it can be read, and it alone, if anything, cannot."""
    if message.content_encoding is not None or len(message.body) > MOST_BYTES_OF_ELEMENT:
        return False
    try:
        value = json.loads(message.body.decode(), parse_int=str, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return not isinstance(value, list)


def _no_constant(text: str) -> object:
    raise ValueError(text)


def _size(rng: random.Random) -> int:
    return round(MOST_VOTES ** rng.random())  # half of them below 14


def rivals_of(vote: Message, rng: random.Random) -> Iterator[Message]:
    """A vote with its identity and the other choice, and, where it has a voter, a second vote of that voter."""
    fields = json.loads(vote.body)
    other = "non" if vote.choice == "oui" else "oui"
    yield vote._replace(kind=DUPLICATE, choice=other, body=json.dumps(fields | {"choice": other}).encode())
    if "voter_hash" in fields:
        vote_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        body = json.dumps(fields | {"vote_id": vote_id}).encode()
        yield vote._replace(kind=DUPLICATE, id=vote_id, body=body)


def _refused(message: Message, rng: random.Random) -> Message:
    """An array that is unreadable for this one, with a good vote that nobody may count."""
    vote_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    vote = json.dumps({"vote_id": vote_id, "law_id": "law-001", "choice": "oui"}).encode()
    body = b"[" + vote + b"," + message.body + b"]"
    return message._replace(id=hashlib.sha256(body).hexdigest(), body=body)
