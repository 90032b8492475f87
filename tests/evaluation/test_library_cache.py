"""Decoding through the library's cache, under its old name and its new one, without a warning of what goes."""

import warnings

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from stages.evaluation import library_cache
from stages.evaluation.states import start
from tests.rag.test_families import rag_of


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_decoding_uses_nothing_that_the_library_will_remove(family):
    generator = rag_of(family).generator
    ids = torch.tensor([[0, 20, 30, 2], [0, 40, 2, 1]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        state = start(generator, generator.encode(ids, (ids != 1).long()))
        first = state.first()
        state = state.fork(torch.tensor([0, 1, 1]))
        after = state.advance(torch.tensor([[5], [6], [7]]))
    assert first.shape == (2, 8192) and after.shape == (3, 1, 8192)


class Old:
    def forward(self, input_ids, past_key_values=None, use_cache=None): ...


class New:
    def forward(self, input_ids, cache=None, use_cache=None): ...


def test_the_argument_is_the_one_that_the_model_has():
    assert library_cache.feed(Old(), "kept") == {"past_key_values": "kept"}
    assert library_cache.feed(New(), "kept") == {"cache": "kept"}
    assert library_cache.left_in({"logits": 1, "past_key_values": "left"}) == "left"
    assert library_cache.left_in({"logits": 1, "cache": "left"}) == "left"
    known = CausalLMOutputWithPast.__dataclass_fields__.keys() & {"cache", "past_key_values"}
    assert all(library_cache.left_in(CausalLMOutputWithPast(**{name: "left"})) == "left" for name in known)
