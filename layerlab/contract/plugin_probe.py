"""What only an import of a plugin tells: `layerlab` starts `python -m layerlab.contract.plugin_probe`.

Each import runs in its own process, so a plugin cannot affect the others, nor who asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from layerlab.base.errors import LayerlabError, reason
from layerlab.base.processes import end_marked
from layerlab.base.text import as_json, from_json
from layerlab.contract.registry import Plugin

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
                                         env={**os.environ, MARK: self._mark})

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
        return [broken for broken, *_ in self._answers([(plugin, []) for plugin in plugins], limit)]

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
        for own, (broken, *refused) in zip(places.values(), self._answers(questions, limit), strict=True):
            for number, place in enumerate(own):
                found[place] = str(asked[place].plugin.refusal(broken)) if broken else refused[number]
        return found

    def _answers(self, asked: Sequence[tuple[Plugin, Sequence[Any]]], limit: float) -> list[list[str]]:
        """For each plugin why it cannot be used, then for each of its (profile, changed) why that is refused."""
        plugins = [[asdict(plugin), as_json(changes)] for plugin, changes in asked]
        text, _ = self._process.communicate(json.dumps([limit, plugins]))
        if self._process.returncode:
            raise subprocess.CalledProcessError(self._process.returncode, self._process.args)
        return json.loads(text)


def main() -> None:
    """Read a limit and plugins with changes as JSON, write their errors as JSON."""
    # Before the first fork, so that it is imported once.
    import layerlab.contract.strategy  # noqa: F401

    limit, asked = json.load(sys.stdin)
    print(json.dumps([_tried(Plugin(**plugin), from_json(changes), limit) for plugin, changes in asked]))


def _tried(plugin: Plugin, changes: Sequence[Any], limit: float) -> list[str]:
    """Import a plugin in a process of its own, and let it look at the changes there."""
    answer, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        # A session of its own, so that what it may have started ends with it; what it prints is of no interest.
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        with os.fdopen(told, "w") as stream:
            stream.write(json.dumps([plugin.broken, *_refusals(plugin, changes)]) + "\n")
            stream.flush()
            os._exit(0)
    os.close(told)
    text = _line(answer, child, limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text:
        return json.loads(text)
    if text is None:
        return [f"it did not import within {limit:g} s"]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return [f"its import ended the process with {how}"]


def _refusals(plugin: Plugin, changes: Sequence[Any]) -> list[str]:
    from layerlab.contract.parameters import check_settings

    found = []
    for profile, changed in changes:
        try:
            check_settings(plugin, profile, changed)
        except LayerlabError as error:
            found.append(str(error))
        except Exception as error:  # whatever a validator of the plugin's raises
            found.append(f"{plugin.name} does not take {changed!r} ({reason(error)}); give other values.")
        else:
            found.append("")
    return found


def _line(pipe: int, child: int, limit: float) -> bytes | None:
    """What a process writes to a pipe up to the first line's end, empty if it ends before; None after `limit` seconds.

    Another process that it has started may hold the other end open for ever, so the pipe's end is not waited for.
    """
    deadline, text = time.monotonic() + limit, b""
    with os.fdopen(pipe, "rb", buffering=0) as stream:
        while not text.endswith(b"\n"):
            # Looks without taking its status away, and before the last look into the pipe.
            over = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            if select.select([stream], [], [], 0.0 if over else 0.05)[0]:
                part = stream.read(1 << 16)
                if not part:
                    return b""
                text += part
            elif over:
                return b""
            elif time.monotonic() > deadline:
                return None
    return text


if __name__ == "__main__":
    main()
