"""The CIFAR form of ResNet (He et al. 2015, section 4.2), registered with timm as ``h2t_resnet20``.

Its 0.27 million weights come with the package.
"""

from importlib import resources
from typing import Any

import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn


class Shortcut(nn.Module):
    """Shortcut without parameters: every ``stride``-th pixel, and zeros for the channels that are new."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (0, 0, 0, 0, new_channels // 2, new_channels - new_channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _narrower(width: int) -> nn.Sequential:
    """Three blocks that halve the side of the map and double its channels."""
    first = BasicBlock(width, 2 * width, stride=2, downsample=Shortcut(2, new_channels=width))
    return nn.Sequential(first, *(BasicBlock(2 * width, 2 * width) for _ in range(2)))


class ResNetCifar(nn.Module):
    """ResNet-20 for 32x32 images, with timm's model interface."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(3)))
        self.layer2 = _narrower(16)
        self.layer3 = _narrower(32)
        self.feature_info = [dict(num_chs=16 << i, reduction=1 << i, module=f"layer{i + 1}") for i in range(3)]
        self.num_features = self.head_hidden_size = 64
        self.reset_classifier(num_classes, global_pool)
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
        x = self.layer3(self.layer2(self.layer1(x)))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
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
    """ResNet-20 for 32x32 images; ``pretrained=True`` loads the weights that come with the package."""
    model: ResNetCifar = build_model_with_cfg(ResNetCifar, "h2t_resnet20", pretrained, **kwargs)
    return model
