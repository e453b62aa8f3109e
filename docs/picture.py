"""Draw the README's picture: the quickstart, and what it would be with gossip or averages alone.

python docs/picture.py        # writes docs/quickstart.png; about ten seconds
"""

from pathlib import Path

import matplotlib.pyplot as plt

import decentral

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
METHODS = {
    "Gossip-PGA, H = 8": {"algorithm.name": "gossip_pga"},
    "Gossip SGD": {"algorithm.name": "gossip_sgd", "algorithm.period": None},
    "Local SGD, H = 8": {"algorithm.name": "local_sgd"},
}
# Steps that no global average ends: there the distance would be that of a fresh average.
RECORD = {"record.every": 5, "record.evaluate_every": 25}
PANELS = [
    ("loss", "training loss"),
    ("consensus_distance", "consensus distance"),
    ("eval_accuracy", "test accuracy, averaged model"),
]


def main() -> None:
    runs = {
        name: decentral.run(CONFIG, engine="sim", **RECORD, **overrides).metrics
        for name, overrides in METHODS.items()
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (column, title) in zip(axes, PANELS, strict=True):
        for (name, metrics), colour in zip(runs.items(), ("C0", "C1", "C2"), strict=True):
            rows = metrics.dropna(subset=[column])
            axis.plot(rows["step"], rows[column], label=name, color=colour, lw=1.6, alpha=0.9)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if column != "eval_accuracy":
            axis.set_yscale("log")
    axes[2].set_ylim(0.8, 1.0)
    axes[1].legend(frameon=False)
    figure.savefig(HERE / "quickstart.png", dpi=110)


if __name__ == "__main__":
    main()
