"""What transformers lose with a narrower stream: rotated first, beside channels left out by magnitude.

Two small language models (Llama with RMSNorm and GPT-2 with LayerNorm, as transformers has them, 4 blocks of 128
channels, embeddings not tied to the head) are trained here to predict the bytes of this repository's own text and
source. Then the width of the stream alone is cut to 90, 80 and 70 %, and nothing is trained. Measured is the loss on
files that neither training nor calibration saw, in bits for a byte. One seed, one thread.

    python examples/benchmarks/rotation.py
"""

from __future__ import annotations

import argparse
import copy
import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from pages import measured_on, write_page
from timm_import import let_torchvision_import
from torch import Tensor, nn

let_torchvision_import()  # parts of transformers import it where it is installed

import transformers  # noqa: E402

from nncf_compactprune import prune  # noqa: E402
from nncf_compactprune.algorithms.rotation.basis import Basis  # noqa: E402
from nncf_compactprune.decide.budgets import AllocationProblem, Scores, Widths  # noqa: E402

ROOT = Path(__file__).parents[2]
WIDTH, LENGTH, BATCH, STEPS = 128, 128, 16, 500
SHARES = (0.9, 0.8, 0.7)
SIZES = {"vocab_size": 256, "use_cache": False, "tie_word_embeddings": False}
BLOCKS = {"hidden_size": WIDTH, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": LENGTH}  # fmt: skip
NETS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **BLOCKS)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **SIZES, n_embd=WIDTH, n_layer=4, n_head=4, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
        )
    ),
}
ROTATE, REFIT = {"rotate": {}}, {"refit": {"num_samples": 128}}
WAYS: Mapping[str, Mapping[str, Any] | None] = {
    "by magnitude": None,
    "by magnitude, re-fitted": REFIT,
    "rotated, norms left as they are": ROTATE,
    "rotated": ROTATE,
    "rotated, re-fitted": {**ROTATE, **REFIT},
}


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and those of about every tenth file."""
    places = ("*.md", "docs/**/*.md", "nncf_compactprune/**/*.py", "tests/**/*.py")
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(path for place in places for path in ROOT.glob(place)):
        parts[zlib.crc32(str(path.relative_to(ROOT)).encode()) % 10 == 0].append(path.read_bytes())
    train, held = (torch.from_numpy(np.frombuffer(b"".join(part), np.uint8).astype(np.int64)) for part in parts)
    return train, held


def drawn(text: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of pieces from anywhere in a text."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    words = torch.stack([text[start : start + LENGTH] for start in starts.tolist()])
    return {"input_ids": words, "labels": words}


def train(model: nn.Module, text: Tensor) -> None:
    """AdamW, with a warm-up and a cosine."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / STEPS)) / 2)
    )
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**drawn(text, generator)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
    model.eval()


@torch.no_grad()
def bits(model: nn.Module, text: Tensor) -> float:
    """Mean loss over pieces of a text, in bits for a byte."""
    generator = torch.Generator().manual_seed(1)
    losses = [float(model(**drawn(text, generator)).loss) for _ in range(12)]
    return sum(losses) / len(losses) / math.log(2)


def narrower(share: float) -> Callable[[AllocationProblem, Scores], Widths]:
    """An allocation that cuts the stream alone."""

    def allocation(problem: AllocationProblem, scores: Scores) -> Widths:
        sizes = np.asarray(problem.sizes, np.float64)
        return np.where(sizes == WIDTH, np.round(share * WIDTH), sizes)

    return allocation


def cut(dense: nn.Module, way: str, share: float, text: Tensor) -> nn.Module:
    """A copy of a network with a narrower stream."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(2)
    loader = [drawn(text, generator) for _ in range(8)]
    options = {"allocation": narrower(share), "round_to": 1, "allow_approximate": True, "budget": {"params": 1.0}}
    as_they_are = mock.patch.object(Basis, "factor", return_value=1.0) if "as they are" in way else nullcontext()
    with as_they_are:
        prune(model, {"input_ids": loader[0]["input_ids"]}, train_loader=loader, initializer=WAYS[way], **options)
    return model


def rows_of(name: str) -> list[str]:
    """A network's rows."""
    torch.manual_seed(0)
    text, held = texts()
    dense = NETS[name]()
    train(dense, text)
    whole, rows = bits(dense, held), []
    for way in WAYS:
        found = [bits(cut(dense, way, share, text), held) for share in SHARES]
        rows.append(f"| {name} | {way} | {whole:.3f} | " + " | ".join(f"{one:.3f}" for one in found) + " |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETS), nargs="*", default=list(NETS))
    nets = parser.parse_args().net
    torch.set_num_threads(1)
    rows = [row for name in nets for row in rows_of(name)]
    text = f"""# Rotation of the stream, beside magnitude

By `python examples/benchmarks/rotation.py`: language models of {WIDTH} channels, trained here for {STEPS} steps on the
bytes of this repository. Only the width of the stream is cut, nothing is trained afterwards. Loss on files that were
held out, in bits for a byte; one seed. Rotation and re-fit look at 128 pieces of {LENGTH} bytes of the training text.
The figures move a little with the repository's text.

| network | stream cut | dense | {" | ".join(f"{share:.0%}" for share in SHARES)} |
| --- | --- | ---: | {" | ".join("---:" for _ in SHARES)} |
{chr(10).join(rows)}

{measured_on()}
"""
    write_page(Path(__file__).with_suffix(".md"), text)


if __name__ == "__main__":
    main()
