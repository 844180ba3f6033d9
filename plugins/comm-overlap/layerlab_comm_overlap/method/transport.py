"""What carries gradients between workers: a thread that sums buckets over all of them while the network computes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from layerlab import Wire
from layerlab_comm_overlap.method.peers import TIME_LIMIT, lost


@dataclass(eq=False)
class Bucket:
    """One of DistributedDataParallel's buckets in one step.

    Attributes:
        index: DDP's number, in the order of backward.
        parameters: whose gradients it holds.
        gradients: views of `buffer`, one a parameter.
        buffer: flat; this worker's part of the sum, then the sum.
        apply: called in the transport's thread when the sum is there.
        wire, names: how the gradients travel, if not as they are, and the parameters' names in it.
        arrived: set when the sum is there and applied.
    """

    index: int
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    buffer: Tensor
    apply: Callable[[Bucket], None] | None = None
    wire: Wire | None = None
    names: list[str] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    _left: int = 0
    _message: Tensor | None = None
    _codes: torch.dtype = torch.int8
    _received: list[Tensor] = field(default_factory=list)
    _computed: Any = None
    _applied: Any = None

    @property
    def message(self) -> Tensor:
        """What travels: the gradients, or the bytes of their exponents and codes."""
        return self.buffer if self._message is None else self._message

    def encode(self, workers: int) -> None:
        """Write the gradients as the wire wants them: all exponents (int32), then all codes, as bytes."""
        assert self.wire is not None
        pairs = [self.wire.encode(name, gradient) for name, gradient in zip(self.names, self.gradients, strict=True)]
        exponents = torch.tensor([exponent for _, exponent in pairs], dtype=torch.int32, device=self.buffer.device)
        codes = torch.cat([code.reshape(-1) for code, _ in pairs])
        self._codes = codes.dtype
        self._message = torch.cat([exponents.view(torch.uint8), codes.view(torch.uint8)])
        self._received = [torch.empty_like(self._message) for _ in range(workers)]

    def decode(self) -> None:
        """Sum what all workers sent into the gradients, in the order of their ranks, so that all get the same."""
        assert self.wire is not None
        head = 4 * len(self.parameters)
        self.buffer.zero_()
        for received in self._received:
            exponents = received[:head].clone().view(torch.int32).tolist()
            codes = received[head:].clone().view(self._codes)
            parts = codes.split([gradient.numel() for gradient in self.gradients])
            for gradient, part, exponent in zip(self.gradients, parts, exponents, strict=True):
                gradient += self.wire.decode(part.view(gradient.shape), int(exponent))


@dataclass
class Link:
    """A slower link, by waiting: what a delay can imitate of one where the system's own means (`tc`) are missing.

    Attributes:
        bits_per_second: each worker sends and receives at most so much; None leaves the bandwidth to the real link.
        latency: seconds that a message between two workers takes longer.
    """

    bits_per_second: float | None = None
    latency: float = 0.0
    _free: float = 0.0

    def due(self, launched: float, landed: float, volume: int, workers: int) -> float:
        """When an all-reduce that took from `launched` to `landed` would have landed over this link.

        Args:
            launched, landed: seconds of `time.perf_counter`.
            volume: bytes of the tensor.
            workers: of a ring: 2(N − 1) messages one after the other, each of 1/N of the tensor.
        """
        hops = 2 * (workers - 1)
        if self.bits_per_second is not None:
            self._free = max(self._free, launched) + hops / workers * volume * 8 / self.bits_per_second
            landed = max(landed, self._free)
        return landed + hops * self.latency


def slower(megabits: float | None, latency_ms: float) -> Link | None:
    """A link by its settings (megabits a second, milliseconds a message); None: as it is."""
    if megabits is None and not latency_ms:
        return None
    return Link(megabits and megabits * 1e6, latency_ms / 1e3)


@dataclass(eq=False)
class _Flight:
    """A segment under way."""

    bucket: Bucket
    part: slice
    stage: Tensor | None
    work: Any
    launched: float
    landed: float | None = None

    def land(self, _: object) -> None:
        self.landed = time.perf_counter()


class Transport:
    """A thread that all-reduces buckets, whole or cut in segments that go one behind the other.

    With segments, each travels through host memory (technique 3): while one is summed between the hosts, the next is
    copied from the device and the one before back to it. What is in host memory anyway is cut and not copied. The sum
    over workers is `torch.distributed`'s; on hosts, gloo computes it on the CPU.

    All workers must launch their segments in the same order. It is the order of `send`, or the one given to `follow`.

    Args:
        group: the process group; no one else may use it.
        device: of the buckets.
        segment: bytes; None: whole buckets, by the group's own means.
        in_flight: how many segments may be under way at a time.
        link: makes the link slower.
        staged: copy segments to host memory of their own and back. Default: where they are not in host memory anyway.
        time_limit: the group's, in seconds, for what is said when it has passed.

    Attributes:
        volume: bytes that were launched.
        busy: seconds in which something of them was under way; whoever has waited for a bucket finds its seconds there.
    """

    def __init__(
        self, group: Any, device: torch.device, segment: int | None, in_flight: int = 2, link: Link | None = None,
        staged: bool | None = None, time_limit: float = TIME_LIMIT,
    ) -> None:
        self.time_limit = time_limit
        self.group, self.device, self.segment, self.in_flight, self.link = group, device, segment, in_flight, link
        self.staged = segment is not None and (device.type != "cpu" if staged is None else staged)
        self.workers = dist.get_world_size(group)
        self.volume = 0
        self.busy = self._since = 0.0
        self.error: BaseException | None = None
        self._order: list[tuple[int, int]] = []
        self._queue: deque[tuple[int, int]] = deque()
        self._here: dict[int, Bucket] = {}
        self._flying: deque[_Flight] = deque()
        self._stages: list[tuple[torch.UntypedStorage, Any]] = []
        self._closed = False
        self._changed = threading.Condition()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, name="comm-overlap", daemon=True)
        self._thread.start()

    def parts(self, message: Tensor) -> list[slice]:
        """The segments of a flat message."""
        step = len(message) if self.segment is None else max(1, self.segment // message.element_size())
        return [slice(start, min(start + step, len(message))) for start in range(0, len(message), step)]

    def follow(self, order: Sequence[tuple[int, int]]) -> None:
        """Launch in this order in each step from now on; it must be the same in all workers.

        Args:
            order: (bucket, segment) of every segment of a step, each bucket's in ascending order.
        """
        self._order = list(order)

    def begin(self) -> None:
        """Before a step's first `send`, with everything sent before arrived."""
        with self._changed:
            self._queue.extend(self._order)

    def send(self, bucket: Bucket) -> None:
        """Give a bucket away; it is back when `arrived` is set."""
        if bucket.wire is not None:
            # Here, not in the thread: a wire may draw random numbers, and they must come in the same order every time.
            bucket.encode(self.workers)
        bucket._left = len(self.parts(bucket.message))
        if self._stream is not None:
            bucket._computed = torch.cuda.current_stream(self.device).record_event()
        with self._changed:
            if self.error is not None:
                bucket.arrived.set()
                return
            self._here[bucket.index] = bucket
            if not self._order:
                self._queue.extend((bucket.index, number) for number in range(bucket._left))
            self._changed.notify()

    def wait(self, bucket: Bucket) -> None:
        """Until the bucket has arrived.

        Raises:
            PeerLost: it will not.
        """
        bucket.arrived.wait()
        if self.error is not None:
            raise lost(self.error, self.time_limit) from self.error
        if bucket._applied is not None:
            torch.cuda.current_stream(self.device).wait_event(bucket._applied)

    def exchange(self, sizes: Sequence[int]) -> float:
        """Sum float32 buckets of zeros over the workers with nothing else going on, for measurements.

        Args:
            sizes: bytes of each bucket.

        Returns:
            Seconds until all are back.
        """
        buckets = [Bucket(index, [], [], torch.zeros(size // 4, device=self.device))
                   for index, size in enumerate(sizes)]
        dist.barrier()
        start = time.perf_counter()
        self.begin()
        for bucket in buckets:
            self.send(bucket)
        for bucket in buckets:
            self.wait(bucket)
        return time.perf_counter() - start

    def close(self) -> None:
        """End the thread; what is under way still arrives."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ------------------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            while True:
                todo = self._todo()
                if todo == "end":
                    return
                if todo == "land":
                    self._land(self._flying.popleft())
                else:
                    if not self._flying:
                        self._since = time.perf_counter()
                    bucket, number = todo
                    self._flying.append(self._launch(bucket, self.parts(bucket.message)[number]))
        except BaseException as error:
            with self._changed:
                self.error = error
                for bucket in [*self._here.values(), *(flight.bucket for flight in self._flying)]:
                    bucket.arrived.set()

    def _todo(self) -> Any:
        with self._changed:
            while True:
                if self._queue and len(self._flying) < self.in_flight and self._queue[0][0] in self._here:
                    index, number = self._queue.popleft()
                    return self._here[index], number
                if self._flying:
                    return "land"
                if self._closed:
                    return "end"
                self._changed.wait()

    def _launch(self, bucket: Bucket, part: slice) -> _Flight:
        piece, stage = bucket.message[part], None
        with torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(bucket._computed)
            if self.staged and bucket.wire is None:
                stage = self._stage(piece)
                stage.copy_(piece, non_blocking=True)
                if self._stream is not None:
                    self._stream.record_event().synchronize()
            started = time.perf_counter()
            if bucket.wire is not None:
                work = dist.all_gather([each[part] for each in bucket._received], piece, self.group, async_op=True)
            else:
                work = dist.all_reduce(piece if stage is None else stage, group=self.group, async_op=True)
        flight = _Flight(bucket, part, stage, work, started)
        if self.link is not None:
            work.get_future().add_done_callback(flight.land)
        self.volume += piece.numel() * piece.element_size()
        return flight

    def _land(self, flight: _Flight) -> None:
        bucket, piece = flight.bucket, flight.bucket.message[flight.part]
        with torch.cuda.stream(self._stream):
            with record_function(f"communicate {bucket.index}"):
                flight.work.wait()
                if self.link is not None:
                    volume = piece.numel() * piece.element_size()
                    landed = flight.landed or time.perf_counter()
                    due = self.link.due(flight.launched, landed, volume, self.workers)
                    time.sleep(max(0.0, due - time.perf_counter()))
            # Before anybody hears that the bucket is back, and reads it.
            now = time.perf_counter()
            self.busy, self._since = self.busy + now - self._since, now
            if flight.stage is not None:
                piece.copy_(flight.stage, non_blocking=True)
                self._stages.append((flight.stage.untyped_storage(), self._event()))
            bucket._left -= 1
            if bucket._left:
                return
            if bucket.wire is not None:
                bucket.decode()
            if bucket.apply is not None:
                with record_function(f"update {bucket.index}"):
                    bucket.apply(bucket)
            bucket._applied = self._event()
        with self._changed:
            del self._here[bucket.index]
        bucket.arrived.set()

    def _event(self) -> Any:
        return None if self._stream is None else self._stream.record_event()

    def _stage(self, piece: Tensor) -> Tensor:
        """Host memory of a segment's size, pinned where copies to it can run beside others."""
        assert self.segment is not None
        if self._stages:
            storage, event = self._stages.pop(0)
            if event is not None:
                event.synchronize()
        else:
            storage = torch.empty(
                max(self.segment, 8), dtype=torch.uint8, pin_memory=self._stream is not None
            ).untyped_storage()
        return torch.empty(0, dtype=piece.dtype).set_(storage, 0, (piece.numel(),), (1,))


def order_of_segments(
    ready: Sequence[float], needed: Sequence[int], parts: Sequence[int], seconds: Sequence[float]
) -> list[tuple[int, int]]:
    """In which order to launch a step's segments so that the link idles little and the next forward waits little.

    Whenever the link is free it takes, of the buckets that are ready, the one that the next forward pass needs first.
    Decided once from measured times rather than at run time, because all workers must launch in the same order.

    Args:
        ready: seconds into backward at which each bucket's gradients are there.
        needed: the rank of each bucket in the forward pass.
        parts: segments of each bucket.
        seconds: that a segment of each bucket keeps the link.

    Returns:
        (bucket, segment), as `Transport.follow` takes it.
    """
    left, order, now = list(parts), [], 0.0
    while any(left):
        open_ = [bucket for bucket, count in enumerate(left) if count]
        now = max(now, min(ready[bucket] for bucket in open_))
        bucket = min((bucket for bucket in open_ if ready[bucket] <= now), key=lambda bucket: needed[bucket])
        order.append((bucket, parts[bucket] - left[bucket]))
        left[bucket] -= 1
        now += seconds[bucket]
    return order
