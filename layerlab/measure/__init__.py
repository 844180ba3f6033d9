"""What a training step costs: FLOPs, bytes moved, peak memory, seconds, joules. Measured, not estimated."""

from layerlab.measure.clock import Energy, Turns, synchronise, time_by_turns
from layerlab.measure.cost import Meter, StepCost
from layerlab.measure.interval import mean_interval
from layerlab.measure.layers import layer_costs
from layerlab.measure.machine import commit, machine_name, versions

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
]
