"""What the notebook shows: the paper's runs, its tables, what each setting changes, accuracy against cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from layerlab import Comparison, Dataset, Estimate, FitResult, evaluate, measure
from layerlab_network_with_subnetworks.method.networks import convolutional_chain, perceptron
from layerlab_network_with_subnetworks.strategy import NetworkWithSubnetworks

REGULAR = "ref-"
TUNED = "ref-tuned-"
"""What the references are called that train at the rate chosen on held-out images; they are regular ones, too."""
LOGGED = "network-with-subnetworks/{}/top1"


def unit_range(data: Dataset) -> Dataset:
    """The same data with pixels in [0, 1] instead of normalised (Section 4)."""
    halves = {half: replace(getattr(data, half), mean=(0.0,) * data.shape[0], std=(255.0,) * data.shape[0])
              for half in ("train", "test")}
    return replace(data, **halves, fingerprint=f"{data.fingerprint}-unit")


def depth(arm: str) -> int:
    """Hidden layers of the base of an arm: 2 for `model0-1-2` and for `ref-model2`."""
    return int(arm.rpartition("-")[2].removeprefix("model"))


def arms(l2: Mapping[str, float], cuda_graph: bool = False) -> dict[str, NetworkWithSubnetworks]:
    """Strategies by the paper's names.

    Args:
        l2: arm → λ. `ref-model2` is trained regularly, with equation (3); `model0-1-2` at once with its sub-models.
        cuda_graph: for all of them, so that their times can be compared.
    """
    return {
        name: NetworkWithSubnetworks(l2=value, cuda_graph=cuda_graph, **(
            {"layers": (), "momentum_format": "tensorflow"} if name.startswith(REGULAR) else {}))
        for name, value in l2.items()
    }


def tuned(references: Sequence[str]) -> dict[str, str]:
    """The paper's references → what they are called when they train at their own rate."""
    return {name: TUNED + name.removeprefix(REGULAR) for name in references}


def rate_table(tried: Mapping[float, Comparison]) -> pd.DataFrame:
    """What each reference reaches on held-out images at each learning rate.

    Args:
        tried: learning rate → the references trained with it on `Dataset.held_out`.

    Returns:
        A row a reference, a column a rate: `top-1` of the last epoch, a share, mean over seeds; in `chosen` the rate
        that is best, the smallest of equals.
    """
    table = pd.DataFrame({rate: {arm: run.estimate(lambda result: result.final["test/top1"], arm).mean
                                 for arm in run.arms} for rate, run in sorted(tried.items())})
    return table.assign(chosen=table.idxmax(axis=1))


def merged(*comparisons: Comparison) -> Comparison:
    """The arms of several comparisons under the same seeds as one comparison."""
    return Comparison({key: result for each in comparisons for key, result in each.results.items()})


def reference_numbers(comparison: Comparison) -> dict[str, float]:
    """What a gate reads: accuracy of each reference in its last epoch, in per cent, mean over seeds."""
    return {f"{arm}_top1": round(comparison.estimate("top-1", arm).mean, 2)
            for arm in comparison.arms if arm.startswith(REGULAR)}


def networks(names: Sequence[str], data: Dataset) -> dict[str, Callable[[], nn.Module]]:
    """The perceptron of each arm, as functions that build them."""
    return {name: partial(perceptron, data.classes, data.shape[1], data.shape[0], depth(name)) for name in names}


def schedule(epochs: int) -> dict[str, Any]:
    """The paper's, scaled to `epochs`: the rate is divided by three after one and two thirds (200 and 400 of 600)."""
    milestones = (round(epochs / 3), round(2 * epochs / 3))
    return {"epochs": epochs, "schedule": "step", "milestones": milestones, "gamma": 1 / 3}


def strategy_of(result: FitResult) -> NetworkWithSubnetworks:
    """The strategy that a fit was trained with, as it left it."""
    (strategy,) = result.strategies
    assert isinstance(strategy, NetworkWithSubnetworks)
    return strategy


def accuracies(result: FitResult) -> pd.DataFrame:
    """Test accuracy of a fit's base and sub-models, as shares: epochs × models, the base first."""
    *smaller, base = strategy_of(result).models
    smaller.reverse()
    if result.name.startswith(REGULAR):
        base = f"model{depth(result.name)}"
    return pd.DataFrame(
        [[row["test/top1"], *(row[LOGGED.format(name)] for name in smaller)] for row in result.history],
        columns=[base, *smaller], index=[row["epoch"] for row in result.history],
    )


def accuracy(result: FitResult, model: str, when: str) -> float:
    """A model's test accuracy, a share.

    Args:
        when: `best`: in the epoch of the base's best test accuracy, which is what the paper reports (the first such
            epoch); `last`: in the last one.
    """
    table = accuracies(result)
    return float(table[model].iloc[int(table.iloc[:, 0].to_numpy().argmax()) if when == "best" else -1])


def published(paper: Any, dataset: str, arm: str) -> tuple[str, str, pd.DataFrame]:
    """The paper's table for an arm: (its number, the dataset that it is of, the table).

    MNIST's for a dataset that the paper does not have.
    """
    number = {"model0-1": 3, "model0-1-2": 5}.get(arm, 1) + (dataset == "fashion-mnist")
    return str(number), "Fashion-MNIST" if dataset == "fashion-mnist" else "MNIST", paper.table(str(number)).frame


def gains(comparison: Comparison, when: str = "best", family: str = REGULAR) -> dict[str, Estimate]:
    """Points of accuracy against the regularly trained network, by the ends of the claims' names.

    Args:
        when: as `accuracy`.
        family: `REGULAR` for the references at the paper's rate, `TUNED` for those at their own.
    """
    wanted = {
        "model2-gain": ("model0-1-2", "model2"),
        "model1-gain": ("model0-1-2", "model1"),
        "model0-gain": ("model0-1-2", "model0"),
        "model0-1-gain": ("model0-1", "model1"),
    }
    return {end: gain(comparison, arm, model, family + model, when) for end, (arm, model) in wanted.items()
            if {arm, family + model} <= set(comparison.arms)}


def gain(comparison: Comparison, arm: str, model: str, reference: str, when: str = "best") -> Estimate:
    """Points of accuracy that `model` of `arm` has more than the regularly trained `reference`."""
    mine = comparison.per_seed(lambda result: accuracy(result, model, when), arm)
    theirs = comparison.per_seed(lambda result: accuracy(result, model, when), reference)
    return Estimate(tuple(100 * (a - b) for a, b in zip(mine, theirs, strict=True)), "points")


def cost_ratio(comparison: Comparison, arm: str, references: Sequence[str], metric: str = "seconds") -> Estimate:
    """Seconds (or `TFLOP`) of training `arm` over those of training the references one after the other."""
    mine = comparison.per_seed(metric, arm)
    theirs = zip(*(comparison.per_seed(metric, name) for name in references), strict=True)
    return Estimate(tuple(a / math.fsum(each) for a, each in zip(mine, theirs, strict=True)), "×")


def equal_budget(
    comparison: Comparison, arm: str, references: Sequence[str], steps: int, metric: str = "TFLOP"
) -> dict[str, Any]:
    """The schedule of references that together cost what `arm` costs: as `schedule`, shortened or stretched to a step.

    Args:
        steps: of an epoch.
        metric: what costs are counted in, `TFLOP` or `seconds`.
    """
    whole = comparison.of(references[0])[0].steps
    # Sums of floats may miss a whole number by their last digits.
    budget = max(1, math.floor(whole * cost_ratio(comparison, arm, references, metric).mean + 1e-6))
    return {"epochs": -(-budget // steps), "max_steps": budget, "schedule": "step", "schedule_each": "step",
            "milestones": (round(budget / 3), round(2 * budget / 3)), "gamma": 1 / 3}


def rates_of(references: Sequence[str], rates: pd.DataFrame | None, lr: float) -> dict[float, list[str]]:
    """Learning rate → the references that train with it: those of `rate_table`, or all with `lr`."""
    if rates is None:
        return {lr: list(references)}
    return {rate: list(group.index) for rate, group in rates.groupby("chosen")}


def against_equal_budget(comparison: Comparison, equal: Comparison, arm: str, family: str) -> Comparison:
    """Each model of `arm` beside the reference that trained with its share of the same budget, for `explore.payoff`.

    Args:
        equal: the references trained with `equal_budget`.
        family: what the references in `comparison` are called, as in `gains`.
    """
    results: dict[tuple[str, int], FitResult] = {}
    pairs = {}
    baseline = family + accuracies(comparison.of(arm)[0]).columns[0]
    for seed in comparison.seeds:
        results[baseline, seed] = comparison.results[baseline, seed]
        table = accuracies(comparison.results[arm, seed])
        for model in table.columns:
            title = f"{model} of {arm}"
            pairs[title] = f"{title} · equal budget"
            history = [{**row, "test/top1": value} for row, value in
                       zip(comparison.results[arm, seed].history, table[model], strict=True)]
            results[title, seed] = replace(comparison.results[arm, seed], history=history)
            results[pairs[title], seed] = equal.results[REGULAR + model, seed]
    return Comparison(results, {}, baseline, pairs)


def speed_table(comparisons: Mapping[str, Comparison], arm: str, references: Sequence[str]) -> pd.DataFrame:
    """Seconds an epoch of `arm` and of the references, and the ratios of seconds and FLOPs over the whole run."""
    rows = []
    for name, comparison in comparisons.items():
        row: dict[str, Any] = {"dataset": name}
        for each in [*references, arm]:
            row[f"{each} [s/epoch]"] = comparison.estimate(
                lambda result: result.total("time/epoch_seconds") / len(result.history), each).mean
        row["ratio of seconds"], row["±"] = cost_ratio(comparison, arm, references).interval
        row["ratio of FLOPs"] = cost_ratio(comparison, arm, references, "TFLOP").values[0]
        rows.append(row)
    return pd.DataFrame(rows).set_index("dataset").dropna(axis=1, how="all")


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def table(published: pd.DataFrame, comparison: Comparison, names: Sequence[str]) -> pd.DataFrame:
    """One of Tables 1 to 6, published beside measured.

    Args:
        published: the paper's.
        names: the arms whose models stand in it: the references, or one of `model0-1…`.

    Returns:
        A row a model: `paper`, `best epoch` (the base's), `last epoch` (mean ± half-width of the 95 % interval over
        seeds), `parameters (paper)`, `parameters`.
    """
    rows = []
    for name in names:
        results = comparison.of(name)
        for model in accuracies(results[0]).columns:
            label = name if name.startswith(REGULAR) else model
            known = published.loc[label] if label in published.index else {}
            whole = results[0].model
            size = count(whole if name.startswith(REGULAR) else strategy_of(results[0]).networks(whole)[model])
            rows.append({
                "model": label, "paper": known.get("test accuracy", ""),
                "best epoch": str(Estimate(tuple(accuracy(result, model, "best") for result in results))),
                "last epoch": str(Estimate(tuple(accuracy(result, model, "last") for result in results))),
                "parameters (paper)": known.get("parameters", ""), "parameters": f"{size:,}",
            })
    return pd.DataFrame(rows).set_index("model")


def learning_curves(comparison: Comparison) -> pd.DataFrame:
    """Every model's accuracy over epochs and seconds, as `layerlab.figures.curves` takes it: an arm a model."""
    frames = []
    for (arm, seed), result in comparison.results.items():
        seconds = result.frame["seconds"].to_numpy()
        for model, values in accuracies(result).items():
            label = arm if arm.startswith(REGULAR) else f"{model} of {arm}"
            frames.append(pd.DataFrame({"arm": label, "seed": seed, "epoch": values.index, "seconds": seconds,
                                        "test/top1": values.to_numpy()}))
    return pd.concat(frames, ignore_index=True)


def cost_and_accuracy(comparison: Comparison, example: Tensor, rounds: int = 15) -> pd.DataFrame:
    """What a user chooses from: every detached network of the first seed's runs and every regularly trained one.

    Args:
        example: images as the networks take them; latency is measured on one, by turns.
        rounds: of timing.

    Returns:
        A row a network: `family` (the arm, or `trained separately`), `model`, `parameters`, `latency` in microseconds
        for one image (median over rounds of 20 calls), `top-1` in the last epoch, mean over seeds, with `top-1 ±`.
    """
    found: list[dict[str, Any]] = []
    built: dict[str, nn.Module] = {}
    for arm in comparison.arms:
        results = comparison.of(arm)
        regular = arm.startswith(REGULAR)
        alone = strategy_of(results[0]).networks(results[0].model)
        for model in reversed(accuracies(results[0]).columns):
            mean, half = Estimate(tuple(accuracy(result, model, "last") for result in results)).interval
            network = results[0].model if regular else alone[model]
            built[f"{arm} {model}"] = network.eval()
            alike = "trained separately, own rate" if arm.startswith(TUNED) else "trained separately"
            found.append({"family": alike if regular else f"{arm}, trained at once", "model": model,
                          "parameters": count(network), "top-1": mean, "top-1 ±": half})
    image = example[:1]

    def call(network: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(20):
                network(image)

    turns = measure.time_by_turns({name: partial(call, network) for name, network in built.items()}, rounds,
                                  device=str(image.device))
    frame = pd.DataFrame(found)
    frame.insert(3, "latency", [1e6 * turns[name].median / 20 for name in built])
    return frame.sort_values(["family", "parameters"], ascending=[False, True], ignore_index=True)


def setting_arms(l2: float) -> dict[str, NetworkWithSubnetworks]:
    """One strategy a setting that the text leaves out or that it argues for, each changed alone."""
    return {
        "as the paper": NetworkWithSubnetworks(l2=l2),
        "TensorFlow momentum": NetworkWithSubnetworks(l2=l2, momentum_format="tensorflow"),
        "mean of all models": NetworkWithSubnetworks(l2=l2, sharing="all"),
        "L2 on all losses": NetworkWithSubnetworks(l2=l2, l2_on="all"),
        "L2 on biases": NetworkWithSubnetworks(l2=l2, l2_biases=True),
        "L2 with ½": NetworkWithSubnetworks(l2=l2 / 2),
        "no L2": NetworkWithSubnetworks(l2=0.0),
        "dropout by layer": NetworkWithSubnetworks(l2=l2, dropout_by="layer"),
        "dropout on pixels": NetworkWithSubnetworks(l2=l2),
        "torch initial weights": NetworkWithSubnetworks(l2=l2),
    }


def setting_networks(data: Dataset) -> dict[str, Callable[[], nn.Module]]:
    """The network with two hidden layers of each of `setting_arms`."""
    build = partial(perceptron, data.classes, data.shape[1], data.shape[0], 2)
    options: dict[str, dict[str, Any]] = {
        # The text's "input layer 0.8, hidden layers 0.5", as shares that are kept and dropped.
        "dropout on pixels": {"pixel_dropout": 0.2, "dropout": (0.5,)},
        "torch initial weights": {"initial": "torch"},
    }
    return {name: partial(build, **options.get(name, {})) for name in setting_arms(0.0)}


def settings_table(*comparisons: Comparison) -> pd.DataFrame:
    """Last epoch's accuracy of every model with each setting, mean over seeds, and its change in points against the
    first setting, with half-widths of 95 % intervals where there are several seeds."""
    results = [(arm, comparison.of(arm)) for comparison in comparisons for arm in comparison.arms]
    rows = []
    for arm, mine in results:
        row: dict[str, Any] = {"setting": arm}
        for model in accuracies(mine[0]).columns:
            values = [accuracy(result, model, "last") for result in mine]
            changes = [100 * (value - accuracy(result, model, "last"))
                       for value, result in zip(values, results[0][1], strict=True)]
            row[model] = Estimate(tuple(values)).mean
            row[f"change of {model}"], row[f"{model} ±"] = Estimate(tuple(changes)).interval
        rows.append(row)
    return pd.DataFrame(rows).set_index("setting").dropna(axis=1, how="all")


def settings_bars(frame: pd.DataFrame) -> pd.DataFrame:
    """`settings_table` as `layerlab.figures.grouped_bars` takes it: without its first row, a bar a model."""
    models = [column.removeprefix("change of ") for column in frame if column.startswith("change of ")]
    return pd.DataFrame([
        {"setting": setting.replace(" ", "\n", 1), "model": model, "points": row[f"change of {model}"]}
        for setting, row in frame.iloc[1:].iterrows() for model in models
    ])


def convolutional_arms(
    blocks: int, classes: int, channels: int, width: int
) -> tuple[dict[str, Callable[[], nn.Module]], dict[str, NetworkWithSubnetworks]]:
    """Convolutional NSN with one and with two blocks detached at a time, beside networks trained separately.

    Args:
        blocks: of the base that can be detached.
        classes, channels, width: of `convolutional_chain`.

    Returns:
        (arm → function that builds its network, arm → strategy). No penalty.
    """
    names = tuple(f"block{number}" for number in range(1, blocks + 1))
    strategies = {f"{REGULAR}model{size}": NetworkWithSubnetworks(layers=(), l2=0.0)
                  for size in range(0, blocks + 1, 2)}
    strategies["one block at a time"] = NetworkWithSubnetworks(layers=names, l2=0.0)
    strategies["two blocks at a time"] = NetworkWithSubnetworks(layers=names, detach_at_once=2, l2=0.0)
    depths = {name: depth(name) if name.startswith(REGULAR) else blocks for name in strategies}
    built: dict[str, Callable[[], nn.Module]] = {
        name: partial(convolutional_chain, classes, channels, width, size) for name, size in depths.items()}
    return built, strategies


def seconds_table(comparison: Comparison) -> pd.DataFrame:
    """Seconds of training of each arm, mean over seeds, and how many models come of it."""
    rows = {}
    for arm in comparison.arms:
        models = strategy_of(comparison.of(arm)[0]).models
        rows[arm] = {"models": len(models), "seconds": comparison.estimate("seconds", arm).mean}
    return pd.DataFrame(rows).T


def detached_accuracy(result: FitResult, data: Dataset) -> dict[str, float]:
    """Test accuracy of each network that `detach` gives, evaluated on its own, as shares."""
    return {name: evaluate(model.to(data.test.labels.device), data.test)["test/top1"]
            for name, model in strategy_of(result).networks(result.model).items()}
