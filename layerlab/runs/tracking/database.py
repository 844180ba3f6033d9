"""Whether a tracking database or server can be used now: looked at before MLflow waits and tries again for minutes."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import time
from pathlib import Path
from urllib.parse import urlsplit

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.folder_lock import lock_holder
from layerlab.runs.tracking.schema import sqlite_file
from layerlab.show.progress import say

# Seconds from one look at a locked database to the next, and that a server has to take a connection.
LOOK, ANSWER = 0.2, 5.0
# Seconds that others need for writing at most, if they do not hold on to it: no word is lost about them.
QUIET = 2.0
# Seconds that a database is waited for before a run begins.
PATIENCE = 600.0
_REMEDY = ("move it away, so that a new one is made (`layerlab import` takes what a copy holds), or set "
           "MLFLOW_TRACKING_URI to another one")
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


class Unreachable(LayerlabError):
    """The database or server of runs cannot be used now, and may be later: locked, full, or down."""


def wait_for_database(uri: str, patience: float = 0.0) -> None:
    """Come back once a tracking URI can be used; somebody's lock is waited for, and said to be.

    Args:
        uri: as MLflow has it.
        patience: seconds to wait for a lock.

    Raises:
        Unreachable: it stays locked, or nothing listens there.
        LayerlabError: what lies there is no database.
    """
    file = sqlite_file(uri)
    if file is None:
        _check_server(uri)
        return
    if file.is_dir():
        raise LayerlabError(f"{file} is a folder, where runs are tracked in a database of that name; move it away or "
                            "set MLFLOW_TRACKING_URI.")
    begin, told = time.monotonic(), False
    while file.exists() and _locked(file):
        spent = time.monotonic() - begin
        if spent > patience:
            raise Unreachable(f"The tracking database {file} is locked{_by_whom(file)}.")
        if not told and spent > QUIET:
            say(f"The tracking database {file} is locked{_by_whom(file)}; waiting for it.")
            told = True
        time.sleep(LOOK)


def _by_whom(file: Path) -> str:
    holder = lock_holder(file)
    return f" by process {holder}" if holder else " by another process"


def check_file(file: Path) -> None:
    """Refuse a file that is no sqlite database, or a part of one.

    Only before this process has connected to it: closing a file that was read takes the locks off that the process
    holds there.

    Raises:
        LayerlabError: it is none, or cut off.
    """
    if not file.is_file():
        return
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(32)
    except OSError as error:
        raise LayerlabError(f"The tracking database {file} cannot be read ({error.strerror}); set MLFLOW_TRACKING_URI "
                            "to one that can.") from None
    if not size:
        return
    if not head.startswith(b"SQLite format 3\0"):
        raise LayerlabError(f"The tracking database {file} is no database; {_REMEDY}.")
    # Bytes 16 and 28 of a database hold its page's size and its number of pages.
    page, pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
    if size < max(512, (65536 if page == 1 else page) * pages):
        raise LayerlabError(f"The tracking database {file} is cut off; {_REMEDY}.")


def _locked(file: Path) -> bool:
    """Whether another process keeps a database from being written.

    Raises:
        LayerlabError: it is damaged, or cannot be written.
    """
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            return True
        raise Unreachable(f"The tracking database {file} cannot be written ({first_line(error)}); set "
                          "MLFLOW_TRACKING_URI to one that can.") from None
    except sqlite3.DatabaseError as error:
        raise LayerlabError(f"The tracking database {file} is damaged ({first_line(error)}); {_REMEDY}.") from None
    return False


def _check_server(uri: str) -> None:
    parts = urlsplit(uri)
    port = parts.port or _PORTS.get(parts.scheme.partition("+")[0])
    if not parts.hostname or not port:
        return
    try:
        socket.create_connection((parts.hostname, port), ANSWER).close()
    except OSError as error:
        raise Unreachable(
            f"Nothing answers at {parts.hostname}:{port}, where runs are tracked ({first_line(error)}); start that "
            "server, or set MLFLOW_TRACKING_URI to another one."
        ) from None
