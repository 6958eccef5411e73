"""The JSON Schema of each message, as a consumer in another language checks it. `edge-dkm schema` prints it."""

from __future__ import annotations

from typing import Any

from edge_dkm.message import MESSAGES


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of one message: enumerations are closed, further keys are allowed, a key without a value is not there."""
    schema = MESSAGES[name].model_json_schema(by_alias=True, mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:edge-dkm:{name}",
        **_without_null(schema),
    }


def _without_null(schema: Any) -> Any:
    """Pydantic writes an optional field as `X or null, default null`; on the wire it is `X, not required`, and all others are required."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _without_null(value) for key, value in schema.items() if not (key == "default" and value is None)}
    options = [option for option in result.get("anyOf", []) if option != {"type": "null"}]
    if len(options) == 1 and "anyOf" in result:
        del result["anyOf"]
        result = {**options[0], **result}
    if isinstance(schema.get("properties"), dict):
        result["required"] = [
            key for key, value in schema["properties"].items() if value.get("default", ...) is not None
        ]
    return result
