"""What callbacks measure reaches the loggers at the right steps, and costs later steps nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import PACKAGES, fit, module, sgd

from lightning_metaopt.callbacks import OptimisticMetaGrad
from lightning_metaopt.callbacks.logs import cosine, quantiles


@pytest.mark.parametrize("package", PACKAGES)
def test_values_reach_loggers_beside_what_the_module_logs(package: str, tmp_path: Path) -> None:
    CSVLogger = pytest.importorskip(f"{package}.loggers").CSVLogger
    net = module(sgd(), package=package)
    plain = net.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        loss = plain(batch, batch_idx)
        net.log("loss", loss)
        return loss

    net.training_step = training_step
    logger = CSVLogger(tmp_path, name="", version="")
    callback = OptimisticMetaGrad(scope="optimizer")
    trainer = fit(net, callback, package=package, logger=logger, log_every_n_steps=5)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    key = "OptimisticMetaGrad/factor"
    assert [row["step"] for row in rows if row[key]] == [row["step"] for row in rows if row["loss"]] == ["4", "9"]
    assert float([row[key] for row in rows if row[key]][-1]) == pytest.approx(float(trainer.logged_metrics[key]))
    assert float(trainer.callback_metrics[key]) == float(trainer.logged_metrics[key])


def test_the_cosine_of_vectors_in_parts() -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 7))
    parts = [(one[:3], other[:3]), (one[3:], other[3:])]
    found = cosine([[a @ a, b @ b, a @ b] for a, b in parts])
    assert found == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert cosine([]) is cosine([[0.0, 1.0, 0.0]]) is cosine([[1.0, 0.0, 0.0]]) is None


def test_quantiles() -> None:
    values = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    wanted = np.quantile(values.double().numpy(), [0.1, 0.5, 0.9])
    assert list(quantiles(values).values()) == pytest.approx(wanted.tolist(), abs=1e-5)
    many = torch.arange(1e6)
    assert quantiles(many)["q90"] == pytest.approx(0.9e6, rel=1e-3)
