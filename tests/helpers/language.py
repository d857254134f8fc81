"""A small language model as transformers builds them, with a padding mask and logits of tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, WIDTH, LENGTHS = 11, 8, (3, 5, 9)


class Block(nn.Module):
    """Grouped-query attention, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 12, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(12, WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (each(h).unflatten(-1, (-1, 2)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class TinyLlama(nn.Module):
    """Tokens -> logits of the next ones; those that are padding are not attended to."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(max(LENGTHS), WIDTH)
        self.layers, self.head = nn.ModuleList(Block() for _ in range(layers)), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            seen = seen & (attention_mask[:, None, None] != 0)
        x = self.words(input_ids) + self.places(torch.arange(length, device=input_ids.device))
        for layer in self.layers:
            x = layer(x, seen)
        return self.head(x)


def sentences(count: int) -> list[Tensor]:
    """Sentences, a batch (count, length) of each length, short ones first."""
    return [torch.randint(1, WORDS, (count, length)) for length in LENGTHS]


def unpadded(texts: list[Tensor]) -> list[dict[str, Tensor]]:
    """The sentences as they are."""
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]


def padded(texts: list[Tensor], batches: int = 1) -> list[dict[str, Tensor]]:
    """The same, filled up to one length with a word that also stands in texts, and with a mask of what is text."""
    ids = torch.cat([F.pad(each, (0, LENGTHS[-1] - each.shape[1]), value=7) for each in texts])
    mask = torch.cat([F.pad(torch.ones_like(each), (0, LENGTHS[-1] - each.shape[1])) for each in texts])
    parts = zip(ids.chunk(batches), mask.chunk(batches), strict=True)
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in parts]
