"""What a training step costs: FLOPs, bytes moved, peak memory, seconds, joules. Measured, not estimated."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded when first asked for, so that what only starts notebooks does not import torch.
_PUBLIC = {
    "Energy": "clock",
    "Turns": "clock",
    "synchronise": "clock",
    "time_by_turns": "clock",
    "Meter": "cost",
    "StepCost": "cost",
    "mean_interval": "interval",
    "layer_costs": "layers",
    "commit": "machine",
    "machine_name": "machine",
    "versions": "machine",
    "versions_text": "machine",
}

if TYPE_CHECKING:
    from layerlab.measure.clock import Energy, Turns, synchronise, time_by_turns
    from layerlab.measure.cost import Meter, StepCost
    from layerlab.measure.interval import mean_interval
    from layerlab.measure.layers import layer_costs
    from layerlab.measure.machine import commit, machine_name, versions, versions_text

__all__ = [
    "Energy",
    "Meter",
    "StepCost",
    "Turns",
    "commit",
    "layer_costs",
    "machine_name",
    "mean_interval",
    "synchronise",
    "time_by_turns",
    "versions",
    "versions_text",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'layerlab.measure' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"layerlab.measure.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
