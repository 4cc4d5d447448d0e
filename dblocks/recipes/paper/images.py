"""The paper's experiments on images: classification by ViT, generation by DiT.

"Code" is the released code of the paper, which has only the ViT; DiT is Peebles and Xie 2023
(arXiv 2212.09748) and its code, EDM is Karras et al. 2022 (arXiv 2206.00364).
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

ON_A_GPU = {
    **CUDA,
    "bf16": Value(True, "the paper names no precision; the code has float32 with TF32"),
}
CLIP = Value(1.0, "code: gradient_clip_val")
STEPS_4 = "4"  # number of denoising steps for the paper's accuracy


def _accuracy(record: Mapping[str, Any]) -> float | None:
    """Accuracy in percent: with 4 Euler steps from noise, or end to end."""
    from_noise = record["accuracy_from_noise"]
    return 100 * (record["accuracy"] if from_noise is None else from_noise[STEPS_4])


# The settings of both ViTs from the released code.
VIT_CODE = {
    "clip": CLIP,
    "weight_decay": Value(0.01, "code: default of --weight_decay"),
    "conditioning": Value("official", "code: ViTDiTLayer, AdaLN"),
    "gate_init": Value(0.0, "code: the AdaLN layers start at 0"),
    "head": Value("learned", "App. B: cross-entropy of the classification head"),
    "noise_scale": Value(None, "code: the noisy label takes the class token's place"),
    "noise": Value("paper", "Sec. 3.1: z_0 = sigma_max eps"),
    "weighting": Value("batch_mean", "App. C: EDM's weights; in the code their mean over a batch"),
    "top_share": Value(0.0, "Eq. 6: draws within the block's own range only"),
}
VIT_DIFFERS = (
    "Pixels are in [-1, 1]; the code divides by the data's own mean and std.",
    "Layers are Xavier uniform, and matrices alone have weight decay.",
)

CIFAR100 = Experiment(
    network="vit",
    data="cifar-100",
    files="the folder of CIFAR-100 in its python or binary version",
    epochs=500,
    samples=50_000,
    shape=(3, 32, 32),
    labels=100,
    published={
        "depth": Value(12, "App. E.1"),
        "patch_size": Value(4, "App. E.1"),
        "width": Value(128, "App. E.1"),
        "heads": Value(4, "App. E.1"),
        "mlp_ratio": Value(24.0, "code: intermediate_size left at ViT-Base's 3072"),
        "blocks": Value(3, "App. E.1"),
        "batch_size": Value(128, "App. E.1"),
        "steps": Value(
            steps(epochs=500, samples=50_000, batch_size=128, blocks=3), "App. E.1: 500 epochs"
        ),
        "lr": Value(5e-4, "App. E.1"),
        "decay": Value("cosine", "App. E.1"),
        "lr_end": Value(5e-5, "code: min_lr of its command for augmented data"),
        "warmup": Value(10 / 500, "App. E.1: 10 epochs; in the code so many for each block"),
        "dropout": Value(0.1, "App. E.1; in the code of tokens, branches and attention"),
        "flip": Value(True, "App. E.1"),
        "rand_augment": Value(True, "App. E.1; in the code torchvision's defaults"),
        "crop": Value("pad", "code: RandomCrop with 4 pixels around"),
        **VIT_CODE,
    },
    ours=ON_A_GPU,
    differs=(
        *VIT_DIFFERS,
        "The code's command for augmented data trains for 1,000 epochs, the paper for 500.",
    ),
    metric="accuracy on the test images, %",
    rows=(
        Published("DiffusionBlocks", "59.30", "Table 1"),
        Published("end to end", "60.25", "Table 1"),
        Published("Forward-Forward", "7.85", "Table 1"),
    ),
    measured=_accuracy,
)

TINY_IMAGENET = Experiment(
    network="vit",
    data="tiny-imagenet",
    files="the folder of Tiny-ImageNet as unpacked (train, val), or of its parquet files",
    epochs=100,
    samples=100_000,
    shape=(3, 64, 64),
    labels=200,
    published={
        "depth": Value(12, "App. F.1"),
        "patch_size": Value(4, "App. F.1"),
        "width": Value(768, "App. F.1"),
        "heads": Value(12, "App. F.1"),
        "mlp_ratio": Value(4.0, "code: intermediate_size 3072"),
        "blocks": Value(2, "App. F.1"),
        "batch_size": Value(256, "App. F.1"),
        "steps": Value(
            steps(epochs=100, samples=100_000, batch_size=256, blocks=2), "App. F.1: 100 epochs"
        ),
        "lr": Value(1e-4, "App. F.1"),
        "decay": Value("constant", "code: default of --scheduler_type"),
        "warmup": Value(0.0, "code: default of --num_warmup_steps"),
        "dropout": Value(0.1, "code: of tokens, branches and attention"),
        "flip": Value(True, "code: RandomHorizontalFlip"),
        "crop": Value("resize", "code: RandomResizedCrop"),
        **VIT_CODE,
    },
    ours={
        "rand_augment": Value(
            True, "App. E.1 has it, and the code as an option; of App. F.1 it is not checked"
        ),
        **ON_A_GPU,
    },
    differs=VIT_DIFFERS,
    metric="accuracy on the validation images, %",
    rows=(
        Published("DiffusionBlocks", "36.16", "Table 9"),
        Published("end to end", "35.32", "Table 9"),
    ),
    measured=_accuracy,
)


DIT_SAMPLING = {
    "samples": Value(50_000, "App. E.2"),
    "sampling_steps": Value(50, "App. E.2: Euler"),
    "guidance_scale": Value(2.0, "App. E.2"),
    "sigma_data": Value(0.5, "App. C: for all experiments"),
    "weighting": Value("edm", "App. C"),
    "patch_size": Value(2, "App. E.2: DiT-S/2 and DiT-L/2"),
    "mlp_ratio": Value(4.0, "DiT"),
    "conditioning": Value("dit", "DiT: adaLN-Zero"),
    "gate_init": Value(0.0, "DiT: adaLN-Zero"),
}
DIT_OURS = {
    "decay": Value("constant", "not in the paper; as DiT's code"),
    "warmup": Value(0.0, "not in the paper; as DiT's code"),
    "weight_decay": Value(0.0, "not in the paper; as DiT's code"),
    "ema": Value(0.9999, "not in the paper; as DiT's code, with a warm-up"),
    "clip": Value(1.0, "not in the paper; as the code of the ViT, DiT's has none"),
    **ON_A_GPU,
}
DIT_DIFFERS = ("Steps are at the quantiles of equal mass, which App. H describes.",)
FID = (
    "FID needs the weights of an Inception network: `dblocks sample dit --out samples.npz {flags}` "
    "draws 50,000 samples for clean-fid, torch-fidelity and the others of docs/paper.md"
)


def _dit(
    *,
    published: Mapping[str, Value],
    ours: Mapping[str, Value],
    samples: int,
    flags: str,
    differs: tuple[str, ...] = (),
    **rest: Any,
) -> Experiment:
    """The common settings of both DiTs."""
    taken = steps(epochs=100, samples=samples, batch_size=512, blocks=3)
    return Experiment(
        network="dit",
        epochs=100,
        samples=samples,
        published={
            **published,
            "blocks": Value(3, "App. E.2"),
            "batch_size": Value(512, "App. E.2"),
            "steps": Value(taken, "App. E.2: 100 epochs"),
            **DIT_SAMPLING,
        },
        ours={**ours, **DIT_OURS},
        differs=(*DIT_DIFFERS, *differs),
        metric="FID of 50,000 samples, to the training / test images",
        measured=not_measured,
        unmeasured=FID.format(flags=flags),
        **rest,
    )


CIFAR10 = _dit(
    data="cifar-10",
    files="the folder of CIFAR-10 in its python or binary version",
    samples=50_000,
    shape=(3, 32, 32),
    labels=10,
    published={
        "depth": Value(12, "App. E.2: DiT-S/2"),
        "width": Value(384, "DiT, Table 1: S"),
        "heads": Value(6, "DiT, Table 1: S"),
        "lr": Value(1e-4, "App. E.2"),
    },
    ours={"flip": Value(True, "not in the paper; as DiT's code")},
    rows=(
        Published("DiffusionBlocks", "30.59 / 37.20", "Table 2"),
        Published("end to end", "32.84 / 39.83", "Table 2"),
    ),
    flags="--count 5000 --device cuda",
)

IMAGENET = _dit(
    data="imagenet-latents",
    files="a folder of .npz or .safetensors shards with `latents` [n, 4, 32, 32], of the images of "
    "256x256 by the autoencoder sd-vae-ft-ema, and `labels` [n]",
    samples=1_281_167,
    shape=(4, 32, 32),
    labels=1000,
    published={
        "depth": Value(24, "App. E.2: DiT-L/2"),
        "width": Value(1024, "DiT, Table 1: L"),
        "heads": Value(16, "DiT, Table 1: L"),
        "lr": Value(5e-5, "App. E.2"),
    },
    ours={
        "scale": Value(
            0.5 * 0.18215,
            "not in the paper; sigma_data times the factor of DiT's code, for a std of about "
            "sigma_data",
        ),
    },
    differs=(
        "Latents are used as stored, one per image; DiT's code flips half of the images before "
        "its autoencoder and draws a new latent each time.",
    ),
    rows=(
        Published("DiffusionBlocks", "9.00 / 10.63", "Table 2"),
        Published("end to end", "9.01 / 12.09", "Table 2"),
    ),
    flags="--count 50 --vae FOLDER --device cuda",
)
