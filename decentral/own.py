"""A user's own task or method, which a config names as `module:function`.

The module lies in the working directory or is installed. What fails in it is told in the user's
terms, with the line of their file; the experiment checks what the function returns.
"""

import importlib
import traceback
from collections.abc import Callable
from typing import Any

from decentral.errors import UserError


def is_own(name: str) -> bool:
    """Whether a name in a config is an import path; all others are looked up in tables."""
    return ":" in name


def load(path: str, key: str) -> Callable[..., Any]:
    """The function at `module:function`; `key` is the dotted config key that holds the path.

    Raises UserError where there is no such module or function, or importing it fails.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"cannot import {path!r}: {error}; one of your own is module:function, with the module"
            " in the working directory or installed",
            key,
        ) from None
    except Exception as error:
        raise UserError(f"importing {module_name} failed: {where(error)}", key) from error
    make = getattr(module, attribute, None)
    if not callable(make):
        raise UserError(f"{module_name} has no function {attribute!r}", key)
    return make


def where(error: Exception) -> str:
    """What a user's own code raised, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
