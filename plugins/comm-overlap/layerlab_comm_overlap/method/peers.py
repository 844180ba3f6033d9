"""Workers that are lost: one died, or one hangs; which of them it is, and what the others say of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from layerlab import LayerlabError, first_line

TIME_LIMIT = 300.0
"""Seconds that a worker waits for the others before it takes one of them for hanging."""
# How torch.distributed words what it meets, by gloo and by nccl.
_DIED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_TIMED_OUT = ("Timed out waiting", "Application timeout", "Operation timed out", "wait timeout after",
              "Watchdog caught collective operation timeout")
# The one that died shall be seen first by whatever watches the workers, not those that miss it.
_AFTER_A_DEATH = 2.0


class PeerLost(LayerlabError):
    """Workers cannot exchange any more: another one died, or does not answer.

    Attributes:
        hanging: ranks of those that do not answer; empty where one died.
    """

    def __init__(self, message: str, hanging: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.hanging = hanging


@contextmanager
def watched(time_limit: float) -> Iterator[None]:
    """Tell of a lost worker instead of torch.distributed's errors.

    Args:
        time_limit: seconds after which the process group gives up waiting.

    Raises:
        PeerLost: an exchange inside ended because another worker died or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in (*_DIED, *_TIMED_OUT)):
            raise lost(error, time_limit) from error
        raise


def lost(error: BaseException, time_limit: float) -> PeerLost:
    """What the end of an exchange means; takes some seconds, in which the others come to the same.

    Args:
        error: torch.distributed's.
        time_limit: seconds after which the process group gives up waiting.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    if any(sign in str(error) for sign in _TIMED_OUT):
        hanging = _hanging(max(_AFTER_A_DEATH, time_limit / 10))
        who = " and ".join(map(str, hanging)) or "?"
        return PeerLost(
            f"Worker {who} of {workers} does not answer: worker {rank} waited {time_limit:g} s for it. It hangs or its "
            "process is stopped; start the job again, which goes on from the last checkpoint. Steps that may take "
            "longer need a longer limit: launch(…, time_limit=…) and CommOverlap(time_limit_s=…).", hanging)
    time.sleep(_AFTER_A_DEATH)
    return PeerLost(f"Worker {rank} can no longer exchange gradients with the others ({first_line(error)}); see the "
                    "first worker that failed, and start the job again: it goes on from the last checkpoint.")


def _hanging(seconds: float) -> tuple[int, ...]:
    """Ranks that do not say within so many seconds that they wait, too."""
    group = dist.group.WORLD
    assert group is not None
    waiting = dist.PrefixStore("comm-overlap/waiting", group.get_group_store())
    waiting.set(str(dist.get_rank()), "")
    time.sleep(seconds)
    return tuple(rank for rank in range(dist.get_world_size()) if not waiting.check([str(rank)]))
