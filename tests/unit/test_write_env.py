"""scripts/write_env.py: what `make install` writes, and what `make docker-compose-up` asks before Compose is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from dotenv import dotenv_values

from scripts import write_env
from tests.harness import ROOT


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a fresh clone has of these, made under umask 077, and an environment that names no password."""
    for name in write_env.secret_files(ROOT):
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    root = tmp_path / "My-Votes_2"
    shutil.copytree(ROOT / "deploy", root / "deploy")
    for name in (".env.example", "docker-compose.yml", "init_db.sql", "prometheus.yml"):
        shutil.copy(ROOT / name, root)
    for path in (root, *root.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return root


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_each_password_is_random_and_in_a_file_that_env_names(clone: Path) -> None:
    """.env and the folder for their owner alone; the files are mounted, and so open. The example has no password."""
    example = (ROOT / ".env.example").read_text()
    assert re.findall(r"^\w+_PASSWORD(?:_FILE)?=(.+)$", example, re.M) == []
    assert write_env.main([], clone) == 0
    named = {name: value for name, value in dotenv_values(clone / ".env").items() if name.endswith("_PASSWORD_FILE")}
    assert named.keys() == {f"{name}_FILE" for name in write_env.secret_files(clone)}
    passwords = {(clone / str(file)).read_text() for file in named.values()}
    assert len(passwords) == len(named) == 10
    assert all(re.fullmatch(r"[0-9a-f]{32}\n", password) for password in passwords)
    assert (mode(clone / ".env"), mode(clone / ".secrets")) == (0o600, 0o700)
    assert {mode(file) for file in (clone / ".secrets").iterdir()} == {0o644}
    assert write_env.main(["--check"], clone) == 0


def test_what_stands_is_never_written_over(clone: Path) -> None:
    """Neither .env nor a password; one that has gone comes back, as another."""
    write_env.main([], clone)
    before = {path: path.read_text() for path in (clone / ".env", *(clone / ".secrets").iterdir())}
    gone = clone / ".secrets/grafana_password"
    gone.unlink()
    assert write_env.main([], clone) == 0
    after = {path: path.read_text() for path in before}
    assert [path for path in before if before[path] != after[path]] == [gone]


def test_the_project_is_called_as_compose_would_call_it(clone: Path) -> None:
    """So that the image is not that of another clone."""
    write_env.main([], clone)
    assert dotenv_values(clone / ".env")["COMPOSE_PROJECT_NAME"] == "my-votes_2"


def test_containers_may_read_what_is_mounted(clone: Path) -> None:
    """Everything under the folders of docker-compose.yml, and no file that Compose mounts is elsewhere."""
    write_env.main([], clone)
    mounts = re.findall(r"^ +- \./([^:]+):", (clone / "docker-compose.yml").read_text(), re.M)
    assert mounts
    for mount in mounts:
        for path in (clone / mount, *(clone / mount).rglob("*")):
            assert mode(path) & 0o044 == 0o044, path
            assert path.is_file() or mode(path) & 0o011 == 0o011, path


def test_all_missing_passwords_are_named_at_once(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what writes them."""
    write_env.main([], clone)
    (clone / ".secrets/postgres_password").unlink()
    (clone / ".secrets/grafana_password").write_text("\n")
    assert write_env.main(["--check"], clone) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "POSTGRES_PASSWORD: there is no password in .secrets/postgres_password",
        "GRAFANA_PASSWORD: there is no password in .secrets/grafana_password",
        "`make install` writes a random one where none is",
    ]


def test_what_the_check_tells_to_do_helps(clone: Path) -> None:
    """Also where a file is there and empty, and where an engine has made folders in the place of files."""
    (clone / ".secrets/grafana_password").mkdir(parents=True, mode=0o755)
    (clone / ".secrets").chmod(0o755)
    (clone / ".secrets/postgres_password").write_text("\n")
    assert write_env.main(["--check"], clone) == 1
    assert write_env.main([], clone) == 0
    assert write_env.main(["--check"], clone) == 0
    assert mode(clone / ".secrets") == 0o700
    assert {mode(file) for file in (clone / ".secrets").iterdir()} == {0o644}


def test_a_folder_that_holds_something_is_left_alone(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And so is what is in it."""
    kept = clone / ".secrets/grafana_password/kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept\n")
    assert write_env.main([], clone) == 1
    assert ".secrets/grafana_password is a folder" in capsys.readouterr().err
    assert kept.read_text() == "kept\n"
    assert len([file for file in (clone / ".secrets").iterdir() if file.is_file()]) == 9


def test_a_password_of_env_that_is_not_the_one_in_its_file_is_told(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compose would read the file, and the programs on the host .env. Neither is told."""
    write_env.main([], clone)
    kept = (clone / ".secrets/rabbitmq_password").read_text()
    with (clone / ".env").open("a") as env:
        env.write("RABBITMQ_PASSWORD=mine-alone\n")
    for arguments in (["--check"], ["--move"]):
        assert write_env.main(arguments, clone) == 1
        assert capsys.readouterr().err == (
            "RABBITMQ_PASSWORD of .env is another one than that in .secrets/rabbitmq_password, which Compose reads: "
            "take one of them away\n"
        )
    assert (clone / ".secrets/rabbitmq_password").read_text() == kept
    (clone / ".secrets/rabbitmq_password").write_text("mine-alone")
    assert write_env.main(["--check"], clone) == 0


def test_a_file_that_is_no_text_is_named(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the service does it."""
    (clone / ".env").write_bytes(b"RESULTS_TITLE=\xe9t\xe9\n")
    for arguments in ([], ["--check"], ["--move"]):
        assert write_env.main(arguments, clone) == 1
        assert capsys.readouterr().err == ".env is not UTF-8 text\n"


def test_passwords_of_an_earlier_env_are_moved(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No random one is made in their place, since volumes have the old one; the check says what to run."""
    (clone / ".env").write_text(
        'POSTGRES_OWNER_PASSWORD=a$b\'c\n# a comment\nRABBITMQ_PASSWORD="quoted"\nLOG_LEVEL=DEBUG\n'
    )
    assert write_env.main([], clone) == 0
    assert not (clone / ".secrets/postgres_owner_password").exists()
    assert write_env.main(["--check"], clone) == 1
    assert "POSTGRES_OWNER_PASSWORD, RABBITMQ_PASSWORD of .env" in capsys.readouterr().err
    assert write_env.main(["--move"], clone) == 0
    assert (clone / ".secrets/postgres_owner_password").read_text() == "a$b'c\n"
    assert (clone / ".secrets/rabbitmq_password").read_text() == "quoted\n"
    assert (clone / ".env").read_text().splitlines() == [
        "POSTGRES_OWNER_PASSWORD_FILE=.secrets/postgres_owner_password",
        "# a comment",
        "RABBITMQ_PASSWORD_FILE=.secrets/rabbitmq_password",
        "LOG_LEVEL=DEBUG",
    ]
    assert write_env.main(["--check"], clone) == 0
