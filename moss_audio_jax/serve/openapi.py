"""The OpenAPI document of the routes, with schemas from `schemas`."""

from __future__ import annotations

import functools
from typing import Any

from moss_audio_jax import __version__
from moss_audio_jax.serve.schemas import ChatRequest, TranscriptionRequest

_REF = "#/components/schemas/{model}"


@functools.cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    for kind in (ChatRequest, TranscriptionRequest):
        schema = kind.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    form = schemas["TranscriptionRequest"]
    form["properties"]["file"] = {"type": "string", "format": "binary"}
    form["required"] = ["file", "model"]
    for name in ("timestamp_granularities", "include"):
        form["properties"][f"{name}[]"] = form["properties"].pop(name)
    chat, transcription = (
        {"required": True, "content": {kind: {"schema": {"$ref": _REF.format(model=name)}}}}
        for kind, name in (
            ("application/json", "ChatRequest"),
            ("multipart/form-data", "TranscriptionRequest"),
        )
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "moss_audio_jax", "version": __version__},
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/chat/completions": {"post": _operation("Answer a conversation", chat)},
            "/v1/audio/transcriptions": {"post": _operation("Transcribe a file", transcription)},
            "/v1/models": {"get": _operation("The names of the model")},
            "/health": {"get": _operation("The process lives")},
            "/ready": {"get": _operation("It answers requests")},
            "/metrics": {"get": _operation("Counters and times, for Prometheus")},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _operation(summary: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    failed = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "done"},
            "default": {"description": "refused or failed", "content": failed},
        },
    }
    return operation | ({"requestBody": body} if body else {})
