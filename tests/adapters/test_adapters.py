"""Every adapter keeps the contract, and a third party's does too."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_adapters import Columns, ColumnsBias, ConvFilters, FcAfterConv
from lnr_adapters.autocorrelation import autocorrelation
from lnr_prune.calibration.adapter import AdaptedLayer, adapters, find, unregister
from lnr_prune.calibration.watch import LayerCall, watch
from lnr_prune.errors import AdapterError
from lnr_prune.graph.groups import Consumer, find_groups
from lnr_prune.testing.adapters import check_adapter
from tests.helpers.models import Functional, ReferenceLeNet5, Residual, cnn, mlp, randomised


def conv_net(n: int, **options: Any) -> nn.Module:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return nn.Sequential(conv(2, 5, 1), nn.ReLU(), conv(5, 4, **options))


GEOMETRIES: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_size": 3, "padding": 2, "stride": 2}),
    (2, {"kernel_size": (3, 2), "padding": (1, 0), "stride": (1, 2), "dilation": (2, 1)}),
    (2, {"kernel_size": 4, "padding": "same"}),
    (2, {"kernel_size": 3, "padding": "valid", "bias": False}),
    (3, {"kernel_size": (1, 2, 3), "padding": (0, 1, 1)}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("n", "options"), GEOMETRIES)
def test_conv_filters(n: int, options: dict[str, Any]) -> None:
    model, example = conv_net(n, **options), torch.randn(3, 2, *[7] * n)
    check_adapter(adapters()["conv_filters"], model, example)


@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        ("columns", mlp(4, 6, 5, 3, bias=False), (5, 4)),
        ("columns", mlp(4, 6, 3), (5, 7, 4)),
        ("columns_bias", mlp(4, 6, 3), (5, 4)),
        ("columns_bias", mlp(4, 6, 3), (5, 7, 4)),
        ("columns", Functional(), (4, 5)),
        ("fc_after_conv", randomised(cnn()), (3, 2, 12, 12)),
        ("conv_filters", randomised(cnn()), (3, 2, 12, 12)),
        ("conv_filters", randomised(Residual()), (3, 3, 8, 8)),
        ("fc_after_conv", randomised(Residual()), (3, 3, 8, 8)),
        ("columns_bias", randomised(Residual()), (3, 3, 8, 8)),
    ],
)
def test_our_adapters_keep_the_contract(name: str, model: nn.Module, shape: tuple[int, ...]) -> None:
    check_adapter(adapters()[name], model, torch.randn(*shape))


def test_the_adapter_is_chosen_by_the_pair() -> None:
    model = ReferenceLeNet5()
    example = torch.randn(2, 1, 28, 28)
    graph = find_groups(model, (example,), {})
    chosen = [find(group.consumers[0]).name for group in graph.groups]
    assert chosen == ["conv_filters", "fc_after_conv", "columns_bias"]


class Doubled(ColumnsBias):
    """A third party's: the input is doubled, the weight halved."""

    name = "doubled"

    def samples(self, consumer: Consumer, call: LayerCall, rows: Tensor | None) -> Tensor:
        return 2 * super().samples(consumer, call, rows)

    def matrix(self, consumer: Consumer, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().matrix(consumer, weight / 2, bias)

    def write(self, consumer: Consumer, M: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        written, bias = super().write(consumer, M, weight)
        return 2 * written, bias


@pytest.fixture
def alone() -> Iterator[None]:
    """Our own adapter of columns with a bias steps aside."""
    unregister("columns_bias")
    yield
    for name in ("doubled", "columns_bias"):
        if name in adapters():
            unregister(name)
    lnr.register(ColumnsBias())


@pytest.mark.usefixtures("alone")
def test_a_third_partys_adapter_passes_and_prunes() -> None:
    lnr.register(Doubled())
    check_adapter(adapters()["doubled"], mlp(4, 6, 3), torch.randn(5, 4))
    pruned = lnr.prune(mlp(4, 6, 3), [torch.randn(50, 4)], lnr.Keep(3))
    assert pruned.report.groups[0].kept == 3


BREAKAGES = {
    "inputs": (
        lambda self, consumer, call, rows=None: -ColumnsBias.inputs(self, consumer, call, rows),
        r"y = x M\^T does not hold",
    ),
    "samples": (
        lambda self, consumer, call, rows: ColumnsBias.samples(self, consumer, call, None),
        r"inputs\(rows\) must be these rows",
    ),
    "outputs": (lambda self, consumer, call, rows=None: call.output, r"expected x \(n, d\), y \(n, h\)"),
    "groups": (lambda self, consumer, weight: consumer.channels, r"groups\(\) must give"),
    "matrix": (lambda self, consumer, weight, bias: weight, r"expected x \(n, d\)"),
    "write": (lambda self, consumer, M, weight: (M[:, 1:], M[:, -1]), r"write\(matrix\(\)\) does not give"),
}


@pytest.mark.parametrize("method", BREAKAGES)
@pytest.mark.usefixtures("alone")
def test_broken_adapters_are_caught(method: str) -> None:
    replacement, message = BREAKAGES[method]
    broken = type("Broken", (ColumnsBias,), {"name": "doubled", method: replacement})()
    lnr.register(broken)
    with pytest.raises(AdapterError, match=message):
        check_adapter(broken, mlp(4, 6, 3), torch.randn(5, 2, 4))


@pytest.mark.usefixtures("alone")
def test_columns_of_the_wrong_channel_and_a_penalised_bias_are_caught() -> None:
    class Shifted(ColumnsBias):
        name = "doubled"

        def groups(self, consumer: Consumer, weight: Tensor) -> Tensor:
            groups = super().groups(consumer, weight)
            return torch.cat([groups[:-1].roll(1), groups[-1:]])

    class Penalised(ColumnsBias):
        name = "doubled"

        def groups(self, consumer: Consumer, weight: Tensor) -> Tensor:
            return super().groups(consumer, weight).clamp_min(0)  # the bias goes with channel 0

    class OtherRows(ColumnsBias):
        name = "doubled"

        def outputs(self, consumer: Consumer, call: LayerCall, rows: Tensor | None = None) -> Tensor:
            return super().outputs(consumer, call)[: None if rows is None else len(rows)]

    lnr.register(OtherRows(), replace=True)
    with pytest.raises(AdapterError, match=r"outputs\(rows\) must be these rows"):
        check_adapter(adapters()["doubled"], mlp(4, 6, 3), torch.randn(5, 4))
    for broken in (Shifted(), Penalised()):
        lnr.register(broken, replace=True)
        with pytest.raises(AdapterError, match="must zero its input weights, and nothing else"):
            check_adapter(broken, mlp(4, 6, 3), torch.randn(5, 4))


def test_the_registry_refuses_duplicates_and_strangers() -> None:
    with pytest.raises(ValueError, match="'columns' is already registered"):
        lnr.register(Columns())
    lnr.register(Columns(), replace=True)
    with pytest.raises(ValueError, match="no adapter is named 'nobody'"):
        unregister("nobody")
    with pytest.raises(AdapterError, match="not registered"):
        check_adapter(FcAfterConv(), mlp(4, 6, 3), torch.randn(5, 4))
    with pytest.raises(AdapterError, match="matches no consumer"):
        check_adapter(adapters()["conv_filters"], mlp(4, 6, 3), torch.randn(5, 4))


CONSUMER = Consumer("fc", "fc.weight", "fc.bias", "linear", torch.arange(4))


def test_exactly_one_adapter_must_fit() -> None:
    class Greedy(ConvFilters):
        name = "greedy"

        def matches(self, consumer: Consumer) -> bool:
            return True

    lnr.register(Greedy())
    try:
        with pytest.raises(AdapterError, match=r"2 adapters fit layer 'fc' \(linear\).*columns_bias, greedy"):
            find(CONSUMER)
        with pytest.raises(AdapterError, match="2 adapters fit"):
            check_adapter(adapters()["greedy"], mlp(4, 6, 3), torch.randn(5, 4))
    finally:
        unregister("greedy")
    with pytest.raises(AdapterError, match=r"no adapter fits.*columns, .*conv_filters"):
        find(Consumer("rnn", "rnn.weight", None, "lstm", torch.arange(4)))


def test_an_empty_registry_says_to_install_the_package() -> None:
    known = adapters()
    for name in known:
        unregister(name)
    try:
        with pytest.raises(AdapterError, match=r"no adapters found: install the package \(pip install -e \.\)"):
            find(CONSUMER)
    finally:
        for adapter in known.values():
            lnr.register(adapter)
    assert adapters() == known


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(3, 5), (7, 7), (12, 4)])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same"])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((2, 3), 1), ((1, 2), 2), ((5, 3), 1), ((3, 3), 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_second_moments_of_patches_that_overlap(
    kernel: tuple[int, int], dilation: int, padding: Any, size: tuple[int, int], bias: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, kernel, padding=padding, dilation=dilation, bias=bias)).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    try:
        model(x)
    except RuntimeError:
        pytest.skip("the image is smaller than the kernel")
    (layer,) = find_groups(model, (x,), {}).layers
    pair, calls = AdaptedLayer(layer, find(layer)), list[LayerCall]()
    watch(model, ((x,), {}), [layer.weight], see=lambda _, call: calls.append(call))
    rows = pair.inputs(calls[0])
    found = pair.second_moments(list(calls[0].split(2)))
    assert found is not None
    torch.testing.assert_close(found, rows.T @ rows)


@pytest.mark.parametrize(
    ("layer", "shape", "sizes"),
    [
        (nn.Conv1d(3, 2, 4, padding=2), (3, 9), 13),
        (nn.Conv3d(2, 2, 3, padding=1), (2, 3, 4, 5), 55),
        (nn.Conv2d(3, 2, 3, stride=2), (3, 9, 9), None),
        (nn.Conv2d(3, 2, 1), (3, 9, 9), None),
        (nn.ConvTranspose2d(3, 2, 3), (3, 9, 9), None),
        (nn.Linear(3, 2), (3,), None),
    ],
)
def test_which_layers_have_them(layer: nn.Module, shape: tuple[int, ...], sizes: int | None) -> None:
    model, x = nn.Sequential(layer).double(), torch.randn(2, *shape, dtype=torch.float64)
    (consumer,) = find_groups(model, (x,), {}).layers
    pair, calls = AdaptedLayer(consumer, find(consumer)), list[LayerCall]()
    watch(model, ((x,), {}), [consumer.weight], see=lambda _, call: calls.append(call))
    found = pair.second_moments(calls)
    assert (None if found is None else len(found)) == sizes
    if found is not None:
        torch.testing.assert_close(found, pair.inputs(calls[0]).T @ pair.inputs(calls[0]))
    assert pair.second_moments([]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_they_are_multiplied_in_single_precision_at_least(dtype: torch.dtype) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    found, exact = (autocorrelation([batch], offsets, (16, 16)) for batch in (images, images.double()))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)
