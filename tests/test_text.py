"""The task `text`: its samples, and the small GPT that learns them."""

import logging
import math

import pytest
import torch
import yaml

import decentral
from decentral.config import load
from decentral.errors import UserError
from decentral.tasks import fetch, length, text

SMALL = {"name": "gpt", "width": 8, "layers": 2, "heads": 2}


@pytest.fixture
def alphabet(tmp_path):
    """A text in which each of four characters follows the one before it, over and over."""
    path = tmp_path / "alphabet.txt"
    path.write_text("äbcd" * 60, encoding="utf-8")
    return path


def config(path, **changes):
    return {
        "workers": 3,
        "steps": 24,
        "task": {"name": "text", "file": str(path), "context": 8, "batch_size": 4, "model": SMALL},
        "optimizer": {"name": "adam", "lr": 0.03},
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"name": "ring"},
        "network": {"compute_ms": 1},
    } | changes


def test_a_sample_is_successive_characters_and_those_that_follow_each(tmp_path):
    (tmp_path / "short.txt").write_text("cabcabxca")
    task = text(1, 0, file=str(tmp_path / "short.txt"), context=2, test_fraction=0.25, model=SMALL)
    x, y = fetch(task.train, torch.arange(length(task.train)))
    assert x.tolist() == [[2, 0], [1, 2], [0, 1]]  # ca bc ab, of the vocabulary abcx
    assert y.tolist() == [[0, 1], [2, 0], [1, 3]]
    assert task.test is not None
    assert [part.tolist() for part in task.test[0]] == [[3, 2], [2, 0]]


def test_no_position_sees_a_later_one_and_each_sees_all_before_it(alphabet):
    model = text(1, 0, file=str(alphabet), context=6, model=SMALL).model.double()
    characters = torch.tensor([[0, 1, 2, 3, 0, 1]])
    before = model(characters)
    for changed in range(6):
        other = characters.clone()
        other[0, changed] = (other[0, changed] + 1) % 4
        moved = (model(other) - before).abs().amax(dim=(0, 2)) > 0
        assert moved.tolist() == [position >= changed for position in range(6)]


def test_the_untrained_model_knows_nothing_and_the_trained_one_the_alphabet(alphabet, caplog):
    with caplog.at_level(logging.WARNING):
        result = decentral.run(config(alphabet, record={"every": 1}))
    assert "one by one" not in caplog.text  # vmap takes it
    assert result.metrics.loss[0] == pytest.approx(math.log(4), abs=0.05)
    assert result.summary["final"]["eval_loss"] < 0.2
    assert result.summary["final"]["eval_accuracy"] > 0.9


def test_a_relative_file_is_looked_for_beside_the_config(alphabet, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config("alphabet.txt")))
    monkeypatch.chdir("/")
    assert load(tmp_path / "run.yaml").task.options["file"] == str(alphabet)


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        (None, {}, "cannot read the text"),
        (b"\xff\xfe", {}, "cannot read the text"),
        (b"", {}, "0 characters"),
        (b"abcdefgh" * 3, {}, "2 samples of 8"),
        (b"abcd" * 60, {"task.model.heads": 3}, "3 heads and width 8"),
        (b"abcd" * 60, {"task.model.name": "mlp"}, "there is no model 'mlp'"),
        (b"abcd" * 60, {"task.partition": {"kind": "dirichlet", "alpha": 1}}, "kind: iid"),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path, content, changes, said):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        decentral.run(config(tmp_path / "text.txt"), **changes)
