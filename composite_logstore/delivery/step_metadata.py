"""The account of a step as its metadata. ZenML asks for it before the last flush, so it is published again after it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore.clock import Clock
from composite_logstore.service import tell

if TYPE_CHECKING:
    from zenml.metadata.metadata_types import MetadataType

logger = get_logger(__name__)


class Summaries:
    """Publishes the step metadata of the steps of this process once more, when their account is final."""

    def __init__(self, component_id: UUID, clock: Clock) -> None:
        """Prepare; nothing is started."""
        self._component_id = component_id
        self._clock = clock
        self._process = os.getpid()
        self._steps: deque[UUID] = deque(maxlen=10_000)
        self._under_way: deque[object] = deque()
        self._publishing = threading.Lock()

    def add(self, step_run_id: UUID) -> None:
        """Remember a step that ZenML has asked for its metadata."""
        self._steps.append(step_run_id)

    def publish(self, metadata: Callable[[], dict[str, MetadataType]]) -> None:
        """Publish the metadata of all remembered steps, in a thread of its own. Never raises and never waits.

        Args:
            metadata: Returns the metadata. It is called in that thread, so it may wait.
        """
        # A forked process inherits the steps, but its parent publishes them. If two threads are under way, the second
        # has not begun yet, and publishes these steps, too.
        if not self._steps or os.getpid() != self._process or len(self._under_way) > 1:
            return
        token = object()
        self._under_way.append(token)

        def run() -> None:
            try:
                with self._publishing:
                    steps: set[UUID] = set()
                    while self._steps:
                        steps.add(self._steps.popleft())
                    final = metadata()
                    if steps:
                        _publish(self._component_id, steps, final)
            except BaseException as error:  # no other code would see it
                tell(logger.debug, "The step metadata could not be published: %s", type(error).__name__)
            finally:
                self._under_way.remove(token)

        try:
            self._clock.start(run, "composite-logstore step metadata")
        except Exception:
            # The limit of threads is reached, or the interpreter is ending. The next call publishes these steps.
            self._under_way.remove(token)

    def wait(self, seconds: float) -> None:
        """Wait until the threads under way have published, for so many seconds at most. Called as the process ends."""
        pause = self._clock.signal()
        end = self._clock.now() + seconds
        while self._under_way and self._clock.now() < end:
            pause.wait(0.01)


def _publish(component_id: UUID, steps: set[UUID], metadata: dict[str, MetadataType]) -> None:
    from zenml.client import Client
    from zenml.enums import MetadataResourceTypes
    from zenml.models import RunMetadataResource

    resources = [RunMetadataResource(id=step, type=MetadataResourceTypes.STEP_RUN) for step in steps]
    Client().create_run_metadata(metadata, resources, stack_component_id=component_id)
