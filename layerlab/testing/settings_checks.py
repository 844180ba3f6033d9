"""The checks of a strategy's settings and of its way to another process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

from layerlab.base.errors import Refused, reason
from layerlab.base.names import NAME
from layerlab.base.text import from_yaml, to_yaml
from layerlab.contract.strategy import Strategy


def settings_round_trip(strategy: Strategy) -> None:
    """Settings are documented, validate, and come back through YAML; unknown settings are rejected."""
    kind = type(strategy)
    assert NAME.fullmatch(kind.name), (
        f"the name is {kind.name!r}; give the class `name: ClassVar[str]` of the form {NAME.pattern}, as its entry "
        "point's"
    )
    for name, field in kind.model_fields.items():
        assert field.description, f"setting {name!r} has no description; write a docstring under the field"
    try:
        text = to_yaml(strategy.model_dump(mode="json"))
        again = kind(**from_yaml(text))
    except Exception as error:
        raise AssertionError(
            f"settings {strategy!r} do not come back through YAML ({reason(error)}); let fields be "
            "numbers, texts, lists and dicts, or give them a validator and a serializer"
        ) from error
    assert again.model_dump(mode="json") == strategy.model_dump(mode="json"), (
        f"settings change on their way through YAML: {strategy!r} became {again!r}; a validator must give back "
        "unchanged what it made itself"
    )
    try:
        kind(**{"no-such-setting": 1})
    except Refused:
        return
    raise AssertionError("a setting that does not exist is taken; leave `extra` as 'forbid' in model_config")


def pickles(strategy: Strategy) -> None:
    """Travels to another process and has the same settings there."""
    try:
        data = pickle.dumps(strategy)
    except Exception as error:
        raise AssertionError(
            f"it cannot be pickled ({reason(error)}); define its class at the top of an importable "
            "module and keep functions and handles out of its state until `on_fit_start`"
        ) from error
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).model_dump_json())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    answer = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, env=environment)
    lines = answer.stderr.decode(errors="replace").strip().splitlines()
    assert answer.returncode == 0, (
        f"another process cannot unpickle it ({lines[-1] if lines else answer.returncode}); define its class at the "
        "top of an importable module"
    )
    assert answer.stdout.decode().strip() == strategy.model_dump_json(), "its settings are others in another process"
