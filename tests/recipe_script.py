"""The scripts that lie beside recipes, which are no part of the package, as modules."""

import importlib.util
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"


def load_script(path):
    """``load_script("metamd/quadratic.py")``: the script, run as a module."""
    name = "recipe_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, RECIPES / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
