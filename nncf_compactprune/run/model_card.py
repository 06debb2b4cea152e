"""``model_card.md``: what a run's network is, how its inputs are made, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence

from nncf_compactprune.export import ExportedFile, ExportOptions
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.report import Comparison, to_markdown
from nncf_compactprune.run.state import Run
from nncf_compactprune.version import __version__

SHOWN_LABELS = 20


def model_card(
    run: Run, comparison: Comparison, plan: PruningPlan, files: Sequence[ExportedFile], options: ExportOptions
) -> str:
    """A card in Markdown, with the front matter that Hugging Face's hub reads.

    :param run: the run.
    :param comparison: dense and pruned figures.
    :param plan: what was removed.
    :param files: of the pruned network.
    :param options: what the files say of images and classes.
    """
    config = run.config
    data = f"`{config.dataset}`" if config.dataset is not None else "no data"
    measured = comparison.dense.accuracy is not None
    accuracy = "Accuracy is top-1 on the test images, by torch." if measured else "No accuracy was measured."
    lines = [
        "---",
        "library_name: openvino",
        "tags: [pruned, nncf, openvino, onnx]",
        "---",
        "",
        f"# {config.model}, {' and '.join(entry.algorithm for entry in run.settings.compression.compression)}",
        "",
        f"Made by `nncf-compactprune run` {__version__} with {data}, {config.epochs} epochs of fine-tuning, seed "
        f"{config.seed}. The pruned network has {plan.after.macs / max(plan.before.macs, 1):.1%} of the dense one's "
        "multiply-accumulates.",
        "",
        "## Measured",
        "",
        f"{accuracy} Latency is the median of single requests on this machine.",
        "",
        to_markdown(comparison),
        "## Files",
        "",
        "| file | kind | bytes | error against torch, of the largest output |",
        "| --- | --- | ---: | ---: |",
        *(f"| `{f.path.name}` | {f.label} | {f.bytes:,} | {f.verification.max_rel_error:.1e} |" for f in files),
        "",
    ]
    if options.pixels is not None or options.labels:
        lines += ["## Inputs and outputs", ""]
    if options.pixels is not None:
        mean, std = (", ".join(f"{one:g}" for one in values) for values in (options.pixels.mean, options.pixels.std))
        said = "The files do this themselves." if options.embed_preprocessing else "Do this before a request."
        lines += [f"Images `[n, c, h, w]`: pixels / 255, minus ({mean}), over ({std}), a value a channel. {said}", ""]
    if options.labels:
        shown = ", ".join(options.labels[:SHOWN_LABELS])
        lines.append(f"Classes, in order: {shown}{' ...' if len(options.labels) > SHOWN_LABELS else ''}.")
    return "\n".join(lines).rstrip() + "\n"
