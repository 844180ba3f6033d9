"""The paper's order in PyTorch: takes over a network's backward and update, and leaves it as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from layerlab import LayerlabError
from layerlab_memory_reorder.method import parts
from layerlab_memory_reorder.method.checkpointing import checkpoint_blocks
from layerlab_memory_reorder.method.operations import (
    Layer,
    norm_forward,
    parametric_forward,
    plain_padding,
    pool_forward,
    pool_settings,
    relu_forward,
)
from layerlab_memory_reorder.method.plan import Order, weight_first
from layerlab_memory_reorder.method.program import Program
from layerlab_memory_reorder.method.replay import Marks, Replayed, Schedule
from layerlab_memory_reorder.method.trace import symbolic
from layerlab_memory_reorder.method.updater import Updater

FUSIBLE: tuple[Literal["relu", "pool", "norm"], ...] = ("relu", "pool", "norm")
"""Layers whose backward can keep less than PyTorch's: a ReLU nothing (the reader of its result knows the sign), a max
pooling two bytes for the place of each winner, a local response normalisation its operand alone."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Takeover:
    """Takes over a network's backward and update, until `detach` leaves it as it was.

    Between `attach` and `detach`, `loss.backward()` applies and frees the gradients of large weights as they come;
    `finish` applies those of small ones and of weights that are used more than once. Call it after each backward in
    the place of `optimizer.step()`.

    Attributes:
        model: the network; layers that are not convolution, linear, ReLU, max pooling or local response
            normalisation keep PyTorch's backward.
        optimizer: see `Updater`.
        example: images as the network takes them; two of them are run through it in evaluation mode.
        order: `larger-first`, or `weight-first` in every layer.
        slab: bytes of a linear layer's weight gradient that exist at a time where it goes last; 0: all of it, and it
            goes first.
        at_once: weights of fewer bytes are updated at the step's end, all together.
        fuse: which of `FUSIBLE` keep less than PyTorch's, where nothing else needs what they drop; True: all of them;
            False: none.
        checkpointing: blocks keep their input only and are computed again in backward.
        schedule: which stretches are computed again, in the place of `checkpointing`; see `method.budget`.
        marks: told of each stretch's beginning, for measuring.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    example: Tensor
    order: Order = "larger-first"
    slab: int = 16 * 2**20
    at_once: int = 2**18
    fuse: bool | Sequence[str] = True
    checkpointing: bool = False
    schedule: Schedule | None = None
    marks: Marks | None = None
    updater: Updater = field(init=False)
    _undo: list[Callable[[], None]] = field(init=False, default_factory=list)
    _several: set[nn.Parameter] = field(init=False, default_factory=set)
    _sliced: set[Tensor] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.updater = Updater(self.optimizer)

    def __enter__(self) -> Takeover:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the functions and hooks in place for the parameters that learn at present."""
        self.detach()
        # Before anything is patched.
        program = None if self.schedule is None else Program(self.model)
        uses = weight_uses(self.model, self.example)
        self._several = {p for p, count in uses.items() if count != 1}
        for parameter in self.model.parameters():
            if parameter.requires_grad and self.updater.holds(parameter):
                handle = parameter.register_post_accumulate_grad_hook(self._arrived)
                self._undo.append(handle.remove)
        fused = self._fused()
        masked = _masked_by_reader(self.model, "pool" in fused) if "relu" in fused else {}
        readers = set(masked.values())
        layers: dict[nn.Module, Layer] = {}
        by_channels = self.schedule is not None and self.schedule.by_channels
        for module in self.model.modules():
            if module in masked:
                self._patch(module, relu_forward(module, masked[module]))
            elif reorders(module):
                layers[module] = Layer(module, self, module in readers)
                self._patch(module, parametric_forward(layers[module]))
            elif type(module) is nn.MaxPool2d and "pool" in fused and pool_settings(module) is not None:
                self._patch(module, pool_forward(module, module in readers))
            elif type(module) is nn.LocalResponseNorm and "norm" in fused:
                self._patch(module, norm_forward(module))
            elif by_channels and parts.normalises(module):
                self._patch(module, parts.batch_norm_forward(module))
            elif by_channels and type(module) is nn.ReLU:
                self._patch(module, parts.relu_forward(module))
        if self.checkpointing:
            checkpoint_blocks(self.model, self._patch)
        if program is not None and self.schedule is not None:
            named = {name: layers[module] for name, module in program.modules.items() if module in layers}
            replayed = Replayed(program, self.schedule, named, self.marks)
            self._patch(self.model, lambda original, x: replayed(x))

    def detach(self) -> None:
        """Leave the network as it was before `attach`."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._sliced.clear()

    def finish(self) -> None:
        """Apply and free the gradients that `backward` has left, all at once."""
        self._sliced.clear()
        if any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"]):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def in_slabs(self, weight: Tensor, slab: int) -> bool:
        """Whether a weight gradient may be made and applied in parts of `slab` bytes."""
        return bool(slab and weight.is_leaf and weight.nbytes > slab and weight not in self._several
                    and weight.grad is None and self.updater.takes_rows(weight))

    def goes_last(self, weight: Tensor, x: Tensor | None, slab: int) -> bool:
        """Whether the plan computes this layer's input gradient before its weight gradient."""
        return (self.order == "larger-first" and x is not None and self.in_slabs(weight, slab)
                and not weight_first(x.nbytes, weight.nbytes, slab))

    def apply_slabs(self, weight: Tensor, gradient: Callable[[slice], Tensor], slab: int) -> None:
        """Make a weight gradient some rows at a time and apply each at once.

        Args:
            weight: (out, …).
            gradient: of some of its rows.
            slab: bytes of the rows that are made at a time.
        """
        if weight in self._sliced:
            raise LayerlabError("A weight was used twice in this step, but only once when the network was examined; "
                                "set slab=0 for a network that changes from batch to batch.")
        self._sliced.add(weight)
        rows = max(1, slab * weight.shape[0] // weight.nbytes)
        if weight.dim() > 2:
            # Whole blocks of channels, as in `method.parts`.
            rows = max(parts.BLOCK, rows // parts.BLOCK * parts.BLOCK)
        self.updater.prepare(weight)
        for start in range(0, weight.shape[0], rows):
            part = slice(start, min(start + rows, weight.shape[0]))
            self.updater.apply_rows(weight, part, gradient(part))
        self.updater.advance(weight)

    def _fused(self) -> tuple[str, ...]:
        if isinstance(self.fuse, bool):
            return FUSIBLE if self.fuse else ()
        return tuple(self.fuse)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            # Autograd calls this too when a function had no gradient to give.
            return
        if parameter in self._sliced:
            raise LayerlabError("A weight was used twice in this step, but only once when the network was examined; "
                                "set slab=0 for a network that changes from batch to batch.")
        if parameter.nbytes >= self.at_once and parameter not in self._several:
            self.updater.apply(parameter)

    def _patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give one module another forward, in training only."""
        original, own = module.forward, "forward" in vars(module)

        @torch.compiler.disable
        def chosen(*arguments: Any, **options: Any) -> Any:
            if module.training:
                return forward(original, *arguments, **options)
            return original(*arguments, **options)

        module.forward = chosen

        def undo() -> None:
            if own:
                module.forward = original
            else:
                del module.forward

        self._undo.append(undo)


def weight_uses(model: nn.Module, example: Tensor) -> Counter[nn.Parameter]:
    """How many operations of a forward pass each learning parameter goes into, from the graph that autograd records.

    Args:
        model: run once in evaluation mode, its modes restored.
        example: images; the first two are used.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            result = model(example[:2])
    finally:
        for module, mode in modes.items():
            module.training = mode
    uses: Counter[nn.Parameter] = Counter()
    seen, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None and hasattr(following, "variable"):
                uses[following.variable] += 1
            else:
                waiting.append(following)
    return uses


def reorders(module: Any) -> bool:
    """Whether a module's backward can follow the plan: a linear layer, or a convolution padded with zeros by number."""
    return type(module) is nn.Linear or (type(module) in CONVOLUTIONS and plain_padding(module))


def _masked_by_reader(model: nn.Module, pools: bool) -> dict[nn.Module, nn.Module]:
    """ReLUs whose result exactly one convolution, linear layer or max pooling reads → that reader.

    Both must be called once; a network that cannot be traced has none. Max poolings are readers only with `pools`.
    """
    try:
        graph = symbolic(model)
    except LayerlabError:
        return {}
    modules = dict(model.named_modules())
    calls = Counter(modules.get(str(node.target)) for node in graph.graph.nodes if node.op == "call_module")
    found: dict[nn.Module, nn.Module] = {}
    for node in graph.graph.nodes:
        relu = _called(node, modules)
        if type(relu) is not nn.ReLU or calls[relu] != 1 or len(node.users) != 1:
            continue
        # Written over its operand, which somebody else reads: left to PyTorch, which notices.
        if relu.inplace and any(len(each.users) != 1 for each in node.all_input_nodes):
            continue
        reader = _called(next(iter(node.users)), modules)
        masking_pool = pools and type(reader) is nn.MaxPool2d and pool_settings(reader) is not None
        if calls[reader] == 1 and (masking_pool or reorders(reader)):
            found[relu] = reader
    return found


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return modules.get(str(node.target)) if node.op == "call_module" else None
