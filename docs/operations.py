"""Writes docs/operations.md, what every ATen operation does to channels, from the rules: python docs/operations.py."""

import inspect
from pathlib import Path

import torch

from lnr_prune.graph import operations
from lnr_prune.graph.nodes import POINTWISE, SAME, UNIFORM
from lnr_prune.graph.rules import RULES

PAGE = Path(__file__).with_suffix(".md")
REST = "## Without a rule"
NOT_FOR_MODELS = (
    "backward", "cudnn_", "fbgemm_", "miopen_", "mkldnn_", "quantize", "slow_conv", "sparse_", "to_sparse", "_copy",
)  # fmt: skip
"""Parts of the names of operations that torch.export never shows, or that are for other kinds of tensors."""

INTRODUCTION = """# Operations

What every ATen operation does to the channels that go through it. A channel lies along one axis of an activation. Where
an operation *mixes* an axis, what lies along it can only leave as a whole: channels along that axis stay, and channels
along any other axis go through as if nothing had happened. What an operation *couples* leaves together.
[Architecture](architecture.md) tells how rules are written.

This page is made by `docs/operations.py`.
"""


def page() -> str:
    """The whole page."""
    return f"{INTRODUCTION}\n{_rules()}\n{_pointwise()}\n{REST}\n\n{_rest()}\n"


def _names(names: set[str] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _rules() -> str:
    text = "## With a rule of their own\n"
    for module_name in operations.__all__:
        module = getattr(operations, module_name)
        text += (
            f"\n### {module_name}\n\n{inspect.getdoc(module)}\n\n| operations | what they do to channels |\n|---|---|\n"
        )
        functions = dict.fromkeys(function for function in RULES.values() if function.__module__ == module.__name__)
        for function in functions:
            names = [name for name, other in RULES.items() if other is function]
            text += f"| {_names(names)} | {(inspect.getdoc(function) or '').splitlines()[0]} |\n"
    return text


def _pointwise() -> str:
    return f"""## Pointwise

Every element of the result depends on one element of each operand, so channels that meet are coupled, and a channel
that meets a value of its own that belongs to no channel stays. PyTorch tags these operations; of those without its tag,
the rules know {_names(POINTWISE)}.

The result of {_names(SAME)} is like the first operand, channel by channel.

The result of {_names(UNIFORM)} belongs to no channel; as it is the same for all of them, it may meet or join any.
"""


def _rest() -> str:
    found: dict[str, bool] = {}
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        arguments, returns = ([str(part.type) for part in side] for side in (schema.arguments, schema.returns))
        functional = not any(each.alias_info is not None and each.alias_info.is_write for each in schema.arguments)
        if space != "aten" or not functional or name.startswith("_") or any(part in name for part in NOT_FOR_MODELS):
            continue
        packet = getattr(torch.ops.aten, name, None)
        overload = getattr(packet, schema.overload_name or "default", None)
        if any("Tensor" in kind for kind in arguments) and any("Tensor" in kind for kind in returns) and overload:
            found[name] = found.get(name, False) or torch.Tag.pointwise in overload.tags
    known = {*RULES, *POINTWISE, *SAME, *UNIFORM, *(name for name, pointwise in found.items() if pointwise)}
    rest = sorted(found.keys() - known)
    version = torch.__version__.split("+")[0]
    return (
        f"Of the {len(found)} functional operations of torch {version}, {len(found) - len(rest)} have a rule or are "
        f"pointwise. The other {len(rest)} freeze what they touch, and the report says so:\n\n{_names(rest)}."
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
