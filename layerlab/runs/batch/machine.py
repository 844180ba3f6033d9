"""What this machine carries at once: cores, memory, GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil

from layerlab.base.memory import available_memory
from layerlab.runs.jobs import Job


class Machine:
    """What this machine has left for more notebooks.

    Args:
        at_once: notebooks that a person wants at once, even if they have to share threads.

    Attributes:
        threads: of the machine.
        cores: free threads, or places for notebooks where more are wanted at once than there are threads.
        memory: free host memory in 10⁹ bytes.
        gpus: free GPUs, as CUDA_VISIBLE_DEVICES names them.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.threads = usable_cores()
        self.cores = self.all_cores = max(self.threads, at_once)
        self.memory = available_memory() / 1e9
        self.gpus = _gpus()
        self.has_gpus = bool(self.gpus)
        self.running = 0

    def take(self, job: Job, share: int) -> tuple[dict[str, str], Callable[[], None]] | None:
        """Room for a job: variables for its kernel and what gives the room back; None while there is none.

        A job that wants more than there is runs when nothing else does.
        """
        cores = self.all_cores if job.cores == "all" else min(max(job.cores, share), self.all_cores)
        short = cores > self.cores or job.memory_gb > self.memory or (self.has_gpus and not self.gpus)
        if self.running and short:
            return None
        gpu = self.gpus.pop(0) if self.gpus else None
        self.cores -= cores
        self.memory -= job.memory_gb
        self.running += 1

        def give_back() -> None:
            self.cores += cores
            self.memory += job.memory_gb
            self.running -= 1
            if gpu is not None:
                self.gpus.append(gpu)

        # OpenMP takes a list as well, of which the first counts here, and ignores what is no number.
        wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        threads = min(cores, self.threads, int(wanted) if wanted.isdecimal() and int(wanted) else cores)
        environment = {"OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        return environment, give_back


def usable_cores() -> int:
    """Threads that this process may use: those of its affinity where the system has one, else the machine's."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs that this process may use, without importing torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    import pynvml

    try:
        pynvml.nvmlInit()
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
