"""The columns of each network's table; the columns of costs are in `tables`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dblocks.recipes.tables import Column, Record, mean, percent, spread

SAMPLES = 32  # number of text continuations in a record
STEPS_WINDOWS = 32  # held-out windows on which a recurrent model's numbers of steps are compared


def accuracy(record: Record) -> float:
    """The held-out accuracy of a run."""
    return record["accuracy"]


def by_euler_steps(steps: int, noise: bool) -> Callable[[Record], float | None]:
    """Reads the accuracy with a number of Euler steps; None for end-to-end runs."""
    key = "accuracy_from_noise" if noise else "accuracy_by_denoising_steps"

    def read(record: Record) -> float | None:
        return None if record[key] is None else record[key][str(steps)]

    return read


def _alone(block: int) -> Callable[[Record], float | None]:
    """Reads the accuracy of one block alone; None if it does not exist."""

    def read(record: Record) -> float | None:
        found = record["blocks_alone"]
        return None if found is None or block >= len(found) else found[block]

    return read


def _accuracy_column(head: str, key: Callable[[Record], float | None]) -> Column:
    return Column(head, lambda records: percent(records, key))


def _steps_columns(head: str, noise: bool) -> tuple[Column, ...]:
    lines = (_accuracy_column(f"  {n}", by_euler_steps(n, noise)) for n in (1, 3, 6))
    return (Column(f"{head}:", lambda _: ""), *lines)


VIT = (
    _accuracy_column("held-out accuracy", accuracy),
    *_steps_columns("  by Euler steps from the mean", noise=False),
    *_steps_columns("  by Euler steps from noise", noise=True),
    Column("  of each block alone:", lambda _: ""),
    *(_accuracy_column(f"  {block + 1}", _alone(block)) for block in range(3)),
    Column("AdaLN", lambda r: "yes" if r[0]["adaln"] else "no"),
)


def l2_loss(record: Record) -> float:
    """The L2 loss of the held-out images."""
    return record["loss"]


def _judged(name: str) -> Callable[[Record], float | None]:
    """Reads a metric of samples by the classifier; None for data without classes."""
    # Older records lack precision and recall.
    return lambda record: None if record["judged"] is None else record["judged"].get(name)


def _calls(records: Sequence[Record]) -> str:
    """Number of calls of each block's layers to generate an image."""
    return "/".join(map(str, records[0]["calls_of_blocks"]))


_UNCOUNTED = "Precision and recall are not shown: these runs were made before they were measured."

DIT_QUALITY = (
    Column("Fréchet distance, guided samples", lambda r: spread(r, _judged("distance"), ".2f")),
    Column(
        "Fréchet distance, unguided samples",
        lambda r: spread(r, _judged("distance_unguided"), ".2f"),
    ),
    Column(
        "Precision, guided samples", lambda r: spread(r, _judged("precision"), ".2f"), _UNCOUNTED
    ),
    Column("Recall, guided samples", lambda r: spread(r, _judged("recall"), ".2f"), _UNCOUNTED),
    Column("Layer evaluations per image", lambda r: f"{r[0]['layer_evaluations_per_image']:,}"),
)
DIT = (
    *DIT_QUALITY,
    _accuracy_column("Guided samples of the right class", _judged("accuracy")),
    _accuracy_column("Unguided samples of the right class", _judged("accuracy_unguided")),
    Column("Held-out L2 loss", lambda r: spread(r, l2_loss, ".4f")),
    Column("Calls of each block per image", _calls),
    Column("Milliseconds per image", lambda r: f"{1000 * mean(r, 'seconds_per_image'):.1f}"),
)


def bits(record: Record) -> float:
    """Bits per character of the held-out text; of masked models, a bound."""
    return record["bits"]


def bound_bits(record: Record) -> float | None:
    """The denoising bound over all blocks; None if it was not measured, as for end-to-end runs."""
    bound = record.get("bound")
    return None if bound is None else bound["bits"]


CAUSAL_LM = (
    Column("Bits per character, next token", lambda r: spread(r, bits, ".3f")),
    Column(
        "Bits per character, product of all blocks",
        lambda r: spread(r, lambda record: record.get("product_bits"), ".3f"),
    ),
    Column("Bits per character, bound of all blocks", lambda r: spread(r, bound_bits, ".3f")),
)


def layers_per_sample(record: Record) -> float:
    """Mean number of layers that a masked model ran to generate a sequence."""
    run = record["run"]
    blocks = 1 if run["end_to_end"] else run["blocks"]
    return sum(record["rows"]) * (run["depth"] / blocks) / SAMPLES


MASKED_LM = (
    Column("Bits per character (bound)", lambda r: spread(r, bits, ".3f")),
    Column("Its standard error over the text", lambda r: f"{r[0]['bits_error']:.3f}"),
    Column("Layer evaluations to write a sample", lambda r: spread(r, layers_per_sample, ".0f")),
)


def _bits_of_windows(record: Record) -> float:
    """As `bits`, on some windows of the text, with one Euler step or the mean recurrences."""
    run = record["run"]
    return record["bits_by_steps"][str(run["mean_recurrence"]) if run["end_to_end"] else "1"]


RECURRENT = (
    Column("Bits per character, next token", lambda r: spread(r, bits, ".3f")),
    Column(
        f"Bits of {STEPS_WINDOWS} windows of the text, next token",
        lambda r: spread(r, _bits_of_windows, ".3f"),
    ),
    Column("Bits of these windows, bound of denoising", lambda r: spread(r, bound_bits, ".3f")),
)
