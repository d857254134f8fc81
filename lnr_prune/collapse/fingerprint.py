"""The fingerprint of an architecture: tells whether a model has the architecture that a plan was made for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lnr_prune.collapse.attributes import entries
from lnr_prune.errors import PlanError
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.modules.folding import computed_tensors

SHOWN = 3  # differences that an error names


@dataclass(frozen=True)
class TensorKind:
    """What a parameter or buffer is, apart from its values.

    Attributes:
        dtype: Its dtype, such as "float32".
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Fingerprint:
    """A model without its values.

    Attributes:
        modules: Submodule -> name of its class.
        tensors: Parameter or buffer -> what it is; tied ones once, under their first name.
        tied: The other names of tied tensors -> the first one.
        ints: Submodule -> attribute -> the int that it holds, where no shape shows it; None for an entry of a settings
            object that leaves the number to whoever reads it.
    """

    modules: Mapping[str, str]
    tensors: Mapping[str, TensorKind]
    tied: Mapping[str, str] = field(default_factory=dict)
    ints: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)

    def check(self, model: nn.Module) -> None:
        """Compares a model with this fingerprint.

        Raises:
            PlanError: If the model differs in anything but values; it names what differs.
        """
        differences = list(_differences(fingerprint(model, self.ints), self))
        if differences:
            more = f"; and {len(differences) - SHOWN} more differences" if len(differences) > SHOWN else ""
            advice = "Give a new instance of the model that was pruned"
            if any(each.folds for each in computed_tensors(model)):
                advice += ", or lnr.fold(model) if its computed weights were folded"
            advice += (
                ". If that model had been pruned itself, give the result of its own plan, or join both plans: "
                "first.plan.then(second.plan)"
            )
            raise PlanError(
                f"this {type(model).__name__} is not of the architecture that the plan was made for: "
                f"{'; '.join(differences[:SHOWN])}{more}. {advice}"
            )


def fingerprint(model: nn.Module, held: Mapping[str, Mapping[str, int | None]] | None = None) -> Fingerprint:
    """The fingerprint of a model.

    Args:
        model: The model.
        held: Submodule -> attributes whose ints belong to the fingerprint, besides the number of heads of every
            nn.MultiheadAttention.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {name: {"num_heads"} for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    for name, paths in (held or {}).items():
        wanted.setdefault(name, set()).update(paths)
    first: dict[int, str] = {}
    tensors, tied = {}, {}
    for name, tensor in named_tensors(model).items():
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = TensorKind(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        else:
            tied[name] = first[id(tensor)]
    return Fingerprint(
        {name: type(module).__name__ for name, module in modules.items()},
        tensors,
        tied,
        {
            name: {path: value for path, value in entries(modules[name]) if path in paths}
            for name, paths in wanted.items()
            if name in modules
        },
    )


def _differences(got: Fingerprint, expected: Fingerprint) -> Iterator[str]:
    yield from _compared("layer", got.modules, expected.modules)
    yield from _compared("tensor", _tensors(got), _tensors(expected))
    for name in expected.ints.keys() & got.modules.keys():
        yield from _compared(f"layer {name!r}: attribute", got.ints.get(name, {}), expected.ints[name])


def _tensors(kinds: Fingerprint) -> dict[str, object]:
    return {**kinds.tensors, **{name: f"tied to {first!r}" for name, first in kinds.tied.items()}}


def _compared(what: str, got: Mapping[str, object], expected: Mapping[str, object]) -> Iterator[str]:
    for name in dict.fromkeys((*expected, *got)):
        if got.get(name) != expected.get(name):
            yield f"{what} {name!r} is {got.get(name, 'not there')}, expected {expected.get(name, 'none')}"
