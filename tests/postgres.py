"""A real PostgreSQL for the tests: Debian's, started on loopback in a folder of its own, gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server without a database's name. Skips the test where none can be started."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4]))
    if not found:
        pytest.skip("no PostgreSQL here; `make system` installs it")
    pytest.importorskip("psycopg", reason="psycopg is not installed; it is in the extra `label`")
    as_user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="trueup-postgres-"))
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    port, bins = free_port(), found[-1].parent
    try:
        made = subprocess.run(
            [*as_user, bins / "initdb", "-D", folder / "data", "-U", "trueup", "-A", "trust", "-E", "UTF8", "-N"],
            capture_output=True,
            text=True,
            cwd=folder,
        )
        if made.returncode:
            pytest.skip(f"PostgreSQL cannot be set up here: {made.stderr.strip().splitlines()[-1]}")
        options = [
            "-c",
            "listen_addresses=127.0.0.1",
            "-p",
            str(port),
            "-k",
            folder,
            "-c",
            "max_connections=120",
            "-c",
            "fsync=off",
        ]
        running = subprocess.Popen(
            [*as_user, bins / "postgres", "-D", folder / "data", *options],
            stdout=subprocess.DEVNULL,
            stderr=(log := open(folder / "log", "wb")),  # noqa: SIM115
            cwd=folder,
        )
        try:
            url = f"postgresql://trueup@127.0.0.1:{port}"
            for _ in range(200):
                ready = subprocess.run([bins / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode
                if ready == 0 or running.poll() is not None:
                    break
                time.sleep(0.05)
            else:
                ready = 1
            if ready:
                pytest.skip(f"PostgreSQL does not start here: {(folder / 'log').read_text()[-300:]}")
            yield url
        finally:
            running.send_signal(signal.SIGQUIT)  # at once, without a last checkpoint
            running.wait(30)
            log.close()
    finally:
        shutil.rmtree(folder)


def new_database(url: str) -> str:
    """The URL of an empty place on the server at `url`: a schema, which is made and removed faster than a database."""
    name = f"t{uuid4().hex[:12]}"
    engine = sa.create_engine(f"{url}/postgres".replace("://", "+psycopg://"), isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    return f"{url}/postgres?options=-csearch_path%3D{name}"
