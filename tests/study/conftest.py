import copy

import pytest
import yaml
from tiny_recipe import TINY


@pytest.fixture
def source():
    return copy.deepcopy(TINY)


@pytest.fixture
def recipe_file(tmp_path, source):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(source), encoding="utf-8")
    return path
