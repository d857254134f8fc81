"""One pass over the calibration data: the second moments of every layer's inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call, samples_in
from lnr_prune.calibration.data import Calibration
from lnr_prune.calibration.moments import Halves, SecondMoments
from lnr_prune.calibration.places import HALF, Place
from lnr_prune.calibration.rows import Reader, all_products, rows, rows_of_sample
from lnr_prune.calibration.watch import LayerCall, watch
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.weights import tensor_named
from lnr_prune.runtime.work import Work


def gather(
    model: nn.Module,
    readers: Mapping[str, Reader],
    data: Calibration,
    work: Work = Work(),
) -> dict[str, Halves]:
    """Gathers the second moments of every layer's inputs in one pass over the calibration data.

    Outputs are not read: a layer's own y is M x, see `SecondMoments.through`. Processes that prune together read one
    shard each, and all get the sums over all shards.

    Args:
        model: The model, in any mode; it is run in evaluation mode.
        readers: Name of a layer's weight -> how to read its calls.
        data: The calibration data.
        work: The processes, each with a shard of the data, and where the sums are kept.

    Returns:
        Name of the weight -> the moments of both halves of the samples, with an empty y.

    Raises:
        CalibrationError: If there is no batch, a layer is never called, or an activation is not finite.
    """
    so_far = f"sums of {' '.join(readers)}"

    def one_pass(missing: Sequence[str]) -> list[Halves]:
        sums = _gathered(model, {name: readers[name] for name in missing}, data, work, so_far)
        return [sums[name] for name in missing]

    found = work.each("moments", Halves, list(readers), one_pass)
    work.drop(so_far)
    return dict(zip(readers, found, strict=True))


def _gathered(
    model: nn.Module,
    readers: Mapping[str, Reader],
    data: Calibration,
    work: Work,
    so_far: str,
) -> dict[str, Halves]:
    before = work.snapshot(so_far, tuple[tuple[str, ...], int, dict[str, tuple[SecondMoments, SecondMoments]]])
    names, done, known = before if before is not None else ((), 0, {})
    sums: dict[str, list[SecondMoments]] = {}
    if names == tuple(readers):  # otherwise the snapshot is of other layers
        sums = {name: list(of_parts) for name, of_parts in known.items()}
    else:
        done = 0
    first, samples = work.ranks.before(data.samples)
    place = Place(first, 0, samples or 0)

    def add(name: str, layer: LayerCall) -> None:
        layer = layer.counting(place.counts)
        if len(layer.input) == 0:  # an expert that no row has reached
            _both(sums, name, readers[name].inputs(layer).shape[1], layer.input.device)
            return
        for part, index in place.parts(len(layer.input), HALF):
            piece, numbers = layer.at(index), place.start(len(layer.input)) + index
            xx = all_products(readers[name], [piece], samples)
            if xx is not None:
                _, positions, _ = rows_of_sample(readers[name], layer, samples)
                of_call = SecondMoments(xx, xx.new_empty(0, len(xx)), xx.new_zeros(()), positions * len(index))
                _both(sums, name, len(xx), xx.device)[part] += of_call
                continue
            for x, *_ in rows(readers[name], piece, samples, numbers):
                both = _both(sums, name, x.shape[1], x.device)
                both[part] = both[part].with_rows(x, x.new_empty(len(x), 0))

    batch, some = -1, False
    for batch, call in enumerate(data):
        place = Place(first, max(1, samples_in(call)), samples or 0, data.counts(call))
        first += samples_in(call)
        some = some or place.counts is None or bool(place.counts.any())
        if batch < done:
            continue
        watch(model, call, readers, add)
        for name, of_parts in sums.items():
            for moments in of_parts:
                check_finite(name, moments, f"batch {batch}", call)
        work.keep(so_far, (tuple(readers), batch + 1, {name: tuple(both) for name, both in sums.items()}))
        work.step("statistics")
    if batch < 0:
        raise CalibrationError("the calibration data holds no batch; give at least one batch of inputs")
    if not any(work.ranks.all_gather(some)):
        raise CalibrationError(
            "nothing of the calibration data counts: its attention_mask is zero everywhere, or counts() is never True"
        )
    seen = work.ranks.all_gather({name: len(fit.xx) for name, (fit, _) in sums.items()})
    columns = {name: d for of_rank in seen for name, d in of_rank.items()}
    unseen = [name for name in readers if name not in columns]
    if unseen:
        raise CalibrationError(
            f"no call of {', '.join(unseen)} was seen in {batch + 1} batches: the forward takes another path on "
            "this data than on the example that was traced"
        )
    tensors = named_tensors(model)
    both = {name: _both(sums, name, columns[name], tensor_named(tensors, name).device) for name in readers}
    return {name: Halves(*(part.over_ranks(work.ranks) for part in both[name])) for name in readers}


def _both(sums: dict[str, list[SecondMoments]], name: str, columns: int, device: torch.device) -> list[SecondMoments]:
    """The sums of a layer's two halves so far."""
    return sums.setdefault(name, [SecondMoments.zeros(0, columns, device) for _ in range(2)])


def check_finite(weight: str, moments: SecondMoments, where: str, call: Call | None = None) -> None:
    """Refuses sums that are not finite.

    Raises:
        CalibrationError: It names the layer and the place, such as "batch 3", and says whether that batch, the
            call, is finite itself.
    """
    for side, total in (("inputs", moments.xx.diagonal().sum()), ("outputs", moments.yy)):
        if not bool(torch.isfinite(total)):
            raise CalibrationError(
                f"the {side} of layer {weight.removesuffix('.weight')!r} are not finite in {where}: {_advice(call)}"
            )


def _advice(call: Call | None) -> str:
    """What to do about sums that are not finite."""
    if call is None:
        return "remove NaN and Inf from the calibration data, or calibrate in a wider dtype"
    values = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    bad = sum(int((~torch.isfinite(leaf)).sum()) for leaf in values)
    if bad:
        return f"{bad:,} of the batch's own values are NaN or Inf: leave out these samples"
    return (
        "the batch itself is finite, so the model produces them: scale the data as in training, "
        "or calibrate in a wider dtype"
    )
