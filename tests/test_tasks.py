"""Tasks, splits and batches: closed forms in float64, and the claims of the docstrings."""

import copy
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import decentral
from decentral.config import load
from decentral.errors import UserError
from decentral.experiment import build
from decentral.signature import bind
from decentral.tasks import (
    PARTITIONS,
    TASKS,
    Data,
    Sampler,
    Task,
    build_model,
    by_class,
    digits,
    dirichlet,
    fetch,
    iid,
    labels,
    length,
    logistic,
    narrowed,
    quadratic,
)

SHUFFLE, REPLACEMENT = "shuffle", "replacement"


def worker_gradient(task: Task, worker: int, at: Tensor) -> Tensor:
    """The gradient of worker i's objective, over its whole shard, at a flat point; float64."""
    model = copy.deepcopy(task.model).double()
    assert task.shards is not None
    *inputs, target = fetch(task.train, task.shards[worker])
    nn.utils.vector_to_parameters(at, model.parameters())
    loss = task.loss(model(*inputs), target)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def in_memory(data: Data | None) -> tuple[Tensor, ...]:
    assert isinstance(data, TensorDataset)
    return data.tensors


def assert_equal_tensors(one: Data | None, other: Data | None) -> None:
    for a, b in zip(in_memory(one), in_memory(other), strict=True):
        assert torch.equal(a, b)


# --- batches ---


def shards_of(*sizes: int) -> list[Tensor]:
    """Shards of the given sizes; worker i's samples are 1000 i, 1000 i + 1, ..."""
    return [1000 * i + torch.arange(size) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("size", "batch"), [(12, 4), (12, 5), (7, 3), (3, 8), (1, 4), (2, 5), (5, 5), (64, 7)]
)
def test_every_epoch_of_shuffle_takes_each_sample_once(size: int, batch: int):
    shards = shards_of(size, size + 1, size)
    sampler = Sampler(shards, batch, seed=3, sampling=SHUFFLE, workers=range(3))
    epochs = 6
    steps = math.ceil(epochs * (size + 1) / batch)
    drawn = torch.cat([sampler.indices(step) for step in range(steps)], dim=1)
    for row, shard in zip(drawn, shards, strict=True):
        for epoch in row[: epochs * len(shard)].view(epochs, len(shard)):
            assert torch.equal(epoch.sort().values, shard)


def test_epochs_and_workers_and_seeds_shuffle_differently():
    def epoch(number: int, worker: int = 0, seed: int = 0) -> Tensor:
        sampler = Sampler(shards_of(50, 50), 50, seed, SHUFFLE, [worker])
        return sampler.indices(number)[0] % 1000

    orders = [epoch(0), epoch(1), epoch(0, worker=1), epoch(0, seed=1), torch.arange(50)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders of 50 agree at one place on average, at ten with odds of 1e-7.
            assert (one == other).sum() < 10


@pytest.mark.parametrize("sampling", [SHUFFLE, REPLACEMENT])
def test_a_worker_alone_draws_the_row_it_has_among_others(sampling: Any):
    shards = shards_of(9, 40, 3, 17, 1, 100)
    everyone = Sampler(shards, 8, 5, sampling, range(6))
    some = Sampler({4: shards[4], 1: shards[1]}, 8, 5, sampling, [4, 1])
    for step in (0, 1, 2, 7, 1000, 10**9):
        rows = everyone.indices(step)
        assert rows.shape == (6, 8)
        assert rows.dtype == torch.int64
        assert torch.equal(some.indices(step), rows[[4, 1]])
        for worker in range(6):
            alone = Sampler(shards, 8, 5, sampling, [worker])
            assert torch.equal(alone.indices(step), rows[worker : worker + 1])


@pytest.mark.parametrize("sampling", [SHUFFLE, REPLACEMENT])
def test_a_batch_depends_on_its_step_and_not_on_the_steps_before(sampling: Any):
    first = Sampler(shards_of(30, 20), 8, 5, sampling, [0, 1])
    history = [first.indices(step) for step in range(9)]
    resumed = Sampler(shards_of(30, 20), 8, 5, sampling, [0, 1])
    assert torch.equal(resumed.indices(8), history[8])
    assert not torch.equal(history[7], history[8])


@pytest.mark.parametrize("sampling", [SHUFFLE, REPLACEMENT])
def test_every_sample_comes_equally_often_at_every_place_of_the_batch(sampling: Any):
    size, batch, steps, workers = 5, 3, 400, 100
    sampler = Sampler(shards_of(*[size] * workers), batch, 1, sampling, range(workers))
    drawn = torch.stack([sampler.indices(step) % 1000 for step in range(steps)])
    for place in range(batch):
        count = torch.bincount(drawn[..., place].flatten(), minlength=size).double()
        expected = steps * workers / size
        # Shuffled draws of one place are negatively correlated: the statistic is smaller still.
        statistic = ((count - expected) ** 2 / expected).sum().item()
        assert chi2.sf(statistic, size - 1) > 1e-4


def test_replacement_repeats_samples_as_often_as_chance_does():
    # Two of a batch of 2 from 10 coincide with probability 1/10; 40,000 draws, sd 0.0015.
    sampler = Sampler(shards_of(*[10] * 200), 2, 1, REPLACEMENT, range(200))
    drawn = torch.stack([sampler.indices(step) for step in range(200)])
    within = drawn[..., 0] == drawn[..., 1]
    between = drawn[1:, :, 0] == drawn[:-1, :, 1]
    assert within.double().mean() == pytest.approx(0.1, abs=0.009)
    assert between.double().mean() == pytest.approx(0.1, abs=0.009)


def test_a_worker_without_samples_is_an_error():
    with pytest.raises(UserError, match="worker 1 has none"):
        Sampler(shards_of(3, 0), 2, 0, SHUFFLE, range(2))


# --- reading data ---


class Squares(Dataset):
    """A map-style Dataset that is no TensorDataset."""

    targets = (0, 1, 0, 1, 0)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((2,), index**2, dtype=np.float32), self.targets[index]


def test_fetch_keeps_the_shape_of_the_indices():
    indices = torch.tensor([[0, 3, 1], [4, 4, 2]])
    tensors = (torch.arange(10.0).view(5, 2), torch.arange(5))
    for data in (tensors, TensorDataset(*tensors)):
        x, y = fetch(data, indices)
        assert torch.equal(x, tensors[0][indices])
        assert torch.equal(y, indices)
    x, y = fetch(Squares(), indices)
    assert torch.equal(x, (indices**2).float()[..., None].expand(2, 3, 2))
    assert torch.equal(y, torch.tensor(Squares.targets)[indices])
    assert fetch(tensors, torch.tensor(3))[0].tolist() == [6.0, 7.0]


def test_labels_are_an_integer_target_or_the_attribute_targets():
    x = torch.zeros(3, 2)
    assert labels((x, torch.tensor([2, 0, 1], dtype=torch.uint8))).tolist() == [2, 0, 1]
    assert labels(Squares()).tolist() == list(Squares.targets)
    for data in ((x, torch.zeros(3)), (x, torch.zeros(3, 4, dtype=torch.int64))):
        with pytest.raises(UserError, match=r"task\.partition\.kind.*kind: iid"):
            labels(data)


def test_a_task_checks_its_data():
    def task(train: Any, **fields: Any) -> Task:
        return Task(nn.Linear(2, 2), nn.functional.cross_entropy, train, **fields)

    x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    assert isinstance(task((x, y)).train, TensorDataset)
    assert length(task(Squares()).train) == 5
    with pytest.raises(UserError, match=r"`train`.*one length.*\[4, 3\]"):
        task((x, y[:3]))
    with pytest.raises(UserError, match=r"`test`.*\[3, 4\]"):
        task((x, y), test=(x[:3], y))
    with pytest.raises(UserError, match=r"tuple \(input, \.\.\., target\)"):
        task((x,))
    with pytest.raises(UserError, match="at least one sample"):
        task((x[:0], y[:0]))
    with pytest.raises(UserError, match=r"map-style.*got generator"):
        task(i for i in range(3))


def test_top1_is_the_default_accuracy_of_integer_targets_alone():
    x = torch.zeros(4, 2)

    def accuracy(target: Tensor | None):
        data = Squares() if target is None else (x, target)
        return Task(nn.Linear(2, 2), nn.functional.mse_loss, data).accuracy

    assert accuracy(torch.zeros(4)) is None
    assert accuracy(torch.zeros(4, dtype=torch.bool)) is None
    assert accuracy(None) is not None
    top1 = accuracy(torch.zeros(4, dtype=torch.int64))
    assert top1 is not None
    output = torch.tensor([[[1.0, 2, 0], [3, 1, 1]], [[0, 0, 1], [0, 5, 1]]])
    target = torch.tensor([[1, 1], [2, 1]])
    assert torch.func.vmap(top1)(output, target).tolist() == [0.5, 1.0]
    assert top1(output, target).item() == 0.75
    with pytest.raises(UserError, match="accuracy of its own"):
        top1(output, target[0])


# --- quadratic ---

HARD = {"condition": 4.0, "curvature_spread": 0.5, "heterogeneity": 2.0, "dim": 3}


def test_quadratic_is_the_formula_by_hand():
    task = quadratic(4, 0, samples_per_worker=6, **HARD)
    assert task.shards is not None
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    for worker, shard in enumerate(task.shards):
        root, target = fetch(task.train, shard)
        a, c = root[0] ** 2, target / root
        assert torch.equal(root, root[:1].expand(6, 3))
        by_hand = 0.5 * (a * (x - c) ** 2).sum(dim=1).mean()
        assert task.loss(root * x, target).item() == pytest.approx(by_hand.item(), rel=1e-14)
        gradient = worker_gradient(task, worker, x)
        torch.testing.assert_close(gradient, a * (x - c.mean(0)), rtol=1e-13, atol=1e-13)
        alpha = torch.tensor([1, 0.5, 0.25], dtype=torch.float64)  # from 1 down to 1/condition
        assert ((a / alpha - 1).abs() <= 0.5).all()


def test_the_mean_gradient_of_quadratic_vanishes_at_the_optimum():
    task = quadratic(5, 1, **HARD)
    assert task.optimum is not None
    gradients = torch.stack([worker_gradient(task, i, task.optimum) for i in range(5)])
    # float64 rounding of numbers of size 1 to 10.
    assert gradients.mean(0).abs().max() < 1e-14
    assert gradients.abs().max() > 0.1
    # Curvatures differ, so the optimum is not the plain mean of the centres.
    shifted = worker_gradient(task, 0, task.optimum + 0.01)
    assert (shifted - gradients[0]).abs().max() > 1e-3


def test_without_heterogeneity_and_noise_the_optimum_is_one():
    task = quadratic(3, 0, heterogeneity=0.0, noise=0.0, dim=1)
    assert task.optimum is not None
    torch.testing.assert_close(task.optimum, torch.ones(1, dtype=torch.float64), rtol=1e-15, atol=0)


def test_heterogeneity_and_noise_are_standard_deviations():
    task = quadratic(400, 0, samples_per_worker=50, heterogeneity=3.0, noise=0.5)
    root, target = in_memory(task.train)
    centres = (target / root).view(400, 50, 10)
    assert centres.std(dim=1).mean() == pytest.approx(0.5, rel=0.01)
    # 4000 centres: the standard error is 3 / sqrt(2 * 4000) = 0.034, of the mean 0.047.
    assert centres.mean(1).std() == pytest.approx(3.0, abs=0.15)
    assert centres.mean() == pytest.approx(1.0, abs=0.2)


# --- logistic ---


def test_logistic_loss_and_gradient_at_zero_by_hand():
    task = logistic(3, 0, samples_per_worker=50)
    assert task.shards is not None
    model = copy.deepcopy(task.model).double()
    for worker, shard in enumerate(task.shards):
        h, y = fetch(task.train, shard)
        assert task.loss(model(h), y).item() == pytest.approx(math.log(2), rel=1e-15)
        gradient = worker_gradient(task, worker, torch.zeros(10, dtype=torch.float64))
        torch.testing.assert_close(gradient, -0.5 * (y[:, None] * h).mean(0))


def test_logistic_loss_is_its_formula_and_does_not_overflow():
    task = logistic(1, 0)
    score = torch.tensor([0.7, -2.0, 3.0], dtype=torch.float64)
    sign = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    expected = np.log1p(np.exp([-0.7, 2.0, 3.0])).mean()
    assert task.loss(score, sign).item() == pytest.approx(expected, rel=1e-14)
    assert task.loss(1e4 * score, sign).item() == pytest.approx(5e4 / 3, rel=1e-14)
    assert task.accuracy is not None
    assert task.accuracy(score, sign).item() == pytest.approx(1 / 3)


def test_labels_are_positive_as_often_as_the_model_says():
    task = logistic(1, 4, samples_per_worker=200_000, dim=2)
    h, y = in_memory(task.train)
    assert set(y.tolist()) == {-1.0, 1.0}
    assert h.var().item() == pytest.approx(10, rel=0.02)
    own = torch.from_numpy(np.random.default_rng([4, 0]).standard_normal(2))
    p = torch.sigmoid(h @ own)
    for low in np.arange(0, 1, 0.1):
        bin_ = (p >= low) & (p < low + 0.1)
        sd = 0.5 / math.sqrt(bin_.sum().item())
        assert (y[bin_] == 1).double().mean() == pytest.approx(p[bin_].mean().item(), abs=5 * sd)


def fitted(task: Task, worker: int) -> Tensor:
    """The direction of steepest descent at zero: in expectation along x*."""
    gradient = worker_gradient(task, worker, torch.zeros(10, dtype=torch.float64))
    return -gradient / gradient.norm()


def test_iid_workers_share_a_minimiser_and_others_do_not():
    shared = logistic(2, 0, samples_per_worker=20_000, iid=True)
    assert fitted(shared, 0) @ fitted(shared, 1) > 0.99
    own = logistic(2, 0, samples_per_worker=20_000)
    assert fitted(own, 0) @ fitted(own, 1) < 0.9


@pytest.mark.parametrize("make", [quadratic, logistic])
def test_a_workers_data_depend_on_seed_and_worker_alone(make: Any):
    few, many = make(2, 7, samples_per_worker=5), make(6, 7, samples_per_worker=5)
    for worker in range(2):
        for a, b in zip(
            fetch(few.train, few.shards[worker]),
            fetch(many.train, many.shards[worker]),
            strict=True,
        ):
            assert torch.equal(a, b)
    other = make(2, 8, samples_per_worker=5)
    assert not torch.equal(in_memory(few.train)[-1], in_memory(other.train)[-1])
    assert torch.equal(torch.cat(list(many.shards)), torch.arange(30))


# --- digits ---


def test_digits_have_the_shapes_and_the_parameters_promised():
    task = digits(4, 0)
    assert sum(p.numel() for p in task.model.parameters()) == 19_210
    x, y = in_memory(task.train)
    assert (x.shape, x.dtype, y.dtype) == ((1437, 64), torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert in_memory(task.test)[0].shape == (360, 64)
    images = digits(4, 0, model={"name": "cnn"})
    assert in_memory(images.train)[0].shape == (1437, 1, 8, 8)
    assert torch.equal(in_memory(images.train)[0].flatten(1), x)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.37, 0.9])
def test_digits_are_scikit_learns_and_so_is_their_split(fraction: float):
    pixels, classes = load_digits(return_X_y=True)
    expected = train_test_split(
        pixels / 16, classes, test_size=fraction, random_state=0, stratify=classes
    )
    task = digits(1, 0, test_fraction=fraction)
    assert task.test is not None
    for samples, x, y in ((task.train, *expected[::2]), (task.test, *expected[1::2])):
        inputs, targets = fetch(samples, torch.arange(length(samples)))
        assert torch.equal(inputs, torch.as_tensor(x, dtype=torch.float32))
        assert torch.equal(targets, torch.as_tensor(y))


def test_the_digits_test_set_is_the_same_for_every_run_and_stratified():
    reference = digits(4, 0)
    for other in (digits(16, 1), digits(1, 2, model={"name": "cnn"})):
        flat = (in_memory(other.test)[0].flatten(1), in_memory(other.test)[1])
        assert_equal_tensors(reference.test, TensorDataset(*flat))
    share = torch.bincount(labels(reference.test or ())) / 360
    whole = torch.bincount(labels(reference.train)) / 1437
    assert (share - whole).abs().max() < 2 / 360
    train, test = (
        set(map(bytes, in_memory(d)[0].numpy())) for d in (reference.train, reference.test)
    )
    assert not train & test
    assert length(digits(1, 0, test_fraction=0.5).test or ()) == 899


def test_label_noise_makes_so_many_training_labels_wrong_and_no_test_label():
    clean, noisy = digits(1, 3), digits(1, 3, label_noise=0.25)
    wrong = labels(clean.train) != labels(noisy.train)
    assert wrong.sum() == round(0.25 * 1437)
    assert torch.equal(in_memory(noisy.train)[0], in_memory(clean.train)[0])
    assert set(labels(noisy.train)[wrong].tolist()) == set(range(10))
    assert_equal_tensors(noisy.test, clean.test)
    other = labels(digits(1, 4, label_noise=0.25).train) != labels(clean.train)
    assert not torch.equal(other, wrong)


@pytest.fixture
def one_thread():
    """For thousands of tiny operations: on a busy machine, threads wait long for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "accuracy"), [("mlp", 0.93), ("cnn", 0.97)])
def test_plain_sgd_learns_digits(name: str, accuracy: float):
    task = digits(1, 0, model={"name": name})
    sampler = Sampler([torch.arange(1437)], 32, 0, SHUFFLE, [0])
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=700)
    for step in range(1000):
        x, y = (tensor[0] for tensor in fetch(task.train, sampler.indices(step)))
        optimizer.zero_grad()
        task.loss(task.model(x), y).backward()
        optimizer.step()
        schedule.step()
    x, y = in_memory(task.test)
    assert task.accuracy is not None
    assert task.accuracy(task.model(x), y) > accuracy


# --- every built-in task ---


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Options that make each task small, by its name."""
    file = tmp_path_factory.mktemp("images") / "images.npz"
    x, y = np.arange(12 * 16, dtype=np.uint8).reshape(12, 4, 4), np.arange(12) % 3
    np.savez(file, train_x=x, train_y=y, test_x=x, test_y=y)
    options: dict[str, dict[str, Any]] = {
        "quadratic": {"samples_per_worker": 6},
        "logistic": {"samples_per_worker": 6},
        "digits": {},
        "text": {"file": __file__, "context": 8, "model": {"name": "gpt", "width": 8, "heads": 2}},
        "images": {"file": str(file)},
    }
    assert options.keys() == TASKS.keys()
    return options


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_function_of_its_arguments_and_leaves_the_generators_alone(
    name: str, small: dict[str, dict[str, Any]]
):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = (torch.rand(3), np.random.rand())
    torch.manual_seed(0)
    np.random.seed(0)
    one = TASKS[name](3, 5, **small[name])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.random.rand() == expected[1]
    two = TASKS[name](3, 5, **small[name])  # with the generators elsewhere
    assert_equal_tensors(one.train, two.train)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_the_seed_changes_the_initial_model():
    first, second = (digits(1, seed).model.get_parameter("1.weight") for seed in (0, 1))
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("model", [{"name": "mlp"}, {"name": "cnn"}])
@pytest.mark.parametrize("name", TASKS)
def test_model_and_loss_and_accuracy_stack_over_workers(
    name: str, model: dict[str, str], small: dict[str, dict[str, Any]]
):
    task = TASKS[name](3, 0, **small[name], **({"model": model} if name == "digits" else {}))
    parameters = {
        key: torch.stack([p.detach().double() + 0.1 * i for i in range(3)])
        for key, p in task.model.named_parameters()
    }
    *inputs, target = fetch(task.train, torch.arange(12).view(3, 4))
    inputs = [part.double() if part.is_floating_point() else part for part in inputs]

    def both(parameters: dict[str, Tensor], target: Tensor, *inputs: Tensor) -> Tensor:
        output = torch.func.functional_call(task.model, parameters, inputs)
        loss = task.loss(output, target)
        return torch.stack([loss, task.accuracy(output, target) if task.accuracy else loss])

    stacked = torch.func.vmap(both)(parameters, target, *inputs)
    alone = [
        both({k: p[i] for k, p in parameters.items()}, target[i], *[x[i] for x in inputs])
        for i in range(3)
    ]
    torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-12, atol=1e-12)


# --- options ---


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"task\.model: .*needs a name.*mlp, cnn"),
        ({"name": "mpl"}, r"task\.model\.name.*'mpl'.*mlp"),
        ({"name": "mlp", "hiden": [3]}, r"task\.model\.hiden.*hidden"),
        ({"name": "mlp", "hidden": 3}, r"task\.model\.hidden.*3"),
        ({"name": "mlp", "hidden": [0]}, r"task\.model\.hidden.*greater than 0"),
        ({"name": "mlp", "shape": [64]}, r"task\.model\.shape"),
        ({"name": "cnn", "channels": [4, 4, 4, 4]}, r"task\.model\.channels.*1 to 3 stages"),
        ({"name": "cnn", "channels": []}, r"task\.model\.channels"),
    ],
)
def test_a_wrong_model_option_is_named(model: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        digits(2, 0, model=model)


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [
        ("quadratic", "condition", 0.5),
        ("quadratic", "curvature_spread", 1.0),
        ("quadratic", "noise", -1),
        ("quadratic", "dim", 0),
        ("logistic", "samples_per_worker", 2.5),
        ("logistic", "iid", "yes"),
        ("digits", "test_fraction", 1),
        ("digits", "model", "mlp"),
    ],
)
def test_a_wrong_task_option_is_named(task: str, option: str, value: Any):
    with pytest.raises(UserError, match=rf"task\.{option}"):
        bind(TASKS[task], {option: value}, "task", given=("workers", "seed"))


def test_a_config_sets_every_option():
    options = {"dim": 4, "samples_per_worker": 3, "heterogeneity": 0, "noise": 2, "condition": 1}
    bound = bind(quadratic, options, "task", given=("workers", "seed"))
    assert quadratic(2, 0, **bound).model.get_parameter("x").shape == (4,)
    bound = bind(
        digits, {"model": {"name": "mlp", "hidden": [5, 3]}}, "task", given=("workers", "seed")
    )
    layers = [m.out_features for m in digits(2, 0, **bound).model if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    assert layers == [5, 3, 10]
    assert (
        sum(p.numel() for p in build_model({"name": "mlp", "hidden": []}, (7,), 2, 0).parameters())
        == 16
    )


# --- splits ---


def balanced(classes: int, each: int) -> Tensor:
    """Labels of balanced classes, in an order of no meaning."""
    order = torch.randperm(classes * each, generator=torch.Generator().manual_seed(1))
    return (torch.arange(classes * each) % classes)[order]


def skewed() -> Tensor:
    return torch.repeat_interleave(torch.arange(5), torch.tensor([200, 100, 60, 30, 13]))


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "iid": [{}],
    "dirichlet": [{"alpha": alpha} for alpha in (1e-6, 1e-2, 0.3, 1, 1e6)],
    "by_class": [{"classes_per_worker": 2}, {"classes_per_worker": 4}],
}
assert OPTIONS.keys() == PARTITIONS.keys()
SPLITS = [(kind, options) for kind, rows in OPTIONS.items() for options in rows]


@pytest.mark.parametrize(("kind", "options"), SPLITS)
@pytest.mark.parametrize("workers", [5, 16, 40])
def test_shards_are_equal_and_use_every_sample_once(kind: str, options: dict, workers: int):
    for classes in (skewed(), balanced(10, 40)):
        shards = PARTITIONS[kind](classes, workers, 0, **options)
        sizes = [len(shard) for shard in shards]
        assert len(sizes) == workers
        assert max(sizes) - min(sizes) <= 1
        assert all(shard.dtype == torch.int64 for shard in shards)
        assert torch.equal(torch.cat(shards).sort().values, torch.arange(len(classes)))


@pytest.mark.parametrize(("kind", "options"), SPLITS)
def test_a_split_is_a_function_of_its_seed(kind: str, options: dict):
    def split(seed: int) -> list[Tensor]:
        return PARTITIONS[kind](balanced(10, 40), 10, seed, **options)

    assert all(torch.equal(a, b) for a, b in zip(split(0), split(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(split(0), split(1), strict=True))


@pytest.mark.parametrize("kind", PARTITIONS)
def test_more_workers_than_samples_is_an_error(kind: str):
    with pytest.raises(UserError, match=r"^workers: .*at most 4 workers; got 5"):
        PARTITIONS[kind](torch.tensor([0, 1, 0, 1]), 5, 0, **OPTIONS[kind][0])


def shares(classes: Tensor, shards: list[Tensor]) -> Tensor:
    """The share of each class in each shard, [workers, classes]."""
    counts = torch.stack([torch.bincount(classes[s], minlength=10) for s in shards]).double()
    return counts / counts.sum(1, keepdim=True)


def test_dirichlet_with_large_alpha_is_near_iid():
    classes = balanced(10, 1000)
    for shards in (dirichlet(classes, 20, 0, alpha=1e6), iid(classes, 20, 0)):
        error = (shares(classes, shards) - 0.1).square().mean(dim=1).sqrt()
        # A share 0.1 of 500 draws has a standard deviation of 0.0134; the last shards get the rest.
        assert error.median().item() == pytest.approx(0.0134, rel=0.25)
        assert error.max() < 0.1


def test_dirichlet_with_small_alpha_gives_one_class_to_most_workers():
    classes = balanced(10, 1000)
    largest = shares(classes, dirichlet(classes, 20, 0, alpha=1e-3)).max(dim=1).values
    # Two shards a class: the workers that want a class after two others get what is left.
    assert (largest > 0.99).sum() >= 10
    assert largest.mean() > 0.7


def test_dirichlet_mixes_have_the_spread_of_the_law():
    # Var q_c = p (1 - p) / (alpha + 1), and the noise of drawing 100 samples by q; the workers that
    # find a class used up add some, a tenth here.
    classes, alpha, p = balanced(10, 3000), 10.0, 0.1
    mix = shares(classes, dirichlet(classes, 300, 0, alpha=alpha))
    q_variance = p * (1 - p) / (alpha + 1)
    noise = (p * (1 - p) - q_variance) / 100
    assert mix.var().item() == pytest.approx(q_variance + noise, rel=0.2)


def test_dirichlet_mixes_follow_the_class_frequencies_of_the_data():
    classes = torch.repeat_interleave(torch.tensor([0, 3]), torch.tensor([9000, 1000]))
    mix = shares(classes, dirichlet(classes, 50, 0, alpha=20.0))
    assert mix[:, 3].mean().item() == pytest.approx(0.1, abs=1e-12)
    assert mix[:, 3].median().item() == pytest.approx(0.09, abs=0.03)


@pytest.mark.parametrize(("workers", "each"), [(10, 1), (10, 2), (20, 2), (40, 3), (5, 2), (20, 5)])
def test_by_class_gives_the_number_of_classes_asked(workers: int, each: int):
    classes = balanced(10, 120)
    shards = by_class(classes, workers, 0, classes_per_worker=each)
    assert [len(classes[shard].unique()) for shard in shards] == [each] * workers


@pytest.mark.parametrize(("workers", "each"), [(7, 2), (13, 3), (40, 1), (100, 2)])
def test_by_class_exceeds_the_number_asked_at_class_borders_alone(workers: int, each: int):
    classes = labels(digits(1, 0).train)
    shards = by_class(classes, workers, 0, classes_per_worker=each)
    excess = [len(classes[shard].unique()) - each for shard in shards]
    assert min(excess) >= 0
    assert sum(excess) <= 9


def test_by_class_refuses_numbers_that_cannot_be():
    classes = balanced(10, 10)
    for workers, each in ((4, 2), (4, 11), (50, 3)):
        with pytest.raises(UserError, match=rf"classes_per_worker.*; got {each}"):
            by_class(classes, workers, 0, classes_per_worker=each)


class TestValidation:
    """Samples that are held out of the training data, to choose by."""

    @pytest.mark.parametrize("kind", [{"kind": "iid"}, {"kind": "dirichlet", "alpha": 0.3}])
    def test_nobody_trains_on_what_is_held_out(self, quick: Any, kind: dict):
        quick["task"] |= {"validation": 0.2, "partition": kind}
        experiment = build(load(quick))
        held_out = experiment.validation
        assert held_out is not None
        samples = length(experiment.task.train)
        assert len(held_out) == round(0.2 * samples)
        everything = torch.cat([held_out, *experiment.shards])
        assert sorted(everything.tolist()) == list(range(samples))
        assert {len(shard) for shard in experiment.shards} <= {287, 288}  # of 1437 - 287

    def test_it_is_a_random_draw_of_the_seed_alone(self, quick: Any):
        def held_out(**changes: Any) -> list[int]:
            found = build(load(quick, {"task.validation": 0.2, **changes})).validation
            assert found is not None
            return found.tolist()

        assert held_out() == held_out(workers=3, **{"optimizer.lr": 1.0})
        both = set(held_out()) & set(held_out(seed=1))
        assert 0.1 < len(both) / 287 < 0.3  # a fifth by chance, with a deviation of 0.02

    def test_records_have_the_averaged_models_figures_on_it(self, quick: Any):
        quick["task"]["validation"] = 0.2
        result = decentral.run(quick)
        experiment = build(result.config)
        assert experiment.validation is not None
        *inputs, target = fetch(experiment.task.train, experiment.validation)
        output = result.model(*(x.double() for x in inputs))
        final = result.summary["final"]
        loss = nn.functional.cross_entropy(output, target).item()
        assert final["validation_loss"] == pytest.approx(loss, rel=1e-12)
        right = (output.argmax(1) == target).double().mean().item()
        assert final["validation_accuracy"] == pytest.approx(right, abs=1e-7)
        assert final["validation_loss"] != pytest.approx(final["eval_loss"], rel=1e-3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"task": {"name": "quadratic", "validation": 0.1}}, "gives each worker its own data"),
            ({"task.validation": 1.0}, "less than 1"),
            ({"task.validation": 0.9999}, "must leave samples to train on"),
        ],
    )
    def test_what_cannot_be_held_out_is_refused(self, quick: Any, changes: Any, message: str):
        with pytest.raises(UserError, match=message) as refused:
            build(load(quick, changes))
        assert refused.value.key == "task.validation"


def test_thousands_of_workers_are_split_in_seconds():
    classes = balanced(10, 5000)
    for kind, rows in OPTIONS.items():
        assert len(PARTITIONS[kind](classes, 5000, 0, **rows[0])) == 5000


# --- imports ---


def test_importing_tasks_imports_neither_sklearn_nor_ray_nor_networkx():
    code = "import sys, decentral.tasks; print([m for m in sys.argv[1:] if m in sys.modules])"
    command = [sys.executable, "-c", code, "sklearn", "ray", "networkx", "matplotlib"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_data_is_held_in_the_dtype_of_the_run_once_and_never_in_a_wider_one():
    def tensors(data: Data | None) -> tuple[Tensor, ...]:
        assert isinstance(data, TensorDataset)
        return data.tensors

    double, single, label = torch.rand(4, 2).double(), torch.rand(4, 3), torch.arange(4)
    task = Task(nn.Linear(2, 2), nn.functional.mse_loss, (double, single, label), (double, label))
    narrow = narrowed(task, torch.float32)
    (train_double, train_single, train_label), test = tensors(narrow.train), tensors(narrow.test)
    assert train_double.dtype == torch.float32
    assert test[0] is train_double  # one copy of what both have
    assert train_single is single
    assert train_label is test[1] is label
    assert torch.equal(train_double, double.float())
    assert tensors(narrowed(task, torch.float64).train)[1].dtype == torch.float32
    assert tensors(task.train)[0] is double  # the task itself stays as it is
