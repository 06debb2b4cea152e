"""Fields that name what a plugin offers, or that are it: a callable, from Python."""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import core_schema

from nncf_compactprune.config.reading import show
from nncf_compactprune.errors import PluginError

#: in a field's JSON schema: the registry whose names it takes, until they are filled in
REGISTRY_KEY = "x-registry"


class Registered:
    """Marks a field that takes a name of a registry (:class:`~nncf_compactprune.plugins.Plugins`), or a callable.

    A callable is written to JSON by its qualified name, which says what it was and cannot be read back.

    :param registry: such as ``"importance"``.
    """

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(qualified_name, when_used="json")
        return core_schema.with_info_plain_validator_function(self._check, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", REGISTRY_KEY: self.registry}

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) and not callable(value):
            msg = f"expected a name or a callable, got {show(value)}."
            raise ValueError(msg)
        plugins = (info.context or {}).get("plugins")
        try:
            if plugins is not None:
                plugins.resolve(self.registry, value)
        except PluginError as error:
            raise ValueError(str(error)) from error
        return value


def qualified_name(value: Any) -> str:
    """Returns a name as it is, and of a callable where it is defined.

    >>> qualified_name(qualified_name)
    'nncf_compactprune.config.registered:qualified_name'
    """
    if isinstance(value, str):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"
