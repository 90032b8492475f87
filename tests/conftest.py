"""For all tests: no model hub is asked, whose answer a machine without network waits for a minute."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
