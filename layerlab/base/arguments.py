"""Arguments of public functions, validated as the settings of strategies and of `fit` are."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, InstanceOf, ValidationError, create_model

from layerlab.base.errors import LayerlabError, nearest, sentence

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def validated(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A function whose arguments are held against its annotations, by pydantic, each time it is called.

    Raises:
        LayerlabError: (when called) an argument that does not exist, with the nearest name, or one of another type or
            value; in one sentence.

    Example:
        >>> @validated
        ... def double(number: int) -> int:
        ...     return 2 * number
        >>> double("much")
        Traceback (most recent call last):
        layerlab.base.errors.LayerlabError: double: setting 'number' should be a valid integer, ... got 'much'.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())

    @functools.cache
    def model() -> type[BaseModel]:
        # When it is first called: annotations may name what is defined further down.
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {name: (_as_it_is(hints[name]), ...) for name, each in parameters.items()
                                  if each.kind in _NAMED and name in hints}
        return create_model(function.__name__, __config__=ConfigDict(arbitrary_types_allowed=True), **fields)

    @functools.wraps(function)
    def checked(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        for name in kwargs:
            if name not in parameters and not open_ended:
                near = nearest(name, [each for each in parameters if each != "self"])
                guess = f"did you mean {near!r}?" if near else f"it has {', '.join(parameters)}"
                raise LayerlabError(f"{function.__name__} has no setting {name!r} ({guess}).")
        bound = signature.bind(*args, **kwargs)
        fields = model().model_fields
        given = {name: value for name, value in bound.arguments.items() if name in fields}
        bound.apply_defaults()
        try:
            made = model()(**{name: bound.arguments[name] for name in fields})
        except ValidationError as error:
            raise LayerlabError(sentence(error, function.__name__)) from None
        bound.arguments.update({name: getattr(made, name) for name in given})
        return function(*bound.args, **bound.kwargs)

    return checked


def _as_it_is(hint: Any) -> Any:
    """The type of an argument; of our own objects only what they are is looked at, not what they hold."""
    of_ours = isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"))
    return InstanceOf[hint] if of_ours else hint  # type: ignore[misc]
