"""What tells that a file, a package of Python or a folder of data is another one than before."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from layerlab.base.cache import remembered

# Field of a function's and a class's node, since Python 3.12.
_TYPES = "type_params"


def file_digest(file: Path) -> str:
    """A digest of a file's content; of Python, of what it does: comments, docstrings and the layout do not count.

    Empty for what cannot be read.
    """
    try:
        status = file.stat()
    except OSError:
        return ""
    return _file_digest(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _file_digest(file: Path, *_stamp: int) -> str:
    try:
        if file.suffix == ".py":
            # To parse some hundred files takes a second.
            return remembered(file, "code", _maker(), _code_digest)
        return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return ""


def _code_digest(file: Path) -> str:
    content = file.read_bytes()
    # What does not parse counts as it stands.
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        content = _syntax(content, typed=True)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@cache
def _maker() -> str:
    """What a digest depends on besides the file: this module, and what this Python can parse."""
    mine = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()
    return f"{sys.version_info[0]}.{sys.version_info[1]}-{mine}"


def same_code(digest: str, file: Path) -> bool:
    """Whether a digest is of what a file of Python holds today.

    Before digests were the same on every Python, 3.11 wrote its own: that one counts, too.
    """
    if digest == file_digest(file):
        return True
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
        return digest == hashlib.blake2b(_syntax(file.read_bytes(), typed=False), digest_size=8).hexdigest()
    return False


def _syntax(content: bytes, typed: bool) -> bytes:
    """The syntax tree of Python as Python 3.12 writes it, whichever Python this is.

    Args:
        content: the source.
        typed: with the parameters of types, which Python 3.11 does not know.
    """
    tree = _without_docstrings(ast.parse(content))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            fields = [name for name in node._fields if name != _TYPES]
            if typed and not hasattr(node, _TYPES):
                setattr(node, _TYPES, [])
            # The node's own, which `ast.dump` goes by.
            vars(node)["_fields"] = (*fields, _TYPES) if typed else tuple(fields)
    # Python 3.13 would leave out what is empty.
    empty: dict[str, bool] = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    return ast.dump(tree, **empty).encode()


def database_digest(file: Path) -> str:
    """A digest of what a sqlite database holds, with what lies in its journal; empty where that cannot be read.

    Through SQLite: closing a file that was read otherwise takes the locks off that this process holds on it.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
            return hashlib.blake2b(connection.serialize(), digest_size=8).hexdigest()
    except (sqlite3.Error, OSError, ValueError):
        return ""


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                    node.body = rest
    return tree


def package_digests(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Python file below a folder → its digest.

    Args:
        folder: of a package.
        without: folders directly below it that do not count.
    """
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.py"))
    return {file.as_posix(): file_digest(folder / file) for file in files if file.parts[0] not in without}


def folder_digest(source: str) -> str:
    """Changes when a file of a folder does; quick, since it reads none of them.

    Names, sizes and times of all files below it, those of linked folders included, each folder once. Empty for what is
    no folder.
    """
    if not os.path.isdir(source):
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for path, status in _files(source, set()):
        digest.update(f"{path}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _files(folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result]]:
    known = os.stat(folder)
    if (known.st_dev, known.st_ino) in seen:
        return
    seen.add((known.st_dev, known.st_ino))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            if entry.is_dir():
                yield from _files(entry.path, seen)
            else:
                yield entry.path, entry.stat()
        except OSError:  # a link to nothing, or what may not be looked at
            continue
