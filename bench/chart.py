"""In: a JSON record of compare.py. Out: a picture of it, as the README shows.

    python bench/chart.py bench/results/NAME.json docs/images/speed.png

Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

OURS, THEIRS = "#1f5fa8", "#b8bec6"


def draw(record: dict, picture: Path) -> None:
    """A pair of bars for each case, llama.cpp's as 1, the medians written beside them."""
    cases = record["cases"]
    figure, axes = pyplot.subplots(figsize=(8, 0.75 * len(cases) + 1.5), layout="constrained")
    for row, case in enumerate(reversed(cases)):
        medians = case["median_tokens_per_s"]
        bars = ((0.2, case["ratio"], "openlpu", OURS), (-0.2, 1.0, "llama.cpp", THEIRS))
        for offset, length, name, colour in bars:
            axes.barh(row + offset, length, 0.36, color=colour)
            text = f"{medians[name]:,.0f} tokens/s"
            if name == "openlpu":
                text += f"  ({case['ratio']:.1f}x)"
            axes.text(length + 0.05, row + offset, text, va="center", fontsize=9)
    axes.set_yticks(range(len(cases)), [case["name"] for case in reversed(cases)])
    axes.set_xlim(0, max(case["ratio"] for case in cases) * 1.35)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(
        f"SmolLM2-135M on {record['threads']} threads: OpenLPU w8 (blue), llama.cpp Q8_0 (grey)\n"
        f"{record['cpu']}, medians of {record['rounds']} interleaved rounds, {record['date'][:10]}",
        fontsize=10,
        loc="left",
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
