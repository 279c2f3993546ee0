"""The arithmetic of the seals: Merkle trees, chains and proofs, without a database."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reconcile
from seals import NO_HASH, Seal, check_proof, leaf_hash, merkle_path, merkle_root, root_from_path

# the leaves and roots that implementations of Certificate Transparency test themselves with
KNOWN_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
KNOWN_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
VOTE = "7b0d3b4e-9f3c-4f57-8f0a-5d5b8f6f2c11"


@pytest.mark.parametrize("size", range(1, 9))
def test_the_root_is_that_of_the_rfc(size: int) -> None:
    """Known answers of RFC 6962, whose trees RFC 9162 keeps."""
    leaves = [leaf_hash(bytes.fromhex(leaf)) for leaf in KNOWN_LEAVES[:size]]
    assert merkle_root(leaves).hex() == KNOWN_ROOTS[size - 1]


def test_the_root_of_nothing_is_the_hash_of_nothing() -> None:
    """As RFC 9162, section 2.1.1 has it."""
    assert merkle_root([]) == hashlib.sha256(b"").digest()


@given(st.integers(1, 70), st.data())
def test_a_path_leads_from_its_leaf_to_the_root_and_from_no_other(size: int, data: st.DataObject) -> None:
    """Nor does it with a step changed, left out or added, or for another place."""
    leaves = [leaf_hash(str(number).encode()) for number in range(size)]
    index = data.draw(st.integers(0, size - 1))
    path, root = merkle_path(leaves, index), merkle_root(leaves)
    assert root_from_path(leaves[index], index, size, path) == root
    assert root_from_path(leaf_hash(b"other"), index, size, path) != root
    assert root_from_path(leaves[index], index, size, [*path, NO_HASH]) is None
    assert root_from_path(leaves[index], index + size, size, path) is None
    assert root_from_path(leaves[index], -1, size, path) is None
    for step in range(len(path)):
        changed = [*path[:step], hashlib.sha256(path[step]).digest(), *path[step + 1 :]]
        assert root_from_path(leaves[index], index, size, changed) != root
        assert root_from_path(leaves[index], index, size, path[:step] + path[step + 1 :]) != root
    for other in set(range(size)) - {index}:
        assert root_from_path(leaves[index], other, size, path) != root


def test_a_leaf_is_no_node() -> None:
    """Two hashes in one row must not pass for their parent (a second pre-image)."""
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != merkle_root([left, right])


def chain(rows: list[bytes], after: int = 3) -> list[Seal]:
    """A seal over these rows and ``after`` more: the first of the first format, then the second, then the third."""
    seals: list[Seal] = []
    for number in range(1, after + 2):
        root = merkle_root([leaf_hash(row) for row in rows]) if number == 1 else NO_HASH
        previous = seals[-1].hash() if seals else NO_HASH
        moment = f"2026-11-24 20:00:0{number}.7+00"
        records = leaf_hash(b"a certificate") if number > 1 else None
        salt = leaf_hash(b"at random %d" % number) if number > 2 else None
        ends = number * 10 - 10, number * 10
        seals.append(Seal(number, *ends, len(rows), root, NO_HASH, moment, previous, records, salt))
    return seals


def proof() -> dict[str, Any]:
    rows = [
        f"{VOTE[:-1]}{number}\tlaw-001\toui\t\\N\t2026-11-24 19:00:00+00\t\\N\tx\tf\t7".encode() for number in range(7)
    ]
    leaves = [leaf_hash(row) for row in rows]
    return {
        "vote_id": f"{VOTE[:-1]}3",
        "row": rows[3].decode(),
        "index": 3,
        "path": [step.hex() for step in merkle_path(leaves, 3)],
        "seals": [seal.as_texts() for seal in chain(rows)],
    }


def test_a_proof_holds_for_every_seal_of_its_chain() -> None:
    """And for no other."""
    sound = proof()
    names = [Seal.from_texts(texts).name() for texts in sound["seals"]]
    assert check_proof(sound) == names[-1]
    assert [check_proof(sound, name) for name in names] == names
    with pytest.raises(ValueError, match="not in the chain"):
        check_proof(sound, f"5:{'0' * 64}")


@pytest.mark.parametrize(
    ("at", "left_out", "refusal"),
    [
        (3, ["salt"], "does not follow"),
        (3, ["salt", "records_hash"], "does not follow"),
        (2, ["salt", "records_hash"], "does not follow"),
        (3, ["records_hash"], "has a salt and no records_hash"),
    ],
)
def test_no_seal_is_of_an_earlier_format_than_the_one_before(at: int, left_out: list[str], refusal: str) -> None:
    """Also where each hash fits: it is the last one."""
    changed = proof()
    changed["seals"] = changed["seals"][: at + 1]
    check_proof(changed)
    for name in left_out:
        del changed["seals"][at][name]
    with pytest.raises(ValueError, match=refusal):
        check_proof(changed)


def test_a_seal_is_what_its_texts_say_in_each_format() -> None:
    """And begins with its own name, so that none passes for one of another format."""
    of_each = chain([b"a row"])[:3]
    for number, made in enumerate(of_each, 1):
        texts = made.as_texts()
        assert Seal.from_texts(texts) == made
        assert list(texts)[8:] == ["records_hash", "salt"][: number - 1]
        text = "\t".join([f"vote-audit-seal-{number}", *texts.values()])
        assert made.hash() == hashlib.sha256(text.encode()).digest()
    with pytest.raises(ValueError, match="another form"):
        Seal.from_texts(of_each[2].as_texts() | {"salt": ""})


def leaves_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return list(itertools.chain.from_iterable(leaves_of(part, (*path, key)) for key, part in value.items()))
    if isinstance(value, list):
        return list(itertools.chain.from_iterable(leaves_of(part, (*path, i)) for i, part in enumerate(value)))
    return [path]


@pytest.mark.parametrize("place", leaves_of(proof()), ids=str)
def test_a_proof_that_was_changed_anywhere_does_not_hold(place: tuple[Any, ...]) -> None:
    """Each single value of it, against the seal that was published."""
    published = Seal.from_texts(proof()["seals"][-1]).name()
    changed = copy.deepcopy(proof())
    owner = changed
    for step in place[:-1]:
        owner = owner[step]
    value = owner[place[-1]]
    if isinstance(value, int):
        owner[place[-1]] = value + 1
    else:
        digit = "1" if value[-1] != "1" else "2"
        owner[place[-1]] = value.replace("oui", "non") if "oui" in value else value[:-1] + digit
        if place[-1] == "sealed_at":
            owner[place[-1]] = value.replace("2026", "2025")
    with pytest.raises(ValueError, match=r"."):
        check_proof(changed, published)


@pytest.mark.parametrize("damaged", ["", "[]", "{}", "7", "null", '{"seals": []}', "{" * 100_000, "\0"])
def test_what_is_no_proof_is_refused_in_words(damaged: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 1 and no traceback; without any setting."""
    file = tmp_path / "proof.json"
    file.write_text(damaged)
    assert reconcile.main(["check-proof", str(file)]) == 1
    assert "the proof does not hold" in capsys.readouterr().err


def test_check_proof_needs_no_settings(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, and the published seal is compared."""
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(proof()))
    name = Seal.from_texts(proof()["seals"][1]).name()
    assert reconcile.main(["check-proof", str(file), "--seal", name]) == 0
    assert name in capsys.readouterr().out
    assert reconcile.main(["check-proof", str(file), "--seal", f"1:{'0' * 64}"]) == 1
    assert reconcile.main(["check-proof", str(tmp_path / "nothing")]) == 2
