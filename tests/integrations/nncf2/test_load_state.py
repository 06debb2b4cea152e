"""``load_state``: what fits is loaded, what does not is named."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.networks import images, model32
from torch import nn

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.integrations.nncf2 import NNCFConfig, create_compressed_model, load_state

CONFIG = {
    "input_info": {"sample_size": [2, 3, 12, 12]},
    "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"round_to": 1}},
}


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("nncf")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "nncf"):
        yield caplog
    logger.removeHandler(caplog.handler)


def compressed():
    return create_compressed_model(model32(), NNCFConfig.from_dict(CONFIG), dump_graphs=False)


def noisy():
    torch.manual_seed(5)
    model = model32()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def output(model):
    with torch.no_grad():
        return model.eval()(images(torch.float32))


@pytest.mark.parametrize("prefix", ["", "module.", "nncf_module.", "module.nncf_module."])
def test_prefixes_do_not_matter(prefix):
    source, target = noisy(), model32()
    state = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    assert load_state(target, state, is_resume=True) == len(state)
    assert torch.equal(output(source), output(target))
    wrapped = nn.DataParallel(model32())
    assert load_state(wrapped, state) == len(state)
    assert torch.equal(output(source), output(wrapped.module))


def test_dense_weights_go_into_a_masked_model_and_masks_stay(log):
    ctrl, model = compressed()
    ctrl.compression_rate = 0.4
    assert load_state(model, noisy().state_dict()) == len(noisy().state_dict())
    assert ctrl.compression_rate == 0.4
    assert "does not fit" not in log.text
    assert "Loaded" in log.text


def test_masks_come_with_a_checkpoint_and_go_with_one_that_has_none():
    ctrl, model = compressed()
    ctrl.compression_rate = 0.4
    state, before = copy.deepcopy(model.state_dict()), output(model)
    ctrl.compression_rate = 0.6
    load_state(model, state, is_resume=True)
    assert torch.equal(before, output(model))
    assert ctrl.compression_rate == pytest.approx(0.4, abs=0.05)
    load_state(model, model32().state_dict(), is_resume=True)
    assert ctrl.compression_rate == 0
    assert torch.equal(output(model32()), output(model))


def test_what_does_not_fit_is_named_and_nothing_is_loaded(log):
    source = noisy().state_dict()
    name = "head.weight"
    wrong = {**source, name: torch.zeros(2, 2), "extra.weight": torch.zeros(1)}
    del wrong["head.bias"]
    target = model32()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CompactPruneError) as caught:
        load_state(target, wrong, is_resume=True)
    for part in ("1 missing: head.bias", "1 unexpected: extra.weight", f"of another size: {name} (checkpoint [2, 2]"):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    assert load_state(target, wrong) == len(source) - 2
    assert "1 unexpected: extra.weight" in log.text
    assert load_state(target, wrong, True, [name, "extra.weight", "head.bias"]) == len(source) - 2


def test_a_cut_network_fits_only_one_that_was_cut_alike():
    ctrl, model = compressed()
    ctrl.prepare_for_export()
    with pytest.raises(CompactPruneError, match="pass its compression_state to create_compressed_model"):
        load_state(compressed()[1], model.state_dict(), is_resume=True)


def test_what_nncf2_kept_beside_the_weights_is_passed_over(log):
    source = noisy()
    state = {**source.state_dict(), "features.0.0.pre_ops.0.op.scale": torch.ones(4)}
    target = model32()
    assert load_state(target, state, is_resume=True) == len(state) - 1
    assert "1 tensors of NNCF 2.x's own quantizers" in log.text
    assert torch.equal(output(source), output(target))


def test_an_older_spelling_is_told_once(log):
    entry = {"algorithm": "filter_pruning", "params": {"pruning_target": 0.5, "weight_importance": "L1"}}
    config = NNCFConfig.from_dict({**CONFIG, "compression": entry})
    create_compressed_model(model32(), config, dump_graphs=False)
    assert log.text.count("an older spelling") == 1
    create_compressed_model(model32(), {**CONFIG, "compression": entry}, dump_graphs=False)
    assert log.text.count("an older spelling") == 2


def test_masks_of_a_finished_run_are_kept_where_filters_are_counted():
    """The level is told from the filters, not from the MACs that they save."""
    entry = {"algorithm": "filter_pruning", "params": {"pruning_target": 0.5, "pruning_steps": 1, "all_weights": True}}
    config = NNCFConfig.from_dict({**CONFIG, "compression": entry})
    ctrl, model = create_compressed_model(model32(), config, dump_graphs=False)
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # weights by which other filters would go
    again, other = create_compressed_model(model32(), config, dump_graphs=False)
    load_state(other, model.state_dict(), is_resume=True)
    assert again.compression_rate == pytest.approx(0.5)
    torch.testing.assert_close(output(again.strip()), output(model))
