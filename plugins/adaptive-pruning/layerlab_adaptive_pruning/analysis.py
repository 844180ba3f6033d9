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

from layerlab import build_model, measure
from layerlab.figures import canvas
from layerlab_adaptive_pruning.strategy import AdaptivePruning, NetworkSlimming, count, latencies
from layerlab_adaptive_pruning.structure import rebuild, structure
from layerlab_adaptive_pruning.surgery import remove_channels

BASELINE, OURS, PEER = "conventional", "adaptive pruning", "network slimming"


def residual_network(classes: int, channels: int, depth: int, initial_scale: float) -> nn.Module:
    """The pre-activation ResNet with every γ at `initial_scale`, as network slimming's authors start it, at 0.5."""
    network = build_model("preact-resnet", num_classes=classes, channels=channels, depth=depth)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.constant_(module.weight, initial_scale)
    return network


def arms(shares: Sequence[float], stage_epochs: int, sparsity: float, bridge: str) -> dict[str, Any]:
    """The three ways of training that are compared: the plain one, the paper's and its peer's.

    Args:
        shares: of the parameters that are left after each pruning, the same for both methods.
        stage_epochs: from one pruning to the next.
        sparsity, bridge: as the strategies' settings.
    """
    shared: dict[str, Any] = {"targets": [{"parameters": share} for share in shares], "every": stage_epochs,
                              "sparsity": sparsity}
    return {BASELINE: (), OURS: AdaptivePruning(bridge=bridge, **shared), PEER: NetworkSlimming(**shared)}


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
    """`stages` with the measured seconds of each network, and how many times faster than the unpruned one it is.

    All networks take turns, so that what slows the machine slows all of them.

    Args:
        example: images, of which as many as needed are taken again and again.
        batches: images a batch.
        rounds: of timing.

    Returns:
        The table with `batch N [ms]` and `batch N ×` for each batch N; both for the whole batch.
    """
    table = table.copy()
    networks = {"dense": network().to(example.device).eval()}
    for index, row in table.iterrows():
        if row["structure"] is not None and row["stage"]:
            networks[str(index)] = _built(network, row["structure"]).to(example.device)
    for size in batches:
        images = example.repeat(-(-size // len(example)), 1, 1, 1)[:size].contiguous()
        turns = latencies(networks, images, rounds)
        for index in table.index:
            mine = turns.get(str(index), turns["dense"])
            table.loc[index, f"batch {size} [ms]"] = 1e3 * mine.median
            table.loc[index, f"batch {size} ×"] = turns["dense"].ratio(mine)[0]
    return table


def results_table(published: pd.DataFrame, table: pd.DataFrame, labels: Sequence[str],
                  batches: Sequence[int]) -> pd.DataFrame:
    """The paper's table, published beside measured, a row a method and stage; means over seeds, ± 95 % half-width.

    Args:
        published: the paper's rows, by method and label.
        table: `speeds`.
        labels: of the stages, as the paper calls them; the first is the baseline's.
    """
    rows = []
    plain = table[table["arm"] == BASELINE].groupby("stage")["top-1"]
    for (arm, stage), part in table.groupby(["arm", "stage"], sort=False):
        if arm == BASELINE and stage:
            continue
        name = f"{arm}, {labels[stage]}"
        known = published.loc[name] if name in published.index else {}
        row = {
            "network": name, "top-1, paper": known.get("top-1", ""), "top-1 [%]": _spread(100 * part["top-1"]),
            "conventional, as many epochs [%]": _spread(100 * plain.get_group(stage)),
            "parameters, paper": known.get("parameters", ""), "parameters": f"{part['parameters'].mean():,.0f}",
            "channels left": f"{part['channels'].mean():.0%}", "convolutions": _spread(part["convolutions"]),
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


def choices(table: pd.DataFrame, labels: Sequence[str], batches: Sequence[int]) -> pd.DataFrame:
    """What a user chooses from, as `layerlab.figures.families` takes it: means over seeds, a row a pruned network and
    one for the conventional network after all epochs."""
    rows = []
    for (arm, stage), part in table.groupby(["arm", "stage"], sort=False):
        if stage != table["stage"].max() if arm == BASELINE else not stage:
            continue
        mean, half = measure.mean_interval(part["top-1"].tolist())
        rows.append({"method": arm, "network": labels[0 if arm == BASELINE else stage],
                     "parameters": part["parameters"].mean(), "top-1": mean, "top-1 ±": half,
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
    figure, axes = canvas(rows=len(shown), width=min(16.0, max(8.0, 0.36 * count_layers)), height=2.5)
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
    return pd.DataFrame(rows).set_index("network")


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
    model = model.cpu().eval()
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
