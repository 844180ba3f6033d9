"""What the notebook measures and tabulates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from layerlab import Comparison, Dataset, Fit, Strategy, measure, noise
from layerlab.measure import Turns
from layerlab_low_bit.method.arithmetic import Arithmetic
from layerlab_low_bit.method.keeping import Encoded
from layerlab_low_bit.method.products import has_units
from layerlab_low_bit.method.store import Kind, Store
from layerlab_low_bit.strategy import EXPONENT_BYTES, GradientWire, LowBit

Build = Callable[[], nn.Module]
KINDS = {"activation": "activations", "weight": "weights", "error": "errors (dY)", "gradient": "gradients (dW)"}


# ---------------------------------------------------------------------------------------- accuracy


def joules(run: Comparison, arm: str) -> float:
    """Mean energy of an arm's runs by the device's own counter; NaN where it keeps none."""
    return run.estimate(lambda result: result.total("cost/energy_joules"), arm).mean


def accuracies(runs: Mapping[str, Comparison], baseline: str) -> pd.DataFrame:
    """One row a task and arm: top-1, its difference from the baseline; seconds, peak memory, energy relative to it."""
    rows = []
    for task, run in runs.items():
        plain = run.summary.set_index("arm").loc[baseline]
        for arm, row in run.summary.set_index("arm").iterrows():
            mean, half = run.paired("top-1", arm, baseline).interval
            rows.append({
                "task": task, "arithmetic": arm, "top-1 [%]": 100 * row["top-1"], "±": 100 * row["top-1 ±"],
                "against float32 [points]": mean, "± ": half, "seconds, relative": row["seconds"] / plain["seconds"],
                "peak memory, relative": row["peak MB"] / plain["peak MB"],
                "energy, relative": joules(run, arm) / joules(run, baseline),
            })
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------- statistics


def steering_table(run: Comparison) -> pd.DataFrame:
    """One row an arm: final top-1, and the shares of values that saturated and vanished over the run, in parts per
    million, by kind of tensor; means over seeds."""
    rows = []
    for arm in run.arms:
        parts = []
        for seed in run.seeds:
            (strategy,) = run.results[arm, seed].strategies
            assert isinstance(strategy, LowBit)
            parts.append(strategy.statistics)
        frame = pd.concat(parts)
        mean, half = run.estimate("top-1", arm).interval
        row: dict[str, Any] = {"arm": arm, "top-1 [%]": mean, "±": half}
        for rate in ("saturated", "vanished"):
            for kind, label in {**KINDS, "": "all"}.items():
                part = frame[frame["kind"] == kind] if kind else frame
                row[f"{rate}: {label} [ppm]"] = 1e6 * (part[rate] * part["values"]).sum() / part["values"].sum()
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------- capacity


Kept = TypeVar("Kept", bound=Arithmetic)


class _Counting(Arithmetic):
    """Remembers what it keeps for backward, the weights' codes apart."""

    kept: dict[int, Tensor]
    weights: dict[int, Tensor]

    def round(self, values: Tensor, name: str, kind: Kind, stochastic: bool, gather: bool) -> Encoded:
        rounded = super().round(values, name, kind, stochastic, gather)
        if kind == "weight":
            self.weights[rounded.codes.untyped_storage()._cdata] = rounded.codes
        return rounded

    def keep(self, tensor: Tensor) -> Any:
        packed = super().keep(tensor)
        for part in (packed, getattr(packed, "codes", None), getattr(packed, "indices", None)):
            if isinstance(part, Tensor):
                self.kept[part.untyped_storage()._cdata] = part
        return packed


def _arithmetic(network: nn.Module, bits: int, kind: type[Kept]) -> Kept:
    settings = LowBit(bits=bits)
    store = Store({name: bits for name in (*KINDS, "master")}, settings.steering, settings.saturation,
                  settings.underflow, settings.headroom, settings.history, next(network.parameters()).device)
    return kind(store, network.named_parameters, (False, True), True, "emulated", None)


def kept_bytes(network: nn.Module, x: Tensor, bits: int | None) -> int:
    """Bytes that autograd holds for backward after a forward pass, without parameters, their codes and buffers.

    Every piece of memory is counted once, whoever refers to it.

    Args:
        network: in training mode.
        x: images.
        bits: None: plain float32.
    """
    # Tensors rather than numbers: memory that were freed would come back under the same number.
    own = {tensor.untyped_storage()._cdata: tensor for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}
    if bits is None:
        def count(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(x)
    else:
        counting = _arithmetic(network, bits, _Counting)
        counting.kept, counting.weights = kept, own
        with counting:
            network(x)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def _weight_bytes(network: nn.Module, bits: int | None) -> int:
    """Of the network as a user deploys it: weights of convolutions and linear layers as codes."""
    total = 0
    layers = {m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    rounding = None if bits is None else _arithmetic(network, bits, Arithmetic)
    for name, parameter in network.named_parameters():
        if rounding is not None and parameter in layers:
            codes = rounding.round(parameter, name, "weight", False, True).codes
            total += codes.nbytes + EXPONENT_BYTES
        else:
            total += parameter.nbytes
    return total


def _wire_bytes(network: nn.Module, bits: int | None) -> int:
    """Of one step's gradients as they travel."""
    parameters = dict(network.named_parameters())
    if bits is None:
        return sum(parameter.nbytes for parameter in parameters.values())
    wire = GradientWire(_arithmetic(network, bits, Arithmetic), True)
    for name, parameter in parameters.items():
        wire.encode(name, torch.randn_like(parameter))
    return sum(wire.sent.values())


def step_peak(build: Build, data: Dataset, bits: int | None, batch_size: int) -> float:
    """The most bytes allocated at once in a real step after the first, kernels' workspaces included.

    On a GPU by its allocator, on a CPU by `measure.peak_allocated`; the data set is left out.

    Args:
        data: as many training images as a step takes.
        bits: None: plain float32.
    """
    strategies = () if bits is None else LowBit(bits=bits)
    if data.train.labels.is_cuda:
        job = Fit(build, data, strategies, epochs=2, batch_size=batch_size)
        return [job.train_epoch()["cost/peak_memory_bytes"] for _ in range(2)][1]
    jobs: list[Fit] = []

    def prepare() -> None:
        jobs.append(Fit(build, data, strategies, epochs=2, batch_size=batch_size, measure=False))
        jobs[0].train_epoch()

    return measure.peak_allocated(prepare, lambda: jobs[0].train_epoch(), [])


def capacity(
    build: Build, shape: tuple[int, int, int], batch_size: int, bits: Sequence[int], peaks: bool = False,
    device: str = "cpu",
) -> pd.DataFrame:
    """Measured bytes [MB] in float32 and in b bits, and how many times less.

    Args:
        build: makes the network.
        shape: of an image, (channels, height, width).
        batch_size: images a step.
        bits: widths.
        peaks: also the most memory of a whole training step (SGD with momentum), by `step_peak`.

    Returns:
        Rows for weights, activations kept for backward, both, gradients on the wire, what stays float32 (gradients at
        the optimizer, momentum, and beside the b-bit weights the master weights), and the step's peak.
    """
    network = build().to(device).train()
    x = torch.randn(batch_size, *shape, device=device)
    widths = [None, *bits]
    by_what: dict[str, list[float]] = {
        "weights": [_weight_bytes(network, width) for width in widths],
        "activations kept": [kept_bytes(network, x, width) for width in widths],
    }
    by_what["both in memory"] = [sum(column) for column in zip(*by_what.values(), strict=True)]
    by_what["gradients on the wire"] = [_wire_bytes(network, width) for width in widths]
    weights = sum(parameter.nbytes for parameter in network.parameters())
    by_what["float32 still: gradients, momentum, master weights"] = [2 * weights, *[3 * weights] * len(bits)]
    del network, x
    if peaks:
        data = noise(batch_size, shape, device)
        by_what["peak of a training step"] = [step_peak(build, data, width, batch_size) for width in widths]
    rows = []
    for what, values in by_what.items():
        row: dict[str, Any] = {"what": what, "float32 [MB]": values[0] / 1e6}
        for width, value in zip(bits, values[1:], strict=True):
            row |= {f"{width} bits [MB]": value / 1e6, f"{width} bits, ×": values[0] / value}
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------- energy

PICOJOULES: dict[str | int, tuple[float, float]] = {
    "float32": (3.7, 0.9),
    16: (0.79, 0.1),
    8: (0.2, 0.1),
}
"""Of a multiplication and an addition at 45 nm: M. Horowitz, ISSCC 2014, Figure 1.1.9. Products add up in 32 bits. The
16-bit multiplication is interpolated between the published 8 (0.2) and 32 bits (3.1) by the power law through them."""
PICOJOULES_A_BYTE = 1300 / 8
"""Of DRAM, the same source: 1.3 to 2.6 nJ for 64 bits; the lower one."""


def energy(build: Build, shape: tuple[int, int, int], images: int, batch_size: int) -> pd.DataFrame:
    """Joules of an epoch by a model: operations times published energy an operation, tensors moved once.

    The optimizer counts: SGD with momentum takes two products and two sums a parameter in float32, reads gradient,
    momentum and master weight and writes the last two; in b bits the layers' weights are written once more, as codes.

    Args:
        build: makes the network.
        shape: of an image.
        images: of an epoch.
        batch_size: images a step.
    """
    network = build()
    costs = measure.layer_costs(network, shape, batch_size)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    steps = images // batch_size
    macs = sum(costs[f"{part}_macs"].sum() for part in ("forward", "dx", "dw")) * steps
    elements = sum(costs[f"{part}_tensors"].sum() for part in ("forward", "dx", "dw")) * steps
    rows = []
    for format_, (multiply, add) in PICOJOULES.items():
        width = 4 if isinstance(format_, str) else format_ / 8
        rows.append({
            "arithmetic": format_ if isinstance(format_, str) else f"{format_} bits",
            "operations [J]": macs * (multiply + add) * 1e-12,
            "memory traffic [J]": elements * width * PICOJOULES_A_BYTE * 1e-12,
            "update [J]": steps * parameters * 1e-12 * (
                2 * sum(PICOJOULES["float32"]) + (5 * 4 + (0 if width == 4 else width)) * PICOJOULES_A_BYTE),
        })
    table = pd.DataFrame(rows)
    table["together [J]"] = table[["operations [J]", "memory traffic [J]", "update [J]"]].sum(axis=1)
    table["saved [%]"] = 100 * (1 - table["together [J]"] / table["together [J]"].iloc[0])
    return table


def int8_products(build: Build, shape: tuple[int, int, int], batch_size: int, rounds: int) -> pd.DataFrame:
    """Seconds of each layer's forward product in integers, by torch._int_mm, against float32, measured by turns.

    A convolution's product is that of its columns, without their making.

    Args:
        build: makes the network.
        shape: of an image.
        batch_size: images a step.
        rounds: of timing, beside one that is not measured.

    Returns:
        A row a layer: `layer`, `product` (rows × inputs × outputs), `int8, times as fast` with `low` and `high`
        (median and quartiles, round by round); empty on a processor without int8 units.
    """
    rows: list[dict[str, Any]] = []
    if not has_units("int8", torch.device("cpu")):
        return pd.DataFrame(rows, columns=["layer", "product", "int8, times as fast", "low", "high"])
    network, sizes = build().eval(), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            module.register_forward_hook(lambda *seen, name=name: sizes.update({name: (seen[0], seen[2])}))
    with torch.no_grad():
        network(torch.zeros(1, *shape))
    for name, (module, y) in sizes.items():
        inputs, outputs = module.weight[0].numel(), len(module.weight)
        # The units take more than 16 rows, and multiples of 8 of the others.
        count = max(32, batch_size * y.numel() // outputs)
        a = torch.randint(-127, 128, (count, inputs + -inputs % 8), dtype=torch.int8)
        b = torch.randint(-127, 128, (inputs + -inputs % 8, outputs + -outputs % 8), dtype=torch.int8)
        ways: dict[str, Callable[[], object]] = {
            "int8": partial(torch._int_mm, a, b), "float32": partial(torch.mm, a.float(), b.float())}
        turns = measure.time_by_turns(ways, rounds)
        faster, low, high = turns["float32"].ratio(turns["int8"])
        rows.append({"layer": name, "product": f"{count} × {inputs} × {outputs}", "int8, times as fast": faster,
                     "low": low, "high": high})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------- peers


def peers(run: Comparison, baseline: str, steps: int) -> pd.DataFrame:
    """One row an arm: top-1, difference from the baseline, milliseconds a step (of the median epoch), relative."""
    rows = []
    def milliseconds(arm):
        return 1e3 * float(run.frame.query("arm == @arm")["time/epoch_seconds"].median()) / steps

    for arm in run.arms:
        mean, half = run.estimate("top-1", arm).interval
        off, spread = run.paired("top-1", arm, baseline).interval
        rows.append({"arm": arm, "top-1 [%]": mean, "±": half, "against float32 [points]": off, "± ": spread,
                     "ms a step": milliseconds(arm), "relative": milliseconds(arm) / milliseconds(baseline)})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------- what gathering costs


def gathering_cost(
    build: Build, shape: tuple[int, int, int], batch_size: int, rounds: int, bits: int = 8, device: str = "cpu"
) -> tuple[pd.DataFrame, tuple[float, float, float]]:
    """Seconds of a training step with the statistic, without it, and in plain float32, by turns.

    Args:
        build: makes the network.
        shape: of an image.
        batch_size: images a step.
        rounds: steps of each, beside two unmeasured ones.
        bits: width.

    Returns:
        (table, (median, lower, upper quartile) of what gathering and choosing take of a step).
    """
    data = noise(batch_size, shape, device)
    arms: dict[str, Sequence[Strategy]] = {
        "float32": (),
        "formats as they are": [LowBit(bits=bits, interval=10**6)],
        "with the statistic": [LowBit(bits=bits)],
    }
    warm = 2
    jobs = {name: Fit(build, data, arm, epochs=rounds + warm, batch_size=batch_size, lr=1e-3, measure=False)
            for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + warm):
        for name in jobs if turn % 2 == 0 else reversed(jobs):
            value = jobs[name].train_epoch()["time/epoch_seconds"]
            if turn >= warm:
                seconds[name].append(value)
    turns = {name: Turns(tuple(values)) for name, values in seconds.items()}
    rows = []
    for name, of_arm in turns.items():
        middle, low, high = of_arm.ratio(turns["float32"])
        rows.append({"step": name, "seconds": of_arm.median, "relative to float32": middle, "lower quartile": low,
                     "upper quartile": high})
    middle, low, high = turns["formats as they are"].ratio(turns["with the statistic"])
    return pd.DataFrame(rows), (1 - middle, 1 - high, 1 - low)


# ---------------------------------------------------------------------------------------- settings

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "saturation": {"r_max 0": {"saturation": 0.0}, "r_max 1e-3": {"saturation": 1e-3},
                   "r_max 1e-2": {"saturation": 1e-2}},
    "headroom": {"no headroom (the paper's)": {"headroom": 0}, "2 bits of headroom": {"headroom": 2}},
    "history": {"history of 1": {"history": 1}, "history of 64": {"history": 64}},
    "interval": {"every 10th step": {"interval": 10}},
    "rounding": {"gradients to the nearest": {"gradient_rounding": "nearest"},
                 "all stochastic": {"rounding": "stochastic"}},
    "master": {"16-bit master weights": {"master_bits": 16}, "no master weights": {"master_bits": None}},
    "accumulation": {"sums in float32": {"accumulation": "float32"}},
    "storage": {"normalisation and pooling keep floats": {"store_activations": False}},
}
"""One setting each away from the default; a width of None is that of the other tensors."""


def ablation_arms(names: Sequence[str], bits: int) -> dict[str, LowBit]:
    """Arms of a comparison: the default, and what differs from it in one setting."""
    arms = {"default": LowBit(bits=bits)}
    for name in names:
        for label, settings in ABLATIONS[name].items():
            filled = {key: bits if value is None else value for key, value in settings.items()}
            arms[label] = LowBit(bits=bits, **filled)
    return arms


def ablation_table(run: Comparison) -> pd.DataFrame:
    """One row an arm: top-1, difference from the default, seconds and peak memory relative to it."""
    table = accuracies({"": run}, "default").drop(columns="task")
    return table.rename(columns={"arithmetic": "setting", "against float32 [points]": "against the default [points]"})


STEERINGS = {
    "statistic (the paper's)": {"headroom": 0},
    "statistic, a bit of headroom (ours)": {"headroom": 1},
    "static: the first step's": {"steering": "static"},
    "largest value of this step": {"steering": "current-max"},
    "largest value of the last steps": {"steering": "delayed-max"},
}


def section_5(
    published: pd.DataFrame, capacities: Mapping[str, pd.DataFrame], energies: Mapping[str, pd.DataFrame],
    runs: Mapping[str, Comparison],
) -> pd.DataFrame:
    """The paper's table with what was measured beside it: the range over the networks.

    Args:
        published: the paper's, with columns `16 bits` and `8 bits`.
        capacities: `capacity` by network, indexed by `what`.
        energies: `energy` by network.
        runs: accuracy comparisons by network, with the baseline `float32`.
    """
    table = published.astype(object).copy()
    for bits in (16, 8):
        column = f"{bits} bits"
        fit_in = [capacity.loc[what, f"{column}, ×"] for capacity in capacities.values()
                  for what in ("both in memory", "gradients on the wire") if f"{column}, ×" in capacity]
        saved = [energy.set_index("arithmetic").loc[column, "saved [%]"] for energy in energies.values()]
        points = [run.paired("top-1", column, "float32").mean for run in runs.values() if column in run.arms]
        table[f"measured, {column}"] = [
            _range(fit_in) + " (memory, bus)", _range([1 / (1 - share / 100) for share in saved]) + " (estimate)",
            _range([-share for share in saved]) + " (estimate)", _range(points) + " points",
        ]
    return table


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in (min(values, default=np.nan), max(values, default=np.nan)))
    return low if low == high else f"{low} to {high}"
