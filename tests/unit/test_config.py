"""Settings: defaults, faults reported at once, secrets kept out of sight."""

from __future__ import annotations

from pathlib import Path

import pytest

import config
from config import InvalidSettings, Settings

MINIMAL = {"RABBITMQ_PASSWORD": "b-secret", "POSTGRES_PASSWORD": "d-secret"}


def faults(**environ: str) -> list[str]:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env(MINIMAL | environ)
    return caught.value.faults


def test_passwords_are_all_that_must_be_set() -> None:
    """Everything else has a default, which is the documented one."""
    settings = Settings.from_env(MINIMAL)
    assert settings.amqp_url == "amqp://votes:b-secret@localhost:5672/%2F"
    assert settings.database_url == "postgresql://votes:d-secret@localhost:5432/votes"
    assert (settings.batch_size, settings.batch_timeout_seconds, settings.rabbitmq_prefetch_count) == (100, 1.0, 100)
    assert (settings.db_pool_min, settings.db_pool_max, settings.max_retries) == (2, 10, 3)
    assert settings.warnings() == []


def test_no_password_has_a_default() -> None:
    """Both missing ones are named, with the ways to give them."""
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env({})
    assert [fault.split(" ")[0] for fault in caught.value.faults] == ["RABBITMQ_PASSWORD", "POSTGRES_PASSWORD"]


def test_every_fault_is_reported_at_once() -> None:
    """One look at the message is enough to mend all."""
    found = faults(BATCH_SIZE="0", METRICS_PORT="http", LOG_LEVEL="loud", DB_POOL_MIN="20", RABBITMQ_HOST="a b")
    assert sorted(fault.split(" ")[0] for fault in found) == [
        "BATCH_SIZE",
        "DB_POOL_MIN",
        "LOG_LEVEL",
        "METRICS_PORT",
        "RABBITMQ_HOST",
    ]
    assert "BATCH_SIZE is '0': accepted is a whole number from 1 to 10,000" in found


@pytest.mark.parametrize(
    "value", ["1_000", "\u0661\u0660\u0660", "1e3", " 100", "100.0", "0x10", "99999999999999999999", "nan"]
)
def test_odd_spellings_of_a_number_are_refused(value: str) -> None:
    """What int() or float() would take is not always what was meant."""
    assert faults(BATCH_SIZE=value)


def test_an_empty_value_means_unset() -> None:
    """As compose files and .env.example leave them."""
    assert Settings.from_env(MINIMAL | {"BATCH_SIZE": "", "AMQP_URL": ""}).batch_size == 100


def test_a_url_wins_over_the_parts() -> None:
    """AMQP_URL and DATABASE_URL carry everything."""
    settings = Settings.from_env({"AMQP_URL": "amqps://u:p@mq:5671/v", "DATABASE_URL": "postgres://u:p@db/x"})
    assert (settings.amqp_url, settings.database_url) == ("amqps://u:p@mq:5671/v", "postgres://u:p@db/x")


def test_passwords_in_parts_are_quoted_for_the_url() -> None:
    """A password may hold any character."""
    settings = Settings.from_env({"RABBITMQ_PASSWORD": "p@ss/w:rd#?", "POSTGRES_PASSWORD": "é %"})
    assert ":p%40ss%2Fw%3Ard%23%3F@" in settings.amqp_url
    assert ":%C3%A9%20%25@" in settings.database_url


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("AMQP_URL", "http://u:s3cret@h/"),
        ("AMQP_URL", "s3cret"),
        ("AMQP_URL", "amqp://u:s3cret@h:99999/"),
        ("AMQP_URL", "amqp://u@h/"),
        ("AMQP_URL", "amqp://u:s3cret@h/?heartbeat=soon"),
        ("DATABASE_URL", "mysql://u:s3cret@h/d"),
        ("DATABASE_URL", "postgresql://u:hunter@s3cret@h/d"),
        ("RABBITMQ_HOST", "amqp://u:s3cret@h"),
        ("RABBITMQ_PASSWORD_FILE", "s3cret"),
        ("DATABASE_URL", "postgresql://u:s3cret@h/d?unknown=1"),
        ("DATABASE_URL", "postgresql://u:s3cret@[h/d"),
        ("DATABASE_URL", "host=h password=s3cret"),
    ],
)
def test_a_wrong_url_is_a_fault_that_does_not_repeat_the_password(name: str, url: str) -> None:
    """The value is hidden, what is accepted is said."""
    environ = {key: value for key, value in MINIMAL.items() if not name.startswith(key)}
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env(environ | {name: url})
    (fault,) = caught.value.faults
    assert fault.startswith(name)
    assert "s3cret" not in fault


def test_every_secret_can_come_from_a_file(tmp_path: Path) -> None:
    """NAME_FILE names a file whose first line is the secret."""
    for name in config.SECRETS:
        (tmp_path / name).write_text(f"amqp://u:{name}@h/\n" if name == "AMQP_URL" else f"{name}\n")
    (tmp_path / "DATABASE_URL").write_text("postgresql://u:p@h/d\n")
    parts = {f"{name}_FILE": str(tmp_path / name) for name in ("RABBITMQ_PASSWORD", "POSTGRES_PASSWORD")}
    assert ":RABBITMQ_PASSWORD@" in Settings.from_env(parts).amqp_url
    urls = {f"{name}_FILE": str(tmp_path / name) for name in ("AMQP_URL", "DATABASE_URL")}
    assert Settings.from_env(urls).database_url == "postgresql://u:p@h/d"


def test_a_secret_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    """Missing, empty and not text, each with the reason."""
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "nul").write_bytes(b"ab\0cd")
    for name in ("missing", "empty", "binary", "nul"):
        environ = {"RABBITMQ_PASSWORD_FILE": str(tmp_path / name), "POSTGRES_PASSWORD": "x"}
        with pytest.raises(InvalidSettings, match="RABBITMQ_PASSWORD_FILE"):
            Settings.from_env(environ)


def test_no_password_is_in_a_repr_or_in_the_redacted_settings() -> None:
    """Neither given in parts nor in a URL, nor in a URL's query."""
    settings = Settings.from_env(MINIMAL | {"DATABASE_URL": "postgresql://u:q-secret@h/d?sslpassword=k-secret"})
    assert "secret" not in repr(settings)
    assert "secret" not in str(settings.redacted())
    assert {"b-secret", "q-secret"} <= set(settings.secrets())


def test_a_prefetch_below_the_batch_size_is_warned_of() -> None:
    """Such a batch never fills; only its timer ever flushes it."""
    settings = Settings.from_env(MINIMAL | {"RABBITMQ_PREFETCH_COUNT": "50"})
    assert "RABBITMQ_PREFETCH_COUNT" in settings.warnings()[0]


def test_an_env_file_that_is_no_text_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no traceback."""
    (tmp_path / ".env").write_bytes(b"BATCH_SIZE=\xff\xfe\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidSettings, match="UTF-8"):
        config.environment()


@pytest.mark.parametrize("host", ["a" * 63, "h\u00f4te", "db 1", "x"])
def test_the_default_instance_name_always_fits(host: str) -> None:
    """A longer one would be refused by the database with every batch."""
    name = config.default_instance_name(host, 4_194_304)
    assert Settings.from_env(MINIMAL | {"INSTANCE_NAME": name}).instance_name == name
    assert name.endswith("-4194304")


def test_the_environment_wins_over_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an empty variable does not."""
    (tmp_path / ".env").write_text("BATCH_SIZE=7\nMAX_RETRIES=8\nLOG_LEVEL=\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCH_SIZE", "9")
    monkeypatch.setenv("MAX_RETRIES", "")
    found = config.environment()
    assert (found["BATCH_SIZE"], found["MAX_RETRIES"], found.get("LOG_LEVEL")) == ("9", "8", None)


def test_the_env_example_names_every_setting() -> None:
    """And nothing that is no setting."""
    root = Path(config.__file__).parent
    text = (root / ".env.example").read_text().partition("# --- docker-compose.yml only ---")[0]
    named = {line.partition("=")[0] for line in text.splitlines() if line and not line.startswith("#")}
    parts = {f"{server}_{part}" for server in ("RABBITMQ", "POSTGRES") for part in ("HOST", "PORT", "USER", "PASSWORD")}
    assert named == set(Settings.from_env(MINIMAL).redacted()) | parts | {
        "RABBITMQ_VHOST",
        "POSTGRES_DB",
        "RABBITMQ_MANAGEMENT_URL",
    }
