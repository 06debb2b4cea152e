"""Configurations: what loads, what it becomes, and what is said about everything else."""

from __future__ import annotations

import enum
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from nncf_compactprune.config import (
    AlgorithmConfig,
    Budget,
    CompressionConfig,
    Document,
    Section,
    json_schema,
    load_algorithm,
    load_config,
    load_section,
    read_document,
)
from nncf_compactprune.errors import ConfigError
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.plugins.hookspecs import hookimpl


class Schedule(enum.Enum):
    ONE_SHOT = "one_shot"
    POLYNOMIAL = "polynomial"


class ByName(Section):
    kind: Literal["by_name"]
    pattern: str


class ByCount(Section):
    kind: Literal["by_count"]
    count: int


def even(value: int) -> int:
    if value % 2:
        msg = f"expected an even number, got {value}. Use {value + 1}."
        raise ValueError(msg)
    return value


class Params(Section):
    max_ratio: float = Field(default=0.9, ge=0, lt=1)
    round_to: int = Field(default=8, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    ranking: Literal["uniform", "global", "greedy"] = "global"
    schedule: Schedule = Field(default=Schedule.ONE_SHOT, strict=False)
    steps: tuple[int, ...] = Field(default=(), strict=False)
    pair: Annotated[tuple[int, float], Field(strict=False)] | None = None
    width: int | list[int] | None = None
    where: ByName | ByCount | None = None
    tagged: Annotated[ByName | ByCount, Field(discriminator="kind")] | None = None
    per_layer: dict[str, float] = Field(default_factory=dict)
    tiles: Annotated[int, AfterValidator(even)] = 2
    multiple: int = Field(default=8, multiple_of=8)
    label: str = Field(default="x", pattern="^[a-z]+$")
    distill: bool = False


class FbnetConfig(AlgorithmConfig):
    budget: Budget
    params: Params = Params()


class Fbnet:
    name = "fbnet_pruning"
    summary = "a stand-in"
    Config = FbnetConfig


class Catro:
    name = "catro"
    summary = "another"
    Config = AlgorithmConfig


def make_plugins() -> Plugins:
    class Plugin:
        @hookimpl
        def compactprune_algorithms(self) -> list[type]:
            return [Fbnet, Catro]

    plugins = Plugins()
    plugins.register(Plugin(), "fake")
    return plugins


PLUGINS = make_plugins()
ENTRY = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}


def problems(config: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(config, PLUGINS)
    return [str(problem) for problem in caught.value.problems]


def params_problems(**params: Any) -> list[str]:
    prefix = "compression.params."
    found = problems({"compression": {**ENTRY, "params": params}})
    assert all(problem.startswith(prefix) for problem in found), found
    return [problem.removeprefix(prefix) for problem in found]


# --- what loads


def test_nncf_grammar_loads(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        """{ // as NNCF 2.x reads it
        "$schema": "compactprune.schema.json",
        "model": "resnet50", /* the script's
        own */ "url": "http://x/*y*/",
        "input_info": {"sample_size": [1, 3, 32, 32]},
        "ignored_scopes": "conv1",
        "compression": [
            {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "ignored_scopes": "fc", "target_scopes": ["a"],
             "params": {"steps": [1, 2], "schedule": "polynomial", "max_ratio": 0},
             "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},},
            {"algorithm": "catro"},
        ],
        "log_dir": "logs",
        }"""
    )
    config = load_config(path, PLUGINS)
    first, second = config.compression
    assert isinstance(first, FbnetConfig)
    assert first.ignored_scopes == ["fc", "conv1"]
    assert first.target_scopes == ["a"]
    assert first.params.steps == (1, 2)
    assert first.params.schedule is Schedule.POLYNOMIAL
    assert first.initializer.batchnorm_adaptation.num_bn_adaptation_samples == 0
    assert (second.algorithm, second.ignored_scopes, second.target_scopes) == ("catro", ["conv1"], None)
    assert second.initializer.batchnorm_adaptation.num_bn_adaptation_samples == 2000
    assert config.model_extra == {
        "$schema": "compactprune.schema.json", "model": "resnet50", "url": "http://x/*y*/", "log_dir": "logs",
    }  # fmt: skip
    assert config.target_device is None
    assert load_config(str(path), PLUGINS) == config


def test_a_document_carries_its_name_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"compression": [ENTRY], "epochs": 3}))
    document = read_document(path, {"epochs": 4, "compression.0.budget.macs": 0.4, "optimizer.lr": 0.1})
    assert document == Document(
        str(path), {"compression": [{**ENTRY, "budget": {"macs": 0.4}}], "epochs": 4, "optimizer": {"lr": 0.1}}
    )
    assert json.loads(path.read_text())["epochs"] == 3
    assert read_document(document) == document
    assert load_config(document, PLUGINS).model_extra == {"epochs": 4, "optimizer": {"lr": 0.1}}
    with pytest.raises(ConfigError, match=rf"^{path}: compression.3: cannot be set: the config has no such place"):
        read_document(path, {"compression.3": {}})
    wrong = read_document({"compression": []}, name="by hand")
    with pytest.raises(ConfigError, match=r"^by hand: compression: empty"):
        load_config(wrong, PLUGINS)


def test_load_section_reads_the_keys_of_a_script() -> None:
    class Script(Section):
        model_config = ConfigDict(extra="ignore")

        epochs: int = Field(default=1, ge=0)

    assert load_section(Document("c.json", {"epochs": 2, "compression": ENTRY}), Script).epochs == 2
    with pytest.raises(ConfigError, match=r"^c.json: epochs: expected a whole number of at least 0, got -1\.$"):
        load_section(Document("c.json", {"epochs": -1}), Script)


@pytest.mark.parametrize(("params", "expected"), [({}, "GPU"), ({"target_device": "NPU"}, "NPU")])
def test_the_top_levels_target_device_reaches_the_entries_that_read_one(params: dict[str, str], expected: str) -> None:
    config = {"target_device": "GPU", "compression": {"algorithm": "data_free_quantization", "params": params}}
    (entry,) = load_config(config).compression
    assert entry.params.target_device == expected  # type: ignore[attr-defined]


def test_mapping_with_tuples_and_a_single_entry_loads() -> None:
    config = load_config({"input_info": {"sample_size": (1, 3, 8, 8)}, "compression": ENTRY}, PLUGINS)
    assert config.input_info[0].sample_size == [1, 3, 8, 8]
    assert [entry.algorithm for entry in config.compression] == ["fbnet_pruning"]


def test_a_config_survives_its_own_json() -> None:
    config = load_config({"model": "m", "compression": [ENTRY, {"algorithm": "catro"}]}, PLUGINS)
    assert load_config(json.loads(config.model_dump_json()), PLUGINS) == config


def test_configs_are_frozen() -> None:
    config = load_config({"compression": ENTRY}, PLUGINS)
    with pytest.raises(ValidationError):
        config.compression[0].algorithm = "catro"
    with pytest.raises(ValidationError):
        config.target_device = "GPU"


def test_load_algorithm_takes_one_entry() -> None:
    entry = load_algorithm({**ENTRY, "params": {"round_to": 4}}, PLUGINS)
    assert isinstance(entry, FbnetConfig)
    assert entry.params.round_to == 4
    with pytest.raises(
        ConfigError, match=r"^prune\(\): params.round_to: expected a whole number of at least 1, got 0.$"
    ):
        load_algorithm({**ENTRY, "params": {"round_to": 0}}, PLUGINS, source="prune()")
    with pytest.raises(
        ConfigError, match=r"^arguments: algorithm: missing. Expected one of .catro., .fbnet_pruning.\.$"
    ):
        load_algorithm({}, PLUGINS)


@pytest.mark.parametrize(
    ("value", "dense", "limit"),
    [
        (0.5, 101, 50),
        (0.29, 100, 29),
        (1, 7, 7),
        (1.0, 7, 7),
        (2, 7, 2),
        ("300M", 1, 300_000_000),
        ("1.2G", 1, 1_200_000_000),
        ("500 K", 1, 500_000),
        (None, 7, 7),
    ],
)
def test_budget_resolves(value: Any, dense: int, limit: int) -> None:
    assert Budget(macs=value, params=1.0).resolve("macs", dense) == limit
    assert Budget(params=value, macs=1.0).resolve("params", dense) == limit


@settings(derandomize=True)
@given(st.floats(min_value=0, max_value=1, exclude_min=True), st.integers(0, 10**12))
def test_a_fraction_never_allows_more_than_it_says(fraction: float, dense: int) -> None:
    limit = Budget(macs=fraction).resolve("macs", dense)
    assert 0 <= limit <= dense
    assert math.isclose(limit, fraction * dense, rel_tol=1e-12, abs_tol=1)


def test_example_inputs() -> None:
    info = [
        {"sample_size": [2, 3], "filler": "random", "keyword": "x"},
        {"sample_size": [2], "type": "long", "filler": "random", "keyword": "ids"},
        {"sample_size": [1], "keyword": "mask"},
    ]
    config = load_config({"input_info": info, "compression": ENTRY}, PLUGINS)
    inputs = config.example_inputs("cpu", seed=3)
    assert isinstance(inputs, dict)
    assert {name: (tuple(t.shape), t.dtype) for name, t in inputs.items()} == {
        "x": ((2, 3), torch.float32),
        "ids": ((2,), torch.int64),
        "mask": ((1,), torch.float32),
    }
    again = config.example_inputs(seed=3)
    other = config.example_inputs(seed=4)
    assert torch.equal(inputs["x"], again["x"])  # type: ignore[call-overload]
    assert not torch.equal(inputs["x"], other["x"])  # type: ignore[call-overload]
    assert inputs["mask"].tolist() == [1.0]

    config = load_config({"input_info": {"sample_size": [1, 2], "filler": "zeros"}, "compression": ENTRY}, PLUGINS)
    (tensor,) = config.example_inputs()
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == [[0.0, 0.0]]


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"compression": ENTRY}), encoding="utf-8-sig")  # as Windows' editors save it
    assert load_config(path, PLUGINS).compression == load_config({"compression": ENTRY}, PLUGINS).compression


def test_example_inputs_need_input_info(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"compression": ENTRY}))
    config = load_config(path, PLUGINS)
    with pytest.raises(ConfigError, match=r"c\.json: input_info: missing. Expected an object such as"):
        config.example_inputs()


# --- what is said about values

MESSAGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_ratio": 1.2}, ["max_ratio: expected a number in [0, 1), got 1.2."]),
    ({"max_ratio": "0.5"}, ['max_ratio: expected a number in [0, 1), got "0.5".']),
    ({"max_ratio": None}, ["max_ratio: expected a number in [0, 1), got null."]),
    ({"round_to": 0}, ["round_to: expected a whole number of at least 1, got 0."]),
    ({"round_to": 8.0}, ["round_to: expected a whole number of at least 1, got 8.0."]),
    ({"round_to": True}, ["round_to: expected a whole number of at least 1, got true."]),
    ({"temperature": 0}, ["temperature: expected a number above 0, got 0."]),
    (
        {"ranking": "glboal"},
        ["ranking: expected one of \"uniform\", \"global\", \"greedy\", got \"glboal\". Did you mean 'global'?"],
    ),
    ({"ranking": 3}, ['ranking: expected one of "uniform", "global", "greedy", got 3.']),
    ({"schedule": "x"}, ['schedule: expected one of "one_shot", "polynomial", got "x".']),
    ({"steps": 3}, ["steps: expected a list of whole numbers, got 3."]),
    ({"steps": [1, "2"]}, ['steps[1]: expected a whole number, got "2".']),
    ({"pair": [1]}, ["pair[1]: missing. Expected a number."]),
    ({"pair": [1, 2, 3]}, ["pair: expected it to have at most 2 items, not 3, got [1, 2, 3]."]),
    ({"width": "a"}, ['width: expected a whole number or a list of whole numbers or null, got "a".']),
    ({"width": [1, "a"]}, ['width[1]: expected a whole number, got "a".']),
    ({"where": {"kind": "by_name"}}, ["where.pattern: missing. Expected a string."]),
    (
        {"where": {"kind": "by_count", "cuont": 3}},
        ["where.cuont: unknown key. Did you mean 'count'?", "where.count: missing. Expected a whole number."],
    ),
    ({"where": 3}, ["where: expected an object or null, got 3."]),
    ({"tagged": {"kind": "by_nam"}}, ['tagged.kind: expected one of "by_name", "by_count", got "by_nam".'
                                      " Did you mean 'by_name'?"]),
    ({"tagged": {}}, ['tagged.kind: missing. Expected one of "by_name", "by_count".']),
    ({"tagged": {"kind": "by_count", "count": "x"}}, ['tagged.count: expected a whole number, got "x".']),
    ({"tagged": []}, ["tagged: expected an object or null, got []."]),
    ({"per_layer": {"layer1.0": "x"}}, ['per_layer["layer1.0"]: expected a number, got "x".']),
    ({"per_layer": []}, ["per_layer: expected an object, got []."]),
    ({"tiles": 3}, ["tiles: expected an even number, got 3. Use 4."]),
    ({"multiple": 7}, ["multiple: expected a multiple of 8, got 7."]),
    ({"label": "A"}, ["label: expected it to match pattern '^[a-z]+$', got \"A\"."]),
    ({"distill": "yes"}, ['distill: expected true or false, got "yes".']),
    ({"rund_to": 8}, ["rund_to: unknown key. Did you mean 'round_to'?"]),
    ({"budget": {"macs": 0.5}}, ["budget: unknown key here. It belongs one level up."]),
    (
        {"max_ratio": 2, "rounb_to": 1, "distill": 1},
        [
            "max_ratio: expected a number in [0, 1), got 2.",
            "rounb_to: unknown key. Did you mean 'round_to'?",
            "distill: expected true or false, got 1.",
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("params", "expected"), MESSAGES, ids=[json.dumps(params) for params, _ in MESSAGES])
def test_messages_about_params(params: dict[str, Any], expected: Any) -> None:
    assert params_problems(**params) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"budget": {"macs": 1.2}}, 'budget.macs: expected a fraction kept in (0, 1], a whole number, or a string such '
                                    'as "300M", got 1.2.'),
        ({"budget": {"params": 0}}, 'budget.params: expected a fraction kept in (0, 1], a whole number, or a string '
                                    'such as "300M", got 0.'),
        ({"budget": {"macs": "0.1m"}}, 'budget.macs: expected a fraction kept in (0, 1], a whole number, or a string '
                                       'such as "300M", got "0.1m".'),
        ({"budget": {"macs": True}}, 'budget.macs: expected a fraction kept in (0, 1], a whole number, or a string '
                                     'such as "300M", got true.'),
        ({"budget": {"latency": "4.5"}}, "budget.latency: expected a fraction of the dense model's time in (0, 1], or "
                                         'a time such as "4.5ms", got "4.5".'),
        ({"budget": {"latency": 4}}, "budget.latency: expected a fraction of the dense model's time in (0, 1], or a "
                                     'time such as "4.5ms", got 4.'),
        ({"budget": {"latency": "4M"}}, "budget.latency: expected a fraction of the dense model's time in (0, 1], or a "
                                        'time such as "4.5ms", got "4M".'),
        ({"budget": {"macs": "4ms"}}, 'budget.macs: expected a fraction kept in (0, 1], a whole number, or a string '
                                      'such as "300M", got "4ms".'),
        ({"budget": {"macs": 0.5, "device": "GPU"}}, 'budget: "device" says how latency is measured, and there is no '
                                                     '"latency". Add it, or leave this out.'),
        ({"budget": {"latency": 0.5, "runtime": "openvin"}}, "budget.runtime: unknown latency meter 'openvin'. Known "
                                                             'here: none.'),
        ({"budget": {"latency": 0.5, "batch": 0}}, "budget.batch: expected a whole number of at least 1, got 0."),
        ({"budget": {"latency": 0.5, "hint": "fast"}}, 'budget.hint: expected one of "latency", "throughput", '
                                                       'got "fast".'),
        ({"budget": {}}, 'budget: expected at least one of "macs", "params", "latency", such as {"macs": 0.5}.'),
        ({"budget": {"flops": 0.5}}, 'budget.flops: unknown key. Expected one of "batch", "device", "hint", "latency", '
                                     '"macs", "params", "precision", "runtime", "threads".'),
        ({"budget": 0.5}, "budget: expected an object, got 0.5."),
        ({"round_to": 8}, 'round_to: unknown key here. It belongs into "params".'),
        ({"ignored_scopes": 3}, "ignored_scopes: expected a string or a list of strings, got 3."),
        ({"ignored_scopes": ["a", 3]}, "ignored_scopes[1]: expected a string, got 3."),
        ({"target_scopes": {}}, "target_scopes: expected a string or a list of strings or null, got {}."),
        ({"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": -1}}},
         "initializer.batchnorm_adaptation.num_bn_adaptation_samples: expected a whole number of at least 0, got -1."),
        ({"algorithm": "fbnet_prunning"}, "algorithm: unknown algorithm 'fbnet_prunning'. Did you mean "
                                          "'fbnet_pruning'?"),
        ({"algorithm": 3}, 'algorithm: expected one of "catro", "fbnet_pruning", got 3.'),
    ],
)  # fmt: skip
def test_messages_about_an_entry(changes: dict[str, Any], expected: Any) -> None:
    assert problems({"compression": [{**ENTRY, **changes}]}) == [f"compression[0].{expected}"]


def test_a_missing_section_is_named() -> None:
    assert problems({"compression": [{"algorithm": "fbnet_pruning"}]}) == [
        "compression[0].budget: missing. Expected an object."
    ]


AA = "accuracy_aware_training"


@pytest.mark.parametrize(
    ("top_level", "expected"),
    [
        ({"target_device": "CPUU"}, 'target_device: expected one of "ANY", "CPU", "GPU", "NPU", "CPU_SPR" or null, '
                                    "got \"CPUU\". Did you mean 'CPU'?"),
        ({"input_info": {}}, "input_info.sample_size: missing. Expected a non-empty list of whole numbers."),
        ({"input_info": [{"sample_size": [1, 0]}]}, "input_info[0].sample_size[1]: expected a whole number above 0, "
                                                    "got 0."),
        ({"input_info": {"sample_size": []}}, "input_info.sample_size: expected it to have at least 1 item, not 0, "
                                              "got []."),
        ({"input_info": {"sample_size": [99999, 99999]}}, "input_info.sample_size: expected at most 2147483648 "
                                                          "elements, got 9999800001."),
        ({"input_info": {"sample_size": [1], "filer": "ones"}}, "input_info.filer: unknown key. Did you mean "
                                                                "'filler'?"),
        ({"input_info": 3}, "input_info: expected an object or a list of objects, got 3."),
        ({"input_info": [{"sample_size": [1], "keyword": "a"}, {"sample_size": [1]}]},
         'input_info: expected a "keyword" in every input or in none.'),
        ({"input_info": [{"sample_size": [1], "keyword": "a"}] * 2},
         'input_info: expected different keywords, got ["a", "a"].'),
        ({AA: {"mode": "early_exit"}}, f"{AA}.params: missing. Expected an object."),
        ({AA: {"mode": "early_exi", "params": {}}},
         f'{AA}.mode: expected one of "early_exit", "adaptive_compression_level", got "early_exi". '
         "Did you mean 'early_exit'?"),
        ({AA: {"mode": "early_exit", "params": {"maximal_total_epochs": 1}}},
         f'{AA}: "params" must say by how much the accuracy may fall: give "maximal_relative_accuracy_degradation" '
         '(in percent) or "maximal_absolute_accuracy_degradation", got neither.'),
        ({AA: {"mode": "early_exit", "params": {"maximal_relative_accuracy_degradation": 1, "patience_epochs": 2}}},
         f'{AA}: "params" must give "maximal_total_epochs". "patience_epochs" belongs to mode '
         '"adaptive_compression_level".'),
    ],
)  # fmt: skip
def test_messages_about_the_top_level(top_level: dict[str, Any], expected: Any) -> None:
    assert problems({**top_level, "compression": ENTRY}) == [expected]


WANTED = 'Expected an object with "algorithm", or a list of such objects.'


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, f"compression: missing. {WANTED}"),
        ({"compresion": ENTRY}, f'compression: missing. {WANTED} Rename "compresion" to "compression".'),
        ({"compression": []}, f"compression: empty. {WANTED}"),
        ({"compression": "catro"}, 'compression: expected an object with "algorithm", got "catro".'),
        ({"compression": [None]}, 'compression[0]: expected an object with "algorithm", got null.'),
        ({"compression": {}}, 'compression.algorithm: missing. Expected one of "catro", "fbnet_pruning".'),
        ({"compression": ENTRY, "x": {1: 2}}, "x: expected keys that are valid text."),
        ({"compression": ENTRY, "x": [math.nan]}, "x[0]: expected a finite number of ordinary size."),
        ({"compression": ENTRY, "x": torch.zeros(1)}, "x: expected a JSON value, got Tensor."),
        ({"compression": ENTRY, "x": "\ud800"}, 'x: expected valid Unicode text, got "\\ud800".'),
    ],
)
def test_messages_about_the_document(config: Any, expected: Any) -> None:
    assert problems(config) == [expected]


def test_all_problems_come_at_once_in_document_order(tmp_path: Path) -> None:
    path = tmp_path / "r50.json"
    config = {
        "target_device": "TPU",
        "compression": [
            {"algorithm": "fbnet_pruning", "params": {"max_ratio": 1.2}, "bugdet": {"macs": 0.5}},
            {"algorithm": "catroo"},
            {"algorithm": "catro", "x y": 1},
        ],
        "ignored_scopes": 1,
    }
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        load_config(path, PLUGINS)
    assert [problem.path for problem in caught.value.problems] == [
        "target_device",
        "compression[0].params.max_ratio",
        "compression[0].bugdet",
        "compression[0].budget",
        "compression[1].algorithm",
        'compression[2]["x y"]',
        "ignored_scopes",
    ]
    assert f"{path}: compression[0].params.max_ratio: expected a number in [0, 1), got 1.2." in str(caught.value)
    assert "pydantic" not in str(caught.value)


# --- what is said about files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", 'empty. Expected a JSON object with "compression".'),
        (b" // nothing\n", 'empty. Expected a JSON object with "compression".'),
        (b"[]", 'compression: empty. Expected an object with "algorithm", or a list of such objects.'),
        (b"null", 'expected an object with "compression", got null.'),
        (b'{"a": 1,\n "b" 2}', "not valid JSON at line 2, column 6: expecting ':' delimiter."),
        (b'{"a": /* x\n */ 1 2}', "not valid JSON at line 2, column 7: expecting ',' delimiter."),
        (b'{"a": "b', "not valid JSON at line 1, column 7: unterminated string starting."),
        (b'{"a": 1} x', "not valid JSON at line 1, column 10: extra data."),
        (b"[,]", "not valid JSON at line 1, column 2: expecting value."),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 at byte 0. Save the file in UTF-8."),
        (b'\xef\xbb\xbf{"a": }', "not valid JSON at line 1, column 7: expecting value."),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 50 levels."),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "nested deeper than 50 levels."),
        (b'{"a": NaN}', "a: expected a finite number of ordinary size."),
        (b'{"a": [1, -Infinity]}', "a[1]: expected a finite number of ordinary size."),
        (b'{"a": 1e999}', "a: expected a finite number of ordinary size."),
        (b'{"a": ' + b"9" * 5000 + b"}", "a: expected a finite number of ordinary size."),
        (b'{"a": 99999999999999999999}', "a: expected a finite number of ordinary size."),
        (b'{"a": {"b": 1, "b": 2}}', "a.b: given twice. Keep one."),
        (b'{"a": "\\ud800"}', 'a: expected valid Unicode text, got "\\ud800".'),
    ],
)
def test_messages_about_file_content(tmp_path: Path, content: bytes, expected: Any) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, PLUGINS)
    assert str(caught.value) == f"{path}: {expected}"


def test_messages_about_paths(tmp_path: Path) -> None:
    def message(source: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(source, PLUGINS)
        assert len(caught.value.problems) == 1
        return str(caught.value)

    missing = tmp_path / "missing.json"
    assert message(missing) == f"{missing}: no such file."
    assert message(tmp_path) == f"{tmp_path}: is a directory. Expected a JSON file."
    assert message("x" * 5000).endswith(": cannot be read: File name too long.")
    assert message("a\0b").endswith(": is no valid file name.")
    assert message("a\ud800") == "a\\ud800: is no valid file name."
    assert message(None) == "config: expected a path or a mapping, got NoneType."
    assert message(b"x") == "config: expected a path or a mapping, got bytes."
    assert message('{"compression": []}').startswith("config: expected a path or a mapping, got JSON text.")


def test_a_mapping_that_holds_itself_is_refused() -> None:
    config: dict[str, Any] = {"compression": ENTRY}
    config["a"] = config["b"] = config
    assert problems(config) == ["nested deeper than 50 levels."]


# --- any JSON gives a config or a ConfigError

OTHER_KEYS = [
    "compression",
    "algorithm",
    "budget",
    "macs",
    "latency",
    "params",
    "input_info",
    "sample_size",
    "type",
    "keyword",
    "ignored_scopes",
    "target_scopes",
    "initializer",
    "batchnorm_adaptation",
    "accuracy_aware_training",
    "mode",
    "log_dir",
    "_source",
    "kind",
    "count",
    "pattern",
    "by_name",
    "int",
    "model_dump",
    "__class__",
]
KEYS = st.sampled_from([*OTHER_KEYS, *Params.model_fields])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["fbnet_pruning", "catro", "early_exit", "adaptive_compression_level", "by_name", "300M", "4ms"]),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=5)
)


def attempt(source: Any) -> tuple[CompressionConfig | None, ConfigError | None]:
    try:
        return load_config(source, PLUGINS), None
    except ConfigError as error:
        return None, error


SOME_PARAMS = st.dictionaries(st.sampled_from(list(Params.model_fields)), JSON, max_size=4)
SOME_ENTRY = st.fixed_dictionaries(
    {"algorithm": st.sampled_from(["fbnet_pruning", "catro", "cat"])},
    optional={"budget": JSON, "params": SOME_PARAMS | JSON, "ignored_scopes": JSON, "initializer": JSON},
)
SOME_CONFIG = st.fixed_dictionaries(
    {"compression": SOME_ENTRY | st.lists(SOME_ENTRY | JSON, max_size=2)},
    optional={"input_info": JSON, AA: JSON, "target_scopes": JSON, "_source": JSON, "model_fields": JSON},
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(JSON | SOME_CONFIG)
def test_any_json_gives_a_config_or_a_config_error(document: Any) -> None:
    config, error = attempt(document)
    if config is not None:
        assert load_config(json.loads(config.model_dump_json()), PLUGINS) == config
    if error is not None:
        assert error.problems
        assert all(problem.message for problem in error.problems)
        str(error).encode("utf-8")
        assert "pydantic" not in str(error)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode("utf-8")[:200]))
def test_any_file_gives_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    _, error = attempt(path)
    assert error is None or str(error).startswith(f"{path}: ")


# --- the published schema


def test_json_schema_has_one_branch_per_algorithm() -> None:
    schema = json_schema(PLUGINS)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    single, many = schema["properties"]["compression"]["anyOf"]
    assert many["items"] == single
    assert [branch["properties"]["algorithm"]["const"] for branch in single["oneOf"]] == ["catro", "fbnet_pruning"]
    fbnet = schema["$defs"][single["oneOf"][1]["$ref"].removeprefix("#/$defs/")]
    assert fbnet["additionalProperties"] is False
    assert set(fbnet["required"]) == {"algorithm", "budget"}
    assert schema["required"] == ["compression"]
    assert schema["additionalProperties"] is True
    assert schema["properties"]["input_info"]["anyOf"][0] == {"$ref": "#/$defs/InputInfo"}

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}
    json.dumps(schema)


def test_names_of_plugins_are_checked_with_everything_else_and_are_in_the_schema() -> None:
    entry = {**ENTRY, "params": {"importance": "l3", "allocation": "globl", "schedule": 1, "round_to": 0}}
    with pytest.raises(ConfigError) as caught:
        load_config({"compression": [entry, {"algorithm": "catroo"}]})
    assert [problem.path.removeprefix("compression[0].params.") for problem in caught.value.problems] == [
        "importance", "allocation", "schedule", "round_to", "compression[1].algorithm",
    ]  # fmt: skip
    known = "unknown importance criterion 'l3'. Known here: 'activation_norm', 'batch_norm_scale', 'fisher'"
    assert known in str(caught.value)
    assert "unknown allocation 'globl'. Did you mean 'global'? Known here: 'balanced', 'global'" in str(caught.value)
    properties = json_schema()["$defs"]["FBNetParams"]["properties"]
    assert {"batch_norm_scale", "fisher", "l2", "taylor"} < set(properties["importance"]["enum"])
    assert {"exponential", "multistep", "one_shot"} < set(properties["schedule"]["enum"])
    assert properties["schedule"]["default"] == "exponential"
    assert "x-registry" not in json.dumps(json_schema())


def test_json_schema_without_algorithms() -> None:
    assert "oneOf" not in json_schema(Plugins())["properties"]["compression"]["anyOf"][0]
