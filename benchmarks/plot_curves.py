"""Loss curves of the runs in a results file: python benchmarks/plot_curves.py RESULTS.json OUT.png [WINDOW]

A line per seed, each a running mean over WINDOW steps (1 if not given).
"""

import json
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"llama": "Llama: full attention, SwiGLU", "sid": "Sid: every 4th layer 2-simplicial, squared ReLU"}
COLOURS = {"llama": "tab:blue", "sid": "tab:orange"}


def main(source: str, target: str, window: str = "1") -> None:
    with open(source) as file:
        runs = json.load(file)["runs"]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=150)
    named = set()
    for run in runs:
        loss = np.convolve(run["loss"], np.ones(int(window)) / int(window), mode="valid")
        tokens = run["tokens"] / run["steps"] / 1e6 * np.arange(int(window), run["steps"] + 1)
        arch = run["arch"]
        axes.plot(tokens, loss, color=COLOURS[arch], label=None if arch in named else NAMES[arch], linewidth=1.2)
        named.add(arch)
    axes.set(xlabel="training tokens, millions", ylabel="training loss, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
