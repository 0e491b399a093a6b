"""Networks in plain torch, sized for the recipes."""

from lightning_metaopt.models.mlp import MLP

__all__ = ["MLP"]
