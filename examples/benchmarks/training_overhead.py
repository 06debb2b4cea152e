"""What compression costs a training step: ResNet-20 masked against the untouched network, and the Trainer's callback.

    python examples/benchmarks/training_overhead.py [--rounds 30] [--batch-size 128] [--device cpu]
    python examples/benchmarks/training_overhead.py --report      # only writes the table anew

Four pairs, each timed in turn, so that a busy moment hits both; the figure is the median of the rounds' ratios. On a
CPU it is the process's CPU time, as other processes may take turns; on a GPU wall time. Images are noise: a step takes
as long as on CIFAR-10's.

- *before the first channel goes*: the controller at work, nothing masked, against the plain loop
- *masked*: half of the MACs masked, against the plain loop
- *after the cut*: the shrunk network with its controller, against the same network rebuilt from its plan
- *callback*: four steps of Hugging Face's Trainer with the callback and its loss function, after the cut, against the
  Trainer alone on the same network (transformers' ResNet with ResNet-20's blocks, at 128 x 128, as its stem divides
  the size by four)

Rounds are kept in ``training_overhead.jsonl``: a killed run goes on where it was.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from timm_import import let_torchvision_import
from torch import nn
from torch.nn.functional import cross_entropy

from nncf_compactprune import apply_plan, create_compressed_model
from nncf_compactprune.host.tensors import NNCF_HOOKS
from nncf_compactprune.run.networks.cifar_resnet import resnet20

HERE = Path(__file__).parent
RESULTS, REPORT = HERE / "training_overhead.jsonl", HERE / "training_overhead.md"
TARGETS = {"cpu": 1.10, "cuda": 1.03}
CONFIG: dict[str, Any] = {
    "input_info": {"sample_size": [1, 3, 32, 32]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "pruning_steps": 1},
    },
}
TRAINER_STEPS = 4
Step = Callable[[], None]


def stepper(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], ctrl: Any = None) -> tuple[Step, Any]:
    """One step of a plain loop, with the controller's calls where there is one."""
    images, labels = batch
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        if ctrl is not None:
            ctrl.scheduler.step()
        loss = cross_entropy(net(images), labels)
        if ctrl is not None:
            loss = loss + ctrl.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step, optimizer


def pairs(batch: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> Iterator[tuple[str, Step, Step]]:
    """Name, the untouched step, the step with compression."""
    dense = resnet20().to(device)
    for name, epochs in (("before the first channel goes", 1), ("masked", 2), ("after the cut", 2)):
        ctrl, net = create_compressed_model(copy.deepcopy(dense), CONFIG)
        step, optimizer = stepper(net, batch, ctrl)
        plain = copy.deepcopy(dense)
        if name == "after the cut":
            ctrl.attach(optimizer=optimizer)
        for _ in range(epochs):
            ctrl.scheduler.epoch_step()
        if name == "after the cut":
            apply_plan(plain, ctrl.algorithms[0].final_plan)  # type: ignore[attr-defined]
            assert NNCF_HOOKS not in net._modules
            assert "forward" not in net.__dict__
        yield name, stepper(plain, batch)[0], step
    yield "callback", *trainers(len(batch[1]), device)


def trainers(batch_size: int, device: torch.device) -> tuple[Step, Step]:
    """A few steps of a Trainer without and with the callback, as one timed step each."""
    let_torchvision_import()
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    from nncf_compactprune.integrations.huggingface import CompressionCallback, image_inputs

    data = [{"pixel_values": torch.randn(3, 128, 128), "labels": n % 10} for n in range(batch_size)]
    entry = {**CONFIG["compression"], "params": {"schedule": "one_shot"}}
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [3, 3, 3], "layer_type": "basic"}

    def steps(with_callback: bool) -> Step:
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig(**sizes, image_size=128, num_labels=10)).to(device)
        options: dict[str, Any] = {}
        if with_callback:
            callback = CompressionCallback(model, {"compression": entry})
            options = {"callbacks": [callback], "compute_loss_func": callback.compute_loss}
        else:
            create_compressed_model(model, {"compression": entry}, example_inputs=image_inputs(model))
        arguments = TrainingArguments(
            tempfile.mkdtemp(),
            max_steps=TRAINER_STEPS,
            per_device_train_batch_size=batch_size,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=data, **options)
        return lambda: trainer.train() and None

    return steps(False), steps(True)


def timed(step: Step, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    step()
    return clock() - started


def main(rounds: int = 30, batch_size: int = 128, device: str = "cpu", threads: int = 1, report: bool = False) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    key = {"device": device, "batch": batch_size, "threads": threads}
    if not report:
        batch = (torch.randn(batch_size, 3, 32, 32).to(device), torch.randint(0, 10, (batch_size,)).to(device))
        for name, plain, compressed in pairs(batch, torch.device(device)):
            have = sum(row["pair"] == name and key.items() <= row.items() for row in done)
            if have < rounds:
                for step in (plain, compressed, plain, compressed):
                    step()  # warm up
            for _ in range(have, rounds):
                row = {"pair": name, **key, "plain_s": timed(plain, device), "compressed_s": timed(compressed, device)}
                done.append(row)
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            print(name, "done", flush=True)
    write(done)


def write(rows: list[dict[str, Any]]) -> None:
    lines = [
        "# What compression costs a training step",
        "",
        f"ResNet-20, 32 x 32, SGD; torch {torch.__version__}. Written by `training_overhead.py`, which says what the "
        "pairs are.",
        "",
        "| device | threads | batch | phase | rounds | plain, ms | with compression, ms | ratio | quartiles | target |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    cases = dict.fromkeys((r["device"], r["threads"], r["batch"], r["pair"]) for r in rows)
    for case in cases:
        own = [r for r in rows if (r["device"], r["threads"], r["batch"], r["pair"]) == case]
        ratios = [r["compressed_s"] / r["plain_s"] for r in own]
        low, middle, high = statistics.quantiles(ratios, n=4)
        plain, compressed = (1000 * statistics.median(r[k] for r in own) for k in ("plain_s", "compressed_s"))
        lines.append(
            f"| {case[0]} | {case[1]} | {case[2]} | {case[3]} | {len(own)} | {plain:.1f} | {compressed:.1f} "
            f"| {middle:.3f} | {low:.3f} to {high:.3f} | {TARGETS[case[0]]:.2f} |"
        )
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    typer.run(main)
