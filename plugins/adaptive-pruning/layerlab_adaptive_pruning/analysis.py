"""The paper's results table and its figures from runs: accuracy, parameters, bytes and speed, stage by stage."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from layerlab import build_model, figures, measure
from layerlab_adaptive_pruning.method.peers import NetworkSlimming
from layerlab_adaptive_pruning.method.pruning import count, latencies
from layerlab_adaptive_pruning.method.structure import rebuild, structure
from layerlab_adaptive_pruning.method.surgery import remove_channels
from layerlab_adaptive_pruning.strategy import AdaptivePruning

BASELINE, OURS, PEER = "conventional", "adaptive pruning", "network slimming"
PAPER = {0.845: "40 %", 0.646: "60 %", 0.558: "most"}
"""What the paper calls its rows, by the share of the parameters that they have left: 1.44, 1.10 and 0.95 of 1.70 M."""


def residual_network(classes: int, channels: int, depth: int, initial_scale: float) -> nn.Module:
    """The pre-activation ResNet with every γ at `initial_scale`, as network slimming's authors start it, at 0.5."""
    network = build_model("preact-resnet", num_classes=classes, channels=channels, depth=depth)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.constant_(module.weight, initial_scale)
    return network


def stage_labels(shares: Sequence[float]) -> list[str]:
    """What the stages are called: `dense`, then by the share of the parameters that is left."""
    return ["dense", *(_left(share) for share in shares)]


def _left(share: float) -> str:
    return f"{100 * share:.3g}% left"


NAMES = {_left(share): name for share, name in PAPER.items()}
"""The paper's name of a row by `stage_labels`'."""
MOST = _left(min(PAPER))


def arms(shares: Sequence[float], stage_epochs: int, sparsity: float, bridge: str) -> dict[str, Any]:
    """The three ways of training that are compared: the plain one, the paper's and its peer's.

    Args:
        shares: of the parameters that are left after each pruning, the same for both methods.
        stage_epochs: from one pruning to the next.
        sparsity: λ, the same for both, which train alike until the first pruning: with a λ each, the one that happened
            to find the better one would be ahead.
        bridge: as the strategy's setting.
    """
    shared: dict[str, Any] = {"targets": [{"parameters": share} for share in shares], "every": stage_epochs}
    return {BASELINE: (), OURS: AdaptivePruning(bridge=bridge, sparsity=sparsity, **shared),
            PEER: NetworkSlimming(sparsity=sparsity, **shared)}


def candidates(sparsities: Sequence[float], share: float, stage_epochs: int, bridge: str) -> dict[str, Any]:
    """Both methods with each λ, pruned once to a share of the parameters: what `sparsity_choice` chooses from."""
    return {f"{arm}, λ = {value:g}": strategy for value in sparsities
            for arm, strategy in arms([share], stage_epochs, value, bridge).items()
            if arm != BASELINE}


def sparsity_choice(comparison: Any) -> tuple[pd.DataFrame, float]:
    """Which λ to take: the one with which both methods together are best after the pruning, on what was held out.

    Args:
        comparison: the runs of `candidates` on `Dataset.held_out`.

    Returns:
        A row a method and λ: `method`, `λ`, `top-1 dense [%]` before the pruning and `top-1 pruned [%]` at the end
        (means over seeds), `chosen`; and the λ, the smallest of equals.
    """
    rows = []
    for arm in comparison.arms:
        runs = [comparison.results[arm, seed] for seed in comparison.seeds]
        strategy = runs[0].strategies[0]
        end = strategy.stages[1]["epoch"]
        rows.append({
            "method": {AdaptivePruning.name: OURS, NetworkSlimming.name: PEER}[strategy.name], "λ": strategy.sparsity,
            "top-1 dense [%]": 100 * float(np.mean([run.history[end - 1]["test/top1"] for run in runs])),
            "top-1 pruned [%]": 100 * float(np.mean([run.final["test/top1"] for run in runs])),
        })
    table = pd.DataFrame(rows).sort_values(["method", "λ"], ignore_index=True)
    best = float(table.groupby("λ")["top-1 pruned [%]"].mean().idxmax())
    table["chosen"] = table["λ"] == best
    return table, best


def restarts(stage_epochs: int) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """The rate of every stage: divided by ten after a half and after three quarters of it, then from the top again."""
    first, second = stage_epochs / 2, 3 * stage_epochs / 4

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        def factor(epoch: int) -> float:
            within = epoch % stage_epochs
            return 0.1 ** ((within >= first) + (within >= second))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    return schedule


def stages(comparison: Any, network: Callable[[], nn.Module]) -> pd.DataFrame:
    """What each arm and seed had at the end of each of its stages.

    Args:
        comparison: the runs of `arms`.
        network: builds the network before any pruning.

    Returns:
        A row an arm, seed and stage: `arm`, `seed`, `stage` (0 before the first pruning), `epoch` at its end,
        `top-1` (a share), `parameters`, `megabytes` of parameters and buffers, `channels` (share of the batch norms'
        channels that is left), `convolutions`, and `structure`. The conventional network is the same in every stage
        but for its weights.
    """
    rows = []
    dense = network()
    whole = {"parameters": count(dense), "channels": 1.0, "structure": None}
    for (arm, seed), result in comparison.results.items():
        (pruning,) = comparison.results[OURS, seed].strategies
        ends = [stage["epoch"] for stage in pruning.stages[1:]] + [len(result.history)]
        for stage, end in enumerate(ends):
            row = {"arm": arm, "seed": seed, "stage": stage, "epoch": end,
                   "top-1": result.history[end - 1]["test/top1"], **whole}
            if arm != BASELINE:
                noted = result.strategies[0].stages
                left = sum(noted[stage]["channels"].values()) / sum(noted[0]["channels"].values())
                row |= {"parameters": noted[stage]["parameters"], "channels": left,
                        "structure": noted[stage]["structure"]}
            built = _built(network, row["structure"])
            row["megabytes"] = sum(t.numel() * t.element_size() for t in built.state_dict().values()) / 1e6
            row["convolutions"] = sum(isinstance(module, nn.Conv2d) for module in built.modules())
            rows.append(row)
    return pd.DataFrame(rows)


def _built(network: Callable[[], nn.Module], described: Mapping[str, Any] | None) -> nn.Module:
    return network().eval() if described is None else rebuild(network(), described).eval()


def speeds(table: pd.DataFrame, network: Callable[[], nn.Module], example: Tensor, batches: Sequence[int],
           rounds: int) -> pd.DataFrame:
    """`stages` with what a forward pass of each network takes: arithmetic, and measured seconds.

    All networks take turns, so that what slows the machine slows all of them.

    Args:
        example: images, of which as many as needed are taken again and again.
        batches: images a batch.
        rounds: of timing.

    Returns:
        The table with `MACs`, multiply-accumulates an image, and `batch N [ms]` and `batch N ×` (how many times faster
        than the unpruned network) for each batch N; both for the whole batch.
    """
    table = table.copy()
    networks = {"dense": network().to(example.device).eval()}
    for index, row in table.iterrows():
        if row["structure"] is not None and row["stage"]:
            networks[str(index)] = _built(network, row["structure"]).to(example.device)
        table.loc[index, "MACs"] = multiply_accumulates(networks.get(str(index), networks["dense"]), example[:1])
    for size in batches:
        images = example.repeat(-(-size // len(example)), 1, 1, 1)[:size].contiguous()
        turns = latencies(networks, images, rounds)
        for index in table.index:
            mine = turns.get(str(index), turns["dense"])
            table.loc[index, f"batch {size} [ms]"] = 1e3 * mine.median
            table.loc[index, f"batch {size} ×"] = turns["dense"].ratio(mine)[0]
    return table


def multiply_accumulates(network: nn.Module, images: Tensor) -> float:
    """Of one forward pass on these images."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(images)
    return counter.get_total_flops() / 2


def results_table(published: pd.DataFrame, table: pd.DataFrame, labels: Sequence[str],
                  batches: Sequence[int]) -> pd.DataFrame:
    """The paper's table, published beside measured, a row a method and stage; means over seeds, ± 95 % half-width.

    Args:
        published: the paper's rows, by method and the paper's name.
        table: `speeds`.
        labels: `stage_labels`.
    """
    rows = []
    plain = table[table["arm"] == BASELINE].groupby("stage")["top-1"]
    for (arm, stage), part in table.groupby(["arm", "stage"], sort=False):
        if arm == BASELINE and stage:
            continue
        label = labels[stage]
        name = f"{arm}, {NAMES.get(label, label)}"
        known = published.loc[name] if name in published.index else {}
        row = {
            "network": f"{arm}, {label}", "row, paper": NAMES.get(label, "") if len(known) else "",
            "top-1, paper": known.get("top-1", ""), "top-1 [%]": _spread(100 * part["top-1"]),
            "conventional, as many epochs [%]": _spread(100 * plain.get_group(stage)),
            "parameters, paper": known.get("parameters", ""), "parameters": f"{part['parameters'].mean():,.0f}",
            "channels left": f"{part['channels'].mean():.0%}", "convolutions": _spread(part["convolutions"]),
            "MACs [M]": _spread(part["MACs"] / 1e6),
            "size, paper": known.get("size", ""), "size [MB]": f"{part['megabytes'].mean():.2f}",
            "speed, paper": known.get("speed", ""),
        }
        rows.append(row | {f"speed, batch {size} [×]": _spread(part[f"batch {size} ×"]) for size in batches})
    return pd.DataFrame(rows).set_index("network")


def gains(table: pd.DataFrame, arm: str, other: str, stage: int) -> list[float]:
    """Points of top-1 that an arm has more than another after the same epochs, a value a seed."""
    mine, theirs = (table[(table["arm"] == each) & (table["stage"] == stage)].set_index("seed")["top-1"]
                    for each in (arm, other))
    return (100 * (mine - theirs)).tolist()


def column(table: pd.DataFrame, arm: str, stage: int, name: str) -> list[float]:
    """A column of `speeds` for an arm's stage, a value a seed."""
    return table[(table["arm"] == arm) & (table["stage"] == stage)][name].tolist()


def claim_values(table: pd.DataFrame, labels: Sequence[str], batches: Sequence[int]) -> dict[str, list[float]]:
    """The paper's claims from its rows, as far as they were run: id in paper.toml → a value a seed.

    Args:
        table: `speeds`.
        labels: `stage_labels`.
        batches: images a batch that were timed.
    """
    stages = {label: stage for stage, label in enumerate(labels)}
    values = {}
    for label, name in NAMES.items():
        if label in stages:
            short = name.removesuffix(" %")
            values[f"gain-{short}"] = gains(table, OURS, BASELINE, stages[label])
            if label != MOST:  # network slimming has no such row in the paper
                values[f"peer-{short}"] = gains(table, OURS, PEER, stages[label])
    if MOST in stages:
        dense = table["megabytes"].max()
        values["size"] = [size / dense for size in column(table, OURS, stages[MOST], "megabytes")]
        for size in batches:
            if size in (1, 128):
                values[f"speed-{size}"] = column(table, OURS, stages[MOST], f"batch {size} ×")
                values[f"peer-speed-{size}"] = _times_faster(table, stages[MOST], size)
    return values


def comparison_line(table: pd.DataFrame, stage: int, label: str, batches: Sequence[int]) -> str:
    """What adaptive pruning has over network slimming after a stage, in one line.

    With the parameters of both: where a whole block goes, the one threshold passes over the counts in between.
    """
    sizes = " against ".join(f"{np.mean(column(table, arm, stage, 'parameters')):,.0f}" for arm in (OURS, PEER))
    faster = ", ".join(f"{_spread(_times_faster(table, stage, size))} × as fast at batch {size}" for size in batches)
    mean, half = measure.mean_interval(gains(table, OURS, PEER, stage))
    interval = f" ± {half:.2f}" if math.isfinite(half) else ""
    return f"{label}, {sizes} parameters: {mean:+.2f}{interval} points against network slimming, {faster}"


def _times_faster(table: pd.DataFrame, stage: int, size: int) -> list[float]:
    ours, theirs = (column(table, arm, stage, f"batch {size} ×") for arm in (OURS, PEER))
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def choices(table: pd.DataFrame, labels: Sequence[str], batches: Sequence[int]) -> pd.DataFrame:
    """What a user chooses from, as `layerlab.figures.families` takes it: means over seeds, a row a pruned network and
    one for the conventional network after all epochs."""
    rows = []
    for (arm, stage), part in table.groupby(["arm", "stage"], sort=False):
        if stage != table["stage"].max() if arm == BASELINE else not stage:
            continue
        mean, half = measure.mean_interval(part["top-1"].tolist())
        rows.append({"method": arm, "network": labels[0 if arm == BASELINE else stage],
                     "parameters": part["parameters"].mean(), "MACs": part["MACs"].mean(), "top-1": mean,
                     "top-1 ±": half,
                     **{f"batch {size} [ms]": part[f"batch {size} [ms]"].mean() for size in batches}})
    return pd.DataFrame(rows)


def survival(comparison: Any, seed: int, labels: Sequence[str]) -> Figure:
    """Which layers and channels survive: the share of each batch norm's channels left, layer by layer, stage by stage.

    Args:
        seed: of the runs that are shown.
        labels: of the stages.
    """
    shown = [arm for arm in (OURS, PEER) if (arm, seed) in comparison.results]
    count_layers = len(comparison.results[shown[0], seed].strategies[0].stages[0]["channels"])
    figure, axes = figures.canvas(rows=len(shown), width=min(16.0, max(8.0, 0.36 * count_layers)), height=2.5)
    for axis, arm in zip(axes[:, 0], shown, strict=True):
        noted = comparison.results[arm, seed].strategies[0].stages
        first = noted[0]["channels"]
        order = _forward(comparison.results[BASELINE, seed].model, list(first))
        left = np.array([[stage["channels"][path] / first[path] for path in order] for stage in noted])
        colours = sns.color_palette("viridis", as_cmap=True).with_extremes(bad="#c94c4c")
        sns.heatmap(np.where(left == 0, np.nan, left), ax=axis, vmin=0, vmax=1, cmap=colours, linewidths=0.4,
                    linecolor="white", mask=np.zeros_like(left, dtype=bool), cbar_kws={"label": "channels left"})
        axis.grid(False)
        axis.set_facecolor("#c94c4c")
        gone = int((left[-1] == 0).sum())
        axis.set_title(f"{arm}: {gone} of {len(order)} batch norms are gone" if gone else f"{arm}: no layer is gone")
        axis.set_yticklabels(labels[: len(noted)], rotation=0)
        axis.set_xticks(np.arange(len(order)) + 0.5, order if len(order) <= 45 else [""] * len(order), rotation=90,
                        fontsize=7)
        if len(order) > 45:
            axis.set_xlabel("batch norms in forward order")
    return figure


def _forward(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Batch norms in the order of the modules, which is the order in which a traced network runs."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(paths, key=lambda path: order.get(path, len(order)))


def exactness(names: Sequence[str], image_size: int = 32, share: float = 0.4) -> pd.DataFrame:
    """Removing channels with γ = β = 0 from well-known networks: what it changes, which is to be nothing.

    Every batch norm gets random statistics and scales, a share of them zero.

    Returns:
        A row a network: `parameters`, `left`, `convolutions`, `convolutions left`, `difference` (largest, of the
        logits, over their largest), `seconds` that it took.
    """
    rows = []
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, image_size, image_size, generator=generator)
    for name in names:
        network = build_model(name, num_classes=10, **({"depth": 29} if name == "preact-resnet" else {})).eval()
        dead = {}
        for path, module in network.named_modules():
            if isinstance(module, _BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                with torch.no_grad():
                    for value in (module.weight, module.running_var):
                        value.copy_(torch.rand(len(value), generator=generator) + 0.5)
                    for value in (module.bias, module.running_mean):
                        value.copy_(0.2 * torch.randn(len(value), generator=generator))
                    gone = torch.rand(len(module.weight), generator=generator) < share
                    module.weight[gone] = module.bias[gone] = 0
                dead[path] = gone.nonzero().flatten().tolist()
        with torch.no_grad():
            before, size, layers = network(images), count(network), _convolutions(network)
            start = time.perf_counter()
            cut, _ = remove_channels(network, images, dead)
            seconds = time.perf_counter() - start
            difference = float((cut(images) - before).abs().max() / before.abs().max())
        rows.append({"network": name, "parameters": size, "left": count(cut), "convolutions": layers,
                     "convolutions left": _convolutions(cut), "difference": difference, "seconds": seconds})
    return pd.DataFrame(rows, columns=[
        "network", "parameters", "left", "convolutions", "convolutions left", "difference", "seconds",
    ]).set_index("network")


def _convolutions(network: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


def deployed(model: Any, network: Callable[[], nn.Module], example: Tensor, folder: Path) -> pd.DataFrame:
    """Save what comes out of a fit, build it again without pickle, export it, and hold each against the network.

    Args:
        model: the pruned network.
        network: builds the unpruned one.
        example: images.
        folder: where `pruned.pt` (weights), `pruned.json` (structure) and `pruned.onnx` go.

    Returns:
        A row a form: `bytes`, and the largest `difference` of its logits from the network's.
    """
    import json

    folder.mkdir(parents=True, exist_ok=True)
    images = example[:2].cpu()
    # Training may have laid out the weights otherwise; the others are built anew.
    model = model.cpu().eval().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        logits = model(images)
    torch.save(model.state_dict(), folder / "pruned.pt")
    (folder / "pruned.json").write_text(json.dumps(structure(model)))
    again = rebuild(network(), json.loads((folder / "pruned.json").read_text()))
    again.load_state_dict(torch.load(folder / "pruned.pt", weights_only=True))
    exported = torch.export.export(model, (images,))
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    with torch.no_grad():
        forms = {"weights and structure": (again.eval()(images), _bytes(folder, "pruned.pt", "pruned.json")),
                 "torch.export": (exported.module()(images), len(stream.getvalue()))}
    try:
        import onnxruntime

        torch.onnx.export(exported, f=str(folder / "pruned.onnx"), verbose=False)
        session = onnxruntime.InferenceSession(str(folder / "pruned.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        forms["ONNX"] = (torch.from_numpy(found), _bytes(folder, "pruned.onnx", "pruned.onnx.data"))
    except ImportError:
        print("onnxscript and onnxruntime are not installed: ONNX is left out.")
    return pd.DataFrame(
        {name: {"bytes": size, "difference": float((out - logits).abs().max())} for name, (out, size) in forms.items()}
    ).T


def _bytes(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names if (folder / name).exists())


def _spread(values: Any) -> str:
    mean, half = measure.mean_interval([float(value) for value in values])
    return f"{mean:.3g}" + (f" ± {half:.2g}" if math.isfinite(half) and half > 0 else "")
