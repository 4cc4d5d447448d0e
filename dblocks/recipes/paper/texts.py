"""The paper's experiments on text: masked, autoregressive and recurrent-depth language models.

MD4 is Shi et al. 2024 (arXiv 2406.04329), MDLM is Sahoo et al. 2024 (arXiv 2406.07524), Huginn is
Geiping et al. 2025 (arXiv 2502.05171), Pythia is Biderman et al. 2023 (arXiv 2304.01373), each with
its code; "code" alone is the released code of the paper, which has only the ViT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dblocks.recipes.paper.experiment import (
    CUDA,
    Experiment,
    Published,
    Value,
    not_measured,
    steps,
)


def _bits(record: Mapping[str, Any]) -> float | None:
    """Bits per character of the held-out text, an upper bound."""
    return record["bits"]


TEXT8_STEPS = steps(epochs=100, samples=90_000_000 // 256, batch_size=256, blocks=3)

TEXT8 = Experiment(
    network="masked-lm",
    data="text8",
    files="the file text8 of 100,000,000 characters",
    epochs=100,
    samples=90_000_000,
    labels=28,  # including one for unknown characters
    published={
        "depth": Value(12, "App. E.3"),
        "width": Value(768, "App. E.3"),
        "heads": Value(12, "App. E.3"),
        "context": Value(256, "App. E.3"),
        "blocks": Value(3, "App. E.3"),
        "overlap": Value(0.05, "App. E.3"),
        "batch_size": Value(256, "App. E.3"),
        "steps": Value(TEXT8_STEPS, "App. E.3: 100 epochs"),
        "lr": Value(3e-4, "App. E.3"),
        "weight_decay": Value(0.03, "App. E.3"),
        "warmup": Value(3 * 2000 / TEXT8_STEPS, "App. E.3: 2,000 steps; here for each block"),
        "decay": Value("cosine", "App. E.3: MD4's protocol; cosine in its code"),
        "schedule": Value("linear", "App. E.3"),
        "weighting": Value("auto", "App. D, Eq. 13: that of the bound"),
        "conditioning": Value("dit", "App. E.3: DiT-based; adaLN-Zero in MD4's code"),
        "gate_init": Value(0.0, "App. E.3: DiT-based; adaLN-Zero in MD4's code"),
        "ema": Value(0.9999, "App. E.3: MD4's protocol; in its code, without a warm-up"),
        "rope_theta": Value(10_000.0, "App. E.3: MD4's protocol; in its code"),
    },
    ours={
        "draw": Value("alpha", "even in the masking ratio; the linear schedule makes t the same"),
        **CUDA,
        "bf16": Value(True, "not in the paper"),
        "clip": Value(1.0, "not in the paper; as the code of the ViT, MD4's has none"),
    },
    differs=(
        "The vocabulary has one more token, for characters that are none of text8's.",
        "The conditioning is as wide as the model, as DiT's; that of MD4's code is 64 wide.",
        "The MLP's gate is SiLU; in MD4's code a sigmoid.",
        "There is no dropout; MD4's code has .05 beside the weight decay of .03, and whether the "
        "paper does is not checked.",
    ),
    metric="bits per character of the test text, a bound",
    rows=(
        Published("DiffusionBlocks", "1.45", "Table 3"),
        Published("MD4, end to end", "1.56", "Table 3"),
    ),
    measured=_bits,
)


# The common settings of both autoregressive models.
LLAMA = {
    "depth": Value(12, "App. E.4"),
    "width": Value(768, "App. E.4"),
    "heads": Value(12, "App. E.4"),
    "blocks": Value(4, "App. E.4"),
    "batch_size": Value(256, "App. E.4"),
    "lr": Value(3e-4, "App. E.4"),
    "conditioning": Value("dit", "App. E.4: time conditioning as in DiT"),
    "gate_init": Value(0.0, "App. E.4: as in DiT, adaLN-Zero"),
}
# The common schedule.
DENOISING = {
    "overlap": Value(0.1, "App. C, E.4"),
    "rows": Value("doubled", "App. E.4: clean and noisy rows side by side"),
    "head": Value("learned", "Sec. 3.2: cross-entropy of an output head"),
    "top_share": Value(0.0, "Eq. 6: draws within the block's own range only"),
    "p_mean": Value(-1.2, "App. E"),
    "p_std": Value(1.2, "App. E"),
    "sigma_data": Value(0.5, "App. C: for all experiments"),
    "embed_scale": Value(1.0, "App. C: normalised embeddings"),
    "weighting": Value("batch_mean", "App. C: EDM's weights; in the code their mean over a batch"),
}
# MDLM's code has the learning rate and the warm-up of App. E.4.
LM_OURS = {
    "weight_decay": Value(0.0, "not in the paper; as MDLM's code"),
    "decay": Value("constant", "not in the paper; as MDLM's code"),
    **CUDA,
    "bf16": Value(True, "not in the paper; as MDLM's code"),
    "clip": Value(1.0, "not in the paper; as MDLM's code, and the ViT's"),
}
LM_DIFFERS = (
    "Texts are packed into windows that start anywhere; the paper does not say how it cuts them.",
    "The epochs are of the number of tokens stated here, which is ours: the paper gives none.",
    "The output head is tied to the embeddings, which the paper does not say.",
    "There is no average of the weights; MDLM's code has one, the paper says nothing.",
)
MAUVE = (
    "MAUVE needs the features of a large language model: 5 continuations of 50 tokens of 1,000 "
    "prompts, 4 steps, greedy, against 1,000 references with the scaling factor 2 (App. E.4)"
)
LM1B_TOKENS = 1_100_000_000
OPENWEBTEXT_TOKENS = 9_400_000_000
HUGINN_STEPS = steps(epochs=15, samples=LM1B_TOKENS // 256, batch_size=256, blocks=1)
# The common measure.
JUDGED: dict[str, Any] = {
    "metric": "MAUVE / perplexity under Llama-2-7B / under GPT2-XL",
    "measured": not_measured,
    "unmeasured": MAUVE,
}


def _llama(*, tokens: int, context: int, estimate: str, **rest: Any) -> Experiment:
    """The common settings of both autoregressive experiments."""
    taken = steps(epochs=10, samples=tokens // context, batch_size=256, blocks=4)
    return Experiment(
        network="causal-lm",
        epochs=10,
        samples=tokens,
        labels=32_000,
        published={
            **LLAMA,
            "context": Value(context, "App. E.4"),
            "steps": Value(
                taken, f"App. E.4: 10 epochs; of {estimate} tokens, an estimate of ours"
            ),
            "warmup": Value(4 * 2500 / taken, "App. E.4: 2,500 steps; here for each block"),
            **DENOISING,
        },
        ours=LM_OURS,
        differs=LM_DIFFERS,
        tokenizer="Llama-2's, of 32,000 tokens",
        **JUDGED,
        **rest,
    )


LM1B = _llama(
    data="lm1b",
    files="the folder of the One Billion Word benchmark as unpacked, or of its parquet files",
    tokens=LM1B_TOKENS,
    context=256,
    estimate="1.1e9",
    rows=(
        Published("DiffusionBlocks", "0.71 / 12.32 / 30.99", "Table 4"),
        Published("end to end", "0.50 / 14.58 / 38.87", "Table 4"),
    ),
)

OPENWEBTEXT = _llama(
    data="openwebtext",
    files="the folder of OpenWebText's parquet or arrow files with a column text",
    tokens=OPENWEBTEXT_TOKENS,
    context=1024,
    estimate="9.4e9",
    rows=(
        Published("DiffusionBlocks", "0.82 / 14.99 / 26.33", "Table 4"),
        Published("end to end", "0.85 / 15.05 / 25.24", "Table 4"),
    ),
)

HUGINN = Experiment(
    network="recurrent",
    data="lm1b",
    files=LM1B.files,
    epochs=15,
    samples=LM1B_TOKENS,
    labels=50_304,
    published={
        "prelude": Value(2, "App. E.5; as Huginn's code"),
        "depth": Value(4, "App. E.5: the recurrent block; as Huginn's code"),
        "coda": Value(2, "App. E.5; as Huginn's code"),
        "width": Value(512, "App. E.5: Pythia-70M"),
        "heads": Value(8, "App. E.5: Pythia-70M"),
        "blocks": Value(1, "App. E.5: the full network is the denoiser"),
        "mean_recurrence": Value(32, "App. E.5, of the baseline; as Huginn's code"),
        "backprop_depth": Value(8, "App. E.5, of the baseline; as Huginn's code"),
        "steps": Value(HUGINN_STEPS, "App. E.5: 15 epochs; of 1.1e9 tokens, an estimate of ours"),
        "conditioning": Value("dit", "Sec. 3.1: AdaLN as in DiT"),
        "gate_init": Value(0.0, "Sec. 3.1: as in DiT, adaLN-Zero"),
        **DENOISING,
    },
    ours={
        "context": Value(256, "not in App. E.5; LM1B's of App. E.4"),
        "batch_size": Value(256, "not in App. E.5; that of App. E.4"),
        "lr": Value(3e-4, "not in App. E.5; that of App. E.4"),
        "warmup": Value(2500 / HUGINN_STEPS, "not in App. E.5; 2,500 steps as in App. E.4"),
        **LM_OURS,
    },
    differs=(
        *LM_DIFFERS,
        "Layers are those of Llama, with an MLP of three matrices; Pythia's has two.",
        "The baseline trains for 5 epochs (App. E.5): give --end-to-end a third of the steps.",
    ),
    rows=(
        Published("DiffusionBlocks", "0.70 / 16.08 / 42.43", "Table 5"),
        Published("Huginn, end to end", "0.49 / 17.04 / 46.73", "Table 5"),
    ),
    **JUDGED,
    tokenizer="Pythia's, of 50,304 tokens with its padding",
)
