"""The store of statistics, and how they choose the formats of the next iteration."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from layerlab import Diverged
from layerlab_low_bit.method.fixedpoint import BIAS, BINS, LOWEST, NOT_FINITE

Steering = Literal["statistic", "static", "current-max", "delayed-max"]
# `error`: gradient of a layer's output; `gradient`: of a parameter; `master`: the weights that are updated.
Kind = Literal["activation", "weight", "error", "gradient", "master"]
# A bit of headroom costs no accuracy from this width on; at 4 bits it costs ten points (LeNet on MNIST).
SPARE_ONE = 8


def choose(histograms: Tensor, saturation: float) -> list[int | None]:
    """The smallest position at which at most a share `saturation` of the non-zero values is too large.

    Args:
        histograms: int64, (tensors, 256).
        saturation: r_max; at 0 the position of the largest value.

    Returns:
        A position each; None where no value was other than zero.
    """
    counts = histograms[:, 1:NOT_FINITE]
    values = counts.sum(1)
    above = values[:, None] - counts.cumsum(1)
    # argmax of a boolean row is its first True.
    bins = (above <= saturation * values[:, None]).to(torch.uint8).argmax(1) + 1
    return [max(LOWEST, bin - BIAS) if seen else None
            for bin, seen in zip(bins.tolist(), values.tolist(), strict=True)]


def rates(histograms: Tensor, positions: list[int], bits: list[int]) -> Tensor:
    """What formats did to values: (tensors, 3), the numbers of saturated, vanished and all non-zero values.

    Saturated: |x| >= 2**(p+1). Vanished: |x| below half the lowest bit's value.
    """
    counts = histograms[:, 1:NOT_FINITE]
    places = torch.arange(1, NOT_FINITE, device=counts.device) - BIAS
    p = torch.tensor(positions, device=counts.device)[:, None]
    b = torch.tensor(bits, device=counts.device)[:, None]
    return torch.stack([(counts * (places > p)).sum(1), (counts * (places <= p - b)).sum(1), counts.sum(1)], 1)


class Store:
    """Histograms of the last iterations, tensor by tensor, and the formats that they chose.

    Args:
        bits: of every tensor of each kind.
        steering: see `LowBit.steering`.
        saturation, underflow: bounds, as shares of a tensor's non-zero values.
        headroom: bits kept free above what the last iterations chose; None: one from `SPARE_ONE` bits on.
        history: iterations kept.
        device: where the histograms are.
    """

    def __init__(
        self, bits: dict[str, int], steering: Steering, saturation: float, underflow: float, headroom: int | None,
        history: int, device: torch.device,
    ) -> None:
        self.steering, self.saturation, self.underflow, self._headroom = steering, saturation, underflow, headroom
        self._kind_bits = bits
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.bits: list[int] = []
        self.positions: list[int | None] = []
        self.updates = 0
        self._index: dict[str, int] = {}
        # Of the window's iterations; of this one; the window's sum; histograms that are not in the rates yet; rates.
        self._room = {
            "window": torch.zeros(history, 0, BINS, dtype=torch.int64, device=device),
            **{table: torch.zeros(0, BINS, dtype=torch.int64, device=device) for table in ("now", "sum", "since")},
            "rates": torch.zeros(0, 3, dtype=torch.int64, device=device),
        }
        self._rows: tuple[Tensor, ...] = ()
        self._fit_tables()
        # The (positions, bits) that all values had whose histograms are not in the rates yet.
        self._used: tuple[list[int | None], list[int]] = ([], [])
        self.epochs: list[dict[str, Any]] = []

    def find(self, name: str, kind: Kind) -> int:
        """The number of a tensor, new or known."""
        index = self._index.get(name)
        if index is None:
            index = self._index[name] = len(self.names)
            self.names.append(name)
            self.kinds.append(kind)
            self.bits.append(self._kind_bits[kind])
            self.positions.append(None)
            self._fit_tables()
        return index

    def _fit_tables(self) -> None:
        """A row for each tensor in all tables; room is doubled, so that a row is not copied for each one after it."""
        count, room = len(self.names), len(self._room["now"])
        if count > room:
            for name, table in self._room.items():
                dim = 1 if name == "window" else 0
                shape = list(table.shape)
                shape[dim] = max(count - room, room)
                self._room[name] = torch.cat([table, table.new_zeros(shape)], dim)
            self._rows = self._room["now"].unbind()
        self._window = self._room["window"][:, :count]
        self._now, self._sum, self._since, self._rates = (
            self._room[table][:count] for table in ("now", "sum", "since", "rates"))

    def width(self, kind: Kind) -> int:
        """Bits of a kind."""
        return self._kind_bits[kind]

    def headroom(self, index: int) -> int:
        """Bits kept free above what is chosen for a tensor."""
        if self._headroom is not None:
            return self._headroom
        return 1 if self.bits[index] >= SPARE_ONE else 0

    def known(self, name: str) -> int | None:
        """The number of a tensor that was seen before."""
        return self._index.get(name)

    def row(self, index: int) -> Tensor:
        """The histogram of this iteration, to be added to."""
        return self._rows[index]

    def update(self, step: int) -> None:
        """Take this iteration's histograms into the store and choose the next formats.

        Raises:
            Diverged: a tensor had NaN or Inf; the first one in the order of the computation is named.
        """
        now = self._now
        if now[:, NOT_FINITE].any():
            bad = now[:, NOT_FINITE].nonzero().flatten().tolist()
            count = int(now[bad[0], NOT_FINITE])
            others = f", and {len(bad) - 1} tensors after it" if len(bad) > 1 else ""
            raise not_finite(self.names[bad[0]], f"{count} values that are NaN or Inf in step {step + 1}{others}")
        if (self.positions, self.bits) != self._used:
            self._settle_rates()
            self._used = list(self.positions), list(self.bits)
        self._since += now
        oldest = self._window[self.updates % len(self._window)]
        self._sum.sub_(oldest).add_(now)
        oldest.copy_(now)
        self.updates += 1
        if self.steering == "statistic":
            chosen = choose(self._sum, self.saturation)
        elif self.steering == "delayed-max":
            chosen = choose(self._sum, 0.0)
        else:
            chosen = choose(now, 0.0)
        for index, position in enumerate(chosen):
            if position is not None and (self.steering != "static" or self.positions[index] is None):
                self.positions[index] = position + (0 if self.steering == "current-max" else self.headroom(index))
        if self.underflow < 1:
            self._widen()
        now.zero_()

    def _settle_rates(self) -> None:
        """Count what formats did to the values that they had: once for as long as no format changes."""
        positions, bits = self._used
        used = [LOWEST if position is None else position for position in positions]
        # Tensors that are new have no values yet.
        self._rates[: len(used)] += rates(self._since[: len(used)], used, bits)
        self._since.zero_()

    def _widen(self) -> None:
        """Give a tensor of which too much would vanish at its own width twice the bits, for the next iteration."""
        own = [self._kind_bits[kind] for kind in self.kinds]
        positions = [LOWEST if position is None else position for position in self.positions]
        _, vanished, values = rates(self._sum, positions, own).unbind(1)
        beyond = (vanished > self.underflow * values).tolist()
        self.bits = [min(16, 2 * bits) if wide else bits for wide, bits in zip(beyond, own, strict=True)]

    def end_epoch(self, epoch: int) -> None:
        """Keep this epoch's rates and last formats, tensor by tensor, and begin the next one's."""
        self._settle_rates()
        self.epochs.append({
            "epoch": epoch, "names": list(self.names), "kinds": list(self.kinds), "bits": list(self.bits),
            "positions": [LOWEST if p is None else p for p in self.positions], "rates": self._rates.tolist(),
        })
        self._rates.zero_()

    def frame(self, last: bool = False) -> pd.DataFrame:
        """One row an epoch and tensor: `kind`, `bits`, `position`, and the shares `saturated` and `vanished`.

        Args:
            last: of the last epoch only.
        """
        rows = []
        for record in self.epochs[-1:] if last else self.epochs:
            for name, kind, bits, position, (saturated, vanished, values) in zip(
                record["names"], record["kinds"], record["bits"], record["positions"], record["rates"], strict=True
            ):
                rows.append({
                    "epoch": record["epoch"], "tensor": name, "kind": kind, "bits": bits, "position": position,
                    "values": values, "saturated": saturated / max(1, values), "vanished": vanished / max(1, values),
                })
        return pd.DataFrame(rows)

    @property
    def histograms(self) -> pd.DataFrame:
        """Counts of the kept iterations: tensors as rows, positions from -126 to 127 as columns."""
        table = self._sum[:, 1:NOT_FINITE].cpu().numpy()
        return pd.DataFrame(table, index=self.names, columns=range(1 - BIAS, NOT_FINITE - BIAS))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides about later formats, and the epochs' records."""
        self._settle_rates()
        return {
            "names": self.names, "kinds": self.kinds, "bits": self.bits, "positions": self.positions,
            "updates": self.updates, "window": self._window.clone(), "now": self._now.clone(),
            "rates": self._rates.clone(), "epochs": self.epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        device = self._window.device
        self.names, self.kinds = list(state["names"]), list(state["kinds"])
        self.bits, self.positions = list(state["bits"]), list(state["positions"])
        self.updates, self.epochs = state["updates"], list(state["epochs"])
        self._index = {name: index for index, name in enumerate(self.names)}
        self._room = {name: state[name].to(device) for name in ("window", "now", "rates")}
        self._room |= {"sum": self._room["window"].sum(0), "since": torch.zeros_like(self._room["now"])}
        self._rows = self._room["now"].unbind()
        self._used = [], []
        self._fit_tables()


def not_finite(tensor: str, what: str) -> Diverged:
    """The error that names the tensor."""
    layer, _, part = tensor.rpartition(".")
    return Diverged(
        f"low-bit: layer {layer or part!r} ({part}) has {what}; fixed point would hide it by saturation. Lower the "
        "learning rate, or look at that layer."
    )
