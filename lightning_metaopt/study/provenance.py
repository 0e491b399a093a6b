"""What results depend on beside the recipe: versions and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["machine", "made_with", "versions"]

_PACKAGES = ("lightning_metaopt", "torch", "lightning", "torchmetrics", "cvxpylayers", "datasets", "optuna", "numpy", "scipy")
_OF_RUNS = ("python", "torch", "lightning", "lightning_metaopt")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return dict(_versions())


@cache  # what is installed does not change under a running process, and to look it up takes milliseconds
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def made_with(found: Mapping[str, str] | None = None) -> str:
    """Of the versions, by default of those installed, the ones that are kept with every run, as text.

    >>> made_with({"python": "3.12.1", "torch": "2.9.0", "numpy": "2.3.1"})
    'python 3.12.1, torch 2.9.0'
    """
    found = versions() if found is None else found
    return ", ".join(f"{package} {found[package]}" for package in _OF_RUNS if package in found)


def machine() -> dict[str, str]:
    """What seconds and megabytes depend on: system, processor, accelerator."""
    import torch

    found = {"system": f"{platform.system()} {platform.machine()}", "processor": f"{_processor()}, {os.cpu_count()} threads"}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
