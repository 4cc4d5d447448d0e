"""Divides layers into blocks so that the largest cost of a block is minimal."""

from __future__ import annotations

from collections.abc import Callable


def balanced(
    num_layers: int, num_blocks: int, cost: Callable[[int, int], float]
) -> tuple[int, ...]:
    """The number of layers of each block, first to last, that minimises the largest cost.

    Of several solutions, the one with the most layers in earlier blocks.

    Args:
        num_layers: number of layers.
        num_blocks: number of blocks, at most `num_layers`.
        cost: cost of a block of the layers first..end-1; it must not fall as layers are added.

    Raises:
        ValueError: there are fewer layers than blocks.
    """
    if not 1 <= num_blocks <= num_layers:
        raise ValueError(
            f"num_blocks must be from 1 to the number of layers, {num_layers}, got {num_blocks}"
        )
    # least[b][i]: the minimal largest cost of the layers i.. in b blocks.
    least = [[0.0] * (num_layers + 1) for _ in range(num_blocks + 1)]
    ends = [[0] * (num_layers + 1) for _ in range(num_blocks + 1)]
    for i in range(num_layers):
        least[1][i], ends[1][i] = cost(i, num_layers), num_layers
    for b in range(2, num_blocks + 1):
        for i in range(num_layers - b + 1):
            options = (
                (max(cost(i, end), least[b - 1][end]), -end)
                for end in range(i + 1, num_layers - b + 2)
            )
            best, end = min(options)
            least[b][i], ends[b][i] = best, -end
    counts, first = [], 0
    for b in range(num_blocks, 0, -1):
        counts.append(ends[b][first] - first)
        first = ends[b][first]
    return tuple(counts)
