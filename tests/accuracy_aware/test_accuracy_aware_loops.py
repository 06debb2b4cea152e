"""The accuracy-aware loops: what they find, in which steps, what they write, and that they go on after a kill."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import images, labelled_batches, model32

from nncf_compactprune import create_compressed_model as create_native
from nncf_compactprune.channels import trace
from nncf_compactprune.errors import CompactPruneError, ConfigError
from nncf_compactprune.integrations.nncf2 import (
    AdaptiveCompressionTrainingLoop,
    EarlyExitCompressionTrainingLoop,
    NNCFConfig,
    create_accuracy_aware_training_loop,
    create_compressed_model,
    load_state,
    register_default_init_args,
)

ENTRIES = {
    "fbnet_pruning": {
        "budget": {"macs": 0.6},
        "params": {"round_to": 1, "pruning_steps": 1},
    },
    "filter_pruning": {
        "params": {"pruning_target": 0.4, "pruning_steps": 1, "all_weights": True, "prune_first_conv": True},
    },
    "magnitude_sparsity": {
        "params": {"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.1, 0.4]},
    },
}


def config(mode="adaptive_compression_level", algorithm="fbnet_pruning", **params):
    defaults = {"maximal_absolute_accuracy_degradation": 12.1}
    if mode == "adaptive_compression_level":
        defaults |= {"initial_training_phase_epochs": 2, "patience_epochs": 2, "maximal_total_epochs": 40}
    else:
        defaults |= {"maximal_total_epochs": 6}
    if "maximal_relative_accuracy_degradation" in params:
        defaults.pop("maximal_absolute_accuracy_degradation")
    return NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": [2, 3, 12, 12]},
            "compression": {"algorithm": algorithm, **ENTRIES[algorithm]},
            "accuracy_aware_training": {"mode": mode, "params": {**defaults, **params}},
        }
    )


class Script:
    """A training script: real training steps, an accuracy that falls with the compression rate."""

    def __init__(self, nncf_config, *, slope=20.0, kill_at=None):
        self.config, self.slope, self.kill_at = nncf_config, slope, kill_at
        self.lines, self.rates, self.learning_rates = [], [], []
        torch.manual_seed(3)
        self.ctrl, self.model = create_compressed_model(model32(), nncf_config, dump_graphs=False)

    def loop(self, **arguments):
        return create_accuracy_aware_training_loop(
            self.config, self.ctrl, 90.0, verbose=False, log=self.lines.append, **arguments
        )

    def run(self, log_dir, loop=None, **arguments):
        functions = {
            "train_epoch_fn": self.train_epoch,
            "validate_fn": self.validate,
            "configure_optimizers_fn": self.configure,
            **arguments,
        }
        loop = loop or self.loop()
        assert loop.run(self.model, log_dir=log_dir, **functions) is self.model
        return loop

    def train_epoch(self, ctrl, model, epoch, optimizer, lr_scheduler):
        if epoch == self.kill_at:
            raise KeyboardInterrupt
        self.rates.append(round(ctrl.compression_rate, 4))
        self.learning_rates.append(optimizer.param_groups[0]["lr"])
        model.train()
        total = 0.0
        for inputs, labels in labelled_batches()[:1]:
            ctrl.scheduler.step()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs + torch.randn(inputs.shape) * 0.01), labels) + ctrl.loss()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    def validate(self, model, epoch):
        assert not torch.is_grad_enabled()
        return 90.0 - self.slope * self.ctrl.compression_rate

    def configure(self):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def output(model):
    with torch.no_grad():
        return model.eval()(images(torch.float32))


@pytest.mark.parametrize("algorithm", list(ENTRIES))
def test_the_search_finds_the_largest_rate_that_holds(algorithm, tmp_path):
    script = Script(config(algorithm=algorithm))
    loop = script.run(tmp_path)
    assert isinstance(loop, AdaptiveCompressionTrainingLoop)
    # The drop is 20 a unit of rate and 12.1 is allowed: 0.605 at most.
    assert 0.55 < script.ctrl.compression_rate <= 0.605
    assert loop.statistics.accuracy_budget >= 0
    assert loop.statistics.compression_rate == script.ctrl.compression_rate
    assert [rate for rate in dict.fromkeys(script.rates) if rate > 0.45][:3] == pytest.approx([0.5, 0.6, 0.7])
    small, masked = script.ctrl.strip(), output(script.model)
    torch.testing.assert_close(output(small), masked, rtol=1e-5, atol=1e-6)
    if algorithm != "magnitude_sparsity":
        assert trace(small, images(torch.float32)).params < 0.7 * trace(model32(), images(torch.float32)).params
    names = {path.name for path in loop.log_dir.glob("*.pth")}
    assert {"acc_aware_checkpoint_last.pth", "acc_aware_checkpoint_best_uncompressed.pth"} <= names
    assert "acc_aware_checkpoint_best_0.600.pth" in names
    assert not (loop.log_dir / "snapshots").exists()


def test_every_turn_of_the_search_is_nncfs(tmp_path):
    script = Script(config(initial_training_phase_epochs=1, lr_reduction_factor=0.1))
    script.run(tmp_path)
    # Up by 0.1 while it holds; two epochs of patience where it does not. At a turn the step is halved, and the learning
    # rate is a tenth. In the only epoch of the initial phase the schedule is at 0.
    expected = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.65, 0.65, 0.6, 0.625, 0.625, 0.6125]
    assert script.rates == pytest.approx(expected)
    assert script.learning_rates == pytest.approx([1e-2] * 9 + [1e-3] * 3 + [1e-4] * 2 + [1e-5])
    changes = [line for line in script.lines if line.startswith("Rate ")]
    assert "Rate 0.700 does not hold the accuracy: next 0.650, step 0.100 -> 0.050" in changes
    assert script.lines[-1] == "Result: rate 0.600, accuracy 78.0000"


@pytest.mark.parametrize("searching", [True, False])
def test_a_training_that_was_killed_goes_on(searching, tmp_path):
    nncf_config = config() if searching else config("early_exit", maximal_absolute_accuracy_degradation=2.0)
    whole = Script(nncf_config)
    loop = whole.run(tmp_path / "whole")
    for kill_at in (1, 4, len(whole.rates) - 1):
        killed = Script(nncf_config, kill_at=kill_at)
        first = killed.loop()
        with pytest.raises(KeyboardInterrupt):
            killed.run(tmp_path / str(kill_at), first)
        again = Script(nncf_config)
        torch.manual_seed(99)  # another process: nothing of the first one's random state is left
        second = again.run(None, resume_from=first.log_dir)
        assert killed.rates + again.rates == whole.rates
        assert second.epochs == loop.epochs
        assert torch.equal(output(again.model), output(whole.model))
        assert any(line.startswith(f"Going on after epoch {kill_at}") for line in again.lines)
    with pytest.raises(CompactPruneError, match="holds no training to go on with"):
        Script(nncf_config).run(None, resume_from=tmp_path)


def test_early_exit_ends_as_soon_as_the_compressed_model_is_good_enough(tmp_path):
    script = Script(config("early_exit"))
    script.validate = lambda model, epoch: 70.0 + 3 * epoch  # 78 are asked for
    loop = script.run(tmp_path)
    assert type(loop) is EarlyExitCompressionTrainingLoop
    assert [result.epoch for result in loop.epochs] == [0, 1, 2, 3]
    assert [result.holds for result in loop.epochs] == [False, False, False, True]
    checkpoint = torch.load(loop.log_dir / "acc_aware_checkpoint_best.pth", weights_only=True)
    assert {"epoch", "state_dict", "compression_state", "best_metric_val", "current_val_metric_value", "optimizer"} == {
        *checkpoint
    }
    again, resumed = create_compressed_model(
        model32(), script.config, compression_state=checkpoint["compression_state"], dump_graphs=False
    )
    load_state(resumed, checkpoint["state_dict"], is_resume=True)
    assert torch.equal(output(resumed), output(script.model))
    assert again.compression_rate == script.ctrl.compression_rate


def test_early_exit_returns_the_best_compressed_model_where_none_is_good_enough(tmp_path):
    script = Script(config("early_exit"))
    kept = {}

    def validate(model, epoch):
        kept[epoch] = output(model)
        return 60.0 + [0, 9, 3, 5, 4, 2, 1][epoch]  # epoch 1 is not fully compressed

    script.validate = validate
    script.run(tmp_path)
    assert torch.equal(output(script.model), kept[3])
    assert any("no compressed model holds the accuracy" in line for line in script.lines)


def test_patience_and_early_stopping_decide_how_long_a_rate_is_trained(tmp_path):
    script = Script(config(patience_epochs=3, maximal_total_epochs=9))
    script.validate = lambda model, epoch: 0.0
    script.run(tmp_path / "a")
    assert script.rates[2:] == pytest.approx([0.3, 0.3, 0.3, 0.2, 0.2, 0.2, 0.1], abs=0.02)
    script = Script(config(patience_epochs=3, maximal_total_epochs=6))
    script.validate = lambda model, epoch: 0.0
    script.run(tmp_path / "b", early_stopping_fn=lambda accuracy: accuracy == 0)
    assert script.rates[2:] == pytest.approx([0.3, 0.2, 0.1, 0.0], abs=0.02)


def test_the_search_ends_at_what_the_algorithm_can(tmp_path):
    script = Script(config(initial_compression_rate_step=0.4))
    most = script.ctrl.maximal_compression_rate
    script.validate = lambda model, epoch: 90.0
    script.run(tmp_path)
    assert script.ctrl.compression_rate == pytest.approx(min(most, 0.95))
    assert any("largest possible rate" in line for line in script.lines)


def test_the_scripts_own_functions_are_called_as_nncf_calls_them(tmp_path):
    script = Script(config("early_exit", maximal_absolute_accuracy_degradation=0.0, maximal_total_epochs=3))
    dumped, loaded, updates, scalars = [], [], [], []

    class Writer:
        def add_scalar(self, name, value, step):
            scalars.append((name, step))

    def dump(model, ctrl, runner, directory):
        dumped.append((runner.cumulative_epoch_count, runner.current_val_metric_value, runner.best_val_metric_value))
        assert directory == runner.directory
        assert ctrl is script.ctrl

    def load(model, path):
        loaded.append(path.name)
        load_state(model, torch.load(path, weights_only=True)["state_dict"], is_resume=True)

    script.run(
        tmp_path,
        create_accuracy_aware_training_loop(script.config, script.ctrl, 90.0),
        dump_checkpoint_fn=dump,
        load_checkpoint_fn=load,
        update_learning_rate_fn=lambda scheduler, epoch, accuracy, loss: updates.append((epoch, accuracy, loss > 0)),
        tensorboard_writer=Writer(),
    )
    assert [epoch for epoch, _, _ in dumped] == [0, 1, 2, 3]
    assert [epoch for epoch, _, _ in updates] == [1, 2, 3]
    assert loaded == ["acc_aware_checkpoint_best.pth"]
    assert ("val/accuracy_aware/metric_value", 3) in scalars


def test_the_uncompressed_accuracy_comes_from_the_registered_function(tmp_path):
    nncf_config = config()
    dense = output(model32())
    register_default_init_args(
        nncf_config, labelled_batches(), model_eval_fn=lambda model: 7.0 * torch.equal(output(model), dense)
    )
    script = Script(nncf_config)
    loop = create_accuracy_aware_training_loop(nncf_config, script.ctrl)
    assert loop.runner.uncompressed_model_accuracy == 7.0
    script.ctrl.scheduler.epoch_step()
    with pytest.raises(CompactPruneError, match="the model was trained already"):
        create_accuracy_aware_training_loop(nncf_config, script.ctrl)


def test_what_cannot_be_searched_is_refused():
    nncf_config = config()
    two = copy.deepcopy(nncf_config)
    two["compression"] = [{"algorithm": name, **ENTRIES[name]} for name in ("fbnet_pruning", "magnitude_sparsity")]
    ctrl, _ = create_compressed_model(model32(), two, dump_graphs=False)
    with pytest.raises(CompactPruneError, match="got fbnet_pruning, magnitude_sparsity"):
        create_accuracy_aware_training_loop(two, ctrl, 1.0)
    ctrl.prepare_for_export()
    del two["accuracy_aware_training"]
    with pytest.raises(ConfigError, match="accuracy_aware_training: missing"):
        create_accuracy_aware_training_loop(two, ctrl, 1.0)
    once = {**nncf_config, "compression": {**nncf_config["compression"], "params": {"schedule": "one_shot"}}}
    del once["accuracy_aware_training"]
    ctrl, _ = create_native(model32(), once)
    with pytest.raises(CompactPruneError, match="has cut the model already"):
        create_accuracy_aware_training_loop(nncf_config, ctrl, 1.0)
