"""Models of real shapes with random weights, and passages, questions and answers of random tokens: for benchmarks.

Nothing is downloaded and no tokenizer is needed. Lengths follow the sample of Wikipedia that the recipes were tuned on:
contexts of 120 tokens in the mean and 280 at most, answers of 5 tokens and their EOS.
"""

from types import SimpleNamespace

import faiss
import numpy as np
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    LlamaConfig,
    LlamaForCausalLM,
)

from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder
from stages.generation.causal import Causal
from stages.generation.generator import Generator
from stages.generation.seq2seq import Seq2Seq
from stages.rag.batches import Examples
from stages.rag.model import Rag
from stages.rag.opening import open_rag
from stages.search.passage_index import PassageIndex
from stages.settings.retrieval import Lengths

LENGTHS = Lengths(question_tokens=64, passage_tokens=280, context_tokens=300, answer_tokens=24)
# "large": facebook/bart-large and facebook/dpr-*-single-nq-base; "tiny": the embedded sample's models, "tiny-llama" with a
# decoder-only generator of that size; "smollm2": HuggingFaceTB/SmolLM2-135M and sentence-transformers/all-MiniLM-L6-v2 (as
# a DPR model).
GENERATORS = {
    "large": BartConfig(
        vocab_size=50265, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
        encoder_attention_heads=16, decoder_attention_heads=16, max_position_embeddings=1024, dropout=0.1,
        attention_dropout=0.1, activation_dropout=0.1, forced_eos_token_id=None, decoder_start_token_id=0,
    ),
    "tiny": BartConfig(
        vocab_size=8192, d_model=256, encoder_layers=4, decoder_layers=2, encoder_ffn_dim=1024, decoder_ffn_dim=1024,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=320, dropout=0.0,
        forced_eos_token_id=None, decoder_start_token_id=0,
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    ),
    "tiny-llama": LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=384, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
TINY_ENCODER = DPRConfig(
    vocab_size=7168, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, projection_dim=256,
)  # fmt: skip
ENCODERS = {
    "large": DPRConfig(),
    "tiny": TINY_ENCODER,
    "tiny-llama": TINY_ENCODER,
    "smollm2": DPRConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
}


def lengths(count: int, mean: float, shortest: int, longest: int, random: np.random.Generator) -> np.ndarray:
    """Right-skewed lengths: log-normal with a spread of 0.35, cut at both ends."""
    return np.clip(random.lognormal(np.log(mean) - 0.06, 0.35, count).round(), shortest, longest).astype(np.int64)


def token_rows(rows: np.ndarray, vocab_size: int, random: np.random.Generator) -> TokenStore:
    """A store of random tokens with the given lengths; special tokens (below 4) do not occur."""
    tokens = random.integers(4, vocab_size, int(rows.sum()), dtype=np.int32)
    return TokenStore(torch.from_numpy(tokens), torch.from_numpy(np.concatenate([[0], rows.cumsum()])))


def random_encoder(shapes: str, as_class: type = DPRQuestionEncoder) -> Encoder:
    torch.manual_seed(0)
    return Encoder(as_class(ENCODERS[shapes]).eval(), SimpleNamespace(pad_token_id=0))


def random_generator(shapes: str) -> Generator:
    torch.manual_seed(1)
    words = SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids)))
    config = GENERATORS[shapes]
    if config.is_encoder_decoder:
        model = BartForConditionalGeneration(config).eval()
        return Seq2Seq(model, words, [0], 2, 1, [0], [2], config.max_position_embeddings)
    return Causal(LlamaForCausalLM(config).eval(), words, 2, 1, [], [3], False, config.max_position_embeddings)


def passage_lengths(passages: int, n_docs: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of 109 tokens in the mean, and nearly so (a spread of 5 %) among every n_docs passages in a row."""
    together = lengths(-(-passages // n_docs) * n_docs, 109, 20, 265, random).reshape(-1, n_docs)
    wanted = 109 * n_docs * random.normal(1, 0.05, (len(together), 1))
    scaled = together * wanted / together.sum(1, keepdims=True)
    return np.clip(scaled.round(), 20, 265).astype(np.int64).flatten()[:passages]


def random_rag(shapes: str, passages: int, n_docs: int, device: torch.device) -> Rag:
    """A RAG model over `passages` random passages.

    Every n_docs passages in a row lie close together, and a question finds such a group. Random encoders find few groups,
    and training fewer still: passages of their own would make contexts 10 % shorter or 20 % longer than they should be.
    """
    random = np.random.default_rng(0)
    encoder, generator = random_encoder(shapes), random_generator(shapes)
    groups = random.standard_normal((-(-passages // n_docs), encoder.dimension), dtype=np.float32)
    vectors = np.repeat(groups, n_docs, axis=0)[:passages]
    vectors += 0.01 * random.standard_normal(vectors.shape, dtype=np.float32)
    index = faiss.IndexFlatIP(encoder.dimension)
    index.add(vectors)
    store = token_rows(passage_lengths(passages, n_docs, random), generator.model.config.vocab_size, random)
    return open_rag(encoder, generator, PassageIndex(index, torch.from_numpy(vectors)), store, n_docs, LENGTHS, device)


def random_examples(rag: Rag, count: int) -> Examples:
    random = np.random.default_rng(1)
    vocab = rag.generator.model.config.vocab_size
    asked, answered = lengths(count, 12, 6, 40, random), lengths(count, 5, 1, 20, random) + 1
    targets = torch.full((count, int(answered.max())), rag.generator.pad_token_id)
    mask: Tensor = torch.arange(targets.shape[1]) < torch.from_numpy(answered)[:, None]
    targets[mask] = torch.from_numpy(random.integers(4, vocab, int(answered.sum())))
    targets[torch.arange(count), torch.from_numpy(answered) - 1] = rag.generator.eos_token_id
    encoder_vocab = rag.question_encoder.config.vocab_size
    return Examples(token_rows(asked, encoder_vocab, random), token_rows(asked, vocab, random), targets, mask)
