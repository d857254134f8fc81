"""Small networks of the families that are pruned most, each with their usual parts."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class C2f(nn.Module):
    """YOLOv8's block: halves of the channels go on, through bottlenecks, and all are joined."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.enter, self.leave = ConvBlock(width, width), ConvBlock((2 + depth) * width // 2, width)
        self.steps = nn.ModuleList(ConvBlock(width // 2, width // 2, 3) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A detector: pyramid with pooling and upsampling, and heads for boxes and classes on two scales."""

    def __init__(self, classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.bins = bins
        self.stem, self.down = ConvBlock(3, 8, 3, 2), ConvBlock(8, 16, 3, 2)
        self.fine, self.coarse = C2f(8), C2f(16)
        self.before, self.after = ConvBlock(16, 8), ConvBlock(32, 16)
        self.merge = C2f(24)
        self.boxes = nn.ModuleList(nn.Sequential(ConvBlock(w, 8, 3), nn.Conv2d(8, 4 * bins, 1)) for w in (24, 16))
        self.classes = nn.ModuleList(nn.Sequential(ConvBlock(w, 8, 3), nn.Conv2d(8, classes, 1)) for w in (24, 16))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(x))
        coarse = self.before(self.coarse(self.down(fine)))
        pooled = [coarse]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        coarse = self.after(torch.cat(pooled, 1))
        fine = self.merge(torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1))
        found = [
            torch.cat([box(level).flatten(2), kind(level).flatten(2)], 1)
            for level, box, kind in zip((fine, coarse), self.boxes, self.classes, strict=True)
        ]
        distances, scores = torch.cat(found, 2).split((4 * self.bins, found[0].shape[1] - 4 * self.bins), 1)
        distances = distances.unflatten(1, (4, self.bins)).softmax(2)
        steps = torch.arange(self.bins).to(x).view(1, 1, -1, 1)
        return torch.cat([(distances * steps).sum(2), scores.sigmoid()], 1)


class UNet(nn.Module):
    """Skips that are joined, bilinear upsampling, and padding where sizes are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([ConvBlock(3, 6, 3), ConvBlock(6, 12, 3)])
        self.middle = ConvBlock(12, 16, 3)
        self.up = nn.ModuleList([ConvBlock(28, 12, 3), ConvBlock(18, 6, 3)])
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for step in self.down:
            skips.append(step(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for step, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = step(torch.cat([skip, x], 1))
        return self.out(x)


class ResBlock(nn.Module):
    """Diffusers' residual block: group norm and SiLU before each convolution; time is added channel by channel."""

    def __init__(self, inputs: int, outputs: int, time: int = 0) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs) if time else None
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            y = y + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class ImageAttention(nn.Module):
    """Self-attention over the pixels of an image, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(4, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class VaeDecoder(nn.Module):
    """Latents become an image: residual blocks, attention in the middle, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.block1, self.attend = nn.Conv2d(3, 8, 3, padding=1), ResBlock(8, 8), ImageAttention(8)
        self.up1, self.block2 = nn.Conv2d(8, 8, 3, padding=1), ResBlock(8, 4)
        self.up2, self.norm, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.block1(self.enter(x)))
        x = self.block2(self.up1(F.interpolate(x, scale_factor=2.0)))
        x = self.up2(F.interpolate(x, scale_factor=2.0))
        return self.out(F.silu(self.norm(x))).tanh()


class Kernels(nn.Module):
    """HiFi-GAN's: the mean of residual blocks of several kernels and dilations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = ((3, 1), (3, 3), (5, 1))
        self.first = nn.ModuleList(nn.Conv1d(width, width, k, dilation=d, padding=d * (k // 2)) for k, d in sizes)
        self.second = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(x, 0.1)
        pairs = zip(self.first, self.second, strict=True)
        return torch.stack([x + second(F.leaky_relu(first(y), 0.1)) for first, second in pairs]).mean(0)


class Vocoder(nn.Module):
    """HiFi-GAN's generator: transposed convolutions, each with residual blocks of several kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Conv1d(3, 16, 7, padding=3), nn.Conv1d(4, 1, 7, padding=3)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(width, width // 2, 4, 2, 1) for width in (16, 8))
        self.blocks = nn.ModuleList(Kernels(width) for width in (8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = block(up(F.leaky_relu(x, 0.1)))
        return self.out(F.leaky_relu(x)).tanh()


def time_embedding(time: Tensor, size: int) -> Tensor:
    """Sines and cosines of a time."""
    frequencies = torch.exp(torch.arange(size // 2).to(time) * (-math.log(100.0) / (size // 2)))
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class DiffusionUNet(nn.Module):
    """A noise predictor: the mean of the image stands in for the time, which is embedded and added in every block."""

    def __init__(self, width: int = 8, time: int = 12) -> None:
        super().__init__()
        self.width = width
        self.time1, self.time2 = nn.Linear(width, time), nn.Linear(time, time)
        self.enter, self.down1 = nn.Conv2d(3, width, 3, padding=1), ResBlock(width, width, time)
        self.shrink, self.down2 = nn.Conv2d(width, width, 3, 2, 1), ResBlock(width, 16, time)
        self.attend, self.middle = ImageAttention(16), ResBlock(16, 16, time)
        self.up2, self.grow = ResBlock(32, width, time), nn.Conv2d(width, width, 3, padding=1)
        self.up1, self.norm, self.out = (
            ResBlock(16, width, time),
            nn.GroupNorm(4, width),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        time = self.time2(F.silu(self.time1(time_embedding(x.mean((1, 2, 3)), self.width))))
        first = self.down1(self.enter(x), time)
        second = self.down2(self.shrink(first), time)
        x = self.middle(self.attend(second), time)
        x = self.up2(torch.cat([x, second], 1), time)
        x = self.grow(F.interpolate(x, scale_factor=2.0))
        return self.out(F.silu(self.norm(self.up1(torch.cat([x, first], 1), time))))


class DiTBlock(nn.Module):
    """A transformer block of which shift, scale and gate come from a condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        y = self.norm(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))


class DiT(nn.Module):
    """Patches of an image, two blocks with adaLN, and patches put back together."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.width = width
        self.patch, self.time = (
            nn.Conv2d(3, width, 2, 2),
            nn.Sequential(nn.Linear(width, 20), nn.SiLU(), nn.Linear(20, width)),
        )
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(2))
        self.norm, self.last, self.out = (
            nn.LayerNorm(width, elementwise_affine=False),
            nn.Linear(width, 2 * width),
            nn.Linear(width, 12),
        )

    def forward(self, x: Tensor) -> Tensor:
        condition = self.time(time_embedding(x.mean((1, 2, 3)), self.width))
        x = self.patch(x)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.last(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, size), 2)
