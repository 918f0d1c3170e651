"""In: a JSON record of compare.py. Out: a picture of it, as the README shows.

    python bench/chart.py bench/results/NAME.json docs/images/speed.png

Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {
    "openlpu": "#1f5fa8",
    "llama.cpp": "#b8bec6",
    "openvino": "#8d96a3",
    "ctranslate2": "#d9dde2",
}
HEIGHT = 0.22  # inches of a bar
GAP = 1.5  # bars between two cases


def draw(record: dict[str, Any], picture: Path) -> None:
    """A group of bars for each case, one for each engine, as parts of the case's fastest; the
    medians are written beside them."""
    cases = record["cases"]
    rows = sum(len(case["median_tokens_per_s"]) + GAP for case in cases)
    figure, axes = pyplot.subplots(figsize=(8, HEIGHT * rows + 0.8), layout="constrained")
    at, ticks, names = 0.0, [], []
    for case in cases:
        axes.text(0, at - 1, case["name"], va="center", fontsize=10, fontweight="bold")
        fastest = max(case["median_tokens_per_s"].values())
        for name, median in case["median_tokens_per_s"].items():
            length = median / fastest
            axes.barh(at, length, 0.85, color=COLOURS[name.split()[0]])
            text = f"{median:,.0f} tokens/s{_ratio(case, name)}"
            axes.text(length + 0.01, at, text, va="center", fontsize=8)
            ticks.append(at)
            names.append(name)
            at += 1
        at += GAP
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(at - GAP, -1.8)  # the first case on top
    axes.set_xlim(0, 1.3)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(
        f"{record['model']} on {record['threads']} threads, {record['cpu']}\n"
        f"medians of {record['rounds']} interleaved rounds, {record['date'][:10]}; "
        "x: to the best peer of the same precision",
        fontsize=10,
        loc="left",
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


def _ratio(case: dict[str, Any], name: str) -> str:
    ratio = case["ratio_to_best_peer"].get(name)
    return f"  ({ratio:.1f}x)" if ratio and name.startswith("openlpu") else ""


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
