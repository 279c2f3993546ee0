"""Settings of the service: read from the environment and from .env, checked as a whole before anything starts."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pika
import psycopg2
from dotenv import dotenv_values
from psycopg2.extensions import parse_dsn

SECRETS = ("RABBITMQ_PASSWORD", "POSTGRES_PASSWORD", "AMQP_URL", "DATABASE_URL")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
HIDDEN = "***"


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

    Durations are in seconds, sizes in votes. The two URLs are the finished addresses, passwords included;
    they are kept out of ``repr`` and shown hidden by ``redacted``.
    """

    amqp_url: str = field(repr=False)
    database_url: str = field(repr=False)
    rabbitmq_queue: str = "votes.aggregation"
    rabbitmq_prefetch_count: int = 100
    rabbitmq_max_priority: int = 10
    rabbitmq_heartbeat: int = 15
    db_pool_min: int = 2
    db_pool_max: int = 10
    db_timeout_seconds: float = 10.0
    batch_size: int = 100
    batch_timeout_seconds: float = 1.0
    max_retries: int = 3
    retry_backoff_seconds: float = 1.0
    shutdown_timeout_seconds: float = 20.0
    reconcile_seconds: float = 60.0
    metrics_port: int = 8001
    results_page: str = "ON"
    results_port: int | None = None  # unset: the page is on the metrics port
    log_level: str = "INFO"
    instance_name: str = field(default_factory=lambda: default_instance_name(socket.gethostname(), os.getpid()))

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from ``environ`` (names and values as in ``os.environ``; an empty value means unset).

        Raises InvalidSettings with every fault found, not only the first.
        """
        reader = _Reader(environ)
        settings = cls(
            amqp_url=reader.amqp_url(),
            database_url=reader.database_url(),
            rabbitmq_queue=reader.queue(),
            rabbitmq_prefetch_count=reader.integer("RABBITMQ_PREFETCH_COUNT", cls.rabbitmq_prefetch_count, 1, 65_535),
            rabbitmq_max_priority=reader.max_priority(),
            rabbitmq_heartbeat=reader.heartbeat(),
            db_pool_min=reader.integer("DB_POOL_MIN", cls.db_pool_min, 1, 100),
            db_pool_max=reader.integer("DB_POOL_MAX", cls.db_pool_max, 1, 100),
            db_timeout_seconds=reader.seconds("DB_TIMEOUT_SECONDS", cls.db_timeout_seconds, 1, 600),
            batch_size=reader.integer("BATCH_SIZE", cls.batch_size, 1, 10_000),
            batch_timeout_seconds=reader.seconds("BATCH_TIMEOUT_SECONDS", cls.batch_timeout_seconds, 0.01, 60),
            max_retries=reader.integer("MAX_RETRIES", cls.max_retries, 0, 20),
            retry_backoff_seconds=reader.seconds("RETRY_BACKOFF_SECONDS", cls.retry_backoff_seconds, 0.01, 60),
            shutdown_timeout_seconds=reader.seconds("SHUTDOWN_TIMEOUT_SECONDS", cls.shutdown_timeout_seconds, 1, 3_600),
            reconcile_seconds=reader.seconds("RECONCILE_SECONDS", cls.reconcile_seconds, 0.1, 86_400),
            metrics_port=reader.integer("METRICS_PORT", cls.metrics_port, 0, 65_535),
            results_page=reader.choice("RESULTS_PAGE", cls.results_page, ("ON", "OFF")),
            results_port=reader.results_port(),
            log_level=reader.choice("LOG_LEVEL", cls.log_level, LOG_LEVELS),
            **reader.instance_name(),
        )
        if settings.db_pool_min > settings.db_pool_max:
            reader.fault("DB_POOL_MIN", str(settings.db_pool_min), f"at most DB_POOL_MAX ({settings.db_pool_max})")
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

    def warnings(self) -> list[str]:
        """What is allowed but surely not meant, a sentence each."""
        if self.rabbitmq_prefetch_count < self.batch_size:
            return [
                f"RABBITMQ_PREFETCH_COUNT ({self.rabbitmq_prefetch_count}) is below BATCH_SIZE ({self.batch_size}): "
                "no batch can fill, each waits for BATCH_TIMEOUT_SECONDS"
            ]
        return []

    def redacted(self) -> dict[str, str | int | float]:
        """All settings by the name of their variable, passwords hidden: fit to be printed."""
        shown = {item.name.upper(): getattr(self, item.name) for item in dataclasses.fields(self)}
        urls = {"AMQP_URL": redact_url(self.amqp_url), "DATABASE_URL": redact_url(self.database_url)}
        return shown | urls | ({"RESULTS_PORT": ""} if self.results_port is None else {})

    def secrets(self) -> list[str]:
        """The passwords in use, as written in the URLs and as typed, so that a log can be kept clean of them."""
        raw = [urlsplit(url).password or "" for url in (self.amqp_url, self.database_url)]
        return sorted({secret for text in raw for secret in (text, unquote(text)) if secret})


def default_instance_name(host: str, pid: int) -> str:
    """Host and process id, as far as they fit into the 64 characters of an INSTANCE_NAME; the end is kept."""
    return re.sub(r"[^A-Za-z0-9._:-]", "-", f"{host}-{pid}")[-64:]


def redact_url(url: str) -> str:
    """``url`` with its password, and the values of its query, replaced by ***."""
    parts = urlsplit(url)
    if parts.password is not None:
        user_info, _, address = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user_info.partition(':')[0]}:{HIDDEN}@{address}")
    return parts._replace(query=re.sub(r"(?i)(password=)[^&]*", rf"\g<1>{HIDDEN}", parts.query)).geturl()


def environment() -> dict[str, str]:
    """The process's environment, completed from the file .env in the working directory where one stands.

    The environment wins; an empty value there means unset, so .env still speaks. Raises InvalidSettings where the file
    is no text.
    """
    try:
        from_file = {name: value for name, value in dotenv_values(".env").items() if value}
    except UnicodeDecodeError:
        raise InvalidSettings([".env is not UTF-8 text"]) from None
    return from_file | {name: value for name, value in os.environ.items() if value}


def amqp_settings(environ: Mapping[str, str]) -> tuple[str, str, int, int]:
    """Read what a tool needs that knows only the broker: URL, queue, maximum priority, heartbeat in seconds.

    Raises InvalidSettings with every fault found among these.
    """
    reader = _Reader(environ)
    values = reader.amqp_url(), reader.queue(), reader.max_priority(), reader.heartbeat()
    if reader.faults:
        raise InvalidSettings(reader.faults)
    return values


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
    url = reader.text("RABBITMQ_MANAGEMENT_URL")
    if url is not None and not re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+(/[A-Za-z0-9._/-]*)?", url):
        reader.fault("RABBITMQ_MANAGEMENT_URL", url, "http://HOST:PORT (or https://), without user and password")
    if reader.faults:
        raise InvalidSettings(reader.faults)
    return url


_QUEUE_NAME = re.compile(r"[^\x00-\x1f]{1,255}")
_INSTANCE_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,255}")


class _Reader:
    """Takes one variable after the other and remembers every fault, so that all can be reported at once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[str] = []

    def fault(self, name: str, value: str | None, accepted: str) -> None:
        if value is None:
            self.faults.append(f"{name} is not set: {accepted}")
        else:
            # an @ in what should be a host or a number may come with a password before it
            shown = HIDDEN if name in SECRETS or "@" in value else repr(value[:100])
            self.faults.append(f"{name} is {shown}: accepted is {accepted}")

    def text(self, name: str) -> str | None:
        return self._environ.get(name) or None

    def matching(self, name: str, default: str, pattern: re.Pattern[str], accepted: str) -> str:
        value = self.text(name) or default
        if not pattern.fullmatch(value):
            self.fault(name, value, accepted)
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = (self.text(name) or default).upper()
        if value not in choices:
            self.fault(name, value, "one of " + ", ".join(choices))
        return value

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

    def results_port(self) -> int | None:
        return self.integer("RESULTS_PORT", 0, 0, 65_535) if self.text("RESULTS_PORT") else None

    def max_priority(self) -> int:
        return self.integer("RABBITMQ_MAX_PRIORITY", Settings.rabbitmq_max_priority, 1, 255)

    def heartbeat(self) -> int:
        return self.integer("RABBITMQ_HEARTBEAT", Settings.rabbitmq_heartbeat, 1, 3_600)

    def amqp_url(self) -> str:
        url = self.secret("AMQP_URL")
        if url is not None:
            accepted = "amqp://USER:PASSWORD@HOST:PORT/VHOST (or amqps://)"
            self._check_url("AMQP_URL", url, ("amqp", "amqps"), pika.URLParameters, accepted)
            return url
        user, password, address = self._parts("RABBITMQ", "AMQP_URL", "localhost", 5672)
        vhost = self.text("RABBITMQ_VHOST") or "/"
        return f"amqp://{user}:{password}@{address}/{quote(vhost, safe='')}"

    def database_url(self) -> str:
        url = self.secret("DATABASE_URL")
        if url is not None:
            accepted = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
            self._check_url("DATABASE_URL", url, ("postgresql", "postgres"), parse_dsn, accepted)
            return url
        user, password, address = self._parts("POSTGRES", "DATABASE_URL", "localhost", 5432)
        database = self.text("POSTGRES_DB") or "votes"
        return f"postgresql://{user}:{password}@{address}/{quote(database, safe='')}"

    def _parts(self, prefix: str, url_name: str, default_host: str, default_port: int) -> tuple[str, str, str]:
        """User, password and host:port from the variables of one server, quoted for a URL."""
        password = self.secret(f"{prefix}_PASSWORD")
        if password is None:
            self.fault(f"{prefix}_PASSWORD", None, f"set it, or {prefix}_PASSWORD_FILE, or {url_name}")
        user = self.text(f"{prefix}_USER") or "votes"
        host = self.matching(f"{prefix}_HOST", default_host, _HOST, "a host name or an address")
        port = self.integer(f"{prefix}_PORT", default_port, 1, 65_535)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return quote(user, safe=""), quote(password or "", safe=""), address

    def _check_url(
        self, name: str, url: str, schemes: tuple[str, ...], parse: Callable[[str], object], accepted: str
    ) -> None:
        """Let the driver itself read the address, so that what is accepted here is accepted there."""
        try:
            parts = urlsplit(url)
            parse(url)
            sound = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
            # the drivers disagree on which of two @ ends the password, and would print its rest as a host
            sound = sound and parts.netloc.count("@") <= 1
        except (
            ValueError,
            LookupError,
            TypeError,
            SyntaxError,
            OSError,
            psycopg2.Error,
        ):  # whose texts may repeat the password
            sound = False
        if not sound:
            self.fault(name, url, accepted)
        elif not parts.password and "password=" not in parts.query:
            self.fault(name, url, f"{accepted}; this one has no password")
