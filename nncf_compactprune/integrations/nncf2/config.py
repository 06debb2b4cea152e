"""``NNCFConfig`` of NNCF 2.x: a dictionary that is checked when it is read, and carries loaders beside the JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, TypeVar, cast

from nncf_compactprune.config import CompressionConfig, Document, json_schema, load_config, load_section, read_document
from nncf_compactprune.config.loading import inside_a_part
from nncf_compactprune.config.nncf2 import GONE_SECTIONS
from nncf_compactprune.errors import CompactPruneError, nearest
from nncf_compactprune.integrations.nncf2.init_args import NNCFExtraConfigStruct

ConfigT = TypeVar("ConfigT", bound="NNCFConfig")
StructT = TypeVar("StructT", bound=NNCFExtraConfigStruct)


class NNCFConfig(dict[str, Any]):
    """A configuration as NNCF 2.x's scripts pass it around.

    It is an ordinary dictionary: ``config["log_dir"] = ...`` and ``config.update(...)`` work. What is said there is
    checked by :meth:`from_dict`, :meth:`from_json`, and again where a model is compressed.

    >>> config = NNCFConfig.from_dict({"compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}})
    >>> config["compression"]["algorithm"]
    'fbnet_pruning'
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._extra_structs: dict[str, NNCFExtraConfigStruct] = {}
        #: whether its older spellings were told when it was read
        self.told = False

    @classmethod
    def from_dict(cls: type[ConfigT], nncf_dict: Mapping[str, Any]) -> ConfigT:
        """Checks a dictionary and copies it.

        :param nncf_dict: the configuration.
        :raises ConfigError: with all problems.
        """
        cls.validate(nncf_dict)
        config = cls(deepcopy(dict(nncf_dict)))
        config.told = True
        return config

    @classmethod
    def from_json(cls: type[ConfigT], path: str | os.PathLike[str]) -> ConfigT:
        """Reads and checks a file, which may hold comments and trailing commas.

        :param path: of the file.
        :raises ConfigError: with all problems.
        """
        document = read_document(path)
        compression_config(document.data, document.name)
        config = cls(document.data)
        config.told = True
        return config

    def register_extra_structs(self, struct_list: Iterable[NNCFExtraConfigStruct]) -> None:
        """Attaches live objects, such as loaders.

        :param struct_list: of the kinds in this package; one of a kind.
        :raises CompactPruneError: there is one of this kind already.
        """
        for struct in struct_list:
            name = struct.get_id()
            if name in self._extra_structs:
                msg = f"NNCFConfig: '{name}' is registered already. Register it once, or start from a fresh NNCFConfig."
                raise CompactPruneError(msg)
            self._extra_structs[name] = struct

    def get_extra_struct(self, struct_cls: type[StructT]) -> StructT:
        """What was attached.

        :param struct_cls: of which kind.
        :raises KeyError: nothing of the kind was.
        """
        return cast(StructT, self._extra_structs[struct_cls.get_id()])

    def has_extra_struct(self, struct_cls: type[NNCFExtraConfigStruct]) -> bool:
        """Whether something of a kind was attached."""
        return struct_cls.get_id() in self._extra_structs

    def get_all_extra_structs(self) -> list[NNCFExtraConfigStruct]:
        """Everything that was attached."""
        return list(self._extra_structs.values())

    @staticmethod
    def schema() -> dict[str, Any]:
        """The JSON schema of configurations."""
        return json_schema()

    @staticmethod
    def validate(loaded_json: Mapping[str, Any]) -> None:
        """
        :raises ConfigError: with all problems.
        """
        compression_config(loaded_json)


def compression_config(config: Mapping[str, Any], name: str = "config") -> CompressionConfig:
    """The typed configuration; keys of the training script's own, which may hold anything, are left out.

    :param config: a dictionary, or an :class:`NNCFConfig`. Without ``"compression"``, or with an empty list, nothing is
        to be compressed.
    :param name: what to call it in messages.
    :raises ConfigError: with all problems.
    """
    fields = CompressionConfig.model_fields
    document = read_document({k: value for k, value in config.items() if k in fields or _is_json(value)}, name=name)
    data = document.data
    others = [key for key in data if key != "compression"]
    meant = inside_a_part(data) or any(key in GONE_SECTIONS or nearest(key, ["compression"]) for key in others)
    if meant or data.get("compression", []) != []:
        return load_config(document, warn=not (isinstance(config, NNCFConfig) and config.told))
    return load_section(Document(name, {**data, "compression": []}), CompressionConfig)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
