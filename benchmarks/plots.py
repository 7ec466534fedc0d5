"""The plots of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
# The same figures make the same file.
matplotlib.rcParams["svg.hashsalt"] = "composite-logstore"
matplotlib.rcParams["font.size"] = 9

from matplotlib import pyplot  # noqa: E402

OURS = "#1f6feb"
OTHERS = "#9aa4b2"


def draw(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw them, and return where they are."""
    return [
        _delivered(figures["contest"]["near"], folder / "cpu.svg"),
        _percentiles(figures["contest"]["near"], folder / "emit.svg"),
        _scale(figures["scale"], folder / "scale.svg"),
    ]


def _colour(name: str) -> str:
    return OURS if name.startswith("composite") else OTHERS


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return path


def _delivered(results: Mapping[str, list[dict[str, Any]]], path: Path) -> Path:
    """CPU for each record, and records a second."""
    figure, (cpu, rate) = pyplot.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    names = list(results)
    for axis, key, title in (
        (cpu, "cpu_micros", "CPU for each record, delivered to three backends, µs"),
        (rate, "records_per_second", "records/s until the last is acknowledged"),
    ):
        values = [median(one[key] for one in results[name]) for name in names]
        bars = axis.barh(names, values, color=[_colour(name) for name in names])
        axis.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=3)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, max(values) * 1.2)
        axis.spines[["top", "right"]].set_visible(False)
    cpu.invert_yaxis()
    return _saved(figure, path)


def _percentiles(results: Mapping[str, list[dict[str, Any]]], path: Path) -> Path:
    """What a log call waits for, half of the time, and at worst."""
    figure, axis = pyplot.subplots(figsize=(7, 2.8))
    keys = ("emit_median_micros", "emit_p99_micros", "emit_p999_micros")
    marks = ("o", "s", "^")
    for row, (name, found) in enumerate(results.items()):
        values = [median(one[key] for one in found) for key in keys]
        axis.plot(values, [row] * 3, color=_colour(name), linewidth=1)
        for value, mark in zip(values, marks, strict=True):
            axis.plot([value], [row], mark, color=_colour(name))
    for label, mark in zip(("median", "99 %", "99.9 %"), marks, strict=True):
        axis.plot([], [], mark, color="black", label=label)
    axis.set_xscale("log")
    axis.set_yticks(range(len(results)), list(results))
    axis.invert_yaxis()
    axis.set_xlabel("emit under full load, µs")
    axis.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def _scale(scale: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """What emit costs by children, threads and attributes."""
    kinds = ("children", "threads", "streams", "attributes")
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(9, 2.2), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        places = range(len(scale[kind]))
        axis.plot(places, list(scale[kind].values()), "o-", color=OURS)
        axis.set_xticks(places, list(scale[kind]))
        axis.set_title(kind, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("emit, µs")
    axes[0].set_ylim(0)
    return _saved(figure, path)
