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
    sys.path.insert(0, str((RECIPES / path).parent))  # as for a script that is run: it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
