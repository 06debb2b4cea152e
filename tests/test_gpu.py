"""The core path on a CUDA device: prune, mask, shrink, mixed precision, channels_last, compile, export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.networks import trained
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from nncf_compactprune import create_compressed_model, export_model, load_pruned, prune, save_pruned
from nncf_compactprune.run.pipeline import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG = {
    "input_info": {"sample_size": [2, 3, 12, 12]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "num_init_steps": 1, "pruning_steps": 2, "round_to": 1},
    },
}


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 12, 12, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(count)
    ]


def on_gpu(name: str = "residual") -> nn.Module:
    return trained(name, dtype=torch.float32).cuda()


@pytest.mark.parametrize("name", ["residual", "depthwise", "plain"])
def test_pruned_on_the_device_reloads_on_the_cpu(name: str, tmp_path: Path) -> None:
    model, x = on_gpu(name), torch.randn(2, 3, 12, 12)
    result = prune(model, x.cuda(), budget={"macs": 0.5}, round_to=1, train_loader=batches())
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert result.self_check is not None
    save_pruned(model, tmp_path)
    again = load_pruned(trained(name, dtype=torch.float32), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), model.eval()(x.cuda()).cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_scheduled_run_in_mixed_precision(
    dtype: torch.dtype, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    model = on_gpu().to(memory_format=memory_format)
    ctrl, model = create_compressed_model(model, CONFIG, train_loader=batches())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    ema = AveragedModel(model, use_buffers=True)
    ctrl.attach(optimizer=optimizer, ema=ema)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    sizes = []
    for _ in range(5):
        ctrl.scheduler.epoch_step()
        model.train()
        for images, labels in batches():
            ctrl.scheduler.step()
            images = images.cuda().to(memory_format=memory_format)
            with torch.autocast("cuda", dtype):
                scores = model(images)
            loss = cross_entropy(scores.float(), labels.cuda()) + ctrl.loss()
            assert torch.isfinite(loss)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            ema.update_parameters(model)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[2] > sizes[3] == sizes[4] == sum(parameter.numel() for parameter in ema.parameters())
    assert "__nncf_hooks" not in model._modules
    if memory_format is torch.channels_last:
        weights = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    file = export_model(ctrl.strip(), torch.randn(2, 3, 12, 12).cuda(), tmp_path / "model.onnx")[0]
    assert file.verification.max_rel_error < 1e-5


def test_masked_is_compact_on_the_device() -> None:
    model = on_gpu()
    ctrl, model = create_compressed_model(model, CONFIG)
    for _ in range(4):
        ctrl.scheduler.epoch_step()
    x = torch.randn(4, 3, 12, 12).cuda()
    with torch.no_grad():
        masked = copy.deepcopy(model.eval()(x))
        torch.testing.assert_close(ctrl.strip().eval()(x), masked, rtol=1e-3, atol=1e-4)


def test_compiled_after_the_cut() -> None:
    model, x = on_gpu(), torch.randn(4, 3, 12, 12).cuda()
    prune(model, x, budget={"macs": 0.5}, round_to=1)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model.eval())(x), model(x), rtol=1e-3, atol=1e-3)


def test_a_run_trains_on_the_device_and_its_files_hold(tmp_path: Path) -> None:
    said: list[str] = []
    changes = {"epochs": 2, "pretrain_epochs": 1, "output_dir": str(tmp_path / "run")}
    before = torch.cuda.max_memory_allocated()
    outcome = run(CONFIGS / "digits_fbnet.json", overrides=changes, say=said.append)
    assert torch.cuda.max_memory_allocated() > before
    assert outcome.plan.after.macs < outcome.plan.before.macs
    assert (tmp_path / "run" / "plan.json").is_file()
