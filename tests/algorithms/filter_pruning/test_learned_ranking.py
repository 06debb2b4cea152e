"""The learned ranking (LeGR): it searches, trains a copy, and finds what is better than no ranking."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.networks import images, labelled_batches
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.filter_pruning.config import LegrParams
from nncf_compactprune.algorithms.filter_pruning.learned_ranking import Evolution, RankingTraining
from nncf_compactprune.errors import DataError

INPUT = {"sample_size": [2, 3, 12, 12]}
SHORT = {"generations": 6, "train_steps": 1, "population_size": 3, "num_samples": 2}


class Net(nn.Module):
    """The norms of the first layer are large and mean nothing; those of the second decide the output."""

    def __init__(self):
        super().__init__()
        self.useless = nn.Conv2d(3, 16, 3, padding=1)
        self.useful = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(32, 5)
        with torch.no_grad():
            self.useless.weight *= 100
            self.head.weight[:, :16] = 0

    def forward(self, x):
        return self.head(torch.cat([self.useless(x), self.useful(x)], 1).mean((2, 3)))


def compressed(model, *, loader=labelled_batches, shared=None, legr=SHORT, **params):
    params = {"schedule": "baseline", "interlayer_ranking_type": "learned_ranking", "legr_params": legr, **params}
    config = {"input_info": INPUT, "compression": {"algorithm": "filter_pruning", "params": params}}
    batches = None if loader is None else list(loader())
    return create_compressed_model(model, config, batches, example_inputs=images(torch.float32), shared=shared)


def test_a_good_ranking_is_found_where_norms_mislead():
    model = Net()
    with torch.no_grad():
        target = model(images(torch.float32))
    judge = RankingTraining(
        lambda net, steps: None, lambda net: float((net(images(torch.float32)) - target).square().mean())
    )
    legr = {**SHORT, "generations": 60, "population_size": 20, "scale_sigma": 4, "mutate_percent": 0.5}
    ctrl, model = compressed(model, shared={RankingTraining: judge}, legr=legr, pruning_flops_target=0.4)
    assert len(model.useful.weight) > len(model.useless.weight)
    ranking = ctrl.algorithms[0].ranking
    assert ranking["useful.weight"] != (1.0, 0.0)


def test_the_network_itself_is_not_trained():
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    params = {"schedule": "exponential", "interlayer_ranking_type": "learned_ranking", "legr_params": SHORT}
    entry = {"algorithm": "filter_pruning", "pruning_init": 0.1, "params": params}
    config = {"input_info": INPUT, "compression": entry}
    ctrl, _ = create_compressed_model(model, config, list(labelled_batches()), example_inputs=images(torch.float32))
    assert ctrl.algorithms[0].ranking is not None
    assert torch.equal(torch.get_rng_state(), random)
    after = {name: tensor for name, tensor in model.state_dict().items() if "nncf" not in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.training


def test_candidates_are_trained_and_judged_as_asked():
    steps, judged = [], []

    def train(net, count):
        assert net.training
        assert torch.is_grad_enabled()
        steps.append(count)

    def loss(net):
        assert not net.training
        judged.append(1)
        return float(len(judged))

    compressed(Net(), shared={RankingTraining: RankingTraining(train, loss)}, loader=None)
    assert steps == [1] * 6
    assert len(judged) == 6


def test_it_ranks_all_layers_and_prunes_first_ones_too():
    ctrl, model = compressed(Net(), pruning_flops_target=0.3)
    assert len(model.useless.weight) + len(model.useful.weight) < 32
    plan = ctrl.algorithms[0].final_plan
    assert plan.after.macs <= 0.7 * plan.before.macs


def test_the_ranking_is_written_and_read(tmp_path):
    path = tmp_path / "ranking.json"
    first, model = compressed(Net(), save_ranking_coeffs_path=str(path), pruning_target=0.4)
    torch.manual_seed(0)
    again, other = compressed(Net(), load_ranking_coeffs_path=str(path), loader=None, pruning_target=0.4)
    assert again.algorithms[0].ranking == first.algorithms[0].ranking
    assert set(json.loads(path.read_text())) == {"useless", "useful"}
    assert len(other.useful.weight) + len(other.useless.weight) == len(model.useful.weight) + len(model.useless.weight)


def test_a_file_of_nncf_2_is_read(tmp_path):
    path = tmp_path / "ranking.json"
    path.write_text('{"Net/NNCFConv2d[useless]/conv2d_0": [0.001, 0.0], "Net/NNCFConv2d[useful]/conv2d_0": [1, 0]}')
    _, model = compressed(Net(), load_ranking_coeffs_path=str(path), loader=None, pruning_target=0.4)
    assert len(model.useful.weight) == 16
    assert len(model.useless.weight) == 16 - 12


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "has nothing for 2 of 2 layers"), ("[1]", "expected a JSON object"), (None, "cannot be read")],
)
def test_a_wrong_file_is_told(tmp_path, content, message):
    path = tmp_path / "ranking.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        compressed(Net(), load_ranking_coeffs_path=str(path), loader=None)


def test_without_data_the_error_says_what_to_give():
    with pytest.raises(DataError, match="there is no train_loader"):
        compressed(Net(), loader=None)
    with pytest.raises(DataError, match="needs labelled batches"):
        compressed(Net(), loader=tuple)


def test_a_run_goes_on_with_its_ranking():
    ctrl, _ = compressed(Net(), schedule="exponential", pruning_steps=3)
    for _ in range(2):
        ctrl.scheduler.epoch_step()
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    params = {"schedule": "exponential", "pruning_steps": 3, "interlayer_ranking_type": "learned_ranking"}
    config = {"input_info": INPUT, "compression": {"algorithm": "filter_pruning", "params": params}}
    again, _ = create_compressed_model(Net(), config, None, state, example_inputs=images(torch.float32))
    again.scheduler.epoch_step()
    assert again.algorithms[0].ranking == ctrl.algorithms[0].ranking


def test_evolution_starts_with_no_ranking_and_keeps_the_best():
    norms = [{"a": torch.tensor([1.0, 2.0, 3.0])}, {"b": torch.tensor([5.0, 5.0])}]
    search = Evolution(norms, LegrParams(generations=40, population_size=8, num_samples=4, mutate_percent=0.5))
    tried = []
    for generation in range(40):
        ranking = search.propose(generation)
        tried.append(ranking)
        search.judge(ranking, abs(np.log(ranking["a"][0]) - 1))  # the best factor is e
    assert tried[0] == {"a": (1.0, 0.0), "b": (1.0, 0.0)}
    assert len({str(ranking) for ranking in tried[:8]}) == 8  # each drawn anew
    assert search.best_loss == min(search.losses) < search.losses[0]
    assert all(ranking["b"][1] == 0 for ranking in tried)  # equal norms have no spread


def test_a_loss_that_is_not_finite_is_the_worst():
    norms = [{"a": torch.tensor([1.0, 2.0])}]
    search = Evolution(norms, LegrParams(generations=3, population_size=2))
    first, second = search.propose(0), search.propose(1)
    search.judge(first, float("nan"))
    search.judge(second, 3.0)
    assert search.best == second
