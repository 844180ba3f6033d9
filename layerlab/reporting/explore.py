"""Strategies on your own network and images: which arms there are, what they gain and cost, which one to use."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import SkipValidation
from torch import nn

from layerlab.base.arguments import validated
from layerlab.base.errors import LayerlabError, reason
from layerlab.base.text import reproduce_command
from layerlab.base.trees import on_tensors
from layerlab.base.usage import note_listed
from layerlab.contract.strategy import Strategy, check_composition, preflights
from layerlab.reporting.advice import COSTS as COSTS
from layerlab.reporting.advice import Advice
from layerlab.reporting.advice import advise as advise
from layerlab.reporting.against import against as against
from layerlab.reporting.against import against_table as against_table
from layerlab.reporting.against import margins as margins
from layerlab.reporting.against import pareto_front as pareto_front
from layerlab.reporting.against import payoff as payoff
from layerlab.reporting.answer_page import Report
from layerlab.reporting.conclusion import keep_report
from layerlab.reporting.paying import judge_arms
from layerlab.runs.record import default_folder
from layerlab.runs.session import Session
from layerlab.show.table import Table
from layerlab.training.companions import Equal
from layerlab.training.results import BASELINE as BASELINE
from layerlab.training.results import Comparison
from layerlab.training.units import in_units as in_units
from layerlab.workload.builders import network_builder, own_network
from layerlab.workload.dataset import Augment, Dataset
from layerlab.workload.loading import load_dataset
from layerlab.workload.own import Data
from layerlab.workload.zoo import MODELS

ALL = "all"


@validated
def load_images(
    data: str, network: str, *, image_size: int | None = None, channels: Literal[1, 3] | None = None,
    limit: int | None = None, augment: Augment = "none", padding: int = 2, validation: int | None = None,
    **options: Any,
) -> Dataset:
    """`load_dataset` with the channels that a network takes, where that is known: 3 for torchvision's.

    Args:
        data, image_size, channels, limit, options: as `load_dataset`.
        network: as `build_network` takes it.
        augment, padding: as `Dataset.augmented`.
        validation: each so-many-th training image is set apart to choose by, as `Dataset.with_validation`, unless the
            data have a validation half of their own.
    """
    if channels is None and ":" not in network and network not in MODELS:
        channels = 3
    loaded = load_dataset(data, image_size=image_size, channels=channels, limit=limit, **options)
    if validation is not None and loaded.validation is None:
        loaded = loaded.with_validation(validation)
    return loaded.augmented(augment, padding)


@validated
def build_network(network: str, data: Dataset, options: Mapping[str, Any] | None = None) -> Callable[[], nn.Module]:
    """`layerlab.workload.builders.network_builder` for a dataset."""
    return network_builder(network, data.classes, data.shape, **(options or {}))


class Arms(NamedTuple):
    """What is to be compared with the baseline.

    Attributes:
        chosen: name → strategies.
        refused: name → why it cannot be made at all.
    """

    chosen: dict[str, tuple[Strategy, ...]]
    refused: dict[str, str]


@validated
def make_arms(
    names: str | Sequence[str] = ALL,
    combinations: SkipValidation[Sequence[str] | Mapping[str, Mapping[str, Mapping[str, Any]]]] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Arms:
    """An arm for each strategy, and for each combination of several.

    Args:
        names: installed strategies, or `all`, those of other authors included; what cannot be used is listed as such.
        combinations: as `one-method + another`; or with settings of their own, name → strategy → settings.
        settings: strategy → settings, wherever it is used without others.

    Raises:
        LayerlabError: what was written is wrong: a strategy that is not installed, settings that it does not have.
    """
    from layerlab.contract.registry import strategies

    settings = settings or {}
    for name in settings:
        strategies[name].load()
    arms = Arms({}, {})
    if names == ALL:
        note_listed(strategies)
        for name in strategies:
            try:
                arms.chosen[name] = (strategies(name, **settings.get(name, {})),)
            # A third party's strategy may fail in any way; with settings that were written for it, they are to blame.
            except (Exception, SystemExit) as error:
                if name in settings:
                    raise
                arms.refused[name] = reason(error)
    else:
        for name in [names] if isinstance(names, str) else names:
            arms.chosen[name] = (strategies(name, **settings.get(name, {})),)
    for label, parts in _combined(combinations):
        made = tuple(strategies(name, **(settings.get(name, {}) if own is None else own)) for name, own in parts)
        if label in (BASELINE, *arms.chosen, *arms.refused):
            raise LayerlabError(f"Two arms are called {label!r}; give one of them another name.")
        try:
            check_composition(made)
        except LayerlabError as error:
            arms.refused[label] = str(error)
        else:
            arms.chosen[label] = made
    return arms


def _combined(
    combinations: Sequence[str] | Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Iterable[tuple[str, list[tuple[str, Mapping[str, Any] | None]]]]:
    """(label, [(strategy, its own settings or None), …]) of each combination."""
    if isinstance(combinations, Mapping):
        for label, parts in combinations.items():
            if not isinstance(parts, Mapping) or not parts:
                raise LayerlabError(f"Combination {label!r} lists no strategies; write "
                                    f"{{{label!r}: {{'one-method': {{'share': 0.5}}, 'another': {{}}}}}}.")
            yield label, [(name, own or {}) for name, own in parts.items()]
        return
    for text in [combinations] if isinstance(combinations, str) else combinations:
        names = [part.strip() for part in str(text).split("+")]
        if len(names) < 2 or not all(names):
            raise LayerlabError(f"Combination {text!r} is none; join two strategies or more by +, such as "
                                "'one-method + another'.")
        yield " + ".join(names), [(name, None) for name in names]


def open_session(
    experiment: str, data: Dataset, network: str, output: str | Path | None = None, **parameters: Any
) -> Session:
    """A notebook's session: the same parameters, data and network resume where they were interrupted.

    Args:
        experiment: MLflow's, and the folder below `runs`.
        output: its folder. Default: `runs/<experiment>/<data>-<network>-<digest of the parameters>`.
        parameters: of the notebook.
    """
    place = session_place(experiment, data, network, output, parameters)
    return Session(experiment, place.title, place.folder, place.values, {"network": network, "dataset": data.name})


class Place(NamedTuple):
    """Where a session of a network and data is kept.

    Attributes:
        title: of its run.
        folder: of its own.
        values: its parameters, with digests of the images and of a network of your own.
    """

    title: str
    folder: Path
    values: dict[str, Any]


def session_place(
    experiment: str, data: Dataset, network: str, output: str | Path | None, parameters: Mapping[str, Any]
) -> Place:
    """Where `open_session` keeps what it opens."""
    values = {"data": data.name, "network": network, **parameters}
    title = f"{Path(data.name).name} · {network}"
    folder = output or default_folder(experiment, re.sub(r"[^\w.-]+", "-", title), values)
    # Another content of the same folder of images, or an edited network, begins anew rather than going on.
    values["content"] = data.fingerprint
    if ":" in network:
        file = own_network(network)[1]
        values["code"] = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() if file else ""
    return Place(f"{experiment} · {title}", Path(folder), values)


@validated
def survey(
    session: Session, network: Callable[[], nn.Module], data: Dataset, arms: Arms, *, equal: Equal = "flops",
    **settings: Any,
) -> Comparison:
    """Train the baseline and every arm under the same seeds, by turns; an arm that fails is left out with a reason.

    Args:
        session: keeps the checkpoints and logs the runs.
        equal: as `compare`: what the baseline is trained once more for, beside each arm and as long as that costs.
        settings: as `compare`.

    Raises:
        LayerlabError: what fails without any strategy.
    """
    every = {BASELINE: (), **arms.chosen}
    runs = session.compare(
        session.experiment, network, data, every, keep_going=tuple(arms.chosen), equal=equal, **settings
    )
    runs.failures |= arms.refused
    return runs


@dataclass(frozen=True)
class Conclusion:
    """A notebook's answer, for display.

    Attributes:
        sentence: the answer.
        page: the file that shows it with figure, table and how to repeat it.
        advice: which strategy is best for what.
    """

    sentence: str
    page: Path
    advice: Advice

    def __str__(self) -> str:
        return "\n".join([self.sentence, *self.advice.sentences, str(self.page)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        told = html.escape(self.sentence)
        return f"<p><b>{told}</b></p>{self.advice._repr_html_()}<p>{html.escape(str(self.page))}</p>"


def conclude(
    session: Session, runs: Comparison, data: Dataset, network: str, *, tolerance: float = 1.0
) -> Conclusion:
    """Answer whether any arm pays, keep the answer with a page that shows it, and give both for display.

    Args:
        session: not closed yet.
        runs: of its arms.
        data, network: as the notebook has them.
        tolerance: points of top-1 that may be lost for a saving, and below which a gain is worth nothing.
    """
    validated = data.validation is not None
    images = len(data.test)
    verdict = judge_arms(runs, metric="validation/top1" if validated else "test/top1", tolerance=tolerance,
                         test_images=images)
    advice = advise(runs, tolerance=tolerance, test_images=images)
    whole = next(iter(runs.results.values()), None)
    steps = {"data": repr(data), "seeds": ", ".join(map(str, runs.seeds))}
    if whole is not None:
        steps["training"] = f"{len(whole.history)} epochs, {whole.settings.optimizer} at {whole.settings.lr:g}"
    changed = {name: value for name, value in session.values.items() if name not in ("content", "code")}
    command = reproduce_command(f"notebooks/{session.experiment}.ipynb", "", changed)
    title = f"{Path(network).name} on {Path(data.name).name}"
    report = Report(title, verdict, runs, advice.sentences, runs.failures, steps, command)
    return Conclusion(report.sentence, keep_report(session, report), advice)


@validated
def preflight_table(
    network: Callable[[], nn.Module], data: SkipValidation[Data], arms: Mapping[str, Sequence[Strategy]]
) -> Table:
    """What each strategy can do with a network before anything is trained: one row a strategy of each arm.

    Args:
        network: builds it.
        data: whose images it takes.
        arms: name → strategies; one that refuses the network stands there with its reason.
    """
    example = on_tensors(lambda each: each[:2], next(data.test.batches(2))[0])
    own = network().to(data.test.device)
    rows: list[Sequence[str]] = []
    notes: list[str] = []
    for arm, chosen in arms.items():
        try:
            found = preflights(chosen, own, example)
        # A third party's strategy may fail in any way.
        except (Exception, SystemExit) as error:
            rows.append((arm, reason(error)))
            continue
        for name, each in found.items():
            acts = f"{len(each.covered)} of {len(each.covered) + len(each.left_out)} layers"
            reasons = "; ".join(dict.fromkeys(each.left_out.values()))
            saves = ", ".join(f"{100 * share:.1f} % of {what}" for what, share in each.saves.items())
            rows.append((arm if len(chosen) == 1 else f"{arm}: {name}", acts, reasons or "nothing", saves or "unknown"))
            notes += each.notes
    header = ("arm", "acts on", "leaves out", "saves at most")
    return Table(header, rows, "Before the first step", tuple(dict.fromkeys(notes)))
