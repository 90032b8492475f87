"""A RAG model of random weights, small enough to train in milliseconds, with the embedded tokenizers."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DPRConfig,
    DPRQuestionEncoder,
)

from stages.corpus.token_store import TokenStore
from stages.encoders.cross_encoder import CrossEncoder, frame_of
from stages.encoders.encoder import Encoder
from stages.generation.generator import generator_from
from stages.generation.tokenizer import passage_tokens
from stages.rag.model import Rag
from stages.rag.opening import open_rag
from stages.rag.prior import PriorWeights, Weights
from stages.search.index_kinds import build_index
from stages.search.passage_index import PassageIndex, describe_index, write_index
from stages.search.reranking import Reranker
from stages.settings.retrieval import Lengths
from stages.settings.runs import Recipe, Train
from stages.storage import manifest

LENGTHS = Lengths(question_tokens=24, passage_tokens=48, context_tokens=64, answer_tokens=8)
TITLES = [f"Place {name}" for name in ("Alpha", "Beta", "Gamma", "Delta", "Epsilon", "Zeta", "Eta", "Theta", "Iota")]
TEXTS = [f"{title} lies {10 * i} km from the sea. " * (1 + i % 3) for i, title in enumerate(TITLES)]
QUESTIONS = [f"How far is {title} from the sea" + " really" * (i % 4) + "?" for i, title in enumerate(TITLES)]
ANSWERS = [f"{10 * i} km" if i % 2 else f"{10 * i}" for i in range(len(TITLES))]
NEW = Recipe(
    reading="each", marginalization="sequence", accumulation="across_batches", batching="true_batches",
    precision="fp32", checkpoints="best", tensorboard=False, retriever_gradient="exact",
)  # fmt: skip
TOGETHER = {"reading": "together", "retriever_gradient": "emdr2"}  # what differs from NEW
OLD = Recipe(
    reading="each", marginalization="average", accumulation="within_batch", batching="one_at_a_time",
    precision="fp32", checkpoints="last", tensorboard=False, retriever_gradient="none",
)  # fmt: skip
SETTINGS = Train(
    recipe="new", seed=7, max_steps=4, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
    question_encoder_learning_rate=None, context_encoder_learning_rate=None, reranker_learning_rate=None,
    prior_learning_rate=1e-2, positives_weight=0.0, answers="first", warmup_steps=1,
    weight_decay=0.01, max_grad_norm=1.0, label_smoothing=0.0, logging_steps=1, eval_steps=2, save_steps=1,
    save_total_limit=2, gradient_checkpointing=False, compile=False, bf16_copy=False, halve_on_oom=True,
    max_skipped_steps=3, index_refresh_steps=0,
)  # fmt: skip


@cache
def tokenizer(part: str):
    return AutoTokenizer.from_pretrained(f"data/tiny/{part}")


def tiny_rag(n_docs: int = 3, passages: int = len(TITLES), seed: int = 0) -> Rag:
    """The same weights for the same seed; scores between passages differ by a few nats."""
    torch.manual_seed(seed)
    dpr = DPRConfig(
        vocab_size=7168, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, projection_dim=8,
        pad_token_id=1, type_vocab_size=1, initializer_range=0.3,
    )  # fmt: skip
    bart = BartConfig(
        vocab_size=8192, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=96, dropout=0.0, init_std=0.3,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    encoder = Encoder(DPRQuestionEncoder(dpr).eval(), tokenizer("encoder"))
    generator = generator_from(BartForConditionalGeneration(bart).eval(), tokenizer("generator"))
    vectors = np.random.default_rng(seed).normal(size=(passages, 8)).astype(np.float32)
    index = PassageIndex(build_index(vectors, "Flat"), torch.from_numpy(vectors))
    store = TokenStore.from_rows(passage_tokens(generator.tokenizer, TITLES[:passages], TEXTS[:passages]))
    return open_rag(encoder, generator, index, store, n_docs, LENGTHS, torch.device("cpu"))


def save_index(folder: Path, index, facts: dict) -> None:
    """Writes an index beside the vectors that are already in `folder`."""
    manifest.record(folder / "vectors.npy")
    write_index(index, folder)
    describe_index(folder, facts, folder)


def tiny_reranker(passages: int = len(TITLES), seed: int = 1, dropout: float = 0.0) -> Reranker:
    """A cross-encoder of random weights over the same passages; its scores differ by a few nats."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=7168, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=96, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=1,
        type_vocab_size=1, initializer_range=0.3, num_labels=1,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    encoder = CrossEncoder(model, tokenizer("encoder"), frame_of(tokenizer("encoder"), has_types=False))
    room = encoder.passage_room(LENGTHS.question_tokens, LENGTHS.passage_tokens)
    return Reranker(encoder, TokenStore.from_rows(encoder.passage_rows(TITLES[:passages], TEXTS[:passages], room)))


def reranked_rag(n_docs: int = 3, depth: int = 6, learns: bool = True, dropout: float = 0.0, passages: int = len(TITLES),
                 weights: Weights | None = None) -> Rag:  # fmt: skip
    """The tiny model with a reranker; its prior has weights that learn."""
    rag = tiny_rag(n_docs, passages)
    prior = PriorWeights(weights or Weights(1.5, 0.4, 2.0, 1.25), learns)
    return open_rag(
        rag.encoder, rag.generator, rag.index, rag.passages, n_docs, LENGTHS, torch.device("cpu"), prior,
        reranker=tiny_reranker(passages, dropout=dropout), rerank_depth=depth,
    )  # fmt: skip
