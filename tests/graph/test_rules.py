"""The rules of the graph against an oracle that probes single operations with NaN and noise."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.nan_probe import OPERATIONS, is_defined, probe

# Units that may go of 8 channels along axis 1: if the operation works along axis 1, and if along another axis.
UNITS: dict[str, tuple[int, int]] = {
    "pointwise": (8, 8), "flip and add": (4, 8), "outer product": (1, 8), "gate": (0, 8), "gate of one": (0, 8),
    "softmax": (1, 8), "log_softmax": (1, 8), "cumsum": (1, 8), "cumprod": (1, 8), "sum": (1, 8), "prod": (1, 8),
    "mean": (1, 8), "amax": (1, 8), "max": (1, 8), "std": (1, 8), "logsumexp": (1, 8), "normalize": (1, 8),
    "sort": (0, 0), "layer_norm": (1, 8), "rms_norm": (1, 8), "glu": (4, 8), "swap halves": (4, 8), "split": (4, 8),
    "half": (4, 8), "other half": (4, 8), "every other": (4, 8), "stack": (8, 8), "concatenate": (8, 8),
    "roll": (1, 8), "transpose": (8, 8), "flatten": (8, 8), "unflatten": (4, 8), "shuffle": (4, 8), "repeat": (8, 8),
    "repeat_interleave": (8, 8), "expand": (8, 8), "pad": (8, 8), "crop": (0, 8), "reflect": (8, 8),
    "circular": (8, 8), "select": (1, 8), "overwrite": (4, 8),
    "index": (1, 8), "gather": (0, 0), "unbind": (1, 8), "triangle": (0, 0),
    "diff": (0, 0), "mask": (8, 8), "constant": (8, 8), "uniform": (8, 8), "matmul": (8, 8), "gram": (8, 8),
    "einsum": (1, 1), "einsum heads": (1, 1), "cdist": (0, 0), "attention": (8, 8), "attention values": (8, 8),
    "attention queries": (8, 8), "unfold": (1, 8),
    "im2col": (8, 8), "pixel_shuffle": (2, 2), "pixel_unshuffle": (8, 8), "channel_shuffle": (4, 4),
    "max_pool": (8, 8), "avg_pool": (8, 8), "adaptive": (8, 8), "interpolate": (8, 8), "group_norm": (4, 4),
    "instance_norm": (8, 8), "batch_norm": (8, 8), "batch_norm in training": (8, 8), "prelu": (8, 8),
    "scale": (8, 8), "scale a row": (8, 8), "scale of one": (8, 8), "table": (8, 8), "linear": (8, 8),
    "product with a weight": (8, 8), "transposed weight": (8, 8), "weight on the left": (8, 8),
    "einsum with a weight": (8, 8), "part of a stack": (8, 8), "stack of weights": (0, 0),
    "computed weight": (0, 0), "conv1d": (8, 8), "conv2d": (8, 8),
    "grouped": (4, 4), "depthwise": (8, 8), "transposed": (8, 8),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(OPERATIONS)),
    sizes=st.lists(st.sampled_from([2, 4, 6, 8]), min_size=4, max_size=4),
    rank=st.sampled_from([2, 3, 4]),
    axes=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_units_reach_what_they_own_and_leave_the_rest(
    name: str, sizes: list[int], rank: int, axes: tuple[int, int]
) -> None:
    operation, shape, (axis, along) = OPERATIONS[name], tuple(sizes[:rank]), axes
    assume(axis < rank and is_defined(operation, shape, along))
    probe(operation, shape, axis, along)


@pytest.mark.parametrize("name", UNITS)
def test_what_a_rule_understands_is_not_frozen(name: str) -> None:
    rank = max(OPERATIONS[name].ranks)
    found = tuple(probe(OPERATIONS[name], (4, 8, 4, 4)[:rank], 1, along) for along in (1, 2))
    assert found == UNITS[name]


@pytest.mark.parametrize("name", UNITS)
def test_channels_along_the_other_axes(name: str) -> None:
    shape = (4, 8, 4, 4)[: max(OPERATIONS[name].ranks)]
    for axis in (0, *range(2, len(shape))):
        if is_defined(OPERATIONS[name], shape, 1):
            probe(OPERATIONS[name], shape, axis, 1)
