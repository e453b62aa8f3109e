"""Options checked against a function's signature: the signature is the schema.

Everything that a config names (a task, a topology, an algorithm, an optimizer, ...) is a plain
function or class, and its options are that callable's parameters. So a new one needs no schema
beside its signature, and an unknown key, a wrong type or a missing option fails before anything
starts.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from decentral.errors import UserError

T = TypeVar("T")


def bind(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    key: str,
    given: Collection[str] = (),
    name: str | None = None,
    beside: Collection[str] = (),
) -> dict[str, Any]:
    """Check `options` against the signature of `function` and return them, converted.

    `given` are parameters that the caller supplies itself: they are no options. `key` is the
    dotted config key that holds the options, `name` what the user calls the function, and `beside`
    the keys that stand beside the options; they serve the messages alone. An unannotated
    parameter takes the type of its default.

    Raises UserError naming the key, what came and what is allowed.
    """
    name = name or function.__name__
    parameters = _options(function, given)
    for option in options:
        if option not in parameters:
            raise UserError(
                f"{name} takes no option {option!r}; {_allowed(option, [*beside, *parameters])}."
                f" To take the key away: {key}.{option}=null",
                f"{key}.{option}",
            )
    # Defaults are the signature's own and need no check: only what is given or missing does.
    fields = {
        option: (kind, ...)
        for option, (kind, default) in parameters.items()
        if option in options or default is ...
    }
    schema = create_model(
        "Options",
        __config__=ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=()),
        **fields,  # type: ignore[call-overload]
    )
    try:
        bound = schema(**options)
    except ValidationError as error:
        raise validation_error(error, key) from None
    return {option: getattr(bound, option) for option in options}


def choose(table: Mapping[str, T], name: str, key: str, kind: str) -> T:
    """The row `name` of a table of `kind`s, or a UserError that lists the rows."""
    if name not in table:
        raise UserError(f"there is no {kind} {name!r}; {_allowed(name, table)}", key)
    return table[name]


def validation_error(error: ValidationError, prefix: str = "") -> UserError:
    """A pydantic error as one UserError: a line per fault, each naming key, rule and value."""
    faults: dict[str, None] = {}
    path = rule = ""
    for fault in error.errors():
        path = ".".join(str(part) for part in (prefix, *fault["loc"]) if part != "")
        if fault["type"] == "extra_forbidden":
            rule = "is not a known key; check its spelling or take it away"
        elif fault["type"] == "missing":
            rule = "is required; set it"
        elif fault["type"] == "union_tag_not_found":
            path, rule = f"{path}.{_discriminator(fault)}", "is required; set it"
        elif fault["type"] == "union_tag_invalid":
            path = f"{path}.{_discriminator(fault)}"
            context = fault.get("ctx", {})
            rule = f"must be one of {context['expected_tags']}; got {context['tag']!r}"
        else:
            message = fault["msg"].removeprefix("Value error, ")
            rule = f"{message[0].lower()}{message[1:]}; got {fault['input']!r}"
        faults[f"{path}: {rule}"] = None
    return UserError(rule, path) if len(faults) == 1 else UserError("\n".join(faults))


def _discriminator(fault: Any) -> str:
    """The key by which pydantic tells the members of a union apart."""
    return fault["ctx"]["discriminator"].strip("'")


def _options(function: Callable[..., Any], given: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default or ...) of every parameter that a user may set."""
    # torch's own annotations admit tensors and are partly absent: its defaults tell more.
    trusted = not function.__module__.startswith("torch.")
    annotated = function.__init__ if isinstance(function, type) else function
    hints = get_type_hints(annotated, include_extras=True) if trusted else {}
    options = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in given or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        options[parameter.name] = (hints.get(parameter.name, _type_of(default)), default)
    return options


def _type_of(default: object) -> Any:
    if isinstance(default, bool):
        return bool
    return float if isinstance(default, int | float) else Any


def _allowed(word: str, words: Collection[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(words) or 'none'}"
