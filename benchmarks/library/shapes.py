"""Large architectures with random weights, written out: they need nothing but torch, and any size can be had."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPANSION = 4  # channels of a bottleneck's end, for one in its middle


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut; the second one has the stride, as in torchvision."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(*shortcut if inputs != outputs else ())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class ResNet(nn.Module):
    """The ImageNet ResNet of He et al. with bottlenecks; as it stands torchvision's ResNet-50."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, stages = width, []
        for stage, count in enumerate(blocks):
            of_stage = []
            for block in range(count):
                of_stage.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1))
                inputs = EXPANSION * width << stage
            stages.append(nn.Sequential(*of_stage))
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        return self.fc(self.layers(x).mean((2, 3)))


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, seed: int = 0) -> ResNet:
    """With random weights, in evaluation mode; each block adds a little to its shortcut, so that nothing grows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(blocks, width)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, 0.25)
    return model.eval().requires_grad_(False)


class Norm(nn.Module):
    """Root mean square norm, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotated positions; some query heads share their keys and values."""

    def __init__(self, hidden: int, head: int, shared: int) -> None:
        super().__init__()
        self.head, self.shared = head, shared
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(hidden, hidden // shared, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (
            layer(x).view(n, length, -1, self.head).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (t * cos + torch.cat([-t[..., self.head // 2 :], t[..., : self.head // 2]], -1) * sin for t in (q, k))
        k, v = (t[:, :, None].expand(-1, -1, self.shared, -1, -1).reshape(n, -1, length, self.head) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(n, length, -1))


class Layer(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, hidden: int, inner: int, head: int, shared: int) -> None:
        super().__init__()
        self.input_norm, self.attention = Norm(hidden), Attention(hidden, head, shared)
        self.mlp_norm = Norm(hidden)
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin)
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """The shape of Llama's smallest, of 1.1 billion parameters: token numbers (n, length) -> logits."""

    def __init__(
        self, layers: int = 16, hidden: int = 2048, inner: int = 8192, head: int = 64, vocabulary: int = 32_000
    ) -> None:
        super().__init__()
        self.head, self.vocabulary = head, vocabulary
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(hidden, inner, head, shared=4) for _ in range(layers))
        self.norm, self.lm_head = Norm(hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        frequencies = 1e4 ** (-torch.arange(0, self.head, 2, device=tokens.device) / self.head)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * torch.cat([frequencies, frequencies])
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def llama(
    layers: int = 16,
    hidden: int = 2048,
    inner: int = 8192,
    head: int = 64,
    vocabulary: int = 32_000,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Llama:
    """With random weights, made where they stay, in evaluation mode."""
    with torch.device("meta"):
        model = Llama(layers, hidden, inner, head, vocabulary)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1 / parameter.shape[1] ** 0.5, generator=generator)
        else:
            parameter.data.fill_(1)
    return model.eval().requires_grad_(False)
