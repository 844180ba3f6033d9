"""What only an import of a plugin tells: `layerlab` starts `python -m layerlab.contract.plugin_probe`.

That imports torch and the contract once and forks a process for each plugin, so that a plugin cannot affect the others,
nor who asks. What a sound plugin showed is kept in the cache until a file that its import read changes, or Python,
torch, layerlab or what is installed do.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from layerlab.base.cache import cache_folder
from layerlab.base.errors import LayerlabError, brief, reason, refusal
from layerlab.base.files import write_json
from layerlab.base.processes import end_marked, import_path
from layerlab.base.provenance import package_folders
from layerlab.base.text import as_json, from_json
from layerlab.contract.registry import Plugin
from layerlab.show.progress import say

LIMIT = 60.0  # seconds that a plugin has for its import
# Variable by which the processes of a look are known.
MARK = "LAYERLAB_PROBE"


class Changes(NamedTuple):
    """Parameters that were given in place of a profile's.

    Attributes:
        plugin: the strategy that they are meant for.
        profile: name → value of every parameter.
        changed: name → value of those that were given.
    """

    plugin: Plugin
    profile: Mapping[str, Any]
    changed: Mapping[str, Any]


class Setting(NamedTuple):
    """A setting of a strategy, as `layerlab describe` shows it."""

    name: str
    default: str
    meaning: str


class Probe(NamedTuple):
    """What an import of a plugin showed.

    Attributes:
        broken: why it cannot be used; empty where it can.
        settings: of its strategy, in their order.
    """

    broken: str = ""
    settings: tuple[Setting, ...] = ()


class PluginProbe:
    """A process that imports plugins and answers once; it makes itself ready while its question is put together.

    Example:
        >>> from layerlab.contract.registry import strategies
        >>> with PluginProbe() as probe:
        ...     broken = probe.import_errors([strategies["lars-skip"]])
        >>> broken
        ['']
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "layerlab.contract.plugin_probe"]
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env={**os.environ, "PYTHONPATH": import_path(), MARK: self._mark})

    def __enter__(self) -> PluginProbe:
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing was asked, or whoever asked was interrupted.
        self._process.kill()
        self._process.communicate()
        # Managers and daemons that a plugin starts in sessions of their own.
        end_marked(MARK, self._mark)

    def import_errors(self, plugins: Sequence[Plugin], limit: float = LIMIT) -> list[str]:
        """Why each plugin cannot be used, or an empty string, in their order.

        Args:
            plugins: of the registry.
            limit: seconds that each of them has.
        """
        return [answer["broken"] for answer in self.answers([(plugin, []) for plugin in plugins], limit)]

    def refused_changes(self, asked: Sequence[Changes], limit: float = LIMIT) -> list[str]:
        """Why a strategy does not take what was changed, or an empty string, in their order; see `check_settings`.

        Args:
            asked: any number of each plugin, which is imported once.
            limit: seconds that each plugin has.
        """
        places: dict[str, list[int]] = {}
        for place, each in enumerate(asked):
            places.setdefault(each.plugin.name, []).append(place)
        questions = [(asked[own[0]].plugin, [(asked[place].profile, asked[place].changed) for place in own])
                     for own in places.values()]
        found = [""] * len(asked)
        for own, answer in zip(places.values(), self.answers(questions, limit), strict=True):
            for number, place in enumerate(own):
                broken = answer["broken"]
                found[place] = str(asked[place].plugin.refusal(broken)) if broken else answer["refused"][number]
        return found

    def answers(self, asked: Sequence[tuple[Plugin, Sequence[Any]]], limit: float) -> list[dict[str, Any]]:
        """For each plugin `broken`, its `settings`, the `stamps` of what its import rests on, and `refused`: for each
        of its (profile, changed) why that is refused, or an empty string.

        Raises:
            LayerlabError: torch or the contract cannot be imported, and why.
        """
        if not asked:
            return []
        plugins = [[asdict(plugin), as_json(changes)] for plugin, changes in asked]
        text, _ = self._process.communicate(json.dumps([limit, plugins]))
        if self._process.returncode:
            raise subprocess.CalledProcessError(self._process.returncode, self._process.args)
        answer = json.loads(text)
        if isinstance(answer, str):
            raise LayerlabError(f"No plugin can be imported: {answer}.")
        return answer


def probe(plugins: Sequence[Plugin], limit: float = LIMIT) -> list[Probe]:
    """What each plugin's import shows, in their order, without importing them here.

    A broken one is imported anew each time, since what would mend it may lie anywhere.

    Args:
        plugins: of the registry.
        limit: seconds that each of them has.
    """
    files = [_memory(plugin) for plugin in plugins]
    found = [_remembered(file) for file in files]
    missing = [number for number, known in enumerate(found) if known is None]
    if missing:
        with PluginProbe() as process:
            answers = process.answers([(plugins[number], []) for number in missing], limit)
        for number, answer in zip(missing, answers, strict=True):
            found[number] = _read(answer)
        _remember({files[number]: answer for number, answer in zip(missing, answers, strict=True)
                   if not answer["broken"]})
    return [each or Probe() for each in found]


def _remember(answers: Mapping[Path, dict[str, Any]]) -> None:
    """Keep what imports showed in the cache; where that fails, say so."""
    try:
        for file, answer in answers.items():
            write_json(file, answer)
    except LayerlabError as error:
        say(f"What the plugins' imports showed is not kept, so the next command imports them again: {error}")


def import_errors(plugins: Sequence[Plugin], limit: float = LIMIT) -> list[str]:
    """Why each plugin cannot be used, or an empty string, in their order; see `probe`."""
    return [each.broken for each in probe(plugins, limit)]


def settings_of(plugin: Plugin) -> tuple[Setting, ...]:
    """The settings of a plugin's strategy, in their order; see `probe`.

    Raises:
        LayerlabError: the plugin cannot be used, and why.
    """
    (found,) = probe([plugin])
    if found.broken:
        raise plugin.refusal(found.broken)
    return found.settings


def _memory(plugin: Plugin) -> Path:
    """The file of the cache for a plugin, as it is installed and with all else that decides about its import."""
    package = plugin.target.partition(":")[0].partition(".")[0]
    try:
        # A package at the top is found without an import of anything.
        spec = find_spec(package) if package else None
    except (ImportError, ValueError):
        spec = None
    torch = importlib.metadata.version("torch")
    content = [asdict(plugin), spec and spec.origin, sys.version, sys.prefix, import_path(), torch]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    return cache_folder() / "plugins" / f"{digest}.json"


def _remembered(file: Path) -> Probe | None:
    """What the cache holds of a plugin, if the files that its import read are as they were."""
    try:
        answer = json.loads(file.read_bytes())
        same = all(_stamp(name) == stamp for name, stamp in answer["stamps"].items())
        return _read(answer) if same else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read(answer: dict[str, Any]) -> Probe:
    return Probe(answer["broken"], tuple(Setting(*setting) for setting in answer["settings"]))


def _stamp(file: str) -> list[int]:
    status = os.stat(file)
    return [status.st_mtime_ns, status.st_size]


def main() -> None:
    """Read a limit and plugins with changes as JSON, write what their imports show as JSON, or why none can be."""
    # Before the first fork, so that it is imported once. The version of torch is known to the cache, files are not.
    try:
        import layerlab.contract.strategy
    except Exception as error:  # a broken installation, or what torch needs of the system and does not find
        print(json.dumps(refusal(error) or reason(error)))
        return

    shared = set(sys.modules)
    limit, questions = json.load(sys.stdin)
    asked = [(Plugin(**plugin), from_json(changes)) for plugin, changes in questions]
    if len(asked) > 1:
        # Most plugins draw, which takes another second of imports.
        import layerlab.show.figures  # noqa: F401
    print(json.dumps(_tried(asked, shared, limit)))


def _tried(asked: Sequence[tuple[Plugin, Any]], shared: set[str], limit: float) -> list[dict[str, Any]]:
    """What each plugin's import shows, all at once, as far as the cores go."""
    waiting, found = list(enumerate(asked)), {}
    with selectors.DefaultSelector() as running:
        while waiting or running.get_map():
            while waiting and len(running.get_map()) < 2 * (os.cpu_count() or 1):
                number, (plugin, changes) = waiting.pop(0)
                child, answer = _fork(plugin, changes, shared, limit)
                running.register(answer, selectors.EVENT_READ, (number, child, time.monotonic() + limit, bytearray()))
            keys = list(running.get_map().values())
            # Looks without taking a status away, and before the look into the pipe: another process that the plugin
            # has started may hold the pipe open for ever, so its end is not waited for.
            over = {key.fd for key in keys
                    if os.waitid(os.P_PID, key.data[1], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None}
            ready = {key.fd for key, _ in running.select(0.0 if over else 0.05)}
            for key in keys:
                number, child, end, text = key.data
                part = os.read(key.fd, 1 << 16) if key.fd in ready else b""
                text += part
                late = time.monotonic() > end
                if late or text.endswith(b"\n") or (not part and key.fd in ready | over):
                    running.unregister(key.fd)
                    os.close(key.fd)
                    found[number] = _ended(child, bytes(text), limit if late else 0.0)
    return [found[number] for number in range(len(asked))]


def _fork(plugin: Plugin, changes: Sequence[Any], shared: set[str], limit: float) -> tuple[int, int]:
    """A process that imports a plugin and lets it look at the changes: its number, and the pipe on which it tells what
    it found, as a line of JSON."""
    answer, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        return child, answer
    try:
        os.close(answer)
        # A session of its own, so that what it may have started ends with it; what it prints is of no interest.
        os.setsid()
        # Should whoever asks be killed meanwhile, it ends by itself.
        signal.alarm(math.ceil(limit) + 5)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        broken = plugin.broken
        settings = [] if broken else [
            (name, repr(field.default), field.description or "") for name, field in plugin.load().model_fields.items()]
        stamps = {file: _stamp(file) for file in [*_files(shared), *package_folders()]}
        found = {"broken": broken, "settings": settings, "stamps": stamps, "refused": _refusals(plugin, changes)}
        with os.fdopen(told, "wb") as stream:
            stream.write(json.dumps(found).encode() + b"\n")
        os._exit(0)
    finally:
        os._exit(1)


def _refusals(plugin: Plugin, changes: Sequence[Any]) -> list[str]:
    from layerlab.contract.parameters import check_settings

    found = []
    for profile, changed in changes:
        try:
            check_settings(plugin, profile, changed)
        except LayerlabError as error:
            found.append(str(error))
        except Exception as error:  # whatever a validator of the plugin's raises
            found.append(f"{plugin.name} does not take {brief(changed)} ({reason(error)}); give other values.")
        else:
            found.append("")
    return found


def _files(shared: set[str]) -> Iterator[str]:
    """The files of the modules that are not shared, and those of layerlab, which may be a checkout that changes."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        own = name.partition(".")[0] == "layerlab" and name != "layerlab.contract.plugin_probe"
        if (own or name not in shared) and isinstance(file, str) and os.path.isfile(file):
            yield file


def _ended(child: int, text: bytes, limit: float) -> dict[str, Any]:
    """What a process has told, or how it ended without a word; it is no more afterwards.

    Args:
        limit: seconds that it had, if they are over; otherwise 0.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text.endswith(b"\n"):
        return json.loads(text)
    if limit:
        broken = f"it did not import within {limit:g} s"
    else:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        broken = f"its import ended the process with {how}"
    return {"broken": broken, "settings": [], "stamps": {}, "refused": []}


if __name__ == "__main__":
    main()
