"""Diagnostics against known answers: curvature, gradient norms, drift, and that a run is as before.

Where a figure is random, the draws are fixed by the seed, so a test that passes once stays so.
"""

from typing import Any

import numpy as np
import pandas
import pytest
import torch
from test_api import Diary, same_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import decentral
from decentral import UserError
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.diagnostics.curvature import hutchinson, top_eigenvalue
from decentral.diagnostics.norms import gradient_norms
from decentral.diagnostics.objective import PASS, Objective, fixed_sample, split
from decentral.draws import hash64, normal, signs
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.gradients import FlatModel
from decentral.tasks import Task

ALL: dict[str, Any] = {
    "every": 6,
    "gradient_norms": {"batches": 3},
    "sharpness": {"tolerance": 1e-9},
    "trace": {"vectors": 3},
    "drift": True,
}
COLUMNS = {
    "gradient_square_full",
    "gradient_square_stochastic",
    "gradient_square_noise",
    "sharpness",
    "hessian_trace",
    "hessian_trace_error",
    "two_over_lr",
    "drift_mean",
    "drift_max",
}


def random_hessian(d, seed=0):
    """Symmetric [d, d], whose eigenvalue of largest size is negative."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    eigenvalues = torch.linspace(-9, 4, d, dtype=torch.float64)
    return (q * eigenvalues) @ q.T


@pytest.mark.parametrize("d", [1, 2, 3, 60])
def test_the_top_eigenvalue_is_the_largest_one(d):
    H = random_hessian(d)
    start = normal(hash64(3), d, torch.float64)
    expected = torch.linalg.eigvalsh(H)[-1].item()
    assert top_eigenvalue(lambda v: H @ v, start, 1e-8) == pytest.approx(expected, abs=1e-6)


def test_a_top_eigenvalue_that_is_not_found_is_no_number(caplog):
    d = 4000  # a gap of 2.5e-4 at the top, and a tolerance below what rounding leaves
    diagonal = torch.linspace(0, 1, d, dtype=torch.float64)
    start = normal(hash64(3), d, torch.float64)
    assert np.isnan(top_eigenvalue(lambda v: diagonal * v, start, 1e-15))
    assert "raise diagnostics.sharpness.tolerance" in caplog.text


def test_the_trace_is_within_three_standard_errors():
    H = random_hessian(60)
    vectors = list(signs(hash64(5, torch.arange(200)), 60, torch.float64))
    trace, error = hutchinson(lambda v: H @ v, vectors)
    variance = 2 * (H.square().sum() - H.diagonal().square().sum()).item()
    assert abs(trace - H.trace().item()) < 3 * error
    assert error == pytest.approx((variance / 200) ** 0.5, rel=0.15)
    diagonal = torch.diag(H.diagonal())
    exact, none = hutchinson(lambda v: diagonal @ v, vectors)
    assert exact == pytest.approx(H.trace().item(), rel=1e-12)
    assert none == pytest.approx(0, abs=1e-12)


def test_signs_are_fair_and_independent():
    drawn = signs(hash64(1, torch.arange(50)), 1000, torch.float64)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(drawn.mean().item()) < 4 / 50_000**0.5
    products = (drawn @ drawn.T / 1000).fill_diagonal_(0)
    assert products.abs().max() < 6 / 1000**0.5


def test_gradient_norms_are_unbiased_and_know_the_noise():
    """f known, noise of known variance: the floor V/m is V/2 here, six times ||f||^2."""
    d, m, trials = 20, 2, 1500
    f, sigma = torch.full((d,), 0.5, dtype=torch.float64), 1.73
    noise = sigma * normal(hash64(8, torch.arange(m * trials)), d, torch.float64)
    found = [gradient_norms(f + noise[i : i + m]) for i in range(0, m * trials, m)]
    truth = {"full": 0.25 * d, "stochastic": 0.25 * d + sigma**2 * d, "noise": sigma**2 * d}
    for name, expected in truth.items():
        values = np.array([getattr(norms, name) for norms in found])
        assert abs(values.mean() - expected) < 4 * values.std() / trials**0.5, name
    one = gradient_norms(noise[:5] + f)
    by_hand = noise[:5].var(0).sum().item()
    mean_square = (noise[:5] + f).mean(0).square().sum().item()
    assert one.noise == pytest.approx(by_hand, rel=1e-12)
    assert one.full == pytest.approx(mean_square - by_hand / 5, rel=1e-12)
    assert one.stochastic == pytest.approx((noise[:5] + f).square().sum(1).mean().item())
    same = gradient_norms(f.expand(3, d))
    assert (same.noise, same.full) == (0, same.stochastic)


class Attention(nn.Module):
    """Every obstacle at once: fused attention, a norm, a tied, a frozen and an idle parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = self.tied(torch.tanh(self.first(x))).unflatten(1, (1, 2, 2))
        h = nn.functional.scaled_dot_product_attention(h, h.tanh(), h)
        return self.dropout(self.frozen(self.norm(h.flatten(1))))


def test_gradient_and_hessian_of_the_objective_are_those_of_autograd():
    torch.manual_seed(0)
    x, y = torch.randn(9, 4), torch.randint(4, (9,))
    task = Task(Attention(), nn.functional.cross_entropy, (x, y))
    model = FlatModel(task.model, torch.float64)
    model.module.eval()
    shards = [torch.arange(2), torch.arange(2, 9)]  # of unequal sizes, and equal weights
    objective = Objective(model, task, model.b, fixed_sample(shards, 100, seed=0))

    def loss(flat):
        views, buffers = model.parameters.views(flat), model.buffers.views(model.b)
        outputs = [model(views, buffers, [x[shard].double()]) for shard in shards]
        pairs = zip(outputs, shards, strict=True)
        return sum(nn.functional.cross_entropy(output, y[shard]) for output, shard in pairs) / 2

    gradient = torch.autograd.functional.jacobian(loss, model.x)
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.as_tensor(torch.autograd.functional.hessian(loss, model.x))
    columns = [objective.hessian_product(model.x, e) for e in torch.eye(len(model.x)).double()]
    torch.testing.assert_close(objective.gradient(model.x), gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(columns), hessian, rtol=1e-10, atol=1e-12)
    assert hessian.abs().max() > 1e-3


def test_the_fixed_sample_weighs_workers_alike_and_fits_passes():
    shards = list(torch.arange(2000).split([5, 5, 790, 1200]))
    parts = fixed_sample(shards, 600, seed=4)
    assert sum(weight for _, weight in parts) == pytest.approx(1)
    weights = torch.zeros(2000, dtype=torch.float64)
    for samples, weight in parts:
        assert len(samples) <= PASS
        weights[samples] += weight / len(samples)
    for shard, count in zip(shards, (5, 5, 600, 600), strict=True):
        assert weights[shard].sum().item() == pytest.approx(1 / 4)
        assert (weights[shard] > 0).sum() == count
    again = fixed_sample(shards, 600, seed=4)
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(parts, again, strict=True))
    assert [len(part.samples) for part in split(torch.arange(PASS + 1))] == [PASS, 1]


def quadratic(**options):
    """The task `quadratic`, whose curvatures are 1 down to 1/10 by design."""
    return {
        "workers": 3,
        "steps": 4,
        "dtype": "float64",
        "task": {"name": "quadratic", "batch_size": 5, "sampling": "replacement", **options},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": {"name": "local_sgd", "period": 99},
        "network": {"compute_ms": 1},
    }


def test_a_run_knows_the_curvature_and_the_noise_of_a_quadratic():
    config = quadratic(noise=2.0)
    norms = {"batches": 400}
    config["diagnostics"] = ALL | {"every": 4, "gradient_norms": norms}
    result = decentral.run(config)
    row = result.summary["final"]
    alpha = 10.0 ** -np.linspace(0, 1, 10)
    assert row["sharpness"] == pytest.approx(1, abs=1e-6)
    assert row["hessian_trace"] == pytest.approx(alpha.sum(), rel=1e-9)  # it is diagonal
    assert row["two_over_lr"] == pytest.approx(20)
    # grad f = alpha (x - mean c); of the batches' mean gradient the variance is
    # 1/n^2 sum_i tr Var_i(alpha c) / 5.
    task = build(load(config)).task
    root, scaled = (part[:] for part in task.train.tensors)  # pyright: ignore[reportAttributeAccessIssue]
    pull = (root * scaled).unflatten(0, (3, 100))
    gradient = torch.from_numpy(alpha) * result.model.state_dict()["x"] - pull.mean((0, 1))
    variance = pull.var(1, correction=0).sum(1).mean().item() / 3 / 5
    full = gradient.square().sum().item()
    assert row["gradient_square_noise"] == pytest.approx(variance, rel=0.1)
    assert row["gradient_square_full"] == pytest.approx(full, rel=0.1)


def test_full_batches_have_no_noise():
    """Shuffled, a batch of a worker's whole shard is that shard, whatever the draw."""
    config = quadratic(samples_per_worker=20)
    config["task"] |= {"batch_size": 20, "sampling": "shuffle"}
    row = decentral.run(config, diagnostics={"every": 4, "gradient_norms": {}}).summary["final"]
    assert row["gradient_square_noise"] == pytest.approx(0, abs=1e-25)
    assert row["gradient_square_full"] > 0.01


def test_diagnostics_change_nothing_but_their_columns(quick):
    """Not a bit of the model, the other figures or the state of torch's generators."""
    plain = decentral.run(quick)
    before = torch.get_rng_state()
    watched = decentral.run(quick, diagnostics=ALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_model(plain, watched)
    assert set(watched.metrics.columns) - set(plain.metrics.columns) == COLUMNS
    assert not COLUMNS & set(plain.metrics.columns)
    shared = [c for c in plain.metrics.columns if c != "time_s"]
    pandas.testing.assert_frame_equal(plain.metrics.loc[:, shared], watched.metrics.loc[:, shared])
    filled = watched.metrics[sorted(COLUMNS)].notna().all(axis=1)
    assert watched.metrics.step[filled].tolist() == [6, 12, 18, 24]
    # A step of its own where it falls between records.
    between = decentral.run(quick, diagnostics={"every": 5, "drift": True})
    assert between.metrics.step[between.metrics.drift_max.notna()].tolist() == [5, 10, 15, 20]
    assert same_model(plain, between)


def test_a_resumed_run_has_the_same_figures(quick, tmp_path):
    """Stopped two steps after a global average: what drift is measured from comes along."""
    quick["algorithm"]["period"] = 5
    whole = decentral.run(quick, diagnostics=ALL).metrics
    decentral.run(quick, out=tmp_path, watcher=Diary(stop_at=12), diagnostics=ALL)
    resumed = decentral.resume(tmp_path).metrics
    pandas.testing.assert_frame_equal(
        resumed.drop(columns="time_s"), whole.drop(columns="time_s"), rtol=1e-12
    )


@pytest.mark.parametrize("algorithm", ["local_sgd", "gossip_sgd", "ad_psgd"])
def test_drift_is_the_distance_from_the_last_global_average(quick, algorithm):
    """With the consensus distance: mean_i ||x_i - c||^2 = consensus^2 + ||xbar - c||^2."""
    period = {"schedule": {"name": "every", "period": 4}} if algorithm == "ad_psgd" else {}
    period = {"period": 4} if algorithm == "local_sgd" else period
    quick |= {"algorithm": {"name": algorithm, **period}, "record": {"every": 1}, "steps": 7}
    experiment = build(load(quick, {"diagnostics": {"every": 1, "drift": True}}))
    engine = Simulator(experiment)
    x = engine.replica.x
    start, models, rows = x[0].clone(), [], []
    for row in Coordinator(experiment, engine).run():
        rows.append(row)
        models.append(x.clone())
    # After step 7, the last, nobody averages globally: models are those before its averaging
    # where there is no gossip.
    origin = start if algorithm == "gossip_sgd" else models[3][0]
    assert (models[3].std(0).max() == 0) == (algorithm != "gossip_sgd")
    row = rows[-1]
    if algorithm != "gossip_sgd":
        distances = (x - origin).norm(dim=1)
        assert row["drift_mean"] == pytest.approx(distances.mean().item(), rel=1e-12)
        assert row["drift_max"] == pytest.approx(distances.max().item(), rel=1e-12)
    # Gossip keeps the mean, so here too: by the mean of squares, which mean and max bound.
    moved = (x.mean(0) - origin).square().sum().item()
    square = row["consensus_distance"] ** 2 + moved
    assert row["drift_mean"] ** 2 <= square <= row["drift_max"] ** 2
    # At a global average it is measured before.
    assert rows[3]["drift_mean"] > rows[2]["drift_mean"] > 0


def test_a_newcomer_drifts_from_where_the_others_do(quick):
    """Worker 2 comes back at step 18, two steps after the global average of step 16."""
    quick |= {"algorithm": {"name": "local_sgd", "period": 4}}
    faults = [
        {"kind": "kill", "worker": 2, "step": 10},
        {"kind": "join", "worker": 2, "step": 18},
    ]
    experiment = build(
        load(
            quick,
            {
                "faults": faults,
                "diagnostics": {"every": 3, "drift": True},
                "on_worker_failure": "shrink",
            },
        )
    )
    engine = Simulator(experiment)
    for _ in Coordinator(experiment, engine).run():
        anchor = engine.replica.anchor
        assert anchor is not None
        assert len(anchor) == len(engine.members)
        # The mean of the others' anchors, which are the same but for the rounding of a mean.
        torch.testing.assert_close(anchor, anchor[:1].expand_as(anchor), rtol=1e-13, atol=1e-15)


NAMELESS = "names nothing; add gradient_norms"


@pytest.mark.parametrize(
    ("diagnostics", "message"),
    [
        ({"every": 5}, NAMELESS),
        ({"sharpness": {}}, "diagnostics.every: is required"),
        ({"every": 5, "gradient_norms": {"batches": 1}}, "diagnostics.gradient_norms.batches"),
        ({"every": 5, "trace": {"vector": 3}}, "did you mean diagnostics.trace.vectors"),
        ({"every": 5, "sharpness": {"tolerance": 0}}, "diagnostics.sharpness.tolerance"),
    ],
)
def test_wrong_options_are_refused(quick, diagnostics, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        decentral.run(quick, diagnostics=diagnostics)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0] * 2


class Doubling(nn.Linear):
    def forward(self, input):
        return OnceDifferentiable.apply(super().forward(input)) ** 2


def test_a_model_without_second_derivatives_is_refused_before_anything_starts(quick, monkeypatch):
    data = (torch.ones(40, 3), torch.ones(40, 2))
    monkeypatch.setattr(
        "decentral.experiment.TASKS",
        {"once": lambda workers, seed: Task(Doubling(3, 2), nn.functional.mse_loss, data)},
    )
    quick["task"] = {"name": "once", "batch_size": 4}
    decentral.run(quick, steps=2, diagnostics={"every": 2, "gradient_norms": {"batches": 2}})
    with pytest.raises(UserError, match=r"once or its loss has no second derivative"):
        decentral.run(quick, diagnostics={"every": 2, "trace": {}})
