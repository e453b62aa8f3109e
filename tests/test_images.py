"""The task `images`: files in the formats that it reads, and models that learn from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import decentral
from decentral.errors import UserError
from decentral.tasks import fetch, images, labels, length

GENERATOR = np.random.default_rng(0)


def pictures(count, shape=(8, 8, 3), classes=3):
    """Images whose class is which third of the brightness they lie in."""
    y = np.arange(count) % classes
    noise = GENERATOR.integers(0, 40, (count, *shape))
    return (noise + 80 * y.reshape(-1, *[1] * len(shape))).astype(np.uint8), y


def write(path, **changes):
    train_x, train_y = pictures(60)
    test_x, test_y = pictures(12)
    arrays = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    np.savez(path, **{name: of for name, of in (arrays | changes).items() if of is not None})
    return arrays | changes


def write_cifar(folder, per_file=4):
    """The binary version, small: records of a class and 3072 bytes."""
    batches = {}
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        records = GENERATOR.integers(0, 256, (per_file, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
        batches[name] = records
    return batches


def config(path, **changes):
    return {
        "workers": 3,
        "steps": 40,
        "task": {"name": "images", "file": str(path), "batch_size": 5},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"name": "ring"},
        "network": {"compute_ms": 1},
    } | changes


def test_records_of_cifar_are_a_class_and_three_planes_of_rows(tmp_path):
    batches = write_cifar(tmp_path)
    task = images(1, 0, file=str(tmp_path))
    x, y = fetch(task.train, torch.arange(length(task.train)))
    assert x.shape == (20, 3, 32, 32)
    record = batches["data_batch_2"][1]  # the sixth image
    assert y[5] == record[0]
    assert x[5, 2, 3, 4] == record[1 + 2 * 1024 + 3 * 32 + 4]  # blue, fourth row, fifth column
    assert task.test is not None
    assert (fetch(task.test, torch.arange(4))[1].numpy() == batches["test_batch"][:, 0]).all()


def test_the_model_sees_bytes_at_mean_0_and_deviation_1(tmp_path):
    arrays = write(tmp_path / "images.npz")
    task = images(1, 0, file=str(tmp_path / "images.npz"))
    seen = []
    first = next(module for module in task.model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x, _ = fetch(task.train, torch.arange(60))
    task.model.double()(x)
    assert seen[0].mean().item() == pytest.approx(0, abs=1e-9)
    assert seen[0].std(correction=0).item() == pytest.approx(1)
    assert (x[7].permute(1, 2, 0).numpy() == arrays["train_x"][7]).all()


def test_an_augmented_image_is_moved_over_black_and_sometimes_mirrored(tmp_path):
    x = np.zeros((2, 5, 5), np.uint8)
    x[:, 2, 1] = 9  # one pixel, left of the middle
    write(
        tmp_path / "i.npz", train_x=x, train_y=np.array([0, 1]), test_x=x, test_y=np.array([0, 1])
    )
    task = images(1, 0, file=str(tmp_path / "i.npz"), model={"name": "mlp"}, augment=True, pad=1)
    assert labels(task.train).tolist() == [0, 1]
    torch.manual_seed(0)
    seen = {
        tuple(fetch(task.train, torch.tensor([0]))[0][0, 0].nonzero()[0].tolist())
        for _ in range(200)
    }
    # Rows 1 to 3, columns 0 to 2, and mirrored 2 to 4.
    assert seen == {(row, column) for row in (1, 2, 3) for column in range(5)}


@pytest.mark.parametrize(
    "task",
    [{}, {"augment": True, "pad": 1}, {"model": {"name": "resnet", "depth": 8, "width": 4}}],
    ids=["cnn", "augmented", "resnet"],
)
def test_a_run_learns_them(tmp_path, task):
    write(tmp_path / "images.npz")
    made = config(tmp_path / "images.npz")
    result = decentral.run(made | {"task": made["task"] | task})
    assert result.summary["final"]["eval_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_x": None}, "not an .npz file with arrays train_x, train_y"),
        ({"train_x": np.zeros((60, 8, 8, 3))}, r"uint8 .* got float64 \[60, 8, 8, 3\]"),
        ({"test_x": np.zeros((12, 9, 9, 3), np.uint8)}, r"of one shape in both parts; .*12, 9, 9"),
        ({"train_y": np.zeros(59, int)}, "a class from 0 for each of 60 images"),
        ({"test_y": np.full(12, -1)}, "a class from 0 for each of 12 images"),
        ({"train_y": np.array([{}] * 60, dtype=object)}, "not an .npz file"),
    ],
)
def test_other_arrays_are_refused(tmp_path, changes, said):
    write(tmp_path / "images.npz", **changes)
    with pytest.raises(UserError, match=said):
        images(1, 0, file=str(tmp_path / "images.npz"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist; name a folder with the binary version"):
        images(1, 0, file=str(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match=r"has no data_batch_1\.bin; a folder is the binary version"
    ):
        images(1, 0, file=str(tmp_path))
    (tmp_path / "data_batch_1").write_bytes(b"pickled")
    with pytest.raises(UserError, match="take the binary one"):
        images(1, 0, file=str(tmp_path))
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(UserError, match="3072 bytes, which is no whole number of records"):
        images(1, 0, file=str(tmp_path))
    (tmp_path / "text.npz").write_text("none")
    with pytest.raises(UserError, match=r"is not an \.npz file"):
        images(1, 0, file=str(tmp_path / "text.npz"))


def test_a_resnet_has_a_depth_of_six_blocks_and_two(tmp_path):
    write(tmp_path / "images.npz")
    with pytest.raises(UserError, match=r"6 blocks \+ 2.*got 9"):
        images(1, 0, file=str(tmp_path / "images.npz"), model={"name": "resnet", "depth": 9})
    model = images(1, 0, file=str(tmp_path / "images.npz"), model={"name": "resnet"}).model
    weighted = [p for p in model.parameters() if p.dim() > 1 and p.shape[-1] != 1]
    assert len(weighted) == 20


@pytest.mark.slow
def test_the_sweep_on_cifar_runs_on_the_file_that_it_is_given(tmp_path):
    write(tmp_path / "images.npz")
    config = Path(__file__).parents[1] / "configs" / "paper" / "deep_images.yaml"
    small = {
        "steps": 12,
        "task.file": str(tmp_path / "images.npz"),
        "task.batch_size": 2,
        "task.model.depth": 8,
        "task.model.width": 4,
        "lr_schedule.warmup": 2,
        "record": {"every": 6},
        "compare.processes": 1,
    }
    done = decentral.compare(config, out=tmp_path / "sweep", **small)
    assert not len(done.failed)
    assert sorted(done.table.method) == ["aga", "gossip", "local", "parallel", "pga"]
    assert np.isfinite(done.table.eval_loss).all()
