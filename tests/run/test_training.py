"""The training loop computes what its few lines say, and its config keys are typed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from nncf_compactprune.config import Document, load_section
from nncf_compactprune.errors import ConfigError
from nncf_compactprune.run.settings import OptimizerConfig, RunConfig, unread_key_warnings
from nncf_compactprune.run.training import EpochRecord, class_scores, evaluate, fit, train_epoch

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def batches() -> Batches:
    """Two classes that a line through the origin divides."""
    inputs = torch.randn(24, 4)
    labels = (inputs[:, 0] > 0).long()
    return list(zip(inputs.split(8), labels.split(8), strict=True))


class RecordingController:
    """Counts the calls of an NNCF training loop, in their order; its loss pulls all weights to zero."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[str] = []
        self.scheduler = self

    def epoch_step(self) -> None:
        self.calls.append("epoch_step")

    def step(self) -> None:
        self.calls.append("step")

    def loss(self) -> torch.Tensor:
        self.calls.append("loss")
        return 100.0 * sum((p.square().sum() for p in self.model.parameters()), start=torch.zeros(()))


def run_config(**extra: object) -> RunConfig:
    return load_section(Document("c.json", {"compression": [], "dataset": "d", **extra}), RunConfig)


def test_fit_learns_and_reports_each_epoch(batches: Batches) -> None:
    model = nn.Linear(4, 2)
    seen: list[EpochRecord] = []
    records = fit(model, batches, torch.optim.SGD(model.parameters(), 1.0), epochs=20, on_epoch=seen.append)
    assert seen == records
    assert [record.epoch for record in records] == list(range(1, 21))
    assert records[-1].loss < records[0].loss / 2
    assert evaluate(model, batches) == 1.0


def test_one_epoch_is_the_written_out_sgd_steps(batches: Batches) -> None:
    model, oracle = nn.Linear(4, 2), nn.Linear(4, 2)
    oracle.load_state_dict(model.state_dict())
    loss, accuracy = train_epoch(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    losses, correct = [], 0
    for inputs, labels in batches:
        scores = oracle(inputs)
        step_loss = nn.functional.cross_entropy(scores, labels)
        gradients = torch.autograd.grad(step_loss, list(oracle.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(oracle.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        losses.append(step_loss.item())
        correct += int((scores.argmax(1) == labels).sum())
    torch.testing.assert_close(model.weight, oracle.weight)
    assert loss == pytest.approx(sum(losses) / 3)
    assert accuracy == pytest.approx(correct / 24)


def test_cosine_schedule_falls_from_the_given_rate(batches: Batches) -> None:
    model = nn.Linear(4, 2)
    records = fit(model, batches, torch.optim.SGD(model.parameters(), 0.5), epochs=4)
    expected = [0.25 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [record.lr for record in records] == pytest.approx(expected)
    records = fit(model, batches, torch.optim.SGD(model.parameters(), 0.5), epochs=3, lr_schedule="constant")
    assert [record.lr for record in records] == [0.5, 0.5, 0.5]


def test_autocast_runs_layers_in_bfloat16_and_trains_weights_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 2)]
    seen: list[tuple[torch.dtype, bool]] = []

    def look(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.append((output.dtype, args[0].is_contiguous(memory_format=torch.channels_last)))

    model[0].register_forward_hook(look)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model[0].weight.detach().clone()
    for autocast in (None, "bfloat16"):
        fit(model, batches, optimizer, epochs=1, autocast=autocast)  # type: ignore[arg-type]
    assert seen == [(torch.float32, False), (torch.bfloat16, True)]
    assert model[0].weight.dtype == torch.float32
    assert not torch.equal(model[0].weight, before)


def test_controller_is_stepped_as_in_nncf_samples_and_its_loss_is_added(batches: Batches) -> None:
    model = nn.Linear(4, 2)
    controller = RecordingController(model)
    fit(model, batches, torch.optim.SGD(model.parameters(), 1e-3), epochs=2, controller=controller)
    assert controller.calls == (["epoch_step"] + ["step", "loss"] * 3) * 2
    free = nn.Linear(4, 2)
    fit(free, batches, torch.optim.SGD(free.parameters(), 1e-3), epochs=2)
    assert model.weight.norm() < 0.6 * free.weight.norm()


def test_no_epochs_changes_nothing(batches: Batches) -> None:
    model = nn.Linear(4, 2)
    before = model.weight.clone()
    assert fit(model, batches, torch.optim.SGD(model.parameters(), 1.0), epochs=0) == []
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)


def test_evaluate_counts_by_hand_and_keeps_training_flags() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    model[0].eval()
    model[1].train()
    inputs = torch.eye(3).repeat(2, 1)
    assert evaluate(model, [(inputs[:4], torch.tensor([0, 1, 2, 1])), (inputs[4:], torch.tensor([1, 0]))]) == 4 / 6
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_class_scores_of_every_output_kind() -> None:
    scores = torch.rand(2, 3)
    for output in (scores, (scores, None), [scores], {"logits": scores, "hidden": None}):
        assert class_scores(output) is scores


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        (OptimizerConfig(lr=0.1), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
        (OptimizerConfig(type="sgd", momentum=0.0), torch.optim.SGD, {"momentum": 0.0}),
        (OptimizerConfig(type="adam", weight_decay=0.0), torch.optim.Adam, {"weight_decay": 0.0}),
        (OptimizerConfig(type="adamw", lr=1e-3), torch.optim.AdamW, {"lr": 1e-3}),
    ],
)
def test_optimizer_is_built_as_configured(
    config: OptimizerConfig, kind: type[torch.optim.Optimizer], expected: dict[str, float]
) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = config.build(model)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0].items() >= expected.items()
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before["weight"])
    assert torch.equal(model.bias, before["bias"])


def test_long_gradients_of_all_weights_together_are_scaled_down_to_the_norm() -> None:
    model = nn.Linear(2, 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = OptimizerConfig(lr=1.0, momentum=0.0, weight_decay=0.0, max_grad_norm=0.5).build(model)
    for gradient, length in ((30.0, 0.5), (0.01, 0.01 * 6**0.5)):
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.data.copy_(value)
            parameter.grad = torch.full_like(value, gradient)
        optimizer.step()
        moved = [p.detach() - value for p, value in zip(model.parameters(), before, strict=True)]
        assert torch.cat([step.flatten() for step in moved]).norm() == pytest.approx(length, rel=1e-4)


def test_momentum_of_adam_is_refused() -> None:
    with pytest.raises(ValidationError, match="'momentum' belongs to sgd, not to adam"):
        OptimizerConfig(type="adam", momentum=0.9)


def test_run_keys_are_read_from_the_open_top_level() -> None:
    run = run_config(model="m", epochs=3, export={"formats": ["onnx"]}, mine=1)
    assert (run.model, run.dataset, run.epochs, run.export.formats) == ("m", "d", 3, ("onnx",))
    assert run.export.precisions == ("fp32", "fp16")


def test_all_wrong_run_keys_are_told_at_once_with_their_paths() -> None:
    with pytest.raises(ConfigError) as caught:
        run_config(model="m", epochs=-1, optimizer={"type": "sdg", "rate": 1}, export={"formats": []})
    assert [problem.path for problem in caught.value.problems] == [
        "epochs",
        "optimizer.type",
        "optimizer.rate",
        "export.formats",
    ]
    assert "c.json: epochs: expected a whole number of at least 0, got -1." in str(caught.value)
    assert "Did you mean 'sgd'?" in str(caught.value)


def test_an_unknown_export_format_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"export\.formats: expected formats among .*onnx, .*'onxn'.* mean 'onnx'"):
        run_config(model="m", export={"formats": ["onxn"]})


def test_missing_model_is_told() -> None:
    with pytest.raises(ConfigError, match=r"c\.json: model: missing\. Expected a string\."):
        run_config()


def test_only_unread_keys_near_a_known_one_are_warned_about() -> None:
    warnings = unread_key_warnings(["epoch", "epochs", "input_inf", "print_freq", "compression"])
    assert warnings == [
        "'epoch' is not read. Did you mean 'epochs'?",
        "'input_inf' is not read. Did you mean 'input_info'?",
    ]
