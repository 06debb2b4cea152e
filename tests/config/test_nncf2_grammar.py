"""Keys of older versions of NNCF, files in every form, and what is refused."""

from __future__ import annotations

import json

import pytest

from nncf_compactprune.config import load_config
from nncf_compactprune.errors import ConfigError
from nncf_compactprune.integrations.nncf2 import NNCFConfig
from nncf_compactprune.integrations.nncf2.config import compression_config

INPUT = {"sample_size": [1, 3, 32, 32]}


def load(entries, **top):
    return load_config({"input_info": INPUT, "compression": entries, **top})


def pruning(params=None, **keys):
    return {"algorithm": "filter_pruning", **({} if params is None else {"params": params}), **keys}


@pytest.mark.parametrize(
    ("old", "today", "warning"),
    [
        (
            pruning({"weight_importance": "L1"}),
            pruning({"filter_importance": "L1"}),
            'compression.params.weight_importance: an older spelling. Write "params.filter_importance" today.',
        ),
        (
            pruning({"pruning_init": 0.1}),
            pruning(pruning_init=0.1),
            'compression.params.pruning_init: an older spelling. Write "pruning_init" today.',
        ),
        (
            pruning(schedule="baseline", pruning_target=0.3, weight_importance="L1"),
            pruning({"schedule": "baseline", "pruning_target": 0.3, "filter_importance": "L1"}),
            'compression.weight_importance: an older spelling. Write "params.filter_importance" today.',
        ),
        (
            {"algorithm": "rb_sparsity",
             "params": {"sparsity_init": 0.01, "sparsity_steps": 5, "sparsity_training_steps": 9}},
            {"algorithm": "rb_sparsity", "sparsity_init": 0.01,
             "params": {"sparsity_target_epoch": 5, "sparsity_freeze_epoch": 9}},
            'sparsity_training_steps: an older spelling. Write "params.sparsity_freeze_epoch" today.',
        ),
        (
            {"algorithm": "magnitude_sparsity",
             "params": {"schedule": "multistep", "steps": [2], "sparsity_levels": [0.1, 0.2]}},
            {"algorithm": "magnitude_sparsity",
             "params": {"schedule": "multistep", "multistep_steps": [2], "multistep_sparsity_levels": [0.1, 0.2]}},
            'params.steps: an older spelling. Write "params.multistep_steps" today.',
        ),
        (
            {"algorithm": "knowledge_distillation", "is_softmax": True},
            {"algorithm": "knowledge_distillation", "type": "softmax"},
            'is_softmax: an older spelling. Write "type" today.',
        ),
        (
            {"algorithm": "knowledge_distillation", "is_softmax": False, "scale": 10},
            {"algorithm": "knowledge_distillation", "type": "mse", "scale": 10},
            'is_softmax: an older spelling. Write "type" today.',
        ),
        (
            pruning({"zero_grad": True}),
            pruning({}),
            "compression.params.zero_grad: nothing reads it any more: gradients of masked filters are zero",
        ),
        (
            pruning({"write_filter_pruning_mask": True}),
            pruning({}),
            "compression.params.write_filter_pruning_mask: nothing reads it any more",
        ),
    ],
)  # fmt: skip
def test_older_spellings_are_taken_with_a_warning(old, today, warning, caplog):
    assert load(old).compression[0] == load(today).compression[0]
    assert warning in caplog.text


def test_today_s_spelling_gives_no_warning(caplog):
    load(pruning({"filter_importance": "geometric_median", "pruning_target": 0.4}, pruning_init=0.1))
    assert not caplog.records


def test_the_document_that_was_given_stays_as_it_is():
    entry = pruning({"weight_importance": "L1", "zero_grad": True})
    before = json.dumps(entry)
    load(entry)
    assert json.dumps(entry) == before


def test_mistakes_are_told_under_the_name_that_was_written():
    with pytest.raises(ConfigError) as caught:
        load([pruning({"weight_importance": "L3", "pruning_init": 7}), pruning(pruning_target=7)])
    assert [problem.path for problem in caught.value.problems] == [
        "compression[0].params.weight_importance",
        "compression[0].params.pruning_init",
        "compression[1].pruning_target",
    ]


def test_a_key_in_both_spellings_is_a_mistake():
    with pytest.raises(ConfigError, match=r"params.weight_importance: given twice, here and as .*params.filter_import"):
        load(pruning({"weight_importance": "L1", "filter_importance": "L2"}))


def test_own_algorithms_stay_strict():
    with pytest.raises(ConfigError, match="unknown key"):
        load({"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "round_to": 4})


@pytest.mark.parametrize(
    ("old", "shapes"),
    [
        ({"input_info": INPUT}, [[1, 3, 32, 32]]),
        (
            {"input_info": [INPUT, {"sample_size": [2, 4], "type": "long", "filler": "random"}]},
            [[1, 3, 32, 32], [2, 4]],
        ),
        ({"input_infos": INPUT}, [[1, 3, 32, 32]]),
        ({"input_sample_size": [1, 3, 8, 8]}, [[1, 3, 8, 8]]),
        ({"input_sample_sizes": [[1, 3, 8, 8], [1, 2]]}, [[1, 3, 8, 8], [1, 2]]),
    ],
)
def test_inputs_in_every_form(old, shapes):
    config = load_config({**old, "compression": pruning()})
    assert [list(x.shape) for x in config.example_inputs()] == shapes


@pytest.mark.parametrize(
    ("old", "device"),
    [({"target_device": "VPU"}, "NPU"), ({"target_device": "TRIAL"}, "ANY"), ({"target_device": "CPU_SPR"}, "CPU"),
     ({"hw_config_type": "cpu"}, "CPU"), ({"target_device": "NONE"}, "ANY")],
)  # fmt: skip
def test_devices(old, device):
    assert load(pruning(), **old).target_device == device


def test_a_device_without_limits_is_told_as_what_it_was(caplog):
    load(pruning(), target_device="TRIAL")
    assert '"TRIAL" had the limits of no device, and NNCF 3 knows no such one. "ANY" is taken.' in caplog.text


def test_accuracy_aware_training_inside_an_entry_moves_up(caplog):
    inner = {"maximal_accuracy_degradation": 1.0, "initial_training_phase_epochs": 100, "patience_epochs": 30}
    config = load([pruning({}, accuracy_aware_training=inner)])
    assert config.accuracy_aware_training.searches
    assert config.accuracy_aware_training.params.maximal_relative_accuracy_degradation == 1.0
    assert "its place in NNCF 1.x" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        '[{"algorithm": "filter_pruning"}]',
        '[{"compression": {"algorithm": "filter_pruning"}, "epochs": 3}]',
        '// of 2021\n{"compression": [ /* one */ {"algorithm": "filter_pruning", "params": {},},],}',
    ],
)
def test_files_in_every_form(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert [entry.algorithm for entry in load_config(path).compression] == ["filter_pruning"]


@pytest.mark.parametrize(
    ("name", "way"),
    [("binarization", '"quantization"'), ("movement_sparsity", '"magnitude_sparsity"'),
     ("experimental_quantization", '"quantization"')],
)  # fmt: skip
def test_what_is_gone_is_refused_in_one_sentence_with_the_way(name, way):
    with pytest.raises(ConfigError) as caught:
        load([{"algorithm": name, "params": {"anything": 1}}])
    message = str(caught.value)
    assert f'"{name}" is not supported: NNCF dropped it.' in message
    assert way in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [("target_devise", "target_device"), ("input_inf", "input_info"), ("ignored_scope", "ignored_scopes"),
     ("compression_lr_multipler", "compression_lr_multiplier"),
     ("acuracy_aware_training", "accuracy_aware_training")],
)  # fmt: skip
def test_misspelt_keys_of_the_top_level_are_told(key, meant):
    with pytest.raises(ConfigError, match=f"{key}: unknown key. Did you mean .{meant}.\\?"):
        load_config({key: {}, "compression": pruning()})


def test_keys_of_the_training_script_are_left_alone():
    keys = ["model", "epochs", "optimizer", "num_classes", "dataset", "log_dir", "target", "compression_type", "inputs"]
    load(pruning(), **dict.fromkeys(keys, 1))


def test_a_misplaced_start_is_told(caplog):
    load(pruning(), pruning_init=0.1)
    assert "pruning_init: nothing reads it here. It belongs into the entry of its algorithm." in caplog.text


def test_everything_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load(
            [
                pruning({"pruning_target": 7, "shedule": "baseline"}),
                {"algorithm": "binarization"},
                {"algorithm": "knowledge_distillation", "type": "none"},
            ],
            target_devise="CPU",
        )
    assert len(caught.value.problems) == 5


def ranges(value):
    return load({"algorithm": "quantization", "initializer": {"range": value}}).compression[0].initializer.range


def test_ranges_as_a_list_are_taken_where_all_activations_are_alike():
    of_activations = {"type": "percentile", "num_init_samples": 8, "params": {"min_percentile": 1}}
    listed = [{"type": "min_max", "target_quantizer_group": "weights"}, {**of_activations}]
    assert ranges(listed) == ranges(of_activations)
    assert ranges([{**of_activations, "target_quantizer_group": "activations"}]) == ranges(of_activations)


@pytest.mark.parametrize(
    "value", [[{"type": "min_max"}, {"type": "percentile"}], [{"type": "min_max", "target_scopes": ["{re}head.*"]}], []]
)
def test_ranges_of_parts_are_refused(value):
    with pytest.raises(ConfigError, match=r"initializer\.range: NNCF 3 finds the ranges of all activations in one way"):
        ranges(value)


def test_steps_of_ranges_are_named():
    with pytest.raises(ConfigError, match=r"num_init_steps: counted batches in NNCF 1\.x\. Write num_init_samples"):
        ranges({"num_init_steps": 4})


QUANTIZATION = {"algorithm": "quantization"}


def test_a_file_with_one_entry_alone_is_taken(tmp_path) -> None:
    """As the files of Optimum's Intel part."""
    alone = {**QUANTIZATION, "input_info": INPUT, "ignored_scopes": ["head"], "preset": "mixed"}
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    for config in (load_config(alone), load_config(tmp_path / "alone.json")):
        (entry,) = config.compression
        assert (entry.algorithm, entry.ignored_scopes, entry.preset) == ("quantization", ["head"], "mixed")
        assert config.input_info[0].sample_size == [1, 3, 32, 32]
    for config in (NNCFConfig.from_dict(alone), NNCFConfig.from_json(tmp_path / "alone.json")):
        assert [one.algorithm for one in compression_config(config).compression] == ["quantization"]
    with pytest.raises(ConfigError, match=r"movement_sparsity.*NNCF dropped it"):
        NNCFConfig.from_dict({"algorithm": "movement_sparsity"})


def test_an_empty_list_is_nothing_to_do_in_nncf_2_x_scripts() -> None:
    assert compression_config(NNCFConfig.from_dict({"compression": [], "epochs": 3})).compression == []
    with pytest.raises(ConfigError, match="compression: empty"):
        load_config({"compression": []})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"base": {"nncf_config": {"compression": []}},
          "nncf_quantization": {"nncf_config": {"compression": [QUANTIZATION]}}},
         'compression: missing.*This file has it in "nncf_quantization", below "nncf_config": give that object'),
        ({"nncf_config": {"compression": [QUANTIZATION]}},
         'compression: missing.*This file has it in "nncf_config": give that object'),
        ({"bootstrapNAS": {"training": {}}}, "bootstrapNAS: not supported: NNCF dropped its search"),
        ({"compression": {"algorithm": "fracbits_quantization"}}, "NNCF dropped it. Use \"quantization\""),
        ({"compression": {**QUANTIZATION, "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_steps": 3}}}},
         "num_bn_adaptation_steps: counted batches.*that number times the batch size"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_says_where_to_go(document, message: str) -> None:
    for read in (load_config, NNCFConfig.from_dict):
        with pytest.raises(ConfigError, match=message):
            read(document)


@pytest.mark.parametrize(
    ("keys", "today", "warning"),
    [
        ({"disable_saturation_fix": True}, {"overflow_fix": "disable"}, 'Write "overflow_fix" today'),
        ({"disable_saturation_fix": False}, {"overflow_fix": "enable"}, 'Write "overflow_fix" today'),
        ({"quantizable_subgraph_patterns": [["conv2d", "relu"]]}, {}, "nothing reads it any more: NNCF 3 knows"),
        ({"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 9, "num_bn_forget_samples": 4}}},
         {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 9}}},
         "num_bn_forget_samples: nothing reads it"),
        ({"quantize_patterns": ["conv2d"]}, {}, "nothing reads it any more: NNCF 3 knows"),
        ({"params": {"base_lr": 1e-4}}, {}, "base_lr: nothing reads it any more: it belonged to NNCF 2.x's training"),
        ({"params": {"activations_quant_start_epoch": 2, "weights_quant_start_epoch": 2}},
         {"params": {"start_epoch": 2}}, ""),
        ({"scope_overrides": {}, "activations": {"linked_quantizer_scopes": []}, "compression_lr_multiplier": 1.0}, {},
         ""),
        ({"scope_overrides": {"weights": {}, "activations": {}}, "weights": {"logarithm_scale": False}},
         {"weights": {}}, ""),
        ({"initializer": {"range": {"num_init_samples": 256.0}}}, {"initializer": {"range": {"num_init_samples": 256}}},
         ""),
        ({"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 2e3}}},
         {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 2000}}}, ""),
        ({"initializer": {"range": {"num_init_samples": 0}}}, {}, ""),
        ({"initializer": {"precision": {"bits": [8]}}}, {}, ""),
        ({"validate_scopes": False}, {"validate_scopes": False}, ""),
    ],
)  # fmt: skip
def test_older_keys_of_quantization_are_taken(keys, today, warning: str, caplog) -> None:
    document = {**QUANTIZATION, **keys}
    before = json.dumps(document)
    assert load(document).compression == load({**QUANTIZATION, **today}).compression
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)
    assert json.dumps(document) == before
