"""Memory plans: what a training step keeps in memory and when, exactly, from a traced network's shapes.

A. Ike et al., "Technologies for Practical Application of Deep Learning", Fujitsu Sci. Tech. J. 53 (2017), section 4,
figures 2 to 4. All sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from layerlab import LayerlabError
from layerlab_memory_reorder.method.trace import Network

Order = Literal["larger-first", "weight-first"]
WeightGradients = Literal["kept", "shared", "slabs"]


@dataclass(frozen=True)
class Operation:
    """One operation of a step.

    Attributes:
        name: `forward`, `loss`, `dW`, `dX`, `dX,dW` or `update`, and the layer.
        reads: tensors that must hold their values.
        writes: tensors that it writes, or adds to when they are in `reads` as well.
        over: (written, read) pairs that may share memory within the operation: it reads an element before it writes it.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    over: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Block:
    """A tensor's place.

    Attributes:
        tensor: its name: an activation's, or `d(…)`, `mask(…)`, `state(…)` of something.
        kind: `weights`, `optimizer state`, `data`, `diff`, `weight diff` or `mask`.
        bytes: its size.
        first, last: operations between which it holds its value, both included.
        offset: where it lies.
    """

    tensor: str
    kind: str
    bytes: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    """A static memory plan of one training step.

    Attributes:
        name: which order and reuse.
        operations: in the order in which they run.
        blocks: every tensor's place and life.
        total: bytes of the arena.
    """

    name: str
    operations: tuple[Operation, ...]
    blocks: tuple[Block, ...]
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", max((b.offset + b.bytes for b in self.blocks), default=0))

    @property
    def live_peak(self) -> int:
        """The most bytes that hold a needed value at once: no placement needs less."""
        ends = [0] * (len(self.operations) + 1)
        for block in self.blocks:
            ends[block.first] += block.bytes
            ends[min(block.last + 1, len(self.operations))] -= block.bytes
        now = peak = 0
        for change in ends[:-1]:
            now += change
            peak = max(peak, now)
        return peak

    @property
    def table(self) -> pd.DataFrame:
        """One row a tensor: `tensor`, `kind`, `bytes`, `offset`, `first`, `last` (operations, by number)."""
        return pd.DataFrame([vars(block) for block in self.blocks],
                            columns=["tensor", "kind", "bytes", "offset", "first", "last"])


def conventional(network: Network, states: int = 0) -> Plan:
    """Caffe's static allocation (figure 3): data and diff of every activation, weights and their diffs, all at once.

    Nothing is reused. The input image has no diff. Layers that run in place share data and diff with their operand.

    Args:
        network: from `trace`.
        states: tensors of optimizer state a weight: 0 as in the paper's 0.6 GB, 1 for momentum, 2 for AdamW.
    """
    operations = _operations(network, "weight-first", "kept", 0)
    last = len(operations) - 1
    blocks = _persistent(network, states, last)
    blocks += [Block(_grad(name), "weight diff", size, 0, last) for name, size in network.weights.items()]
    blocks += [Block(name, "data", size, 0, last) for name, size in network.activations.items()]
    blocks += [Block(_grad(name), "diff", size, 0, last) for name, size in network.activations.items()
               if name != network.input]
    placed, offset = [], 0
    for block in blocks:
        placed.append(Block(block.tensor, block.kind, block.bytes, block.first, block.last, offset))
        offset += block.bytes
    without_masks = tuple(
        Operation(each.name, tuple(t for t in each.reads if not t.startswith("mask(")),
                  tuple(t for t in each.writes if not t.startswith("mask(")), each.over) for each in operations)
    return Plan("conventional", without_masks, tuple(placed))


def reordered(
    network: Network, weight_gradients: WeightGradients = "shared", order: Order = "larger-first",
    forward_reuse: bool = False, states: int = 0, slab: int = 16 * 2**20,
) -> Plan:
    """The paper's plan (figure 4): layer by layer, the larger result's computation arranged so that it reuses memory.

    Where the input gradient is the larger, the weight gradient goes first: then nothing reads the layer's input any
    more, and the input gradient takes over its memory. Where the weight gradient is the larger, the input gradient
    goes first: then nothing reads the weights any more, and the weight gradient may be applied as it is made.

    Args:
        network: from `trace`.
        weight_gradients: `kept` until the step's end; `shared`, one buffer, updated after each layer; `slabs`, as
            `shared`, and a weight gradient that goes last is made and applied in slabs.
        order: `larger-first`, or `weight-first` in every layer.
        forward_reuse: False: the forward pass allocates all activations, as in the paper, and only backward reuses
            them. True: memory is reused as soon as nothing will read it.
        states: see `conventional`.
        slab: bytes of a slab.
    """
    operations = _operations(network, order, weight_gradients, slab)
    last = len(operations) - 1
    sizes = _sizes(network)
    if weight_gradients == "slabs":
        for names, size in _slabbed(network, order, slab).items():
            for name in names:
                sizes[_grad(name)] = ("weight diff", min(sizes[_grad(name)][1], size))
    start, end = _lives(operations)
    if not forward_reuse:
        start |= {name: 0 for name in network.activations}
    start[network.input] = 0
    wanted = [(tensor, kind, size, start[tensor], end[tensor]) for tensor, (kind, size) in sizes.items()
              if tensor in start and tensor in end]
    persistent = _persistent(network, states, last)
    base = 0
    blocks = []
    for block in persistent:
        blocks.append(Block(block.tensor, block.kind, block.bytes, 0, last, base))
        base += block.bytes
    blocks += [Block(tensor, kind, size, begin // 2, finish // 2 if finish % 2 else finish // 2 - 1, base + offset)
               for (tensor, kind, size, begin, finish), offset in zip(wanted, _place(wanted), strict=True)]
    name = f"{order}, weight gradients {weight_gradients}" + (", forward reuse" if forward_reuse else "")
    return Plan(name, operations, tuple(blocks))


def _sizes(network: Network) -> dict[str, tuple[str, int]]:
    """Tensor → (kind, bytes), of everything that a step makes."""
    sizes: dict[str, tuple[str, int]] = {}
    for name, size in network.activations.items():
        sizes[name] = ("data", size)
        sizes[_grad(name)] = ("diff", size)
    for layer in network.layers:
        if layer.mask_bytes:
            sizes[_mask(layer.name)] = ("mask", layer.mask_bytes)
    for name, size in network.weights.items():
        sizes[_grad(name)] = ("weight diff", size)
    return sizes


def _lives(operations: Sequence[Operation]) -> tuple[dict[str, int], dict[str, int]]:
    """When each tensor is first written and last read.

    Times are doubled: an operation reads at 2i and 2i + 1 and writes at 2i + 1; over a pair of `over` it has read at 2i
    what it writes over at 2i + 1.
    """
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    for index, operation in enumerate(operations):
        given_up = {read for _, read in operation.over}
        for tensor in operation.reads:
            end[tensor] = 2 * index + (tensor not in given_up)
        for tensor in operation.writes:
            start.setdefault(tensor, 2 * index + 1)
            end[tensor] = max(end.get(tensor, 0), 2 * index + 1)
    return start, end


def check(plan: Plan) -> None:
    """Walk a plan: every operation must find in memory what it reads.

    Keeps a map of which tensor's values lie where, independent of the lives that the plan notes.

    Raises:
        LayerlabError: names the operation, the tensor it reads, and what had been written over it.
    """
    place = {block.tensor: (block.offset, block.offset + block.bytes) for block in plan.blocks}
    valid: dict[str, str] = {block.tensor: "" for block in plan.blocks if block.kind in ("weights", "optimizer state")}
    valid["data"] = ""
    gone: dict[str, str] = {}

    def overlap(a: str, b: str) -> bool:
        return place[a][0] < place[b][1] and place[b][0] < place[a][1]

    for operation in plan.operations:
        for tensor in operation.reads:
            if tensor not in valid:
                raise LayerlabError(f"{operation.name} reads {tensor}, which {gone.get(tensor, 'nothing')} overwrote.")
        for written in operation.writes:
            for other in operation.reads:
                if other != written and (written, other) not in operation.over and overlap(written, other):
                    raise LayerlabError(f"{operation.name} writes {written} over {other} while it reads it.")
            for other in [each for each in valid if each != written and overlap(written, each)]:
                del valid[other]
                gone[other] = f"{written} in {operation.name}"
            valid[written] = ""


def weight_first(input_gradient: int, weight_gradient: int, slab: int = 0) -> bool:
    """The paper's choice for one layer: whether the weight gradient is computed before the input gradient.

    Args:
        input_gradient, weight_gradient: bytes. An input gradient of 0 bytes is not needed at all.
        slab: bytes at a time of a weight gradient that goes last; 0: all of it.
    """
    last = min(weight_gradient, slab) if slab else 0
    return input_gradient == 0 or input_gradient + last >= weight_gradient


def summary(network: Network, slab: int = 16 * 2**20) -> pd.DataFrame:
    """The plans of a network side by side: `plan`, `total` (bytes), `saved` (per cent of the conventional plan)."""
    rows = []
    base = conventional(network)
    plans = {
        "conventional: everything at once": base,
        "paper's order, all weight diffs kept": reordered(network, "kept", "weight-first"),
        "paper's order, one weight diff at a time": reordered(network, "shared", "weight-first"),
        "larger first, weight diffs in slabs": reordered(network, "slabs", slab=slab),
        "… and memory reused in forward too": reordered(network, "slabs", forward_reuse=True, slab=slab),
    }
    for name, plan in plans.items():
        rows.append({"plan": name, "total": plan.total, "saved": 100 * (1 - plan.total / base.total)})
    return pd.DataFrame(rows)


def savings(network: Network) -> tuple[float, float]:
    """Per cent saved against the conventional plan: (all weight diffs kept, one weight diff at a time)."""
    base = conventional(network).total
    kept = reordered(network, "kept", "weight-first").total
    shared = reordered(network, "shared", "weight-first").total
    return 100 * (1 - kept / base), 100 * (1 - shared / base)


def _grad(name: str) -> str:
    return f"d({name})"


def _mask(name: str) -> str:
    return f"mask({name})"


def _persistent(network: Network, states: int, last: int) -> list[Block]:
    blocks = [Block(name, "weights", size, 0, last) for name, size in network.weights.items()]
    for index in range(states):
        blocks += [Block(f"state{index}({name})", "optimizer state", size, 0, last)
                   for name, size in network.weights.items()]
    return blocks


def _slabbed(network: Network, order: Order, slab: int) -> dict[tuple[str, ...], int]:
    """Weights whose gradient goes last and is used once → bytes of it that exist at a time."""
    uses = [name for layer in network.layers for name in layer.weight_names]
    found = {}
    for layer in network.layers:
        gradient = sum(network.activations[name] for name in layer.inputs if name != network.input)
        if (order == "larger-first" and layer.kind == "linear" and not weight_first(gradient, layer.weight_bytes, slab)
                and all(uses.count(name) == 1 for name in layer.weight_names)):
            found[layer.weight_names] = slab
    return found


def _operations(
    network: Network, order: Order, weight_gradients: WeightGradients, slab: int
) -> tuple[Operation, ...]:
    operations: list[Operation] = []
    for layer in network.layers:
        writes = (layer.output, *([_mask(layer.name)] if layer.mask_bytes else []))
        operations.append(Operation(f"forward {layer.name}", (*layer.inputs, *layer.weight_names), writes))
    # p - one_hot replaces the logits element by element.
    result = network.result
    operations.append(Operation("loss", (result,), (_grad(result),), ((_grad(result), result),)))
    uses = [name for layer in network.layers for name in layer.weight_names]
    remaining = {name: uses.count(name) for name in uses}
    begun: set[str] = {_grad(result)}
    weights_begun: set[str] = set()
    chosen_slab = slab if weight_gradients == "slabs" else 0
    for layer in reversed(network.layers):
        dy = _grad(layer.output)
        if dy not in begun:
            continue
        mask = (_mask(layer.name),) if layer.mask_bytes else ()
        kept = (*(layer.inputs if layer.reads_input else ()), *((layer.output,) if layer.reads_output else ()))
        targets = [name for name in layer.inputs if name != network.input]
        # In place: its input gradient is its output gradient, masked element by element.
        dxs = tuple(dict.fromkeys(_grad(name) for name in targets))
        added = tuple(each for each in dxs if each in begun and each != dy)
        dws = tuple(_grad(name) for name in layer.weight_names)
        dws_added = tuple(each for each in dws if each in weights_begun)
        if layer.kind in ("conv", "linear"):
            gradient = sum(network.activations[name] for name in targets)
            first = order == "weight-first" or weight_first(gradient, layer.weight_bytes, chosen_slab)
            steps = [Operation(f"dW {layer.name}", (dy, *kept, *dws_added), dws)]
            if dxs:
                # dX needs dY and the weights, and nothing of the layer's input.
                dx = Operation(f"dX {layer.name}", (dy, *added, *layer.weight_names), dxs)
                steps = [*steps, dx] if first else [dx, *steps]
            operations += steps
        else:
            reads = (dy, *kept, *mask, *added, *layer.weight_names, *dws_added)
            if dxs or dws:
                operations.append(Operation(f"dX {layer.name}", reads, (*dxs, *dws)))
        begun |= set(dxs)
        weights_begun |= set(dws)
        for name in layer.weight_names:
            remaining[name] -= 1
        if weight_gradients != "kept":
            done = [name for name in layer.weight_names if not remaining[name]]
            if done:
                operations.append(Operation(f"update {layer.name}", (*(_grad(name) for name in done), *done),
                                            tuple(done)))
    if weight_gradients == "kept":
        names = [name for name in dict.fromkeys(uses) if _grad(name) in weights_begun]
        operations.append(Operation("update", (*(_grad(name) for name in names), *names), tuple(names)))
    return tuple(operations)


def _place(wanted: list[tuple[str, str, int, int, int]]) -> list[int]:
    """Offsets, the largest tensor first, each at the lowest place free during its whole life."""
    order = sorted(range(len(wanted)), key=lambda index: (-wanted[index][2], wanted[index][3]))
    offsets = [0] * len(wanted)
    done: list[int] = []
    for index in order:
        _, _, size, begin, finish = wanted[index]
        taken = sorted(
            (offsets[other], offsets[other] + wanted[other][2]) for other in done
            if wanted[other][3] <= finish and begin <= wanted[other][4]
        )
        place = 0
        for low, high in taken:
            if place + size <= low:
                break
            place = max(place, high)
        offsets[index] = place
        done.append(index)
    return offsets
