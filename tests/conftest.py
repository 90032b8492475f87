"""For all tests: no model hub is asked, whose answer a machine without network waits for a minute."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
gc.disable()


def pytest_collection_finish():
    """What was imported stays: to look for garbage in it, then and at each full collection, took a tenth of the time."""
    gc.freeze()
    gc.enable()
