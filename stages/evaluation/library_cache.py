"""The library's cache of keys and values, by the name that the installed transformers has for it.

`past_key_values` in 5.17, `cache` in newer ones, which take the old name until 5.40 and warn at every token.
"""

import inspect
from typing import Any

from transformers import Cache


def feed(model: Any, cache: Cache | None) -> dict[str, Cache | None]:
    """The argument by which a model's forward pass takes its cache."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def left_in(output: Any) -> Cache:
    """The cache that a forward pass leaves."""
    return output["cache"] if "cache" in output else output["past_key_values"]
