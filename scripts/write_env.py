"""The settings of a fresh clone: .env from .env.example, and a random password in a file for each that .env names.

`make install` runs it. With the standard library alone, since it may run before .venv stands. What stands is never
written over. What the containers read is made readable for them: in a clone that was made under umask 077 it is not.

    python -m scripts.write_env            what is missing is written
    python -m scripts.write_env --check    nothing is: each password that Compose would miss is named
    python -m scripts.write_env --move     passwords that stand in .env itself are moved into files of their own

Exit codes: 0 done, 1 a password is missing or there are two, or a file cannot be read or written.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ".secrets"
MOUNTED = ("deploy", "init_db.sql", "prometheus.yml")


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Do what the one argument says, or write what is missing, and return the exit code."""
    try:
        problems = _do(arguments, root)
    except UnicodeDecodeError:
        problems = [".env is not UTF-8 text"]
    except OSError as exc:
        problems = [f"{exc.filename}: {exc.strerror}"]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _do(arguments: list[str], root: Path) -> list[str]:
    if not (root / ".env").exists() and not arguments:
        _write_env(root)
    let_containers_read(root)
    if arguments == ["--move"]:
        _move_passwords(root)
    elif not arguments:
        _write_passwords(root)
        return [f"{file} is a folder, and not empty" for file in secret_files(root).values() if (root / file).is_dir()]
    return missing_passwords(root) + other_passwords(root)


def secret_files(root: Path) -> dict[str, str]:
    """Each password of the stack, and the file that Compose reads it from: by .env, or else by docker-compose.yml."""
    compose = (root / "docker-compose.yml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^    file: \$\{(\w+)_FILE:-([^}]+)\}$", compose, re.MULTILINE))
    settings = _settings(root)
    return {name: os.environ.get(f"{name}_FILE") or settings.get(f"{name}_FILE") or defaults[name] for name in defaults}


def missing_passwords(root: Path) -> list[str]:
    """A line for each password that has no file, and how to come by one; none where all are there."""
    missing = {name: file for name, file in secret_files(root).items() if not _is_there(root / file)}
    in_env = sorted(_settings(root).keys() & missing.keys())
    lines = [f"{name}: there is no password in {file}" for name, file in missing.items()]
    if in_env:
        lines.append(
            f"{', '.join(in_env)} of .env: Compose reads passwords from files; `make docker-compose-secrets` moves them"
        )
    if missing.keys() - set(in_env):
        lines.append("`make install` writes a random one where none is")
    return lines


def other_passwords(root: Path) -> list[str]:
    """A line for each password of .env that is not the one in its file: the programs on the host read the former."""
    settings = _settings(root)
    return [
        f"{name} of .env is another one than that in {file}, which Compose reads: take one of them away"
        for name, file in secret_files(root).items()
        if name in settings and _is_there(root / file) and _first_line(root / file) != settings[name].encode()
    ]


def let_containers_read(root: Path) -> None:
    """Whoever is in a container, under a number of its own, may read what is mounted into it."""
    for name in MOUNTED:
        for path in (root / name, *(root / name).rglob("*")):
            wanted = 0o055 if path.is_dir() else 0o044
            if path.stat().st_mode & wanted != wanted:
                path.chmod(path.stat().st_mode & 0o777 | wanted)


def _write_env(root: Path) -> None:
    text = (root / ".env.example").read_text(encoding="utf-8")
    filled = re.sub(
        r"^((\w+_PASSWORD)_FILE=)$", lambda line: f"{line[1]}{FOLDER}/{line[2].lower()}", text, flags=re.MULTILINE
    )
    filled = re.sub(r"^(COMPOSE_PROJECT_NAME=)$", rf"\g<1>{_project_name(root)}", filled, flags=re.MULTILINE)
    _write(root / ".env", filled, 0o600)
    print("wrote .env from .env.example")


def _write_passwords(root: Path) -> None:
    plain = _settings(root)
    files = {name: file for name, file in secret_files(root).items() if name not in plain}
    written = [
        file
        for file in files.values()
        if Path(file).parts[0] == FOLDER and _write_secret(root, file, secrets.token_hex(16))
    ]
    if written:
        print(f"wrote {len(written)} random passwords into {FOLDER}")


def _move_passwords(root: Path) -> None:
    """Each password that is written into .env, into its file; .env names that instead."""
    lines = []
    for line in (root / ".env").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        file = f"{FOLDER}/{name.lower()}"
        if name in secret_files(root) and value and _write_secret(root, file, _unquoted(value)):
            print(f"moved {name} into {file}")
            line = f"{name}_FILE={file}"
        lines.append(line)
    (root / ".env").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_passwords(root)


def _write_secret(root: Path, file: str, value: str) -> bool:
    """Write a password where none is, and tell whether that was so. The folder is closed, the file is mounted open."""
    (root / FOLDER).mkdir(mode=0o700, exist_ok=True)
    (root / FOLDER).chmod(0o700)
    path = root / file
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()  # an engine that is to mount a file makes a folder where none is
    if path.is_dir() or _is_there(path):
        return False
    path.unlink(missing_ok=True)
    return _write(path, f"{value}\n", 0o644)


def _write(file: Path, text: str, mode: int) -> bool:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as written:
        os.fchmod(descriptor, mode)  # whatever the umask is
        written.write(text)
    return True


def _settings(root: Path) -> dict[str, str]:
    """What is set in .env, those that are empty left out; the last of two wins."""
    try:
        text = (root / ".env").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    found = re.findall(r"^(?:export )?(\w+)=(.+)$", text, re.MULTILINE)
    return {name: _unquoted(value) for name, value in found if _unquoted(value)}


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _is_there(file: Path) -> bool:
    return file.is_file() and bool(file.read_bytes().strip())


def _first_line(file: Path) -> bytes:
    return file.read_bytes().partition(b"\n")[0].strip()


def _project_name(root: Path) -> str:
    """What Compose makes of the folder's name, as a part of the image's."""
    return re.sub("[^-_a-z0-9]", "", root.name.lower()).strip("-_") or "votes"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
