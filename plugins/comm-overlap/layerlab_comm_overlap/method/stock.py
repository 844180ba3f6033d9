"""DistributedDataParallel as it comes: what overlaps communication without this plugin."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch.distributed as dist
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from layerlab import LayerlabError, Preflight, Run, Split, Strategy
from layerlab_comm_overlap.method.transport import Link, slower

# DDP's `bucket_cap_mb`; 25 is its default.
STOCK = {"DDP, 1 MB buckets": 1.0, "DDP, 5 MB buckets": 5.0, "DDP, 25 MB buckets": 25.0}
"""Name of an arm → mebibytes of gradients in a bucket."""


OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}
"""DDP's setting, by the name that this torch has for it, that leaves each worker its own buffers."""


class StockEngine:
    """Steps of one network with DistributedDataParallel alone; in the place of an `Engine`.

    Gradients are averaged bucket by bucket while backward runs, by the backend's own means, and all weights are updated
    after backward.

    Args:
        run: whose `training_model`, `optimizer`, `loss` and `autocast` it uses.
        bucket_mb: mebibytes of gradients in a bucket.
        find_unused: DDP's `find_unused_parameters`.
        synchronise: give all workers the first one's weights.
        buffers: give all workers the first one's buffers before every forward pass, as DDP does by default.
        link: makes the link slower.
    """

    waited = 0.0
    buckets: Sequence[dict[str, int]] = ()

    def __init__(
        self, run: Run, bucket_mb: float, find_unused: bool = False, synchronise: bool = True, buffers: bool = True,
        link: Link | None = None,
    ) -> None:
        self.optimizer = run.optimizer
        self._bytes = sum(p.numel() * p.element_size() for p in run.training_model.parameters() if p.requires_grad)
        self._sent = 0
        self.ddp = DistributedDataParallel(
            run.training_model, bucket_cap_mb=bucket_mb, find_unused_parameters=find_unused, init_sync=synchronise,
            **({} if buffers else OWN_BUFFERS))
        if link is not None:
            # DDP compares a hook's annotations, as objects, with its own.
            self.ddp.register_comm_hook(None, lambda _, bucket: _late(link, bucket))

    def step(self, run: Run, x: Tensor, y: Tensor, weight: float, last: bool) -> Tensor:
        """As `Engine.step`; nothing is under way when it returns."""
        self.optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss = run.loss(self.ddp(x), y)
        # DDP takes the mean over the workers, and the sum of the weights is one.
        scale = weight * dist.get_world_size()
        (loss if scale == 1 else loss * scale).backward()
        for hook in run.after_backward:
            hook(run)
        self.optimizer.step()
        self._sent += self._bytes
        return loss

    def arrive(self) -> None:
        """Nothing to wait for."""

    def sent(self) -> int:
        """Bytes of gradients that went since the last call."""
        sent, self._sent = self._sent, 0
        return sent

    def communicate(self) -> float:
        """Raises: LayerlabError, since what DDP sends is its own."""
        raise LayerlabError("DistributedDataParallel as it comes averages these gradients, which cannot be timed "
                            "alone; give CommOverlap its techniques.")

    def detach(self) -> None:
        """Leave the network plain."""
        del self.ddp


class StockDDP(Strategy):
    """Train on the processes of an existing group with DistributedDataParallel alone, for measurements.

    See `StockEngine`. The batch must divide evenly among the workers.
    """

    name: ClassVar[str] = "stock-ddp"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor", "targets"})
    acts_in_backward: ClassVar[bool] = True

    bucket_mb: float = Field(25.0, gt=0)
    """Mebibytes of gradients in a bucket."""
    link_megabits: float | None = Field(None, gt=0)
    """A delay makes every worker's link this slow (megabits a second). Default: as it is."""
    link_latency_ms: float = Field(0.0, ge=0)
    """A delay makes every message between two workers take so much longer (milliseconds)."""

    _engine: StockEngine | None = PrivateAttr(None)

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """All layers that learn; the other processes take no part."""
        return Preflight.of(network)

    def on_fit_start(self, run: Run) -> None:
        """Wrap the network."""
        self._engine = StockEngine(run, self.bucket_mb, link=slower(self.link_megabits, self.link_latency_ms))

    def on_epoch_start(self, run: Run) -> None:
        """Take this worker's share of the data."""
        if isinstance(run.data, Split):
            run.data = replace(run.data, share=(dist.get_rank(), dist.get_world_size()))

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """Forward, backward with its averages, update."""
        assert self._engine is not None
        return self._engine.step(run, x, y, 1 / dist.get_world_size(), False)

    def on_fit_end(self, run: Run) -> None:
        """Leave the network plain."""
        self._engine = None


def _late(link: Link, bucket: dist.GradBucket) -> Future[Any]:
    """DDP's own all-reduce, over a link that a delay makes slower."""
    buffer, launched = bucket.buffer().div_(dist.get_world_size()), time.perf_counter()
    volume = buffer.numel() * buffer.element_size()

    def land(future: Future[Any]) -> Tensor:
        due = link.due(launched, time.perf_counter(), volume, dist.get_world_size())
        time.sleep(max(0.0, due - time.perf_counter()))
        return future.value()[0]

    return dist.all_reduce(buffer, async_op=True).get_future().then(land)
