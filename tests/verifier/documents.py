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

    def __init__(self, seed: int, formats: tuple[int, ...] = (3,) * SEALS) -> None:
        """``formats`` are those of the seals."""
        self._seed = seed
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
                records_hash=hashlib.sha256(b"").digest() if formats[number] > 1 else None,
                salt=self.random.randbytes(32) if formats[number] > 2 else None,
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

    def malformed(self) -> list[Document]:
        """Made up as a whole so that all hashes fit, and each in a form that docs/VERIFY.md has not."""
        made: list[Document] = []

        def add(kind: str, name: str, document: dict[str, Any]) -> None:
            made.append(Document(f"{kind}: {name}", kind, json.dumps(document), ""))

        for name, row in self._odd_rows().items():
            add("proof", f"a row with {name}", self._proof_of(row))
        alone = self._proof_of(self._row(0))
        for name, changes in (("a text", {"path": ""}), ("an object", {"path": {}}), ("nothing", {"path": None})):
            add("proof", f"{name} as its path", alone | changes)
        for name in ("row", "index", "path", "vote_id", "seals"):
            add("proof", f"no {name}", {key: value for key, value in self._proof.items() if key != name})
        add("proof", "an index of false", alone | {"index": False})
        add("proof", "an index as text", alone | {"index": "0"})
        path = self._proof["path"]
        add("proof", "a step in capitals", self._proof | {"path": [path[0].upper(), *path[1:]]})
        add("proof", "a step with blanks", self._proof | {"path": [f"{path[0][:2]} {path[0][2:]}", *path[1:]]})
        for name, (at, changes) in self._odd_seals().items():
            add("proof", name, self._proof | {"seals": self._made_to_fit(self._proof["seals"], at, changes)})
            add("chain", name, {"seals": self._made_to_fit(self._chain["seals"], at, changes)})
        older = Documents(self._seed, (2,) * SEALS)
        for kind, document in (("proof", older._proof), ("chain", older._chain)):
            seals = self._made_to_fit(document["seals"], 2, {"records_hash": None})
            add(kind, "a seal of the first format after one of the second", document | {"seals": seals})
        for name, hash_ in (
            ("no text", None),
            ("another one", "0" * 64),
            ("in capitals", self.seals[1].hash().hex().upper()),
        ):
            seals = copy.deepcopy(self._proof["seals"])
            seals[0]["seal_hash"] = hash_
            add("proof", f"a seal_hash that is {name}", self._proof | {"seals": seals})
        first = {"seal_id": "1", "from_txid": "0"}
        add("proof", "a first seal with one before it", self._proof | {"seals": self._renumbered(first)})
        first = {"seal_id": "1", "previous_hash": "0" * 64}
        add("proof", "a first seal that begins late", self._proof | {"seals": self._renumbered(first)})
        add("proof", "a seal before the first one", self._proof | {"seals": self._renumbered({"seal_id": "0"}, 0)})
        whole = copy.deepcopy(self._chain["seals"])
        whole[1]["votes"] = "7"
        add("chain", "numbers of which it says that they are left out", {"shows_numbers": False, "seals": whole})
        return made

    def unusual(self) -> list[Document]:
        """True all the same: JSON has no other number for 5 than 5.0, and a seal may have any number of votes."""
        row = self._row(0)
        node, path = leaf_hash(row.encode()), []
        for _ in range(54):
            path.append(hashlib.sha256(node).digest())
            node = hashlib.sha256(b"\1" + node + path[-1]).digest()
        seal = dataclasses.replace(self.seals[0], votes=2**53 + 2, merkle_root=node)
        large = self._proof_of(row) | {"path": [step.hex() for step in path], "seals": [seal.as_texts()]}
        return [
            Document(
                "a number with a point", "proof", json.dumps(self._proof | {"index": float(self._proof["index"])}), ""
            ),
            Document("a seal of 2^53 + 2 votes", "proof", json.dumps(large), ""),
            Document("no number", "proof", json.dumps(self._proof | {"note": None, "seals_before": [1e300]}), ""),
        ]

    def no_json(self) -> list[tuple[str, bytes]]:
        """Files that are not JSON, or not in UTF-8: of a row that would hold if what is wrong were overlooked."""
        row = self._row(0).replace("Répliqué", "\ufffd")
        proof = self._proof_of(row)
        text = json.dumps(proof, ensure_ascii=False)
        return [
            ("a byte that is no UTF-8", text.encode().replace("\ufffd".encode(), b"\xff", 1)),
            ("half a character", text.replace("\ufffd", "\\ud800", 1).encode()),
            ("a byte order mark", b"\xef\xbb\xbf" + text.encode()),
            ("a number that JSON has not", text.replace('"index"', '"x": NaN, "index"').encode()),
        ]

    def _odd_rows(self) -> dict[str, str]:
        row = self._row(0)
        fields = row.split("\t")
        odd = {
            "a choice that is none": (2, "peut-être"),
            "a vote_id in capitals": (0, fields[0].upper()),
            "a vote_id that is none": (0, "7"),
            "no moment": (4, r"\N"),
            "a moment with zeros at its end": (4, "2026-11-29 19:00:00.50+00"),
            "a moment elsewhere": (4, "2026-11-29 20:00:00.5+01"),
            "a line feed": (6, "a\nb"),
            "a redelivery that is neither": (7, "true"),
            "a transaction with zeros before": (8, "007"),
            "a transaction beyond all": (8, str(2**63)),
        }
        rows = {name: "\t".join([*fields[:at], value, *fields[at + 1 :]]) for name, (at, value) in odd.items()}
        return rows | {"a field more": row + "\t", "a field less": "\t".join(fields[:-1])}

    def _odd_seals(self) -> dict[str, tuple[int, dict[str, str | None]]]:
        """Of the proof and the chain alike: which seal, and its fields."""
        return {
            "a gap between two seals": (2, {"from_txid": "7"}),
            "a seal of the first format after one of the third": (2, {"records_hash": None, "salt": None}),
            "a seal of the second format after one of the third": (2, {"salt": None}),
            "a seal with a salt that covers no records": (2, {"records_hash": None}),
            "no salt in its place": (2, {"salt": ""}),
            "a short salt": (2, {"salt": "ab"}),
            "a salt in capitals": (2, {"salt": "AB" * 32}),
            "a moment in words": (2, {"sealed_at": "yesterday"}),
            "a moment with a line feed": (2, {"sealed_at": "2026-11-29 20:00:00+00\n"}),
            "a number beyond all": (2, {"votes": str(2**63)}),
            "a number with zeros before": (2, {"votes": "07"}),
            "a hash of nothing": (2, {"records_hash": ""}),
            "a short hash": (2, {"leaves_hash": "ab"}),
        }

    @staticmethod
    def _made_to_fit(seals: list[dict[str, str]], at: int, changes: dict[str, str | None]) -> list[dict[str, str]]:
        """The seals with one altered, and those after it so that they follow from it."""
        made = copy.deepcopy(seals)
        before = ""
        for number, fields in enumerate(made):
            if number == at:
                fields |= {name: value for name, value in changes.items() if value is not None}
                for name in [name for name, value in changes.items() if value is None]:
                    del fields[name]
            if number > at:
                fields["previous_hash"] = before
            hashed = [value for name, value in fields.items() if name != "seal_hash"]
            form = 3 if "salt" in fields else 2 if "records_hash" in fields else 1
            before = hashlib.sha256("\t".join([f"vote-audit-seal-{form}", *hashed]).encode()).hexdigest()
            if "seal_hash" in fields:
                fields["seal_hash"] = before
        return made

    def _renumbered(self, first: dict[str, str | None], start: int = 1) -> list[dict[str, str]]:
        seals = copy.deepcopy(self._proof["seals"])
        for number, fields in enumerate(seals, start):
            fields["seal_id"] = str(number)
        return self._made_to_fit(seals, 0, first)

    def _proof_of(self, row: str) -> dict[str, Any]:
        """Of a row that is alone in its seal."""
        seal = dataclasses.replace(self.seals[0], votes=1, merkle_root=leaf_hash(row.encode()))
        return {"vote_id": row.split("\t")[0], "row": row, "index": 0, "path": [], "seals": [seal.as_texts()]}

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
        alter(chain, "records that no seal covers", lambda d: [d["seals"][2].pop(n) for n in ("salt", "records_hash")])
        alter(proof, "a salt left out", lambda document: document["seals"][1].pop("salt"))
        alter(chain, "a salt left out", lambda document: document["seals"][2].pop("salt"))
        alter(chain, "the salt of another seal", lambda d: d["seals"][2].update(salt=d["seals"][1]["salt"]))
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
