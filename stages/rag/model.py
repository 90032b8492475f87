"""The RAG model: a question encoder with gradient, a search, a generator, one likelihood (Lewis et al. 2020).

There and not back: a question vector asks the index for passages, their ids gather tokens that were made once, the
generator scores the answer under each passage, the marginal is the loss. Where the context encoder trains too, the
passages found are encoded anew for their scores.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.bm25.hits import Hits
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder, padded_rows
from stages.generation import marginalization
from stages.generation.contexts import assemble_contexts
from stages.generation.generator import Generator
from stages.generation.packed_bart import PackedBart
from stages.generation.packed_causal import PackedCausal
from stages.generation.vocabulary import padded_log_probs
from stages.packed.cuda_graphs import CudaGraphs
from stages.params import Lengths, Params
from stages.rag.batches import Examples, RagBatch
from stages.search.fusion import fuse
from stages.search.passage_encoder import PassageEncoder
from stages.search.passage_index import PassageIndex, doc_scores, load_index


class RagOutput(NamedTuple):
    nll: Tensor  # [B] nats a question
    log_prior: Tensor  # [B, K] log p(z | x), without gradient
    rows: Tensor  # [B, K] passages retrieved, -1: missing
    context_tokens: Tensor  # real tokens read by the generator's encoder


class Rag(nn.Module):
    """The two trained models (three with a `passage_encoder`) and, beside them, the passages that they retrieve and read."""

    def __init__(self, encoder: Encoder, generator: Generator, index: PassageIndex, passages: TokenStore, n_docs: int,
                 lengths: Lengths, score_scale: float = 1.0, hybrid_weight: float = 0.0,
                 passage_encoder: PassageEncoder | None = None):  # fmt: skip
        super().__init__()
        self.question_encoder = encoder.model
        self.generator_model = generator.model
        self.context_encoder = passage_encoder and passage_encoder.encoder.model
        self.encoder, self.generator = encoder, generator
        self.index, self.passages = index, passages
        self.n_docs, self.lengths = n_docs, lengths
        self.score_scale, self.hybrid_weight = score_scale, hybrid_weight
        self.passage_encoder = passage_encoder
        self.packed = packed_likelihood(generator)

    def record_graphs(self) -> None:
        """From now on training replays the generator's passes as CUDA graphs, where it has a packed likelihood."""
        if self.packed:
            limits = self.lengths.context_tokens, self.lengths.answer_tokens
            self.packed.graphs = CudaGraphs(
                self.packed.log_probs,
                self.generator_model,
                self.generator.positions_needed(*limits),
                limits[1],
            )

    def examples(self, questions: list[str], answers: list[str], hits: Hits | None = None) -> Examples:
        """Tokenizes questions (cut to `lengths.question_tokens`) and their answers; `hits` are theirs by BM25."""
        limit = self.lengths.question_tokens
        room = self.lengths.context_tokens - len(self.generator.context_prefix) - len(self.generator.context_suffix)
        for_generator = [row[: min(limit, room)] for row in self.generator.question_tokens(questions)]
        targets, mask = self.generator.answer_tokens(answers, self.lengths.answer_tokens)
        return Examples(
            TokenStore.from_rows(self.encoder.question_rows(questions, limit)),
            TokenStore.from_rows(for_generator),
            targets,
            mask,
            hits,
        )

    def batch(self, examples: Examples, rows: list[int]) -> RagBatch:
        """The named examples, padded to their own longest, on the model's device.

        Examples that stay in the host's memory are put together there: the host then need not wait for a GPU's earlier
        work to learn how wide a batch is.
        """
        chosen = torch.tensor(rows, device=examples.targets.device)
        question_ids, question_mask = padded_rows(
            examples.for_encoder, chosen, self.encoder.tokenizer.pad_token_id, chosen.device
        )
        asked, lengths = examples.for_generator.padded(
            chosen, self.lengths.question_tokens, self.generator.pad_token_id
        )
        mask = examples.target_mask[chosen]
        width = int(mask.any(0).sum())
        hits = examples.hits and examples.hits.select(chosen)
        batch = RagBatch(
            question_ids, question_mask, asked, lengths, examples.targets[chosen, :width], mask[:, :width], hits
        )
        device = next(self.parameters()).device
        if device.type == "cuda" and chosen.device.type == "cpu":
            # Only from page-locked memory does a copy join the GPU's queue without emptying it first.
            return RagBatch(
                *(part if part is None else part.pin_memory().to(device, non_blocking=True) for part in batch)
            )
        return RagBatch(*(part if part is None else part.to(device) for part in batch))

    def retrieve(self, question_vectors: Tensor, hits: Hits | None = None) -> tuple[Tensor, Tensor]:
        """The best passages of each question and their scores, with gradient to the questions: [B, K] and [B, K].

        With BM25's `hits` both rankings compete (fusion.py). A context encoder that trains has a part in the scores, not
        in the search: its passages' vectors are computed here and pass the gradient on.
        """
        device, vectors = question_vectors.device, question_vectors.detach()
        wanted = self.n_docs if hits is None else max(self.n_docs, hits.rows.shape[1])
        rows = self.index.search(vectors, wanted).to(device)
        added = 0.0
        if hits is not None:
            rows, added = fuse(self.index, vectors, rows, hits, self.score_scale, self.hybrid_weight, self.n_docs)
        if self.passage_encoder:
            passages = self.passage_encoder.vectors(rows)
        else:
            passages = self.index.gather(rows.to(self.index.vectors.device)).to(device)
        return rows, self.score_scale * doc_scores(question_vectors, passages, rows) + added

    def contexts(self, batch: RagBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B * K, L] of every question with each of its passages `rows` [B, K]."""
        n_docs = rows.shape[1]
        return assemble_contexts(
            self.passages,
            rows.flatten(),
            batch.generator_questions.repeat_interleave(n_docs, 0),
            batch.generator_question_lengths.repeat_interleave(n_docs),
            limit=self.lengths.context_tokens,
            prefix=self.generator.context_prefix,
            suffix=self.generator.context_suffix,
            pad=self.generator.pad_token_id,
        )

    def encode_questions(self, batch: RagBatch) -> Tensor:
        """Question vectors [B, d]."""
        output = self.question_encoder(batch.question_ids, attention_mask=batch.question_mask)
        return self.encoder.pooled(output, batch.question_mask)

    def forward(
        self, batch: RagBatch, *, marginal: str, retriever_gradient: str = "exact", label_smoothing: float = 0.0
    ) -> RagOutput:
        """Each question's negative log-likelihood under its retrieved passages.

        `marginal` is sequence, token or average (see marginalization.py); `retriever_gradient` "none" cuts the gradient
        to the question encoder.
        """
        vectors = self.encode_questions(batch)
        if retriever_gradient == "none":
            vectors = vectors.detach()
        rows, scores = self.retrieve(vectors, batch.hits)
        input_ids, attention_mask = self.contexts(batch, rows)
        token_lp = self.token_log_probs(batch, input_ids, attention_mask, label_smoothing)
        prior = marginalization.log_prior(scores)
        nll = marginalization.NLL[marginal](prior, token_lp, batch.target_mask)
        return RagOutput(nll, prior.detach(), rows, attention_mask.sum())

    def token_log_probs(
        self, batch: RagBatch, input_ids: Tensor, attention_mask: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """log p(y_t | y_<t, x, z) [B, K, T] of the batch's targets under contexts [B * K, L]."""
        questions = len(batch.targets)
        n_docs = len(input_ids) // questions
        if self.packed:
            repeated = [part.repeat_interleave(n_docs, 0) for part in (batch.targets, batch.target_mask)]
            scored = self.packed.token_log_probs(input_ids, attention_mask, *repeated, label_smoothing)
            return scored.unflatten(0, (questions, n_docs))
        contexts = self.generator.encode(input_ids, attention_mask)
        targets = batch.targets.repeat_interleave(n_docs, 0)
        scored = padded_log_probs(self.generator, contexts, targets, label_smoothing)
        return scored.unflatten(0, (questions, n_docs))


def packed_likelihood(generator: Generator) -> PackedBart | PackedCausal | None:
    """The generator's likelihood without padding, for the families that have one."""
    if PackedBart.fits(generator.model.config):
        return PackedBart(generator.model, *generator.decoder_prefix)
    return PackedCausal(generator) if PackedCausal.fits(generator.model.config) else None


def open_rag(
    encoder: Encoder, generator: Generator, index: PassageIndex, passages: TokenStore, n_docs: int, lengths: Lengths,
    device: torch.device, score_scale: float = 1.0, hybrid_weight: float = 0.0,
    passage_encoder: PassageEncoder | None = None, models_move: bool = True,
) -> Rag:  # fmt: skip
    """Puts the pieces together on `device`; scores are `score_scale` times the inner product, plus BM25's share.

    With a `passage_encoder` the context encoder trains too. Unless `models_move`, the models stay where they are.

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
    needed = generator.positions_needed(lengths.context_tokens, lengths.answer_tokens)
    if generator.max_positions and generator.max_positions < needed:
        raise ValueError(
            f"lengths.context_tokens: {lengths.context_tokens} with lengths.answer_tokens {lengths.answer_tokens} takes "
            f"{needed} positions, but the generator has {generator.max_positions}"
        )
    on_device = passages.to(device) if device.type == "cuda" else passages
    searched = index.to(device, together=True)
    rag = Rag(encoder, generator, searched, on_device, n_docs, lengths, score_scale, hybrid_weight, passage_encoder)
    return rag.to(device) if models_move else rag


def open_rag_on(
    parts: tuple[Encoder, Generator], index: tuple[Path, Path], tokens: Path, params: Params, device: torch.device,
    passage_encoder: PassageEncoder | None = None, models_move: bool = True,
) -> Rag:  # fmt: skip
    """`open_rag` of a question encoder and a generator over an index and its vectors, and the tokens, in these folders."""
    searching, retriever = load_index(*index, params.index), params.retriever
    return open_rag(
        *parts, searching, TokenStore.open(tokens), retriever.n_docs, params.lengths, device, retriever.score_scale,
        retriever.hybrid_weight, passage_encoder, models_move,
    )  # fmt: skip
