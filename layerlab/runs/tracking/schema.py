"""A tracking database: its address, its file, its schema. Passwords stay out of what is shown."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from layerlab.base.errors import LayerlabError, first_line

# A user and a password before a host, and a setting that is one.
_PASSWORD = re.compile(r"(?<=://)([^\s/@:]*):[^\s/]*(?=@)|(?<=[?&])(password|passwd|pwd|token)=[^&\s]*", re.IGNORECASE)
# What an address obeys.
_SPECIAL = re.compile("[?#%]")


def without_password(text: str) -> str:
    """A text in which addresses have no passwords.

    Example:
        >>> without_password("postgresql://me:secret@host/runs?password=secret&sslmode=require")
        'postgresql://me:***@host/runs?password=***&sslmode=require'
    """
    return _PASSWORD.sub(lambda found: f"{found[2]}=***" if found[2] else f"{found[1]}:***", text)


def sqlite_uri(file: Path) -> str:
    """The address of a sqlite database, whatever the names of its folders.

    Raises:
        LayerlabError: this SQLAlchemy cannot express the path.
    """
    if not _SPECIAL.search(str(file)):
        return f"sqlite:///{file}"
    from sqlalchemy.engine import make_url

    # With the driver's name, since MLflow makes a folder of whatever follows `sqlite:///`.
    uri = f"sqlite+pysqlite:///{quote(str(file))}"
    if make_url(uri).database != str(file):
        raise LayerlabError(f"No database address can hold the path {file}; rename the folder, or set LAYERLAB_HOME to "
                            "another.")
    return uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite database's address, from the root; None for any other."""
    found = re.fullmatch(r"sqlite(\+\w+)?:///(.+)", uri)
    if not found or found[2].startswith((":memory:", "file:")):
        return None
    path = found[2]
    if _SPECIAL.search(path):
        from sqlalchemy.engine import make_url

        path = make_url(uri).database or path
    return Path(path).absolute()


@contextlib.contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    """A sqlite database, to be read only.

    Raises:
        LayerlabError: it cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise LayerlabError(f"{file} cannot be read as a tracking database ({first_line(error)}); copy it again while "
                            "nothing writes to it.") from None


def copy_to(file: Path, target: Path) -> None:
    """A whole copy of a sqlite database, also of one that is being written.

    Raises:
        LayerlabError: it cannot be read.
    """
    with opened(file) as source, closing(sqlite3.connect(target)) as connection:
        source.backup(connection)


def schema(file: Path) -> tuple[Literal["none", "older", "current"], str]:
    """How a sqlite database stands to the MLflow that is installed, and its revision.

    `none`: there is no file, or an empty one.

    Raises:
        LayerlabError: somebody else's database, one of a newer MLflow, one that cannot be read.
    """
    if not file.exists():
        return "none", ""
    with opened(file) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return "none", ""
        missing = {"experiments", "runs", "alembic_version"} - tables
        if missing:
            raise LayerlabError(f"{file} is a sqlite database but no tracking database of MLflow (it has no table "
                                f"{min(missing)!r}); give another file.")
        (revision,) = next(iter(database.execute("SELECT version_num FROM alembic_version")), ("",))
    scripts = _scripts()
    if revision == scripts.get_current_head():
        return "current", revision
    if revision not in {script.revision for script in scripts.walk_revisions()}:
        import mlflow

        raise LayerlabError(f"{file} was written by a newer MLflow than the {mlflow.__version__} that is installed "
                            f"(its schema is {revision}); upgrade MLflow here: pip install -U mlflow.")
    return "older", revision


def upgrade(file: Path) -> None:
    """Bring a tracking database up to the schema of the MLflow that is installed.

    Raises:
        LayerlabError: that failed.
    """
    import alembic.command
    from alembic.config import Config
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.set_main_option("sqlalchemy.url", sqlite_uri(file).replace("%", "%%"))
    try:
        alembic.command.upgrade(config, "heads")
    except (SQLAlchemyError, CommandError) as error:
        raise LayerlabError(f"{file} cannot be brought up to this MLflow's schema ({first_line(error)}); copy it again "
                            "while nothing writes to it.") from None


def _migrations() -> Path:
    import mlflow

    return Path(mlflow.__file__).parent / "store" / "db_migrations"


def _scripts() -> Any:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(_migrations()))
