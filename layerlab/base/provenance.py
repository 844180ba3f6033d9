"""Which machine and which versions a number comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import site
import subprocess
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from layerlab.base.names import GROUP


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


@cache
def versions(plugins: bool = True) -> dict[str, str]:
    """Python, the packages that decide about numbers, and, if wanted, every distribution that installs a strategy."""
    found = {"python": platform.python_version()}
    wanted = {"layerlab", "torch", "torchvision", "numpy", "mlflow", "papermill"}
    if plugins:
        wanted |= {point.dist.name for point in importlib.metadata.entry_points(group=GROUP) if point.dist}
    for distribution in importlib.metadata.distributions():
        if (name := distribution.name or "") in wanted:
            found[name] = distribution.version
    return dict(sorted(found.items()))


def processor_of(machine: str) -> str:
    """The GPU of a `machine_name`, or else its processor.

    Example:
        >>> processor_of("NVIDIA H200; Intel(R) Xeon(R) Processor, 1 of 16 threads")
        'NVIDIA H200'
        >>> processor_of("AMD EPYC, 2 of 2 threads")
        'AMD EPYC'
    """
    gpu, semicolon, _ = machine.partition(";")
    return gpu if semicolon else machine.rpartition(",")[0]


def package_folders() -> list[str]:
    """The folders that packages are installed in; each install there gives its folder a new time."""
    paths = sysconfig.get_paths()
    return sorted(filter(os.path.isdir, {paths["purelib"], paths["platlib"], site.getusersitepackages()}))


def versions_text(found: Mapping[str, str]) -> str:
    """What `versions` gives, in one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


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


def provenance() -> dict[str, Any]:
    """Where a number comes from: `commit` of layerlab, `machine`, and `versions` by package."""
    return {"commit": commit(Path(__file__).parent), "machine": machine_name(), "versions": versions()}
