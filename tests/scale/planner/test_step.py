"""The moments of a step and the splits of layers, by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dblocks.scale.planner.plan import _busiest
from dblocks.scale.planner.split import balanced
from dblocks.scale.planner.step import Held, Peak, checkpointed, step_peak
from dblocks.scale.planner.trace import Part

HELD = Held(parameters=100, trained=100, optimizer=200)


def test_gradients_arrive_as_activations_leave():
    # Each layer saves 30 and has a gradient of 50: 60 saved, 100 of gradients, never all at once.
    layers = [("layer 0", Part([(30, 0), (0, 50)])), ("layer 1", Part([(30, 0), (0, 50)]))]
    peak = step_peak(HELD, layers)
    # Layer 1: 60 + 50; it leaves 30; layer 0: 30 + 50 + 50; at last 100.
    assert peak == Peak(300 + 130, "backward of layer 0")


def test_the_peak_is_at_the_end_of_the_forward_where_activations_are_large():
    layers = [("layer 0", Part([(300, 50)])), ("layer 1", Part([(300, 50)]))]
    assert step_peak(HELD, layers) == Peak(300 + 650, "backward of layer 1")
    frozen = [("layer 0", Part([(300, 0)]))]
    assert step_peak(Held(100, 0, 0), frozen) == Peak(400, "end of the forward")


def test_temporaries_of_an_optimizer_come_last():
    layers = [("layer 0", Part([(1, 100)]))]
    assert step_peak(HELD, layers) == Peak(401, "backward of layer 0")
    assert step_peak(HELD._replace(temporaries=100), layers) == Peak(500, "optimizer")


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1))
def test_a_step_never_holds_less_than_state_and_activations_nor_more_than_all(events):
    part = Part(events)
    trained = part.gradients
    peak = step_peak(Held(trained, trained, 2 * trained), [("a", part)])
    assert max(part.saved, trained) <= peak.bytes - 3 * trained <= part.saved + trained


def test_checkpointing_keeps_inputs_and_makes_the_rest_of_one_layer_again():
    layer = Part([(10, 0), (90, 50)], inputs=10, kept=10, calls=1)
    again = checkpointed(layer)
    assert again.saved == 10
    assert again.gradients == 50
    held = Held(0, 100, 0)
    whole = step_peak(held, [("a", layer), ("b", layer)])
    kept = step_peak(held, [("a", again), ("b", again)])
    assert whole.bytes == 200 + 50
    # Both inputs, and the 90 of one layer, with its gradient; later one input and two gradients.
    assert kept.bytes == 10 + 90 + 100


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.data())
def test_no_split_has_a_smaller_largest_block(costs, data):
    n = len(costs)
    B = data.draw(st.integers(1, n))

    def cost(first, end):
        return sum(costs[first:end])

    def largest(counts):
        ends = list(itertools.accumulate(counts))
        return max(cost(end - count, end) for end, count in zip(ends, counts, strict=True))

    found = balanced(n, B, cost)
    assert len(found) == B
    assert sum(found) == n
    every = (c for c in itertools.product(range(1, n + 1), repeat=B) if sum(c) == n)
    assert largest(found) == min(map(largest, every))


def test_a_split_into_more_blocks_than_layers_is_refused():
    with pytest.raises(ValueError, match="num_blocks must be from 1 to the number of layers, 3"):
        balanced(3, 4, lambda first, end: end - first)


def test_blocks_go_to_the_device_with_least_to_do():
    assert _busiest([3, 3, 2, 2, 2], 2) == 7
    assert _busiest([3, 1], 2) == 3
    assert _busiest([3, 1], 1) == 4
