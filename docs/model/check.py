"""Have spin check the model of the protocol, votes.pml: what `make model` runs. README.md beside this file explains it.

Exit codes: 0 every result is the expected one, 1 one is not, 2 spin or gcc is missing or failed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

MODEL = Path(__file__).with_name("votes.pml")
PAN_SECONDS = 1800.0  # far beyond what any of these takes
HOLDS = "no violation"


class Check(NamedTuple):
    """One run of spin: the model with some definitions, and the assertion or claim that must be found violated."""

    name: str
    what: str
    defines: tuple[str, ...]
    expected: str = HOLDS
    claim: str = ""
    large: bool = False


class Result(NamedTuple):
    """What came of a check; ``story`` is the shortest way to a violation, one step a line."""

    check: Check
    found: str
    states: int
    seconds: float
    story: list[str]

    @property
    def is_expected(self) -> bool:
        """Whether spin found what it had to find, or nothing where it had to find nothing."""
        return self.found == self.check.expected


class CheckFailed(Exception):
    """spin, gcc or the checker that they made ended without a result."""


LOST, TWICE, DROPPED, NEVER = "lost", "counted twice", "dropped by the delivery limit", "never counted"
VIOLATIONS = {"kept": LOST, "(count[": TWICE, "(returns<=": DROPPED, "acceptance cycle": NEVER}

TWO_VOTES = ("MESSAGES=2", "VOTES=2")
VOTE_AND_COPY = ("MESSAGES=2", "VOTES=1")
LARGE = ("ENDING", "WRITES_AHEAD")

CHECKS = (
    # the protocol as it is; the first ones take longest
    Check("protocol", "the protocol, 2 votes and a copy", ("ENDING",)),
    Check("ahead", "batches written ahead of acks, 2 votes", ("ENDING", "WRITES_AHEAD", *TWO_VOTES)),
    Check("ahead-copy", "batches written ahead of acks, a vote and a copy", ("ENDING", "WRITES_AHEAD", *VOTE_AND_COPY)),
    Check("large-0", "written ahead, 2 votes and a copy, watching 0", LARGE, large=True),
    Check("large-1", "written ahead, 2 votes and a copy, watching 1", (*LARGE, "WATCHED=1"), large=True),
    # one rule taken out
    Check("ACK_BEFORE_COMMIT", "the ack does not wait for the commit", ("ACK_BEFORE_COMMIT", *TWO_VOTES), LOST),
    Check("NO_IDENTITY", "nobody looks whether a vote was counted", ("NO_IDENTITY", *TWO_VOTES), TWICE),
    Check("ACK_ANY_CHANNEL", "an ack is sent on any channel", ("ACK_ANY_CHANNEL", *TWO_VOTES), LOST),
    Check("NO_RECORD_FOR_COPIES", "copies leave no record in the log", ("NO_RECORD_FOR_COPIES", *TWO_VOTES), LOST),
    Check("NO_HOLD", "a refused batch goes back at once", ("NO_HOLD", "FAULTS=0", *TWO_VOTES), DROPPED),
    Check(
        "NO_TRIAL_WRITE",
        "consumes again at once after a give back",
        ("NO_TRIAL_WRITE", "FAULTS=0", *TWO_VOTES),
        DROPPED,
    ),
    # where the promise ends
    Check(
        "TOO_MANY_INCIDENTS",
        "more returns than the limit has room for",
        ("INCIDENTS=2", "FAULTS=0", *VOTE_AND_COPY),
        DROPPED,
    ),
    Check("STANDBY_AWAY", "the standby stays away for ever", ("ENDING", "STANDBY_AWAY", *VOTE_AND_COPY), NEVER),
    # the protocol does get into the situations that it is made for
    *(
        Check(name, f"reached: {what}", ("SEEN", *VOTE_AND_COPY), f"claim {name} violated", name)
        for name, what in {
            "ambiguous_commit_acked": "a commit without reply, then an ack",
            "promotion_after_copies": "a promotion after a batch of copies",
            "give_back": "a give back",
            "stale_ack_dropped": "the ack of a former channel",
            "forgotten_then_counted": "a vote lost by the primary, then counted",
            "limit_reached": "as many returns as the limit allows",
        }.items()
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks that are named, or all, print a line for each and return the exit code."""
    parser = argparse.ArgumentParser(description="Check the model of the protocol with spin.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(each.name for each in CHECKS)}")
    parser.add_argument("--large", action="store_true", help="also the two that take minutes and 1 GB of memory each")
    parser.add_argument("--story", action="store_true", help="print how each violation comes about, step by step")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.names) - {check.name for check in CHECKS}
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    missing = missing_programs()
    if missing:
        print(f"not installed: {', '.join(missing)}; on Debian or Ubuntu: apt-get install spin gcc", file=sys.stderr)
        return 2
    if arguments.names:
        chosen = [check for check in CHECKS if check.name in arguments.names]
    else:
        chosen = [check for check in CHECKS if arguments.large or not check.large]
    started = time.monotonic()
    unexpected = 0
    try:
        with ThreadPoolExecutor(max_workers=2) as pool:
            of_one_build = [list(checks) for _, checks in itertools.groupby(chosen, lambda check: check.defines)]
            for result in itertools.chain.from_iterable(pool.map(run, of_one_build)):
                print(line(result), flush=True)
                unexpected += not result.is_expected
                if arguments.story:
                    print("".join(f"    {number}. {step}\n" for number, step in enumerate(result.story, 1)), end="")
    except CheckFailed as exc:
        print(exc, file=sys.stderr)
        return 2
    seconds = time.monotonic() - started
    verdict = f"{unexpected} NOT as expected" if unexpected else "all as expected"
    print(f"{len(chosen)} checks in {seconds:.0f} s, {verdict}")
    return 1 if unexpected else 0


def missing_programs() -> list[str]:
    """Which of the programs that are needed cannot be found."""
    return [program for program in ("spin", "gcc") if shutil.which(program) is None]


def run(checks: Sequence[Check]) -> list[Result]:
    """Checks with the same definitions, in a folder that is removed: spin writes its checker there, a program in C."""
    results = []
    # breadth first finds a shortest way to a violation; the claim about the end can only be checked depth first
    breadth_first = "ENDING" not in checks[0].defines
    defines = [f"-D{name}" for name in (*checks[0].defines, *(["HIDDEN="] if breadth_first else []))]
    with tempfile.TemporaryDirectory(prefix="votes-model-") as folder:
        started = time.monotonic()
        _call(folder, "spin", *defines, "-a", str(MODEL))
        optimise = "-O2" if checks[0].expected == HOLDS else "-O0"  # all others compile for longer than they run
        kind = ("-DSAFETY", "-DBFS") if breadth_first else ()
        _call(folder, "gcc", "-w", optimise, *kind, "-o", "pan", "pan.c")
        for check in checks:
            claim = ("-N", check.claim) if check.claim else ()
            output = _call(folder, "./pan", *claim, *(() if breadth_first else ("-a", "-m100000", "-w23")))
            found, states = read(output, check.claim)
            story: list[str] = []
            if breadth_first and found in VIOLATIONS.values():
                replayed = _call(folder, "spin", "-t", "-k", f"{MODEL.name}.trail", *defines, str(MODEL))
                story = [text.strip() for text in replayed.partition("spin: ")[0].splitlines()]
            results.append(Result(check, found, states, time.monotonic() - started, story))
            started = time.monotonic()
    return results


def read(output: str, claim: str) -> tuple[str, int]:
    """What the checker found, and the number of different states. Raises CheckFailed where it did not get to an end."""
    errors = re.search(r"errors: (\d+)$", output, re.MULTILINE)
    states = re.search(r"^\s*([\d.e+]+) states, stored", output, re.MULTILINE)
    if errors is None or states is None or "max search depth too small" in output or "out of memory" in output:
        raise CheckFailed(f"the checker did not get to an end:\n{output}")
    found = HOLDS
    if errors[1] != "0":
        violation = re.search(r"^pan:1: (?:assertion violated )?(.*) \(at depth", output, re.MULTILINE)
        found = violation[1].strip() if violation else "an error that is not understood"
        found = next((words for start, words in VIOLATIONS.items() if found.startswith(start)), found)
        if claim and found.startswith("!("):
            found = f"claim {claim} violated"
    return found, int(float(states[1]))


def line(result: Result) -> str:
    """A result in one line."""
    check = result.check
    verdict = "as expected" if result.is_expected else f"NOT as expected ({check.expected})"
    found = "reached" if check.claim and result.is_expected else result.found
    return f"{check.name:<22} {check.what:<48} {result.states:>9,} states {result.seconds:>5.1f} s  {found}: {verdict}"


def _call(folder: str, *command: str) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PAN_SECONDS, check=False
    )
    # what pan and a replay exit with depends on the version; what they print is read
    if done.returncode != 0 and not (command[0] == "./pan" or "-t" in command):
        raise CheckFailed(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
