"""A link with limited bandwidth and latency between the workers of one machine: network namespaces and tc."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from layerlab import LayerlabError


@dataclass(frozen=True)
class LimitedLink:
    """A link between workers, and how it is made slow.

    Attributes:
        megabits: a second, that each worker can send, and receive; 0: as many as it can.
        latency_ms: milliseconds that each message takes longer.
        networks: a namespace a worker, for `launch`; empty where the machine allows none.
        delays: settings of `CommOverlap` that imitate by a delay what the namespaces cannot.
        refused: why there are no namespaces, where there are none.
    """

    megabits: float
    latency_ms: float
    networks: tuple[str, ...] = ()
    delays: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    @property
    def how(self) -> str:
        """One sentence that says what limits what."""
        if not self.megabits and not self.latency_ms:
            return "The link as it is."
        delayed = " and ".join(
            text for key, text in (("link_megabits", "bandwidth"), ("link_latency_ms", "latency")) if key in self.delays
        )
        hook = f"{delayed} by a delay in the communication hook" if delayed else ""
        if not self.networks:
            return f"No network namespaces here ({self.refused}): {hook}."
        limited = "bandwidth by tc (tbf)" if delayed else "bandwidth and latency by tc (netem)"
        missing = ", since this kernel has no netem" if delayed else ""
        return f"A network namespace a worker, joined by a bridge: {limited}{', ' + hook if hook else ''}{missing}."


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _limit(namespace: str, device: str, megabits: float, latency_ms: float) -> bool:
    """Limit what a device sends; whether its latency is limited too."""
    command = ["ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root"]
    netem = [*command, "netem", "delay", f"{latency_ms}ms", "rate", f"{megabits}mbit", "limit", "10000"]
    if latency_ms and subprocess.run(netem, capture_output=True).returncode == 0:
        return True
    # A burst of two of the largest packets that TCP hands down, or tbf would have to cut each of them up.
    subprocess.run([*command, "tbf", "rate", f"{megabits}mbit", "burst", "128kb", "latency", "200ms"], check=True,
                   capture_output=True, text=True)
    return latency_ms == 0


@contextmanager
def limited_link(workers: int, megabits: float, latency_ms: float = 0.0) -> Iterator[LimitedLink]:
    """Give each worker a network namespace of its own behind a slow link; away again at the end.

    Needs root and Linux's `ip` and `tc`; where they are missing or refused, a delay stands in (see `LimitedLink.how`).

    Args:
        workers: how many.
        megabits: a second, in each direction; 0 with a latency of 0 leaves the link as it is.
        latency_ms: of a message from one worker to another.

    Raises:
        LayerlabError: a latency without a bandwidth.
    """
    if not megabits:
        if latency_ms:
            raise LayerlabError("A link with a latency needs a bandwidth too; give megabits.")
        yield LimitedLink(0.0, 0.0)
        return
    job = f"overlap-{uuid.uuid4().hex[:8]}"
    hub, networks = f"{job}-hub", tuple(f"{job}-{rank}" for rank in range(workers))
    made: list[str] = []
    try:
        try:
            for name in (hub, *networks):
                _ip("netns", "add", name)
                made.append(name)
                _ip("-n", name, "link", "set", "dev", "lo", "up")
            _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", hub, "link", "set", "dev", "bridge", "up")
            real = True
            for rank, name in enumerate(networks):
                port = f"port{rank}"
                _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "link", "netns", name)
                _ip("-n", hub, "link", "set", "dev", port, "master", "bridge", "up")
                _ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "link")
                _ip("-n", name, "link", "set", "dev", "link", "up")
                # The whole latency on the way out, so that a message has it once.
                real = _limit(name, "link", megabits, latency_ms) and real
                _limit(hub, port, megabits, 0.0)
        except (OSError, subprocess.CalledProcessError) as error:
            delays: dict[str, Any] = {"link_megabits": megabits}
            if latency_ms:
                delays["link_latency_ms"] = latency_ms
            refused = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            yield LimitedLink(megabits, latency_ms, (), delays, refused)
        else:
            yield LimitedLink(megabits, latency_ms, networks, {} if real else {"link_latency_ms": latency_ms})
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
