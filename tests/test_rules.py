"""The rules of the graph against an oracle that probes single operations with NaN and noise."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.nan_probe import OPERATIONS, probe

UNDEFINED = (RuntimeError, ValueError, IndexError)
# What must be followed, not only frozen: with channels along axis 1 and another axis to work on.
FOLLOWED = {
    "pointwise": 2, "flip and add": 2, "softmax": 2, "log_softmax": 2, "cumsum": 2, "sum": 2, "mean": 2, "amax": 2,
    "std": 2, "logsumexp": 2, "normalize": 2, "layer_norm": 2, "rms_norm": 2, "swap halves": 2, "split": 2, "half": 2,
    "stack": 2, "concatenate": 2, "roll": 2, "transpose": 2, "flatten": 2, "unflatten": 2, "repeat": 2, "expand": 2,
    "repeat_interleave": 2, "pad": 2, "select": 2, "index": 2, "gather": 2, "unbind": 2, "glu": 2, "shuffle": 2,
    "every other": 2, "other half": 2, "gate": 2, "gate of one": 2, "constant": 2, "uniform": 2, "scale": 2, "max": 2,
    "unfold": 2, "im2col": 3, "pixel_unshuffle": 3, "channel_shuffle": 1, "max_pool": 2, "adaptive": 2,
    "interpolate": 2, "group_norm": 1, "instance_norm": 1, "batch_norm": 1, "batch_norm in training": 1, "prelu": 1,
    "scale of one": 1, "conv2d": 1, "pixel_shuffle": 1, "attention": 0, "einsum heads": 2, "mask": 2, "scale a row": 1,
}  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(list(OPERATIONS)),
    sizes=st.lists(st.sampled_from([2, 4, 6, 8]), min_size=4, max_size=4),
    rank=st.sampled_from([2, 3, 4]),
    axes=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_units_reach_what_they_own_and_leave_the_rest(
    name: str, sizes: list[int], rank: int, axes: tuple[int, int]
) -> None:
    assume(rank in OPERATIONS[name].ranks and max(axes) < rank)
    try:
        probe(OPERATIONS[name], tuple(sizes[:rank]), *axes)
    except UNDEFINED:
        assume(False)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_a_rule_understands_is_not_frozen(name: str) -> None:
    assert probe(OPERATIONS[name], (4, 8, 4, 4), 1 if name != "attention" else 1, FOLLOWED[name]) > 1
