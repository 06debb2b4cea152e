"""A learned ranking with the functions that a script registered, as NNCF 2.x took them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.networks import labelled_batches, plain
from torch.utils.data import DataLoader

from nncf_compactprune.integrations.nncf2 import NNCFConfig, create_compressed_model, register_default_init_args


def test_candidates_are_trained_and_validated_by_the_script():
    legr = {"generations": 3, "train_steps": 2, "population_size": 2}
    params = {"schedule": "baseline", "pruning_flops_target": 0.3, "interlayer_ranking_type": "learned_ranking"}
    entry = {"algorithm": "filter_pruning", "params": {**params, "legr_params": legr}}
    config = NNCFConfig.from_dict({"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entry})
    data = [(x, y) for batch in labelled_batches() for x, y in zip(*batch, strict=True)]
    loader, trained, validated, optimizers = DataLoader(data, batch_size=4), [], [], []

    def train_steps(batches, model, optimizer, compression_ctrl, steps):
        compression_ctrl.scheduler.step()
        for inputs, labels in list(batches)[:steps]:
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), labels) + compression_ctrl.loss()).backward()
            optimizer.step()
        trained.append(steps)

    def validate(model, batches):
        inputs, labels = next(iter(batches))
        validated.append(batches is loader)
        return 0.5, float(F.cross_entropy(model(inputs), labels))

    def optimizer(parameters):
        optimizers.append(torch.optim.SGD(parameters, lr=0.01))
        return optimizers[-1]

    register_default_init_args(
        config,
        loader,
        train_steps_fn=train_steps,
        validate_fn=validate,
        val_loader=loader,
        legr_train_optimizer=optimizer,
    )
    before = sum(p.numel() for p in plain().parameters())
    ctrl, model = create_compressed_model(plain(), config, dump_graphs=False)
    assert trained == [2, 2, 2]
    assert validated == [True] * 3
    assert len(optimizers) == 3
    assert sum(p.numel() for p in model.parameters()) < before
    assert ctrl.compression_rate > 0.29
