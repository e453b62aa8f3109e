"""A text to be learned character by character: the smallest language model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from decentral.errors import UserError
from decentral.tasks.gpt import gpt
from decentral.tasks.models import build_model
from decentral.tasks.task import Task

MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": gpt}
MOST_BYTES = 2**30


def text(
    workers: int,
    seed: int,
    *,
    file: str,
    model: Mapping[str, Any] = MappingProxyType({"name": "gpt"}),
    context: PositiveInt = 64,
    test_fraction: Annotated[float, Field(gt=0, le=0.9)] = 0.1,
) -> Task:
    """Foretell each character of a text file (UTF-8) from those before it; cross-entropy in nats.

    A sample is `context` successive characters, and as its target those that follow each; samples
    do not overlap. The last `test_fraction` of them, the end of the text, are the test set. The
    vocabulary is every character of the file. `seed` sets the initial model.

    Raises UserError where the file is no text, or too short for a sample of either kind.
    """
    characters = _read(file)
    vocabulary, codes = torch.unique(characters, return_inverse=True)
    count = (len(codes) - 1) // context
    tests = max(1, round(count * test_fraction))
    if count - tests < max(1, workers):
        raise UserError(
            f"{file} has {len(codes)} characters, {max(count, 0)} samples of {context} and the one"
            f" that follows; {workers} workers need one each beside {tests} to test on. Take a"
            " longer text, or a shorter task.context",
            "task.file",
        )
    x, y = (part[: count * context].view(count, context) for part in (codes, codes[1:]))
    return Task(
        model=build_model(model, (context,), len(vocabulary), seed, table=MODELS),
        loss=next_character_loss,
        train=(x[:-tests], y[:-tests]),
        test=(x[-tests:], y[-tests:]),
    )


def next_character_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of scores [..., T, vocabulary] for the characters `target` [..., T]."""
    return functional.cross_entropy(scores.flatten(0, -2), target.flatten())


def _read(file: str) -> Tensor:
    """The code points of a text, int64 [characters]."""
    try:
        with open(file, "rb") as source:
            content = source.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{Path(file).name} is larger than 1 GiB; cut it", "task.file")
        characters = content.decode()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the text {file!r}: {reason}", "task.file") from None
    return torch.from_numpy(np.frombuffer(characters.encode("utf-32-le"), "<i4").astype(np.int64))
