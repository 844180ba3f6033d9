"""The identity of a result: the paper, the parameters in force, the data, and the code of plugin and core."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from layerlab.base.digests import package_digests

# Rooms of the core that show results, and make none.
SHOWING = ("cli", "reporting", "testing")


class Identity(BaseModel):
    """What a result comes from. Two runs with the same `id` are the same experiment.

    Attributes:
        paper: the strategy's name.
        profile: the one that the run began with.
        parameters: in force, the profile's own included.
        data: source → fingerprint of each dataset.
        code: whose → file → digest, without comments and docstrings: `layerlab`, and `plugin` for a paper.

    Example:
        >>> one = Identity(paper="mine", profile="cpu", parameters={"alpha": 2}, data={}, code={})
        >>> one.id == one.model_copy(update={"parameters": {"alpha": 3}}).id
        False
    """

    paper: str
    profile: str
    parameters: dict[str, Any]
    data: dict[str, str]
    code: dict[str, dict[str, str]]

    @property
    def id(self) -> str:
        """Eight hexadecimal digits; the same wherever the data lie and whatever the profile is called."""
        content = [self.paper, self.parameters, sorted(self.data.values()), self.code]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def identity_of(
    paper: str, profile: str, parameters: Mapping[str, Any], data: Mapping[str, str],
    code: Mapping[str, dict[str, str]],
) -> Identity:
    """The identity of a run with today's core.

    Args:
        paper: the strategy's name, or what else the run is called.
        profile: that it began with.
        parameters: every value in force.
        data: source → fingerprint.
        code: besides the core's, by whose it is: file → digest.
    """
    core = package_digests(Path(__file__).parents[1], SHOWING)
    return Identity(paper=paper, profile=profile, parameters=dict(parameters), data=dict(data),
                    code={**code, "layerlab": core})
