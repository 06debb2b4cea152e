"""What every section of a configuration is made of, and one entry of ``"compression"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import core_schema

from nncf_compactprune.config.descriptions import descriptions


class Section(BaseModel):
    """Base of every section of an entry: frozen, strict about types (no ``"8"`` for 8), closed to unknown keys.

    JSON has no tuple and no enum. A field of such a type takes a list or a string by ``Field(strict=False)``.

    A subclass names in ``unread`` the keys that it inherits and has no use for, each with the reason. Such a key is
    refused, and does not appear in the schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    unread: ClassVar[Mapping[str, str]] = {}

    @field_validator("*")
    @classmethod
    def _is_read(cls, value: Any, info: ValidationInfo) -> Any:
        if reason := cls.unread.get(info.field_name or ""):
            msg = f"this algorithm does not read it: {reason}"
            raise ValueError(msg)
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        found = handler(schema)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for key in cls.unread:
            properties.pop(key, None)
        for key, text in descriptions(cls).items():
            if key in properties:
                properties[key].setdefault("description", text)
        return found


class OneOrMany:
    """Lets one item stand for a list of one, as NNCF's grammar does."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: list(value) if isinstance(value, (list, tuple)) else [value], handler(source)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


class NotYet:
    """Marks a key of NNCF's grammar that nothing acts on yet. It is refused with a reason, unless it says nothing:
    null, or an empty list or object.

    :param reason: what is not there yet, and what to do instead.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._refuse)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "null", "description": self.reason}

    def _refuse(self, value: Any) -> None:
        if value is not False and not _is_empty(value):
            raise ValueError(self.reason)


def _is_empty(value: Any) -> bool:
    """Whether nothing stands there: null, an empty list, and a section of nothing else."""
    return all(map(_is_empty, value.values())) if isinstance(value, dict) else value is None or value == []


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


#: a whole number that JSON may write as ``15.0``
Whole = Annotated[int, BeforeValidator(_whole)]
Scopes = Annotated[list[str], OneOrMany()]


_STEPS = "counted batches in NNCF 1.x. Write num_bn_adaptation_samples: that number times the batch size."


class BatchNormAdaptation(Section):
    """How BatchNorm statistics follow.

    :param num_bn_adaptation_samples: images that re-estimate BatchNorm statistics after the cut; 0 leaves them.
    """

    num_bn_adaptation_samples: Whole = Field(default=2000, ge=0)
    num_bn_adaptation_steps: Annotated[None, NotYet(_STEPS)] = None


class Initializer(Section):
    """What happens right after the model was compressed, before training."""

    batchnorm_adaptation: BatchNormAdaptation = BatchNormAdaptation()


class AlgorithmConfig(Section):
    """One entry of ``"compression"``. An algorithm's ``Config`` derives from it and adds its own sections.

    :param algorithm: the algorithm's name.
    :param ignored_scopes: what is left as it is: module names with all below them, NNCF node names, or ``{re}`` and a
        pattern.
    :param target_scopes: what may be compressed, in the same grammar; null: everything.
    """

    algorithm: str
    ignored_scopes: Scopes = Field(default_factory=list)
    target_scopes: Scopes | None = None
    initializer: Initializer = Initializer()

    @property
    def needs_labels(self) -> str:
        """The key, within the entry, that needs labelled samples; empty: images without labels are enough."""
        return ""
