"""Every figure of every notebook, from small data of the shapes that the larger profiles have."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from layerlab import Comparison, LayerMap, build_model, compare, figures, fit, load_dataset, measure

RANDOM = np.random.default_rng(0)
EQUAL, PLACEBO = "plain training of the same cost", "its placebo"


def learning(arms: Iterable[str], epochs: int = 20, seeds: int = 3) -> pd.DataFrame:
    """As `Comparison.frame`."""
    rows = []
    for arm in arms:
        pace = RANDOM.uniform(0.8, 3.0)
        for seed in range(seeds):
            for epoch in range(1, epochs + 1):
                reached = 0.31 + 0.6 * (1 - math.exp(-4 * epoch / epochs)) - RANDOM.uniform(0, 0.02)
                rows.append({"arm": arm, "seed": seed, "epoch": epoch, "seconds": pace * epoch, "test/top1": reached,
                             "test/top5": min(1.0, reached + 0.07)})
    return pd.DataFrame(rows)


def held_against(titles: Iterable[str], kinds: Iterable[str] = (EQUAL, PLACEBO), seeds: int = 3) -> pd.DataFrame:
    """As `explore.margins`."""
    return pd.DataFrame([{"title": title, "against": kind, "seed": seed, "points": RANDOM.normal(-1, 2)}
                         for title in titles for kind in kinds for seed in range(seeds)])


def layers(count: int, epochs: int, least: float = -2.0, most: float = 0.0) -> pd.DataFrame:
    names = [f"stage{number // 18 + 1}.{number % 18 // 2}.conv{number % 2 + 1}" for number in range(count - 1)] + ["fc"]
    return pd.DataFrame(RANDOM.uniform(least, most, (count, epochs)), index=names, columns=range(1, epochs + 1))


def states(count: int, epochs: int) -> pd.DataFrame:
    return (layers(count, epochs, 0.0, 1.0) > 0.5).astype(int)


STRATEGIES = ("baseline", "adaptive-pruning", "comm-overlap", "lars-skip", "learn-and-drop", "low-bit",
              "memory-reorder", "network-with-subnetworks", "lars-skip + memory-reorder")


def runs(arms: Iterable[str] = STRATEGIES) -> pd.DataFrame:
    """As `explore.in_units` of `Comparison.runs`, or of `Comparison.summary` with one seed."""
    return pd.DataFrame([{"arm": arm, "seed": seed, "top-1": RANDOM.uniform(92, 97), "top-1 ±": 0.7,
                          "seconds": RANDOM.uniform(3, 140), "seconds ±": 2.0, "TFLOP": RANDOM.uniform(10, 30),
                          "TFLOP ±": 0.0, "peak MB": RANDOM.uniform(5.8, 6.7), "peak MB ±": math.nan}
                         for arm in arms for seed in range(3)])


HEADINGS = {"top-1": "top-1 [%]", "seconds": "time [s]", "TFLOP": "compute [GFLOP]", "peak MB": "peak memory [MB]"}


def payoff_points() -> pd.DataFrame:
    return pd.DataFrame([{"arm": arm, "kind": kind, "x": RANDOM.uniform(0.4, 5), "x ±": 0.1,
                          "y": RANDOM.uniform(-7, 1), "y ±": 0.4}
                         for arm in STRATEGIES[1:] for kind in ("strategy", EQUAL, PLACEBO)])


def core() -> dict[str, Callable[[], Figure]]:
    """Those of `layerlab.figures`, as explore, compare, the answer's page and the papers' notebooks draw them."""
    costs = {name: HEADINGS[name] for name in ("seconds", "TFLOP", "peak MB")}
    means = runs().groupby("arm", sort=False, as_index=False).first()
    bars = pd.DataFrame([{"x": f"setting {number}", "hue": f"model{hue}", "y": RANDOM.normal(0, 9)}
                         for number in range(10) for hue in range(3)])
    choices = pd.DataFrame([{"family": family, "label": f"{left} left", "cost": cost * RANDOM.uniform(0.9, 1.1),
                             "y": RANDOM.uniform(0.46, 0.54), "y ±": 0.02}
                            for family in "abcd" for left, cost in (("84.5%", 2e5), ("40%", 8e4), ("4%", 9e3))])
    places = pd.DataFrame([{"where": where, "arm": arm, "FLOPs": RANDOM.choice([0.5, 0.75, 1.0]),
                            "top-1": RANDOM.choice([0.262, 0.278]), "FLOPs ±": math.nan, "top-1 ±": 0.002}
                           for where in ("imagenette, vgg-f", "imagenette, resnet18", "cifar10, vgg-f")
                           for arm in ("full learning", "α = 8", "α = 32", "own history", "α = 8, forget after 2")])
    depths = pd.DataFrame({"layer": [f"features.conv{number}" for number in range(1, 17)],
                           "a": RANDOM.uniform(1, 900, 16), "b": RANDOM.uniform(0.1, 9, 16)})
    kept = {"low-bit: formats": LayerMap(layers(20, 90), "position"),
            "lars-skip: skipped": LayerMap(states(20, 90), "", ("learns", "skipped"))}
    return {
        "curves": lambda: figures.curves(learning(STRATEGIES), "test/top1", title="cifar10"),
        "layer_bars": lambda: figures.layer_bars(depths, {"a": "operands", "b": "tensors"}, "MB", "traffic", log=True),
        "layer_epoch_map": lambda: figures.layer_epoch_map(
            {f"resnet-cifar-56, {data}": layers(56, 24) for data in ("mnist", "cifar10")}, "score",
            edges={f"resnet-cifar-56, {data}": [0] * 6 + [12] * 8 + [40] * 10 for data in ("mnist", "cifar10")}),
        "layer_maps": lambda: figures.layer_maps(kept, "of the first seed"),
        "side_by_side": lambda: figures.side_by_side(runs(), HEADINGS, baseline="baseline"),
        "margins": lambda: figures.margins(held_against([f"cifar10: {name}, pays: undecided" for name in STRATEGIES])),
        "fronts": lambda: figures.fronts(means, costs, "top-1", HEADINGS["top-1"],
                                         dict.fromkeys(costs, ("baseline", "low-bit"))),
        "payoff": lambda: figures.payoff(payoff_points()),
        "grouped_bars": lambda: figures.grouped_bars(bars, "x", "y", "hue", "points of accuracy", title="settings"),
        "tradeoff": lambda: figures.tradeoff(places, "FLOPs", "top-1", "arm", "where", "FLOPs", "final top-1"),
        "families": lambda: figures.families(choices, {"cost": "parameters"}, "y", "family", "label", "top-1", "all"),
    }


def pictures_of(plugin: str) -> Any:
    return importlib.import_module(f"layerlab_{plugin.replace('-', '_')}.pictures")


def lars_skip() -> dict[str, Callable[[], Figure]]:
    pictures = pictures_of("lars-skip")
    import torch

    with torch.device("meta"):
        costs = measure.layer_costs(build_model("vgg-f"), (3, 224, 224), 32)
    prefixes = pd.DataFrame({"skipped": range(6), "up to": ["none", *(f"conv{number}" for number in range(1, 6))],
                             "flops": np.linspace(1, 0.353, 6), "time": np.linspace(1, 0.362, 6)})
    savings = pd.DataFrame([{"dataset": data, "what": what, "saved": RANDOM.uniform(0, 0.4), "±": 0.02}
                            for data in ("imagenette", "cifar10")
                            for what in ("MACs, paper's arithmetic", "FLOPs, measured", "seconds, measured")])
    arms = ["full learning", "α = 8", "α = 32", "α = 128", "own history", "α = 8, keep nw", "α = 8, forget after 2"]
    sweep = pd.DataFrame([{"where": where, "arm": arm + end, "FLOPs": 0.7, "top-1": 0.27}
                          for where in ("imagenette, vgg-f", "cifar10, resnet18") for arm in arms
                          for end in ("", " · placebo")])
    maps = {f"{data}, seed {seed}": states(5, 20) for data in ("imagenette", "cifar10") for seed in range(3)}
    return {
        "operations": lambda: pictures.operations(costs), "traffic": lambda: pictures.traffic(costs, 32),
        "prefixes": lambda: pictures.prefixes(prefixes, "imagenette"), "skipped": lambda: pictures.skipped(maps),
        "savings": lambda: pictures.savings(savings), "sweep": lambda: pictures.sweep(sweep),
    }


def learn_and_drop() -> dict[str, Callable[[], Figure]]:
    pictures = pictures_of("learn-and-drop")
    cuts = {name: pd.DataFrame({"share": np.linspace(0.01, 0.99, 30), "FLOPs": np.linspace(0.01, 0.99, 30) ** power,
                                "features": np.geomspace(85, 0.1, 30)})
            for name, power in (("vgg11_bn", 0.5), ("vgg16_bn", 0.6), ("resnet50", 1.0), ("resnet152", 1.1))}
    steps = {name: pd.DataFrame([{"way": way, "FLOPs": share, "time": 1 - 0.8 * share, "time low": 0.9 - 0.8 * share,
                                  "time high": 1.1 - 0.8 * share} for share in (0.25, 0.5, 0.8)
                                 for way in ("frozen", "dropped, 32 bits", "dropped, 16 bits", "dropped, 8 bits")])
             for name in ("resnet-cifar-56, cifar10", "vgg-cifar-11, mnist")}
    maps = {f"resnet-cifar-56, {data}": layers(56, 24) for data in ("mnist", "cifar10")}
    edges = {title: [0] * 5 + [12] * 3 + [44] * 16 for title in maps}
    return {"cuts": lambda: pictures.cuts(cuts), "steps": lambda: pictures.steps(steps),
            "scores": lambda: pictures.scores(maps, "trend", edges)}


@functools.cache
def pruned() -> Comparison:
    """A few steps of pruning."""
    analysis = importlib.import_module("layerlab_adaptive_pruning.analysis")
    data = load_dataset("digits", limit=96, test_limit=32, device="cpu")
    network = functools.partial(analysis.residual_network, data.classes, data.shape[0], 11, 0.5)
    return compare(network, data, analysis.arms([0.8, 0.4], 1, 1e-3, "zero"), seeds=[0], epochs=3, batch_size=32,
                   progress=False)


def adaptive_pruning() -> dict[str, Callable[[], Figure]]:
    pictures = pictures_of("adaptive-pruning")
    labels = ["dense", "84.5% left", "64.6% left", "55.8% left"]
    table = pd.DataFrame([
        {"arm": arm, "seed": seed, "stage": stage, "epoch": 4 * (stage + 1), "top-1": 0.4 + RANDOM.uniform(0, 0.1),
         "parameters": 219482 * (1 if arm == "conventional" else (1, 0.84, 0.65, 0.56)[stage]),
         "batch 1 [ms]": RANDOM.uniform(2.4, 3.1), "batch 128 [ms]": RANDOM.uniform(24, 38)}
        for arm in ("conventional", "adaptive pruning", "network slimming", "torch-pruning's BNScale",
                    "torch-pruning's GroupNorm")
        for seed in range(3) for stage in range(4)])
    return {"survival": lambda: pictures.survival(pruned(), 0, ["dense", "80% left", "40% left"]),
            "choices": lambda: pictures.choices(table, labels, [1, 128], "cifar10, ResNet-20")}


def low_bit() -> dict[str, Callable[[], Figure]]:
    pictures, package = pictures_of("low-bit"), importlib.import_module("layerlab_low_bit")
    kinds = importlib.import_module("layerlab_low_bit.analysis").KINDS.values()
    arms = importlib.import_module("layerlab_low_bit.analysis").STEERINGS
    values = {"saturated": [0.0, 0.26, 154186.0], "vanished": [117815.0, 700329.0, 898638.0]}
    table = pd.DataFrame([{"arm": arm} | {f"{rate}: {kind} [ppm]": RANDOM.choice(some)
                                          for rate, some in values.items() for kind in kinds} for arm in arms])
    data = load_dataset("digits", limit=64, test_limit=32, image_size=32, device="cpu")
    network = build_model("vgg-cifar", num_classes=data.classes, channels=data.shape[0])
    return {"rates_figure": lambda: pictures.rates_figure(table, "8 bits, lenet on mnist"),
            "msb_map": lambda: pictures.msb_map(
                fit(network, data, package.LowBit(bits=8), epochs=1, batch_size=32, progress=False), "vgg-cifar")}


def memory_reorder() -> dict[str, Callable[[], Figure]]:
    pictures = pictures_of("memory-reorder")
    analysis = importlib.import_module("layerlab_memory_reorder.analysis")
    arms = importlib.import_module("layerlab_memory_reorder.method.measuring").ARMS
    _, plans = analysis.small_example()
    networks = ("caffe-alexnet", "alexnet", "vgg16", "resnet50", "googlenet")
    savings = pd.DataFrame([{"network": network, "batch": batch, "kept": batch / 8, "shared": 20 + batch / 9,
                             "slabs": 48.0, "forward reuse": 50 + batch / 40}
                            for network in networks for batch in (8, 16, 32, 64, 128, 256)])
    peaks = pd.DataFrame([{"network": network, "batch": 256, "arm": arm, "peak GB": RANDOM.uniform(0.9, 17),
                           "real": False}
                          for network in networks for arm in ("conventional plan", *arms)])
    times = pd.DataFrame([{"network": network, "batch": 16, "arm": arm, "time": 1.0, "time low": 0.9, "time high": 1.13}
                          for network in networks for arm in arms])
    return {
        "lifetimes": lambda: pictures.lifetimes({"Fig. 3: conventional": plans["conventional"],
                                                 "Fig. 4: reordered": plans["reordered"]}),
        "savings_over_batch": lambda: pictures.savings_over_batch(savings, 40),
        "peak_bars": lambda: pictures.peak_bars(peaks), "times": lambda: pictures.times(times),
    }


def comm_overlap() -> dict[str, Callable[[], Figure]]:
    pictures = pictures_of("comm-overlap")
    variants = ["no overlap", "1: backward", "2: forward", "3: segments", "1 + 2", "all together",
                "DDP, 1 MB buckets", "DDP, 5 MB buckets", "DDP, 25 MB buckets", "chosen by measuring"]
    bounds = pd.DataFrame([{"workers": workers, "variant": variant, "seconds": place, "low": place - 0.01,
                            "high": place + 0.01, "max": 0.29, "sum": 0.42, "share": 100 * (0.42 - place) / 0.13}
                           for workers in (2, 4)
                           for variant, place in zip(variants, np.linspace(0.44, 0.3, 10), strict=True)])
    links = pd.DataFrame([{"workers": workers, "variant": variant, "Mbit/s": speed, "over DDP": 1.1,
                           "low over DDP": 1.0, "high over DDP": 1.2} for workers in (2, 4) for variant in variants
                          for speed in (50, 200, 800, 0)])
    layer = [f"features.conv{number}" for number in range(1, 9)]
    spans = {variant: pd.DataFrame([{"kind": kind, "what": name, "start": 0.01 * at, "end": 0.01 * at + 0.008}
                                    for at, (kind, name) in enumerate(
                                        [(kind, name) for kind in ("forward", "backward", "communicate", "update")
                                         for name in layer])])
             for variant in ("no overlap", "all together")}
    workers = [4**power for power in range(7)]
    model = pd.DataFrame([{"workers": count, "algorithm": algorithm, "variant": variant, "speed": count**0.8,
                           "speed low": 0.8 * count**0.8, "speed high": count**0.82, "gain": 1.3, "gain low": 0.8,
                           "gain high": 1.5} for count in workers for algorithm in ("ring", "tree")
                          for variant in ("no overlap", "all together")])
    ratio = 2.0 ** (np.arange(-8, 9) / 2)
    sweep = pd.DataFrame({"ratio": ratio, "gain": 1 + 0.8 / (1 + ratio), "limit": 1 + np.minimum(ratio, 1 / ratio)})
    announced = pd.DataFrame({"speed": [14.7, 27.0], "more than without [%]": [46, 71]}, index=[16, 64])
    return {"bars": lambda: pictures.bars(bounds), "links": lambda: pictures.links(links, variants[4:]),
            "timelines": lambda: pictures.timelines(spans),
            "figure_1": lambda: pictures.figure_1(model, sweep, announced, 1.8, 64)}


def network_with_subnetworks() -> dict[str, Callable[[], Figure]]:
    pictures = pictures_of("network-with-subnetworks")
    models = [f"model{number}" for number in range(3)]
    families = ("trained separately", "trained separately, own rate", "model0-1-2, trained at once",
                "model0-1, trained at once")
    by_size = pd.concat([learning(families[:3 if model == "model2" else 4], 40).assign(panel=model)
                         for model in models])
    frame = pd.DataFrame([{"family": family, "model": model, "parameters": parameters,
                           "latency": parameters / 4000 * RANDOM.uniform(0.9, 1.1), "top-1": RANDOM.uniform(0.9, 0.98),
                           "top-1 ±": 0.003}
                          for family in families
                          for model, parameters in zip(models, (7850, 623290, 1238730), strict=True)])
    bars = pd.DataFrame([{"setting": f"{setting}\nchanged", "model": model, "points": RANDOM.normal(0, 8)}
                         for setting in ("TensorFlow", "mean of", "L2 on all", "no", "dropout by") for model in models])
    return {"curves": lambda: pictures.curves(by_size, "Test accuracy on mnist"),
            "choice": lambda: pictures.choice(frame, "NSN and networks trained separately, mnist"),
            "settings": lambda: pictures.settings(bars, "Change against the paper's settings")}


PLUGINS: Mapping[str, Callable[[], dict[str, Callable[[], Figure]]]] = {
    "adaptive-pruning": adaptive_pruning, "comm-overlap": comm_overlap, "lars-skip": lars_skip,
    "learn-and-drop": learn_and_drop, "low-bit": low_bit, "memory-reorder": memory_reorder,
    "network-with-subnetworks": network_with_subnetworks,
}


def places() -> dict[str, Callable[[], dict[str, Callable[[], Figure]]]]:
    """`core`, and the plugins by name → what gives their functions by name."""
    return {"core": core, **PLUGINS}


def drawn(place: str, name: str) -> Figure:
    """One of the figures, from the same numbers each time."""
    global RANDOM
    RANDOM = np.random.default_rng(0)
    return places()[place]()[name]()
