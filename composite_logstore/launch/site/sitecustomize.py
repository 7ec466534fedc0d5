"""Imported by each Python process below `composite-logstore run`, in any environment: it needs nothing but Python."""

import os
import sys
from contextlib import suppress
from typing import Any


def _load(name: str, *path: str) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    spec: Any = spec_from_file_location(name, os.path.join(package, *path))
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _begin() -> None:
    address = os.environ.get("COMPOSITE_LOGSTORE_COLLECTOR")
    if address:
        process = _load("_composite_logstore_process", "capture", "process.py")
        plain = _load("_composite_logstore_plain", "plain.py")
        _load("_composite_logstore_sender", "launch", "sender.py").begin(address, process, plain)


def _import_the_environments_own() -> None:
    own = sys.modules.pop("sitecustomize", None)
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        if own is not None:
            sys.modules["sitecustomize"] = own


# A program runs with or without its logs.
with suppress(Exception):
    _begin()
_import_the_environments_own()
