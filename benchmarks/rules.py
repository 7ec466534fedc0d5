"""What the settings of a child that withhold or change events cost in its worker, for each event.

python -m benchmarks.rules
"""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

from benchmarks.redact import BATCH, RECORDS, ROUNDS, lines
from composite_logstore import LogEvent
from composite_logstore.clock import Clock
from composite_logstore.delivery.budgets import Budgets
from composite_logstore.testing import SimulatedChildConfig, make_events, make_stream

# None of them matches, so that all events pass all of them: that takes longest.
EXPRESSIONS = [rf"^{word} \d+$" for word in ("heartbeat", "poll", "cache", "ping", "retry")]
EXPRESSIONS += [f"{word} .*(timeout|refused)" for word in ("connection", "request", "read", "write", "lock")]
SETTINGS: dict[str, dict[str, Any]] = {
    "no rules": {},
    "ten expressions in `drop`": {"drop": [{"message": expression} for expression in EXPRESSIONS]},
    "ten loggers with wildcards": {"drop": [{"logger": f"library{number}.*"} for number in range(10)]},
    "ten attributes with wildcards": {"drop": [{"attributes": {"user": f"user{number}*"}} for number in range(10)]},
    "`sample`, half of the events": {"sample": {"ratio": 0.5}},
    "`collapse_repeats`, no repeats": {"collapse_repeats": {}},
    "`redact`, all formats": {"redact": {"secrets": False}},
    "`budget`, shared by processes": {"budget": {"events": 10**12}},
}


def measure(settings: dict[str, Any], events: list[LogEvent], spools: Path) -> float:
    """Return how many seconds of one core the steps of a child with these settings take for the events, in batches."""
    child = SimulatedChildConfig.model_validate({"name": "live", "type": "simulated", **settings})
    budget = Budgets(uuid4(), [child], spools, Clock()).of(child)
    processor = child.create_processor().then(budget)
    batches = [events[begin : begin + BATCH] for begin in range(0, len(events), BATCH)]
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for batch in batches:
            processor.commit(processor.process(batch))
        times.append(time.thread_time() - begin)
        # Else the events of the next round were repeats, and charged already.
        processor = child.create_processor().then(Budgets(uuid4(), [child], spools, Clock()).of(child))
    return median(times)


def main() -> None:
    """Measure, and print the table of docs/benchmarks.md."""
    texts = [f"{line} {number}" for number, line in enumerate(lines(RECORDS))]
    events = make_events(texts, make_stream(), attributes={"user": "alice"})
    print(f"Python {platform.python_version()}, {RECORDS:,} events of 150 bytes in batches of {BATCH:,}\n")
    print("| settings | µs an event |\n|---|---|")
    with tempfile.TemporaryDirectory() as spools:
        for name, settings in SETTINGS.items():
            print(f"| {name} | {1e6 * measure(settings, events, Path(spools)) / len(events):.2f} |")


if __name__ == "__main__":
    main()
