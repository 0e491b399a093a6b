"""Networks in plain torch: those of the papers, with widths that scale down to tests."""

from lightning_metaopt.models.lenet import LeNet
from lightning_metaopt.models.mlp import MLP
from lightning_metaopt.models.pretrained import pretrained
from lightning_metaopt.models.resnet import ResNet18, ResNet50
from lightning_metaopt.models.small import SmallNetwork
from lightning_metaopt.models.transformer import Transformer
from lightning_metaopt.models.vgg import VGG16

__all__ = ["MLP", "VGG16", "LeNet", "ResNet18", "ResNet50", "SmallNetwork", "Transformer", "pretrained"]
