"""Small backbones of the kinds that users have, and one made of a function.

Found by tests in any folder: pytest puts tests/reference on the path.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BackboneOf(nn.Module):
    """A backbone whose forward is a function of itself and its inputs."""

    def __init__(self, run, *, inputs=1, **children):
        super().__init__()
        self._run, self._inputs = run, inputs
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x, y=None):
        return self._run(self, x) if self._inputs == 1 else self._run(self, x, y)


class _Block(nn.Module):
    """Two convolutions with a shortcut, in torchvision's manner: modules that work in place."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = StochasticDepth(0.3)
        self.down = nn.Conv2d(channels, width, 1, stride=stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu_(self.drop(y) + self.down(x))


class StochasticDepth(nn.Module):
    """Drops a whole branch for some samples, in training only."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(len(x), 1, 1, 1) >= self.rate
        return x * keep / (1 - self.rate)


class SmallResNet(nn.Module):
    """A residual network that flattens by a function, so that its children do not chain."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.layer1 = _Block(8, 8, 1)
        self.layer2 = _Block(8, 16, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.pool(self.layer2(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(x, 1))


class _Attention(nn.Module):
    """Reads its mode in forward, as timm's does."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        rate = 0.2 if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=rate))


class _Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1))
        self.out = nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.out(self.mlp(self.norm2(x)))


class SmallViT(nn.Module):
    """A vision transformer with a class token and position embeddings of its own."""

    def __init__(self, num_classes, width=12, depth=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.layers = nn.ModuleList([_Layer(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens)[:, 0])


class DropsInTraining(nn.Module):
    """Calls dropout as a function of its mode, at its root."""

    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.last = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return self.last(F.dropout(x, 0.4, training=self.training))


def tensors_of(module):
    """Its parameters and buffers, by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def logits_of(output):
    """The logits of a model of any package."""
    return getattr(output, "logits", output)
