"""The questions that the benchmark asks, a function each: it prints its table and returns its figures."""

from __future__ import annotations

import gc
import hashlib
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

from bench import node_peer
from bench.cpu import peak_megabytes
from bench.lab import SPEC, TUNED, Drain, Lab, Profile, Void, consuming_since, stop
from lab.service import ROOT
from test_publisher import INVALID, Message, Publisher, in_arrays, make_messages

LAWS = 20
RATIOS = (
    ("service tuned", "bare tuned"),
    ("service spec", "bare tuned"),
    ("service spec", "bare spec"),
    ("service tuned", "node tuned"),
    ("service spec", "node spec"),
)

# An audit log as it may have grown, and the totals that belong to it. Half of the votes have a voter_hash.
GROW = """
    INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, recorded_at, voter_hash, instance, redelivered)
    SELECT gen_random_uuid(), 'law-' || to_char(1 + n %% 20, 'FM000'),
           CASE WHEN random() < 0.5 THEN 'oui' ELSE 'non' END, now(), now(),
           CASE WHEN n %% 2 = 0 THEN encode(sha256(n::text::bytea), 'hex') END, 'grown', false
    FROM generate_series(1, %s) AS n
"""
GROW_TOTALS = """
    INSERT INTO vote_results (law_id, oui_count, non_count)
    SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')
    FROM vote_audit GROUP BY law_id
"""

# From the time a vote was due to be sent to its commit, in milliseconds.
LATENCY = """
    SELECT percentile_disc(ARRAY[0.5, 0.99, 0.999, 1]) WITHIN GROUP (
        ORDER BY 1000 * extract(epoch FROM pg_xact_commit_timestamp(xmin) - voted_at)::float)
    FROM vote_audit
"""
# The commit's timestamp is taken before its write-ahead log is flushed, which comes on top.
FLUSHES = "SELECT wal_sync, wal_sync_time FROM pg_stat_wal"
FLUSHES_FROM_18 = "SELECT sum(fsyncs), sum(fsync_time) FROM pg_stat_io WHERE object = 'wal'"


@dataclass(frozen=True)
class Size:
    """How long it all takes."""

    rounds: int
    messages: int
    few_rounds: int  # where the service is compared with itself
    few_messages: int
    grown: tuple[int, ...]
    replicas: tuple[int, ...]
    rates: tuple[int, ...]
    steady_seconds: int


FULL = Size(5, 100_000, 3, 50_000, (0, 1_000_000, 10_000_000), (1, 2, 3, 4), (10, 100, 1_000, 5_000), 15)
QUICK = Size(1, 10_000, 1, 3_000, (0, 50_000), (1, 2), (1_000,), 2)


class Case(NamedTuple):
    """One of the things that a section compares: what is on the queue, and who empties it."""

    messages: Sequence[Message]
    run: Callable[[str, Sequence[Message]], Drain]


def drain(lab: Lab, size: Size) -> dict[str, Any]:
    """A full queue: the service against the bare pika consumer and the node peer, all at both profiles."""
    messages = list(make_messages(size.messages, LAWS, seed=1))
    cases = {f"service {profile.name}": Case(messages, _service(lab, profile)) for profile in (TUNED, SPEC)}
    cases |= {f"bare {profile.name}": Case(messages, _bare(lab, profile)) for profile in (TUNED, SPEC)}
    if missing := node_peer.install():
        print(f"\nno node peer in this drain: {missing}", flush=True)
    else:
        cases |= {f"node {profile.name}": Case(messages, _peer(lab, profile)) for profile in (TUNED, SPEC)}
    runs = _alternate(lab, [cases] * size.rounds)
    figures = _print_drains("drain of a full queue", runs)
    if missing:
        figures["node"] = {"left_out": missing}
    print(f"{'':<30}rate{'':<15}own CPU")
    for ours, its in RATIOS:
        if its in runs:
            pairs = list(zip(runs[ours], runs[its], strict=True))
            rates = [our.rate / its.rate for our, its in pairs]
            cpu = [our.consumer_us / its.consumer_us for our, its in pairs]
            figures[f"{ours} / {its}"] = {
                "median": median(rates),
                "rounds": rates,
                "cpu_median": median(cpu),
                "cpu_rounds": cpu,
            }
            print(f"  {f'{ours} / {its}':<28}{_ratio(rates)}  {_ratio(cpu)}")
    return figures


def arrays(lab: Lab, size: Size) -> dict[str, Any]:
    """A full queue of arrays of votes: the service, the node peer, and PostgreSQL alone, which is given the same votes
    in the same batches by the same call from memory.
    """
    # Full batches alone, of 500 votes or of 3 arrays of 200: a last one that is not would wait for its timeout.
    votes = list(make_messages(2 * size.messages // 3_000 * 3_000, LAWS, seed=1))
    missing = node_peer.install()
    figures: dict[str, Any] = {"node": {"left_out": missing}} if missing else {}
    for box in (10, 50, 200):
        messages = list(in_arrays(votes, box))
        cases = {
            "service tuned": Case(messages, _service(lab, TUNED)),
            "PostgreSQL alone": Case((), _written(lab, votes)),
        }
        if not missing:
            cases["node tuned"] = Case(messages, _peer(lab, TUNED))
        runs = _alternate(lab, [cases] * size.rounds)
        figures[str(box)] = _print_drains(f"drain of arrays of {box} votes; all figures are of votes", runs)
        for other in [name for name in runs if name != "service tuned"]:
            pairs = zip(runs["service tuned"], runs[other], strict=True)
            figures[str(box)][f"service tuned / {other}"] = ratios = [ours.rate / its.rate for ours, its in pairs]
            print(f"  {f'service tuned / {other}':<44}{_ratio(ratios)}", flush=True)
    single = {f"arrays of {box}": Case(list(in_arrays(votes, box)), _service(lab, SPEC)) for box in (1, 50)}
    figures["defaults"] = _print_drains(
        "the same votes at the defaults (100 votes, 100 messages)", _alternate(lab, [single] * size.few_rounds)
    )
    print("\narrays of 20 at 20,000 votes/s, at the defaults, from the time a vote was due to its commit, in ms")
    figures["steady"] = steady = _steady(lab, 20_000, size.steady_seconds, SPEC, box=20)
    print(
        "  "
        + "  ".join(f"{name} {steady[name]:.1f}" for name in ("sent_rate", "p50", "p99", "p99.9", "max", "peak_mb"))
    )
    return figures


def steady(lab: Lab, size: Size) -> dict[str, Any]:
    """An open-loop publisher: votes are sent when they are due, however the service fares."""
    figures = {}
    messages = list(make_messages(size.messages, LAWS, seed=1))
    fastest = _alternate(lab, [{profile.name: Case(messages, _service(lab, profile)) for profile in (SPEC, TUNED)}])
    print("\nsteady state, from the time a vote was due to its commit, in ms (on top: a flush of the log)")
    print(f"{'':<66}CPU us a vote: service, broker (publishing too), database")
    columns = "".join(f"{name:>9}" for name in ("votes/s", "sent", "p50", "p99", "p99.9", "max"))
    print(f"  {'':<8}{columns}{'flush':>8}{'late':>9}{'memory':>9}")
    for profile in (SPEC, TUNED):
        for rate in (*size.rates, int(0.9 * fastest[profile.name][0].rate)):
            figures[f"{profile.name} {rate}"] = figure = _steady(lab, rate, size.steady_seconds, profile)
            times = "".join(f"{figure[name]:>9.1f}" for name in ("p50", "p99", "p99.9", "max"))
            rest = f"{figure['flush_ms']:>8.1f}{figure['publisher_late_ms']:>9.1f}{figure['peak_mb']:>6.0f} MB"
            rest += "".join(f"{figure[name]:>7.1f}" for name in ("service_us", "broker_us", "postgres_us"))
            print(f"  {profile.name:<8}{rate:>9,}{figure['sent_rate']:>9,.0f}{times}{rest}", flush=True)
    return figures


def growth(lab: Lab, size: Size) -> dict[str, Any]:
    """The audit log as it grows. Each round counts new votes, and so finds a little more of it."""
    with ExitStack() as stack:
        grown = {f"{rows:,} rows": _grown(lab, stack.enter_context(lab.database()), rows) for rows in size.grown}
        # more than the index has pages: a page that is touched first after a checkpoint costs an image of it in the
        # log, and a run of a few seconds would measure nothing else
        votes = [list(make_messages(4 * size.few_messages, LAWS, seed)) for seed in range(size.few_rounds)]
        runs = _alternate(lab, [{name: Case(messages, run) for name, run in grown.items()} for messages in votes])
    return _print_drains("growth of the audit log, tuned", runs, compared_with="0 rows")


def laws(lab: Lab, size: Size) -> dict[str, Any]:
    """How the votes spread over laws."""
    votes = {f"{laws:,} laws": list(make_messages(size.few_messages, laws, seed=1)) for laws in (20, 1, 1_000)}
    votes["Zipf, 1,000"] = list(zipf(make_messages(size.few_messages, 1, seed=1), 1_000))
    cases = {name: Case(messages, _service(lab, TUNED)) for name, messages in votes.items()}
    return _print_drains("laws, tuned", _alternate(lab, [cases] * size.few_rounds), compared_with="20 laws")


def duplicates(lab: Lab, size: Size) -> dict[str, Any]:
    """Copies of votes; the rate is that of messages."""
    votes = {f"{share} % copies": list(make_messages(size.few_messages, LAWS, 1, share)) for share in (0, 1, 20)}
    cases = {name: Case(messages, _service(lab, TUNED)) for name, messages in votes.items()}
    return _print_drains("copies, tuned", _alternate(lab, [cases] * size.few_rounds), compared_with="0 % copies")


def replicas(lab: Lab, size: Size) -> dict[str, Any]:
    """Several replicas on one queue; broker, PostgreSQL and all replicas share the CPUs of this machine."""
    messages = list(make_messages(size.messages, LAWS, seed=1))
    cases = {f"replicas: {count}": Case(messages, _service(lab, TUNED, count)) for count in size.replicas}
    runs = _alternate(lab, [cases] * size.few_rounds)
    return _print_drains("replicas, tuned, up to 95 % of the votes", runs, compared_with="replicas: 1")


def memory(lab: Lab, size: Size) -> dict[str, Any]:
    """A backlog of a million, and ten minutes."""
    scale = size.messages / FULL.messages
    backlog = Case(list(make_messages(round(scale * 1_000_000), LAWS, seed=1)), _service(lab, TUNED))
    figures = _print_drains("a backlog of a million, tuned", _alternate(lab, [{"backlog": backlog}]))
    figures["ten minutes"] = _steady(lab, 1_000, round(scale * 600), TUNED)
    print(f"  after ten minutes at 1,000 votes/s: {figures['ten minutes']['peak_mb']:.1f} MB")
    return figures


def hostile(lab: Lab, size: Size) -> dict[str, Any]:
    """What junk costs: the memory of a replica under streams of it, and the rate of votes where every other message is
    junk."""
    scale = size.messages / FULL.messages
    figures: dict[str, Any] = {"memory": {}}
    print("\npeak memory under streams of junk")
    for name, (make, count) in STREAMS.items():
        for batch, prefetch in itertools.product((100, 500), (100, 2_000)):
            messages = [junk(make(number)) for number in range(max(2, round(scale * count)))]
            messages += make_messages(100, LAWS, seed=1)
            case = Case(messages, _service(lab, Profile(f"{batch}/{prefetch}", batch, prefetch)))
            key = f"{name}, {batch}/{prefetch}"
            ((drained,),) = _alternate(lab, [{key: case}]).values()
            figures["memory"][key] = drained.peak_mb
            print(f"  {key:<32}{drained.peak_mb:>6.0f} MB", flush=True)
    votes = list(make_messages(size.few_messages, LAWS, seed=1))
    cases = {"votes alone": Case(votes, _service(lab, TUNED))}
    for name, (make, share) in JUNK.items():
        some = votes[: max(500, round(share * len(votes)))]
        mixed = [message for number, vote in enumerate(some) for message in (junk(make(number)), vote)]
        cases[name] = Case(mixed, _service(lab, TUNED))
    runs = _alternate(lab, [cases] * size.few_rounds)
    figures |= _print_drains("every other message is junk, tuned; the rate is that of all messages", runs)
    print("rate of votes")
    for name in JUNK:
        pairs = zip(runs[name], runs["votes alone"], strict=True)
        figures[name]["ratio"] = ratios = [mixed.rate / 2 / alone.rate for mixed, alone in pairs]
        print(f"  {f'{name} / votes alone':<44}{_ratio(ratios)}", flush=True)
    return figures


def junk(body: bytes) -> Message:
    """A message that is no vote."""
    return Message(INVALID, hashlib.sha256(body).hexdigest(), "", "", body, None)


def _random(length: int) -> Callable[[int], bytes]:
    return lambda number: random.Random(number).randbytes(length)


def _repeated(unit: bytes, length: int) -> Callable[[int], bytes]:
    """A list whose first element is the number."""
    return lambda number: b"[%d" % number + unit * (length // len(unit) - 3) + b"]"


# by name: what makes each, and how many in a stream of full length
STREAMS: dict[str, tuple[Callable[[int], bytes], int]] = {
    "64 KiB": (_random(65_536), 4_000),
    "16 MiB": (_random(16 * 1024 * 1024), 20),
    "127 MiB": (_random(127 * 1024 * 1024), 4),
    "300 bytes": (_random(300), 20_000),
}
# by name: what makes each, and of how many votes it stands beside, as a part of all
JUNK: dict[str, tuple[Callable[[int], bytes], float]] = {
    "300 random bytes": (_random(300), 1.0),
    "as many members as are read": (_repeated(b',{"":0}', 346), 1.0),
    "64 KiB of members": (_repeated(b',{"":0}', 65_536), 0.1),
    "64 KiB of escapes": (lambda number: b'["%d' % number + b'\\",' * 21_800 + b'"]', 0.1),
    "64 KiB of random bytes": (_random(65_536), 0.1),
}

SECTIONS: dict[str, Callable[[Lab, Size], dict[str, Any]]] = {
    section.__name__: section
    for section in (drain, arrays, steady, growth, laws, duplicates, replicas, memory, hostile)
}
ON_REQUEST = ("memory", "hostile")  # each takes a quarter of an hour


def zipf(messages: Iterator[Message], laws: int) -> Iterator[Message]:
    """The same votes for laws of which the second gets half the votes of the first, the third a third, and so on."""
    rng = random.Random(1)
    names = [f"law-{number:03}" for number in range(1, laws + 1)]
    cumulative = list(itertools.accumulate(1 / number for number in range(1, laws + 1)))
    for message in messages:
        (law_id,) = rng.choices(names, cum_weights=cumulative)
        body = message.body.replace(f'"{message.law_id}"'.encode(), f'"{law_id}"'.encode())
        yield message._replace(law_id=law_id, body=body)


def _service(lab: Lab, profile: Profile, replicas: int = 1) -> Callable[[str, Sequence[Message]], Drain]:
    """The service, with an empty database."""

    def run(queue: str, messages: Sequence[Message]) -> Drain:
        with lab.database() as url:
            return lab.drain(queue, url, messages, profile, replicas)

    return run


def _peer(lab: Lab, profile: Profile) -> Callable[[str, Sequence[Message]], Drain]:
    """The node peer, with the tables of an empty database."""

    def run(queue: str, messages: Sequence[Message]) -> Drain:
        with lab.database() as url:
            return lab.drain(queue, url, messages, profile, peer=True)

    return run


def _written(lab: Lab, messages: Sequence[Message]) -> Callable[[str, Sequence[Message]], Drain]:
    """PostgreSQL with an empty database, and no broker."""

    def run(queue: str, nothing: Sequence[Message]) -> Drain:
        with lab.database() as url:
            return lab.write_alone(queue, url, messages, TUNED)

    return run


def _bare(lab: Lab, profile: Profile) -> Callable[[str, Sequence[Message]], Drain]:
    """The bare consumer."""
    return lambda queue, messages: lab.drain_bare(queue, len(messages), profile)


def _grown(lab: Lab, url: str, rows: int) -> Callable[[str, Sequence[Message]], Drain]:
    """The service, with an audit log of so many rows. They get their indexes last, which is far quicker."""
    lab.query(url, (ROOT / "init_db.sql").read_text())
    index = lab.value(url, "SELECT indexdef FROM pg_indexes WHERE indexname = 'vote_audit_law_voter'")
    lab.query(url, "ALTER TABLE vote_audit DROP CONSTRAINT vote_audit_pkey; DROP INDEX vote_audit_law_voter")
    lab.query(url, GROW, rows)
    lab.query(url, f"SET maintenance_work_mem = '512MB'; ALTER TABLE vote_audit ADD PRIMARY KEY (vote_id); {index}")
    lab.query(url, GROW_TOTALS)
    lab.query(url, "VACUUM (FREEZE, ANALYZE) vote_audit")  # else it would come by itself, in the middle of a run
    return lambda queue, messages: lab.drain(queue, url, messages, TUNED)


def _alternate(lab: Lab, rounds: Sequence[dict[str, Case]]) -> dict[str, list[Drain]]:
    """Run the cases of each round, each case in another place of each round, so that what drifts hits all of them."""
    runs: dict[str, list[Drain]] = {name: [] for name in rounds[0]}
    for number, cases in enumerate(rounds):
        first = number % len(cases)
        for name in [*cases][first:] + [*cases][:first]:
            print(f"round {number + 1} of {len(rounds)}: {name}", file=sys.stderr, flush=True)
            with lab.queue(cases[name].messages) as queue:
                runs[name].append(cases[name].run(queue, cases[name].messages))
    return runs


def _print_drains(title: str, runs: dict[str, list[Drain]], compared_with: str = "") -> dict[str, Any]:
    """Print a line of medians for each case, and return the medians with all runs behind them."""
    figures: dict[str, Any] = {}
    last = f"/ {compared_with}" if compared_with else ""
    print(f"\n{title}\n{'':<44}CPU us a message: own, broker, database; peak memory; CPU taken by others")
    for name, drains in runs.items():
        rates = [run.rate for run in drains]
        middle = {key: median(asdict(run)[key] for run in drains) for key in asdict(drains[0])}
        middle["peak_mb"] = max(run.peak_mb for run in drains)
        if compared_with:
            ratios = [run.rate / other.rate for run, other in zip(drains, runs[compared_with], strict=True)]
            middle["ratio"] = median(ratios)
        figures[name] = middle | {"runs": [asdict(run) for run in drains]}
        ratio = f"  {_ratio(ratios)} {last}" if compared_with else ""
        print(
            f"  {name:<16}{middle['rate']:>8,.0f}/s ({min(rates):>6,.0f}-{max(rates):>6,.0f})"
            f"{middle['consumer_us']:>8.1f}{middle['broker_us']:>7.1f}{middle['postgres_us']:>7.1f}"
            f"{middle['peak_mb']:>6.0f} MB{middle['others']:>6.0%}{ratio}",
            flush=True,
        )
    return figures


def _ratio(rounds: Sequence[float]) -> str:
    return f"{median(rounds):.2f} ({min(rounds):.2f}-{max(rounds):.2f})"


def _steady(lab: Lab, rate: int, seconds: int, profile: Profile, box: int = 1) -> dict[str, float]:
    messages = list(make_messages(rate * seconds, LAWS, seed=rate))
    with lab.queue() as queue, lab.database() as url, lab.replica(queue, url, profile) as replica:
        consuming_since(replica)
        sql = FLUSHES if lab.value(url, "SHOW server_version_num") < "180000" else FLUSHES_FROM_18
        before, cpu = lab.query(url, sql)[0], lab.cpu([replica])
        publisher = Publisher([lab.amqp_url], queue, rate=rate / box)
        with _without_collections():
            result = publisher.publish(in_arrays(_as_due(messages, publisher, rate), box))
        if not result.all_confirmed:
            raise Void(f"not all was published: {result.failure}")
        lab.wait_counted(url, len(messages), 30 + seconds)
        used = [1e6 * (now - then) / len(messages) for now, then in zip(lab.cpu([replica]), cpu, strict=True)]
        flushes, milliseconds = (now - then for now, then in zip(lab.query(url, sql)[0], before, strict=True))
        peak = peak_megabytes(replica.pid)
        stop(replica)
        lab.check(queue, url, {}, result.messages)
        p50, p99, p999, most = lab.value(url, LATENCY)
    return {
        "rate": rate,  # what was meant; the publisher shares the CPUs and may not get there
        "sent_rate": len(messages) / result.seconds,
        "votes": len(messages),
        "p50": p50,
        "p99": p99,
        "p99.9": p999,
        "max": most,
        "flush_ms": milliseconds / max(flushes, 1),
        "publisher_late_ms": 1000 * result.late_seconds,
        "peak_mb": peak,
        **dict(zip(("service_us", "broker_us", "postgres_us"), used, strict=True)),
    }


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection of this process, the publisher: one among all its messages makes it 100 to 180 ms late."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _as_due(messages: Sequence[Message], publisher: Publisher, rate: int) -> Iterator[Message]:
    """The messages with the time at which each is due for a timestamp: what is sent late counts as waiting too."""
    for number, message in enumerate(messages):
        head, key, tail = message.body.partition(b'"timestamp": "')
        due = datetime.fromtimestamp(publisher.result.started_at + number / rate, UTC)
        yield message._replace(body=head + key + due.isoformat().encode() + tail[tail.index(b'"') :])
