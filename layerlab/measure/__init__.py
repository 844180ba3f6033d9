"""What a training step costs: FLOPs, bytes moved, peak memory, seconds, joules. Measured, not estimated."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded when first asked for, so that what only starts notebooks does not import torch.
_PUBLIC = {
    "Energy": "measure.clock",
    "Clock": "measure.clock",
    "Turns": "measure.clock",
    "synchronise": "measure.clock",
    "time_by_turns": "measure.clock",
    "LiveBytes": "measure.cost",
    "Meter": "measure.cost",
    "StepCost": "measure.cost",
    "mean_interval": "show.interval",
    "layer_costs": "measure.layers",
    "peak_allocated": "measure.peak",
    "commit": "base.provenance",
    "machine_name": "base.provenance",
    "versions": "base.provenance",
    "versions_text": "base.provenance",
}

if TYPE_CHECKING:
    from layerlab.base.provenance import commit, machine_name, versions, versions_text
    from layerlab.measure.clock import Clock, Energy, Turns, synchronise, time_by_turns
    from layerlab.measure.cost import LiveBytes, Meter, StepCost
    from layerlab.measure.layers import layer_costs
    from layerlab.measure.peak import peak_allocated
    from layerlab.show.interval import mean_interval

__all__ = [
    "Clock",
    "Energy",
    "LiveBytes",
    "Meter",
    "StepCost",
    "Turns",
    "commit",
    "layer_costs",
    "machine_name",
    "mean_interval",
    "peak_allocated",
    "synchronise",
    "time_by_turns",
    "versions",
    "versions_text",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'layerlab.measure' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"layerlab.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
