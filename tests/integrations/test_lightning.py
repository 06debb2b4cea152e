"""Lightning's Trainer with the callback: masks, shrinking, resuming, accumulation, mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.regularizer import with_pull
from torch import nn

from nncf_compactprune.algorithms import CompressionStage
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.tensors import carries_hooks
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run.datasets import resolve_dataset

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from nncf_compactprune.integrations.lightning import CompressionCallback  # noqa: E402

DOCUMENT = {
    "input_info": {"sample_size": [1, 1, 16, 16]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "round_to": 1, "pruning_steps": 2},
    },
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Conv2d(1, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)]
        self.features = nn.Sequential(*wide, nn.ReLU())
        self.classifier = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Digits(pl.LightningModule):
    def __init__(self, net: nn.Module, compression: Any = None) -> None:
        super().__init__()
        self.net, self.compression = net, compression

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss if self.compression is None else loss + self.compression.loss()

    def validation_step(self, batch: Any, _: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), 1e-2)


class Watch(pl.Callback):
    def __init__(self, file: Path | None = None, save_after: int | None = None) -> None:
        self.file, self.save_after, self.sizes, self.rates = file, save_after, [], []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.sizes.append(sum(p.numel() for p in pl_module.net.parameters()))
        self.rates.append(float(trainer.callback_metrics["compression_rate"]))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.file)


@pytest.fixture(scope="module")
def loader() -> Any:
    data = resolve_dataset("digits").train
    return torch.utils.data.DataLoader([data[n] for n in range(64)], 16)  # 4 batches


def trainer(*callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | {"max_epochs": 4} | options))


def document(**params: Any) -> dict[str, Any]:
    result = copy.deepcopy(DOCUMENT)
    result["compression"]["params"] |= params
    return result


def test_it_shrinks_while_training_and_leaves_no_hooks(loader: Any) -> None:
    net, watch = Net(), Watch()
    dense = sum(p.numel() for p in net.parameters())
    callback = CompressionCallback(net, DOCUMENT)
    run = trainer(callback, watch)
    run.fit(Digits(net, callback), loader)
    assert watch.sizes[:2] == [dense, dense]
    assert watch.sizes[2] == watch.sizes[3] < dense
    assert watch.rates[0] == 0
    assert watch.rates[-1] == pytest.approx(0.5, abs=0.05)
    assert callback.controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert not carries_hooks(net)
    assert "__nncf_hooks" not in net._modules
    state = run.optimizers[0].state
    assert all(state[p]["exp_avg"].shape == p.shape for p in net.parameters())


def test_one_shot_cuts_at_once_and_two_optimizers_follow_a_schedule(loader: Any) -> None:
    net = Net()
    dense = sum(p.numel() for p in net.parameters())
    CompressionCallback(net, document(schedule="one_shot"))
    assert sum(p.numel() for p in net.parameters()) < dense

    class Two(Digits):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            loss = super().training_step(batch, index)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parts = (self.net.features, self.net.classifier)
            return [torch.optim.SGD(part.parameters(), 0.01, momentum=0.9) for part in parts], []

    net, watch = Net(), Watch()
    callback = CompressionCallback(net, DOCUMENT)
    trainer(callback, watch).fit(Two(net, callback), loader)
    assert watch.sizes[:2] == [dense, dense]
    assert watch.sizes[2] == watch.sizes[3] < dense
    assert sum(p.numel() for p in net.parameters()) < dense
    assert "__nncf_hooks" not in net._modules


@pytest.mark.parametrize("saved", ["epoch end", "validation", "last batch"])
@pytest.mark.parametrize("epoch", [0, 1, 2], ids=["dense", "masked", "cut"])
def test_a_resumed_run_ends_with_the_same_weights(epoch: int, saved: str, loader: Any, tmp_path: Path) -> None:
    loaders = (loader, loader if saved == "validation" else None)
    whole = Net()
    callback = CompressionCallback(whole, DOCUMENT)
    save = pl.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, every_n_train_steps=4 if saved == "last batch" else None
    )
    before = Watch()
    trainer(callback, before, save, enable_checkpointing=True).fit(Digits(whole, callback), *loaders)
    file = tmp_path / f"epoch={epoch}.ckpt"
    masked = any("nncf" in name for name in torch.load(file, weights_only=True)["state_dict"])
    assert masked == (epoch == 1)
    torch.manual_seed(5)
    again = Net()  # other weights: everything must come from the checkpoint
    resumed = CompressionCallback(again, DOCUMENT, resume_from_checkpoint=file)
    watch = Watch()
    again_saved = pl.callbacks.ModelCheckpoint(
        tmp_path / "again", "{epoch}", save_top_k=-1, every_n_train_steps=4 if saved == "last batch" else None
    )
    run = trainer(resumed, watch, again_saved, enable_checkpointing=True)
    run.fit(Digits(again, resumed), *loaders, ckpt_path=file)
    assert watch.sizes == before.sizes[epoch + 1 :]
    assert again.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_precision_that_lightning_sets_is_followed(precision: str, loader: Any) -> None:
    callback = CompressionCallback(net := Net(), DOCUMENT)
    trainer(callback, precision=precision).fit(Digits(net, callback), loader)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in Net().parameters())


@pytest.mark.parametrize("saved", [1, 2], ids=["masked", "cut"])
@pytest.mark.parametrize("average_first", [True, False])
def test_lightnings_average_of_the_weights_follows(
    average_first: bool, saved: int, loader: Any, tmp_path: Path
) -> None:
    """A network that is averaged over the last update alone is the trained one; saved in between, the run goes on."""

    class Last(pl.callbacks.WeightAveraging):
        def __init__(self) -> None:
            super().__init__(avg_fn=lambda averaged, trained, count: trained)

    results = []
    for resumed in (None, tmp_path / "0" / f"epoch={saved}.ckpt"):
        torch.manual_seed(0)
        net = Net()
        callback = CompressionCallback(net, DOCUMENT, resume_from_checkpoint=resumed)
        save = pl.callbacks.ModelCheckpoint(tmp_path / str(len(results)), "{epoch}", save_top_k=-1)
        callbacks = [callback, average := Last(), save]
        if average_first:
            callbacks[:2] = [average, callback]
        run = trainer(*callbacks, enable_checkpointing=True)
        run.fit(Digits(net, callback), loader, loader, ckpt_path=resumed)
        shapes = [p.shape for p in average._average_model.module.net.parameters()]
        assert shapes == [p.shape for p in net.parameters()]
        assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in Net().parameters())
        assert not carries_hooks(net)
        results.append(net.state_dict())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_lightnings_stochastic_weight_averaging_follows(loader: Any) -> None:
    net = Net()
    callback = CompressionCallback(net, DOCUMENT)
    averaging = pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    trainer(callback, averaging, max_epochs=5).fit(Digits(net, callback), loader)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in Net().parameters())


@pytest.fixture
def pull() -> Plugins:
    return with_pull()


def test_a_loss_that_is_not_asked_for_is_an_error_and_accumulated_batches_are_one_step(
    loader: Any, pull: Plugins
) -> None:
    config = {**DOCUMENT, "compression": {"algorithm": "pull"}}
    silent = CompressionCallback(net := Net(), config, plugins=pull)
    with pytest.raises(CompactPruneError, match=r"'pull' adds to the loss.*Return loss \+ callback\.loss\(\)"):
        trainer(silent).fit(Digits(net), loader)
    heard = CompressionCallback(net := Net(), config, plugins=pull)
    trainer(heard, max_epochs=2, accumulate_grad_batches=2).fit(Digits(net, heard), loader)
    assert heard.controller.algorithms[0].told == (0, 1, 2, 3)


def test_mistakes_are_told_before_they_cost_anything(loader: Any, tmp_path: Path) -> None:
    callback = CompressionCallback(net := Net(), DOCUMENT)
    with pytest.raises(CompactPruneError, match="no part of the LightningModule"):
        trainer(callback).fit(Digits(Net()), loader)
    compiled = torch.compile(Digits(net), backend="eager")
    with pytest.raises(CompactPruneError, match=r'torch\.compile does not go with masks.*"one_shot"'):
        trainer(callback).fit(compiled, loader)
    callback._device = torch.device("meta")  # stands for a GPU model that Lightning takes elsewhere
    with pytest.raises(CompactPruneError, match=r"model on meta, which trains on cpu.*model\.to\('cpu'\)"):
        trainer(callback).fit(Digits(net), loader)

    file = tmp_path / "run.ckpt"
    callback = CompressionCallback(net := Net(), DOCUMENT)
    trainer(callback, Watch(file, 2), max_epochs=1).fit(Digits(net), loader)
    fresh = CompressionCallback(net := Net(), DOCUMENT)
    with pytest.raises(CompactPruneError, match=r"another compression state.*the same file"):
        trainer(fresh).fit(Digits(net), loader, ckpt_path=file)
    torch.save({"callbacks": {}}, file)
    with pytest.raises(CompactPruneError, match="has no compression state"):
        CompressionCallback(Net(), DOCUMENT, resume_from_checkpoint=file)
    file.write_bytes(b"damaged")
    with pytest.raises(CompactPruneError, match="cannot be read without running code"):
        CompressionCallback(Net(), DOCUMENT, resume_from_checkpoint=file)
