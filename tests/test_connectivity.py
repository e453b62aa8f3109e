"""Linear mode connectivity: lines between models, barriers, and hidden units that change places."""

import json

import pytest
import torch
from test_api import Diary
from torch import nn

import decentral
from decentral import UserError
from decentral.cli import main
from decentral.diagnostics.connectivity import Line, connectivity
from decentral.diagnostics.matching import chain_of
from decentral.tasks.models import cnn, mlp

NORMED = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
    nn.MaxPool2d(2),
    nn.Conv2d(5, 7, 3, padding=1, bias=False),
    nn.BatchNorm2d(7, affine=False),
    nn.GELU(),
    nn.Flatten(),
    nn.Linear(7 * 16, 6),
    nn.Tanh(),
    nn.Linear(6, 3),
)
CHAINS = {
    "linear": (lambda: mlp((64,), 3, hidden=[]), (64,), []),
    "mlp": (lambda: mlp((64,), 3, hidden=[9, 8, 7]), (64,), [9, 8, 7]),
    "cnn": (lambda: cnn((1, 8, 8), 3, channels=(4, 6)), (1, 8, 8), [4, 6]),
    "normed": (lambda: NORMED, (1, 8, 8), [5, 7, 6]),
}


def filled(model, seed):
    """The model in float64, all parameters and statistics drawn."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.double().state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(drawn if name.endswith("running_var") else drawn - 0.3)
    return model.eval()


def orders(units, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator) for n in units]


@pytest.mark.parametrize("name", CHAINS)
def test_a_renumbered_network_computes_the_same_and_is_found_again(name):
    make, shape, units = CHAINS[name]
    model = filled(make(), 0)
    chain = chain_of(model)
    assert chain.units == units
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    output = model(x).clone()
    places = orders(units, 2)
    renumbered = chain.permuted(state, places)
    model.load_state_dict(renumbered)
    torch.testing.assert_close(model(x), output, rtol=1e-12, atol=1e-12)
    if units:
        assert any(not torch.equal(renumbered[key], state[key]) for key in state)
    parameters = {key: state[key] for key, _ in model.named_parameters()}
    others = {key: renumbered[key] for key in parameters}
    found = chain.permuted(renumbered, chain.match(parameters, others))
    for key, value in state.items():
        assert torch.equal(found[key], value), key


def test_matching_brings_models_nearer_than_they_were():
    """Of two networks that have nothing to do with each other, and of one that is near as it is."""
    chain = chain_of(mlp((64,), 3, hidden=[9, 8]))
    one, other = (dict(filled(mlp((64,), 3, hidden=[9, 8]), s).named_parameters()) for s in (0, 1))
    one, other = ({k: p.detach() for k, p in model.items()} for model in (one, other))

    def distance(b):
        return sum((one[key] - b[key]).square().sum().item() for key in one)

    assert distance(chain.permuted(other, chain.match(one, other))) < 0.95 * distance(other)
    near = {key: value + 0.01 * other[key] for key, value in one.items()}
    assert all(torch.equal(p, p.sort().values) for p in chain.match(one, near))


class Residual(nn.Module):
    def forward(self, x):
        return x + 1


TIED = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Residual(), "the model is a Residual"),
        (nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), "1 is a LayerNorm"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)), "0 is a convolution in groups"),
        (nn.Sequential(TIED, nn.ReLU(), TIED), "shares parameters"),
        (nn.Sequential(nn.Linear(2, 3).requires_grad_(False), nn.Linear(3, 1)), "is frozen"),
    ],
    ids=["residual", "layer norm", "groups", "tied", "frozen"],
)
def test_a_structure_that_matching_does_not_know_is_refused(model, what):
    with pytest.raises(UserError, match=rf"--match: units are matched in .*{what}"):
        chain_of(model)


def test_the_barrier_is_the_rise_above_the_ends():
    line = Line(("a", "b"), False, "test", 1.0, [0, 0.25, 0.5, 1], [1.0, 2.0, 2.4, 3.0], None)
    assert line.barrier == pytest.approx(0.5)  # at 1/4: 2 - (3/4 + 3/4)
    flat = Line(("a", "b"), False, "test", 1.0, [0, 0.5, 1], [1.0, 0.5, 1.0], None)
    assert flat.barrier == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with a checkpoint at its last step, and beside it its own model, renumbered."""
    folder = tmp_path_factory.mktemp("runs")
    config = {
        "workers": 3,
        "steps": 150,
        "dtype": "float64",
        "task": {
            "name": "digits",
            "batch_size": 16,
            "model": {"name": "mlp", "hidden": [12, 10]},
        },
        "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9},
        "algorithm": {"name": "local_sgd", "period": 100},
        "network": {"compute_ms": 1},
        "checkpoint": {"every": 150},
    }
    result = decentral.run(config, out=folder / "one")
    chain = chain_of(result.model)
    renumbered = chain.permuted(result.model.state_dict(), orders(chain.units, 3))
    (folder / "other").mkdir()
    (folder / "other/config.yaml").write_bytes((folder / "one/config.yaml").read_bytes())
    torch.save(renumbered, folder / "other/model.pt")
    return folder, result


def test_between_a_network_and_its_own_permutation_is_a_barrier_that_matching_takes_away(runs):
    folder, result = runs
    pair = [folder / "one", folder / "other"]
    line = connectivity(pair)
    assert line.loss[0] == pytest.approx(result.summary["final"]["eval_loss"], rel=1e-12)
    assert line.loss[-1] == pytest.approx(line.loss[0], rel=1e-12)
    assert line.barrier > 0.1
    matched = connectivity(pair, match=True)
    assert matched.barrier < 1e-9
    assert matched.distance < 1e-9
    assert matched.loss == pytest.approx([line.loss[0]] * 11, rel=1e-9)
    train = connectivity(pair, points=3, data="train")
    assert train.at == [0, 0.5, 1]
    assert train.loss[0] < line.loss[0]


def test_the_ends_between_two_workers_are_their_own_models(runs):
    folder, result = runs
    line = connectivity([folder / "one"], points=2)
    assert line.ends == ("worker 0 at step-00000150", "worker 2 at step-00000150")
    middle = connectivity([folder / "one"], workers=(1, 0), points=3)
    assert middle.loss[-1] == line.loss[0]
    assert line.accuracy is not None
    assert middle.accuracy is not None
    mean = (line.accuracy[0] + line.accuracy[1] + middle.accuracy[0]) / 3
    assert mean == pytest.approx(result.summary["final"]["eval_accuracy_workers"], rel=1e-9)
    assert middle.distance > 0.1


def test_the_command_prints_a_table_or_json(runs, capsys):
    folder, _ = runs
    with pytest.raises(SystemExit) as ended:
        main(
            ["connectivity", str(folder / "one"), "--workers", "0", "1", "--points", "3", "--json"]
        )
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["at"] == [0, 0.5, 1]
    assert told["barrier"] >= 0
    with pytest.raises(SystemExit):
        main(["connectivity", str(folder / "one"), str(folder / "other"), "--match"])
    assert "barrier" in capsys.readouterr().out


def test_what_is_no_pair_of_models_is_refused(runs, tmp_path):
    folder, _ = runs
    one, other = folder / "one", folder / "other"
    text = (one / "config.yaml").read_text()
    bare, foreign, torn = tmp_path / "bare", tmp_path / "foreign", tmp_path / "torn"
    for path, content in ((bare, text), (foreign, text.replace("- 12", "- 13")), (torn, text)):
        path.mkdir()
        (path / "config.yaml").write_text(content)
    (torn / "model.pt").write_bytes(b"no model")
    for directories, options, message in [
        ([tmp_path], {}, "is not a run directory"),
        ([bare], {}, "holds no checkpoint"),
        ([one, bare], {}, "has no model.pt"),
        ([one, torn], {}, "holds no model that is safe to load"),
        ([one, foreign], {}, "tasks of their own"),
        ([one, other], {"workers": (0, 1)}, "--workers: are of one run"),
        ([one], {"workers": (0, 7)}, "has no worker 7; it has 0, 1, 2"),
        ([one], {"workers": (1, 1)}, "worker 1 twice"),
        ([one], {"points": 1}, "--points: must be at least 2"),
        ([one], {"data": "all"}, "--data: is test or train"),
        ([one, other, one], {}, "got 3"),
    ]:
        with pytest.raises(UserError, match=message):
            connectivity(directories, **options)


def test_a_run_that_was_stopped_has_workers_to_compare(quick, tmp_path):
    decentral.run(quick, out=tmp_path, watcher=Diary(stop_at=6))
    assert connectivity([tmp_path], points=2).ends[0] == "worker 0 at step-00000006"
