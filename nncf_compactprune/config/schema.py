"""The JSON schema of a configuration, for editors: with the algorithms that are installed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nncf_compactprune.config.loading import CompressionConfig
from nncf_compactprune.plugins import Plugins, default_plugins


def json_schema(plugins: Plugins | None = None) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a configuration with the algorithms of ``plugins``."""
    algorithms = (plugins if plugins is not None else default_plugins()).algorithms
    models: list[type[BaseModel]] = [CompressionConfig, *dict.fromkeys(cls.Config for cls in algorithms.values())]
    references, generated = models_json_schema([(model, "validation") for model in models])
    definitions = generated["$defs"]
    # An algorithm's class may be called CompressionConfig too, hence by reference and not by name.
    top_level = definitions.pop(references[CompressionConfig, "validation"]["$ref"].removeprefix("#/$defs/"))
    entries = [
        {
            **references[cls.Config, "validation"],
            "title": name,
            "description": cls.summary,
            "properties": {"algorithm": {"const": name}},
        }
        for name, cls in sorted(algorithms.items())
    ]
    entry = {"type": "object", "required": ["algorithm"], **({"oneOf": entries} if entries else {})}
    top_level["properties"]["compression"] = {"anyOf": [entry, {"type": "array", "items": entry, "minItems": 1}]}
    top_level["properties"]["$schema"] = {"type": "string"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top_level, "$defs": definitions}
