import copy
from contextlib import ExitStack

import pytest
import yaml
from tiny_recipe import TINY

from lightning_metaopt.study.shared import WorkList, open_storage


@pytest.fixture
def source():
    return copy.deepcopy(TINY)


@pytest.fixture
def recipe_file(tmp_path, source):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(source), encoding="utf-8")
    return path


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'runs.db'}"


@pytest.fixture
def work_list(url):
    """Makes lists, each with a connection of its own."""
    with ExitStack() as stack:
        yield lambda *args, **options: WorkList(stack.enter_context(open_storage(url)), *args, **options)
