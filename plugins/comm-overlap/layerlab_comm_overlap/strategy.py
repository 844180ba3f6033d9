"""Data-parallel training in which communication hides behind computation.

A. Ike et al., "Technologies for Practical Application of Deep Learning", Fujitsu Sci. Tech. J. 53 (2017), section 3;
M. Yamazaki et al., "Accelerating Deep Learning Framework with MPI", IPSJ SIG Technical Report 2016-HPC-155 (2016).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from layerlab import LayerlabError, Preflight, Refused, Run, Split, Strategy, devices
from layerlab_comm_overlap.method.choosing import Choice, Way
from layerlab_comm_overlap.method.coverage import idle_parameters, notes_on_shares
from layerlab_comm_overlap.method.engine import Engine, no_early_updates, waits_for_all
from layerlab_comm_overlap.method.peers import TIME_LIMIT, watched
from layerlab_comm_overlap.method.stock import STOCK, StockEngine
from layerlab_comm_overlap.method.transport import Transport, slower

_TECHNIQUES = {"overlap_backward", "overlap_forward", "pipeline_segments", "bucket_mb", "segment_mb", "in_flight"}


class CommOverlap(Strategy):
    """Train on several processes, each on its share of every batch; the weights are those of one process.

    The processes are those of `torch.distributed`: started by `torchrun`, by `launch` from a notebook, or by anything
    else that sets up a process group. In a process that is alone it trains as without it. It stands on
    DistributedDataParallel, which says when which gradients are there, and replaces the training step.

    The loss must be a mean over the batch. Batch norms average over a worker's share, as everywhere in data-parallel
    training, so that only networks without them end with one process's weights; their running statistics are averaged
    at each epoch's end. Each worker draws its own random numbers within steps (dropout).
    """

    name: ClassVar[str] = "comm-overlap"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor", "targets"})
    acts_in_backward: ClassVar[bool] = True

    choose: bool | None = None
    """Time DDP as it comes and the techniques in the first steps (some hundred), each with small and large buckets, and
    go on with the fastest; DDP where nothing is over 2 % faster. Runs repeat within rounding only, since sums are taken
    in the order of whatever was chosen. Default: where none of the six settings below is given."""
    overlap_backward: bool = True
    """Technique 1: a bucket's gradients go as soon as backward has computed them, rather than after backward."""
    overlap_forward: bool = True
    """Technique 2: a bucket is updated as soon as its sum is there, and the next forward pass waits for a layer's
    parameters just before it uses them, rather than for everything after backward."""
    pipeline_segments: bool = True
    """Technique 3: gradients are cut in segments that are copied to the host, summed there and copied back, each step
    for one segment while another is in the one before; rather than whole buckets by the backend's own means."""
    bucket_mb: float = Field(1.0, gt=0)
    """Mebibytes of gradients in one of DDP's buckets."""
    segment_mb: float = Field(0.25, gt=0)
    """Mebibytes of a segment."""
    in_flight: int = Field(2, ge=1)
    """How many segments, or whole buckets, are under way at a time."""
    find_unused_parameters: bool = False
    """DDP's setting: for networks in which some learning parameters take no part in some steps. Which ones is known
    only when all workers are through with backward, so that technique 2 then waits for that."""
    link_megabits: float | None = Field(None, gt=0)
    """For measurements: a delay makes every worker's link this slow (megabits a second). Default: as it is."""
    link_latency_ms: float = Field(0.0, ge=0)
    """For measurements: a delay makes every message between two workers take so much longer (milliseconds)."""
    time_limit_s: float = Field(TIME_LIMIT, gt=0)
    """Seconds that a worker waits for the others; then the job ends and names the one that does not answer."""

    _transports: dict[bool, Transport] = PrivateAttr(default_factory=dict)
    _engine: Engine | StockEngine | None = PrivateAttr(None)
    _choice: Choice | None = PrivateAttr(None)
    _key: list[Any] = PrivateAttr(default_factory=list)
    _seed: int = PrivateAttr(0)
    _random: list[Tensor] = PrivateAttr(default_factory=list)
    _epoch: int = PrivateAttr(0)
    _done: int = PrivateAttr(0)
    _loss: Tensor | None = PrivateAttr(None)
    _synchronised: bool = PrivateAttr(False)
    _waited: float = PrivateAttr(0.0)
    _sent: int = PrivateAttr(0)

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """All layers that learn, found by one pass forward and backward on a copy; the other processes take no part.

        Raises:
            Refused: there are other processes and some learning parameters take no part in a step, so that
                DistributedDataParallel would wait for their gradients, without `find_unused_parameters`.
        """
        idle = idle_parameters(network, example)
        notes = notes_on_shares(network)
        if idle and not self.find_unused_parameters:
            some = f"{', '.join(idle[:3])}{', …' if len(idle) > 3 else ''}"
            text = (f"comm-overlap waits for the gradients of all parameters that learn, and {len(idle)} of them take "
                    f"no part in a step ({some}); set find_unused_parameters=True or freeze them.")
            if _workers() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise Refused(text)
            notes.append(f"On several workers, {text}")
        return Preflight.of(network, left_out=dict.fromkeys(idle, "it takes no part in a step"), notes=notes)

    def on_fit_start(self, run: Run) -> None:
        """Join the other processes, and read no more than this one's share of each batch.

        Raises:
            LayerlabError: fewer images in a batch than processes.
        """
        self._release()
        self._epoch, self._key, self._synchronised, self._choice = 0, [], False, None
        self._seed = run.generator.initial_seed()
        join(run.device, self.time_limit_s)
        if _workers() == 1:
            return
        if run.batch_size < _workers():
            raise Refused(f"batch_size {run.batch_size} leaves some of {_workers()} workers without an image; "
                          "make it larger or start fewer.")

    def on_epoch_start(self, run: Run) -> None:
        """Take this worker's share of whatever the epoch's data are.

        Raises:
            LayerlabError: the workers are not at the same epoch.
        """
        if _workers() == 1:
            return
        if not self._synchronised:
            epochs: list[Any] = [None] * _workers()
            with watched(self.time_limit_s):
                dist.all_gather_object(epochs, run.epoch)
            if len(set(epochs)) > 1:
                raise LayerlabError(f"The workers would go on from different epochs ({epochs}); give a checkpoint "
                                    "folder that all of them read.")
        if isinstance(run.data, Split):
            run.data = replace(run.data, share=(dist.get_rank(), _workers()))

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """One step on this worker's share."""
        if _workers() == 1:
            return run.plain_step(x, y)
        with watched(self.time_limit_s):
            if self._epoch != run.epoch:
                self._begin_epoch(run)
            assert self._loss is not None
            assert self._choice is not None
            if self._engine is not None and self._choice.before_step(run.steps_per_epoch - self._done):
                self._build(run)
            x, y, weight = self._share(run, x, y)
            self._done += 1
            last = self._done >= run.steps_per_epoch
            if self._engine is not None:
                loss = self._engine.step(run, x, y, weight, last)
            else:
                # Nothing learns in this epoch, so that there is nothing to send and nothing to update.
                with run.autocast():
                    loss = run.loss(run.training_model(x), y)
        self._loss += loss.detach() * weight
        if last:
            devices.set_random_state(self._random, run.device)
        return loss

    def on_epoch_end(self, run: Run) -> None:
        """Leave the same network in all workers, and log what all of them saw."""
        if _workers() == 1 or self._loss is None:
            return
        self._account()
        statistics = [b for b in run.training_model.buffers() if b.is_floating_point()]
        flat = torch.cat([(self._loss / self._done).double().view(1),
                          *(b.detach().double().reshape(-1) / _workers() for b in statistics)])
        with watched(self.time_limit_s):
            dist.all_reduce(flat)
        mean_loss, *parts = flat.split([1, *(b.numel() for b in statistics)])
        with torch.no_grad():
            for buffer, part in zip(statistics, parts, strict=True):
                buffer.copy_(part.view(buffer.shape))
        run.log("train/loss", mean_loss.item())
        run.log("comm-overlap/workers", _workers())
        run.log("comm-overlap/waited_seconds", self._waited)
        run.log("comm-overlap/gradient_bytes", self._sent)
        self._waited, self._sent = 0.0, 0

    def on_fit_end(self, run: Run) -> None:
        """Leave the network plain."""
        if isinstance(run.data, Split):
            run.data = replace(run.data, share=(0, 1))
        self._release()

    @property
    def chosen(self) -> str:
        """How gradients are averaged, such as `1 + 2, 1 MB buckets`; empty while that is being chosen, or not begun."""
        return self._choice.way.name if self._choice is not None and self._choice.over else ""

    @property
    def tried(self) -> dict[str, float]:
        """What was chosen from: name → seconds a step, the mean over workers; empty where nothing was to choose."""
        return self._choice.seconds if self._choice is not None and self._choice.over else {}

    @property
    def buckets(self) -> list[dict[str, int]]:
        """During a fit, of each bucket as backward fills them: layers and the bytes of their gradients in it."""
        found: list[dict[str, int]] = []
        for bucket in self._engine.buckets if self._engine is not None else ():
            found.append({})
            for name, size in bucket.items():
                layer = name.rpartition(".")[0]
                found[-1][layer] = found[-1].get(layer, 0) + size
        return found

    def seconds_to_communicate(self) -> float:
        """During a fit, called in all workers: seconds in which a step's gradients travel when nothing is computed.

        Raises:
            LayerlabError: there was no step yet, or no other worker.
        """
        if self._engine is None:
            raise LayerlabError("What is communicated is known after the first step of a fit on several workers.")
        return self._engine.communicate()

    @contextmanager
    def transport(self, device: torch.device) -> Iterator[Transport]:
        """What carries gradients under these settings, on its own: for measurements of the link."""
        transport = self._open(device)
        try:
            yield transport
        finally:
            _close(transport)

    def _open(self, device: torch.device, segments: bool | None = None) -> Transport:
        segments = self.pipeline_segments if segments is None else segments
        # A group of its own: its operations must not mix with anyone else's.
        group = dist.new_group(backend="gloo" if segments else None, timeout=timedelta(seconds=self.time_limit_s))
        return Transport(group, device, int(self.segment_mb * 2**20) if segments else None, self.in_flight,
                         slower(self.link_megabits, self.link_latency_ms), time_limit=self.time_limit_s)

    def _ways(self, run: Run) -> list[Way]:
        """What to choose from; one where the settings say it, or nothing else would do."""
        given = Way(self.bucket_mb, (self.overlap_backward, self.overlap_forward, self.pipeline_segments))
        choose = not _TECHNIQUES & self.model_fields_set if self.choose is None else self.choose
        if not choose or run.wire is not None:
            return [given]
        ways = [Way(size) for size in STOCK.values()]
        if not waits_for_all(run, self.find_unused_parameters) and not no_early_updates(run):
            ways += [Way(size, (True, True, False)) for size in (1.0, 5.0)]
            # Segments are copied to the host from a device alone; in host memory they are messages more, nothing else.
            ways += [Way(1.0, (True, True, True))] * (run.device.type != "cpu")
        return ways

    def _begin_epoch(self, run: Run) -> None:
        """At an epoch's first step, when every strategy has adapted the network and its freezing."""
        self._choice = self._choice or Choice(self._ways(run), run.device)
        self._choice.interrupt()
        key = [run.training_model, run.optimizer, run.wire, bool(run.after_backward),
               *(p for p in run.training_model.parameters() if p.requires_grad)]
        if len(key) != len(self._key) or any(new is not old for new, old in zip(key, self._key, strict=True)):
            self._build(run)
            self._key = key
        self._epoch, self._done = run.epoch, 0
        self._loss = torch.zeros((), device=run.device)
        # Outside of steps all workers have the same random state, so that all strategies decide alike.
        self._random = devices.random_state(run.device)
        torch.manual_seed((self._seed * 1_000_003 + run.epoch) * _workers() + dist.get_rank())

    def _build(self, run: Run) -> None:
        """The engine for the present way and the present network."""
        assert self._choice is not None
        self._account()
        if self._engine is not None:
            self._engine.detach()
        self._engine = None
        if not any(parameter.requires_grad for parameter in run.training_model.parameters()):
            return
        way, synchronise = self._choice.way, not self._synchronised
        if way.techniques is None:
            self._engine = StockEngine(run, way.bucket_mb, self.find_unused_parameters, synchronise, False,
                                       slower(self.link_megabits, self.link_latency_ms))
        else:
            backward, forward, segments = way.techniques
            if segments not in self._transports:
                self._transports[segments] = self._open(run.device, segments)
            self._transports[segments].follow(())
            self._engine = Engine(run, self._transports[segments], backward, forward, int(way.bucket_mb * 2**20),
                                  self.find_unused_parameters, synchronise)
        self._synchronised = True

    def _account(self) -> None:
        """Let everything arrive, and count what was waited for and sent."""
        if self._engine is not None:
            self._engine.arrive()
            self._waited, self._engine.waited = self._waited + self._engine.waited, 0.0
            self._sent += self._engine.sent()

    def _share(self, run: Run, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
        """This worker's images and labels, and the part of the batch that they are."""
        index, workers = dist.get_rank(), _workers()
        # Another strategy may have put whole batches there since the epoch began.
        if isinstance(run.data, Split) and run.data.share == (index, workers):
            return x, y, len(y) / run.batch_size
        count = len(y)
        first, last = count * index // workers, count * (index + 1) // workers
        if first == last:
            # Nothing left for this worker: any image will do, at no weight.
            return x[:1], y[:1], 0.0
        return x[first:last], y[first:last], (last - first) / count

    def _release(self) -> None:
        if self._engine is not None:
            self._engine.arrive()
            self._engine.detach()
        for transport in self._transports.values():
            _close(transport)
        self._engine = self._loss = None
        self._transports, self._key = {}, []


def join(device: torch.device, time_limit: float = TIME_LIMIT) -> None:
    """Set up the process group of a job that `torchrun` started, unless that is done.

    nccl where each worker of a machine has a GPU of its own, gloo on CPUs and where workers share a GPU.

    Args:
        device: the one to train on.
        time_limit: seconds that the group waits for a worker.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store, rank, workers = next(dist.rendezvous("env://"))
        # torchrun's own store outlives a restart, and the addresses of workers that are gone would be found in it.
        store = dist.PrefixStore(f"comm-overlap/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        own_gpu = device.type == "cuda" and torch.cuda.device_count() >= here
        dist.init_process_group("nccl" if own_gpu else "gloo", store=store, rank=rank, world_size=workers,
                                timeout=timedelta(seconds=time_limit))
        atexit.register(leave)


def leave() -> None:
    """End this process's part in the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _close(transport: Transport) -> None:
    transport.close()
    dist.destroy_process_group(transport.group)
