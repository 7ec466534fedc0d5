"""What import-linter cannot see: names instead of modules, and parts of external packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import composite_logstore

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "composite_logstore"
BACKENDS = ROOT / "backends"

# What a backend loads only when it is used. OpenTelemetry's API and SDK are part of ZenML's own imports.
HEAVY = (
    "boto3",
    "botocore",
    "datadog_api_client",
    "google.protobuf",
    "grpc",
    "opentelemetry.exporter",
    "opentelemetry.proto",
)


def modules(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports(source: str, *, at_import_only: bool = False) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name (of a `from` import) of every absolute import in the source.

    Modules that are named by a string to `import_module` or `__import__` count too. With `at_import_only`,
    leaves out what is only run by a call or read by a type checker.
    """

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if at_import_only:
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                    continue
                if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                    for other in child.orelse:
                        yield other
                        yield from walk(other)
                    continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, node.module, alias.name
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if (
                function in ("import_module", "__import__")
                and isinstance(name, ast.Constant)
                and isinstance(name.value, str)
            ):
                yield node.lineno, name.value, None


def reaches_into_core(source: str, public: frozenset[str]) -> list[str]:
    """The source's imports from the core that are not imports of its public names."""
    found = []
    for line, module, name in imports(source):
        # What differs between ZenML's releases is public, too.
        if module == "composite_logstore.zenml":
            continue
        if within(module, "composite_logstore") and (
            module != "composite_logstore" or (name is not None and name not in public)
        ):
            found.append(f"line {line}: {module}" + (f" ({name})" if name else ""))
    tree = ast.parse(source)
    for node in ast.walk(tree):
        # `import composite_logstore` and then composite_logstore.something
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "composite_logstore"
            and node.attr not in public
        ):
            found.append(f"line {node.lineno}: composite_logstore.{node.attr}")
    return found


def heavy_imports(source: str, *, at_import_only: bool) -> list[str]:
    found = []
    for line, module, name in imports(source, at_import_only=at_import_only):
        full = f"{module}.{name}" if name else module
        if any(within(full, heavy) for heavy in HEAVY):
            found.append(f"line {line}: {full}")
    return found


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", modules(BACKENDS), ids=short)
def test_a_backend_uses_only_public_names_of_the_core(path: Path) -> None:
    assert reaches_into_core(path.read_text(encoding="utf-8"), frozenset(composite_logstore.__all__)) == []


@pytest.mark.parametrize("path", modules(CORE), ids=short)
def test_the_core_never_imports_what_only_backends_need(path: Path) -> None:
    assert heavy_imports(path.read_text(encoding="utf-8"), at_import_only=False) == []


@pytest.mark.parametrize("path", sorted([*BACKENDS.glob("*/__init__.py"), *BACKENDS.glob("*/config.py")]), ids=short)
def test_a_backend_is_configured_without_loading_anything_heavy(path: Path) -> None:
    assert heavy_imports(path.read_text(encoding="utf-8"), at_import_only=True) == []


@pytest.mark.parametrize("path", sorted(BACKENDS.glob("*/reader.py")), ids=short)
def test_a_reader_needs_no_extra(path: Path) -> None:
    assert heavy_imports(path.read_text(encoding="utf-8"), at_import_only=False) == []


@pytest.mark.parametrize(
    "source",
    [
        "from composite_logstore.event import LogEvent",
        "from composite_logstore import event",
        "from composite_logstore import LogEvent, _hidden",
        "import composite_logstore.event",
        "import composite_logstore\ncomposite_logstore.event",
        "import importlib\nimportlib.import_module('composite_logstore.event')",
        "def f():\n    from composite_logstore.event import LogEvent",
    ],
)
def test_reaching_into_the_core_is_noticed(source: str) -> None:
    assert reaches_into_core(source, frozenset({"LogEvent"})) != []


@pytest.mark.parametrize(
    "source",
    [
        "from composite_logstore import LogEvent",
        "import composite_logstore\ncomposite_logstore.LogEvent",
        "import composite_logstore_other.config",
        "from .config import X",
    ],
)
def test_using_public_names_is_allowed(source: str) -> None:
    assert reaches_into_core(source, frozenset({"LogEvent"})) == []


def test_heavy_imports_are_noticed() -> None:
    assert heavy_imports("from opentelemetry import exporter", at_import_only=True) != []
    assert heavy_imports("try:\n    import grpc\nexcept ImportError: pass", at_import_only=True) != []
    assert heavy_imports("class A:\n    import grpc.aio", at_import_only=True) != []
    assert heavy_imports("from opentelemetry.trace import get_current_span", at_import_only=False) == []
    assert heavy_imports("import grpcio_other", at_import_only=False) == []


def test_imports_that_are_not_run_on_import_are_told_apart() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import grpc\n"
        "def f():\n    import datadog_api_client\n"
    )
    assert heavy_imports(source, at_import_only=True) == []
    assert len(heavy_imports(source, at_import_only=False)) == 2
