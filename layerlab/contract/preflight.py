"""What a strategy says before the first step: on which layers it acts, what it leaves out, what it can save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from layerlab.show.table import Table

FROZEN = "frozen before the fit"
# Names in a row of the table.
SHOWN = 8
NOT_TOUCHED = "the method does not act on it"


@dataclass(frozen=True)
class Preflight:
    """What a strategy can do with a network, found before the first step.

    Attributes:
        covered: names of the layers, or of single parameters, on which the method acts.
        left_out: name of a layer or parameter → why the method does not act on it.
        saves: what is saved at most, as shares, such as `forward FLOPs` or `peak memory`; only what is computed.
        notes: sentences on anything else that a user should know.

    Example:
        >>> from layerlab import Preflight, build_model
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> found = Preflight.of(network, ["fc1"], saves={"backward FLOPs": 0.25})
        >>> print(found.table.text(width=80))
                        layers
        acts on 1 of 3  fc1
        leaves out 2    fc2, output: the method does not act on it
        saves at most   of backward FLOPs 25.0 %
    """

    covered: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    saves: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        network: nn.Module,
        covered: Iterable[str] | None = None,
        left_out: Mapping[str, str] | None = None,
        *,
        otherwise: str = NOT_TOUCHED,
        saves: Mapping[str, float] | None = None,
        notes: Iterable[str] = (),
    ) -> Preflight:
        """A pre-flight that leaves no layer of a network unmentioned.

        Args:
            network: the user's; a layer that is frozen in it is left out, `covered` or not.
            covered: names of layers or parameters. Default: every layer that holds parameters.
            left_out: name → why, where there is more to say than `otherwise`.
            otherwise: why the layers with parameters that neither names are left out.
            saves, notes: as the attributes.
        """
        layers, reasons = parameter_layers(network), dict(left_out or {})
        names = list(dict.fromkeys(layers if covered is None else covered))
        silent = set(unmentioned(network, (*names, *reasons)))
        for name, module in layers.items():
            if all(not parameter.requires_grad for parameter in module.parameters(recurse=False)):
                reasons[name] = FROZEN
            elif name in silent:
                reasons[name] = otherwise
        acts = tuple(name for name in names if name not in reasons)
        return cls(acts, reasons, dict(saves or {}), tuple(notes))

    @property
    def table(self) -> Table:
        """One row each for what is covered, for each reason to leave something out, and for each saving."""
        count = len(self.covered) + len(self.left_out)
        rows = [(f"acts on {len(self.covered)} of {count}", listed(self.covered))]
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            by_reason.setdefault(why, []).append(name)
        rows += [(f"leaves out {len(names)}", f"{listed(names)}: {why}") for why, names in by_reason.items()]
        rows += [("saves at most", f"of {what} {100 * share:.1f} %") for what, share in self.saves.items()]
        return Table(("", "layers"), rows, notes=self.notes)

    def __repr__(self) -> str:
        return self.table.text()

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def listed(names: Sequence[str]) -> str:
    """Names in a row; of many the first ones and the last."""
    shown = [name or "the network's own" for name in names]
    if len(shown) > SHOWN:
        shown[SHOWN - 2 : -1] = ["…"]
    return ", ".join(shown) if shown else "none"


def parameter_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Each module that holds parameters of its own, once, by the first of its names; the network itself is ''."""
    return {
        name: module for name, module in network.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def unmentioned(network: nn.Module, names: Iterable[str]) -> list[str]:
    """The layers with parameters that `names` do not have under any of their names, nor all their parameters."""
    given = set(names)
    modules = {module for name, module in network.named_modules(remove_duplicate=False) if name in given}
    named = {parameter for name, parameter in network.named_parameters(remove_duplicate=False) if name in given}
    return [name for name, module in parameter_layers(network).items()
            if module not in modules and not named.issuperset(module.parameters(recurse=False))]
