"""A simulated ZenML for tests of the command line: log stores with simulated backends, runs, steps and streams."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner, Result
from zenml.enums import ExecutionStatus, StackComponentType
from zenml.exceptions import ZenKeyError
from zenml.models import LogsResponse

from composite_logstore import ChildConfig, CompositeLogStore, CompositeLogStoreConfig
from composite_logstore.cli.main import main
from composite_logstore.operations import copying
from composite_logstore.zenml import make_logs
from tests.simulation import LONG_AGO, make_store

PAGE = 3
"""The most items of a page, even if a command asks for more."""


class SimulatedZenML:
    """Answers the commands instead of ZenML's client.

    Attributes:
        runs: The runs, oldest first.
        asked: What was asked for, in order.
        trouble: What every question raises, if anything.
    """

    def __init__(self) -> None:
        self.models: list[SimpleNamespace] = []
        self.runs: list[SimpleNamespace] = []
        self.steps: list[SimpleNamespace] = []
        self.asked: list[str] = []
        self.stacks: list[SimpleNamespace] = []
        self.updates: list[dict[str, Any]] = []
        self.trouble: BaseException | None = None
        self.now = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)

    @classmethod
    def take_place(cls, monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
        """Create one, and let the commands use it from now on."""
        zenml = cls()
        monkeypatch.setattr("zenml.client.Client", lambda: zenml)
        monkeypatch.setattr("zenml.stack.StackComponent.from_model", staticmethod(lambda model: model.build()))
        # The simulated runs have no stacks and pipelines.
        monkeypatch.setattr(copying, "_attributes_of_run", lambda run_id: ({}, None))
        return zenml

    def run_command(self, *arguments: str, input: str | None = None) -> Result:
        """Run the command line."""
        result = CliRunner().invoke(main, arguments, input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    # Content

    def register(self, *children: ChildConfig, name: str = "logs", **settings: Any) -> CompositeLogStore:
        """Register a composite log store and return it."""
        store = make_store(*children, **settings)
        store._name = name
        begun = self.now.replace(tzinfo=None)
        model = SimpleNamespace(
            id=store.id,
            name=name,
            flavor_name="composite",
            configuration=store.config.model_dump(mode="json", exclude_unset=True),
            build=lambda: model.store,
            store=store,
            created=begun,
            updated=begun,
        )
        self.models.append(model)
        return store

    def register_settings(self, settings: dict[str, Any], name: str = "logs") -> SimpleNamespace:
        """Register a composite log store of real backends with its settings, and return ZenML's model of it."""
        id = uuid4()

        def build() -> CompositeLogStore:
            return CompositeLogStore(
                name=name,
                id=id,
                config=CompositeLogStoreConfig(**model.configuration),
                flavor="composite",
                type=StackComponentType.LOG_STORE,
                user=None,
                created=LONG_AGO,
                updated=LONG_AGO,
            )

        model = SimpleNamespace(id=id, name=name, flavor_name="composite", configuration=settings, build=build)
        self.models.append(model)
        return model

    def add_stack(self, name: str, log_store: str | None = None) -> SimpleNamespace:
        """Add a stack, with the log store of that name."""
        components = {StackComponentType.ARTIFACT_STORE: [SimpleNamespace(id=UUID(int=1), name="default")]}
        found = [model for model in self.models if model.name == log_store]
        stack = SimpleNamespace(
            id=uuid4(), name=name, components={**components, **({StackComponentType.LOG_STORE: found} if found else {})}
        )
        self.stacks.append(stack)
        return stack

    def register_other(self, name: str, flavor: str, store: Any = None) -> UUID:
        """Register a log store of another flavor, and return its id."""
        model = SimpleNamespace(id=uuid4(), name=name, flavor_name=flavor, build=lambda: store)
        self.models.append(model)
        return model.id

    def begin_run(self, name: str, in_progress: bool = False, minutes: float = 1) -> SimpleNamespace:
        """Add a run that begins after the others."""
        self.now += timedelta(hours=1)
        begun = self.now.replace(tzinfo=None)
        run = SimpleNamespace(
            id=uuid4(),
            name=name,
            project_id=uuid4(),
            in_progress=in_progress,
            created=begun,
            updated=begun if in_progress else begun + timedelta(minutes=minutes),
            end_time=None if in_progress else begun + timedelta(minutes=minutes),
            log_collection=[],
        )
        self.runs.append(run)
        return run

    def begin_step(self, run: SimpleNamespace, name: str) -> SimpleNamespace:
        """Add a step."""
        status = ExecutionStatus.RUNNING if run.in_progress else ExecutionStatus.COMPLETED
        step = SimpleNamespace(id=uuid4(), name=name, pipeline_run_id=run.id, status=status, log_collection=[])
        self.steps.append(step)
        return step

    def open_stream(self, of: SimpleNamespace, source: str, store_id: UUID | None) -> LogsResponse:
        """Add a stream to a run or a step."""
        begun = self.now.replace(tzinfo=None)
        logs = make_logs(uuid4(), source, begun, project_id=uuid4(), log_store_id=store_id)
        of.log_collection.append(logs)
        return logs

    # As ZenML's client

    @property
    def zen_store(self) -> Any:
        self._ask("zen_store")
        return SimpleNamespace(is_local_store=lambda: True, get_stack_component=self._component)

    @property
    def active_stack_model(self) -> Any:
        self._ask("active_stack_model")
        return SimpleNamespace(components={"artifact_store": [SimpleNamespace(id=UUID(int=1))]})

    def _component(self, id: UUID) -> Any:
        return next(model for model in self.models if model.id == id)

    def list_stack_components(self, page: int = 1, name: str | None = None, **_: Any) -> Any:
        return self._page("list_stack_components", [one for one in self.models if name in (None, one.name)], page)

    def get_stack(self, name_or_id: Any, allow_name_prefix_match: bool = False) -> Any:
        self._ask("get_stack")
        for stack in self.stacks:
            if name_or_id in (stack.name, stack.id):
                return stack
        raise KeyError(name_or_id)

    def list_stacks(self, **_: Any) -> Any:
        return self._page("list_stacks", self.stacks, 1)

    def update_stack_component(self, id: UUID, type: Any, configuration: dict[str, Any]) -> None:
        self._ask("update_stack_component")
        model = self._component(id)
        if not hasattr(model, "store"):
            config = CompositeLogStoreConfig(**{**model.configuration, **configuration})
            model.configuration = config.model_dump(mode="json", exclude_unset=True)
            self.updates.append(configuration)
            return
        config = model.store.config
        values = {"primary": config.primary, "children": config.children, "fetch_fallback": config.fetch_fallback}
        model.store._config = CompositeLogStoreConfig(**{**values, **configuration})
        model.configuration.update(configuration)
        self.updates.append(configuration)

    def get_pipeline_run(self, name_or_id: str, allow_name_prefix_match: bool) -> Any:
        self._ask("get_pipeline_run")
        assert not allow_name_prefix_match
        found = [run for run in self.runs if name_or_id in (run.name, str(run.id))]
        if len(found) > 1:
            raise ZenKeyError("more than one")
        if not found:
            raise KeyError(name_or_id)
        return found[0]

    def get_pipeline(self, name: str) -> Any:
        self._ask("get_pipeline")
        raise KeyError(name)

    def list_pipeline_runs(self, page: int = 1, **wanted: Any) -> Any:
        runs = [run for run in self.runs if self._fits(run, wanted)]
        return self._page("list_pipeline_runs", runs, page)

    def _fits(self, run: Any, wanted: dict[str, Any]) -> bool:
        if wanted.get("in_progress") not in (None, run.in_progress):
            return False
        for field in ("created", "updated"):
            if wanted.get(field):
                relation, time = wanted[field].split(":", 1)
                moment = datetime.fromisoformat(time)
                there = getattr(run, field)
                if not {"lte": there <= moment, "gte": there >= moment, "lt": there < moment}[relation]:
                    return False
        return True

    def list_run_steps(self, page: int = 1, pipeline_run_id: str = "", name: str | None = None, **_: Any) -> Any:
        ids = json.loads(pipeline_run_id.removeprefix("oneof:"))
        steps = [step for step in self.steps if str(step.pipeline_run_id) in ids]
        if name is not None:
            steps = [step for step in steps if step.name == name.removeprefix("equals:")]
        return self._page("list_run_steps", steps, page)

    def _page(self, question: str, items: list[Any], page: int) -> Any:
        self._ask(question)
        some = items[(page - 1) * PAGE : page * PAGE]
        return SimpleNamespace(items=some, index=page, total_pages=max(1, -(-len(items) // PAGE)), total=len(items))

    def _ask(self, question: str) -> None:
        self.asked.append(question)
        if self.trouble is not None:
            raise self.trouble
