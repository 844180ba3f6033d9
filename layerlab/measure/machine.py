"""Which machine and which versions a number comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def machine_name() -> str:
    """The processor with the threads in use, and the GPU if there is one."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    text = f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    if torch.cuda.is_available():
        text = f"{torch.cuda.get_device_name()}; {text}"
    return text


# What decides about the numbers of any run, whatever plugins are installed.
DECISIVE = frozenset({"python", "torch", "torchvision", "numpy", "mlflow", "papermill", "layerlab"})


@cache
def versions() -> dict[str, str]:
    """Python, the packages that decide about numbers, and every distribution that plugs into us, whatever its name."""
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        if distribution.name in DECISIVE:
            found[distribution.name] = distribution.version
    for point in importlib.metadata.entry_points(group="layerlab.strategies"):
        if point.dist is not None:
            found[point.dist.name] = point.dist.version
    return dict(sorted(found.items()))


@cache
def commit(folder: Path) -> str:
    """The git commit of `folder`, with `+` when it has uncommitted changes; empty where there is none."""
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if dirty else "")
