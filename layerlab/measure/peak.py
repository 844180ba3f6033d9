"""The most memory that a real step takes on a CPU: what PyTorch's allocator hands out, kernels' workspaces included."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from layerlab.base.arguments import validated

_MARK = "layerlab: the step whose peak counts"


@validated
def peak_allocated(prepare: Callable[[], object], call: Callable[[], object], before: Iterable[Tensor]) -> int:
    """Bytes that were allocated at once while `call` ran, by the profiler's record of every allocation.

    It counts what PyTorch's allocator hands out to tensors and to its kernels, such as oneDNN's reordered weights and
    scratchpads. It does not count MKL's own buffers, the libraries and Python. On ResNet-50 (32 images of 64 pixels)
    it was within 1 % of what the process' resident memory grew by, once the libraries were loaded.

    Args:
        prepare: runs first, recorded too: what it allocates and leaves counts, its own peak does not.
        call: the step.
        before: tensors on the CPU that exist already and are not freed on the way.

    Returns:
        Bytes.

    Example:
        >>> import torch
        >>> from layerlab import measure
        >>> x = torch.ones(1000)
        >>> measure.peak_allocated(lambda: None, lambda: (x + x).sum(), [x])
        8004
    """
    # The profiler's library otherwise prints a line on each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Garbage of before would be given back on the way, without having been counted.
    gc.collect()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in before}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepare()
        # When Python frees what it left in circles is chance.
        gc.collect()
        with record_function(_MARK):
            call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == _MARK)
    # (nanoseconds, bytes): negative where memory was given back. Sorting is stable, so that equal times keep order.
    changes = sorted(((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"),
                     key=lambda change: change[0])
    held = sum(storages.values()) + sum(size for when, size in changes if when < start)
    during = (size for when, size in changes if when >= start)
    return max(itertools.accumulate(during, initial=held))
