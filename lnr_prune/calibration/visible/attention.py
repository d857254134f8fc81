"""nn.MultiheadAttention with fewer heads than its embedding has room for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FewerHeads(nn.MultiheadAttention):
    """What an nn.MultiheadAttention becomes when it loses heads: the class changes, the module stays the same.

    nn.MultiheadAttention's own forward insists on ``embed_dim = num_heads * head_dim``. This one takes the
    same arguments and computes the same function for any number of heads.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output and, if asked for, the weights, like nn.MultiheadAttention.forward."""
        batched, same = query.dim() == 3, query is key is value
        tokens = [x if batched else x[None] for x in (query, key, value)]
        if batched and not self.batch_first:
            tokens = [x.transpose(0, 1) for x in tokens]
        projected = self._projected_as_one(tokens[0]) if same else self._projected(*tokens)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)
        mask = self._mask(attn_mask, key_padding_mask, q, is_causal)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            mixed = F.dropout(weights, dropout) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        output = output[0] if not batched else output if self.batch_first else output.transpose(0, 1)
        if not need_weights:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights[0]

    def _projected_as_one(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of the same tokens. A packed weight is used whole, so that its call can be seen."""
        if self.in_proj_weight is None:
            return self._projected(x, x, x)
        return F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)

    def _projected(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: tuple[Tensor | None, ...] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in zip(tokens, weights, biases, strict=True))

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, is_causal: bool
    ) -> Tensor | None:
        """Additive mask that broadcasts to (batch, heads, targets, sources)."""
        attn_mask, key_padding_mask = (self._additive(m, q) for m in (attn_mask, key_padding_mask))
        if attn_mask is not None and attn_mask.dim() == 3:  # one for each sample and head of the original
            attn_mask = attn_mask.unflatten(0, (q.shape[0], -1))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(q.shape[0], 1, 1, -1)
            return key_padding_mask if attn_mask is None else attn_mask + key_padding_mask
        return attn_mask

    @staticmethod
    def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
        if mask is None or mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))


@contextmanager
def visible_attention(model: nn.Module) -> Iterator[None]:
    """Lets every nn.MultiheadAttention apply its projections where a TorchFunctionMode can see them."""
    plain = [module for module in model.modules() if type(module) is nn.MultiheadAttention and module.bias_k is None]
    for module in plain:
        module.__class__ = FewerHeads
    try:
        yield
    finally:
        for module in plain:
            module.__class__ = nn.MultiheadAttention


def shrink_attention(module: nn.MultiheadAttention) -> None:
    """Updates the number of heads of a module whose projections have lost whole heads."""
    rows = module.out_proj.weight.shape[1]
    if rows != module.num_heads * module.head_dim:
        module.num_heads = rows // module.head_dim
        module._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fused path
        module.__class__ = FewerHeads
