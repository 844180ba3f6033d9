"""Low-bit training: fixed point of 2 to 16 bits, steered by the statistics of the iterations before.

A. Ike et al., "Technologies for Practical Application of Deep Learning", Fujitsu Sci. Tech. J. 53 (2017), section 5;
mechanism: T. Yamaguchi et al., "Training Deep Neural Networks in 8-bit Fixed Point with Dynamic Shared Exponent
Management", DATE 2021, and patent US 11551087.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, TypeVar

import pandas as pd
import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerlab import LayerMap, Preflight, Refused, Run, Strategy
from layerlab_low_bit.method.arithmetic import Arithmetic, Parameters
from layerlab_low_bit.method.coverage import coverage
from layerlab_low_bit.method.fixedpoint import decode, msb_histogram
from layerlab_low_bit.method.products import Units, find_units, warn_without_units
from layerlab_low_bit.method.store import Steering, Store

Rounding = Literal["nearest", "stochastic"]
Kind = TypeVar("Kind", bound=Arithmetic)


class LowBit(Strategy):
    """Train in dynamic fixed point: every tensor has one power-of-two scale, chosen from the iterations before.

    Operands of convolutions and linear layers (activations, weights, errors), what other layers keep for backward, and
    the parameters' gradients are integers of `bits` bits. While a tensor is rounded, the histogram of its values' most
    significant bits is gathered; those of the last iterations choose the format that it has in the next: the smallest
    scale at which at most a share `saturation` of its values is too large.
    """

    name: ClassVar[str] = "low-bit"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor"})

    bits: int = Field(8, ge=2, le=16)
    """Of activations and weights, the sign included."""
    gradient_bits: int | None = Field(None, ge=2, le=16)
    """Of errors and gradients; as `bits` unless set."""
    steering: Steering = "statistic"
    """What chooses formats: the `statistic`, the first step alone (`static`), the largest value of the tensor itself
    (`current-max`), or that of the last iterations (`delayed-max`)."""
    saturation: float = Field(1e-4, ge=0, lt=1)
    """r_max: at most this share of a tensor's non-zero values may have been too large for a format that is chosen."""
    underflow: float = Field(1.0, gt=0, le=1)
    """A tensor of which a larger share would round to zero gets twice the bits; 1: none does."""
    headroom: int | None = Field(None, ge=0, le=8)
    """Bits kept free above what earlier iterations chose, for values that grow from one to the next. The paper has
    none; None: one where a tensor has 8 bits or more, which costs nothing there, and none below."""
    history: int = Field(8, ge=1)
    """Iterations whose histograms the store keeps."""
    interval: int = Field(1, ge=1)
    """Gather, and choose formats, in every so-many-th step."""
    rounding: Rounding = "nearest"
    """Of activations and weights in training; in evaluation always to the nearest."""
    gradient_rounding: Rounding = "stochastic"
    """Of errors and gradients."""
    master_bits: int = 32
    """Of the weights that the optimizer updates: 32 float; 2 to 16 fixed point, rounded stochastically after each
    update."""
    accumulation: Literal["auto", "exact", "float32"] = "auto"
    """Sums of products: `exact` as in 32-bit integers, or `float32`; `auto`: exact up to 8 bits."""
    units: Units = "auto"
    """Where products run: `int8` (torch._int_mm), `fp8` (torch._scaled_mm; up to 5 bits), or `emulated` in floating
    point with the same bits; `auto`: int8 where the device has such units."""
    store_activations: bool = True
    """Keep in b bits also what activation functions, normalisations and poolings need in backward."""

    _store: Store = PrivateAttr()
    _arithmetic: Arithmetic | None = PrivateAttr(None)
    _wire: GradientWire | None = PrivateAttr(None)
    _updating: tuple[torch.optim.Optimizer, RemovableHandle] | None = PrivateAttr(None)

    @field_validator("master_bits")
    @classmethod
    def _float_or_fixed(cls, value: int) -> int:
        if value != 32 and not 2 <= value <= 16:
            raise ValueError("must be 32 (float) or 2 to 16 (fixed point)")
        return value

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Which layers multiply in fixed point, found by one step and one more pass on copies.

        Args:
            network: the user's.
            example: images as it takes them, (batch, channels, height, width).

        Raises:
            Refused: as `on_fit_start`.
        """
        said = self.rehearse(network, example)
        return coverage(network, example, self._arithmetic_of, self.bits if self.store_activations else None, said)

    def on_fit_start(self, run: Run) -> None:
        """Put fixed point in the place of autocast.

        Raises:
            Refused: the run has a precision of its own; units that do not hold the bits.
        """
        if run.autocast is not nullcontext:
            raise Refused(
                "low-bit and another precision both decide what forward computes in; leave precision at float32."
            )
        if self.units == "fp8" and max(self.bits, self.gradient_bits or 0) > 5:
            raise Refused("low-bit: units='fp8' hold codes of up to 5 bits exactly; set bits=5, or units='int8'.")
        if self.units in ("int8", "fp8"):
            warn_without_units(self.units, run.device, "leave units at 'auto'")
        arithmetic = self._arithmetic_of(
            lambda: (*run.training_model.named_parameters(), *run.model.named_parameters()), run.device, Arithmetic)
        self._arithmetic, self._store = arithmetic, arithmetic.store
        run.autocast = lambda: arithmetic
        run.wire = self._wire = GradientWire(arithmetic, self.gradient_rounding == "stochastic")

    def _arithmetic_of(
        self, parameters: Parameters, device: torch.device, kind: type[Kind]
    ) -> Kind:
        """Fixed point of a kind with these settings and an empty store, for networks with these parameters."""
        errors = self.gradient_bits or self.bits
        widths = {"activation": self.bits, "weight": self.bits, "error": errors, "gradient": errors,
                  "master": self.master_bits}
        store = Store(
            widths, self.steering, self.saturation, self.underflow, self.headroom, self.history, device)
        return kind(
            store, parameters, (self.rounding == "stochastic", self.gradient_rounding == "stochastic"),
            self.store_activations, find_units(self.units, device),
            {"auto": None, "exact": True, "float32": False}[self.accumulation],
        )

    def on_epoch_start(self, run: Run) -> None:
        """Follow the optimizer, if another strategy has put a new one there."""
        self._gather(run.step)
        if self.master_bits < 32 and (self._updating is None or self._updating[0] is not run.optimizer):
            self._leave_optimizer()
            handle = run.optimizer.register_step_post_hook(lambda *_: self._round_masters(run))
            self._updating = run.optimizer, handle

    def on_after_backward(self, run: Run) -> None:
        """Round the gradients, unless they came over the wire; then choose the next step's formats.

        Raises:
            Diverged: NaN or Inf in a tensor of this step, naming the layer.
        """
        wire, arithmetic, store = self._wire, self._arithmetic, self._store
        assert wire is not None
        assert arithmetic is not None
        sent = 0
        for name, parameter in run.training_model.named_parameters():
            if parameter.grad is None:
                continue
            if name in wire.sent:
                wire.gather(name, parameter.grad)
            else:
                sent += wire.round_in_place(name, parameter.grad)
        sent += sum(wire.sent.values())
        wire.sent.clear()
        if arithmetic.gathering:
            store.update(run.step)
        self._gather(run.step + 1)
        run.log("low-bit/wire_bytes", sent)

    def on_epoch_end(self, run: Run) -> None:
        """Log the epoch's rates."""
        store = self._store
        store.end_epoch(run.epoch)
        frame = store.frame(last=True)
        for kind, part in frame.groupby("kind"):
            for rate in ("saturated", "vanished"):
                share = (part[rate] * part["values"]).sum() / max(1, part["values"].sum())
                run.log(f"low-bit/{rate}_{kind}", share)
        run.log("low-bit/tensors", len(frame))
        run.log("low-bit/tensors_beyond_saturation", int((frame["saturated"] > self.saturation).sum()))
        run.log("low-bit/tensors_beyond_underflow", int((frame["vanished"] > self.underflow).sum()))
        run.log("low-bit/mean_bits", float(frame["bits"].mean()) if len(frame) else self.bits)

    def on_fit_end(self, run: Run) -> None:
        """Leave a plain network whose layers' weights are those b-bit numbers, but for those that the user froze."""
        self._leave_optimizer()
        arithmetic = self._arithmetic
        assert arithmetic is not None
        kept = {parameter for module in run.frozen_by_user for parameter in module.parameters(recurse=False)}
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if self._store.known(name) is not None and parameter not in kept:
                    arithmetic.round_in_place(parameter, name, "weight", False, False)
        run.autocast, run.wire = nullcontext, None
        self._arithmetic = self._wire = None

    def state_dict(self) -> dict[str, Any]:
        """The store."""
        return self._store.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._store.load_state_dict(state)

    @property
    def statistics(self) -> pd.DataFrame:
        """One row an epoch and tensor: its format, and the shares of values that saturated and vanished."""
        return self._store.frame()

    def layer_maps(self, history: Sequence[Mapping[str, Any]]) -> dict[str, LayerMap]:
        """Where the highest bit of each tensor's format was at the end of each epoch, a map a kind of tensor."""
        frame = self.statistics
        maps: dict[str, LayerMap] = {}
        if frame.empty:
            return maps
        weights = frame.loc[frame["kind"] == "weight", "tensor"].unique()
        layers = [name.removesuffix("weight") for name in weights]

        def place(tensor: str) -> tuple[int, bool]:
            # Errors are met in backward and gradients parameter by parameter; an input may be met after its layer.
            found = [index for index, layer in enumerate(layers) if tensor.startswith(layer)]
            return (found[-1] if found else len(layers), not tensor.endswith(".input"))

        for kind, part in frame.groupby("kind", sort=False):
            names = sorted(part["tensor"].unique(), key=place)
            table = part.pivot(index="tensor", columns="epoch", values="position").loc[names]
            maps[f"{kind} formats"] = LayerMap(table, "position of the highest bit")
        return maps

    @property
    def histograms(self) -> pd.DataFrame:
        """Of the last iterations: tensors as rows, positions of the most significant bit as columns."""
        return self._store.histograms

    def _gather(self, step: int) -> None:
        assert self._arithmetic is not None
        self._arithmetic.gathering = step % self.interval == 0

    def _round_masters(self, run: Run) -> None:
        arithmetic = self._arithmetic
        assert arithmetic is not None
        with torch.no_grad():
            for name, parameter in run.training_model.named_parameters():
                if parameter.grad is not None:
                    arithmetic.round_in_place(parameter, f"{name}.master", "master", True, arithmetic.gathering)

    def _leave_optimizer(self) -> None:
        if self._updating is not None:
            self._updating[1].remove()
        self._updating = None


EXPONENT_BYTES = 1
"""What a tensor's scale takes on the wire and in memory."""


class GradientWire:
    """Gradients as they travel: see `layerlab.Wire`.

    The formats come from gradients after the exchange, which all workers share, so that all send the same exponent.

    Args:
        arithmetic: rounds.
        stochastic: how.
    """

    def __init__(self, arithmetic: Arithmetic, stochastic: bool) -> None:
        self._arithmetic, self._stochastic = arithmetic, stochastic
        self.sent: dict[str, int] = {}

    def encode(self, name: str, gradient: Tensor) -> tuple[Tensor, int]:
        """(codes, exponent) of a parameter's gradient: int8 up to 8 bits, else int16."""
        rounded = self._arithmetic.round(gradient, f"{name}.gradient", "gradient", self._stochastic, False)
        self.sent[name] = rounded.codes.nbytes + EXPONENT_BYTES
        return rounded.codes, rounded.exponent

    def decode(self, codes: Tensor, exponent: int) -> Tensor:
        """The gradient that the codes stand for, float32."""
        return decode(codes, exponent)

    def round_in_place(self, name: str, gradient: Tensor) -> int:
        """Round a parameter's gradient as if it were sent, and take its statistic; returns the bytes on the wire."""
        arithmetic = self._arithmetic
        return EXPONENT_BYTES + arithmetic.round_in_place(
            gradient, f"{name}.gradient", "gradient", self._stochastic, arithmetic.gathering)

    def gather(self, name: str, gradient: Tensor) -> None:
        """Take the statistic of a gradient that came over the wire."""
        if self._arithmetic.gathering:
            store = self._arithmetic.store
            msb_histogram(gradient, store.row(store.find(f"{name}.gradient", "gradient")))
