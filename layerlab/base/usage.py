"""What a process has used (files, modules, datasets, the list of strategies), and what of that has changed since.

A recorder hears of every file that Python opens; what C++ reads (parquet) is noted by whoever has it read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from layerlab.base.digests import database_digest, file_digest, folder_digest
from layerlab.base.names import GROUP

# Digest of a file that was edited after it had been read: which content was used is not known.
EDITED = "edited while it was in use"
# Folders of libraries, which may be on the path from anywhere; their versions count in the place of their files.
_PACKAGES = ("site-packages", "dist-packages")
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/run")


class Recorder:
    """Collects what the process uses from now on, and the modules that it has already.

    Attributes:
        data: source of a dataset → fingerprint.
    """

    def __init__(self) -> None:
        self._begun = time.time_ns()
        self._opened: dict[str, int] = {}
        self._written: set[str] = set()
        self._databases: dict[str, str] = {}
        self._absent: set[str] = set()
        self._listed: list[str] | None = None
        self.data: dict[str, str] = {}

    def hear(self, path: str, writes: bool) -> None:
        """Note that a file is opened."""
        if writes:
            self._written.add(path)
        elif path not in self._opened and not _below(path, self.data) and os.path.exists(path):
            self._opened[path] = time.time_ns()

    def hear_database(self, path: str) -> None:
        """Note that a sqlite database is opened: what it holds then, since Python sees none of its reads and writes."""
        if path not in self._databases and path not in self._written:
            # Known before it is read, which is heard, too.
            self._databases[path] = ""
            self._databases[path] = database_digest(Path(path))

    def note_written(self, path: str) -> None:
        """Note that what the process reads of a file it wants to write, too."""
        self._written.add(path)

    def note_absent(self, path: str) -> None:
        """Note that a file was looked for and is not there."""
        self._absent.add(path)

    def note_data(self, source: str, fingerprint: str) -> None:
        """Note a dataset."""
        self.data[os.path.abspath(source) if os.path.isdir(source) else source] = fingerprint

    def note_listed(self, names: Iterable[str]) -> None:
        """Note that all of these were looked through, so that one more changes what was done."""
        self._listed = sorted(names)

    def content(self, without: Sequence[Path] = ()) -> dict[str, Any]:
        """What was used, as JSON.

        Args:
            without: files, and folders with all below them, that do not count.
        """
        # Decoded images are made again where they are gone.
        kept = os.path.abspath(os.environ["LAYERLAB_CACHE"]) if os.environ.get("LAYERLAB_CACHE") else ""
        left_out = [*_libraries(), *map(str, without), *self.data, kept]
        seen = {_source_of(path): when for path, when in self._opened.items()
                if path not in self._written and path not in self._databases}
        seen = {path: when for path, when in seen.items() if not _is_library(path, left_out) and _is_users(path)}
        seen |= {path: self._begun for path in _modules() if path not in seen}
        files = {}
        for path, when in sorted(seen.items()):
            digest = file_digest(Path(path))
            if digest:
                files[path] = EDITED if os.stat(path).st_mtime_ns > when else digest
        files |= {path: "" for path in sorted(self._absent) if not os.path.exists(path)}
        # One that is as it was has only been read; of any other it is not known who wrote it.
        databases = {path: digest for path, digest in sorted(self._databases.items())
                     if digest and path not in self._written and not _is_library(path, left_out) and _is_users(path)
                     and database_digest(Path(path)) == digest}
        return {
            "files": files,
            "databases": databases,
            "data": {source: folder_digest(source) for source in sorted(self.data)},
            # Where something lies below the current folder, its name was perhaps taken from there. Code is found by
            # Python's path, or named by a parameter.
            "cwd": os.getcwd() if any(_below(path, [os.getcwd()])
                                      for path in [*files, *databases, *self.data] if not path.endswith(".py")) else "",
            "data_root": _data_root() if any(map(os.path.isdir, self.data)) else None,
            "strategies": self._listed,
        }


# Names the file that `save` writes; its folder holds what the process itself makes.
USED = "LAYERLAB_USED"
_recorders: list[Recorder] = []
_of_process: list[Recorder] = []


def start() -> Recorder:
    """A recorder that hears from now on what the process uses."""
    if not _recorders:
        sys.addaudithook(_heard)
    recorder = Recorder()
    _recorders.append(recorder)
    return recorder


def start_for_process() -> None:
    """What a kernel does before its first cell: the recorder that `recorder` gives."""
    _of_process.append(start())


def save() -> None:
    """What a kernel does behind its last cell: write what was used to the file that `$LAYERLAB_USED` names."""
    file = Path(os.environ[USED])
    file.write_text(json.dumps(recorder().content([file.parent])))


def recorder() -> Recorder:
    """The recorder that was started with the process; else a new one, where one process does several things."""
    return _of_process[0] if _of_process else start()


def note_data(source: str, fingerprint: str) -> None:
    """Note that a dataset is used."""
    for each in _recorders:
        each.note_data(source, fingerprint)


def note_written(file: Path) -> None:
    """Note that the process writes a file, whatever it reads of it, even if another process does that for it later."""
    for each in _recorders:
        each.note_written(os.path.abspath(file))


def note_absent(file: Path) -> None:
    """Note that a file was looked for and is not there."""
    for each in _recorders:
        each.note_absent(os.path.abspath(file))


def note_listed(names: Iterable[str]) -> None:
    """Note that the installed strategies were looked through."""
    known = list(names)
    for each in _recorders:
        each.note_listed(known)


def changes(used: Mapping[str, Any], cwd: str) -> list[str]:
    """What is no longer as `Recorder.content` kept it, in words; empty where all is.

    Args:
        cwd: the folder in which it would be done again.
    """
    found = []
    if used.get("cwd", "") not in ("", cwd):
        found.append(f"it is started in {cwd}, was in {used['cwd']}")
    for path, digest in used.get("files", {}).items():
        now = file_digest(Path(path))
        if not digest:
            found += [f"{_short(path)} is new"] if now else []
        elif not now:
            found.append(f"{_short(path)} is gone")
        elif digest == EDITED:
            found.append(f"{_short(path)} was {EDITED}")
        elif now != digest:
            found.append(f"{_short(path)} was edited")
    found += [f"{_short(path)} was written to" for path, digest in used.get("databases", {}).items()
              if database_digest(Path(path)) != digest]
    if used.get("data_root") not in (None, _data_root()):
        found.append(f"LAYERLAB_DATA is {_data_root() or 'not set'}, which was {used['data_root'] or 'not set'}")
    found += [f"the data in {_short(source)} changed" for source, digest in used.get("data", {}).items()
              if folder_digest(source) != digest]
    before = used.get("strategies")
    if before is not None:
        now_listed = sorted({point.name for point in importlib.metadata.entry_points(group=GROUP)})
        found += [f"strategy {name} was installed" for name in now_listed if name not in before]
        found += [f"strategy {name} is no longer installed" for name in before if name not in now_listed]
    return found


def counted(used: Mapping[str, Any]) -> str:
    """How much was used, in a few words."""
    counts = {kind: len(used.get(f"{kind}s" if kind != "dataset" else "data", {}))
              for kind in ("file", "database", "dataset")}
    return ", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items()
                     if count or kind != "database")


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename":  # os.replace, too: a file that this process has made gets its name
        path, mode, flags = arguments[1], "w", 0
    elif event == "sqlite3.connect":
        path, mode, flags = arguments[0], "r", 0
    elif event == "open":
        path, mode, flags = arguments
    else:
        return
    if isinstance(path, os.PathLike | bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str):
        return
    if event == "sqlite3.connect":
        _heard_database(path)
        return
    writes = any(sign in mode for sign in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))
    whole = os.path.abspath(path)
    for each in _recorders:
        each.hear(whole, writes)


def _heard_database(name: str) -> None:
    # An address, where it is no path.
    path = unquote(urlsplit(name).path) if name.startswith("file:") else name
    if path and not path.startswith(":memory:"):
        for each in _recorders:
            each.hear_database(os.path.abspath(path))


def _source_of(path: str) -> str:
    """The file that a cached module was made from; any other path itself."""
    if path.endswith(".pyc"):
        try:
            return importlib.util.source_from_cache(path)
        except (ValueError, NotImplementedError):
            return path
    return path


def _modules() -> set[str]:
    """The files of the modules that are loaded: of layerlab, of plugins, and of what lies outside libraries."""
    ours = {"layerlab", *(point.value.partition(".")[0].partition(":")[0]
                          for point in importlib.metadata.entry_points(group=GROUP))}
    libraries = _libraries()
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and (name.partition(".")[0] in ours or not _is_library(file, libraries)):
            found.add(os.path.abspath(file))
    return {file for file in found if file.endswith(".py")}


def _libraries() -> list[str]:
    paths = sysconfig.get_paths()
    return [*_SYSTEM, sys.prefix, sys.base_prefix, paths["stdlib"], paths["purelib"], paths["platlib"]]


def _is_library(path: str, libraries: Iterable[str]) -> bool:
    return _below(path, libraries) or any(part in _PACKAGES for part in Path(path).parts)


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders if folder)


def _is_users(path: str) -> bool:
    """Whether a file is somebody's own, and not what programs keep: settings and caches in the home folder, metadata
    of distributions."""
    if any(part.endswith((".egg-info", ".dist-info")) or part == "__pycache__" for part in Path(path).parts):
        return False
    home = str(Path.home())
    return not (_below(path, [home]) and path.removeprefix(home).lstrip(os.sep).startswith("."))


def _short(path: str) -> str:
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


def _data_root() -> str:
    return os.environ.get("LAYERLAB_DATA", "")
