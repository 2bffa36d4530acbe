"""Small networks that do what real ones do in awkward ways; also loaded as ``tiny_models.py:factory``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FunctionalBlock(nn.Module):
    """A residual block whose activations are functions, not modules."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.Sequential(FunctionalBlock(4), FunctionalBlock(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(F.relu(self.stem(x))).mean((2, 3)))


class SharedInplace(nn.Module):
    """One in-place activation module that is called twice, after convolutions whose outputs it overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv2(self.act(self.conv1(x)))).mean((2, 3)))


class Windows(nn.Module):
    """Channels last, linear layers that see windows as if they were images, and one that sees no image at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.window = nn.Linear(6, 6)
        self.table = nn.Linear(2, 6)
        self.head = nn.Linear(6, 5)
        self.register_buffer("positions", torch.randn(1, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        n, h, w, c = x.shape
        x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        x = self.window(x) + self.table(self.positions)
        return self.head(x.reshape(n, -1, c).mean(1))


class BatchMixer(nn.Module):
    """A layer whose rows depend on the other images of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.head(self.fc(x - x.mean(0)))


class Exploding(nn.Module):
    """Activations beyond float16 for bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.scale = nn.Conv2d(2, 2, 1, bias=False)
        nn.init.constant_(self.conv.weight, 1e5)
        nn.init.constant_(self.scale.weight, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.conv(x)).mean((2, 3))


class Greedy(Functional):
    """A network that memory suffices for only in batches of at most ``most`` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)

    def memory(self, most: int) -> bool:
        """From now on memory suffices for so many; true, so that it can be the answer to whether to stop."""
        self.most = most
        return True


def functional() -> nn.Module:
    return Functional()


def exploding() -> nn.Module:
    return Exploding()


def not_a_module() -> int:
    return 3


def failing() -> nn.Module:
    raise RuntimeError("no such luck")


def leaving() -> nn.Module:
    raise SystemExit(0)


def small_input() -> nn.Module:
    model = Functional()
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}
    return model


class CifarBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The published CIFAR ResNets, activations as functions, keys as published."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, channels in enumerate((16, 32, 64)):
            blocks = [
                CifarBlock(width if i == 0 else channels, channels, 2 if stage and i == 0 else 1) for i in range(depth)
            ]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            width = channels
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


def resnet56() -> nn.Module:
    return CifarResNet(9)


class FunctionalLinear(nn.Module):
    """Attention and a dict as the output: weights of linear layers that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.mul_(2).sub_(1)
        tokens = F.relu(self.stem(x).flatten(2).transpose(1, 2))
        tokens = tokens + self.attn(tokens, tokens, tokens)[0]
        return {"logits": self.head(tokens.mean(1))}


class Slices(nn.Module):
    """Two layers that enter on equally large slices from one address; a channels-last map no layer speaks for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)
        self.b = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x[:, :1]], 1) + 1
        return F.max_pool2d(self.a(x[:, :2]) + self.b(x[:, ::2]), 2, stride=1)


class SequenceFirst(nn.Module):
    """Tokens before images, (T, N, C), with a class token, as nn.MultiheadAttention takes them by default."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 4, stride=4)
        self.class_embedding = nn.Parameter(torch.zeros(channels))
        self.norm = nn.LayerNorm(channels)
        self.attn = nn.MultiheadAttention(channels, 2)
        self.mlp = nn.Linear(channels, channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_embedding.expand(1, patches.shape[1], -1), patches])
        y = self.norm(x)
        x = x + self.attn(y, y, y)[0]
        return self.head(self.mlp(x)[0])


class Recurrent(nn.Module):
    """An LSTM over the rows of the image: three tensors come out, two of them with the images on their second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 4, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x.transpose(1, 2).flatten(2)[:, :, :12])
        return self.head(hidden[-1])


class Auxiliary(nn.Module):
    """Nested outputs: logits, a tensor per image beside them, one that is of no image, and no tensors at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.aux = nn.Linear(4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[object, ...]:
        pooled = F.relu(self.conv(x)).mean((2, 3))
        extra = {"aux": self.aux(pooled), "weights": self.head.weight, "size": 3, "index": pooled.argmax(1)}
        return None, self.head(pooled), [extra, "text"]


class Volume(nn.Module):
    """Three-dimensional convolutions, after two-dimensional and one-dimensional ones."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv3d(1, 2, 3, padding=1)
        self.line = nn.Conv1d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.deep(self.flat(x).unsqueeze(1)).flatten(3).mean(2)).mean(2)


class Tied(nn.Module):
    """One linear layer under two names, and another that shares its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.shares = nn.Linear(3, 3)
        self.shares.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.shares(self.again(F.relu(self.first(x.mean((2, 3))))))


class Encoder(nn.Module):
    """torch's own encoder, which has a fused form that calls none of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


class Chain(nn.Module):
    """Convolutions one after the other, in blocks that keep the shape and have no second path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(self.block() for _ in range(3)))
        self.head = nn.Linear(4, 5)

    @staticmethod
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
