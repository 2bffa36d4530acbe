"""The CIFAR form of ResNet (He et al. 2015, section 4.2), registered with timm as ``h2t_resnet20``.

A 3x3 stem with 16 channels and three stages of basic blocks with 16, 32 and 64 channels; shortcuts carry no
parameters (stride-2 subsampling and zero padding of the channels). ResNet-20 has 0.27 million weights and costs 41
million multiply-adds per 32x32 image, so its weights travel inside the package.
"""

from importlib import resources
from typing import Any

import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["ResNetCifar", "h2t_resnet20"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.stride = stride
        self.padding = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.padding:
            before = self.padding // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.padding - before))
        x = self.act1(self.bn1(self.conv1(x)))
        out: Tensor = self.act2(self.bn2(self.conv2(x)) + shortcut)
        return out


class ResNetCifar(nn.Module):
    """ResNet-(6n+2) for 32x32 images, with timm's model interface.

    Parameters
    ----------
    depths : tuple of int
        Number of basic blocks in each stage.
    num_classes : int
        Width of the linear layer; 0 leaves the pooled features as the output.
    in_chans : int
        Image channels.
    global_pool : str
        Any of timm's pooling names; ``""`` keeps the feature map.
    drop_rate : float
        Dropout before the linear layer, in training mode only.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 3),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = []
        width = 16
        for stage, depth in enumerate(depths):
            channels = 16 * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(BasicBlock(width, channels, stride=2 if stage and index == 0 else 1))
                width = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=width, reduction=2**stage, module=f"layer{stage + 1}"))
        self.num_features = self.head_hidden_size = width
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.drop_rate = drop_rate
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for info in self.feature_info:
            x = self.get_submodule(info["module"])(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        "h2t_resnet20.cifar10": dict(
            url="",
            file=str(resources.files("h2t_store.network") / "weights" / "h2t_resnet20.safetensors"),
            num_classes=10,
            input_size=(3, 32, 32),
            pool_size=(8, 8),
            crop_pct=1.0,
            interpolation="bicubic",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            first_conv="conv1",
            classifier="fc",
            license="apache-2.0",
        )
    }
)


@register_model  # type: ignore[untyped-decorator]  # timm has no annotation here
def h2t_resnet20(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-20 for 32x32 images; ``pretrained=True`` loads the weights shipped with the package."""
    model: ResNetCifar = build_model_with_cfg(ResNetCifar, "h2t_resnet20", pretrained, **kwargs)
    return model
