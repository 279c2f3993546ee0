"""Settings: defaults, faults reported at once, secrets kept out of sight."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn, parse_dsn

import config
from config import InvalidSettings, Settings
from scripts import local_services

MINIMAL = {"RABBITMQ_PASSWORD": "b-secret", "POSTGRES_PASSWORD": "d-secret"}
PRIMARY = "target_session_attrs=read-write"


def faults(**environ: str) -> list[str]:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env(MINIMAL | environ)
    return caught.value.faults


def read(**environ: str) -> Settings:
    return Settings.from_env(MINIMAL | environ)


def test_passwords_are_all_that_must_be_set() -> None:
    """Everything else has a default, which is the documented one."""
    settings = Settings.from_env(MINIMAL)
    assert settings.amqp_urls == ("amqp://votes:b-secret@localhost:5672/%2F",)
    assert settings.database_url == "postgresql://votes:d-secret@localhost:5432/votes"
    assert (settings.batch_size, settings.batch_timeout_seconds, settings.rabbitmq_prefetch_count) == (100, 1.0, 100)
    assert (settings.db_pool_min, settings.db_pool_max, settings.max_retries) == (2, 10, 3)
    assert (settings.hold_seconds, settings.retry_backoff_max_seconds) == (300.0, 30.0)
    assert (settings.rabbitmq_queue_type, settings.rabbitmq_management_url) == ("classic", None)
    assert settings.rabbitmq_reader == "one-pass"
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
    assert (settings.amqp_urls, settings.database_url) == (("amqps://u:p@mq:5671/v",), "postgres://u:p@db/x")


def test_passwords_in_parts_are_quoted_for_the_url() -> None:
    """A password may hold any character."""
    settings = Settings.from_env({"RABBITMQ_PASSWORD": "p@ss/w:rd#?", "POSTGRES_PASSWORD": "é %"})
    assert ":p%40ss%2Fw%3Ard%23%3F@" in settings.amqp_urls[0]
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
        ("DATABASE_URL", "postgresql://u:s3cret@h/d,postgresql://u:s3cret@h2/d"),
        ("DATABASE_URL", "host=h,h2,h3 port=1,2 password=s3cret"),
        ("DATABASE_URL", "host=h sslkey=x sslpassword=s3cret"),
        ("DATABASE_URL", "host=h password='s3cret"),
        ("AMQP_URL", "amqp://u:p@h/?ssl_options=['s3cret']"),
        ("AMQP_URL", "amqp://u:\ts3cret@h/"),  # pika would log in without the tab
        ("POSTGRES_USER", "u\0s3cret@"),
        ("RABBITMQ_MANAGEMENT_URL", "http://u:s3cret@h:15672"),
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
    assert ":RABBITMQ_PASSWORD@" in Settings.from_env(parts).amqp_urls[0]
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


@pytest.mark.parametrize(
    ("environ", "warned_of"),
    [
        ({"RABBITMQ_PREFETCH_COUNT": "50"}, "RABBITMQ_PREFETCH_COUNT"),  # only its timer ever flushes a batch
        ({"HOLD_SECONDS": "1501"}, "HOLD_SECONDS"),
        ({"RABBITMQ_QUEUE_TYPE": "quorum", "RABBITMQ_MAX_PRIORITY": "5"}, "RABBITMQ_MAX_PRIORITY"),
    ],
)
def test_what_is_surely_not_meant_is_warned_of(environ: dict[str, str], warned_of: str) -> None:
    """One sentence, which begins with the variable."""
    (warning,) = read(**environ).warnings()
    assert warning.startswith(warned_of)


@pytest.mark.parametrize(
    "environ",
    [
        {"HOLD_SECONDS": "1500"},
        {"RABBITMQ_MAX_PRIORITY": "5"},
        {"RABBITMQ_QUEUE_TYPE": "quorum", "RABBITMQ_MAX_PRIORITY": "10"},  # as docker-compose.yml hands it on
    ],
)
def test_what_may_well_be_meant_is_not_warned_of(environ: dict[str, str]) -> None:
    """A limit itself, and a default that was written down."""
    assert read(**environ).warnings() == []


# --- several brokers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        ("amqp://u:p@h1/,amqp://u:p@h2:1/", ["amqp://u:p@h1/", "amqp://u:p@h2:1/"]),
        (" amqp://u:p@h1/v , AMQPS://x:y@h2/v ", ["amqp://u:p@h1/v", "AMQPS://x:y@h2/v"]),
        ("amqp://u:p@h/,amqp://u:p@h/", ["amqp://u:p@h/"] * 2),
        ("amqp://u:p,q,@h1/,amqp://u:,@h2/", ["amqp://u:p,q,@h1/", "amqp://u:,@h2/"]),
        ("amqp://u:p@h1,amqp://u:p@h2/,amqp://u:p@h3/%2f", ["amqp://u:p@h1", "amqp://u:p@h2/", "amqp://u:p@h3/%2f"]),
        ("amqp://u:p@[::1]:5/,amqp://u:p@[fe80::1%lo]/", ["amqp://u:p@[::1]:5/", "amqp://u:p@[fe80::1%lo]/"]),
        ("amqp://u:p@h/a%2Cb?client_properties={'a':1,'b':2}", ["amqp://u:p@h/a%2Cb?client_properties={'a':1,'b':2}"]),
    ],
)
def test_amqp_url_takes_several_servers_of_one_virtual_host(value: str, urls: list[str]) -> None:
    """Only a comma before another URL divides them: a password may hold one."""
    assert read(AMQP_URL=value).amqp_urls == tuple(urls)


@pytest.mark.parametrize(
    ("value", "which"),
    [
        ("amqp://a:s3cret@h1/,", "number 2 of 2 is malformed"),
        (",amqp://a:s3cret@h1/", "number 1 of 2 is malformed"),
        ("amqp://a:s3cret@h1/,,amqp://a:b@h2/", "number 1 of 2 is malformed"),
        ("amqp://a:s3cret@h1,h2/", "this one is malformed"),
        ("amqp://a:s3cret@h1/,h2", "this one is malformed"),
        ("amqp://a:b@h1/,http://a:s3cret@h2/", "this one is malformed"),
        ("amqp://a:b@h1/?locale=x,http://a:s3cret@h2/", "this one is malformed"),
        ("amqp://a:b@h1/,amqp://a:s3cret@h 2/", "number 2 of 2 is malformed"),
        ("amqp://a:b@h1/,amqp://a:s3cret@:5672/", "number 2 of 2 is malformed"),
        ("amqp://a:b@h1/,amqp://a:s3cret@h2:0/", "number 2 of 2 is malformed"),
        ("amqp://a:b@h1/,amqp://a:b@s3cret@h2/", "number 2 of 2 is malformed"),
        ("amqp://a:b@h1/,amqps://a@h2/,amqp://a:b@h3/", "number 2 of 3 has no password"),
        ("amqp://a:s3cret@h1/x,amqp://a:b@h2/y", "all with the same VHOST"),
        ("amqp://a:s3cret@h1/x,amqp://a:b@h2", "all with the same VHOST"),
    ],
)
def test_a_wrong_element_of_amqp_url_is_told_by_its_number(value: str, which: str) -> None:
    """And not shown: no part of it may be the password's."""
    (fault,) = faults(AMQP_URL=value)
    assert fault.startswith("AMQP_URL is ***: ") and fault.endswith(which)
    assert "s3cret" not in fault


def test_each_wrong_element_is_a_fault_of_its_own() -> None:
    """All are told at once."""
    assert len(faults(AMQP_URL="amqp://a@h1/,amqp://a:b@h2/,amqp://a:b@/")) == 2


@pytest.mark.parametrize(
    ("hosts", "ports", "addresses"),
    [
        ("h1,h2", "", ["h1:{default}", "h2:{default}"]),
        ("h1,h2", "7", ["h1:7", "h2:7"]),
        ("h1,h2,h3", "7,,9", ["h1:7", "h2:{default}", "h3:9"]),
        ("h1,h1", "7,8", ["h1:7", "h1:8"]),
        ("::1,127.0.0.1", "7", ["[::1]:7", "127.0.0.1:7"]),
        ("::1", "65535", ["[::1]:65535"]),
    ],
)
def test_hosts_and_ports_may_be_lists(hosts: str, ports: str, addresses: list[str]) -> None:
    """As libpq reads them: one port for all, or one each, an empty one being the default."""
    settings = read(RABBITMQ_HOST=hosts, RABBITMQ_PORT=ports, POSTGRES_HOST=hosts, POSTGRES_PORT=ports)
    assert settings.amqp_urls == tuple(
        f"amqp://votes:b-secret@{address.format(default=5672)}/%2F" for address in addresses
    )
    query = f"?{PRIMARY}" if len(addresses) > 1 else ""
    address = ",".join(addresses).format(default=5432)
    assert settings.database_url == f"postgresql://votes:d-secret@{address}/votes{query}"


def test_both_drivers_read_an_address_with_a_zone() -> None:
    """Of IPv6: libpq wants its % quoted, pika does not."""
    settings = read(RABBITMQ_HOST="fe80::1%lo", POSTGRES_HOST="fe80::1%lo")
    assert pika.URLParameters(settings.amqp_urls[0]).host == "fe80::1%lo"
    assert parse_dsn(settings.database_url)["host"] == "fe80::1%lo"


@pytest.mark.parametrize("server", ["RABBITMQ", "POSTGRES"])
@pytest.mark.parametrize(
    ("hosts", "ports", "wrong"),
    [
        ("h1,,h2", "", "HOST"),
        ("h1,", "", "HOST"),
        ("h1,h 2", "", "HOST"),
        ("h1, h2", "", "HOST"),
        ("h1:1,h2:2", "", "HOST"),
        ("h1,h2", "1,2,3", "PORT"),
        ("h1,h2,h3", "1,2", "PORT"),
        ("h1", "1,", "PORT"),
        ("h1,h2", "1,0", "PORT"),
        ("h1,h2", "65536,1", "PORT"),
        ("h1,h2", "1,x", "PORT"),
        ("h1,h2", "1, 2", "PORT"),
    ],
)
def test_a_wrong_list_is_refused_by_the_name_of_its_variable(server: str, hosts: str, ports: str, wrong: str) -> None:
    """One fault, whatever else depends on the list."""
    (fault,) = faults(**{f"{server}_HOST": hosts, f"{server}_PORT": ports})
    assert fault.startswith(f"{server}_{wrong} is ")


# --- several database servers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_url", "finished"),
    [
        ("postgresql://u:p@h1:1,h2:2/d", f"postgresql://u:p@h1:1,h2:2/d?{PRIMARY}"),
        ("postgresql://u:p@h1,h2", f"postgresql://u:p@h1,h2?{PRIMARY}"),
        ("postgresql://u:p?q@h1,h2/d", f"postgresql://u:p?q@h1,h2/d?{PRIMARY}"),
        ("postgresql://u:p@h1,h2/d?", f"postgresql://u:p@h1,h2/d?{PRIMARY}"),
        ("postgresql://u:p@h1,h2/d?connect_timeout=3", f"postgresql://u:p@h1,h2/d?connect_timeout=3&{PRIMARY}"),
        ("postgresql://u:p@h1,h2/d?connect_timeout=3&", f"postgresql://u:p@h1,h2/d?connect_timeout=3&{PRIMARY}"),
        ("postgresql:///d?host=h1,h2&port=1,2&password=p", f"postgresql:///d?host=h1,h2&port=1,2&password=p&{PRIMARY}"),
        ("postgresql://u:p@/d?hostaddr=::1,10.0.0.1", f"postgresql://u:p@/d?hostaddr=::1,10.0.0.1&{PRIMARY}"),
        ("postgresql://u:p@h1,h2/d?target_session_attrs=any", "postgresql://u:p@h1,h2/d?target_session_attrs=any"),
        (
            "postgresql://u:p@h1,h2/d?target_session_attrs=primary",
            "postgresql://u:p@h1,h2/d?target_session_attrs=primary",
        ),
        ("postgresql://u:p@h1:1/d?sslmode=require", "postgresql://u:p@h1:1/d?sslmode=require"),
        ("postgresql://u:p@[::1]:5/d", "postgresql://u:p@[::1]:5/d"),
        ("postgresql://u:p@%2Frun%2Fpg/d", "postgresql://u:p@%2Frun%2Fpg/d"),
        ("host=/run/pg password=p", "host=/run/pg password=p"),
        ("hostaddr=10.0.0.1 password=p", "hostaddr=10.0.0.1 password=p"),
        (f"host=h1,h2 port=1, password=p {PRIMARY}", f"host=h1,h2 port=1, password=p {PRIMARY}"),
    ],
)
def test_of_several_database_servers_the_one_that_can_write_is_asked_for(given_url: str, finished: str) -> None:
    """In what config hands out, so that every tool does; what the user says about it stays."""
    assert read(DATABASE_URL=given_url).database_url == finished
    assert config.database_url({"DATABASE_URL": given_url}) == finished


@pytest.mark.parametrize("text", ["host=h1,h2 password=p", "password='a b' host=h1,h2", "host=h1,h2 password=p\\"])
def test_the_form_of_keys_and_values_is_completed_as_well(text: str) -> None:
    """Nothing else changes, not even where the text ends in what would quote the next character."""
    assert parse_dsn(read(DATABASE_URL=text).database_url) == parse_dsn(text) | {"target_session_attrs": "read-write"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://u:p@h1:1,h2:x/db", "port"),
        ("postgresql://u:p@h1:1,h2:0/db", "port"),
        ("postgresql://u:p@h1:65536/db", "port"),
        ("postgresql://u:p@h1,h2/db?port=1,2,3", "port"),
        ("host=h1,h2,h3 port=1,2 password=p", "port"),
        ("postgresql://u:p@h1,,h2/db", "hosts"),
        ("postgresql://u:p@h1,h2,/db", "hosts"),
        ("host='h1, h2' password=p", "hosts"),
        ("host=h1:5432 password=p", "hosts"),
        ("host=h1,h2 hostaddr=10.0.0.1 password=p", "hosts"),
        ("host=s3cret@h1 password=p", "hosts"),
        ("postgresql://u:p@/db", "no host"),
        ("service=votes password=p", "no host"),
        ("host=h1,h2 user=u", "no password"),
        ("host=h1,h2 password=''", "no password"),
        ("postgresql://u:p@h1/db?password=", "no password"),
        ("postgresql://u:p@h1,h2/db?target_session_attrs=read-only", "no vote is counted"),
        ("postgresql://u:p@h1/db?target_session_attrs=prefer-standby", "no vote is counted"),
        ("host=h1,h2 password=p target_session_attrs=standby", "no vote is counted"),
        ("host=h1,h2 password=p target_session_attrs=master", "target_session_attrs"),
        ("host=h1,h2 password=p target_session_attrs=''", "target_session_attrs"),
        ("postgresql://u:p@h1/db?sslmode=require,postgresql://u:s3cret@h2/db", "holds another URL"),
        ("host=h1 passwort=s3cret", "cannot be read"),
    ],
)
def test_a_wrong_database_address_is_refused_with_the_reason(url: str, reason: str) -> None:
    """libpq would find some of it out when it connects, and some of it never."""
    (fault,) = faults(DATABASE_URL=url)
    assert fault.startswith("DATABASE_URL is ***: ") and reason in fault.partition("this one ")[2]
    assert "s3cret" not in fault


# --- no secret is shown, in any form ---------------------------------------------------------------------------------

# each begins and ends with a character that is nowhere else in what is shown
PASSWORD = st.text(alphabet="aZ@:/?#&=,%\\' +\u00e9", max_size=12).map(lambda text: f"\u00a7{text}\u00b6")
RAW = st.text(alphabet="aZ,;=!~%7E:", max_size=12).map(lambda text: f"\u00a7{text}\u00b6")


def shows_a_secret(*things: object) -> bool:
    return bool(re.search("\u00a7|\u00b6|%C2|%A7|%B6", " ".join(f"{thing!s} {thing!r}" for thing in things)))


@given(PASSWORD, PASSWORD, PASSWORD)
def test_no_secret_in_parts_or_in_keys_and_values_is_shown(broker: str, database: str, key: str) -> None:
    """Each is among those that the log is kept clean of, as typed."""
    text = make_dsn(host="h1,h2", password=database, sslpassword=key, user="u")
    settings = Settings.from_env({"RABBITMQ_PASSWORD": broker, "RABBITMQ_HOST": "h1,h2", "DATABASE_URL": text})
    assert not shows_a_secret(settings, settings.redacted(), settings.warnings())
    assert {broker, database, key} <= set(settings.secrets())
    assert quote(broker, safe="") in settings.secrets()
    assert parse_dsn(settings.database_url)["password"] == database


@given(PASSWORD, PASSWORD, st.sampled_from(["password", "p%61ssword"]))
def test_no_secret_in_a_url_is_shown(one: str, other: str, name: str) -> None:
    """Behind the user's name and as a parameter, for each of several servers."""
    user, parameter = quote(one, safe=""), quote(other, safe="")
    settings = Settings.from_env(
        {
            "AMQP_URL": f"amqp://u:{user}@h1/,amqp://u:{parameter}@h2/",
            "DATABASE_URL": f"postgresql://u:{user}@h1,h2/d?{name}={parameter}&sslpassword={user}",
        }
    )
    assert not shows_a_secret(settings, settings.redacted(), settings.warnings())
    assert {one, other, user, parameter} <= set(settings.secrets())


@given(RAW)
def test_a_password_that_is_not_quoted_is_shown_neither_when_accepted_nor_when_refused(raw: str) -> None:
    """Whatever the drivers make of it."""
    for environ in (
        {"AMQP_URL": f"amqp://u:{raw}@h1/,amqp://u:{raw}@h2/"},
        {"DATABASE_URL": f"postgresql://u:{raw}@h1,h2/d?sslpassword={raw}"},
        {"DATABASE_URL": f"host=h1,h2 password={raw} sslpassword='{raw}'"},
    ):
        try:
            settings = read(**environ)
        except InvalidSettings as exc:
            assert not shows_a_secret(exc, exc.faults)
        else:
            assert raw in settings.secrets()
            assert not shows_a_secret(settings, settings.redacted())


def test_white_space_that_libpq_takes_for_a_part_of_the_password_is_hidden_with_it() -> None:
    """A quoted line break, and the blank that only Unicode calls white space."""
    settings = read(DATABASE_URL="host=h password = a\u00a0b\\\nc user=u")
    assert settings.redacted()["DATABASE_URL"] == "host=h password = *** user=u"
    assert "a\u00a0b\nc" in settings.secrets()


def test_the_password_of_a_key_file_is_hidden_in_pikas_options() -> None:
    """They are a Python dict inside of the URL."""
    url = "amqps://u:p@h/?heartbeat=5&ssl%5Foptions={'cafile':+'/ca',+'password':+'k-secret'}"
    settings = dataclasses.replace(read(), amqp_urls=(url,))  # the file would have to be there
    assert settings.redacted()["AMQP_URL"] == "amqps://u:***@h/?heartbeat=5&ssl%5Foptions=***"
    assert "k-secret" in settings.secrets()


def test_the_servers_of_a_list_stay_readable() -> None:
    """Only what is secret is hidden."""
    shown = read(
        AMQP_URL="amqp://u:p@h1:1/v,AMQPS://u:p@h2/v?heartbeat=5",
        DATABASE_URL="host=h1,h2 password=p user=u sslmode=require",
        RABBITMQ_MANAGEMENT_URL="http://h1:15672",
    ).redacted()
    assert shown["AMQP_URL"] == "amqp://u:***@h1:1/v,AMQPS://u:***@h2/v?heartbeat=5"
    assert parse_dsn(str(shown["DATABASE_URL"])) == {
        "host": "h1,h2",
        "password": "***",
        "user": "u",
        "sslmode": "require",
        "target_session_attrs": "read-write",
    }
    assert shown["RABBITMQ_MANAGEMENT_URL"] == "http://h1:15672"
    assert read().redacted()["RABBITMQ_MANAGEMENT_URL"] == read().redacted()["RESULTS_PORT"] == ""
    assert "AMQP_URLS" not in shown


# --- the queue, and what a tool reads --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["quorum", "Quorum", "QUORUM"])
def test_the_type_of_the_queue_is_taken_in_any_case(value: str) -> None:
    """And handed on as RabbitMQ wants it."""
    assert read(RABBITMQ_QUEUE_TYPE=value, LOG_LEVEL="debug").rabbitmq_queue_type == "quorum"
    assert read(LOG_LEVEL="debug", RESULTS_PAGE="off").log_level == "DEBUG"
    assert read(RABBITMQ_READER="Pika").rabbitmq_reader == "pika"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RABBITMQ_QUEUE_TYPE", "stream"),
        ("RABBITMQ_READER", "two-pass"),
        ("HOLD_SECONDS", "0.09"),
        ("HOLD_SECONDS", "86401"),
        ("RETRY_BACKOFF_MAX_SECONDS", "0.001"),
        ("RETRY_BACKOFF_MAX_SECONDS", "601"),
        ("RABBITMQ_MANAGEMENT_URL", "h1:15672"),
    ],
)
def test_a_value_outside_its_range_is_refused(name: str, value: str) -> None:
    """By the name of the variable, and with the value."""
    (fault,) = faults(**{name: value})
    assert fault.startswith(f"{name} is {value!r}: accepted is ")


def test_a_tool_reads_the_broker_without_the_database() -> None:
    """The same values as the service's, by name."""
    environ = {"RABBITMQ_PASSWORD": "p", "RABBITMQ_HOST": "h1,h2", "RABBITMQ_QUEUE_TYPE": "Quorum"}
    broker = config.amqp_settings(environ)
    assert broker == (
        ("amqp://votes:p@h1:5672/%2F", "amqp://votes:p@h2:5672/%2F"),
        "votes.aggregation",
        "quorum",
        10,
        15,
    )
    assert (broker.urls, broker.queue_type, broker.max_priority) == (broker[0], "quorum", 10)
    with pytest.raises(InvalidSettings, match=r"RABBITMQ_PASSWORD.*RABBITMQ_QUEUE_TYPE"):
        config.amqp_settings({"RABBITMQ_QUEUE_TYPE": "stream"})


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


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without any file, and an environment without any setting."""
    for name in [name for name in os.environ if name.startswith(("RABBITMQ_", "POSTGRES_", "AMQP_", "DATABASE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    """Two ports of this machine at which somebody listens."""
    with socket.create_server(("localhost", 0)) as one, socket.create_server(("localhost", 0)) as other:
        yield one.getsockname()[1], other.getsockname()[1]


def write_local_services(folder: Path, ports: tuple[int, int]) -> dict[str, str]:
    urls = {
        "AMQP_URL": f"amqp://votes:p@localhost:{ports[0]}/",
        "DATABASE_URL": f"postgresql://v:p@localhost:{ports[1]}/v",
    }
    (folder / ".local").mkdir()
    (folder / ".local/services.env").write_text("".join(f"{name}='{url}'\n" for name, url in urls.items()))
    return urls


PARTS = ("HOST", "PORT", "USER", "PASSWORD", "PASSWORD_FILE")
PASSWORDS = "RABBITMQ_PASSWORD=secret-1\nPOSTGRES_PASSWORD=secret-2\n"
FILES = "RABBITMQ_PASSWORD_FILE=.secrets/a\nPOSTGRES_PASSWORD_FILE=.secrets/b\n"  # as `make install` does
ONES = {"AMQP_URL": "amqp://u:p@broker/", "DATABASE_URL": "postgresql://u:p@base/v", "RABBITMQ_HOST": "broker"}


@pytest.mark.parametrize(
    "env_file", ["", PASSWORDS, FILES], ids=["no .env", "passwords in .env", "their files in .env"]
)
def test_the_local_services_are_used_where_no_server_is_named(
    nowhere: Path, ports: tuple[int, int], env_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And standard error says so."""
    (nowhere / ".env").write_text(env_file)
    urls = write_local_services(nowhere, ports)
    found = config.environment(needs_both=True)
    assert {name: found[name] for name in urls} == urls
    assert "using the local services" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["environment", ".env"])
@pytest.mark.parametrize("name", [*ONES, "POSTGRES_HOST", "AMQP_URL_FILE"])
def test_one_server_without_the_other_is_a_fault(
    nowhere: Path, ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch, where: str, name: str
) -> None:
    """Votes of a real queue would be counted into a scratch database. A tool that needs one gets it as it is."""
    write_local_services(nowhere, ports)
    text = PASSWORDS
    if where == ".env":
        text += f"{name}={ONES.get(name, 'somewhere')}\n"
    else:
        monkeypatch.setenv(name, ONES.get(name, "somewhere"))
    (nowhere / ".env").write_text(text)
    with pytest.raises(InvalidSettings, match="only the other server is named"):
        config.environment(needs_both=True)
    assert not {"AMQP_URL", "DATABASE_URL"} & config.environment().keys() - {name}


def test_passwords_in_the_environment_name_the_servers_of_this_machine(
    nowhere: Path, ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At their usual ports: who sets them there means it."""
    write_local_services(nowhere, ports)
    monkeypatch.setenv("RABBITMQ_PASSWORD", "secret-1")
    monkeypatch.setenv("POSTGRES_PASSWORD_FILE", "/run/secrets/postgres")
    assert not {"AMQP_URL", "DATABASE_URL"} & config.environment(needs_both=True).keys()


def test_where_no_server_is_found_the_error_says_how_to_start_some(nowhere: Path, ports: tuple[int, int]) -> None:
    """A file of services that are gone is not believed."""
    free = local_services._free_ports(4)
    write_local_services(nowhere, (free[0], free[1]))
    for passwords in (PASSWORDS, FILES):
        (nowhere / ".env").write_text(f"{passwords}RABBITMQ_PORT={free[2]}\nPOSTGRES_PORT={free[3]}\n")
        with pytest.raises(InvalidSettings, match="make services-up"):
            config.environment()
    (nowhere / ".env").write_text(f"{PASSWORDS}RABBITMQ_PORT={ports[0]}\nPOSTGRES_PORT={free[3]}\n")
    assert "AMQP_URL" not in config.environment(needs_both=True)  # the stack's, of which one is down
    (nowhere / ".env").unlink()
    with pytest.raises(InvalidSettings, match="make services-up"):
        Settings.from_env(config.environment(needs_both=True))


@pytest.mark.parametrize("in_env_file", ["RABBITMQ_PASSWORD", "RABBITMQ_PASSWORD_FILE"])
@pytest.mark.parametrize("given", ["RABBITMQ_PASSWORD", "RABBITMQ_PASSWORD_FILE"])
def test_the_environment_s_password_wins_in_either_form(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, in_env_file: str, given: str
) -> None:
    """A file that the environment names, over a password that .env holds, too."""
    for where, name in (("environment", given), (".env", in_env_file)):
        file = nowhere / f"{where.strip('.')}.secret"
        file.write_text(f"of-{where}\n")
        value = str(file) if name.endswith("_FILE") else f"of-{where}"
        if where == ".env":
            (nowhere / ".env").write_text(f"{name}={value}\nRABBITMQ_HOST=broker\n")
        else:
            monkeypatch.setenv(name, value)
    assert "of-environment@" in config.amqp_settings(config.environment()).urls[0]


def test_the_env_example_names_every_setting() -> None:
    """And nothing that is no setting."""
    root = Path(config.__file__).parent
    text = (root / ".env.example").read_text().partition("# --- docker-compose.yml only ---")[0]
    named = {line.partition("=")[0] for line in text.splitlines() if line and not line.startswith("#")}
    parts = {f"{server}_{part}" for server in ("RABBITMQ", "POSTGRES") for part in PARTS}
    assert named == set(Settings.from_env(MINIMAL).redacted()) | parts | {"RABBITMQ_VHOST", "POSTGRES_DB"}


# --- the results page ------------------------------------------------------------------------------------------------


def test_open_laws_can_be_hidden_where_metrics_are_on_another_port() -> None:
    """/metrics tells every number; so without a port of its own for the page the setting would hide nothing."""
    assert read().hides_open_laws is False
    assert read(RESULTS_VISIBLE="AFTER_CLOSE", RESULTS_PORT="8002").hides_open_laws is True
    assert read(RESULTS_VISIBLE="after_close", RESULTS_PORT="0", METRICS_PORT="0").hides_open_laws is True
    assert read(RESULTS_VISIBLE="after_close", RESULTS_PAGE="off").hides_open_laws is True
    for ports in ({}, {"RESULTS_PORT": "8001"}, {"RESULTS_PORT": "9000", "METRICS_PORT": "9000"}):
        (fault,) = faults(RESULTS_VISIBLE="after_close", **ports)
        assert fault.startswith("RESULTS_VISIBLE is 'after_close'")
        assert "RESULTS_PORT" in fault
    assert len(faults(RESULTS_VISIBLE="never")) == 1


@pytest.mark.parametrize(
    ("name", "value", "read_as"),
    [
        ("RESULTS_TITLE", "Votations du 29 novembre", "Votations du 29 novembre"),
        ("RESULTS_DATE", "2026-11-29", "2026-11-29"),
        ("RESULTS_SHARED_WITH", "*", "*"),
        (
            "RESULTS_SHARED_WITH",
            " https://Paper.example   http://tv.example:8080 ",
            "https://paper.example http://tv.example:8080",
        ),
    ],
)
def test_what_is_said_of_the_vote_and_to_whom(name: str, value: str, read_as: str) -> None:
    """Unset where it is empty."""
    assert getattr(read(**{name: value}), name.lower()) == read_as
    assert getattr(read(**{name: ""}), name.lower()) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RESULTS_TITLE", "x" * 201),
        ("RESULTS_TITLE", "two\nlines"),
        ("RESULTS_DATE", "29.11.2026"),
        ("RESULTS_DATE", "2026-02-30"),
        ("RESULTS_SHARED_WITH", "paper.example"),
        ("RESULTS_SHARED_WITH", "https://paper.example/path"),
        ("RESULTS_SHARED_WITH", "https://paper.example, https://tv.example"),
        ("RESULTS_SHARED_WITH", "* https://paper.example"),
        ("RESULTS_SHARED_WITH", "https://x.example; script-src *"),
    ],
)
def test_what_would_break_the_page_is_a_fault(name: str, value: str) -> None:
    """A header that the value goes into, above all."""
    (fault,) = faults(**{name: value})
    assert fault.startswith(name)
