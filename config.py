"""Settings of the service: read from the environment and from .env, checked as a whole before anything starts."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, unquote_plus, urlsplit

import pika
import psycopg2
from dotenv import dotenv_values
from psycopg2.extensions import make_dsn, parse_dsn

LOCAL_SERVICES = Path(".local/services.env")  # where scripts/local_services.py says what it has started
SERVERS = (("AMQP_URL", "RABBITMQ", 5672), ("DATABASE_URL", "POSTGRES", 5432))  # with the parts' prefix, usual port
SECRETS = ("RABBITMQ_PASSWORD", "POSTGRES_PASSWORD", "AMQP_URL", "DATABASE_URL")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
QUEUE_TYPES = ("classic", "quorum")
READERS = ("one-pass", "pika")
AFTER_CLOSE = "after_close"
VISIBILITIES = ("always", AFTER_CLOSE)
LONGEST_TITLE = 200  # characters
HIDDEN = "***"
SECRET_PARAMETERS = ("password", "sslpassword", "ssl_options")  # as libpq and pika call them
SHORTEST_PASSWORD = 8  # characters
LOG_WORDS = "vote-aggregator rabbitmq postgresql database password connection certificate localhost"
ENCRYPTED = ("require", "verify-ca", "verify-full")  # values of sslmode
LONGEST_HOLD = 1_500  # seconds; a good part of the 30 minutes that the broker waits for an ack

_QUEUE_NAME = re.compile(r"[^\x00-\x1f]{1,255}")
_INSTANCE_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_ORIGINS = re.compile(r"\*|https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?( https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?)*")
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
# of the values that pika evaluates; their texts may repeat the password
_PIKA_ERRORS = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, OSError, MemoryError, RecursionError)
_BETWEEN_URLS = re.compile(r",(?=\s*(?:amqps?://|$))", re.IGNORECASE)  # other commas may be part of a password
_URL_FRONT = re.compile(r"[a-z]+://(?:[^:@/]*(?::(?P<password>[^@/]*))?@)?", re.IGNORECASE)
_URL_PARAMETER = re.compile(r"[?&](?P<name>[^?&=]*)=([^&]*)")
_DSN_PARAMETER = re.compile(r"(?P<name>\w+)\s*=\s*(?:'((?:\\.|[^'\\])*)'|((?:\\.|[^\s\\])*))", re.ASCII | re.DOTALL)


class InvalidSettings(Exception):
    """One or more settings are missing or wrong.

    ``faults`` holds one sentence a fault: the variable, its value (hidden where secret) and what is accepted.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, with its default. No password has one.

    Durations are in seconds, sizes in votes. ``amqp_urls`` (one a broker) and ``database_url`` (as libpq reads it) are
    the finished addresses, passwords included; they are kept out of ``repr`` and shown hidden by ``redacted``.
    """

    amqp_urls: tuple[str, ...] = field(repr=False)
    database_url: str = field(repr=False)
    rabbitmq_queue: str = "votes.aggregation"
    rabbitmq_queue_type: str = "classic"
    rabbitmq_prefetch_count: int = 100
    rabbitmq_max_priority: int = 10
    rabbitmq_heartbeat: int = 15
    rabbitmq_reader: str = "one-pass"
    rabbitmq_management_url: str | None = None
    db_pool_min: int = 2
    db_pool_max: int = 10
    db_timeout_seconds: float = 10.0
    batch_size: int = 100
    batch_timeout_seconds: float = 1.0
    max_retries: int = 3
    retry_backoff_seconds: float = 1.0
    retry_backoff_max_seconds: float = 30.0
    hold_seconds: float = 300.0
    shutdown_timeout_seconds: float = 20.0
    reconcile_seconds: float = 60.0
    metrics_port: int = 8001
    results_page: str = "ON"
    results_port: int | None = None  # unset: the page is on the metrics port
    results_visible: str = "always"
    results_title: str | None = None
    results_date: str | None = None
    results_shared_with: str | None = None
    log_level: str = "INFO"
    instance_name: str = field(default_factory=lambda: default_instance_name(socket.gethostname(), os.getpid()))

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from ``environ`` (names and values as in ``os.environ``; an empty value means unset).

        Raises InvalidSettings with every fault found, not only the first.
        """
        reader = _Reader(environ)
        settings = cls(
            amqp_urls=reader.amqp_urls(),
            database_url=reader.database_url(),
            rabbitmq_queue=reader.queue(),
            rabbitmq_queue_type=reader.queue_type(),
            rabbitmq_prefetch_count=reader.integer("RABBITMQ_PREFETCH_COUNT", cls.rabbitmq_prefetch_count, 1, 65_535),
            rabbitmq_max_priority=reader.max_priority(),
            rabbitmq_heartbeat=reader.heartbeat(),
            rabbitmq_reader=reader.choice("RABBITMQ_READER", cls.rabbitmq_reader, READERS),
            rabbitmq_management_url=reader.management_url(),
            db_pool_min=reader.integer("DB_POOL_MIN", cls.db_pool_min, 1, 100),
            db_pool_max=reader.integer("DB_POOL_MAX", cls.db_pool_max, 1, 100),
            db_timeout_seconds=reader.seconds("DB_TIMEOUT_SECONDS", cls.db_timeout_seconds, 1, 600),
            batch_size=reader.integer("BATCH_SIZE", cls.batch_size, 1, 10_000),
            batch_timeout_seconds=reader.seconds("BATCH_TIMEOUT_SECONDS", cls.batch_timeout_seconds, 0.01, 60),
            max_retries=reader.integer("MAX_RETRIES", cls.max_retries, 0, 20),
            retry_backoff_seconds=reader.seconds("RETRY_BACKOFF_SECONDS", cls.retry_backoff_seconds, 0.01, 60),
            retry_backoff_max_seconds=reader.seconds(
                "RETRY_BACKOFF_MAX_SECONDS", cls.retry_backoff_max_seconds, 0.01, 600
            ),
            hold_seconds=reader.seconds("HOLD_SECONDS", cls.hold_seconds, 0.1, 86_400),
            shutdown_timeout_seconds=reader.seconds("SHUTDOWN_TIMEOUT_SECONDS", cls.shutdown_timeout_seconds, 1, 3_600),
            reconcile_seconds=reader.seconds("RECONCILE_SECONDS", cls.reconcile_seconds, 0.1, 86_400),
            metrics_port=reader.integer("METRICS_PORT", cls.metrics_port, 0, 65_535),
            results_page=reader.choice("RESULTS_PAGE", cls.results_page, ("ON", "OFF")),
            results_port=reader.results_port(),
            results_visible=reader.results_visible(),
            results_title=reader.results_title(),
            results_date=reader.results_date(),
            results_shared_with=reader.results_shared_with(),
            log_level=reader.choice("LOG_LEVEL", cls.log_level, LOG_LEVELS),
            **reader.instance_name(),
        )
        if settings.db_pool_min > settings.db_pool_max:
            reader.fault("DB_POOL_MIN", str(settings.db_pool_min), f"at most DB_POOL_MAX ({settings.db_pool_max})")
        if settings.shows_results and settings.hides_open_laws and not settings.results_on_own_port:
            accepted = (
                "always, unless RESULTS_PORT gives the page a port that /metrics, which tells all numbers, is not on"
            )
            reader.fault("RESULTS_VISIBLE", settings.results_visible, accepted)
        if reader.faults:
            raise InvalidSettings(reader.faults)
        return settings

    @property
    def shows_results(self) -> bool:
        """Whether there is a results page."""
        return self.results_page == "ON"

    @property
    def results_on_own_port(self) -> bool:
        """Whether it has a port that /metrics is not on."""
        is_given = self.results_port is not None and (self.results_port == 0 or self.results_port != self.metrics_port)
        return self.shows_results and is_given

    @property
    def hides_open_laws(self) -> bool:
        """Whether the page tells no number of a law before its voting has ended."""
        return self.results_visible == AFTER_CLOSE

    def warnings(self) -> list[str]:
        """What is allowed but surely not meant, a sentence each."""
        found = []
        if self.rabbitmq_prefetch_count < self.batch_size:
            found.append(
                f"RABBITMQ_PREFETCH_COUNT ({self.rabbitmq_prefetch_count}) is below BATCH_SIZE ({self.batch_size}): "
                "no batch can fill, each waits for BATCH_TIMEOUT_SECONDS"
            )
        if self.hold_seconds > LONGEST_HOLD:
            found.append(
                f"HOLD_SECONDS ({self.hold_seconds:g}) is above {LONGEST_HOLD}: the broker's consumer timeout is 30 "
                "minutes unless it was raised: the broker would take the messages back first"
            )
        # the default may have been written down, as .env.example and docker-compose.yml do
        if self.rabbitmq_queue_type == "quorum" and self.rabbitmq_max_priority != Settings.rabbitmq_max_priority:
            found.append(
                f"RABBITMQ_MAX_PRIORITY ({self.rabbitmq_max_priority}) is not used: a quorum queue has no such argument"
            )
        return found + self._weak_passwords() + self._links_in_the_clear()

    def _weak_passwords(self) -> list[str]:
        shown = " ".join([LOG_WORDS, *map(str, self.redacted().values())]).lower()
        found = []
        for name, passwords in {
            "AMQP_URL": [unquote(urlsplit(url).password or "") for url in self.amqp_urls],
            "DATABASE_URL": [parse_dsn(self.database_url).get("password", "")],
        }.items():
            if any(len(password) < SHORTEST_PASSWORD or password.lower() in shown for password in passwords):
                found.append(
                    f"{name}: its password is shorter than {SHORTEST_PASSWORD} characters or a word of the log: "
                    "it can be guessed, and where drivers' texts are kept clean of it the like is hidden too"
                )
        return found

    def _links_in_the_clear(self) -> list[str]:
        parsed = parse_dsn(self.database_url)
        is_encrypted = parsed.get("sslmode", os.environ.get("PGSSLMODE", "prefer")) in ENCRYPTED
        management = urlsplit(self.rabbitmq_management_url or "")
        reached = [
            (
                "AMQP_URL",
                [url.hostname or "" for url in map(urlsplit, self.amqp_urls) if url.scheme == "amqp"],
                "amqps://",
            ),
            (
                "DATABASE_URL",
                [] if is_encrypted else _elements(parsed, "hostaddr") or _elements(parsed, "host"),
                "sslmode=verify-full",
            ),
            ("RABBITMQ_MANAGEMENT_URL", [management.hostname or ""] if management.scheme == "http" else [], "https://"),
        ]
        return [
            f"{name}: what is sent and the password go to {', '.join(away)} over the network in the clear: use {remedy}"
            for name, hosts, remedy in reached
            if (away := [host for host in hosts if not _is_here(host)])
        ]

    def redacted(self) -> dict[str, str | int | float]:
        """All settings by the name of their variable, passwords hidden: fit to be printed."""
        values: dict[str, Any] = {item.name.upper(): getattr(self, item.name) for item in dataclasses.fields(self)}
        urls = {"AMQP_URL": redact_url(*values.pop("AMQP_URLS")), "DATABASE_URL": redact_url(self.database_url)}
        return {name: "" if value is None else value for name, value in (urls | values | urls).items()}

    def secrets(self) -> list[str]:
        """The passwords in use, as written in the addresses and as typed, so that a log can be kept clean of them."""
        urls = (*self.amqp_urls, self.database_url)
        written = [url[start:end] for url in urls for start, end in _places_of_secrets(url)]
        typed = [unquote(text) for text in written]
        typed += [value for name, value in parse_dsn(self.database_url).items() if name in SECRET_PARAMETERS]
        for text in written:  # that of a key file, in pika's ssl_options
            typed += _password_in_options(unquote_plus(text))
        return sorted({*written, *typed} - {""})


def default_instance_name(host: str, pid: int) -> str:
    """Host and process id, as far as they fit into the 64 characters of an INSTANCE_NAME; the end is kept."""
    return re.sub(r"[^A-Za-z0-9._:-]", "-", f"{host}-{pid}")[-64:]


def redact_url(*urls: str) -> str:
    """Addresses of brokers, or of a database in either of libpq's forms: secrets replaced by ***, commas between."""
    return ",".join(_hide_secrets(url) for url in urls)


def _hide_secrets(url: str) -> str:
    for start, end in reversed(_places_of_secrets(url)):
        url = url[:start] + HIDDEN + url[end:]
    return url


def _places_of_secrets(url: str) -> list[tuple[int, int]]:
    """Where, from and to, an address has its secrets: after the user's name, and as values of parameters."""
    front = _URL_FRONT.match(url)
    places = [front.span("password")] if front and front["password"] is not None else []
    parameters = _URL_PARAMETER.finditer(url, front.end()) if front else _DSN_PARAMETER.finditer(url)
    for parameter in parameters:
        if unquote(parameter["name"]) in SECRET_PARAMETERS:  # both drivers take a name that is quoted, too
            places.append(parameter.span(parameter.lastindex or 0))
    return places


def _password_in_options(text: str) -> list[str]:
    """That of a key file, in what pika takes for ssl_options: a dict as Python writes it."""
    try:
        password = ast.literal_eval(text)["password"]
    except _PIKA_ERRORS:
        return []
    return [password.decode("utf-8", "replace") if isinstance(password, bytes) else str(password)]


def environment(needs_both: bool = False) -> dict[str, str]:
    """The process's environment, completed from the file .env in the working directory where one stands.

    The environment wins; an empty value there means unset, so .env still speaks. Where the two name neither a broker
    nor a database, and `make services-up` has started local ones, it is those; a line on standard error says so.
    Raises InvalidSettings where the file is no text; where no server is named and none is found on this machine; and,
    with ``needs_both``, where only one of the two is named: votes of a real queue would go who knows where, and a law
    would be certified while its votes wait elsewhere.
    """
    try:
        from_file = {name: value for name, value in dotenv_values(".env").items() if value}
    except UnicodeDecodeError:
        raise InvalidSettings([".env is not UTF-8 text"]) from None
    except OSError as exc:
        raise InvalidSettings([f".env cannot be read: {exc.strerror}"]) from None
    given = {name: value for name, value in os.environ.items() if value}
    # a file that the environment names wins over a secret that .env holds, as that secret would win over another one
    from_file = {name: value for name, value in from_file.items() if f"{name}_FILE" not in given or name not in SECRETS}
    environ = from_file | given
    named = [url for url, prefix, _ in SERVERS if _is_named(url, prefix, environ, given)]
    if not named:
        return environ | _servers_of_this_machine(environ)
    if needs_both and len(named) == 1:
        (other,) = [(url, prefix) for url, prefix, _ in SERVERS if url not in named]
        raise InvalidSettings([f"{other[0]} is not set, nor {other[1]}_HOST: only the other server is named"])
    return environ


def with_login(environ: Mapping[str, str], prefix: str, role: str, user: str) -> dict[str, str]:
    """The settings with a role's own login in the service's place, where it has one: a password, or a file with it.

    The auditor's at the database, for one: prefix POSTGRES, role AUDITOR, by POSTGRES_AUDITOR_PASSWORD and _USER, or
    ``user``. A URL that is set has a login of its own, and stays.
    """
    theirs = {end: environ.get(f"{prefix}_{role}_PASSWORD{end}", "") for end in ("", "_FILE")}
    if not any(theirs.values()):
        return dict(environ)
    login = {"USER": environ.get(f"{prefix}_{role}_USER") or user}
    login |= {f"PASSWORD{end}": value for end, value in theirs.items()}
    return {**environ, **{f"{prefix}_{part}": value for part, value in login.items()}}


def _is_named(url: str, prefix: str, environ: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Whether the settings say which server to use; a password in .env alone does not, it may be for Compose."""
    names = {url, f"{url}_FILE", f"{prefix}_HOST"}
    return bool(names & environ.keys()) or bool({f"{prefix}_PASSWORD", f"{prefix}_PASSWORD_FILE"} & given.keys())


def _servers_of_this_machine(environ: Mapping[str, str]) -> dict[str, str]:
    """The local services where they run; else nothing, where a server of the stack may stand at its usual port."""
    local = {name: value or "" for name, value in dotenv_values(LOCAL_SERVICES).items()}
    if local and all(_listens(urlsplit(local[url]).port or 0) for url, _, _ in SERVERS):
        print(f"no server is set: using the local services of {LOCAL_SERVICES}", file=sys.stderr)
        return local
    has_password = any(f"{prefix}_PASSWORD{end}" in environ for _, prefix, _ in SERVERS for end in ("", "_FILE"))
    ports = [environ.get(f"{prefix}_PORT", str(port)) for _, prefix, port in SERVERS]
    if has_password and not any(_listens(int(port)) for port in ports if port.isascii() and port.isdigit()):
        raise InvalidSettings(
            [
                "neither AMQP_URL nor RABBITMQ_HOST, DATABASE_URL nor POSTGRES_HOST is set, and nothing listens on "
                f"the ports {' and '.join(ports)} of this machine: `make services-up` starts servers to try it with"
            ]
        )
    return {}


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("localhost", port), 1.0):
            return True
    except (OSError, OverflowError):
        return False


class BrokerSettings(NamedTuple):
    """What a tool needs that knows only the broker; as in Settings."""

    urls: tuple[str, ...]
    queue: str
    queue_type: str
    max_priority: int
    heartbeat: int


def amqp_settings(environ: Mapping[str, str]) -> BrokerSettings:
    """Read the settings of the broker alone. Raises InvalidSettings with every fault found among these."""
    reader = _Reader(environ)
    values = BrokerSettings(
        reader.amqp_urls(), reader.queue(), reader.queue_type(), reader.max_priority(), reader.heartbeat()
    )
    if reader.faults:
        raise InvalidSettings(reader.faults)
    return values


def publisher_login(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings with the publisher's own user in the service's place, where it has one that may not publish."""
    return with_login(environ, "RABBITMQ", "PUBLISHER", "votes-publisher")


def database_url(environ: Mapping[str, str]) -> str:
    """Read what a tool needs that knows only the database. Raises InvalidSettings with every fault found in it."""
    reader = _Reader(environ)
    url = reader.database_url()
    if reader.faults:
        raise InvalidSettings(reader.faults)
    return url


def management_url(environ: Mapping[str, str]) -> str | None:
    """Read the address of RabbitMQ's management API (http://HOST:PORT), None where it is not set.

    User and password are those of the AMQP URL. Raises InvalidSettings.
    """
    reader = _Reader(environ)
    url = reader.management_url()
    if reader.faults:
        raise InvalidSettings(reader.faults)
    return url


def hides_open_laws(environ: Mapping[str, str]) -> bool:
    """Read whether no number of an open law may get out. Raises InvalidSettings."""
    reader = _Reader(environ)
    visible = reader.results_visible()
    if reader.faults:
        raise InvalidSettings(reader.faults)
    return visible == AFTER_CLOSE


class _Reader:
    """Takes one variable after the other and remembers every fault, so that all can be reported at once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[str] = []

    def fault(self, name: str, value: str | None, accepted: str) -> None:
        if value is None:
            self.faults.append(f"{name} is not set: {accepted}")
        else:
            # an address in what should be a host or a number, or a part of one, may come with a password
            shown = HIDDEN if name in SECRETS or re.search("[@=]|://", value) else repr(value[:100])
            self.faults.append(f"{name} is {shown}: accepted is {accepted}")

    def text(self, name: str) -> str | None:
        value = self._environ.get(name) or None
        if value is not None and _NOT_TEXT.search(value):
            self.fault(name, value, "UTF-8 text without NUL")
            return HIDDEN
        return value

    def matching(self, name: str, default: str, pattern: re.Pattern[str], accepted: str) -> str:
        value = self.text(name) or default
        if not pattern.fullmatch(value):
            self.fault(name, value, accepted)
        return value

    def results_visible(self) -> str:
        return self.choice("RESULTS_VISIBLE", Settings.results_visible, VISIBILITIES)

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.text(name) or default
        for one in choices:
            if value.lower() == one.lower():
                return one
        self.fault(name, value, "one of " + ", ".join(choices))
        return default

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        return int(self._number(name, default, low, high, "a whole number", r"-?[0-9]{1,9}"))

    def seconds(self, name: str, default: float, low: float, high: float) -> float:
        return self._number(name, default, low, high, "a number of seconds", r"-?[0-9]{1,9}(\.[0-9]{1,9})?")

    def _number(self, name: str, default: float, low: float, high: float, kind: str, form: str) -> float:
        value = self.text(name)
        if value is None:
            return default
        if not re.fullmatch(form, value) or not low <= float(value) <= high:
            self.fault(name, value, f"{kind} from {low:,} to {high:,}")
            return default
        return float(value)

    def secret(self, name: str) -> str | None:
        """The value of NAME, or the first line of the file that NAME_FILE names."""
        value, path = self.text(name), self.text(f"{name}_FILE")
        if value is not None or path is None:
            return value
        try:
            content = Path(path).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8 text"
            # what is no file may be the secret itself, put into the wrong variable
            self.faults.append(f"{name}_FILE is {HIDDEN}: accepted is a file that can be read ({reason})")
            return HIDDEN
        if not content or "\0" in content:
            self.fault(f"{name}_FILE", path, "a file whose first line is the secret (it is empty, or holds a NUL)")
            return HIDDEN
        return content

    def instance_name(self) -> dict[str, str]:
        if self.text("INSTANCE_NAME") is None:
            return {}
        accepted = "1 to 64 characters of A-Z a-z 0-9 . _ : -"
        return {"instance_name": self.matching("INSTANCE_NAME", "", _INSTANCE_NAME, accepted)}

    def queue(self) -> str:
        return self.matching("RABBITMQ_QUEUE", Settings.rabbitmq_queue, _QUEUE_NAME, "1 to 255 characters")

    def queue_type(self) -> str:
        return self.choice("RABBITMQ_QUEUE_TYPE", Settings.rabbitmq_queue_type, QUEUE_TYPES)

    def management_url(self) -> str | None:
        url = self.text("RABBITMQ_MANAGEMENT_URL")
        if url is not None and not re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+(/[A-Za-z0-9._/-]*)?", url):
            self.fault("RABBITMQ_MANAGEMENT_URL", url, "http://HOST:PORT (or https://), without user and password")
        return url

    def results_port(self) -> int | None:
        return self.integer("RESULTS_PORT", 0, 0, 65_535) if self.text("RESULTS_PORT") else None

    def results_title(self) -> str | None:
        title = self.text("RESULTS_TITLE")
        if title is not None and (len(title) > LONGEST_TITLE or not title.isprintable()):
            self.fault("RESULTS_TITLE", title, f"at most {LONGEST_TITLE} characters in one line")
        return title

    def results_date(self) -> str | None:
        value = self.text("RESULTS_DATE")
        try:
            return None if value is None else datetime.strptime(value, "%Y-%m-%d").date().isoformat()
        except ValueError:
            self.fault("RESULTS_DATE", value, "a day as YYYY-MM-DD")
            return None

    def results_shared_with(self) -> str | None:
        value = " ".join((self.text("RESULTS_SHARED_WITH") or "").split()).lower()
        if value and not _ORIGINS.fullmatch(value):
            self.fault("RESULTS_SHARED_WITH", value, "*, or sites as https://HOST with blanks between")
        return value or None

    def max_priority(self) -> int:
        return self.integer("RABBITMQ_MAX_PRIORITY", Settings.rabbitmq_max_priority, 0, 255)

    def heartbeat(self) -> int:
        return self.integer("RABBITMQ_HEARTBEAT", Settings.rabbitmq_heartbeat, 1, 3_600)

    def amqp_urls(self) -> tuple[str, ...]:
        value = self.secret("AMQP_URL")
        if value is None:
            user, password, addresses = self._parts("RABBITMQ", "AMQP_URL", 5672)
            vhost = quote(self.text("RABBITMQ_VHOST") or "/", safe="")
            return tuple(f"amqp://{user}:{password}@{address}/{vhost}" for address in addresses)
        urls = tuple(url.strip() for url in _BETWEEN_URLS.split(value))
        accepted = "amqp://USER:PASSWORD@HOST:PORT/VHOST (or amqps://), one or several with commas between"
        problems = [_amqp_problem(url) for url in urls]
        for number, problem in enumerate(problems, 1):
            if problem:
                which = f"number {number} of {len(urls)}" if len(urls) > 1 else "this one"
                self.fault("AMQP_URL", value, f"{accepted}; {which} {problem}")
        if not any(problems) and len({pika.URLParameters(url).virtual_host for url in urls}) > 1:
            self.fault("AMQP_URL", value, f"{accepted}, all with the same VHOST")
        return urls

    def database_url(self) -> str:
        url = self.secret("DATABASE_URL")
        if url is None:
            user, password, addresses = self._parts("POSTGRES", "DATABASE_URL", 5432)
            database = quote(self.text("POSTGRES_DB") or "votes", safe="")
            hosts = ",".join(addresses).replace("%", "%25")  # before the zone of an IPv6 address
            url = f"postgresql://{user}:{password}@{hosts}/{database}"
        elif problem := _database_problem(url):
            accepted = "postgresql://USER:PASSWORD@HOST:PORT,HOST:PORT/DATABASE, or what else libpq reads"
            self.fault("DATABASE_URL", url, f"{accepted}; this one {problem}")
        return url if self.faults else _to_the_primary(url)

    def _parts(self, prefix: str, url_name: str, default_port: int) -> tuple[str, str, list[str]]:
        """User and password from the variables of one kind of server, quoted for a URL, and each host:port."""
        password = self.secret(f"{prefix}_PASSWORD")
        if password is None:
            self.fault(
                f"{prefix}_PASSWORD", None, f"set it, or {prefix}_PASSWORD_FILE, or {url_name}; or `make services-up`"
            )
        user = self.text(f"{prefix}_USER") or "votes"
        host, port = self.text(f"{prefix}_HOST") or "localhost", self.text(f"{prefix}_PORT") or str(default_port)
        hosts, ports = host.split(","), port.split(",")
        if not all(map(_is_host, hosts)):
            self.fault(f"{prefix}_HOST", host, "a host name or an address, or several with commas between")
        if not _are_ports(ports, len(hosts)):
            several = f", or one for each of the {len(hosts)} hosts with commas between" if len(hosts) > 1 else ""
            self.fault(f"{prefix}_PORT", port, f"a whole number from 1 to 65,535{several}")
        ports = ports * len(hosts) if len(ports) == 1 else ports
        names = [f"[{name}]" if ":" in name else name for name in hosts]
        addresses = [f"{name}:{port or default_port}" for name, port in zip(names, ports, strict=False)]
        return quote(user, safe=""), quote(password or "", safe=""), addresses


# --- addresses, as the drivers themselves read them: what is accepted here is accepted there -------------------------


def _amqp_problem(url: str) -> str | None:
    """What is wrong with one broker's address, if anything. It may hold a password: that is never told."""
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in ("amqp", "amqps") and parts.port != 0 and _is_host(parts.hostname or "")
        # the drivers disagree on which of two @ ends the password, and would print its rest as a host
        is_sound = is_sound and parts.netloc.count("@") <= 1
        # what urlsplit drops unseen, and another address that was not seen as one
        is_sound = is_sound and url.isprintable() and url.count("://") == 1 and "," not in parts.path
        if is_sound and not parts.password:
            return "has no password"
        pika.URLParameters(url)
    except _PIKA_ERRORS:
        return "is malformed"
    return None if is_sound else "is malformed"


def _database_problem(url: str) -> str | None:
    """What is wrong with a database's address, if anything; not told are the values, among them the password."""
    try:
        parsed = parse_dsn(url)
    except (psycopg2.Error, ValueError):  # whose texts may repeat the password
        return "cannot be read"
    if _URL_FRONT.match(url) and url.count("://") > 1:
        return "holds another URL: several hosts stand in one"
    hosts, addresses, ports = (_elements(parsed, name) for name in ("host", "hostaddr", "port"))
    if not hosts and not addresses:
        return "has no host"
    # a host with an @ would be the rest of a password: libpq ends that at the first @
    are_sound = all(host.startswith("/") or _is_host(host) for host in hosts + addresses)
    if not are_sound or (hosts and addresses and len(hosts) != len(addresses)):
        return "has a malformed list of hosts"
    if ports and not _are_ports(ports, len(hosts or addresses)):
        return "has a port that is not from 1 to 65,535, or neither one port nor as many as hosts"
    if parsed.get("target_session_attrs", "any") not in ("any", "read-write", "primary"):
        return "has a target_session_attrs other than read-write, primary and any: on another server no vote is counted"
    return None if parsed.get("password") else "has no password"


def _to_the_primary(url: str) -> str:
    """Of several database servers the one that can write is meant, where the address does not say which."""
    parsed = parse_dsn(url)
    is_one = len(_elements(parsed, "host") or _elements(parsed, "hostaddr")) == 1
    if is_one or "target_session_attrs" in parsed:
        return url
    front = _URL_FRONT.match(url)
    if not front:
        return make_dsn(url, target_session_attrs="read-write")
    joint = "?" if "?" not in url[front.end() :] else "" if url[-1] in "?&" else "&"
    return f"{url}{joint}target_session_attrs=read-write"


def _elements(parsed: Mapping[str, str], name: str) -> list[str]:
    return parsed[name].split(",") if parsed.get(name) else []


def _is_host(text: str) -> bool:
    """A host name, or an address of either kind."""
    try:
        return bool(_HOST_NAME.fullmatch(text) or ip_address(text))
    except ValueError:
        return False


def _is_here(host: str) -> bool:
    """A Unix socket, or a loopback address."""
    try:
        return host.startswith("/") or host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _are_ports(ports: list[str], hosts: int) -> bool:
    """One for all hosts or one each; an empty one is the default, as for libpq."""
    is_each_sound = all(re.fullmatch("|[0-9]{1,9}", port) and 1 <= int(port or 1) <= 65_535 for port in ports)
    return is_each_sound and len(ports) in (1, hosts)
