"""Putting a RAG model together from its parts, which must fit each other."""

from pathlib import Path

import torch

from stages.compute.precision import cast_weights, generator_dtype
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder
from stages.generation import blocks
from stages.generation.generator import Generator
from stages.params import Params
from stages.rag.folder import load_rag_parts
from stages.rag.model import Rag
from stages.rag.prior import PriorWeights, load_prior, prior_of
from stages.rag.together import APART
from stages.search.passage_encoder import PassageEncoder
from stages.search.passage_index import PassageIndex, index_folders, load_index
from stages.search.reranking import Reranker, load_reranker
from stages.settings.retrieval import Lengths

FEWEST_PASSAGE_TOKENS = 8  # that must fit beside the longest question


def check_reading(generator: Generator, reading: str) -> None:
    """Raises ValueError where the generator cannot read passages in this way: each and together, all can."""
    config = generator.model.config
    if reading not in APART or blocks.fits(config) or (config.is_encoder_decoder and reading == "weighted"):
        return
    if config.is_encoder_decoder:
        raise ValueError(
            f"recipes: reading: parallel is of decoder-only generators; one of type {config.model_type} reads its passages "
            "apart with reading: together, use that"
        )
    raise ValueError(
        f"recipes: reading: {reading} wants a generator of type {', '.join(blocks.FAMILIES)}, all of whose layers see all "
        f"of the text; this one is of type {config.model_type} or has layers that see less; use reading: together"
    )


def check_lengths(generator: Generator, lengths: Lengths, together: int = 1) -> None:
    """Raises ValueError where the generator has fewer positions than contexts of `together` passages and answers take, or no
    passage fits beside a question."""
    alone, needed = (
        generator.positions_needed(lengths.context_tokens, lengths.answer_tokens, n) for n in (1, together)
    )
    has = f"{needed} positions, but the generator has {generator.max_positions}"
    if generator.max_positions and generator.max_positions < alone:
        raise ValueError(
            f"lengths.context_tokens: {lengths.context_tokens} with lengths.answer_tokens {lengths.answer_tokens} takes {has}"
        )
    if generator.max_positions and generator.max_positions < needed:
        raise ValueError(
            f"retriever.n_docs: {together} passages of lengths.context_tokens ({lengths.context_tokens}), read together, with "
            f"lengths.answer_tokens {lengths.answer_tokens} take {has}; lower n_docs or context_tokens, or use reading: each"
        )
    frame = len(generator.context_prefix) + len(generator.context_suffix)
    least = lengths.question_tokens + frame + FEWEST_PASSAGE_TOKENS
    if lengths.context_tokens < least:
        raise ValueError(
            f"lengths.context_tokens: {lengths.context_tokens} leaves no room for a passage: a question takes up to "
            f"lengths.question_tokens ({lengths.question_tokens}), what the generator wants around a context {frame}; use "
            f"{least} or more"
        )


def open_rag(
    encoder: Encoder, generator: Generator, index: PassageIndex, passages: TokenStore, n_docs: int, lengths: Lengths,
    device: torch.device, prior: PriorWeights | None = None, passage_encoder: PassageEncoder | None = None,
    reranker: Reranker | None = None, rerank_depth: int = 0, models_move: bool = True, reading: str = "each",
) -> Rag:  # fmt: skip
    """Puts the pieces together on `device`; without a `prior` scores are inner products.

    With a `passage_encoder` the context encoder trains too. Unless `models_move`, the models stay where they are.
    `reading` (each, together, weighted, parallel) decides how many positions the generator must have.

    Raises ValueError where they do not fit each other."""
    if encoder.dimension != index.vectors.shape[1]:
        raise ValueError(
            f"models.question_encoder: its vectors have {encoder.dimension} dimensions, those of the index "
            f"{index.vectors.shape[1]}; use the encoder that belongs to models.context_encoder"
        )
    if len(passages) != len(index.vectors):
        raise ValueError(
            f"the index holds {len(index.vectors)} passages, data/tokens {len(passages)}; run `dvc repro` to make them agree"
        )
    if reranker and len(reranker.tokens) != len(passages):
        raise ValueError(
            f"data/reranker holds {len(reranker.tokens)} passages, data/tokens {len(passages)}; run `dvc repro` to make them "
            "agree"
        )
    check_reading(generator, reading)
    check_lengths(generator, lengths, n_docs if reading == "together" else 1)
    on_device = passages.to(device) if device.type == "cuda" else passages
    searched = index.to(device, together=True)
    reranking = reranker and reranker.to(device)
    rag = Rag(encoder, generator, searched, on_device, n_docs, lengths, prior, passage_encoder, reranking, rerank_depth)
    return rag.to(device) if models_move else rag


def open_rag_on(
    parts: tuple[Encoder, Generator], index: tuple[Path, Path], tokens: Path, params: Params, device: torch.device,
    prior: PriorWeights | None = None, passage_encoder: PassageEncoder | None = None, reranker: Reranker | None = None,
    models_move: bool = True,
) -> Rag:  # fmt: skip
    """`open_rag` of a question encoder and a generator over an index and its vectors, and the tokens, in these folders.

    Without a `prior` it is that of the parameters.
    """
    searching, retriever = load_index(*index, params.index), params.retriever
    return open_rag(
        *parts, searching, TokenStore.open(tokens), retriever.n_docs, params.lengths, device,
        prior or prior_of(retriever), passage_encoder, reranker, retriever.rerank_depth, models_move,
        params.recipe.reading,
    )  # fmt: skip


def open_trained(params: Params, device: torch.device, data: Path, model: Path) -> Rag:
    """The model that training left in the folder `model`, ready to answer: in eval mode, the generator in evaluate.precision.

    `data` holds tokens, index, vectors and reranker as the pipeline leaves them; index and reranker that were trained too
    lie in `model`. Raises ValueError where something is missing, damaged or does not fit.
    """
    dtype = generator_dtype(params.evaluate.precision, device)
    rag = open_rag_on(
        load_rag_parts(model, dtype), index_folders(model, data / "index", data / "vectors"), data / "tokens", params,
        device, load_prior(model, params.retriever),
        reranker=load_reranker(data / "reranker", params.models.reranker, model / "reranker"),
    )  # fmt: skip
    # All of the generator: T5's `from_pretrained` leaves a part of it in fp32, where fp16 is asked for.
    cast_weights(rag.generator_model, dtype)
    return rag.eval()
