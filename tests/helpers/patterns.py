"""The patterns of modern networks, each in a few lines."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelShuffle(nn.Module):
    """ShuffleNet's: halves of the channels are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = torch.cat([x, self.b(x)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        return self.c(torch.cat([left, right.tanh()], 1))


class PaddedShortcut(nn.Module):
    """CIFAR ResNet's option A: the shortcut is subsampled and padded with zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = (self.conv2(self.conv1(x).relu()) + shortcut).relu()
        return self.head(x.mean((2, 3)))


class PackedAttention(nn.Module):
    """A transformer block: packed q, k, v; layer norm, layer scale, MLP, position embedding."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, d // heads
        self.position = nn.Parameter(torch.randn(1, 5, d))
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.scale = nn.Parameter(torch.rand(d) + 0.5)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) / self.head_dim**0.5).softmax(-1)
        x = x + self.scale * self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class GroupedQueries(nn.Module):
    """Llama's: fewer key-value heads, rotary positions, RMS norm a head, gated MLP, no biases."""

    def __init__(self, d: int = 16, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.head_dim = d // heads
        self.repeat = heads // shared
        self.embed = nn.Embedding(11, d)
        self.norm, self.head_norm = nn.RMSNorm(d), nn.RMSNorm(self.head_dim)
        self.q, self.k, self.v = (nn.Linear(d, n * self.head_dim, bias=False) for n in (heads, shared, shared))
        self.o = nn.Linear(d, d, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, 24), (d, 24), (24, d)))

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2]).to(x), torch.arange(self.head_dim // 2).to(x) + 1).repeat(1, 2)
        half = x.shape[-1] // 2
        return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        q, k = self.rotate(self.head_norm(self.heads(self.q(y)))), self.rotate(self.heads(self.k(y)))
        k, v = (z.repeat_interleave(self.repeat, 1) for z in (k, self.heads(self.v(y))))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention: as self-attention, as cross-attention, and inside nn.TransformerEncoderLayer."""

    def __init__(self, d: int = 12, batch_first: bool = True) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(d, 3, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(d, 3, kdim=7, vdim=9, batch_first=batch_first)
        self.layer = nn.TransformerEncoderLayer(d, 3, 24, batch_first=batch_first)
        self.keys, self.values = nn.Linear(d, 7), nn.Linear(d, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        y, weights = self.cross(x, self.keys(x), self.values(x))
        return self.layer(x + y) * (1 + weights.mean())


class SeparateProjections(nn.Module):
    """BERT's: q, k and v in three matrices, heads cut out of each by a view."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.head_dim = d // heads
        self.query, self.key, self.value, self.dense = (nn.Linear(d, d) for _ in range(4))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:2], -1, self.head_dim).permute(0, 2, 1, 3) for f in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) / self.head_dim**0.5).softmax(-1)
        return self.norm(x + self.dense((weights @ v).permute(0, 2, 1, 3).reshape(*x.shape[:2], -1)))


class Decoder(nn.Module):
    """nn.TransformerDecoderLayer: its cross-attention reads one packed matrix in two parts."""

    def __init__(self, d: int = 12) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(d, 3, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.tanh())


class Standardised(nn.Conv2d):
    """A convolution whose filters are standardised in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class ComputedWeights(nn.Module):
    """Weight standardisation and weight normalisation: filters may go, but not what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = Standardised(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 6, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1))
        self.d = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.norm(self.a(x)).relu()).relu()).relu()
        return self.d(x.mean((2, 3)))


class Gated(nn.Module):
    """GLU by chunk, a transposed convolution, group norm and instance norm, one-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(8, 8, 1)
        self.group, self.instance = nn.GroupNorm(4, 8), nn.InstanceNorm1d(6, affine=True)
        self.up, self.out = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1, output_padding=1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.b(F.glu(self.a(x), 1))).relu()
        return self.out(self.instance(self.up(x)).relu())


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is stored the other way round; and a plain matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 10)), nn.Parameter(torch.randn(10))
        self.second = nn.Parameter(torch.randn(10, 8))
        self.third = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, x, self.weight).relu()
        return (x @ self.second).relu() @ self.third


class Grouped(nn.Module):
    """ResNeXt's grouped convolution, squeezed to whole groups; PReLU a channel; interpolation; pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.b, self.act = nn.Conv2d(12, 24, 3, padding=1, groups=4), nn.PReLU(24)
        self.c, self.d = nn.Conv2d(24, 8, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.norm(self.a(x)).relu()))
        x = F.interpolate(self.c(x), scale_factor=2.0, mode="nearest")
        return self.d(F.pixel_shuffle(x, 2))


class GroupedUpsampling(nn.Module):
    """A decoder's grouped and depthwise transposed convolutions, squeezed to whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4)
        self.norm, self.depthwise = nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 12, 3, groups=12, bias=False)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.depthwise(self.norm(self.up(self.a(x).relu())).relu()))


class ChannelsLast(nn.Module):
    """ConvNeXt's block: depthwise convolution, permuted to channels last for norm and MLP, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 2, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class Recurrent(nn.Module):
    """An LSTM between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b, self.c = nn.Linear(4, 6), nn.LSTM(6, 5), nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.lstm(self.a(x))[0]).relu())


class ReadsText(nn.Module):
    """CRNN's: the columns of a convolution's map are the steps of a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.lstm, self.out = nn.LSTM(6 * 4, 7, num_layers=2, bidirectional=True), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), (2, 1))
        x = x.permute(3, 0, 1, 2).flatten(2)
        return self.out(self.lstm(x)[0]).log_softmax(-1)


class Language(nn.Module):
    """A language model: embedding, LSTM, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(11, 8), nn.LSTM(8, 9, batch_first=True), nn.Linear(9, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(tokens))[0])


class NoKeyBias(nn.Module):
    """torchvision's Swin v2: a part of the packed bias is zeroed before use."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.head_dim, self.qkv, self.out = d // heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CachedBias(nn.Module):
    """LeViT's: in evaluation, the bias of every head is made once and kept in a dict."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.head_dim, self.qkv, self.out = d // heads, nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.table, self.cache = nn.Parameter(torch.randn(heads, 5)), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[:, torch.arange(5)].unsqueeze(1)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, self.cache["bias"]).transpose(1, 2).flatten(2))


class RelativeBias(nn.Module):
    """Swin's: attention scores get a bias a head, looked up in a table by relative position."""

    index: Tensor

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.head_dim = d // heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.table = nn.Parameter(torch.randn(9, heads))
        self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.roll(1, 1)
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        bias = self.table[self.index.view(-1)].view(5, 5, -1).permute(2, 0, 1)
        scores = torch.matmul(q, k.mT) + bias.unsqueeze(0)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class AuxiliaryHead(nn.Module):
    """GoogLeNet's: a head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.auxiliary, self.head = nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.a(x)).relu()
        y = self.head(self.b(x).mean((2, 3)))
        return (y, self.auxiliary(x.mean((2, 3)))) if self.training else y


class Tokens(nn.Module):
    """An embedding whose channels are read by a linear layer; and one that is tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.read = nn.Embedding(11, 8), nn.Linear(8, 6)
        self.tied, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.read(self.free(tokens).tanh()) + self.tied(tokens)
        return F.linear(self.mix(x), self.tied.weight)
