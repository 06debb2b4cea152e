"""Networks that generate, for optimum-intel: several files with a cache inside, which its own exporter writes."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from nncf_compactprune.cut.surgery import CONFIG_ATTRIBUTE
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import QUANTIZED, ExportedFile, ExportOptions, Session, is_quantized
from nncf_compactprune.export.foreign import exporting
from nncf_compactprune.export.model import described
from nncf_compactprune.export.openvino import OpenVinoFormat
from nncf_compactprune.export.prepared import Array, ModelInputs, Prepared, Reference, outputs_of, prepared
from nncf_compactprune.export.tolerances import ROUNDED
from nncf_compactprune.export.unrounded import can_do_without_rounding, ir_without_rounding, without_rounding
from nncf_compactprune.export.verify import Verification, compare, compare_unrounded
from nncf_compactprune.host import optimum
from nncf_compactprune.host.packages import require_package

STEPS = 3  # tokens that a comparison goes on with, one by one, out of the cache
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@dataclass(frozen=True)
class Task:
    """What a network generates from.

    :param name: optimum's name of it.
    :param classes: transformers' table of its classes.
    :param served_by: the class of optimum-intel that loads the folder.
    :param tokens: the argument that is continued.
    """

    name: str
    classes: str
    served_by: str
    tokens: str


TASKS = (
    Task(
        "text2text-generation",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "OVModelForSeq2SeqLM",
        "decoder_input_ids",
    ),
    Task(
        "automatic-speech-recognition",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "OVModelForSpeechSeq2Seq",
        "decoder_input_ids",
    ),
    Task("text-generation", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "OVModelForCausalLM", "input_ids"),
)


def generates(model: Any) -> bool:
    """Whether a model of transformers generates, token by token.

    :param model: any.
    """
    return bool(getattr(type(model), "can_generate", lambda: False)())


def task_of(model: Any, *, quantized: bool) -> Task:
    """What a network generates from; refuses one that optimum-intel cannot be given.

    :param model: one that :func:`generates`.
    :param quantized: whether it is quantized, or will be.
    :raises ExportError: optimum-intel is not installed, or does not export such a network.
    """
    kind = type(model).__name__
    auto = require_package("transformers.models.auto.modeling_auto", "nncf-compactprune[transformers]")
    names = {one.__name__ for one in type(model).__mro__}
    task = next((one for one in TASKS if names.intersection(getattr(auto, one.classes).values())), None)
    if task is None:
        msg = (
            f"layout: optimum holds networks that generate text from text or speech, got {kind}. Use the layout plain, "
            "which has no cache. optimum.exporters.openvino.export_from_model may take it, but compares nothing."
        )
        raise ExportError(msg)
    if not optimum.is_installed():
        msg = (
            f"layout: {kind} generates, and only optimum-intel's own exporter writes its parts and their cache: it is "
            "not installed here. Call save_pruned_hf(model, folder), and export what load_pruned_hf(folder) gives in "
            "an environment that has optimum-intel (pip install optimum-intel)."
        )
        raise ExportError(msg)
    try:
        optimum.check_served(model, task.name)
    except ValueError as error:
        msg = f"layout: optimum-intel does not export {kind}: {error}"
        raise ExportError(msg) from error
    if quantized and task.tokens != "input_ids":
        msg = (
            f"layout: optimum holds no quantized {kind}: its encoder becomes a file of its own, without the quantizers "
            "of the whole network. Export it without quantization, and let optimum-intel make its weights 8 "
            f'bits: {task.served_by}.from_pretrained(folder, quantization_config={{"bits": 8}}).'
        )
        raise ExportError(msg)
    return task


def export_generative(
    model: nn.Module, example_inputs: Any, stage: Path, folder: Path, precision: str | None, options: ExportOptions
) -> list[ExportedFile]:
    """Lets optimum-intel write a network that generates, and compares it, as its class serves it, with torch.

    :param model: see :func:`~nncf_compactprune.integrations.layouts.export_to_layout`.
    :param example_inputs: with ``input_ids`` or ``input_features``; with an encoder, ``decoder_input_ids``, too.
    :param stage: an empty folder to write into.
    :param folder: where the files will be, for the result.
    :param precision: ``fp32``, ``fp16``, or ``int8`` of a quantized model.
    :param options: what files say.
    :raises ExportError: the exporter fails, or what it wrote computes something else.
    """
    kind, task, file_format = type(model).__name__, task_of(model, quantized=is_quantized(model)), OpenVinoFormat()
    file_format.refuse(model)
    precision = _precision(model, precision)
    if options.batch is not None or options.dynamic_size or options.embed_preprocessing:
        msg = f"layout: {kind} generates, and its files take any batch. Leave batch, dynamic_size and "
        msg += "embed_preprocessing out."
        raise ExportError(msg)
    with prepared(model, _continued(model, task, example_inputs), dynamic_batch=True) as ready:
        frozen = ready.flat.model
        with exporting(f"optimum-intel could not export {kind}", ready):
            _export(frozen, task, ready.trace_inputs, stage)
        for path in stage.glob("*.xml"):
            file_format.rewrite(path, described(frozen, options), precision)
        check = _verified(ready, task, stage, folder, precision)
    return [
        ExportedFile(
            folder / path.name,
            file_format.name,
            precision,
            sum(part.stat().st_size for part in file_format.parts(path)),
            replace(check, path=folder / path.name),
            f"{file_format.title} {precision.upper()}",
        )
        for path in sorted(stage.glob("*.xml"))
    ]


def _precision(model: nn.Module, asked: str | None) -> str:
    possible = (QUANTIZED,) if is_quantized(model) else ("fp32", "fp16")
    if asked is not None and asked not in possible:
        msg = f"precision: expected {' or '.join(possible)}, got '{asked}'."
        raise ExportError(msg)
    return asked or possible[0]


def _continued(model: Any, task: Task, example_inputs: Any) -> dict[str, Tensor]:
    """The example as all networks of a task take it, with a few tokens more."""
    given = ModelInputs.of(model, example_inputs)
    named = dict(zip(given.names, given.tensors, strict=True))
    main = "input_ids" if task.tokens == "input_ids" else model.main_input_name
    if main not in named:
        msg = f"example_inputs: expected '{main}', got {', '.join(named)}. Give a dict of the model's arguments."
        raise ExportError(msg)
    inputs = {main: named[main]}
    if task.tokens != main:
        if "attention_mask" in named:
            inputs["attention_mask"] = named["attention_mask"]
        start = torch.full((len(named[main]), 1), model.config.decoder_start_token_id or 0)
        inputs[task.tokens] = named.get(task.tokens, start)
    tokens = inputs[task.tokens]
    inputs[task.tokens] = tokens.repeat(1, 1 + STEPS)[:, : tokens.shape[1] + STEPS]
    return inputs


def _export(model: nn.Module, task: Task, inputs: ModelInputs, stage: Path) -> None:
    # The exporter changes what it is given: the copy has tensors in common with the model, and nothing else.
    part: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    part.config.__dict__.pop(CONFIG_ATTRIBUTE, None)  # the files hold the network, whatever its widths
    part.config.architectures = [type(model).__name__]
    arguments = dict(zip(inputs.names, inputs.tensors, strict=True))
    with torch.no_grad():
        caches = optimum.caches_of(part(**arguments, use_cache=True))
    sounds = arguments.get("input_features")
    shapes = {} if sounds is None else {"nb_max_frames": sounds.shape[-1]}
    optimum.export_parts(part, stage, task.name, caches, **shapes)


def _verified(ready: Prepared, task: Task, stage: Path, folder: Path, precision: str) -> Verification:
    """Compares the last tokens' logits: after the first of them, and after each of the others out of the cache."""
    limit = None
    if can_do_without_rounding(ready.flat.model):
        with tempfile.TemporaryDirectory() as place, without_rounding(ready.flat, ready.trace_inputs) as own:
            ranges = _written_without_rounding(stage, Path(place))
            exact = _session(ready, task, Path(place), QUANTIZED)
            compare_unrounded(exact, folder, list(_references(ready)), ["logits"], ranges, own)
        limit = ROUNDED
    session = _session(ready, task, stage, precision)
    return compare(session, folder, list(_references(ready)), ["logits"], limit)


def _references(ready: Prepared) -> Iterator[Reference]:
    at = ready.output_names.index("logits")
    for one in ready.references:
        yield Reference(one.inputs, (outputs_of(ready.flat, one.inputs)[at][:, -STEPS - 1 :],))


def _written_without_rounding(stage: Path, place: Path) -> Sequence[Any]:
    shutil.copytree(stage, place, dirs_exist_ok=True)
    ranges = []
    for path in stage.glob("*.xml"):
        model = openvino.Core().read_model(path)
        ranges += ir_without_rounding(model)
        openvino.save_model(model, place / path.name, compress_to_fp16=False)
    return ranges


def _session(ready: Prepared, task: Task, folder: Path, arithmetic: str) -> Session:
    kind = getattr(require_package("optimum.intel", optimum.PACKAGE), task.served_by)
    served = kind.from_pretrained(folder, ov_config=_EXACT)
    names = ready.input_names

    def run(arrays: Sequence[Array]) -> list[Array]:
        given = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        return [torch.cat(list(_logits(served, given, task.tokens)), 1).numpy()]

    return Session(optimum.PACKAGE, names, True, arithmetic, run)


def _logits(served: Any, given: Mapping[str, Tensor], tokens: str) -> Iterator[Tensor]:
    """``[n, 1, words]`` for each of the last tokens, served one by one behind the others."""
    row, past = given[tokens], None
    ends = range(row.shape[1] - STEPS, row.shape[1] + 1)
    for start, end in zip([0, *ends], ends, strict=False):
        output = served(**{**given, tokens: row[:, start:end]}, past_key_values=past)
        past = output.past_key_values
        yield output.logits[:, -1:]
