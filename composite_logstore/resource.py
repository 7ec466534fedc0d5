"""OpenTelemetry's resource: the attributes that say where all events of a process come from.

Environment variables and detectors of other programs may hold anything, such as bytes that are no Unicode. One such
value would make every event one that no backend can encode, so all values become plain ones here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from composite_logstore.plain import Plain, plain_mapping


def environment_attributes() -> dict[str, Plain]:
    """Return the attributes that `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` name."""
    return plain_mapping(OTELResourceDetector().detect().attributes)


def detected_attributes(attributes: Mapping[str, Any]) -> dict[str, Plain]:
    """Return the attributes with those that OpenTelemetry's SDK detects."""
    try:
        return plain_mapping(Resource.create(dict(attributes)).attributes)
    except RuntimeError:
        # `create` starts threads to detect them, which fails at a process's end. The last events are worth more.
        return plain_mapping(attributes)
