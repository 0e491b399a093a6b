"""Weights for `fine_tuning.yaml`: a narrow ResNet-18 trained on the crops of photographs, and one trained on the emoji.

python recipes/metamd/pretrain.py [FOLDER]     # default: outputs/pretrained, where the recipe looks for them; under a minute
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_metaopt.data import ImageData, load_images
from lightning_metaopt.models import ResNet18
from lightning_metaopt.modules import ImageClassifier

STEPS = 1000
SETS = {"photographs": "photo_crops", "emoji": "emoji"}


def pretrain(data: ImageData, seed: int = 0) -> tuple[ResNet18, float]:
    """A network trained with Adam on the set, and its test accuracy."""
    seed_everything(seed)
    network = ResNet18(classes=10, width=4)
    module = ImageClassifier(network, partial(torch.optim.Adam, lr=0.002))
    trainer = Trainer(max_steps=STEPS, logger=False, enable_checkpointing=False, limit_val_batches=0, accelerator="cpu")
    trainer.fit(module, data)
    (scores,) = trainer.test(module, data, verbose=False)
    return network, scores["test accuracy"]


def main(arguments: list[str]) -> None:
    """Train on both sets and save the weights."""
    target = Path(arguments[0]) if arguments else Path("outputs/pretrained")
    target.mkdir(parents=True, exist_ok=True)
    for name, path in SETS.items():
        train, test = (load_images(path=path, split=split, size=16) for split in ("train", "test"))
        network, accuracy = pretrain(ImageData(train, test, batch_size=32))
        file = target / f"{name}.pt"
        torch.save(network.state_dict(), file)
        print(f"{file}: test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
