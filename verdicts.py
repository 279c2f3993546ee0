"""What the service would say of bodies, without a broker and a database: `test_publisher.py --check`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from typing import NamedTuple

from votes import MAX_BODY_BYTES, REASONS, Outcome, Rejection, Vote, read_message

VOTE = "vote"
HELD_BYTES = MAX_BODY_BYTES + 2  # enough to know that a body is too large, also without a carriage return at its end


class Verdict(NamedTuple):
    """What the service would say of one body, or of one vote of an array.

    ``outcome`` is "vote", or "duplicate", "conflict" or "second_vote" where ``counted_body`` counts in its place, or
    the reason code of what is no vote.
    """

    number: int  # of the body, from 1
    outcome: str
    vote: Vote | None = None
    counted_body: int | None = None
    place: int = 0  # in the array, from 1; 0 for a body by itself
    counted_place: int = 0  # likewise

    def as_text(self) -> str:
        """One line for people. Nothing of the body is in it but what the rules of its field let through."""
        where = _where(self.number, self.place)
        if self.vote is None:
            return f"{where}  {self.outcome}  {REASONS[self.outcome]}"
        vote = f"{self.vote.vote_id} {self.vote.law_id} {self.vote.choice}"
        instead = ""
        if self.counted_body:
            body = "" if self.counted_place else "body "
            instead = f", {body}{_where(self.counted_body, self.counted_place)} counts"
        return f"{where}  {self.outcome}  {vote}{instead}"

    def as_json(self) -> dict[str, object]:
        """The same for programs."""
        told: dict[str, object] = {"body": self.number}
        if self.place:
            told["place"] = self.place
        told["verdict"] = self.outcome
        if self.vote is None:
            return told | {"detail": REASONS[self.outcome]}
        told |= {"vote_id": self.vote.vote_id, "law_id": self.vote.law_id, "choice": self.vote.choice}
        if self.counted_body:
            told["counted_body"] = self.counted_body
        if self.counted_place:
            told["counted_place"] = self.counted_place
        return told


def _where(number: int, place: int) -> str:
    return f"{number}.{place}" if place else f"{number}"


def bodies(stream: BufferedIOBase, end: bytes = b"\n") -> Iterator[bytes]:
    """Yield what stands before each ``end``, and after the last one if there is anything; of a body that is too large
    only the beginning. A line may end with a carriage return too. Raises OSError.
    """
    body = bytearray()
    while chunk := stream.read1(MAX_BODY_BYTES):
        *ended, rest = chunk.split(end)
        for piece in ended:
            body += piece
            if end == b"\n" and body.endswith(b"\r"):
                del body[-1]
            yield bytes(body)
            body.clear()
        body += rest
        del body[HELD_BYTES:]
    if body:
        yield bytes(body)


def verdicts(
    messages: Iterable[bytes], message_id: str | None = None, content_encoding: str | None = None
) -> Iterator[Verdict]:
    """Judge each body as the service would that counts them in this order, each published once with these properties;
    in an array each vote.

    What only its database knows is left out: votes that were counted before, the windows of laws, certified results.
    """
    counted: dict[str, tuple[int, int, tuple[str, str, str | None]]] = {}
    voters: dict[tuple[str, str], tuple[int, int]] = {}
    for number, body in enumerate(messages, 1):
        for vote in read_message(body, message_id, content_encoding):
            if isinstance(vote, Rejection):
                yield Verdict(number, vote.reason, place=vote.place)
                continue
            content = (vote.law_id, vote.choice, vote.voter_hash)
            voter = vote.voter_hash and (vote.law_id, vote.voter_hash)
            if vote.vote_id in counted:
                first, place, counted_content = counted[vote.vote_id]
                outcome = Outcome.DUPLICATE if content == counted_content else Outcome.CONFLICT
                yield Verdict(number, outcome, vote, first, vote.place, place)
            elif voter and voter in voters:
                first, place = voters[voter]
                yield Verdict(number, Outcome.SECOND_VOTE, vote, first, vote.place, place)
            else:
                counted[vote.vote_id] = number, vote.place, content
                if voter:
                    voters[voter] = number, vote.place
                yield Verdict(number, VOTE, vote, place=vote.place)


def check(
    file: str,
    end: bytes = b"\n",
    message_id: str | None = None,
    content_encoding: str | None = None,
    as_json: bool = False,
) -> int:
    """Print the verdicts on each body of a file ("-": standard input) and how many there are of each kind.

    Returns the exit code: 0 every body would count, 1 some would not, 2 there is none, or it cannot be read.
    """
    found: Counter[str] = Counter()
    number, has_arrays = 0, False
    try:
        with open(0 if file == "-" else file, "rb", closefd=file != "-") as stream:
            for verdict in verdicts(bodies(stream, end), message_id, content_encoding):
                found[verdict.outcome] += 1
                number, has_arrays = verdict.number, has_arrays or verdict.place > 0
                print(json.dumps(verdict.as_json()) if as_json else verdict.as_text())
        if not found:
            print(f"--check {file}: there is no body in it", file=sys.stderr)
            return 2
        summary = json.dumps({"bodies": number, "verdicts": found}) if as_json else _summary(number, has_arrays, found)
        print(summary, flush=True)
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as exc:
        print(f"--check {file}: {exc.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if found.keys() == {VOTE} else 1


def _summary(number: int, has_arrays: bool, found: Counter[str]) -> str:
    kinds = ", ".join(f"{outcome} {count:,}" for outcome, count in found.items())
    votes = f" with arrays, {found.total():,} verdicts" if has_arrays else ""
    return f"\n{number:,} {'body' if number == 1 else 'bodies'}{votes}: {kinds}"
