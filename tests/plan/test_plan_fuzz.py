"""Thousands of malformed plans and weights: each is refused with nothing touched, or means what the honest one means.

Accepted means: the plan fits the honest weights, so the loaded network must be the honest one bit for bit.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from support.cuts import assert_facts_are_true, random_plan
from support.networks import images, trained
from torch import nn

from nncf_compactprune import CompactPruneError, PruningPlan
from nncf_compactprune.algorithms.catro.subtask import with_classifier_cut
from nncf_compactprune.channels import trace
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.surgery import PLAN_ATTRIBUTE, plan_of
from nncf_compactprune.errors import SelfCheckError
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.plugins import default_plugins
from nncf_compactprune.storage import checkpoint
from nncf_compactprune.storage.checkpoint import load_pruned, save_pruned

PLAN_CASES = 1000  # for each of the structures below
WEIGHT_CASES = 250
NAMES = ("residual", "depthwise", "grouped", "weight_norm", "tied", "group_norm")

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 17, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, 10**400, -(2**63), 1.5, 1e308,
    float("nan"), float("inf"), "", "0", "1", "-1", "1e3", "\x00", "\ud800", "../../etc/passwd", "x" * 5000, "weight",
    "features.0.0.weight", "nncf_compactprune.plan", [], {}, [[]], [{}], {"0": [0]}, {"": {}}, [0, 1], [1, 0], [0, 0],
)  # fmt: skip


# -- a model, its honest checkpoint, and whether anything was touched ------------------------------------------------


class Harness:
    """One structure's checkpoint, the dense model it is loaded into, and what must come out."""

    def __init__(self, name: str, directory: Path, classes: tuple[int, ...] = ()) -> None:
        self.directory, self.x, self.self_checks = directory, images(torch.float32), 0
        model = trained(name, dtype=torch.float32)
        plan = random_plan(model, self.x)
        if classes:
            graph = trace(model, self.x)
            plan = with_classifier_cut(plan, model, graph, classes, self.x, default_plugins())
        prune_in_place(model, plan, self.x)
        save_pruned(model, directory)
        # Without the digest of its plan: a forger would write a fitting one, and every altered plan would stop there.
        save_file(load_file(directory / checkpoint.WEIGHTS_FILE), directory / checkpoint.WEIGHTS_FILE)
        self.plan = (directory / checkpoint.PLAN_FILE).read_text()
        self.weights = (directory / checkpoint.WEIGHTS_FILE).read_bytes()
        self.expected = self._state(model)
        self.dense = trained(name, dtype=torch.float32)
        self._renew()

    def load(self, example_inputs: torch.Tensor | None = None) -> str:
        """Loads what lies in the directory; the answer, or what is wrong with the way it was given."""
        try:
            load_pruned(self._dense, self.directory, example_inputs=example_inputs)
        except CompactPruneError as error:
            self.self_checks += isinstance(error, SelfCheckError)
            if len(str(error)) > 2000:
                return "a message that is no message"
            return "refused" if self._untouched() else "refused, but the model was changed"
        except Exception as error:  # any other exception is a finding
            return f"{type(error).__name__}: {str(error)[:200]}"
        loaded = self._dense
        self._renew()
        if self._state(loaded) != self.expected:
            return "accepted, but another network"
        assert_facts_are_true(loaded)
        plan = plan_of(loaded)
        if plan is None or PruningPlan.from_json(plan.to_json()) != plan:
            return "accepted, but its plan does not round-trip"
        return "accepted"

    def _renew(self) -> None:
        self._dense = copy.deepcopy(self.dense)
        self._before = self._state(self._dense)
        self._identity = {name: (t, t.data_ptr(), t._version) for name, t in model_tensors(self._dense).named()}

    def _untouched(self) -> bool:
        """Same objects over the same memory that nobody wrote to, and then the same bits."""
        now = model_tensors(self._dense).all()
        return (
            now.keys() == self._identity.keys()
            and all(now[n] is t and t.data_ptr() == p and t._version == v for n, (t, p, v) in self._identity.items())
            and not hasattr(self._dense, PLAN_ATTRIBUTE)
            and self._state(self._dense) == self._before
        )

    @staticmethod
    def _state(model: nn.Module) -> dict[str, Any]:
        """Everything a network computes from: bytes, shapes, static facts, flags."""
        tensors = {n: (t.shape, t.dtype, t.detach().numpy().tobytes()) for n, t in model_tensors(model).named()}
        facts = {
            f"{name} {key}": value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, tuple))
        }
        return {**tensors, **facts}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of runs of tiny layers: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=NAMES)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Harness:
    return Harness(request.param, tmp_path)


def findings(harness: Harness, cases: int, file: str, mutate: Callable[[random.Random], tuple[str, bytes]]) -> Counter:
    """Answers to seeded mutations, counted; the first mutation of each wrong answer is shown."""
    answers: Counter[str] = Counter()
    honest = (harness.directory / file).read_bytes()
    for seed in range(cases):
        kind, content = mutate(random.Random(seed))
        (harness.directory / file).write_bytes(content)
        answer = harness.load()
        if answer not in ("accepted", "refused") and answer not in answers:
            print(f"seed {seed}, {kind}: {answer}")
        answers[answer] += 1
    (harness.directory / file).write_bytes(honest)
    return answers


def assert_only_good(answers: Counter) -> None:
    wrong = {answer: count for answer, count in answers.items() if answer not in ("accepted", "refused")}
    assert not wrong, wrong


# -- malformed plans -------------------------------------------------------------------------------------------------


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def replace(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    at(document, path[:-1])[path[-1]] = value
    return document


def random_path(document: Any, rng: random.Random) -> tuple[Any, ...]:
    """A path, sections of the document equally often: most values are positions otherwise."""
    section = rng.choice(list(document))
    return rng.choice(places(document[section], (section,)))


def replaced(document: Any, rng: random.Random) -> Any:
    return replace(document, random_path(document, rng), copy.deepcopy(rng.choice(SCALARS)))


def retyped(document: Any, rng: random.Random) -> Any:
    path = random_path(document, rng)
    value = at(document, path)
    as_list = list(value.items()) if isinstance(value, dict) else [value]
    return replace(document, path, rng.choice([str(value), as_list, {"0": value}, [value, value], repr(value)]))


def deleted(document: Any, rng: random.Random) -> Any:
    path = random_path(document, rng)
    del at(document, path[:-1])[path[-1]]
    return document


def inserted(document: Any, rng: random.Random) -> Any:
    node = at(document, random_path(document, rng))
    if isinstance(node, list):
        node.insert(rng.randint(0, len(node)), copy.deepcopy(rng.choice(SCALARS)))
    elif isinstance(node, dict):
        node[rng.choice(["", "0", "1", "2", "16", "17", "01", "head.bias", "weight"])] = copy.deepcopy(
            rng.choice(SCALARS)
        )
    else:
        document[str(node)[:50]] = node
    return document


def duplicated(document: Any, rng: random.Random) -> Any:
    source, target = random_path(document, rng), random_path(document, rng)
    return replace(document, target, copy.deepcopy(at(document, source)))


def renamed(document: Any, rng: random.Random) -> Any:
    kept = document["kept"]
    name = rng.choice(list(kept))
    other = rng.choice(
        [*kept, name.upper(), f"{name}.", name[:-1], f" {name}", "head.bias", "features.0.1.running_mean"]
    )
    kept[name], kept[other] = kept.get(other, {"0": [0]}), kept[name]
    return document


def shifted(document: Any, rng: random.Random) -> Any:
    """Edits of positions, most of which leave the text a well-formed plan."""
    name = rng.choice(list(document["kept"]))
    dims = document["kept"][name]
    dim = rng.choice(list(dims))
    positions = dims[dim]
    if not positions:
        return document
    index = rng.randrange(len(positions))
    edit = rng.randrange(8)
    if edit == 0:
        positions[index] += rng.choice([-1, 1, 100, -(2**40), 2**40])
    elif edit == 1:
        positions.pop(index)
    elif edit == 2:
        positions.insert(index, positions[index])
    elif edit == 3:
        positions.reverse()
    elif edit == 4:
        positions.append(positions[-1] + rng.choice([1, 2, 50]))
    elif edit == 5:
        positions[:] = sorted(rng.sample(range(max(positions) + 1), len(positions)))
    elif edit == 6:
        dims[rng.choice("01234")] = dims.pop(dim)
    else:
        positions.clear()
    return document


def recounted(document: Any, rng: random.Random) -> Any:
    """An altered cut whose stated counts were altered to match: only the coupling within layers can tell."""
    for _ in range(rng.randint(1, 3)):
        document = shifted(document, rng)
    document["recount"] = True
    return document


STRUCTURAL = (replaced, retyped, deleted, inserted, duplicated, renamed, shifted, recounted)
TEXTUAL = ("truncated", "flipped", "repeated", "nested", "digits", "binary")


def honest_counts(document: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """States what the altered cut really leaves, where it can be told."""
    if document.pop("recount", None):
        try:
            count = 0
            for name, shape in shapes.items():
                kept = document["kept"].get(name, {})
                count += torch.Size(len(kept.get(str(d), range(n))) for d, n in enumerate(shape)).numel()
            document["after"]["params"] = count
        except (TypeError, AttributeError, KeyError):
            return


def malformed(text: str, shapes: dict[str, tuple[int, ...]], rng: random.Random) -> tuple[str, bytes]:
    """One malformed plan and what was done to it."""
    if rng.random() < 0.8:
        change = rng.choice(STRUCTURAL)
        document = change(json.loads(text), rng)
        if isinstance(document, dict):
            honest_counts(document, shapes)
        return change.__name__, json.dumps(document).encode()
    kind, raw = rng.choice(TEXTUAL), bytearray(text.encode())
    at_byte = rng.randrange(len(raw))
    if kind == "truncated":
        del raw[at_byte:]
    elif kind == "flipped":
        raw[at_byte] ^= 1 << rng.randrange(8)
    elif kind == "repeated":
        end = min(len(raw), at_byte + rng.randint(1, 200))
        raw[at_byte:at_byte] = raw[at_byte:end]
    elif kind == "nested":
        raw[at_byte:at_byte] = rng.choice([b"[", b'{"a":', b"[[1],"]) * rng.choice([10, 1000, 50_000])
    elif kind == "digits":
        raw[at_byte:at_byte] = b"9" * rng.choice([1, 20, 5000])
    else:
        raw[at_byte : at_byte + 4] = rng.randbytes(4)
    return kind, bytes(raw)


def test_malformed_plans(harness):
    shapes = {n: tuple(p.shape) for n, p in harness.dense.named_parameters()}
    answers = findings(harness, PLAN_CASES, checkpoint.PLAN_FILE, lambda rng: malformed(harness.plan, shapes, rng))
    assert_only_good(answers)
    assert answers["refused"] > 0.8 * PLAN_CASES
    assert answers["accepted"] > 0, "no mutation that changes nothing: the fuzzer no longer reaches the end"
    assert harness.load() == "accepted"


def reclassed(document: Any, rng: random.Random) -> Any:
    """Edits of the classes that a cut classifier knows."""
    path = ("output_classes",) if rng.random() < 0.5 else ("output_classes", rng.randrange(3))
    value = rng.choice([*SCALARS, *document["kept"].values(), [0, 1, 2], [0, 2, 4], [1, 2], [0, 1, 3, 4], [4, 1, 0]])
    return replace(document, path, copy.deepcopy(value))


def test_malformed_plans_of_subtasks(tmp_path):
    harness = Harness("residual", tmp_path, classes=(0, 1, 4))
    shapes = {n: tuple(p.shape) for n, p in harness.dense.named_parameters()}

    def mutate(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.5:
            return "reclassed", json.dumps(reclassed(json.loads(harness.plan), rng)).encode()
        return malformed(harness.plan, shapes, rng)

    answers = findings(harness, 600, checkpoint.PLAN_FILE, mutate)
    assert_only_good(answers)
    assert answers["refused"] > 0.8 * 600
    assert harness.load() == "accepted"


def test_altered_cuts_alone(harness):
    """The same without weights, which would tell shapes: what the plan's own checks let through fits in every layer."""
    dense = copy.deepcopy(harness.dense)
    shapes = {n: tuple(p.shape) for n, p in dense.named_parameters()}
    accepted = 0
    for seed in range(300):
        rng = random.Random(seed)
        document = recounted(json.loads(harness.plan), rng)
        honest_counts(document, shapes)
        try:
            plan = PruningPlan.from_json(json.dumps(document))
            plan.validate(dense)
            plan.validate_consistency(dense)
        except CompactPruneError:
            continue
        accepted += 1
        model = copy.deepcopy(dense)
        checkpoint.cut(checkpoint_log(), model, plan)
        assert_facts_are_true(model)
        assert model_tensors(model).shapes() == plan.shapes(model_tensors(dense).shapes())
        assert_channels_agree(model)
    assert accepted < 150


def moved(document: Any, rng: random.Random) -> Any:
    """Other positions in one place, as many as before: the weights still fit, and so may every layer."""
    name = rng.choice([name for name in document["kept"] if name.endswith("weight")])
    for positions in document["kept"][name].values():
        positions[:] = sorted(rng.sample(range(max(positions) + 1), len(positions)))
    return document


def test_moved_positions_with_example_inputs(tmp_path):
    """What only a run can tell is refused by a run, and the cut undone."""
    harness = Harness("residual", tmp_path)
    for seed in range(50):
        text = json.dumps(moved(json.loads(harness.plan), random.Random(seed)))
        (tmp_path / checkpoint.PLAN_FILE).write_text(text)
        answer = harness.load(harness.x)
        assert answer in ("refused", "accepted"), (seed, answer)
    assert harness.self_checks > 10


def checkpoint_log() -> Any:
    with checkpoint.transaction() as log:
        return log


def assert_channels_agree(model: nn.Module) -> None:
    """Every layer runs on an input of the width that it states."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module(torch.zeros(1, module.in_channels, 8, 8))
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module(torch.zeros(1, getattr(module, "num_features", None) or module.num_channels, 4, 4))
        elif isinstance(module, nn.Linear):
            module(torch.zeros(1, module.in_features))


# -- damaged weights -------------------------------------------------------------------------------------------------


def other_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Sound files of wrong tensors."""
    name = rng.choice([name for name, tensor in tensors.items() if tensor.dim()])
    value = tensors.pop(name)
    wrong = (
        {},
        {f"{name}x": value},
        {name: value, f"{name}x": value.clone()},
        {name: value[:-1].clone()},
        {name: torch.cat([value, value[:1]])},
        {name: value.unsqueeze(0)},
        {name: value.flatten()[0].clone()},
        {name: value[:0].clone()},
        {name: value.double()},
        {name: value.half()},
        {name: value.view(torch.int32)},
    )
    return {**tensors, **rng.choice(wrong)}


def damaged(weights: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One damaged safetensors file; the payload is left alone, any bits there are somebody's weights."""
    length = int.from_bytes(weights[:8], "little")
    kind, raw = (
        rng.choice(("truncated", "flipped", "flipped", "length", "longer", "header", "pickle")),
        bytearray(weights),
    )
    if kind == "truncated":
        del raw[rng.randrange(len(raw)) :]
    elif kind == "flipped":
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    elif kind == "length":
        raw[:8] = rng.choice([0, 1, length - 1, length + 1, len(raw), 2**31, 2**62, 2**64 - 1]).to_bytes(8, "little")
    elif kind == "rewritten":
        raw = bytearray(save(other_tensors(load(weights), rng)))
    elif kind == "longer":
        raw += bytes(rng.randint(1, 100))
    elif kind == "header":
        header = json.loads(weights[8 : 8 + length])
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        change = rng.randrange(5)
        if change == 0:
            entry["dtype"] = rng.choice(["F16", "F64", "I32", "BOOL", "f32", "", None, 3])
        elif change == 1:
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [2**63], [-1], [2**32] * 4, "x"])
        elif change == 2:
            entry["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 2**40, -(2**40)])
        elif change == 3:
            header["../../outside"] = dict(entry)
        else:
            del header[next(iter(name for name in header if name != "__metadata__"))]
        encoded = json.dumps(header).encode()
        raw = bytearray(len(encoded).to_bytes(8, "little") + encoded + weights[8 + length :])
    else:
        raw[:8] = b"\x80\x04\x95\x00\x00\x00\x00\x00"
    return kind, bytes(raw)


@pytest.mark.parametrize("name", ["residual", "tied"])
def test_damaged_weights(name, tmp_path):
    harness = Harness(name, tmp_path)
    answers = findings(harness, WEIGHT_CASES, checkpoint.WEIGHTS_FILE, lambda rng: damaged(harness.weights, rng))
    assert_only_good(answers)
    assert answers["refused"] > 0.8 * WEIGHT_CASES
    assert harness.load() == "accepted"


# -- the fuzzers can fail --------------------------------------------------------------------------------------------


def test_fuzzers_notice_missing_checks(tmp_path, monkeypatch):
    harness = Harness("residual", tmp_path)
    shapes = {n: tuple(p.shape) for n, p in harness.dense.named_parameters()}
    monkeypatch.setattr(PruningPlan, "validate", lambda *_: None)
    monkeypatch.setattr(PruningPlan, "validate_consistency", lambda *_: None)
    answers = findings(harness, 150, checkpoint.PLAN_FILE, lambda rng: malformed(harness.plan, shapes, rng))
    assert set(answers) - {"accepted", "refused"}


def test_fuzzers_notice_unchecked_weights(tmp_path, monkeypatch):
    harness = Harness("residual", tmp_path)
    monkeypatch.setattr(checkpoint, "stored_names", lambda file, *_, **__: {k: k for k in file.keys()})  # noqa: SIM118
    answers = findings(harness, 100, checkpoint.WEIGHTS_FILE, lambda rng: damaged(harness.weights, rng))
    assert set(answers) - {"accepted", "refused"}


def test_fuzzers_notice_a_touched_model(tmp_path, monkeypatch):
    """Checks made after the cut, with nothing undone: refused in words, but the model is not what it was."""
    harness = Harness("residual", tmp_path)
    tensors = load_file(tmp_path / checkpoint.WEIGHTS_FILE)
    tensors["head.bias"] = tensors["head.bias"].double()
    (tmp_path / checkpoint.WEIGHTS_FILE).write_bytes(save(tensors))
    read = checkpoint.plan_for_weights

    def early(folder: Path, model: nn.Module, digest: str | None) -> PruningPlan:
        plan = read(folder, model, digest)
        checkpoint.cut(checkpoint_log(), model, plan)
        return plan

    assert harness.load() == "refused"
    monkeypatch.setattr(checkpoint, "plan_for_weights", early)
    assert harness.load() == "refused, but the model was changed"
