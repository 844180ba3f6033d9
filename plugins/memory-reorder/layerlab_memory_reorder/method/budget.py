"""A training step within a number of bytes: what to keep, what to compute again, chosen before the first step.

The network is cut into stretches (`method.program`). Each one keeps what backward needs; or keeps its input and the
results of its convolutions and linear layers, and computes the rest again, which is nearly free; or computes some of
those layers again as well; and neighbours may be computed again together, without the tensor between them. Peaks of all
these schedules follow from three dry steps and, for what kernels take for themselves, one real step of the schedule
that needs least. Dynamic programming over the stretches finds the schedule of the least time under a limit.

Limits come from a ladder whose rungs lie half a per cent apart. A budget takes the highest rung within it whose
schedule keeps the budget in a real step on a copy. A larger budget has all the rungs of a smaller one, so that it never
costs more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from layerlab import LayerlabError, Refused, first_line
from layerlab_memory_reorder.method.executor import Takeover, reorders
from layerlab_memory_reorder.method.program import Program, Sizes, examine, meta_copy, stretches
from layerlab_memory_reorder.method.recording import Interval, Mark, recorder
from layerlab_memory_reorder.method.replay import Group, Schedule

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Forward and loss of a batch: (network, x, y) → scalar."""
# Backward takes about twice a forward pass.
STEP_OF_FORWARD = 3.0


@dataclass(frozen=True)
class Choice:
    """A schedule that keeps a budget.

    Attributes:
        schedule: for `Takeover`.
        forecast: bytes of the step's peak, from a dry run and what kernels took for themselves in another step.
        measured: bytes of the peak of a real step on a copy.
        time: forecast of the step's time, in multiples of the step that computes nothing again.
    """

    schedule: Schedule
    forecast: int
    measured: int
    time: float


@dataclass
class Trial:
    """Steps on a network that may be used up, with the peaks of their parts.

    Attributes:
        model, optimizer: changed by each step.
        x, y: a batch.
        loss: forward and loss.
        settings: of `Takeover`, but for its schedule.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor
    loss: Loss
    settings: Mapping[str, Any]

    def intervals(self, schedule: Schedule) -> dict[str, Interval]:
        """A step's parts by name (`forward 3`, `backward 3`, `update`), after a step that makes the optimizer's state.

        Raises:
            Refused: as `Takeover`.
        """
        marking: list[Mark] = [_unmarked]
        takeover = Takeover(self.model, self.optimizer, self.x[:2], schedule=schedule,
                            marks=lambda phase, number: marking[0](f"{phase} {number}"), **self.settings)

        def step(mark: Mark) -> None:
            marking[0] = mark
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.model, self.x, self.y).backward()
            mark("update")
            takeover.finish()
            marking[0] = _unmarked

        # What the first step of all makes stays.
        prepare: Callable[[], object] = _nothing if self.optimizer.state else lambda: step(_unmarked)
        state = [value for each in self.optimizer.state.values() for value in each.values()]
        before = [each for each in (self.x, self.y, *self.model.parameters(), *self.model.buffers(), *state)
                  if isinstance(each, Tensor) and each.device == self.x.device]
        with takeover:
            found = recorder(self.x.device, before)(prepare, step)
        merged: dict[str, Interval] = {}
        for each in found:
            # A stretch with several results is told of each one's gradient.
            known = merged.get(each.label, each)
            merged[each.label] = Interval(each.label, known.start, max(known.peak, each.peak))
        return merged


def _unmarked(_: str) -> None:
    pass


def _nothing() -> None:
    pass


class _Option(NamedTuple):
    """A group as one of the ways to do its stretches.

    Attributes:
        group: its stretches.
        kept: bytes that it keeps from its forward to its backward.
        forward: peaks of its stretches' forward, in bytes above what is allocated where the group begins.
        backward: peak of its backward, likewise.
        cost: of what it computes again, in bytes moved.
    """

    group: Group
    kept: int
    forward: tuple[int, ...]
    backward: int
    cost: float


# Stretches that are computed again together at most; with more of them, their own activations are the peak.
TOGETHER = 12
# Limits on cost per byte, as quantiles over all layers, up to which layers are computed again.
QUANTILES = 6
# Steps from the bytes that are always there to plain training's peak in which the search counts.
GRID = 4096
RUNG = 0.995


class Composition:
    """Peaks of every schedule, put together from the parts of three dry steps.

    Args:
        program: on the meta device.
        sizes: of its batch.
        dry: runs a dry step, see `Trial.intervals`.
        by_channels: of its schedules.

    Attributes:
        extra: bytes that kernels take for themselves, by the names of a step's parts; set them before a search.
    """

    def __init__(
        self, program: Program, sizes: Sizes, dry: Callable[[Schedule], dict[str, Interval]], by_channels: bool
    ) -> None:
        self.program, self.sizes, self.by_channels = program, sizes, by_channels
        self.borders = stretches(program, sizes)
        self.extra: dict[str, int] = {}
        nodes = program.nodes
        self._inside = [nodes[start:stop] for start, stop in self.borders]
        self._crossing = [self._storages(program.crossing(start)) for start, _ in self.borders] + [{}]
        self._layers = [{name for node in inside if (name := self._layer(node))} for inside in self._inside]
        changed = {index for index, _ in sizes.changed}
        self._overwriting = {node for index, node in enumerate(nodes) if index in changed}
        self._results = [self._keepable(inside) for inside in self._inside]
        plain, cheap, least = (dry(self.schedule(groups)) for groups in (
            self.alone(False), self.alone(True), self.alone(True, float("inf"))))
        self._plain, self._again = plain, (cheap, least)
        self.base = plain["forward 0"].start
        self._options = [self._from(first) for first in range(len(self.borders))]

    def schedule(self, groups: Sequence[Group]) -> Schedule:
        """The groups as a schedule of this program."""
        names = tuple(node.name for node in self.program.nodes)
        return Schedule(names, tuple(self.borders), tuple(groups), self.by_channels)

    def alone(self, again: bool, limit: float = -1.0) -> tuple[Group, ...]:
        """Each stretch by itself, all in the same manner; layers up to a cost per byte are computed again."""
        return tuple(Group(index, index, again, self._dropped(index, limit) if again else frozenset())
                     for index in range(len(self.borders)))

    def parts(self, groups: Sequence[Group]) -> list[int]:
        """Peaks of a schedule's parts, kernels' own memory included: update, then forward and backward by group."""
        now = self.base
        found = [self._plain["update"].peak + self.extra.get("update", 0)]
        for group in groups:
            option = self._option(group)
            found.append(now + self._needs(option))
            now += option.kept
        return found

    def cost(self, groups: Sequence[Group]) -> float:
        """What computing again takes, as a share of the forward pass."""
        return sum(self._option(group).cost for group in groups) / sum(self.sizes.cost.values())

    def solve(self, limit: int) -> tuple[Group, ...] | None:
        """The groups of the least cost whose peak is within a limit; None where there are none.

        Bytes kept are rounded up to a grid that does not depend on the limit, so that a larger limit allows all that a
        smaller one allows.
        """
        if self._plain["update"].peak + self.extra.get("update", 0) > limit:
            return None
        grid = max(1, (max(each.peak for each in self._plain.values()) - self.base) // GRID)
        # Where a stretch begins: bytes kept by those before it, on the grid → (cost, the option before, its bytes).
        reached: list[dict[int, tuple[float, _Option | None, int]]] = [{} for _ in range(len(self.borders) + 1)]
        reached[0][0] = (0.0, None, 0)
        for first, options in enumerate(self._options):
            states = _best(reached[first])
            for option in options:
                room = limit - self.base - self._needs(option)
                steps = -(-option.kept // grid)
                behind = reached[option.group.last + 1]
                for kept, cost in states:
                    if kept * grid > room:
                        break
                    total, known = cost + option.cost, behind.get(kept + steps)
                    if known is None or total < known[0]:
                        behind[kept + steps] = (total, option, kept)
        if not reached[-1]:
            return None
        kept = min(reached[-1], key=lambda each: (reached[-1][each][0], each))
        groups: list[Group] = []
        place = len(self.borders)
        while place:
            _, last, kept = reached[place][kept]
            assert last is not None
            groups.append(last.group)
            place = last.group.first
        return tuple(reversed(groups))

    def _needs(self, option: _Option) -> int:
        """The peak of an option's parts, above what is allocated where it begins, with what kernels take."""
        first, last = option.group.first, option.group.last
        forward = max(peak + self.extra.get(f"forward {index}", 0) for index, peak in enumerate(option.forward, first))
        extra = max(self.extra.get(f"backward {index}", 0) for index in range(first, last + 1))
        return max(forward, option.backward + extra)

    def _option(self, group: Group) -> _Option:
        return next(each for each in self._options[group.first] if each.group == group)

    def _from(self, first: int) -> list[_Option]:
        """The options that begin with a stretch."""
        found = [self._kept_option(first)]
        for limit in self._limits():
            kept: dict[int, int] = {}
            dropped: frozenset[str] = frozenset()
            cost, inner, backward, gathered = 0.0, 0, 0, 0
            forward: list[int] = []
            for index in range(first, min(first + TOGETHER, len(self.borders))):
                dropped |= self._dropped(index, limit)
                results = {name: stored for name, stored in self._results[index].items() if name not in dropped}
                for stored in results.values():
                    kept |= stored
                forward.append(gathered + self._above("forward", index, self._again[1:]))
                gathered += sum(size for stored in results.values() for size in stored.values())
                both = (self._plain, *self._again)
                backward = max(backward, inner + self._above("backward", index, both))
                inner += self._kept_plainly(index)
                cost += sum(self.sizes.cost[node] for node in self._inside[index] if self._layer(node) not in results)
                held = {key: size for key, size in (kept | self._crossing[index + 1]).items()
                        if key not in self._crossing[first]}
                group = Group(first, index, True, dropped)
                if not self.program.sound(self.borders[first][0], self.borders[index][1]):
                    continue
                found.append(_Option(group, sum(held.values()), tuple(forward), backward, cost))
        return list({each.group: each for each in found}.values())

    def _kept_option(self, index: int) -> _Option:
        forward = self._above("forward", index, (self._plain,))
        backward = self._above("backward", index, (self._plain,))
        return _Option(Group(index, index), self._kept_plainly(index), (forward,), backward, 0.0)

    def _kept_plainly(self, index: int) -> int:
        if index + 1 == len(self.borders):
            return 0
        return self._plain[f"forward {index + 1}"].start - self._plain[f"forward {index}"].start

    def _above(self, phase: str, index: int, steps: Sequence[dict[str, Interval]]) -> int:
        """The peak of a stretch's part in some of the dry steps, above the start of its forward there."""
        return max(step[f"{phase} {index}"].peak - step[f"forward {index}"].start for step in steps
                   if f"{phase} {index}" in step)

    def _layer(self, node: fx.Node) -> str:
        """The name of a convolution or linear layer that this package runs; empty for another operation."""
        if node.op != "call_module":
            return ""
        name = str(node.target)
        return name if reorders(self.program.modules[name]) else ""

    def _storages(self, nodes: Sequence[fx.Node]) -> dict[int, int]:
        return dict(self.sizes.storages[node] for node in nodes if node in self.sizes.storages)

    def _keepable(self, nodes: Sequence[fx.Node]) -> dict[str, dict[int, int]]:
        """Layer → storages of its results, if nothing writes over them."""
        found: dict[str, dict[int, int]] = {}
        for node in nodes:
            if (name := self._layer(node)) and node in self.sizes.storages:
                found.setdefault(name, {}).update([self.sizes.storages[node]])
        overwritten = {self._layer(each) for node in self._overwriting for each in node.all_input_nodes}
        return {name: stored for name, stored in found.items() if name not in overwritten}

    def _dropped(self, index: int, limit: float) -> frozenset[str]:
        """A stretch's layers whose results are not kept up to a cost per byte."""
        return frozenset(name for name in self._layers[index]
                         if name not in self._results[index] or self._ratio(index, name) <= limit)

    def _ratio(self, index: int, name: str) -> float:
        cost = sum(self.sizes.cost[node] for node in self._inside[index] if self._layer(node) == name)
        return cost / max(1, sum(self._results[index][name].values()))

    def _limits(self) -> list[float]:
        """Costs per byte up to which layers are computed again: none, quantiles over all layers, all."""
        ratios = sorted(self._ratio(index, name) for index, named in enumerate(self._results) for name in named)
        inner = [ratios[len(ratios) * part // QUANTILES] for part in range(1, QUANTILES)] if ratios else []
        return list(dict.fromkeys([-1.0, *inner, float("inf")]))


def _best(states: Mapping[int, tuple[float, _Option | None, int]]) -> list[tuple[int, float]]:
    """(bytes kept on the grid, cost) by rising bytes, without those that cost no less than a smaller one."""
    found: list[tuple[int, float]] = []
    for kept in sorted(states):
        if not found or states[kept][0] < found[-1][1]:
            found.append((kept, states[kept][0]))
    return found


class Planner:
    """Finds schedules for budgets of a training.

    Args:
        model: the network in the modes in which it trains; copied, also where it is.
        optimizer: of it; copied.
        x, y: a batch, (batch, channels, height, width) and targets.
        loss: forward and loss of a batch.
        settings: of `Takeover`, but for its schedule.

    Raises:
        Refused: a network that `torch.fx` cannot follow or that does not run on shapes alone.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn import functional as F
        >>> from layerlab_memory_reorder.method.budget import Planner
        >>> layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        >>> network = nn.Sequential(*layers, *layers, nn.Flatten())
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> x, y = torch.randn(64, 8, 16, 16), torch.zeros(64, dtype=torch.int64)
        >>> planner = Planner(network, optimizer, x, y, lambda network, x, y: F.cross_entropy(network(x), y))
        >>> choice = planner.choose(3_000_000)
        >>> choice.measured <= 3_000_000
        True
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, loss: Loss, **settings: Any
    ) -> None:
        shapes, its_optimizer = meta_copy(model, optimizer)
        dry_x, dry_y = x.to("meta"), y.to("meta")
        program = Program(shapes)
        sizes = examine(program, dry_x)
        self._dry = Trial(shapes, its_optimizer, dry_x, dry_y, loss, settings)
        try:
            # Which bits a GPU's kernels give by parts, nobody has measured.
            self.composition = Composition(program, sizes, self._dry.intervals, by_channels=x.device.type == "cpu")
        except (RuntimeError, TypeError, LayerlabError) as error:
            raise Refused(f"{type(model).__name__} cannot run a step on shapes alone, as a memory budget needs "
                          f"({first_line(error)}); use MemoryReorder without a budget.") from error
        own, own_optimizer = copy.deepcopy((model, optimizer))
        self._real = Trial(own, own_optimizer, x, y, loss, settings)
        self._calibrate()

    def choose(self, budget: int) -> Choice:
        """The schedule of the least time whose step takes at most `budget` bytes, tried for real.

        Raises:
            Refused: no schedule does; it names the least peak.
        """
        tried: dict[tuple[Group, ...], None] = {}
        for groups in (*self._rungs(budget), self._least):
            if groups is None or groups in tried:
                continue
            tried[groups] = None
            forecast = self.forecast(groups)
            if forecast > budget:
                continue
            measured = self.measured(groups)
            if measured <= budget:
                time = 1 + self.composition.cost(groups) / STEP_OF_FORWARD
                return Choice(self.composition.schedule(groups), forecast, measured, time)
        least = self.least()
        raise Refused(f"A training step of {type(self._real.model).__name__} with {len(self._real.x)} examples needs "
                      f"at least {_megabytes(least)}, and the budget is {budget / 1e6:.4g} MB; give a larger budget or "
                      "a smaller batch_size.")

    def least(self) -> int:
        """Bytes that are enough as a budget for the schedule of the least peak."""
        return max(self.measured(self._least), self.forecast(self._least))

    def forecast(self, groups: Sequence[Group]) -> int:
        """Bytes of a step's peak, from a dry run and what kernels take for themselves."""
        extra = self.composition.extra
        found = self._dry.intervals(self.composition.schedule(groups))
        return max(each.peak + extra.get(name, 0) for name, each in found.items())

    def measured(self, groups: Sequence[Group]) -> int:
        """Bytes of a real step's peak, on a copy."""
        return _peak(self._real.intervals(self.composition.schedule(groups)))

    def _rungs(self, budget: int) -> Iterator[tuple[Group, ...] | None]:
        """Schedules for the rungs of the ladder within a budget, the highest first."""
        if self._top <= budget:
            yield self.composition.alone(False)
        limit = float(self._top)
        while limit >= self._bottom:
            if limit <= budget:
                yield self.composition.solve(int(limit))
            limit *= RUNG

    def _calibrate(self) -> None:
        """Learn from a step of the least schedule what kernels take, then find the least schedule with that."""
        composition = self.composition
        groups = self._lowest()
        schedule = composition.schedule(groups)
        real, dry = self._real.intervals(schedule), self._dry.intervals(schedule)
        composition.extra = {name: max(0, real[name].peak - dry[name].peak) for name in dry}
        for group in groups:
            for index in range(group.first, group.last):
                composition.extra[f"backward {index}"] = composition.extra.get(f"backward {group.last}", 0)
        self._least = self._lowest()

    def _lowest(self) -> tuple[Group, ...]:
        """The schedule of the least peak, to a thousandth."""
        composition = self.composition
        self._top = max(composition.parts(composition.alone(False)))
        low, high = composition.base, self._top
        while high - low > high // 1000:
            middle = (low + high) // 2
            if composition.solve(middle) is None:
                low = middle
            else:
                high = middle
        self._bottom = high
        found = composition.solve(high)
        assert found is not None
        return found


def _peak(intervals: Mapping[str, Interval]) -> int:
    return max(each.peak for each in intervals.values())


def _megabytes(size: int) -> str:
    """Rounded up to a tenth, so that it is enough as a budget."""
    return f"{-(-size // 100_000) / 10:.1f} MB"
