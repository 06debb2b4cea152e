"""Similarities and logits of a teacher: the losses by hand, and a student that carries nothing of its teacher."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.networks import images, trained
from torch import nn

from nncf_compactprune.algorithms.overparameterization import distillation as distilling
from nncf_compactprune.algorithms.overparameterization.distillation import (
    Distillation,
    digest,
    logits_loss,
    similarity,
    similarity_loss,
)
from nncf_compactprune.errors import DistillationError

LAYERS = ["features.0.0", "features.1.conv1", "features.1.conv2"]


def pair():
    teacher = trained("residual", dtype=torch.float32)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return student.train(), teacher


def features_of(model, layers, x):
    """Outputs of the layers in eval or training mode as the model is."""
    kept = []
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, y: kept.append(y)) for n in layers]
    output = model(x)
    for handle in handles:
        handle.remove()
    return kept, output


def test_similarity_loss_is_the_paper_s_by_loops():
    generator = torch.Generator().manual_seed(0)
    students = [torch.randn(4, *s, generator=generator, dtype=torch.float64) for s in ((3, 2, 2), (5,), (2, 3, 4))]
    teachers = [torch.randn(4, *s, generator=generator, dtype=torch.float64) for s in ((6, 2, 2), (9,), (4, 3, 4))]
    loss = similarity_loss([similarity(s) for s in students], [similarity(t) for t in teachers])
    assert float(loss) == pytest.approx(oracles.similarity_loss(students, teachers), rel=1e-12)


def test_similarity_ignores_scale_and_rotation_of_features_but_not_their_pattern():
    x = torch.randn(5, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    torch.testing.assert_close(similarity(3 * x @ rotation), similarity(x))
    assert (similarity(x.abs()) - similarity(x)).abs().max() > 0.1
    assert similarity(x.half()).dtype == torch.float32


def test_large_maps_are_averaged_down_first_on_request():
    x = torch.randn(3, 2, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(similarity(x, 4), similarity(F.adaptive_avg_pool2d(x, (4, 4))))
    torch.testing.assert_close(similarity(x, 8), similarity(x), rtol=0, atol=0)
    volume = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(similarity(volume, 2), similarity(F.avg_pool3d(volume, 2)))
    tokens = torch.randn(3, 9, 5, dtype=torch.float64)
    assert torch.equal(similarity(tokens, 2), similarity(tokens)), "no map"


def test_logits_loss_is_hinton_s():
    s, t = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert float(logits_loss(s, t, 3.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(logits_loss(t, t, 3.0)) == pytest.approx(0, abs=1e-7)


def test_losses_belong_to_the_forward_and_reach_the_student_alone():
    student, teacher = pair()
    x = images(torch.float32)
    distillation = Distillation(student, teacher, LAYERS, logits=True)
    assert distillation.losses(2.0) == {}
    output = student(x)
    losses = distillation.losses(2.0)
    reference = copy.deepcopy(student)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    seen, _ = features_of(reference, LAYERS, x)
    with torch.no_grad():
        known, scores = features_of(teacher, LAYERS, x)
    expected = oracles.similarity_loss([f.detach() for f in seen], known)
    assert float(losses["similarity"].detach()) == pytest.approx(expected, rel=1e-4)
    assert float(losses["logits"].detach()) == pytest.approx(float(logits_loss(output, scores, 2.0).detach()), rel=1e-4)
    (losses["similarity"] + losses["logits"]).backward()
    assert student.features[0][0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    distillation.remove()
    student(x)
    assert distillation.losses(2.0) == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (student, teacher) for m in net.modules())


def test_the_teacher_rests_outside_of_training():
    student, teacher = pair()
    distillation = Distillation(student, teacher, LAYERS)
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    student(images(torch.float32))
    assert calls == [1]
    with torch.no_grad():
        student(images(torch.float32))
    student.eval()(images(torch.float32))
    assert calls == [1]
    assert distillation.losses(1.0) == {}, "the last forward was none of training"


def test_student_carries_nothing_of_the_teacher():
    student, teacher = pair()
    keys, parameters = list(student.state_dict()), len(list(student.parameters()))
    Distillation(student, teacher, LAYERS, logits=True)
    assert list(student.state_dict()) == keys
    assert len(list(student.parameters())) == parameters
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    shadow = copy.deepcopy(student)
    shadow(images(torch.float32))
    assert calls == []


def test_teacher_in_half_precision_is_close():
    student, teacher = pair()
    x = images(torch.float32)
    losses = {}
    for precision in ("same", "bfloat16"):
        distillation = Distillation(student, teacher, LAYERS, precision=precision)
        student(x)
        losses[precision] = float(distillation.losses(1.0)["similarity"].detach())
        distillation.remove()
    assert losses["bfloat16"] != losses["same"]
    assert losses["bfloat16"] == pytest.approx(losses["same"], rel=0.1)


@pytest.mark.parametrize(
    ("native", "loop", "expected"),
    [(True, None, torch.bfloat16), (False, None, torch.float32), (True, torch.float16, torch.float16)],
)
def test_auto_is_bfloat16_where_the_device_has_it_and_the_loop_names_no_precision(monkeypatch, native, loop, expected):
    monkeypatch.setattr(distilling, "computes_in_bfloat16", lambda device_type: native)
    student, teacher = pair()
    seen = []
    teacher.get_submodule(LAYERS[0]).register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    distillation = Distillation(student, teacher, LAYERS, precision="auto")
    with torch.autocast("cpu", loop, enabled=loop is not None):
        student(images(torch.float32))
    distillation.remove()
    assert seen == [expected]


def test_batch_of_one_costs_nothing_and_is_told_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(
        "nncf_compactprune.algorithms.overparameterization.distillation.nncf_logger.warning", warnings.append
    )
    student, teacher = pair()
    distillation = Distillation(student, teacher, LAYERS)
    for _ in range(2):
        student(images(torch.float32)[:1])
        assert float(distillation.losses(1.0)["similarity"].detach()) == pytest.approx(0, abs=1e-10)
    assert warnings == ["Similarities need at least two examples: the loss of a batch of one is 0."]


def test_layers_without_a_partner_are_named():
    student, _ = pair()
    with pytest.raises(DistillationError, match=r"1 of 3 layers have no partner.*first 'features\.1\.conv1'"):
        Distillation(student, trained("plain", dtype=torch.float32), [*LAYERS[:1], "features.1.conv1", "head"])
    assert not student._forward_pre_hooks


def test_a_teacher_that_runs_otherwise_is_refused():
    class Reordered(nn.Module):
        def __init__(self, swap):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.swap = swap

        def forward(self, x):
            return self.a(self.b(x)) if self.swap else self.b(self.a(x))

    student = Reordered(False)
    distillation = Distillation(student, Reordered(True), ["a", "b"])
    student(torch.randn(2, 3))
    with pytest.raises(DistillationError, match="as layer 1 the student ran 'a' on 2 examples, the teacher 'b' on 2"):
        distillation.losses(1.0)


def test_the_student_is_no_teacher_of_its_own():
    student, _ = pair()
    with pytest.raises(DistillationError, match=r"expected another model.*copy\.deepcopy"):
        Distillation(student, student, LAYERS)


def test_digest_tells_weights_apart():
    student, teacher = pair()
    assert digest(teacher) == digest(copy.deepcopy(teacher)) != digest(student)


def test_gradient_of_similarity_is_right():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    t = similarity(torch.randn(3, 6, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda f: similarity_loss([similarity(f)], [t]), (x,))
    assert F.cosine_similarity(similarity(x), similarity(x)).min() > 0.999
