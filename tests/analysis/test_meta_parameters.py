import torch
from torch import nn

from lightning_metaopt.analysis import count_meta_parameters, plot_meta_parameters
from lightning_metaopt.models import ResNet18
from lightning_metaopt.rules import KroneckerMirror, MetaCurvature, MetaSGD


def test_the_numbers_of_the_papers_table_9():
    net = ResNet18(stem="imagenet")
    net.head = nn.Identity()  # without the classifier: the number of weights is then that of Meta-SGD in the paper
    found = {rule.__name__: count_meta_parameters(rule.for_module(net)) for rule in (MetaSGD, MetaCurvature, KroneckerMirror)}
    assert found["MetaSGD"] == sum(value.numel() for value in net.parameters()) == 11_176_512
    assert found["MetaCurvature"] == 2_974_717
    kernels = [value for value in net.parameters() if value.dim() == 4]
    factors = sum(value.shape[0] + value[0].numel() for value in kernels)
    assert factors == 35_923  # the paper has 37,664
    assert found["KroneckerMirror"] == factors + len(list(net.parameters())) == 35_983
    assert count_meta_parameters(KroneckerMirror.for_module(net, scales=False)) == factors


def test_what_is_not_trained_does_not_count(tmp_path):
    rule = KroneckerMirror({"w": (3, 2)}, momentum=0.9)
    assert count_meta_parameters(rule) == 3 + 2 + 1 + 1
    rule.momentum_logit.requires_grad_(False)
    rule.register_buffer("constant", torch.zeros(7))
    assert count_meta_parameters(rule) == 6
    plot_meta_parameters({"one": rule, "other": MetaSGD({"w": (3, 2)})}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<path") > 5
