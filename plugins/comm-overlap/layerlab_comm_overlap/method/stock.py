"""DistributedDataParallel as it comes: what overlaps communication without this plugin."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

import torch.distributed as dist
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from layerlab import Preflight, Run, Split, Strategy
from layerlab_comm_overlap.method.transport import Link

# DDP's `bucket_cap_mb`; 25 is its default.
STOCK = {"DDP, 1 MB buckets": 1.0, "DDP, 5 MB buckets": 5.0, "DDP, 25 MB buckets": 25.0}
"""Name of an arm → mebibytes of gradients in a bucket."""


class StockDDP(Strategy):
    """Train on the processes of an existing group with DistributedDataParallel alone, for measurements.

    Gradients are averaged bucket by bucket while backward runs, by the backend's own means, and all weights are updated
    after backward. The batch must divide evenly among the workers.
    """

    name: ClassVar[str] = "stock-ddp"
    acts_in_backward: ClassVar[bool] = True

    bucket_mb: float = Field(25.0, gt=0)
    """Mebibytes of gradients in a bucket."""
    link_megabits: float | None = Field(None, gt=0)
    """A delay makes every worker's link this slow (megabits a second). Default: as it is."""
    link_latency_ms: float = Field(0.0, ge=0)
    """A delay makes every message between two workers take so much longer (milliseconds)."""

    _ddp: DistributedDataParallel | None = PrivateAttr(None)

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """All layers that learn; the other processes take no part."""
        return Preflight.of(network)

    def on_fit_start(self, run: Run) -> None:
        """Wrap the network."""
        self._ddp = DistributedDataParallel(run.training_model, bucket_cap_mb=self.bucket_mb)
        if self.link_megabits is not None or self.link_latency_ms:
            link = Link(self.link_megabits and self.link_megabits * 1e6, self.link_latency_ms / 1e3)
            # DDP compares a hook's annotations, as objects, with its own.
            self._ddp.register_comm_hook(None, lambda _, bucket: _late(link, bucket))

    def on_epoch_start(self, run: Run) -> None:
        """Take this worker's share of the data."""
        if isinstance(run.data, Split):
            run.data = replace(run.data, share=(dist.get_rank(), dist.get_world_size()))

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """Forward, backward with its averages, update."""
        assert self._ddp is not None
        run.optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss = run.loss(self._ddp(x), y)
        loss.backward()
        run.optimizer.step()
        return loss

    def on_fit_end(self, run: Run) -> None:
        """Leave the network plain."""
        self._ddp = None


def _late(link: Link, bucket: dist.GradBucket) -> Future[Any]:
    """DDP's own all-reduce, over a link that a delay makes slower."""
    buffer, launched = bucket.buffer().div_(dist.get_world_size()), time.perf_counter()
    volume = buffer.numel() * buffer.element_size()

    def land(future: Future[Any]) -> Tensor:
        due = link.due(launched, time.perf_counter(), volume, dist.get_world_size())
        time.sleep(max(0.0, due - time.perf_counter()))
        return future.value()[0]

    return dist.all_reduce(buffer, async_op=True).get_future().then(land)
