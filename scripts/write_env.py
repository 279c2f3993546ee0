"""Write .env from .env.example, each password random: what `make install` runs where no .env stands.

With the standard library alone, since it may run before .venv stands. Exit codes: 0 written, 1 there is one already.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(root: Path = ROOT) -> int:
    """Write the file, readable for its owner alone, and return the exit code."""
    text = (root / ".env.example").read_text(encoding="utf-8")
    filled = re.sub(r"^(\w+_PASSWORD=)$", lambda line: line[1] + secrets.token_hex(16), text, flags=re.MULTILINE)
    try:
        descriptor = os.open(root / ".env", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(".env stands already, and is left as it is", file=sys.stderr)
        return 1
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(filled)
    print("wrote .env, with passwords of its own, from .env.example")
    return 0


if __name__ == "__main__":
    sys.exit(main())
