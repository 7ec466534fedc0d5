"""`composite-logstore validate`, `schema` and `child`: settings, before and after they are registered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result
from zenml.exceptions import IllegalOperationError

from composite_logstore import CompositeLogStoreConfig, operations
from composite_logstore.child_types import backends
from composite_logstore.cli.main import main
from composite_logstore.secret_references import is_meant
from tests.deep import mostly_deep
from tests.simulated_zenml import SimulatedZenML
from tests.unit.test_docs import MISTAKES

ARCHIVE = {"name": "archive", "type": "artifact"}
COLLECTOR = {"name": "collector", "type": "otlp", "endpoint": "https://collector:4318", "min_level": "INFO"}
LIVE = {
    "name": "live",
    "type": "datadog",
    "api_key": "{{datadog.api_key}}",
    "application_key": "{{datadog.app}}",
    "tags": ["env:prod"],
}
SCREEN = {"name": "screen", "type": "otel", "exporter": "console"}
SECRET = "v3ry-s3cr3t"


def run(*arguments: str, input: str | None = None) -> Result:
    result = CliRunner().invoke(main, arguments, input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
    return SimulatedZenML.take_place(monkeypatch)


@pytest.fixture
def no_zenml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may ask ZenML, or even look for it."""

    def refuse(*_: object) -> None:
        raise AssertionError("ZenML was asked")

    monkeypatch.setattr("zenml.client.Client.__init__", refuse)
    monkeypatch.setattr("zenml.config.global_config.GlobalConfiguration.zen_store", property(refuse))


# validate


def written(directory: Path, content: Any, name: str = "children.json") -> str:
    file = directory / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


@pytest.mark.usefixtures("no_zenml")
@pytest.mark.parametrize(
    "settings",
    [
        [ARCHIVE, COLLECTOR, LIVE, SCREEN],
        {"primary": "live", "children": [ARCHIVE, LIVE], "fetch_fallback": ["archive"], "durability": "write_ahead"},
        {"$schema": "children.schema.json", "primary": "archive", "children": [ARCHIVE]},
        # They name what only ZenML knows.
        [{**ARCHIVE, "artifact_store": "bucket"}, {"name": "stock", "type": "component", "component": "theirs"}],
    ],
)
def test_valid_settings_are_valid_without_zenml(settings: Any, tmp_path: Path) -> None:
    done = run("validate", written(tmp_path, settings))
    assert done.exit_code == 0, done.output
    jsonschema.validate(settings, operations.schema())


def test_only_what_zenml_knows_is_left_unchecked() -> None:
    assert operations.validate([ARCHIVE]).unchecked == []
    unchecked = operations.validate([{**ARCHIVE, "artifact_store": "bucket"}]).unchecked
    assert len(unchecked) == 1
    assert "'archive'" in unchecked[0]


@pytest.mark.usefixtures("no_zenml")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_registration_refuses_is_found(mistake: str, tmp_path: Path) -> None:
    children, settings = MISTAKES[mistake]
    whole = {"primary": "archive", **settings, "children": children}
    whole = {key: value for key, value in whole.items() if value is not None}
    done = run("validate", written(tmp_path, whole), "--output", "json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert found["valid"] is False
    assert found["mistakes"]


def test_each_mistake_of_each_child_is_found_at_once(tmp_path: Path) -> None:
    settings = {
        "primay": "archive",
        "children": [
            {**ARCHIVE, "min_level": "LOUD", "artefact_store": "x"},
            {**COLLECTOR, "endpoint": "collector"},
            {"name": "x", "type": "otpl"},
            7,
        ],
    }
    done = run("validate", written(tmp_path, settings))
    assert done.exit_code == 1
    for words in ("'primay' (did you mean 'primary'?)", "'min_level'", "'artefact_store' (did you mean"):
        assert words in done.stdout
    for words in ("child 'collector'", "child 'x'", "(did you mean 'otlp'?)", "child number 4"):
        assert words in done.stdout


@pytest.mark.parametrize("name", ["children.yaml", "children.YML"])
def test_yaml_is_read(name: str, tmp_path: Path) -> None:
    text = "# the children\n- name: archive\n  type: artifact\n  enabled: yes\n- {name: c, type: otlp, min_level: 30}\n"
    assert run("validate", written(tmp_path, text, name)).exit_code == 0


def test_stdin_is_read_as_what_it_is() -> None:
    assert run("validate", "-", input=json.dumps([ARCHIVE])).exit_code == 0
    assert run("validate", "-", input="- name: archive\n  type: artifact\n").exit_code == 0
    assert run("validate", "-", input="- name: archive\n  type: artefact\n").exit_code == 1


BOMB = "a: &a [x, x, x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.json", '[{"name": "a",}]', "line 1, column"),
        ("x.json", '[{"name": "a", "type": "artifact", "type": "otlp"}]', "'type' occurs twice"),
        ("x.json", '[{"name": "a", "type": "artifact", "max_queue_size": NaN}]', "NaN"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.yaml", "[" * 5_000, "nested too deeply"),
        ("x.yaml", "- name: a\n   type: b\n", "line 2"),
        ("x.yaml", "- name: a\n  type: artifact\n  name: b\n", "line 3"),
        ("x.yaml", "- name: a\n  type: artifact\n  enabled: 2026-01-01\n", "date"),
        ("x.yaml", "- !!python/object/apply:os.system [false]\n", "not valid YAML"),
        ("x.yaml", "- \x00\n", "not valid YAML"),
        ("x.yaml", BOMB, "alias"),
        ("x.json", "", "not valid JSON"),
        ("x.json", '"archive"', "'children'"),
        ("x.json", "{}", "'primary' is required"),
    ],
)
def test_a_file_that_is_no_list_of_children_is_not_valid(name: str, text: str, words: str, tmp_path: Path) -> None:
    done = run("validate", written(tmp_path, text, name))
    assert done.exit_code == 1
    assert words in done.output


@pytest.mark.parametrize("content", [None, b"x" * (1024**2 + 1)])
def test_a_file_that_cannot_be_read_is_a_wrong_call(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "children.json"
    if content:
        file.write_bytes(content)
    done = run("validate", str(file))
    assert done.exit_code == 2
    assert str(file) in done.stderr


def test_no_error_repeats_a_secret(tmp_path: Path) -> None:
    for settings in (
        [{**LIVE, "api_key": f"{SECRET} {SECRET}"}],
        [{**LIVE, "api_key": [SECRET]}],
        [{**COLLECTOR, "headers": SECRET}],
        [{**COLLECTOR, "headers": {"x": {"y": SECRET}}}],
        f'[{{"api_key": "{SECRET}" "x"}}]',
    ):
        done = run("validate", written(tmp_path, settings))
        assert done.exit_code == 1
        assert SECRET not in done.output


def test_a_secret_in_clear_text_is_named(tmp_path: Path) -> None:
    done = run("validate", written(tmp_path, [{**LIVE, "api_key": SECRET}]))
    assert done.exit_code == 0
    assert "'api_key'" in done.stderr
    assert SECRET not in done.output


def test_a_list_that_drops_a_setting_says_so(zenml: SimulatedZenML, tmp_path: Path) -> None:
    zenml.register_settings({"primary": "archive", "children": [ARCHIVE, {**COLLECTOR, "min_level": 20}, LIVE]})
    less = {key: value for key, value in LIVE.items() if key != "tags"}
    file = written(tmp_path, [ARCHIVE, COLLECTOR, less])
    done = run("validate", file, "logs")
    assert done.exit_code == 0
    assert "'tags' of child 'live'" in done.stderr
    assert "collector" not in done.stderr
    values = json.loads(run("validate", file, "logs", "--output", "json").stdout)
    assert values["dropped"] == values["differences"]
    assert values["dropped"] == [{"child": "live", "setting": "tags", "before": '["env:prod"]', "after": None}]
    # A child that is removed as a whole drops no setting of its own.
    removed = json.loads(run("validate", written(tmp_path, [ARCHIVE]), "logs", "--output", "json").stdout)
    assert {one["child"] for one in removed["differences"]} == {"collector", "live"}
    assert removed["dropped"] == []


def test_what_is_valid_as_yaml_can_be_registered_as_yaml() -> None:
    text = "- name: archive\n  type: artifact\n"
    assert [child.name for child in CompositeLogStoreConfig(primary="archive", children=text).children] == ["archive"]  # type: ignore[arg-type]


# schema


def test_the_schema_is_one_and_refuses_what_pydantic_refuses() -> None:
    schema = json.loads(run("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for wrong in (
        [],
        [{"name": "archive"}],
        [{**ARCHIVE, "type": "artefact"}],
        [{**ARCHIVE, "name": "My Archive"}],
        [{**ARCHIVE, "endpoint": "x"}],
        [{**ARCHIVE, "min_level": "LOUD"}],
        [{**ARCHIVE, "max_queue_size": 0}],
        [{**ARCHIVE, "budget": {"events": 0}}],
        [{**ARCHIVE, "budget": {"events": 5, "per": "week"}}],
        [{"name": "live", "type": "datadog"}],
        {"children": [ARCHIVE]},
        {"primary": "archive", "children": [{**ARCHIVE, "x": 1}]},
        {"primary": "archive", "children": [ARCHIVE], "durability": "always"},
        {"primary": "archive", "children": [ARCHIVE], "primay": "x"},
    ):
        assert not validator.is_valid(wrong), wrong
        assert not operations.validate(wrong).is_valid, wrong


def test_each_setting_of_a_child_is_described_in_the_schema() -> None:
    found = {name: one["properties"] for name, one in operations.schema()["$defs"].items() if "properties" in one}
    assert found.keys() > {"BudgetSettings", "DatadogChildConfig"}
    bare = [
        f"{name}.{key}" for name, one in found.items() for key, setting in one.items() if "description" not in setting
    ]
    assert {key.rpartition(".")[2] for key in bare} <= {"type", "$schema"}, bare


def test_what_a_registration_warns_of_is_found_before(tmp_path: Path) -> None:
    limited = {"budget": {"events": 5}}
    settings = {"primary": "archive", "children": [{**ARCHIVE, **limited}], "durability": "memory"}
    done = run("validate", written(tmp_path, settings))
    assert done.exit_code == 0
    assert len(json.loads(run("validate", written(tmp_path, settings), "--output", "json").stdout)["warnings"]) == 2
    assert "'memory'" in done.stderr


@pytest.mark.parametrize("level", mostly_deep(["warning", "20", 40, None, "WARN", "Info"], kept=3))
def test_the_schema_takes_each_form_of_a_level(level: Any) -> None:
    settings: list[Any] = [[{**ARCHIVE, "min_level": level}]]
    if level is not None:
        settings.append({"primary": "archive", "children": [ARCHIVE], "stderr_level": level})
    for one in settings:
        assert operations.validate(one).is_valid
        jsonschema.validate(one, operations.schema())


def test_each_setting_of_each_backend_is_described_and_secrets_are_write_only() -> None:
    definitions = operations.schema()["$defs"]
    for one in (CompositeLogStoreConfig, *(entry_point.load() for entry_point in backends().values())):
        properties = definitions[one.__name__]["properties"]
        assert properties.keys() - {"$schema"} == one.model_fields.keys()
        for name, field in one.model_fields.items():
            assert name == "type" or properties[name]["description"], (one, name)
            assert bool(properties[name].get("writeOnly")) is is_meant(field), (one, name)
    assert definitions["DatadogChildConfig"]["properties"]["api_key"]["writeOnly"]
    assert definitions["OtelChildConfig"]["properties"]["arguments"]["writeOnly"]


def test_a_backend_that_cannot_be_imported_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def load(self) -> Any:
            raise ImportError("gone")

    found = {**backends(), "broken": Broken()}
    monkeypatch.setattr(import_module("composite_logstore.operations.schema"), "backends", lambda: found)
    schema = operations.schema()
    jsonschema.validate([ARCHIVE, {"name": "x", "type": "broken", "whatever": 1}], schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid([{**ARCHIVE, "whatever": 1}])


WITHOUT_ZENML = """
import sys
from click.testing import CliRunner
from composite_logstore.cli.main import main

for arguments in (["schema"], ["validate", sys.argv[1]]):
    assert CliRunner().invoke(main, arguments).exit_code == 0
print(*sys.modules)
"""


def test_neither_opens_zenmls_database_nor_a_backend(tmp_path: Path) -> None:
    file = written(tmp_path, [ARCHIVE, COLLECTOR, LIVE, SCREEN])
    # Nor is ZenML's configuration written, or any file, as where a pull request is checked.
    home = tmp_path / "home"
    home.mkdir()
    env = {**os.environ, "HOME": str(home), "ZENML_CONFIG_PATH": str(home / "zenml")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ZENML, file], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert list(home.rglob("*")) == []
    modules = done.stdout.split()
    assert [name for name in modules if name.startswith("composite_logstore_") and name.endswith("er")] == []
    assert not {"sqlmodel", "grpc", "datadog_api_client"} & set(modules)


# child


@pytest.fixture
def model(zenml: SimulatedZenML) -> Any:
    children = [ARCHIVE, {**COLLECTOR, "min_level": 20}, LIVE]
    return zenml.register_settings({"primary": "archive", "children": children, "flush_limit_millis": 1})


def named(model: Any, name: str) -> dict[str, Any]:
    return next(one for one in model.configuration["children"] if one["name"] == name)


def test_list_shows_children_roles_and_settings(zenml: SimulatedZenML) -> None:
    secret = {"authorization": f"Bearer {SECRET}", "x-key": "Key {{vault.key}}"}
    children = [
        ARCHIVE,
        {**COLLECTOR, "enabled": False, "min_level": 20, "headers": secret},
        LIVE,
        {"name": "gone", "type": "from-elsewhere", "token": SECRET, "port": 4711},
        {**SCREEN, "arguments": {"token": SECRET, "pin": 4711, "tls": True}},
        {**LIVE, "name": "odd", "api_endpoint": f"https://me:{SECRET}@host/x?api_key={SECRET}&y=2"},
    ]
    zenml.register_settings({"primary": "archive", "fetch_fallback": ["live"], "children": children})
    done = run("child", "list", "logs")
    assert done.exit_code == 0
    listed = json.loads(run("child", "list", "logs", "--output", "json").stdout)
    for output in (done.stdout, json.dumps(listed)):
        assert SECRET not in output
        assert "4711" not in output
    assert [(one["name"], one["role"]) for one in listed][:3] == [
        ("archive", "primary"),
        ("collector", "disabled"),
        ("live", "fallback"),
    ]
    by_name = {one["name"]: one["settings"] for one in listed}
    assert by_name["collector"]["min_level"] == '"INFO"'
    assert json.loads(by_name["collector"]["headers"]) == {"authorization": "***", "x-key": "***{{vault.key}}"}
    assert by_name["live"]["api_key"] == '"{{datadog.api_key}}"'
    assert json.loads(by_name["screen"]["arguments"])["tls"] is True
    assert by_name["odd"]["api_endpoint"] == '"https://***@host/x?api_key=***&y=***"'


def test_set_changes_one_child_alone(zenml: SimulatedZenML, model: Any) -> None:
    done = run("child", "set", "logs", "collector", "min_level=WARNING", "compression=gzip", "--yes")
    assert done.exit_code == 0, done.output
    assert named(model, "collector") == {**COLLECTOR, "min_level": 30, "compression": "gzip"}
    assert named(model, "live") == LIVE
    assert model.configuration["flush_limit_millis"] == 1
    for line in ('  - min_level: "INFO"', '  + min_level: "WARNING"', '  + compression: "gzip"'):
        assert line in done.stdout.replace('"WARN"', '"WARNING"')
    assert [list(update) for update in zenml.updates] == [["children"]]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("enabled=false", False),
        ('tags=["a:b", "c"]', ["a:b", "c"]),
        ("max_queue_size=5", 5),
        ("service_name=a=b", "a=b"),
        ('service_name="7"', "7"),
        ("api_key={{other.key}}", "{{other.key}}"),
    ],
)
def test_values_are_json_or_text(model: Any, given: str, value: Any) -> None:
    assert run("child", "set", "logs", "live", given, "-y").exit_code == 0
    assert named(model, "live")[given.partition("=")[0]] == value


def test_unset_gives_a_setting_its_default(model: Any) -> None:
    done = run("child", "set", "logs", "live", "--unset", "tags", "-y")
    assert done.exit_code == 0
    assert "tags" not in named(model, "live")
    # It was asked for by its name.
    assert done.stderr == ""
    unknown = run("child", "set", "logs", "live", "--unset", "application_kye", "-y")
    assert unknown.exit_code == 2
    assert "(did you mean 'application_key'?)" in unknown.stderr


def test_settings_as_a_whole_drop_others_and_say_so(model: Any, tmp_path: Path) -> None:
    whole = json.dumps({"api_key": "{{datadog.api_key}}", "site": "datadoghq.eu"})
    for given in (whole, f"@{written(tmp_path, whole)}"):
        done = run("child", "set", "logs", "live", given, "--dry-run")
        assert done.exit_code == 0
        assert "'application_key', 'tags'" in done.stderr
    assert run("child", "set", "logs", "live", whole, "-y").exit_code == 0
    assert named(model, "live") == {"name": "live", "type": "datadog", **json.loads(whole)}


def test_secrets_are_never_printed(model: Any) -> None:
    for value in (f"api_key={SECRET}", f"application_key={SECRET}x"):
        done = run("child", "set", "logs", "live", value, "-y")
        assert done.exit_code == 0
        assert SECRET not in done.output
    changed = run("child", "set", "logs", "live", f"api_key={SECRET}y", "-y", "--output", "json")
    assert SECRET not in changed.output
    difference = json.loads(changed.stdout)["differences"]
    assert [one["setting"] for one in difference] == ["api_key"]
    assert difference[0]["before"] != difference[0]["after"]
    assert named(model, "live")["api_key"] == f"{SECRET}y"
    for wrong in (SECRET, f"={SECRET}", f"api_key={SECRET} {SECRET}", f'{{"api_key": "{SECRET}"', f"headers={SECRET}"):
        done = run("child", "set", "logs", "live", wrong)
        assert done.exit_code == 2
        assert SECRET not in done.output


def test_add_and_remove(zenml: SimulatedZenML, model: Any) -> None:
    done = run("child", "add", "logs", "name=screen", "type=otel", "exporter=console", input="y\n")
    assert done.exit_code == 0, done.output
    assert named(model, "screen") == SCREEN
    again = run("child", "add", "logs", json.dumps(SCREEN), "-y")
    assert again.exit_code == 2
    assert "'screen' already" in again.stderr
    gone = run("child", "remove", "logs", "screen", "-y")
    assert gone.exit_code == 0
    assert [one["name"] for one in model.configuration["children"]] == ["archive", "collector", "live"]
    assert "exporter" in gone.stdout


def test_the_primary_is_not_removed_and_a_fallback_leaves_both_lists(zenml: SimulatedZenML) -> None:
    model = zenml.register_settings({"primary": "archive", "children": [ARCHIVE, LIVE], "fetch_fallback": ["live"]})
    refused = run("child", "remove", "logs", "archive", "-y")
    assert refused.exit_code == 1
    assert "composite-logstore promote logs" in refused.stderr
    assert run("child", "remove", "logs", "live", "-y").exit_code == 0
    assert model.configuration["fetch_fallback"] == []
    assert model.configuration["children"] == [ARCHIVE]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["set", "logs", "liev", "min_level=INFO"], 2, "(did you mean 'live'?)"),
        (["set", "lgos", "live", "min_level=INFO"], 2, "(did you mean 'logs'?)"),
        (["set", "logs", "live", "min_level=LOUD"], 2, "'min_level'"),
        (["set", "logs", "live", "mni_level=INFO"], 2, "(did you mean 'min_level'?)"),
        (["set", "logs", "live", "name=other"], 2, "keeps its name"),
        (["set", "logs", "live"], 2, "KEY=VALUE"),
        (["set", "logs", "archive", "enabled=false"], 2, "'archive' is disabled"),
        (["set", "logs", "live", "site=datadoghq.eu", "{}"], 2, "KEY=VALUE"),
        (["set", "logs", "live", "@no-such-file"], 2, "no-such-file"),
        (["add", "logs", "[]"], 2, "KEY=VALUE"),
        (["add", "logs", "name=x", "type=otpl"], 2, "(did you mean 'otlp'?)"),
        (["add", "logs", "name=x", "type=artifact"], 2, "'archive' and 'x': both write"),
        (["add", "logs", "type=artifact"], 2, "'name' is required"),
        (["remove", "logs", "liev"], 2, "(did you mean 'live'?)"),
    ],
)
def test_a_wrong_call_changes_nothing(
    zenml: SimulatedZenML, model: Any, arguments: list[str], code: int, words: str
) -> None:
    done = run("child", *arguments, "--yes")
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert zenml.updates == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["set", "logs", "live", "min_level=INFO"],
        ["add", "logs", "name=screen", "type=otel", "exporter=console"],
        ["remove", "logs", "live"],
    ],
)
def test_dry_run_and_no_change_nothing(zenml: SimulatedZenML, model: Any, arguments: list[str]) -> None:
    dry = run("child", *arguments, "--dry-run")
    assert dry.exit_code == 0
    assert any(line.startswith(("  + ", "  - ")) for line in dry.stdout.splitlines())
    refused = run("child", *arguments, input="n\n")
    assert refused.exit_code == 1
    assert any(line.startswith(("  + ", "  - ")) for line in refused.stdout.splitlines())
    assert zenml.updates == []


def test_a_change_that_changes_nothing_asks_nobody(zenml: SimulatedZenML, model: Any) -> None:
    done = run("child", "set", "logs", "collector", "min_level=info")
    assert done.exit_code == 0
    assert zenml.updates == []


def test_the_changes_of_others_are_not_undone(
    zenml: SimulatedZenML, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(change: object) -> bool:
        model.configuration = {**model.configuration, "children": [ARCHIVE, LIVE]}
        return True

    with pytest.raises(operations.ChangeRefusedError, match="meanwhile"):
        operations.set_child("logs", "live", {"min_level": "INFO"}, confirm=meanwhile)
    assert zenml.updates == []


def test_the_settings_are_read_back_from_zenml(
    zenml: SimulatedZenML, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zenml, "update_stack_component", lambda *_, **__: None)
    done = run("child", "set", "logs", "live", "min_level=INFO", "--yes")
    assert done.exit_code == 1
    assert "updated" not in done.stdout


def test_what_is_wrong_with_another_child_is_no_wrong_call(zenml: SimulatedZenML) -> None:
    gone = {**SCREEN, "exporter": "no_such_package.Exporter"}
    model = zenml.register_settings({"primary": "archive", "children": [ARCHIVE, LIVE, gone]})
    done = run("child", "set", "logs", "live", "min_level=INFO", "--yes")
    assert done.exit_code == 1
    assert "child 'screen'" in done.stderr
    assert zenml.updates == []
    assert run("child", "remove", "logs", "screen", "--yes").exit_code == 0
    assert model.configuration["children"] == [ARCHIVE, LIVE]


def test_zenml_may_refuse_an_update(zenml: SimulatedZenML, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise IllegalOperationError("no")

    monkeypatch.setattr(zenml, "update_stack_component", refuse)
    assert run("child", "set", "logs", "live", "min_level=INFO", "--yes").exit_code == 3
