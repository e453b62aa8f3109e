"""Images from local files: CIFAR-10 as it is distributed, or any set of images as NumPy arrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from decentral.errors import UserError
from decentral.tasks.models import build_model
from decentral.tasks.task import Data, Task

CIFAR_SHAPE = (3, 32, 32)
CIFAR_TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
CIFAR_TEST = "test_batch.bin"
ARRAYS = ("train_x", "train_y", "test_x", "test_y")


def images(
    workers: int,
    seed: int,
    *,
    file: str,
    model: Mapping[str, Any] = MappingProxyType({"name": "cnn"}),
    augment: bool = False,
    pad: Annotated[int, Field(ge=0)] = 4,
) -> Task:
    """Classify images that lie in local files; cross-entropy.

    file: a folder with the binary version of CIFAR-10 (data_batch_1.bin to data_batch_5.bin and
        test_batch.bin), or an .npz file with uint8 arrays train_x and test_x, [N, height, width]
        or [N, height, width, channels], and whole numbers train_y and test_y, [N], classes from 0.
    augment: move each training image by up to `pad` pixels each way, black where it leaves, and
        mirror every other one, as He et al. 2016 (arXiv 1512.03385) do for CIFAR-10.

    Images stay bytes in memory, and the model scales them to mean 0 and deviation 1, over all
    pixels of the training set. `seed` sets the initial model. Source of CIFAR-10: Krizhevsky,
    "Learning Multiple Layers of Features from Tiny Images", 2009.

    Raises UserError where the files are missing or not as described.
    """
    train_x, train_y, test_x, test_y = _read(Path(file))
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    shape = tuple(train_x.shape[1:])
    mean, deviation = _moments(train_x)
    train: Data = Augmented(train_x, train_y, pad) if augment else (train_x, train_y)
    return Task(
        model=Scaled(build_model(model, shape, classes, seed), mean, deviation),
        loss=functional.cross_entropy,
        train=train,
        test=(test_x, test_y),
    )


class Scaled(nn.Module):
    """A model of (x - mean) / deviation, for x of bytes."""

    def __init__(self, model: nn.Module, mean: float, deviation: float):
        super().__init__()
        self.model = model
        self.mean, self.deviation = mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return self.model((x.to(dtype) - self.mean) / self.deviation)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images [N, channels, height, width], each moved and mirrored anew whenever it is read."""

    def __init__(self, x: Tensor, y: Tensor, pad: int):
        self.targets = y
        self._x, self._pad = x, pad

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, pad = self._x[index], self._pad
        down, right, mirror = torch.randint(0, 2**31, (3,)).tolist()
        height, width = image.shape[1:]
        top, left = down % (2 * pad + 1), right % (2 * pad + 1)
        moved = functional.pad(image, (pad,) * 4)[:, top : top + height, left : left + width]
        return moved.flip(-1) if mirror % 2 else moved, self.targets[index]


def _moments(x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over all pixels, uint8 [...]; the deviation is not 0."""
    counts = torch.bincount(x.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts @ values / counts.sum()).item()
    variance = (counts @ (values - mean).square() / counts.sum()).item()
    return mean, variance**0.5 or 1.0


def _read(path: Path) -> tuple[Tensor, ...]:
    """train_x, train_y, test_x, test_y: uint8 [N, channels, height, width] and int64 [N]."""
    try:
        if path.is_dir():
            return _cifar(path)
        if not path.exists():
            raise UserError(
                f"{path} does not exist; name a folder with the binary version of CIFAR-10"
                " (cifar-10-binary.tar.gz, unpacked), or an .npz file of images",
                "task.file",
            )
        return _arrays(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {path}: {reason}", "task.file") from None


def _cifar(folder: Path) -> tuple[Tensor, ...]:
    """The binary version: records of a byte for the class and 3 x 32 x 32 for the image."""
    missing = [name for name in (*CIFAR_TRAIN, CIFAR_TEST) if not (folder / name).is_file()]
    if missing:
        pickled = (folder / "data_batch_1").is_file()
        raise UserError(
            f"{folder} has no {missing[0]}"
            + (
                ". This is the version for Python, whose files can run code as they are read; take"
                " the binary one, cifar-10-binary.tar.gz"
                if pickled
                else "; a folder is the binary version of CIFAR-10, cifar-10-binary.tar.gz unpacked"
            ),
            "task.file",
        )
    train = [_records(folder / name) for name in CIFAR_TRAIN]
    x, y = (torch.cat(part) for part in zip(*train, strict=True))
    return x, y, *_records(folder / CIFAR_TEST)


def _records(file: Path) -> tuple[Tensor, Tensor]:
    size = 1 + int(np.prod(CIFAR_SHAPE))
    content = np.fromfile(file, dtype=np.uint8)
    if len(content) == 0 or len(content) % size:
        raise UserError(
            f"{file} has {len(content)} bytes, which is no whole number of records of {size};"
            " unpack it again",
            "task.file",
        )
    records = torch.from_numpy(content.reshape(-1, size))
    y = records[:, 0].long()
    if y.max() > 9:
        raise UserError(f"{file} has a class {int(y.max())}, not 0 to 9", "task.file")
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE).contiguous(), y


def _arrays(file: Path) -> tuple[Tensor, ...]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = [archive[name] for name in ARRAYS]
    except (KeyError, ValueError, AttributeError, EOFError) as error:
        raise UserError(
            f"{file} is not an .npz file with arrays {', '.join(ARRAYS)}: {error}", "task.file"
        ) from None
    train_x, train_y, test_x, test_y = found
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        _check(file, name, x, y, train_x.shape[1:])
    return _planes(train_x), _classes(train_y), _planes(test_x), _classes(test_y)


def _check(file: Path, name: str, x: np.ndarray, y: np.ndarray, shape: Sequence[int]) -> None:
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or not x.size or x.shape[1:] != tuple(shape):
        raise UserError(
            f"{name}_x in {file} must be uint8 [N, height, width] or [N, height, width, channels],"
            f" of one shape in both parts; got {x.dtype} {list(x.shape)}",
            "task.file",
        )
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise UserError(
            f"{name}_y in {file} must be a class from 0 for each of {len(x)} images; got"
            f" {y.dtype} {list(y.shape)}",
            "task.file",
        )


def _planes(x: np.ndarray) -> Tensor:
    """[N, height, width] or [N, height, width, channels] -> [N, channels, height, width]."""
    images = torch.from_numpy(x)
    return images.unsqueeze(1) if x.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _classes(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y.astype(np.int64))
