"""A data-parallel training step on DistributedDataParallel: when gradients go, when weights are updated and awaited."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from layerlab import Refused, Run
from layerlab_comm_overlap.method.stock import OWN_BUFFERS
from layerlab_comm_overlap.method.transport import Bucket, Transport, order_of_segments

_MEASURED = range(2, 5)
"""Steps whose times decide the order of segments. DDP makes its buckets anew after the first step."""


class _FirstUses(TorchFunctionMode):
    """Finds parameters that some operation reads before the module that owns them is called."""

    def __init__(self, expected: set[nn.Parameter]) -> None:
        super().__init__()
        self.expected = expected
        self.early: set[nn.Parameter] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter) and leaf in self.expected:
                self.early.add(leaf)
        return func(*args, **(kwargs or {}))


class Engine:
    """Steps of one network with one set of learning parameters.

    Args:
        run: whose `training_model`, `optimizer`, `loss`, `autocast` and `wire` it uses.
        transport: carries the buckets.
        overlap_backward, overlap_forward: techniques 1 and 2; see `CommOverlap`.
        bucket_bytes: of DDP's buckets.
        find_unused: DDP's `find_unused_parameters`.
        synchronise: give all workers the first one's weights.

    Raises:
        Refused: what cannot wait inside the forward pass or be updated bucket by bucket.
    """

    def __init__(
        self, run: Run, transport: Transport, overlap_backward: bool, overlap_forward: bool, bucket_bytes: int,
        find_unused: bool, synchronise: bool,
    ) -> None:
        self.model, self.optimizer, self.transport = run.training_model, run.optimizer, transport
        self.overlap_backward = overlap_backward
        # Other strategies' hooks need all gradients at once, and which parameters are unused is known at the end only.
        self.apply_early = overlap_forward and not waits_for_all(run, find_unused)
        self.wire = run.wire
        if self.apply_early and (reason := no_early_updates(run)):
            raise Refused(reason)
        self.waited = 0.0
        self._steps = 0
        self._backward_start = 0.0
        self._pending: dict[nn.Parameter, Bucket] = {}
        self._held: list[Bucket] = []
        self._buckets = 0
        self._expected = 0
        self._ready: dict[int, list[float]] = defaultdict(list)
        self._sizes: dict[int, tuple[int, int]] = {}
        self._needed: dict[nn.Parameter, int] = {}
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._handles: list[Any] = []
        self._first: _FirstUses | None = None
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._group_of = {p: index for index, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        self._groups: list[dict[str, Any]] = []
        self.ddp = DistributedDataParallel(
            self.model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_bytes / 2**20,
            find_unused_parameters=find_unused, init_sync=synchronise, **OWN_BUFFERS,
        )
        # DDP compares a hook's annotations, as objects, with its own.
        self.ddp.register_comm_hook(None, lambda _, bucket: self._on_bucket(bucket))
        self._learning = {p for p in self.model.parameters() if p.requires_grad}
        if self.apply_early:
            self._wait_in_forward()

    def step(self, run: Run, x: Tensor, y: Tensor, weight: float, last: bool) -> Tensor:
        """One step; with technique 2 its updates may still be under way when it returns.

        Args:
            run: as given at the start.
            x, y: this worker's share of the batch.
            weight: that share, so that the sum over workers is the mean over the batch.
            last: return with all updates done.

        Returns:
            The mean loss of the share, a scalar.
        """
        self._steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        watch: AbstractContextManager[Any] = nullcontext()
        if self.apply_early and self._steps == 1:
            watch = self._first = _FirstUses(set(self._learning))
        with watch, run.autocast():
            loss = run.loss(self.ddp(x), y)
        if self._first is not None:
            self._cover_early_uses(self._first.early)
            self._first = None
        # Backward writes into the buckets, so everything that was under way must be back.
        self.arrive()
        # The updates belong to this step, whatever a schedule does to the rate before they are made.
        self._groups = [{key: value for key, value in group.items() if key != "params"}
                        for group in self.optimizer.param_groups]
        self._buckets = 0
        self._bucket_of.clear()
        self.transport.begin()
        self._backward_start = time.perf_counter()
        (loss * weight).backward()
        if self._expected and self._buckets != self._expected:
            raise RuntimeError(f"DDP gave {self._buckets} buckets instead of {self._expected}.")
        if last or not self.apply_early:
            self.arrive()
        for hook in run.after_backward:
            hook(run)
        if not self.apply_early:
            self.optimizer.step()
        else:
            # What a schedule looks for, or it warns that no step was made.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            if self._steps == _MEASURED[-1]:
                self.arrive()
                self._decide()
        return loss

    def arrive(self) -> None:
        """Wait until every bucket that was sent is back, and where that is wanted, applied."""
        start = time.perf_counter()
        for bucket in dict.fromkeys(self._pending.values()):
            self.transport.wait(bucket)
        self._pending.clear()
        self.waited += time.perf_counter() - start

    @property
    def buckets(self) -> list[dict[str, int]]:
        """Of each of DDP's buckets, in the order of backward: names of parameters and the bytes of their gradients."""
        found: dict[int, dict[str, int]] = defaultdict(dict)
        for parameter, index in self._bucket_of.items():
            found[index][self._names[parameter]] = parameter.numel() * parameter.element_size()
        return [found[index] for index in sorted(found)]

    def communicate(self) -> float:
        """Seconds in which all gradients travel when nothing is computed."""
        self.arrive()
        return self.transport.exchange([sum(bucket.values()) for bucket in self.buckets])

    def sent(self) -> int:
        """Bytes of gradients that went since the last call."""
        volume, self.transport.volume, self.transport.busy = self.transport.volume, 0, 0.0
        return volume

    def detach(self) -> None:
        """Leave the network plain."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------------------------ backward

    def _on_bucket(self, ready: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook: a bucket's gradients are computed."""
        index, parameters = ready.index(), cast(list[nn.Parameter], ready.parameters())
        bucket = Bucket(index, parameters, ready.gradients(), ready.buffer(),
                        self._apply if self.apply_early else None, self.wire, [self._names[p] for p in parameters])
        self._buckets += 1
        self._pending |= dict.fromkeys(parameters, bucket)
        self._bucket_of |= dict.fromkeys(parameters, index)
        if self.overlap_backward:
            self._send(bucket)
        else:
            self._held.append(bucket)
            if ready.is_last():
                for each in self._held:
                    self._send(each)
                self._held.clear()
        # DDP itself has nothing to wait for: whoever needs the sums waits for the transport.
        done: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[bucket.buffer.device] if bucket.buffer.is_cuda else None)
        done.set_result(bucket.buffer)
        return done

    def _send(self, bucket: Bucket) -> None:
        if self._steps in _MEASURED:
            self._ready[bucket.index].append(time.perf_counter() - self._backward_start)
        self.transport.send(bucket)
        if self._steps in _MEASURED:
            message = bucket.message
            self._sizes[bucket.index] = (len(self.transport.parts(message)), message.numel() * message.element_size())

    def _apply(self, bucket: Bucket) -> None:
        """The optimizer's own step, shown one bucket: on aliases of its parameters, whose gradients no one else has."""
        optimizer = self.optimizer
        twin = object.__new__(type(optimizer))
        twin.__dict__.update(optimizer.__dict__)
        twin.__dict__.pop("step", None)  # a schedule's wrapper, which steps the original
        twin.state = defaultdict(dict)
        twin.param_groups = [{**group, "params": []} for group in self._groups]
        aliases = []
        for parameter, gradient in zip(bucket.parameters, bucket.gradients, strict=True):
            alias = parameter.detach()
            alias.grad = gradient
            aliases.append(alias)
            if parameter in optimizer.state:
                twin.state[alias] = optimizer.state[parameter]
            twin.param_groups[self._group_of[parameter]]["params"].append(alias)
        type(optimizer).step(twin)
        for parameter, alias in zip(bucket.parameters, aliases, strict=True):
            if alias in twin.state:
                optimizer.state[parameter] = twin.state[alias]

    # ------------------------------------------------------------------------------------ forward

    def _wait_in_forward(self) -> None:
        for module in self.model.modules():
            own = [p for p in module.parameters(recurse=False) if p in self._learning]
            if own:
                self._handles.append(module.register_forward_pre_hook(self._waiting_for(own), prepend=True))

    def _waiting_for(self, parameters: Iterable[nn.Parameter]) -> Callable[[nn.Module, Any], None]:
        parameters = list(parameters)

        def hook(_: nn.Module, __: Any) -> None:
            for parameter in parameters:
                self._needed.setdefault(parameter, len(self._needed))
                if self._first is not None:
                    self._first.expected.discard(parameter)
                bucket = self._pending.get(parameter)
                if bucket is not None:
                    if not bucket.arrived.is_set():
                        start = time.perf_counter()
                        self.transport.wait(bucket)
                        self.waited += time.perf_counter() - start
                    else:
                        self.transport.wait(bucket)
                    del self._pending[parameter]

        return hook

    def _cover_early_uses(self, early: set[nn.Parameter]) -> None:
        """Wait before anything else for what is read outside the module that owns it, as attention's projection is."""
        if early:
            self._needed = {p: -1 for p in early} | {p: at for p, at in self._needed.items() if p not in early}
            self._handles.append(self.model.register_forward_pre_hook(self._waiting_for(early), prepend=True))

    def _decide(self) -> None:
        """From the measured steps, fix the order of segments; the first worker's times count for all."""
        rate = self.transport.busy / max(1, self.transport.volume)
        order: list[tuple[int, int]] = []
        if dist.get_rank() == 0:
            count = len(self._sizes)
            ready = [statistics.median(self._ready[index]) for index in range(count)]
            parts = [self._sizes[index][0] for index in range(count)]
            seconds = [rate * self._sizes[index][1] / parts[index] for index in range(count)]
            needed = [len(self._names)] * count
            for parameter, bucket in self._bucket_of.items():
                needed[bucket] = min(needed[bucket], self._needed.get(parameter, len(self._names)))
            order = order_of_segments(ready, needed, parts, seconds)
        box = [order]
        dist.broadcast_object_list(box, src=0)
        self.transport.follow(box[0])
        self._expected = len(self._sizes)


def waits_for_all(run: Run, find_unused: bool) -> bool:
    """Whether the update has to wait for all gradients, so that technique 2 has no effect."""
    return bool(run.after_backward) or find_unused


def no_early_updates(run: Run) -> str:
    """Why technique 2 cannot be had, in a sentence with the remedy; empty where it can."""
    if isinstance(run.optimizer, torch.optim.LBFGS):
        return ("comm-overlap with overlap_forward updates one bucket of layers at a time and LBFGS needs "
                "all gradients at once; use another optimizer or overlap_forward=False.")
    if run.optimizer._optimizer_step_pre_hooks or run.optimizer._optimizer_step_post_hooks:
        return ("comm-overlap with overlap_forward updates one bucket of layers at a time, so that a function "
                "registered around the optimizer's step (clipping the whole model's gradient, say) would see a part "
                "of the gradients; remove it or set overlap_forward=False.")
    compiled = [name for name, module in run.training_model.named_modules() if module._compiled_call_impl is not None]
    if compiled:
        return ("comm-overlap with overlap_forward waits inside the forward pass, which torch.compile cannot trace "
                f"(module {compiled[0]!r}); set compile=False or overlap_forward=False.")
    return ""
