"""For all tests: no model hub is asked, whose answer a machine without network waits for a minute."""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
gc.disable()


def pytest_collection_finish():
    """What was imported stays: to look for garbage in it, then and at each full collection, took a tenth of the time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    """Two ranks for all jobs of a test file."""
    from tests.crew import Crew

    crew = Crew(tmp_path_factory.mktemp("crew"))
    yield crew
    crew.leave()
