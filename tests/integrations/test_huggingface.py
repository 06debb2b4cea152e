"""Hugging Face: pruned models in its format, and the Trainer with masks, shrinking, resuming, accumulation and AMP."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hugging_face import (
    LABELS,
    Watch,
    arguments,
    convnext,
    document,
    logits,
    mobilenet,
    resnet,
    trainer,
    vary,
    vit,
)
from support.regularizer import with_pull
from torch import nn

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.algorithms import CompressionStage
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf_hooks import hook_parameter
from nncf_compactprune.host.tensors import carries_hooks
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run.datasets import resolve_dataset

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed: transformers' Trainer needs it")

from nncf_compactprune.integrations.huggingface import (  # noqa: E402
    CHECKPOINTING,
    CompressionCallback,
    image_inputs,
    last_checkpoint,
)
from nncf_compactprune.integrations.pretrained import (  # noqa: E402
    dense_config,
    load_pruned_hf,
    save_pruned_hf,
)

STEPS = 4  # of an epoch: 64 images in batches of 16


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [resnet, mobilenet, convnext, vit])
def test_a_pruned_model_comes_back_bit_for_bit(build: Any, tmp_path: Path) -> None:
    model = vary(build())
    dense = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    before = model.config.to_dict()
    inputs = image_inputs(model)
    prune(model, inputs, budget={"macs": 0.6}, round_to=1, allow_approximate=build is convnext)
    save_pruned_hf(model, tmp_path)
    again = load_pruned_hf(tmp_path)
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    assert type(again) is type(model)
    assert not again.training
    assert again.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}
    assert (again.config.num_labels, again.config.id2label[3]) == (10, "digit 3")
    rebuilt = type(model)(dense_config(again.config))
    assert {name: tuple(parameter.shape) for name, parameter in rebuilt.named_parameters()} == dense
    said = before.keys() - {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in dense_config(again.config).to_dict().items() if k in said} == {k: before[k] for k in said}


def test_a_quantized_model_is_not_saved_without_its_quantizers(tmp_path: Path) -> None:
    model = vit()
    prune(model, image_inputs(model), budget={"macs": 0.8}, round_to=1)
    hook_parameter(model, "classifier.weight", torch.nn.Identity())
    with pytest.raises(CompactPruneError, match=r"save_pruned_hf: ViT.* carries NNCF hooks.*by save_pruned"):
        save_pruned_hf(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def bert() -> tuple[Any, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, **sizes)
    return transformers.BertForMaskedLM(config), {"input_ids": torch.randint(0, 50, (2, 8))}


def t5() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50)
    words = torch.randint(0, 50, (2, 8))
    return transformers.T5ForConditionalGeneration(config), {"input_ids": words, "decoder_input_ids": words}


def whisper() -> tuple[Any, dict[str, torch.Tensor]]:
    halves = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in SIZES.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    config = transformers.WhisperConfig(d_model=32, vocab_size=60, **halves, **tokens, **lengths)
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, 50, (2, 8))}
    return transformers.WhisperForConditionalGeneration(config), inputs


SIZES = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}


@pytest.mark.parametrize("build", [bert, t5, whisper])
def test_tied_weights_come_back_tied(build: Any, tmp_path: Path) -> None:
    model, inputs = build()
    model.eval()
    prune(model, inputs, budget={"params": 0.8}, round_to=1)
    save_pruned_hf(model, tmp_path)
    again = load_pruned_hf(tmp_path)
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_pruned_for_some_classes_the_model_counts_them_anew(tmp_path: Path) -> None:
    """Its own loss reshapes the scores by the config's count."""
    model = vary(resnet())
    inputs = image_inputs(model)
    pixels = torch.randn(40, *inputs["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(0))
    loader = [{"pixel_values": pixels, "labels": torch.arange(40) % 10}]
    prune(model, inputs, "catro", budget={"macs": 0.7}, train_loader=loader, classes=[3, 8], round_to=1)
    assert (model.num_labels, model.config.id2label) == (2, {0: "digit 3", 1: "digit 8"})
    assert torch.isfinite(model(pixels[:6], labels=torch.tensor([0, 1, 0, 1, 1, 1])).loss)

    save_pruned_hf(model, tmp_path)
    again = load_pruned_hf(tmp_path)
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    assert (again.num_labels, again.config.id2label) == (2, {0: "digit 3", 1: "digit 8"})
    assert dense_config(again.config).id2label == LABELS["id2label"]


def test_fields_borne_out_by_the_network_are_rewritten_and_plain_from_pretrained_loads_it(
    tmp_path: Path,
) -> None:
    model = vit()
    inputs = image_inputs(model)
    mlp = {"target_scopes": ["{re}.*fc1"]}
    prune(model, inputs, budget={"params": 0.8}, allocation="uniform", round_to=1, **mlp)
    save_pruned_hf(model, tmp_path)
    width = model.config.intermediate_size
    assert width < 64
    assert model.config.compactprune["dense"] == {"intermediate_size": 64}
    assert model.config.compactprune["plain"] is True
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(plain, inputs), logits(model, inputs))


def test_heads_are_stated_but_the_config_alone_does_not_build_them(tmp_path: Path) -> None:
    model = vit()
    inputs = image_inputs(model)
    heads = {"target_scopes": ["{re}.*[qkv]_proj"]}
    prune(model, inputs, budget={"params": 0.9}, allocation="uniform", round_to=1, **heads)
    save_pruned_hf(model, tmp_path)
    assert model.config.num_attention_heads < 4
    assert model.config.compactprune["plain"] is False
    assert torch.equal(logits(load_pruned_hf(tmp_path), inputs), logits(model, inputs))


def test_widths_that_differ_between_layers_leave_the_field_dense() -> None:
    model = vit()
    for layer, block in enumerate(m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 64):
        with torch.no_grad():
            block.weight.mul_(10.0**layer)  # so that a threshold for all layers cuts the first alone
    from nncf_compactprune.integrations.pretrained import describe

    prune(model, image_inputs(model), budget={"params": 0.85}, allocation="greedy", importance="l1", round_to=1)
    describe(model)
    widths = {m.out_features for n, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in n}
    assert len(widths - {32}) > 1
    assert model.config.intermediate_size == 64


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    model = vary(resnet())
    with pytest.raises(CompactPruneError, match=r"expected a pruned PreTrainedModel"):
        save_pruned_hf(model, tmp_path)
    with pytest.raises(CompactPruneError, match=r"config\.json: no such file"):
        load_pruned_hf(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(CompactPruneError, match=r"does not describe a pruned model"):
        load_pruned_hf(tmp_path)
    prune(model, image_inputs(model), budget={"macs": 0.6}, round_to=1)
    save_pruned_hf(model, tmp_path)
    plan = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(plan.replace("fbnet_pruning", "other"))
    with pytest.raises(CompactPruneError, match=r"is not the plan that the config names"):
        load_pruned_hf(tmp_path)
    (tmp_path / "plan.json").write_text(plan)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, weights, metadata={"format": "pt"})
    with pytest.raises(CompactPruneError, match=r"does not hold the weights.*missing_keys.*classifier\.1\.bias"):
        load_pruned_hf(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CompactPruneError, match=r"cannot be loaded into the pruned ResNet"):
        load_pruned_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["os"]}))
    with pytest.raises(CompactPruneError, match=r'names the class "os"'):
        load_pruned_hf(tmp_path)


# -- in the Trainer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples() -> list[dict[str, torch.Tensor]]:
    data = resolve_dataset("digits")
    return [{"pixel_values": image, "labels": label} for image, label in (data.train[n] for n in range(96))]


def test_it_shrinks_while_training_and_the_best_model_is_a_pruned_one(examples: Any, tmp_path: Path) -> None:
    model, watch = resnet(), Watch()
    dense = sum(p.numel() for p in model.parameters())
    callback = CompressionCallback(model, document())
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "logging_steps": 2}
    run = trainer(model, callback, examples, tmp_path, watch, metric_for_best_model="eval_loss", **options)
    run.train()
    assert watch.sizes[:2] == [dense, dense]
    assert watch.sizes[2] == watch.sizes[3] < dense
    assert callback.controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert run.state.best_global_step in (3 * STEPS, 4 * STEPS)
    assert "__nncf_hooks" not in model._modules
    logs = [entry["compression_rate"] for entry in run.state.log_history if "loss" in entry]
    assert logs[0] == 0
    assert logs[-1] == pytest.approx(0.5, abs=1e-3)
    state = run.optimizer.optimizer.state
    assert all(state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    run.save_model()
    inputs = image_inputs(model)
    assert torch.equal(logits(load_pruned_hf(tmp_path), inputs), logits(model, inputs))
    best = load_pruned_hf(run.state.best_model_checkpoint)
    assert torch.equal(logits(best, inputs), logits(model, inputs))


def test_a_best_dense_checkpoint_is_no_candidate(examples: Any, tmp_path: Path) -> None:
    model, measured = resnet(), iter([0.9, 0.8, 0.1, 0.2, 0.1])
    callback = CompressionCallback(model, document())
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    run = trainer(model, callback, examples, tmp_path, **options, metric_for_best_model="m", num_train_epochs=5)
    run.compute_metrics = lambda _: {"m": next(measured)}
    run.train()
    assert run.state.best_global_step == 4 * STEPS
    inputs = image_inputs(model)
    assert torch.equal(logits(load_pruned_hf(tmp_path / "checkpoint-16"), inputs), logits(model, inputs))


def test_one_shot_prunes_before_the_optimizer_exists(examples: Any, tmp_path: Path) -> None:
    model = resnet()
    dense = sum(p.numel() for p in model.parameters())
    batches = [{"pixel_values": torch.stack([e["pixel_values"] for e in examples])}]
    callback = CompressionCallback(model, document("one_shot"), batches)
    assert sum(p.numel() for p in model.parameters()) < dense
    assert "compactprune" in model.config.to_dict()
    trainer(model, callback, examples, tmp_path, num_train_epochs=1).train()


@pytest.mark.parametrize(
    ("build", "stop_after", "params"),
    [(vit, STEPS + 2, {}), (resnet, 3 * STEPS + 2, {}), (resnet, STEPS + 2, {"shrink_every": 1})],
    ids=["vit, masked", "resnet, cut", "resnet, cut on the way"],
)
def test_a_run_that_ended_early_goes_on_to_the_same_weights(
    build: Any, stop_after: int, params: dict[str, Any], examples: Any, tmp_path: Path
) -> None:
    whole = build()
    first = copy.deepcopy(whole.state_dict())
    trainer(whole, CompressionCallback(whole, document(**params)), examples, tmp_path / "whole").train()

    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    cut = build()
    cut.load_state_dict(first)
    with pytest.raises(KeyboardInterrupt):
        trainer(
            cut, CompressionCallback(cut, document(**params)), examples, tmp_path / "cut", Watch(stop_after), **options
        ).train()
    last = last_checkpoint(tmp_path / "cut")
    assert last is not None
    assert last.endswith(f"checkpoint-{stop_after}")
    torch.manual_seed(5)
    again = build()  # other weights: everything must come from the checkpoint
    callback = CompressionCallback(again, document(**params), resume_from_checkpoint=last)
    trainer(again, callback, examples, tmp_path / "cut", **options).train(resume_from_checkpoint=last)
    assert again.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


def test_damaged_checkpoints_are_passed_over_and_reported(
    examples: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = resnet()
    callback = CompressionCallback(model, document())
    trainer(model, callback, examples, tmp_path, save_strategy="epoch", num_train_epochs=3).train()
    weights = tmp_path / f"checkpoint-{3 * STEPS}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    (tmp_path / f"checkpoint-{2 * STEPS}" / "compression_state.json").unlink()  # killed while saving
    (tmp_path / "checkpoint-old").mkdir()
    with caplog.at_level("WARNING", logger="nncf"):
        assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")
    assert "model.safetensors changed since it was saved" in caplog.text
    assert "did not come to its end" in caplog.text
    assert last_checkpoint(tmp_path / "nothing") is None
    with pytest.raises(CompactPruneError, match=r"compression_state\.json: no such file"):
        CompressionCallback(resnet(), document(), resume_from_checkpoint=tmp_path / f"checkpoint-{2 * STEPS}")


@pytest.fixture
def pull() -> Plugins:
    return with_pull()


def tiny_bert(kind: str) -> Any:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("kind", ["BertForTokenClassification", "BertForMaskedLM", "BertForSequenceClassification"])
def test_the_models_own_loss_is_what_the_model_gives(kind: str, pull: Plugins) -> None:
    model = tiny_bert(kind)
    callback = CompressionCallback(model, {"compression": {"algorithm": "pull"}}, plugins=pull)
    words = torch.randint(0, 50, (2, 7))
    labels = torch.randint(0, 3, (2,) if "Sequence" in kind else (2, 7))
    given = model(input_ids=words, labels=labels)
    torch.testing.assert_close(callback.compute_loss(model(input_ids=words), labels), given.loss)


def test_a_loss_of_more_than_logits_asks_for_one(pull: Plugins) -> None:
    model = tiny_bert("BertForQuestionAnswering")
    callback = CompressionCallback(model, {"compression": {"algorithm": "pull"}}, plugins=pull)
    outputs = {"logits": torch.zeros(2, 7)}
    with pytest.raises(CompactPruneError, match=r"loss of BertForQuestionAnswering is not one of .* Give task_loss"):
        callback.compute_loss(outputs, torch.zeros(2, dtype=torch.long))


def test_accumulated_batches_make_the_gradient_of_one_large_batch(examples: Any, tmp_path: Path, pull: Plugins) -> None:
    weights = []
    torch.manual_seed(0)
    start = vit().state_dict()
    for size, steps in ((24, 1), (8, 3), (16, 2)):
        model = vit()
        model.load_state_dict(start)
        callback = CompressionCallback(model, {"compression": {"algorithm": "pull"}}, plugins=pull)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_train_epochs": 1}
        run = trainer(model, callback, examples, tmp_path, **options, optim="sgd", learning_rate=0.5, max_grad_norm=0.0)
        run.train_dataset = examples[:24]  # batches of 16 and 8 in the last case: not of equal size
        run.train()
        assert run.state.global_step == 1
        assert run.state.log_history[0]["compression_loss"] > 0
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    moved = float((weights[0] - torch.cat([v.flatten() for k, v in start.items()])).abs().max())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-5 * moved)


def test_mixed_precision_shrinks_and_exports_in_float32(examples: Any, tmp_path: Path) -> None:
    from nncf_compactprune import export_model

    model = resnet()
    callback = CompressionCallback(model, document())
    run = trainer(model, callback, examples, tmp_path, bf16=True, use_cpu=True, num_train_epochs=3)
    run.train()
    assert callback.controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert "forward" not in model.__dict__
    assert "__nncf_hooks" not in model._modules
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    inputs = image_inputs(model)
    assert logits(model, inputs).dtype == torch.float32
    file = export_model(model, inputs, tmp_path / "model.onnx")[0]
    assert file.verification.max_rel_error < 1e-5
    import onnx

    graph = onnx.load(file.path).graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (["pixel_values"], ["logits"])


def test_mistakes_are_told_before_they_cost_anything(examples: Any, tmp_path: Path, pull: Plugins) -> None:
    model = resnet()
    callback = CompressionCallback(model, document())
    with pytest.raises(CompactPruneError, match="made for another model"):
        trainer(resnet(), callback, examples, tmp_path).train()
    with pytest.raises(CompactPruneError, match=r'torch_compile does not see masks.*"one_shot"'):
        callback.on_train_begin(
            dataclasses.replace(arguments(tmp_path), torch_compile=True), transformers.TrainerState(), None, model=model
        )
    checkpointing = arguments(tmp_path)
    name = next(name for name in CHECKPOINTING if hasattr(checkpointing, name))
    setattr(checkpointing, name, True)
    with pytest.raises(CompactPruneError, match=r'gradient checkpointing runs layers again without.*"one_shot"'):
        callback.on_train_begin(checkpointing, transformers.TrainerState(), None, model=model)
    shrinking = CompressionCallback(resnet(), document(shrink_every=1))
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(CompactPruneError, match=r"wrapper holds the network on several devices.*'shrink_every'"):
        shrinking.on_train_begin(several, transformers.TrainerState(), None, model=shrinking._model)
    resumed = transformers.TrainerState(global_step=3)
    with pytest.raises(CompactPruneError, match="resumes at step 3, but the callback was made without"):
        callback.on_train_begin(arguments(tmp_path), resumed, None, model=model)
    plain = resnet()
    silent = CompressionCallback(plain, {"compression": {"algorithm": "pull"}}, plugins=pull)
    run = transformers.Trainer(plain, arguments(tmp_path), train_dataset=examples[:64], callbacks=[silent])
    with pytest.raises(CompactPruneError, match=r"'pull' adds to the loss.*compute_loss_func=callback\.compute_loss"):
        run.train()


def test_a_loop_of_accelerate(examples: Any) -> None:
    """accelerate wraps model and optimizer; the controller is given what is inside."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before, as the Trainer does
    model = resnet()
    dense = sum(p.numel() for p in model.parameters())
    inputs = image_inputs(model)
    ctrl, model = create_compressed_model(model, document(), example_inputs=inputs)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    loader = torch.utils.data.DataLoader(examples[:64], 16)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3), loader)
    ctrl.attach(optimizer=optimizer.optimizer)
    for _ in range(4):
        ctrl.scheduler.epoch_step()
        model.train()
        for batch in loader:
            ctrl.scheduler.step()
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss + ctrl.loss())
            optimizer.step()
    ctrl.strip()
    inside = accelerator.unwrap_model(model)
    assert sum(p.numel() for p in inside.parameters()) < dense
    assert not carries_hooks(inside)
    assert torch.isfinite(logits(inside, inputs)).all()


class Stream(torch.utils.data.IterableDataset):
    """Examples without a length, as a stream of a data set gives them."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __iter__(self) -> Any:
        return iter(self.examples)


def test_a_stream_of_examples_has_epochs_too(examples: Any, tmp_path: Path) -> None:
    model, watch = vary(resnet()), Watch()
    callback = CompressionCallback(model, document())
    loop = trainer(model, callback, examples, tmp_path, watch, max_steps=4 * STEPS)
    loop.train_dataset = Stream(examples[:64])
    loop.train()
    assert callback.controller.scheduler.current_epoch == 3
    assert watch.sizes[-1] < watch.sizes[0], "the schedule of two epochs came to its end while the model trained"
