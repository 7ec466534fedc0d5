"""What redaction costs in the worker of a child: the whole list of formats, and the values of fifty secrets.

python -m benchmarks.redact
"""

from __future__ import annotations

import platform
import time
from statistics import median
from typing import Any
from uuid import uuid4

from composite_logstore import LogEvent
from composite_logstore.processing.key_formats import FORMATS
from composite_logstore.processing.known_secrets import KnownSecrets
from composite_logstore.processing.processor import Processed
from composite_logstore.processing.redaction import Redact
from composite_logstore.processing.settings import RedactSettings
from composite_logstore.testing import make_events, make_stream

ROUNDS = 15
RECORDS = 20_000
BATCH = 1_000
SECRETS = 50

WORDS = """epoch step loss 0.123 accuracy loading model from checkpoint https://example.com/path?x=1 s3://bucket/key
user:alice task-12 batch size 64 token count key value sha256:9f86d081884c7d65 /usr/lib/python3/foo.py in forward"""


def lines(number: int, length: int = 14) -> list[str]:
    """Return lines of words as logs have them."""
    words = WORDS.split()
    places = [[line * 7 + word * (line % 5 + 1) for word in range(length)] for line in range(number)]
    return [" ".join(words[place % len(words)] for place in line) for line in places]


def measure(step: Redact, events: list[LogEvent]) -> float:
    """Return how many seconds the step takes for the events, in batches."""
    batches = [events[begin : begin + BATCH] for begin in range(0, len(events), BATCH)]
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for batch in batches:
            step.process(Processed(batch))
        times.append(time.perf_counter() - begin)
    return median(times)


def report(name: str, step: Redact, events: list[LogEvent]) -> None:
    """Print one line of the table."""
    seconds = measure(step, events)
    size = sum(len(event.text) + sum(len(str(value)) for value in event.attributes.values()) for event in events)
    print(f"| {name} | {size / 1e6 / seconds:,.0f} | {1e6 * seconds / len(events):.2f} |")


def main() -> None:
    """Measure, and print the table of docs/benchmarks.md."""
    secrets = KnownSecrets()
    for number in range(SECRETS):
        secrets.note(f"secret {number}", f"{uuid4().hex}{number}")
    step = Redact(RedactSettings(), secrets)
    whole: dict[str, Any] = {"formats": "all", "patterns": [{"name": "number", "pattern": r"^\d{16}$"}]}
    stream = make_stream(**{"zenml.pipeline.name": "train", "zenml.step.run.name": "fit"})
    plain = lines(RECORDS)
    key = "AKIA" + "ABCD2345" * 2
    print(
        f"Python {platform.python_version()}, {len(FORMATS)} formats, {SECRETS} secrets of {len(secrets.forms)} forms\n"
    )
    print("| events | MB/s | µs an event |\n|---|---|---|")
    report("of 150 bytes, without a secret", step, make_events(plain, stream))
    mixed = [f"{line} {key}" if number % 100 == 0 else line for number, line in enumerate(plain)]
    report("of 150 bytes, one in 100 has a key", step, make_events(mixed, stream))
    attributes = {"user": "alice", "shape": [3, 4], "url": "https://example.com"}
    report("of 150 bytes, with three attributes", step, make_events(plain, stream, attributes=attributes))
    report("of 150 bytes, own pattern with `^`", Redact(RedactSettings(**whole), secrets), make_events(plain, stream))
    report("of 20 kB, without a secret", step, make_events([" ".join(lines(150)) for _ in range(200)], stream))
    report("of 150 bytes, each has a key", step, make_events([f"{line} {key}" for line in plain[:2_000]], stream))


if __name__ == "__main__":
    main()
