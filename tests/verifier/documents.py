"""True proofs and chains of seals, and copies of them with one thing altered, which every verifier has to refuse."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from seals import NO_HASH, Seal, leaf_hash, merkle_path, merkle_root

SEALS = 5
PROVED = 1  # the seal of the proof, counted from 0


class Document(NamedTuple):
    """What a verifier is given: a proof or a chain, as JSON, and the seal that was published."""

    name: str
    kind: str
    json: str
    published: str


class Documents:
    """A log made up at random, its chain, and a proof of one of its votes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seals: list[Seal] = []
        before = NO_HASH
        rows_of: list[list[str]] = []
        for number in range(SEALS):
            rows = [self._row(number) for _ in range(self.random.randint(5, 40))]
            leaves = [leaf_hash(row.encode()) for row in rows]
            seal = Seal(
                *(number + 1, number * 100, number * 100 + 100, len(rows), merkle_root(leaves)),
                leaves_hash=hashlib.sha256(b"leaves of %d" % number).digest(),
                sealed_at=f"2026-11-29 20:0{number}:00.{self.random.randint(1, 9)}+00",
                previous_hash=before,
                records_hash=hashlib.sha256(b"").digest(),
            )
            before = seal.hash()
            self.seals.append(seal)
            rows_of.append(rows)
        rows = rows_of[PROVED]
        index = self.random.randrange(1, len(rows) - 1)
        path = merkle_path([leaf_hash(row.encode()) for row in rows], index)
        self._proof = {
            "vote_id": rows[index].split("\t")[0],
            "row": rows[index],
            "index": index,
            "path": [step.hex() for step in path],
            "seals": [seal.as_texts() for seal in self.seals[PROVED:]],
        }
        self._chain = {"shows_numbers": True, "seals": [self._published(seal) for seal in self.seals]}
        self.published = self.seals[-2].name()

    def _row(self, number: int) -> str:
        vote_id = uuid.UUID(int=self.random.getrandbits(128), version=4)
        choice = self.random.choice(("oui", "non"))
        fields = (
            vote_id,
            "law-1",
            choice,
            r"\N",
            "2026-11-29 19:00:00.5+00",
            "h" * 16,
            "Répliqué 1",
            "f",
            number * 100,
        )
        return "\t".join(map(str, fields))

    @staticmethod
    def _published(seal: Seal) -> dict[str, str]:
        return seal.as_texts() | {"seal_hash": seal.hash().hex()}

    def proof(self) -> Document:
        return Document("the proof", "proof", json.dumps(self._proof), self.published)

    def chain(self) -> Document:
        return Document("the chain", "chain", json.dumps(self._chain), self.published)

    def hashes(self) -> Document:
        """The chain as it is published while a law is open that is hidden."""
        names = ("seal_id", "sealed_at", "previous_hash", "seal_hash")
        shown = [{name: self._published(seal)[name] for name in names} for seal in self.seals]
        return Document("hashes", "chain", json.dumps({"shows_numbers": False, "seals": shown}), self.published)

    def altered(self) -> list[Document]:
        """Each altered in one way that changes what it says, and in a form that is still that of such a document."""
        copies: list[Document] = []

        def alter(true: Document, name: str, change: Callable[[dict[str, Any]], object]) -> None:
            document = json.loads(true.json)
            change(document)
            copies.append(Document(f"{true.kind}: {name}", true.kind, json.dumps(document), true.published))

        proof, chain, hashes = self.proof(), self.chain(), self.hashes()
        for at, name in enumerate(("vote_id", "law_id", "choice", "voted_at", "recorded_at", "voter_hash", "instance")):
            alter(proof, f"{name} of the row", lambda document, at=at: self._alter_row(document, at))
        alter(proof, "redelivered", lambda document: self._alter_row(document, 7))
        alter(proof, "txid", lambda document: self._alter_row(document, 8))
        alter(proof, "another vote_id", lambda document: document.update(vote_id=str(uuid.UUID(int=7, version=4))))
        alter(proof, "the row before", lambda document: document.update(index=document["index"] - 1))
        alter(proof, "the row after", lambda document: document.update(index=document["index"] + 1))
        alter(proof, "a row below all", lambda document: document.update(index=-1))
        alter(proof, "a row beyond all", lambda d: d.update(index=d["index"] + 2 * int(d["seals"][0]["votes"])))
        alter(proof, "a step changed", lambda document: self._change_step(document["path"]))
        alter(proof, "a step left out", lambda d: d["path"].pop(self.random.randrange(len(d["path"]))))
        alter(proof, "a step added", lambda document: document["path"].append("0" * 64))
        alter(proof, "steps the other way round", lambda document: document["path"].reverse())
        alter(proof, "a seal left out", lambda document: document["seals"].pop(1))
        alter(proof, "its own seal left out", lambda document: document["seals"].pop(0))
        alter(proof, "the published seal left out", lambda document: document.update(seals=document["seals"][:1]))
        alter(proof, "a chain that is another one", lambda document: self._rebuild(document["seals"], 0))
        for name in self.seals[0].as_texts():
            alter(
                proof, f"{name} of its seal", lambda document, name=name: self._alter_seal(document["seals"][0], name)
            )
        for name in self._published(self.seals[0]):
            at = self.random.randrange(1, SEALS - 1)
            alter(chain, f"{name} of a seal", lambda d, name=name, at=at: self._alter_seal(d["seals"][at], name))
        alter(chain, "a seal left out", lambda document: document["seals"].pop(self.random.randrange(1, SEALS - 1)))
        alter(chain, "two seals swapped", lambda document: document["seals"].insert(1, document["seals"].pop(2)))
        alter(chain, "a seal twice", lambda document: document["seals"].insert(1, document["seals"][1]))
        alter(chain, "records that no seal covers", lambda document: document["seals"][2].pop("records_hash"))
        alter(chain, "the end left out", lambda document: document.update(seals=document["seals"][:-2]))
        alter(chain, "a chain that is another one", lambda document: self._rebuild(document["seals"], 1))
        for name in ("seal_id", "previous_hash", "seal_hash"):
            alter(hashes, f"{name} without numbers", lambda d, name=name: self._alter_seal(d["seals"][2], name))
        copies.append(proof._replace(name="proof: another published seal", published=f"5:{'0' * 64}"))
        copies.append(chain._replace(name="chain: another published seal", published=self.seals[0].name()[::-1][:64]))
        copies[-1] = copies[-1]._replace(published=f"1:{copies[-1].published.replace(':', '0')}")
        return copies

    def _alter_row(self, proof: dict[str, Any], at: int) -> None:
        fields = proof["row"].split("\t")
        fields[at] = {
            0: str(uuid.UUID(int=self.random.getrandbits(128), version=4)),
            2: "non" if fields[2] == "oui" else "oui",
            3: "2026-11-29 19:00:00+00",
            4: "2026-11-29 19:00:00.6+00",
            7: "t",
            8: str(int(fields[8]) + 1),
        }.get(at, fields[at] + "x")
        proof["row"] = "\t".join(fields)
        if at == 0:
            proof["vote_id"] = fields[0]

    def _change_step(self, path: list[str]) -> None:
        at = self.random.randrange(len(path))
        path[at] = self._other_hash(path[at])

    def _alter_seal(self, fields: dict[str, str], name: str) -> None:
        value = fields[name]
        if name == "sealed_at":
            fields[name] = value.replace(".", ".0")
        else:
            fields[name] = self._other_hash(value) if len(value) == 64 else str(int(value) + 1)

    def _other_hash(self, value: str) -> str:
        at = self.random.randrange(64)
        digit = self.random.choice([digit for digit in "0123456789abcdef" if digit != value[at]])
        return value[:at] + digit + value[at + 1 :]

    def _rebuild(self, seals: list[dict[str, str]], at: int) -> None:
        """What somebody does who knows how it works: one seal altered, and all that follow made to fit."""
        before = None
        for fields in copy.deepcopy(seals)[at:]:
            seal = Seal.from_texts(fields)
            seal = dataclasses.replace(seal, leaves_hash=b"x" * 32) if before is None else seal
            seal = dataclasses.replace(seal, previous_hash=before) if before is not None else seal
            before = seal.hash()
            seals[at] = seal.as_texts() | ({"seal_hash": before.hex()} if "seal_hash" in fields else {})
            at += 1
