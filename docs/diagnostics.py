"""Draw sharpness beside 2/lr in full-batch gradient descent on digits: the edge of stability.

python docs/diagnostics.py        # writes docs/diagnostics.png
"""

from pathlib import Path

import matplotlib.pyplot as plt

import decentral

HERE = Path(__file__).parent
SAMPLES = 1437  # all training images: a batch of as many is an epoch
CONFIG = {
    "workers": 1,
    "steps": 300,
    "task": {
        "name": "digits",
        "model": {"name": "mlp", "hidden": [32]},
        "batch_size": SAMPLES,
    },
    "optimizer": {"name": "sgd"},
    "algorithm": {"name": "parallel_sgd"},
    "network": {"compute_ms": 1},
    "record": {"every": 10},
    "diagnostics": {
        "every": 10,
        "samples_per_worker": SAMPLES,
        "sharpness": {"tolerance": 0.01},
    },
}
RATES = {0.2: "C0", 0.8: "C1"}


def main() -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True, layout="constrained")
    for lr, colour in RATES.items():
        metrics = decentral.run(CONFIG, **{"optimizer.lr": lr}).metrics
        above.plot(metrics["step"], metrics["sharpness"], color=colour, label=f"lr {lr:g}")
        above.axhline(2 / lr, color=colour, ls="--", lw=1, label=f"2 / {lr:g}")
        below.plot(metrics["step"], metrics["loss"], color=colour)
        print(metrics[["step", "loss", "sharpness", "two_over_lr"]].iloc[::6].to_string())
    above.set_title("sharpness", loc="left", fontsize=11)
    below.set_title("training loss", loc="left", fontsize=11)
    below.set_yscale("log")
    below.set_xlabel("step")
    above.legend(frameon=False, ncols=2)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(HERE / "diagnostics.png", dpi=110)


if __name__ == "__main__":
    main()
