"""Everything side by side, in one run: `make bench`. It takes about 15 minutes.

Prints tables, and writes the figures (`benchmarks.json`) and the plots that docs/benchmarks.md shows.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import requests
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OURS = "composite log store, three children"
STOCK = "ZenML, one log store"
STOCK_THREE = "ZenML, three log stores"

Results = dict[str, list[dict[str, Any]]]


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        rounds: How often everybody delivers, in turn.
        records: How many records are delivered each time.
        far_records: The same, to backends that are far away.
        scale_records: How many records a null store gets at a time.
        scale_rounds: How often.
        training_rounds: How often there is training, in turn.
        iterations: Of the training loop.
        queued: How many records wait in memory.
        stock: Whether the training loop and memory are measured with ZenML's own log stores, too.
    """

    rounds: int
    records: int
    far_records: int
    scale_records: int
    scale_rounds: int
    training_rounds: int
    iterations: int
    queued: int
    stock: bool


WHOLE = Size(5, 30_000, 10_000, 4_000, 25, 3, 15_000, 100_000, True)
QUICK = Size(1, 1_000, 500, 200, 1, 1, 600, 2_000, False)
FAR_MILLIS = 50


@contextmanager
def own_zenml() -> Iterator[None]:
    """Let no benchmark touch the ZenML configuration of whoever runs it, or the network."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        os.environ.update(ZENML_CONFIG_PATH=folder, ZENML_ANALYTICS_OPT_IN="false", AUTO_OPEN_DASHBOARD="false")
        yield


def measured(module: str, *arguments: object) -> dict[str, Any]:
    """Run a module in a process of its own, and return what it prints as JSON."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def contest(size: Size, say: Console) -> dict[str, Results]:
    """Have everybody deliver, to backends on this machine, with an archive on S3, and to backends far away."""
    from benchmarks.backends import backends, far
    from benchmarks.contenders import CONTENDERS, ON_S3

    results: dict[str, Results] = {"near": {}, "S3": {}, "far": {}}

    def deliver(where: str, name: str, places: Mapping[str, str], records: int, *options: str) -> None:
        found = measured("contenders", name, json.dumps(places), records, *options)
        for child, delivered in found.get("delivered", {}).items():
            if delivered != records:
                raise RuntimeError(f"{name}: '{child}' got {delivered} of {records} records")
        results[where].setdefault(name, []).append(found)
        # The stand-in keeps in memory what it gets.
        requests.post(places["datadog"] + "/control", json={"forget": True}, timeout=60).raise_for_status()

    with backends() as places, far(places, FAR_MILLIS) as far_places:
        for place in range(size.rounds):
            say.print(f"round {place + 1} of {size.rounds}: delivering")
            for name in CONTENDERS:
                deliver("near", name, places, size.records)
                deliver("far", name, far_places, size.far_records)
            for name in ON_S3:
                deliver("S3", name, places, size.records, "s3")
    return results


def training(size: Size, say: Console) -> dict[str, Results]:
    """Have a training loop log to each of them, and threads that share a context."""
    from benchmarks.backends import backends
    from benchmarks.training import NOWHERE, NULL, THREADED

    results: dict[str, Results] = {"loop": {}, "threads": {}}
    with backends(with_s3=False) as places:
        for place in range(size.training_rounds):
            say.print(f"round {place + 1} of {size.training_rounds}: training")
            for name in (NOWHERE, NULL, OURS, *((STOCK, STOCK_THREE) if size.stock else ())):
                found = measured("training", "loop", name, json.dumps(places), size.iterations)
                results["loop"].setdefault(name, []).append(found)
            for name in THREADED:
                found = measured("training", "threads", name, "{}", size.iterations // 6)
                results["threads"].setdefault(name, []).append(found)
    return results


def footprint(size: Size, say: Console) -> dict[str, Any]:
    """Measure memory and imports."""
    from benchmarks.footprint import MEMORY, import_millis

    say.print("memory and imports")
    return {
        "megabytes": {
            name: measured("footprint", name, size.queued)["megabytes"] for name in MEMORY[: None if size.stock else 2]
        },
        "import_millis": {
            "composite_logstore": import_millis(),
            "and its classes": import_millis(
                "from composite_logstore import CompositeLogStore, CompositeLogStoreConfig, CompositeLogStoreFlavor"
            ),
        },
    }


def middle(found: list[dict[str, Any]], key: str) -> float:
    """Return the median of the rounds."""
    return median(one[key] for one in found)


def spread(found: list[dict[str, Any]], key: str, digits: int = 1) -> str:
    """Return the median of the rounds, the lowest and the highest."""
    values = [one[key] for one in found]
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def goals(figures: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Return what is to be reached: what, the goal, what was measured, and whether it is reached."""
    emit, children = figures["scale"]["emit"], figures["scale"]["children"]
    ours = figures["contest"]["near"][OURS]
    ratio = emit[STOCK] / emit[OURS]
    # The dearer way to see it: while backends are delivered to, a stock store's emit takes longer still.
    cpu = middle(ours, "cpu_micros") / emit[STOCK]
    eight = children["8"] / children["1"]
    rate = middle(ours, "records_per_second")
    tail = median(own["emit_p99_micros"] / own["emit_median_micros"] for own in ours)
    loop = figures["training"]["loop"]
    null = middle(loop["ZenML, a log store that does nothing"], "slowdown")
    beyond = (1 + middle(loop[OURS], "slowdown")) / (1 + null) - 1
    reached = {name: middle(found, "reached_emit") for name, found in figures["training"]["threads"].items()}
    memory = figures["footprint"]["megabytes"][OURS]
    imported = figures["footprint"]["import_millis"]["composite_logstore"]
    best_stock = max(share for name, share in reached.items() if name in (STOCK, STOCK_THREE))
    return [
        ("emit: ONE stock store's over ours with three children", "at least 8", f"{ratio:.1f}", ratio >= 8),
        ("CPU for each record, delivered, over ONE stock store's emit", "at most 1", f"{cpu:.2f}", cpu <= 1),
        ("emit, 8 children against 1", "at most 1.3", f"{eight:.2f}", eight <= 1.3),
        ("delivered to all three on one core", "at least 25,000/s", f"{rate:,.0f}/s", rate >= 25_000),
        ("emit under full load: 99th percentile over median", "at most 3", f"{tail:.1f}", tail <= 3),
        ("training loop, beyond ZenML with a null store", "at most 20 %", f"{beyond:.0%}", beyond <= 0.2),
        (
            "records of 4 threads that reach emit",
            f"more than stock ({best_stock:.1%})",
            f"{reached[OURS]:.1%}",
            reached[OURS] > best_stock or reached[OURS] == 1,
        ),
        ("100,000 waiting records, three children", "at most 70 MB", f"{memory:.0f} MB", memory <= 70),
        ("import after zenml", "at most 30 ms", f"{imported:.1f} ms", imported <= 30),
    ]


def show(figures: Mapping[str, Any], say: Console) -> None:
    """Print it as tables."""
    for where, title in (
        ("near", "Delivered to a collector, Datadog's stand-in and a local archive"),
        ("S3", "The same with the archive on S3"),
        ("far", f"The same, {FAR_MILLIS} ms away, there and back"),
    ):
        table = Table("", "emit, µs", "median", "99 %", "99.9 %", "CPU, µs", "records/s", title=title)
        for name, found in figures["contest"][where].items():
            table.add_row(
                name,
                spread(found, "emit_micros"),
                *(
                    f"{middle(found, key):,.1f}"
                    for key in ("emit_median_micros", "emit_p99_micros", "emit_p999_micros")
                ),
                spread(found, "cpu_micros"),
                spread(found, "records_per_second", 0),
            )
        say.print(table)
    for kind, found in figures["scale"].items():
        table = Table(kind, "emit, µs", title=f"emit, no exporter does anything: {kind}")
        for name, micros in found.items():
            table.add_row(name, f"{micros:,.2f}")
        say.print(table)
    table = Table("", "slowdown", title="A training loop that logs 10,000 records/s")
    for name, found in figures["training"]["loop"].items():
        table.add_row(name, f"{middle(found, 'slowdown'):.0%}")
    say.print(table)
    table = Table("", "reached emit", title="Records of four threads that share a ZenML context")
    for name, found in figures["training"]["threads"].items():
        table.add_row(name, f"{middle(found, 'reached_emit'):.1%}")
    say.print(table)
    table = Table("", "MB", title="Memory of waiting records of 200 bytes")
    for name, megabytes in figures["footprint"]["megabytes"].items():
        table.add_row(name, f"{megabytes:,.0f}")
    say.print(table)
    table = Table("", "goal", "measured", "", title="Goals")
    for what, goal, measurement, is_reached in goals(figures):
        table.add_row(what, goal, measurement, "reached" if is_reached else "missed")
    say.print(table)


def processor() -> str:
    """Return the processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@click.command()
@click.option("--quick", is_flag=True, help="Measure next to nothing, to see whether all of it works.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "docs" / "benchmarks",
    help="The folder for the figures and the plots.",
)
def main(quick: bool, output: Path) -> None:
    """Measure everything side by side."""
    from importlib.metadata import version

    size = QUICK if quick else WHOLE
    say = Console(width=150)
    with own_zenml():
        from benchmarks import scale

        packages = ("zenml", "opentelemetry-sdk", "orjson", "loguru")
        figures: dict[str, Any] = {
            "machine": {
                "python": platform.python_version(),
                "processor": processor(),
                "cores": os.cpu_count(),
                **{name: version(name) for name in packages},
            },
            "size": size._asdict(),
            "contest": contest(size, say),
            "training": training(size, say),
            "footprint": footprint(size, say),
        }
        say.print("emit in all sizes")
        figures["scale"] = scale.run(size.scale_records, size.scale_rounds)
    show(figures, say)
    output.mkdir(parents=True, exist_ok=True)
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    from benchmarks.plots import draw

    for path in draw(figures, output):
        say.print(f"drawn: {path}")


if __name__ == "__main__":
    main()
