"""Hold the README and docs/ to the code: settings, refusals, transitions, messages, links, examples."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticUndefined
from zenml import __version__ as zenml_version
from zenml.cli.utils import parse_name_and_extra_arguments

from composite_logstore import ChildConfig, CompositeLogStoreConfig
from composite_logstore.child_types import backends
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.metrics import COUNTERS, LEVELS
from composite_logstore.delivery.states import TRANSITIONS, Outcome, State
from composite_logstore.log_store import CompositeLogStore
from composite_logstore_artifact import artifact_stores
from composite_logstore_component import components
from docs.hooks import loaded_from_elsewhere

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATION = ROOT / "docs" / "configuration.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FAILURES = ROOT / "docs" / "when-a-child-fails.md"

ARCHIVE = {"name": "archive", "type": "artifact"}
COLLECTOR = {"name": "collector", "type": "otlp", "endpoint": "https://collector:4318"}
OVER_GRPC = {"name": "collector", "type": "otlp", "endpoint": "collector:4317", "protocol": "grpc"}
LIVE = {"name": "live", "type": "datadog", "api_key": "{{datadog.api_key}}", "application_key": "{{datadog.app}}"}
SCREEN = {"name": "screen", "type": "otel", "exporter": "console"}

# The mistake, as the page describes it → the children, and other settings.
MISTAKES: dict[str, tuple[Any, dict[str, Any]]] = {
    "`--children='[{]'`": ("[{]", {}),
    "`--children='{}'`": ({}, {}),
    "`--children='[]'`": ([], {}),
    "`--children='[\"archive\"]'`": (["archive"], {}),
    "no `primary`": ([ARCHIVE], {"primary": None}),
    "`--primary=archiv`": ([ARCHIVE], {"primary": "archiv"}),
    "`--primary=collector`, of type `otlp`": ([ARCHIVE, COLLECTOR], {"primary": "collector"}),
    "a primary that is disabled": ([{**ARCHIVE, "enabled": False}, LIVE], {}),
    "a primary without its `application_key`": (
        [ARCHIVE, {**LIVE, "application_key": None}],
        {"primary": "live"},
    ),
    "`--fetch_fallback='[\"lvie\"]'`": ([ARCHIVE, LIVE], {"fetch_fallback": ["lvie"]}),
    "the primary as its own fallback": ([ARCHIVE], {"fetch_fallback": ["archive"]}),
    "`--serve_from_artifact_store=true`, and a primary of another type": (
        [ARCHIVE, LIVE],
        {"primary": "live", "serve_from_artifact_store": True},
    ),
    "the same without any archive": ([LIVE], {"primary": "live", "serve_from_artifact_store": True}),
    "the same with `fetch_fallback`": (
        [ARCHIVE, LIVE],
        {"serve_from_artifact_store": True, "fetch_fallback": ["live"]},
    ),
    "`--delivery=agent --durability=memory`": ([ARCHIVE], {"delivery": "agent", "durability": "memory"}),
    "`--durability=always`": ([ARCHIVE], {"durability": "always"}),
    "`--spool_directory=spool`": ([ARCHIVE], {"spool_directory": "spool"}),
    "`--spool_max_bytes=1000`": ([ARCHIVE], {"spool_max_bytes": 1000}),
    "`--flush_timeout_millis=-1`": ([ARCHIVE], {"flush_timeout_millis": -1}),
    "a child without `name`": ([ARCHIVE, {"type": "otlp"}], {}),
    "a child without `type`": ([ARCHIVE, {"name": "collector"}], {}),
    '`"name": "My Collector"`': ([ARCHIVE, {**COLLECTOR, "name": "My Collector"}], {}),
    "two children of one name": ([ARCHIVE, {**COLLECTOR, "name": "archive"}], {}),
    "two archives in one artifact store": ([ARCHIVE, {**ARCHIVE, "name": "second"}], {}),
    '`"type": "otpl"`': ([ARCHIVE, {**COLLECTOR, "type": "otpl"}], {}),
    '`"endpont": ...`': ([ARCHIVE, {**COLLECTOR, "endpont": "x"}], {}),
    '`"min_level": "LOUD"`': ([{**ARCHIVE, "min_level": "LOUD"}], {}),
    '`"progress": "some"`': ([{**ARCHIVE, "progress": "some"}], {}),
    '`"enabled": "maybe"`': ([{**ARCHIVE, "enabled": "maybe"}], {}),
    '`"redact": {"formats": ["aws_keys"]}`': ([{**ARCHIVE, "redact": {"formats": ["aws_keys"]}}], {}),
    '`"redact": {"patterns": [{"name": "id", "pattern": "a(b"}]}`': (
        [{**ARCHIVE, "redact": {"patterns": [{"name": "id", "pattern": "a(b"}]}}],
        {},
    ),
    '`"redact": {"patterns": [{"name": "id", "pattern": "a*"}]}`': (
        [{**ARCHIVE, "redact": {"patterns": [{"name": "id", "pattern": "a*"}]}}],
        {},
    ),
    '`"budget": {"events": 0}`': ([{**ARCHIVE, "budget": {"events": 0}}], {}),
    '`"budget": {"events": true}`': ([{**ARCHIVE, "budget": {"events": True}}], {}),
    '`"budget": {"per": "day"}`': ([{**ARCHIVE, "budget": {"per": "day"}}], {}),
    '`"budget": {"events": 5, "per": "hour"}`': ([{**ARCHIVE, "budget": {"events": 5, "per": "hour"}}], {}),
    '`"max_queue_size": 0`': ([{**ARCHIVE, "max_queue_size": 0}], {}),
    '`"max_queue_size": "many"`': ([{**ARCHIVE, "max_queue_size": "many"}], {}),
    '`"schedule_delay_millis": -1`': ([{**ARCHIVE, "schedule_delay_millis": -1}], {}),
    '`"max_export_batch_size": 1001` for Datadog': ([ARCHIVE, {**LIVE, "max_export_batch_size": 1001}], {}),
    '`"retry_max_interval_millis": 100`': ([{**ARCHIVE, "retry_max_interval_millis": 100}], {}),
    '`"endpoint": "collector:4318"` over HTTP': ([ARCHIVE, {**COLLECTOR, "endpoint": "collector:4318"}], {}),
    '`"endpoint": "http://"`': ([ARCHIVE, {**COLLECTOR, "endpoint": "http://"}], {}),
    "a key in the `endpoint`": ([ARCHIVE, {**COLLECTOR, "endpoint": "https://user:key@collector"}], {}),
    '`"insecure": true` with https://': ([ARCHIVE, {**COLLECTOR, "insecure": True}], {}),
    "a certificate with http://": (
        [ARCHIVE, {**COLLECTOR, "endpoint": "http://collector", "certificate_file": "ca.pem"}],
        {},
    ),
    "`client_key_file` alone": ([ARCHIVE, {**COLLECTOR, "client_key_file": "key.pem"}], {}),
    '`"protocol": "http/json"`': ([ARCHIVE, {**COLLECTOR, "protocol": "http/json"}], {}),
    '`"compression": "zstd"`': ([ARCHIVE, {**COLLECTOR, "compression": "zstd"}], {}),
    '`"compression": "deflate"` over gRPC': ([ARCHIVE, {**OVER_GRPC, "compression": "deflate"}], {}),
    '`"endpoint": "collector"` over gRPC': ([ARCHIVE, {**OVER_GRPC, "endpoint": "collector"}], {}),
    '`"endpoint": "http://collector"` over gRPC': ([ARCHIVE, {**OVER_GRPC, "endpoint": "http://collector"}], {}),
    "a path in the `endpoint` over gRPC": ([ARCHIVE, {**OVER_GRPC, "endpoint": "https://collector/v1/logs"}], {}),
    "a header `api key`": ([ARCHIVE, {**COLLECTOR, "headers": {"api key": "x"}}], {}),
    "a header `content-type`": ([ARCHIVE, {**COLLECTOR, "headers": {"content-type": "x"}}], {}),
    "a header with a line break": ([ARCHIVE, {**COLLECTOR, "headers": {"authorization": "a\nb"}}], {}),
    "a header `grpc-key` over gRPC": ([ARCHIVE, {**OVER_GRPC, "headers": {"grpc-key": "x"}}], {}),
    "a header `key-bin` over gRPC": ([ARCHIVE, {**OVER_GRPC, "headers": {"key-bin": "x"}}], {}),
    "a resource attribute of 2⁶⁴": ([ARCHIVE, {**COLLECTOR, "resource_attributes": {"number": 2**64}}], {}),
    "no `api_key`": ([ARCHIVE, {"name": "live", "type": "datadog"}], {}),
    "an empty `api_key`": ([ARCHIVE, {**LIVE, "api_key": ""}], {}),
    "an `api_key` with a blank in it": ([ARCHIVE, {**LIVE, "api_key": "a b"}], {}),
    '`"site": "https://app.datadoghq.com"`': ([ARCHIVE, {**LIVE, "site": "https://app.datadoghq.com"}], {}),
    '`"endpoint": "intake:443"` for Datadog': ([ARCHIVE, {**LIVE, "endpoint": "intake:443"}], {}),
    '`"endpoint": "https://intake.example"` for Datadog': (
        [ARCHIVE, {**LIVE, "endpoint": "https://intake.example"}],
        {},
    ),
    '`"tags": ["my tag"]`': ([ARCHIVE, {**LIVE, "tags": ["my tag"]}], {}),
    '`"exporter": "consol"`': ([ARCHIVE, {**SCREEN, "exporter": "consol"}], {}),
    "an exporter whose package is missing": ([ARCHIVE, {**SCREEN, "exporter": "no_such_package.Exporter"}], {}),
    "an exporter that is none": ([ARCHIVE, {**SCREEN, "exporter": "pathlib.Path"}], {}),
    "an argument that the exporter does not have": ([ARCHIVE, {**SCREEN, "arguments": {"outt": 1}}], {}),
}


def config_classes() -> dict[str, type[ChildConfig]]:
    """Return this project's own backends: a child's type → its settings."""
    names = ("artifact", "cloudwatch", "component", "datadog", "elasticsearch", "otel", "otlp")
    own = {name: entry_point.load() for name, entry_point in backends().items() if name in names}
    assert own.keys() == set(names)
    return own


def tables(page: Path, heading: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables under a heading."""
    text = page.read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def documented_defaults(heading: str) -> dict[str, str]:
    """Return the settings under a heading: a field → its default."""
    return {row[0].strip("`"): row[2].strip("`") for row in tables(CONFIGURATION, heading) if len(row) == 4}


def defaults(config_class: type[Any], without: type[Any]) -> dict[str, str]:
    """Return the defaults that the page has to state: a field → its default."""
    found = {}
    for name, field in config_class.model_fields.items():
        if name in without.model_fields:
            continue
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            found[name] = "required"
        elif default is None:
            found[name] = "none"
        elif default == zenml_version:
            found[name] = "ZenML's version"
        else:
            found[name] = default if isinstance(default, str) else json.dumps(default)
    return found


class Nothing:
    """Has no fields."""

    model_fields: dict[str, Any] = {}  # noqa: RUF012


@pytest.mark.parametrize(
    ("heading", "config_class", "without"),
    [
        ("The composite", CompositeLogStoreConfig, CompositeLogStoreConfig.__mro__[1]),
        ("Every child", ChildConfig, Nothing),
        *((f"Children of type {name}", config_class, ChildConfig) for name, config_class in config_classes().items()),
    ],
)
def test_the_page_states_every_default(heading: str, config_class: type[Any], without: type[Any]) -> None:
    documented = documented_defaults(heading)
    documented.pop("setting")
    assert documented == defaults(config_class, without)


def test_the_page_states_the_batch_sizes_of_the_backends() -> None:
    rows = {row[0].strip("`"): (row[1], row[2]) for row in tables(CONFIGURATION, "Every child") if len(row) == 3}
    for name, config_class in config_classes().items():
        usual, most = rows[name]
        assert usual == f"{config_class.default_batch_size:,}"
        assert most.split(", ")[0] == f"{config_class.max_batch_size:,}".split(", ")[0]


def message_of(children: Any, settings: dict[str, Any]) -> str:
    """Return the error as ZenML shows it in its last lines, without the parts that pydantic adds."""
    given = {"primary": "archive", "children": children, **settings}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the page is compared with the message
        assert CompositeLogStoreConfig(**{key: value for key, value in given.items() if value is not None}).is_valid
    if not isinstance(raised.value, ValidationError):
        return str(raised.value)
    (detail,) = raised.value.errors()
    where = "" if detail["type"] == "value_error" else f"{detail['loc'][0]}: "
    return where + detail["msg"].removeprefix("Value error, ")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_refusal_has_the_message_on_the_page(mistake: str) -> None:
    documented = dict(row for row in tables(CONFIGURATION, "Refused settings") if len(row) == 2)
    text = documented[mistake].strip("`")
    # SDK 1.38 calls its exporters so.
    message = message_of(*MISTAKES[mistake]).replace("ConsoleLogExporter", "ConsoleLogRecordExporter")
    assert message == text or (text.endswith("...") and message.startswith(text.removesuffix("...")))


def test_every_refusal_on_the_page_is_tested() -> None:
    text = CONFIGURATION.read_text().split("| mistake | message |")[1].split("\n\n")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[2:]]
    assert rows == list(MISTAKES)


def test_the_page_lists_every_metric() -> None:
    rows = {row[0].strip("`") for row in tables(CONFIGURATION, "Metrics")} - {"metric", "---"}
    assert rows == {*COUNTERS, *LEVELS, "otel.sdk.exporter.operation.duration"}


def test_the_page_shows_the_transitions_of_the_delivery() -> None:
    head, *rows = [row for row in tables(ARCHITECTURE, "Delivery") if len(row) == 1 + len(State)]
    states = [State(cell.strip("`")) for cell in head[1:]]
    assert states == list(State)
    documented = {
        (state, Outcome[row[0].strip("`")]): State(cell.strip("`"))
        for row in rows
        if row[0] != "---"
        for state, cell in zip(states, row[1:], strict=True)
        if cell != "cannot happen"
    }
    assert documented == TRANSITIONS


def test_the_table_of_places_names_every_room_and_existing_files() -> None:
    named: set[str] = set()
    for places, content in tables(ARCHITECTURE, "Where each thing is"):
        folders = re.findall(r"`([\w/.]+)`", places)
        named.update(folders)
        for file in re.findall(r"`(\w+\.py)`", content):
            assert (ROOT / folders[0] / file).is_file(), f"{folders[0]}{file}"
    assert [place for place in named if not (ROOT / place).exists()] == []
    rooms = [path for path in (ROOT / "composite_logstore").iterdir() if (path / "__init__.py").exists()]
    assert {f"composite_logstore/{room.name}/" for room in rooms} <= named


def test_the_page_lists_every_number_of_the_account() -> None:
    rows = {row[0].strip("`") for row in tables(FAILURES, "Stats")}
    assert ChildStats.__dataclass_fields__.keys() <= rows
    assert CompositeLogStore.stats.__doc__ is not None


def test_the_readme_begins_with_the_two_commands() -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [line.split("#")[0].strip() for line in blocks[0].splitlines()] == ["make demo", "make test"]


def test_the_page_shows_the_example_s_code() -> None:
    source = (ROOT / "examples" / "backend" / "composite_logstore_lines.py").read_text()
    project = (ROOT / "examples" / "backend" / "pyproject.toml").read_text()
    text = (ROOT / "docs" / "writing-a-backend.md").read_text()
    shown = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if block.startswith("class Lines")]
    assert len(shown) == 2
    for block in shown:
        assert block in source
    (entry_point,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert entry_point in project


def test_every_way_to_die_names_an_existing_test() -> None:
    rows = [row for row in tables(ROOT / "docs" / "durability.md", "What is lost") if len(row) == 4][2:]
    source = "\n".join(path.read_text() for path in sorted((ROOT / "tests").glob("**/test_*.py")))
    for mode, _, _, named in rows:
        name, _, way = named.strip("`").partition("[")
        assert f"def {name}(" in source
        assert name.startswith(f"test_{mode.strip('`')}")
        assert f'"{way.strip("]")}"' in source or not way
    assert {row[0].strip("`") for row in rows} == {"memory", "spill", "write_ahead"}


def test_the_pod_settings_are_those_of_zenml() -> None:
    from zenml.integrations.kubernetes.pod_settings import KubernetesPodSettings

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "durability.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(block.split("@pipeline")[0], namespace)
    settings = namespace["kubernetes"]["pod_settings"]
    assert settings.keys() <= KubernetesPodSettings.model_fields.keys()


# Links


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        # One that occurs again gets a number.
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def links(page: Path) -> list[str]:
    """Return where the page links to, without other sites."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    pending = [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        pending += [target for target in targets if target.suffix == ".md" and target not in reached]
    assert set(PAGES) <= reached


# Examples


def children_blocks() -> Iterator[Any]:
    """Yield each JSON list of children on the pages, in a block of its own or in a command."""
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        blocks += re.findall(r"--children='(\[.*?\])'", re.sub(r"^\|.*$", "", text, flags=re.MULTILINE), re.DOTALL)
        for number, block in enumerate(blocks, start=1):
            yield pytest.param(block, id=f"{page.name} {number}")


@pytest.mark.parametrize("block", list(children_blocks()))
def test_every_list_of_children_is_accepted(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The examples name components that are not registered here.
    monkeypatch.setattr(components, "find_model", lambda name: None)
    monkeypatch.setattr(artifact_stores, "find_model", lambda name: None)
    # An example's backend is not installed here.
    found = json.loads(block)
    listed = found if isinstance(found, list) else [found]
    children = [child for child in listed if child["type"] in config_classes()]
    primary = next(child["name"] for child in children if child["type"] in ("artifact", "datadog") or "read" in child)
    assert CompositeLogStoreConfig(primary=primary, children=children).is_valid


# Messages

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
SOURCES = [
    path
    for folder in ("composite_logstore", "backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "testing" not in path.parts
]


def said(node: ast.AST) -> Iterator[str]:
    """Yield the texts in a piece of code, with `…` instead of each value."""
    for found in ast.walk(node):
        if isinstance(found, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in found.values)
        elif isinstance(found, ast.Constant) and isinstance(found.value, str):
            yield found.value.replace("%s", "…")


def messages() -> list[str]:
    """Return the messages on the page of troubleshooting."""
    rows = re.findall(r"^\| (`.*?) \| ", TROUBLESHOOTING.read_text(), re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def is_said(message: str, text: str) -> bool:
    return re.search(".*".join(map(re.escape, message.split("…"))), text, re.DOTALL) is not None


def test_every_message_on_the_page_is_one_of_the_code() -> None:
    texts = {text for path in SOURCES for text in said(ast.parse(path.read_text()))}
    assert len(messages()) > 60
    assert [message for message in messages() if not any(is_said(message, text) for text in texts)] == []


def test_what_zenml_says_to_an_option_without_an_equals_sign_is_on_the_page() -> None:
    with pytest.raises(Exception, match="Invalid argument: '--children'"):
        parse_name_and_extra_arguments(["logs", "--children", "@children.json"])
    assert "`Invalid argument: '--children'`" in " ".join(TROUBLESHOOTING.read_text().split())


def test_every_warning_of_a_process_that_logs_is_on_the_page() -> None:
    warnings = []
    calls = ("_warn", "self._warn", "tell", "logger.warning", "logger.error")
    for path in SOURCES:
        if {"cli", "operations"} & set(path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                texts = [text for text in said(node) if re.search(r"\w \w", text)]
                warnings += [max(texts, key=len)] if texts else []
    assert len(warnings) > 10
    assert [text for text in warnings if not any(is_said(message, text) for message in messages())] == []


# The site


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ('<script src="https://cdn.example/x.js"></script>', ".html"),
        ('<img src="//cdn.example/x.png">', ".html"),
        ('<link rel="stylesheet" href="https://cdn.example/x.css">', ".html"),
        ("<style>@import url(https://cdn.example/x.css);</style>", ".html"),
        ('@font-face { src: url("https://cdn.example/x.woff2") }', ".css"),
    ],
)
def test_the_build_finds_addresses_that_a_page_loads_from_another_host(text: str, suffix: str) -> None:
    assert len(loaded_from_elsewhere(text, suffix)) == 1


def test_a_page_may_contain_links_and_files_of_its_own() -> None:
    text = '<a href="https://example.com">x</a><script src="assets/x.js"></script><img src="data:image/png;base64,AA">'
    assert loaded_from_elsewhere(text, ".html") == []
