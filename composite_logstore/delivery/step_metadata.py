"""The delivery summary of a step: ZenML asks for it before the last flush, so it is published once more after it."""

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
    """The steps of this process whose summary is not final yet, and its publication, for which nobody waits."""

    def __init__(self, component_id: UUID, clock: Clock) -> None:
        """Prepare; nothing is looked up or started.

        Args:
            component_id: The log store's id.
            clock: What starts the thread.
        """
        self._component_id = component_id
        self._clock = clock
        self._process = os.getpid()
        self._steps: deque[UUID] = deque(maxlen=10_000)
        self._under_way: deque[object] = deque()
        self._publishing = threading.Lock()

    def add(self, step_run_id: UUID) -> None:
        """Remember that ZenML has asked for the summary of a step."""
        self._steps.append(step_run_id)

    def publish(self, summary: Callable[[], dict[str, MetadataType]]) -> None:
        """Publish the summary for all steps remembered, in a thread of its own. Never raises and never waits.

        Args:
            summary: What gives it. It may wait, since it is called in that thread.
        """
        # A forked process has the list too, but its account is its parent's. Of two under way, one has yet to begin,
        # and will take these steps along.
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
                    metadata = summary()
                    if steps:
                        _publish(self._component_id, steps, metadata)
            except BaseException as error:  # nobody else owns this thread
                tell(logger.debug, "The delivery summary could not be published: %s", type(error).__name__)
            finally:
                self._under_way.remove(token)

        try:
            self._clock.start(run, "composite-logstore summary")
        except Exception:
            # There is a limit of threads, or the interpreter is ending. The steps are remembered for the next time.
            self._under_way.remove(token)

    def wait(self, seconds: float) -> None:
        """Wait until what is under way is published, at most so long in seconds: the process is about to end."""
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
