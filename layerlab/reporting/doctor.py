"""Signs of health on one page: what a report about something that went wrong should show."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from layerlab.base.cache import cache_folder
from layerlab.base.errors import LayerlabError, reason
from layerlab.base.folder_lock import NAME, lock_holder
from layerlab.base.memory import available_memory, memory_limit
from layerlab.base.provenance import commit, versions, versions_text
from layerlab.runs.record import workbook_folder
from layerlab.runs.tracking import database
from layerlab.runs.tracking.outbox import unsent_files
from layerlab.runs.tracking.schema import opened, without_password
from layerlab.runs.tracking.store import tracking_uri
from layerlab.show.table import Cell, Table, Tone

Finding = tuple[str, Tone]
# Bytes below which free space or memory is worth a mark, and open files below which many notebooks run short.
LITTLE, FEW_FILES = 2e9, 1024
# Paths that are named of a longer list.
_NAMED = 5


def health() -> Table:
    """Versions, machine, room, locks and who holds them, leftovers, tracking, telemetry and ports, a row each.

    It changes nothing, and what cannot be found out is said in its row.

    Example:
        >>> from layerlab.reporting.doctor import health
        >>> [row[0].text for row in health().rows][:2]
        ['versions', 'system']
    """
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions, "system": _system, "GPUs": _gpus, "memory": _memory, "room": _room, "limits": _limits,
        "file locks": _locking, "at work": _at_work, "leftovers": _leftovers, "tracking": _tracking,
        "telemetry": _telemetry, "ports": _ports,
    }
    rows: list[list[str | Cell]] = []
    for name, look in looks.items():
        try:
            found = list(look())
        except Exception as error:  # whatever the system raises: a page with a hole is better than none
            found = [(f"cannot be found out ({reason(error)})", "warning")]
        for number, (text, tone) in enumerate(found):
            rows.append([Cell("" if number else name, "strong"), Cell(text, tone)])
    return Table(("", ""), rows)


def _versions() -> Iterator[Finding]:
    found = commit(Path(__file__).parent)
    yield versions_text(versions()) + (f", commit {found}" if found else ""), ""


def _system() -> Iterator[Finding]:
    yield f"{platform.platform()}, {os.cpu_count()} threads, {sys.executable}", ""


def _gpus() -> Iterator[Finding]:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield ", ".join(names) or "none", ""
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        yield f"CUDA_VISIBLE_DEVICES={chosen}", ""


def _memory() -> Iterator[Finding]:
    free, total, swap = available_memory(), psutil.virtual_memory().total, psutil.swap_memory()
    tone: Tone = "warning" if free < LITTLE else ""
    yield f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free; swap {swap.free / 1e9:.1f} GB free", tone
    if limit := memory_limit():
        yield f"this container may take {limit / 1e9:.1f} GB", ""


def _places() -> dict[str, Path]:
    """What layerlab writes to: name → an existing folder."""
    wanted = {"workbook": workbook_folder(), "cache": cache_folder(), "temporary files": Path(tempfile.gettempdir())}
    if data := os.environ.get("LAYERLAB_DATA"):
        wanted["data"] = Path(data)
    found = {}
    for name, place in wanted.items():
        while not place.is_dir() and place != place.parent:
            place = place.parent
        found[name] = place
    return found


def _room() -> Iterator[Finding]:
    for name, place in _places().items():
        free = shutil.disk_usage(place).free
        nodes = os.statvfs(place)
        writable = os.access(place, os.W_OK)
        text = f"{name}: {place}, {free / 1e9:.1f} GB free"
        tone: Tone = "warning" if free < LITTLE else ""
        if nodes.f_files and nodes.f_favail < 10_000:
            text, tone = f"{text}, {nodes.f_favail} more files", "warning"
        if not writable and name != "data":
            text, tone = f"{text}, cannot be written", "bad"
        yield text, tone


def _limits() -> Iterator[Finding]:
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{files} open files a process (ulimit -n)"
    if files < FEW_FILES:
        yield f"{text}; each notebook at work needs about 20", "warning"
    else:
        yield text, ""


def _locking() -> Iterator[Finding]:
    """Try whether a second lock of a file is refused in the workbook's file system."""
    place = _places()["workbook"]
    with tempfile.NamedTemporaryFile(dir=place) as first, open(first.name) as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield f"{place} locks files", "good"
            return
    yield (f"{place} does not lock files: run one batch at a time there, or set LAYERLAB_HOME to a folder of a local "
           "disk"), "bad"


def _at_work() -> Iterator[Finding]:
    home, found = workbook_folder(), False
    for file in sorted([*home.glob(f"runs/*/*/{NAME}"), *home.glob("mlflow.db*")]):
        if holder := lock_holder(file):
            found = True
            yield f"{file.relative_to(home)} is held by process {holder} ({_command(holder)})", ""
    if not found:
        yield "nobody holds a lock in the workbook", "good"


def _command(number: int) -> str:
    try:
        return " ".join(psutil.Process(number).cmdline())[:80]
    except psutil.Error:
        return "of another user or machine"


def _leftovers() -> Iterator[Finding]:
    home, nothing = workbook_folder(), True
    idle = [file for file in home.glob("runs/*/*/*.partial.ipynb") if not lock_holder(file.parent / NAME)]
    kinds = {
        "interrupted notebooks, which the same command goes on with": idle,
        "runs that MLflow did not take yet; the next run sends them": unsent_files(),
        "half-written files in the cache; they may be deleted": [*cache_folder().rglob("*.partial")],
        "folders of batches that were killed; they may be deleted": _idle_folders(),
    }
    for text, files in kinds.items():
        if files:
            nothing = False
            more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
            yield f"{len(files)} {text}: {', '.join(map(str, files[:_NAMED]))}{more}", "warning"
    if nothing:
        yield "none", "good"


def _idle_folders() -> list[Path]:
    """Folders of temporary files that no process works with."""
    names = {each for process in psutil.process_iter() for each in _progress_file(process)}
    return [folder for folder in sorted(Path(tempfile.gettempdir()).glob("layerlab-*"))
            if (folder / "progress.jsonl").exists() and str(folder / "progress.jsonl") not in names]


def _progress_file(process: psutil.Process) -> list[str]:
    try:
        return [process.environ().get("LAYERLAB_PROGRESS", "")]
    except (psutil.Error, OSError):
        return []


def _tracking() -> Iterator[Finding]:
    uri = tracking_uri()
    shown = without_password(uri)
    file = database.sqlite_file(uri)
    if file is not None and not file.exists():
        yield f"{shown}: not there yet; the first run makes it", ""
        return
    try:
        if file is not None:
            database.check_file(file)
        database.wait_for_database(uri)
    except LayerlabError as error:
        yield str(error), "bad"
        return
    size = f", {file.stat().st_size / 1e6:.1f} MB" if file is not None else ""
    yield f"{shown}: answers{size}{_open_runs(file)}", "good"


def _open_runs(file: Path | None) -> str:
    if file is None:
        return ""
    with opened(file) as connection:
        counts = dict(connection.execute("SELECT status, count(*) FROM runs GROUP BY status"))
    return f", {sum(counts.values())} runs, {counts.get('RUNNING', 0)} of them open"


def _telemetry() -> Iterator[Finding]:
    off = [name for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK") if os.environ.get(name, "").lower() in
           ("1", "true")]
    if off:
        yield f"MLflow's is off ({off[0]}); layerlab has none", "good"
    else:
        yield "MLflow's is on in this shell; MLFLOW_DISABLE_TELEMETRY=true turns it off; layerlab has none", "warning"


def _ports() -> Iterator[Finding]:
    nothing = True
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = " ".join(process.cmdline())
            if not re.search(r"mlflow|jupyter|ipykernel|dask", words):
                continue
            for address, ports in _listening(process).items():
                nothing = False
                here = address in ("127.0.0.1", "::1")
                where = "" if here else ", which other machines can reach"
                yield (f"{address}, port {', '.join(map(str, ports))}: process {process.pid} ({words[:60]}){where}",
                       "" if here else "warning")
    if nothing:
        yield "no MLflow, Jupyter or Dask listens", "good"


def _listening(process: psutil.Process) -> dict[str, list[int]]:
    """Address → ports that a process listens on."""
    found: dict[str, list[int]] = {}
    for each in process.net_connections("inet"):
        if each.status == psutil.CONN_LISTEN:
            found.setdefault(each.laddr.ip, []).append(each.laddr.port)
    return {address: sorted(ports) for address, ports in found.items()}
