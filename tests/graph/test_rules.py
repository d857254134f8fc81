"""The rules of the graph against an oracle that probes single operations with NaN and noise."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.nan_probe import is_defined, probe
from tests.helpers.operations import OPERATIONS

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")  # torch's, of what may change

# Units that may go of 8 channels along axis 1: if the operation works along axis 1, and if along another axis.
UNITS: dict[str, tuple[int, int]] = {
    "pointwise": (8, 8), "flip and add": (4, 8), "outer product": (1, 8), "gate": (0, 8), "gate of one": (0, 8),
    "softmax": (1, 8), "log_softmax": (1, 8), "cumsum": (1, 8), "cumprod": (1, 8), "sum": (1, 8), "prod": (1, 8),
    "mean": (1, 8), "amax": (1, 8), "max": (1, 8), "std": (1, 8), "logsumexp": (1, 8), "normalize": (1, 8),
    "sort": (1, 8), "layer_norm": (1, 8), "rms_norm": (1, 8), "glu": (4, 8), "swap halves": (4, 8), "split": (4, 8),
    "half": (4, 8), "other half": (4, 8), "every other": (4, 8), "stack": (8, 8), "concatenate": (8, 8),
    "roll": (1, 8), "transpose": (8, 8), "flatten": (8, 8), "unflatten": (4, 8), "shuffle": (4, 8), "repeat": (8, 8),
    "repeat_interleave": (8, 8), "expand": (8, 8), "pad": (8, 8), "crop": (0, 8), "reflect": (8, 8),
    "circular": (8, 8), "select": (1, 8), "overwrite": (4, 8),
    "index": (1, 8), "gather": (1, 8), "unbind": (1, 8), "triangle": (0, 0),
    "diff": (1, 8), "mask": (8, 8), "constant": (8, 8), "uniform": (8, 8), "matmul": (8, 8), "gram": (8, 8),
    "einsum": (1, 1), "einsum heads": (1, 1), "cdist": (0, 0), "attention": (8, 8), "attention values": (8, 8),
    "attention queries": (8, 8), "unfold": (1, 8),
    "im2col": (8, 8), "pixel_shuffle": (2, 2), "pixel_unshuffle": (8, 8), "channel_shuffle": (4, 4),
    "max_pool": (8, 8), "avg_pool": (8, 8), "adaptive": (8, 8), "interpolate": (8, 8), "group_norm": (4, 4),
    "instance_norm": (8, 8), "batch_norm": (8, 8), "batch_norm in training": (8, 8), "prelu": (8, 8),
    "scale": (8, 8), "scale a row": (8, 8), "scale of one": (8, 8), "table": (8, 8), "linear": (8, 8),
    "product with a weight": (8, 8), "transposed weight": (8, 8), "weight on the left": (8, 8),
    "einsum with a weight": (8, 8), "part of a stack": (8, 8), "stack of weights": (0, 0), "computed weight": (0, 0),
    "conv1d": (8, 8), "conv2d": (8, 8),
    "grouped": (4, 4), "depthwise": (8, 8), "transposed": (8, 8), "lstm": (1, 1), "lstm of channels": (8, 8),
    "gru": (8, 8), "gru cell": (8, 8),
    "transposed in groups": (4, 4), "interpolate linear": (8, 8), "trilinear": (8, 8), "nearest": (8, 8),
    "nearest-exact": (8, 8), "antialias": (8, 8), "grid_sample": (8, 8), "grid_sample at places": (8, 8),
    "grid_sample at its own": (0, 0), "max_unpool": (8, 8), "max_unpool2d": (8, 8), "max_unpool3d": (8, 8),
    "max_unpool of others": (4, 4), "indices of max_pool": (8, 8), "reflect 3d": (8, 8), "fold": (2, 2),
    "local_response_norm": (0, 0), "rot90": (8, 8), "flipud": (8, 8), "blur": (8, 8), "blur 2d": (8, 8),
    "blur with biases": (8, 8), "blur with unlike biases": (0, 0), "blur of pairs": (4, 4), "learned blur": (8, 8),
    "wavelets": (8, 8), "unlike filters": (0, 0), "transposed blur": (8, 8), "var_mean": (1, 8), "std_mean": (1, 8),
    "aminmax": (1, 8), "argmax": (1, 8), "median": (1, 8), "kthvalue": (1, 8), "indices of max": (1, 8),
    "max of all": (0, 0), "larger of two": (4, 8), "nansum": (1, 8), "count_nonzero": (1, 8), "quantile": (1, 8),
    "quantiles": (0, 0), "norm": (1, 8), "matrix_norm": (8, 8), "matrix_exp": (8, 8), "argsort": (1, 8),
    "topk": (1, 8), "cummax": (1, 8), "fft": (1, 8), "rfft2": (8, 8), "fftn": (1, 1), "fftn of some": (8, 8),
    "fftshift": (1, 8), "complex": (4, 8), "view_as_real": (8, 8), "view_as_complex": (8, 8),
    "cosine_similarity": (1, 8), "pairwise_distance": (8, 8), "vecdot": (1, 8), "vecdot with constants": (1, 8),
    "zeros": (8, 8), "zeros and both": (8, 8), "ones": (8, 8), "constants": (8, 8), "hstack": (8, 8),
    "vstack": (8, 8), "dstack": (8, 8), "index_select": (1, 8), "index by a table": (1, 8), "index by given": (1, 8),
    "index of two axes": (1, 1), "index by its own": (0, 0), "index by channels": (0, 0), "gather its own": (1, 8),
    "gather some": (1, 1), "gather anywhere": (1, 0), "take_along_dim": (1, 8), "scatter": (1, 8),
    "scatter a value": (1, 8), "scatter some": (1, 1), "scatter anywhere": (1, 0), "scatter_add": (1, 8),
    "scatter_reduce": (1, 8), "scatter constants": (1, 8), "index_add": (1, 8), "index_add all": (1, 8),
    "index_copy": (1, 8), "index_fill": (1, 8), "index_reduce": (1, 8), "select_scatter": (1, 8),
    "one place": (1, 8), "masked write": (8, 8), "masked write of rows": (0, 8), "masked write of columns": (8, 8),
    "masked write of many": (0, 0), "write a value": (1, 8), "write rows": (1, 8), "write constants": (1, 8),
    "write columns": (8, 8), "write in two axes": (1, 8), "masked_scatter": (8, 8), "masked_scatter of rows": (1, 1),
    "masked_scatter anywhere": (0, 0),
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
    found = tuple(probe(OPERATIONS[name], (4, 8, 4, 4, 4)[:rank], 1, along) for along in (1, 2))
    assert found == UNITS[name]


@pytest.mark.parametrize("name", UNITS)
def test_channels_along_the_other_axes(name: str) -> None:
    shape = (4, 8, 4, 4, 4)[: max(OPERATIONS[name].ranks)]
    for axis in (0, *range(2, len(shape))):
        if is_defined(OPERATIONS[name], shape, 1):
            probe(OPERATIONS[name], shape, axis, 1)
