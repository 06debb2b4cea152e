"""The JSON schema of a configuration, for editors: with the algorithms that are installed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nncf_compactprune.config.loading import CompressionConfig
from nncf_compactprune.config.registered import REGISTRY_KEY
from nncf_compactprune.plugins import Plugins, default_plugins


def json_schema(plugins: Plugins | None = None) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a configuration with the algorithms of ``plugins``."""
    plugins = plugins if plugins is not None else default_plugins()
    algorithms = plugins.algorithms
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
    _name_choices([top_level, definitions], plugins)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top_level, "$defs": definitions}


def _name_choices(node: Any, plugins: Plugins) -> None:
    """Writes the installed names into every field that takes one of a registry, in place."""
    if isinstance(node, dict) and isinstance(node.get(REGISTRY_KEY), str):
        node["enum"] = sorted(getattr(plugins, node.pop(REGISTRY_KEY)))
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _name_choices(inner, plugins)
