"""Rules for operations that draw random numbers: where one is drawn for each channel, the channels stay.

With fewer channels, fewer numbers would be drawn, and the others would change.
"""

from torch import Tensor, fx

from lnr_prune.graph.nodes import DROPOUTS, argument, describe
from lnr_prune.graph.owners import nobody
from lnr_prune.graph.rules import Ids, Propagation, all_ids, rule

LIKE = {f"{kind}_like" for kind in ("rand", "randn", "randint")}
DRAWN = {"bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "poisson", "uniform"}


@rule(*LIKE, *DRAWN, "rrelu", "rrelu_with_noise")
def _draw(state: Propagation, node: fx.Node) -> Tensor:
    """Channels for each of which a number is drawn stay."""
    reason = f"random numbers are drawn for each of its channels in {describe(node)}"
    for value in node.all_input_nodes:
        state.owners.freeze(all_ids(state, value), reason)
    return nobody(node.meta["val"].shape)


@rule(*DROPOUTS)
def _dropout(state: Propagation, node: fx.Node) -> Ids:
    """In evaluation it lets everything through, and where the library compares networks in training, too."""
    x = argument(node, 0, "input")
    if argument(node, 2, "train") and argument(node, 1, "p") and not state.trace.training:
        _draw(state, node)
    return state.of(x)
