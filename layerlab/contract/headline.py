"""What a paper's one sentence tells: which of its numbers, and what its method is called."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from layerlab.contract.claims import Claim, Data

# What a method may save: time and compute of the training, memory at the peak of a step, and of the network that is
# deployed its size and the time that it takes for its answer.
Cost = Literal["time", "compute", "memory", "size", "inference"]


class Headline(Data):
    """Which numbers the sentence of a paper tells: `[headline]` in its paper.toml.

    Every page, the scoreboard, the figure of all papers and the end of `layerlab reproduce` read it.

    Attributes:
        method: what the method is called in a sentence: `LARS skip`.
        against: what a user runs without it.
        accuracy: id of the claim, in points, whose number says what it does to accuracy, or a list of ids where the
            paper has one for each dataset; empty where there is none.
        costs: what the paper saves or spends → id of the claim that says so: `{time = "time-saving"}`. A claim in `%`
            is a saving; one in `×` says how many times less where its published value is above 1, else which share is
            left. An empty id takes the ratio of the notebook's comparison with training without the method, which says
            so of time, compute and memory.
        arm: what the method is called in the notebook's comparisons and in its table `pays`, from which the sentence
            takes plain training of the same cost and the placebo; empty where there is one arm alone.

    Example:
        >>> Headline(method="My method", accuracy="top1-gain", costs={"compute": "flops-saving"}).against
        'plain training'
    """

    method: str
    against: str = "plain training"
    accuracy: list[str] = Field(default_factory=list)
    costs: dict[Cost, str] = Field(default_factory=dict)
    arm: str = ""

    @field_validator("accuracy", mode="before")
    @classmethod
    def _one_or_several(cls, given: object) -> object:
        if isinstance(given, str):
            return [given] if given else []
        return given

    @model_validator(mode="after")
    def _tells_something(self) -> Headline:
        if not (self.accuracy or any(self.costs.values())):
            raise ValueError("headline names no claim; give it accuracy or a cost")
        return self

    def check(self, claims: list[Claim]) -> None:
        """Raises: ValueError: it names a claim that there is not, or one in a unit that says nothing of a cost."""
        known = {claim.id: claim for claim in claims}
        for id in filter(None, (*self.accuracy, *self.costs.values())):
            if id not in known:
                raise ValueError(f"headline names the claim {id!r}, which there is not")
        for id in self.accuracy:
            if known[id].unit != "points":
                raise ValueError(f"headline's accuracy {id!r} is in {known[id].unit}, not in points")
        for cost, id in self.costs.items():
            if id and known[id].unit not in ("%", "×"):
                raise ValueError(f"headline's {cost} {id!r} is in {known[id].unit}; a cost is in % or ×")


def ratio(claim: Claim, value: float) -> float:
    """A cost as a share of what it is without the method, from a value of the claim that says what is saved.

    Example:
        >>> from layerlab.contract.claims import Claim
        >>> about = {"statement": "less time", "where": "Table 1", "kind": "effect", "tolerance": 0.1,
        ...          "conditions": {"dataset": "cifar10"}}
        >>> ratio(Claim(id="saving", value=40, unit="%", neutral=0, **about), 25.0)
        0.75
        >>> ratio(Claim(id="faster", value=2, unit="×", neutral=1, **about), 4.0)
        0.25
        >>> ratio(Claim(id="share", value=0.3, unit="×", neutral=1, **about), 0.4)
        0.4
    """
    if claim.unit == "%":
        return 1 - value / 100
    return 1 / value if claim.value > 1 else value
