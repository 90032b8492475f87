"""Charts of a report as SVG texts, of one experiment or of several over each other."""

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.reporting.statistics import Bin, Interval

COLOURS = ("#1f5fa8", "#d9822b", "#3d9970", "#8e44ad")
KIND_COLOURS = ("#3d9970", "#a3c585", "#d9822b", "#c0562f", "#8c8c8c")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888", "axes.labelcolor": "#444",
    "xtick.color": "#444", "ytick.color": "#444", "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
}  # fmt: skip


def lines(series: dict[str, list[tuple[int, float]]], label: str, dashed: tuple[str, ...] = (), colours=COLOURS) -> str:
    """Curves by optimizer step; those of `dashed` thin and broken."""

    def draw(axes: Axes) -> None:
        for place, (name, points) in enumerate(series.items()):
            thin = name in dashed
            axes.plot(
                *zip(*points, strict=True), label=name, color=colours[place % len(colours)], lw=1.2 if thin else 2,
                ls="--" if thin else "-", marker="o" if len(points) < 30 else None, ms=3,
            )  # fmt: skip
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)

    return _svg(draw)


def em_by_rank(experiments: dict[str, dict[str, Interval | None]]) -> str:
    """Bars with intervals, the number of questions above each."""

    def draw(axes: Axes) -> None:
        width = 0.8 / len(experiments)
        for number, (name, ranks) in enumerate(experiments.items()):
            for place, found in enumerate(ranks.values()):
                if found is None:
                    continue
                x = place + (number - (len(experiments) - 1) / 2) * width
                mean, low, high = (100 * share for share in (found.mean, found.low, found.high))
                label = name if found is next(filter(None, ranks.values())) else None
                axes.bar(x, mean, width * 0.92, color=COLOURS[number], alpha=0.85, label=label)
                axes.errorbar(x, mean, [[mean - low], [high - mean]], color="#333", lw=1, capsize=2)
                axes.annotate(
                    f"{found.count}", (x, high), (0, 3), textcoords="offset points", ha="center",
                    fontsize=8, color="#666",
                )  # fmt: skip
        longest = max(experiments.values(), key=len)
        axes.set_xticks(range(len(longest)), list(longest))
        axes.set(xlabel="place of the gold passage", ylabel="EM", ylim=(0, 108))
        axes.grid(axis="x", visible=False)
        if len(experiments) > 1:
            axes.legend(frameon=False)

    return _svg(draw)


def kinds(experiments: dict[str, dict[str, int]]) -> str:
    """The share of each kind of answer, one bar an experiment."""

    def draw(axes: Axes) -> None:
        for row, counts in enumerate(experiments.values()):
            left, total = 0.0, sum(counts.values()) or 1
            for number, (kind, count) in enumerate(counts.items()):
                share = 100 * count / total
                axes.barh(row, share, 0.6, left, color=KIND_COLOURS[number], label=None if row else kind)
                if share >= 4:
                    axes.text(
                        left + share / 2, row, f"{share:.0f}", ha="center", va="center", color="white", fontsize=9
                    )
                left += share
        axes.set_yticks(range(len(experiments)), list(experiments) if len(experiments) > 1 else [""])
        axes.set(xlabel="percent of the questions", xlim=(0, 100))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)

    return _svg(draw, height=1.2 + 0.55 * len(experiments), width=10)


def reliability(experiments: dict[str, list[Bin]], x_label: str, y_label: str) -> str:
    """Predicted against observed share; the diagonal is perfect calibration."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#aaa", lw=1, ls=":")
        for number, (name, bins) in enumerate(experiments.items()):
            x, y = [one.predicted for one in bins], [one.observed.mean for one in bins]
            error = [
                [one.observed.mean - one.observed.low for one in bins],
                [one.observed.high - one.observed.mean for one in bins],
            ]
            axes.errorbar(x, y, error, color=COLOURS[number], lw=1.5, marker="o", ms=4, capsize=2, label=name)
            for one in bins:
                axes.annotate(
                    f"{one.observed.count}", (one.predicted, one.observed.mean), (5, -9), textcoords="offset points",
                    fontsize=7, color="#777",
                )  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1.03), ylim=(0, 1.03))
        if len(experiments) > 1:
            axes.legend(frameon=False)

    return _svg(draw)


def _svg(draw, width: float = 5.6, height: float = 3.4) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Fonts are the page's; the size follows the page's width.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    return re.sub(
        r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
