"""The paper's experiments on text: masked, autoregressive and recurrent-depth language models.

MD4 is Shi et al. 2024 (arXiv 2406.04329), Huginn is Geiping et al. 2025 (arXiv 2502.05171), Pythia
is Biderman et al. 2023 (arXiv 2304.01373); "code" is the released code of the paper, a ViT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dblocks.recipes.paper.experiment import Experiment, Published, Value, steps

ON_A_GPU = {
    "device": Value("cuda", "nobody trains these on a CPU"),
    "bf16": Value(True, "not in the paper"),
    "clip": Value(1.0, "not in the paper; as the released code of the ViT"),
}


def _bits(record: Mapping[str, Any]) -> float | None:
    """Bits per character, a bound, of the held-out text."""
    return record["bits"]


def _not_measured(record: Mapping[str, Any]) -> None:
    """Nothing: MAUVE needs the features of a large language model."""


TEXT8_STEPS = steps(epochs=100, samples=90_000_000 // 256, batch_size=256, blocks=3)

TEXT8 = Experiment(
    network="masked-lm",
    data="text8",
    files="the file text8 of 100,000,000 characters",
    epochs=100,
    samples=90_000_000,
    labels=28,  # with one for unknown characters
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
    },
    ours={
        "draw": Value("alpha", "even in the masking ratio; the linear schedule makes t the same"),
        "rope_theta": Value(10_000.0, "not in the paper"),
        **ON_A_GPU,
    },
    differs=(
        "The vocabulary has one more token, for characters that are none of text8's.",
        "The conditioning is as wide as the model, as DiT's; that of SEDD and MDLM is 128 wide.",
        "There is no average of the weights; MD4 evaluates an EMA.",
    ),
    metric="bits a character of the test text, a bound",
    rows=(
        Published("DiffusionBlocks", "1.45", "Table 3"),
        Published("MD4, end to end", "1.56", "Table 3"),
    ),
    measured=_bits,
)


# What the two autoregressive models have in common.
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
# What all of these denoise by.
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
LM_OURS = {
    "weight_decay": Value(0.01, "not in the paper; AdamW's default"),
    "decay": Value("constant", "not in the paper; the default of the ViT's code"),
    **ON_A_GPU,
}
LM_DIFFERS = (
    "Texts are packed into windows that start anywhere; the paper does not say how it cuts them.",
    "The epochs are of the number of tokens stated here, which is ours: the paper gives none.",
    "The output head is tied to the embeddings, which the paper does not say.",
)
MAUVE = (
    "MAUVE needs the features of a large language model: 5 continuations of 50 tokens of 1,000 "
    "prompts, 4 steps, greedy, against 1,000 references with the scaling factor 2 (App. E.4)"
)
LM1B_TOKENS = 1_100_000_000
OPENWEBTEXT_TOKENS = 9_400_000_000
LM1B_STEPS = steps(epochs=10, samples=LM1B_TOKENS // 256, batch_size=256, blocks=4)
OPENWEBTEXT_STEPS = steps(epochs=10, samples=OPENWEBTEXT_TOKENS // 1024, batch_size=256, blocks=4)
HUGINN_STEPS = steps(epochs=15, samples=LM1B_TOKENS // 256, batch_size=256, blocks=1)

LM1B = Experiment(
    network="causal-lm",
    data="lm1b",
    files="the folder of the One Billion Word benchmark as unpacked, or of its parquet files",
    epochs=10,
    samples=LM1B_TOKENS,
    labels=32_000,
    published={
        **LLAMA,
        "context": Value(256, "App. E.4"),
        "steps": Value(LM1B_STEPS, "App. E.4: 10 epochs; of 1.1e9 tokens, an estimate of ours"),
        "warmup": Value(4 * 2500 / LM1B_STEPS, "App. E.4: 2,500 steps; here for each block"),
        **DENOISING,
    },
    ours=LM_OURS,
    differs=LM_DIFFERS,
    metric="MAUVE / perplexity under Llama-2-7B / under GPT2-XL",
    rows=(
        Published("DiffusionBlocks", "0.71 / 12.32 / 30.99", "Table 4"),
        Published("end to end", "0.50 / 14.58 / 38.87", "Table 4"),
    ),
    measured=_not_measured,
    unmeasured=MAUVE,
    tokenizer="Llama-2's, of 32,000 tokens",
)

OPENWEBTEXT = Experiment(
    network="causal-lm",
    data="openwebtext",
    files="the folder of OpenWebText's parquet or arrow files with a column text",
    epochs=10,
    samples=OPENWEBTEXT_TOKENS,
    labels=32_000,
    published={
        **LLAMA,
        "context": Value(1024, "App. E.4"),
        "steps": Value(
            OPENWEBTEXT_STEPS, "App. E.4: 10 epochs; of 9.4e9 tokens, an estimate of ours"
        ),
        "warmup": Value(4 * 2500 / OPENWEBTEXT_STEPS, "App. E.4: 2,500 steps; here a block"),
        **DENOISING,
    },
    ours=LM_OURS,
    differs=LM_DIFFERS,
    metric="MAUVE / perplexity under Llama-2-7B / under GPT2-XL",
    rows=(
        Published("DiffusionBlocks", "0.82 / 14.99 / 26.33", "Table 4"),
        Published("end to end", "0.85 / 15.05 / 25.24", "Table 4"),
    ),
    measured=_not_measured,
    unmeasured=MAUVE,
    tokenizer="Llama-2's, of 32,000 tokens",
)

HUGINN = Experiment(
    network="recurrent",
    data="lm1b",
    files=LM1B.files,
    epochs=15,
    samples=LM1B_TOKENS,
    labels=50_304,
    published={
        "prelude": Value(2, "App. E.5"),
        "depth": Value(4, "App. E.5: the recurrent block"),
        "coda": Value(2, "App. E.5"),
        "width": Value(512, "App. E.5: Pythia-70M"),
        "heads": Value(8, "App. E.5: Pythia-70M"),
        "blocks": Value(1, "App. E.5: the full network is the denoiser"),
        "mean_recurrence": Value(32, "App. E.5, of the baseline"),
        "backprop_depth": Value(8, "App. E.5, of the baseline"),
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
    metric="MAUVE / perplexity under Llama-2-7B / under GPT2-XL",
    rows=(
        Published("DiffusionBlocks", "0.70 / 16.08 / 42.43", "Table 5"),
        Published("Huginn, end to end", "0.49 / 17.04 / 46.73", "Table 5"),
    ),
    measured=_not_measured,
    unmeasured=MAUVE,
    tokenizer="Pythia's, of 50,304 tokens with its padding",
)
