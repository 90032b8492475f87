"""The RAG model: a question encoder with gradient, a search, a generator, one likelihood (Lewis et al. 2020).

There and not back: a question vector asks the index for passages, their ids gather tokens that were made once, the
generator scores the answer under each passage, the marginal is the loss; or it reads them together (together.py), beside a
loss for the retriever. Where the context encoder trains too, the passages found are encoded anew for their scores. With a
reranker the passages read are the best of more candidates.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stages.bm25.hits import Hits
from stages.corpus.token_store import TokenStore
from stages.encoders.cross_encoder import Asked
from stages.encoders.encoder import Encoder, in_eval_mode, padded_rows
from stages.generation import marginalization, retriever_losses
from stages.generation.contexts import assemble_contexts
from stages.generation.generator import Generator
from stages.generation.packed_bart import PackedBart
from stages.generation.packed_causal import PackedCausal
from stages.generation.vocabulary import padded_log_probs
from stages.packed.cuda_graphs import CudaGraphs
from stages.packed.packing import PackedAnswers
from stages.packed.working_copy import WorkingCopy
from stages.rag.ahead import Found
from stages.rag.batches import Examples, RagBatch
from stages.rag.gold import retrieve_with_golds
from stages.rag.prior import PriorWeights, combined
from stages.rag.ranked import ranked
from stages.rag.together import APART, read_together
from stages.search.passage_encoder import PassageEncoder
from stages.search.passage_index import PassageIndex, doc_scores
from stages.search.reranking import Reranker
from stages.settings.retrieval import Lengths


class RagOutput(NamedTuple):
    nll: Tensor  # [B] nats a question
    log_prior: Tensor  # [B, K] log p(z | x), without gradient
    rows: Tensor  # [B, K] passages retrieved, -1: missing
    context_tokens: Tensor  # real tokens read by the generator's encoder
    scored_under: float  # passes that an answer token takes part in; one without gradient is a third of one
    retriever_loss: Tensor | None = None  # [B] nats a question, where it is a loss beside `nll`
    gold_nll: Tensor | None = None  # [B] -log p(gold passages | x), where the batch names them (gold.py)


class Rag(nn.Module):
    """The trained models and, beside them, the passages that they retrieve and read.

    A question encoder and a generator; with a `passage_encoder` its context encoder, with a `reranker` its cross-encoder.
    """

    def __init__(self, encoder: Encoder, generator: Generator, index: PassageIndex, passages: TokenStore, n_docs: int,
                 lengths: Lengths, prior: PriorWeights | None = None, passage_encoder: PassageEncoder | None = None,
                 reranker: Reranker | None = None, rerank_depth: int = 0):  # fmt: skip
        super().__init__()
        self.question_encoder = encoder.model
        self.generator_model = generator.model
        self.context_encoder = passage_encoder and passage_encoder.encoder.model
        self.cross_encoder = reranker and reranker.encoder.model
        self.prior = prior or PriorWeights()
        self.encoder, self.generator = encoder, generator
        self.index, self.passages = index, passages
        self.n_docs, self.lengths = n_docs, lengths
        self.passage_encoder = passage_encoder
        self.reranker, self.rerank_depth = reranker, rerank_depth
        self.packed = packed_likelihood(generator)
        self.working: WorkingCopy | None = None

    def work_in(self, dtype: torch.dtype) -> None:
        """From now on the generator's likelihood is computed with a copy of its weights in `dtype`, where it has a packed one
        and all of its weights are trained. To be called before all else that changes how it is computed."""
        if self.packed and WorkingCopy.fits(self.generator_model):
            self.working = WorkingCopy(self.generator_model, dtype)
            self.packed.model = self.working.model

    def weights_changed(self) -> None:
        """To be called when the trained weights have got new values."""
        if self.working:
            self.working.update()

    def train(self, mode: bool = True) -> "Rag":
        """As every module's, for the generator's working copy, too."""
        if self.working:
            self.working.model.train(mode)
        return super().train(mode)

    def compute_activations_again(self) -> None:
        """From now on the backward pass through the generator computes its activations again."""
        # The generator's alone: a question is short, its encoder keeps little.
        for model in {self.generator_model, self.packed.model if self.packed else self.generator_model}:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def record_graphs(self, reading: str = "each") -> None:
        """From now on training replays the generator's passes as CUDA graphs, where it has a packed likelihood.

        Not of passages read in parallel: a graph records one number of tokens, and would have to fill up blocks, what they see
        beside themselves and tails, each to a number of its own. Nor of those read weighted: a graph's backward pass gives
        gradients to weights alone.
        """
        if self.packed and reading not in APART:
            limits = self.lengths.context_tokens, self.lengths.answer_tokens
            self.packed.graphs = CudaGraphs(
                self.packed.log_probs,
                self.packed.model,
                self.generator.positions_needed(*limits, self.n_docs if reading == "together" else 1),
                limits[1],
                self.working and self.working.own,
            )

    def examples(
        self, questions: list[str], answers: list[str] | list[list[str]], hits: Hits | None = None,
        golds: list[list[int]] | None = None,
    ) -> Examples:  # fmt: skip
        """Tokenizes questions (cut to `lengths.question_tokens`) and their answers; `hits` are theirs by BM25.

        An answer each, or a list of different ones each, of which a batch takes the first unless it says another. With
        `golds`, rows of each question's gold passages, the retriever learns from these too.
        """
        first_answers = None
        if answers and isinstance(answers[0], list):
            first_answers = torch.tensor([0, *map(len, answers)]).cumsum(0)
            answers = [answer for some in answers for answer in some]
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
            self.reranker and TokenStore.from_rows(self.reranker.encoder.question_rows(questions, limit)),
            first_answers,
            golds and TokenStore.from_rows(golds),
        )

    def batch(self, examples: Examples, rows: list[int], shares: Tensor | None = None) -> RagBatch:
        """The named examples, padded to their own longest, on the model's device; `shares` as in Examples.answers_of.

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
        answers = examples.answers_of(chosen, shares)
        mask = examples.target_mask[answers]
        width = int(mask.any(0).sum())
        hits = examples.hits and examples.hits.select(chosen)
        of_reranker = examples.for_reranker and Asked(*examples.for_reranker.padded(chosen, limit=1 << 30, pad=0))
        targets = examples.targets[answers, :width]
        golds = examples.golds and pad(examples.golds.padded(chosen, limit=1 << 30, pad=-1)[0], (0, 1), value=-1)
        batch = RagBatch(
            question_ids, question_mask, asked, lengths, targets, mask[:, :width], hits, of_reranker, golds
        )
        device = next(self.parameters()).device
        if device.type == "cuda" and chosen.device.type == "cpu":
            # Only from page-locked memory does a copy join the GPU's queue without emptying it first.
            return RagBatch(
                *(part if part is None else part.pin_memory().to(device, non_blocking=True) for part in batch)
            )
        return RagBatch(*(part if part is None else part.to(device) for part in batch))

    def retrieve(
        self, question_vectors: Tensor, hits: Hits | None = None, asked: Asked | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best passages of each question and their scores, whose softmax is the prior (prior.py): [B, K] and [B, K].

        They are found as ranked.py says. The gradient reaches the question vectors, the cross-encoder and what learns of the
        prior. A context encoder that trains has a part in the scores, not in the search: its passages' vectors are computed
        here and pass the gradient on.
        """
        rows, lexical, crossed = ranked(self, question_vectors.detach(), hits, asked)
        if self.reranker and torch.is_grad_enabled():
            crossed = self.reranker.scores(asked, rows)
        passages = self.passage_encoder.vectors(rows) if self.passage_encoder else self.passage_vectors(rows)
        return rows, combined(self.prior(), doc_scores(question_vectors, passages, rows), lexical, crossed)

    def passage_vectors(self, rows: Tensor) -> Tensor:
        """The stored vectors of passages `rows`, on their device."""
        return self.index.gather(rows.to(self.index.vectors.device)).to(rows.device)

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
        self, batch: RagBatch, *, marginal: str, retriever_gradient: str = "exact", label_smoothing: float = 0.0,
        reading: str = "each", found: Found | None = None,
    ) -> RagOutput:  # fmt: skip
        """Each question's negative log-likelihood under its retrieved passages.

        Reading each, `marginal` is sequence, token or average (see marginalization.py). Reading together or in parallel there is
        none, and `retriever_gradient` names a loss for the retriever (retriever_losses.py), computed where gradients are; read
        weighted, the prior is in the likelihood.
        `retriever_gradient` "none" cuts the gradient to all that ranks passages. What was `found` before (ahead.py,
        found_once.py) is not looked for again; contexts may have been packed before when reading each.
        """
        rows, scores, golds = found[:3] if found else self.find(batch, retriever_gradient)
        prior = marginalization.log_prior(scores)
        if reading != "each":
            output = self._forward_together(batch, rows, prior, retriever_gradient, label_smoothing, reading)
            return output._replace(gold_nll=golds)
        if found and found.packed:
            token_lp = self.packed_log_probs(found.packed, label_smoothing).unflatten(0, rows.shape)
            read = found.context_tokens
        else:
            input_ids, attention_mask = self.contexts(batch, rows)
            token_lp = self.token_log_probs(batch, input_ids, attention_mask, label_smoothing)
            read = attention_mask.sum()
        nll = marginalization.NLL[marginal](prior, token_lp, batch.target_mask)
        return RagOutput(nll, prior.detach(), rows, read, rows.shape[1], gold_nll=golds)

    def find(self, batch: RagBatch, retriever_gradient: str = "exact") -> tuple[Tensor, Tensor, Tensor | None]:
        """Each question's passages and their scores, [B, K] and [B, K], and, where the batch has `golds`, gold_nll [B].

        `retriever_gradient` "none": without gradient, and without dropout, which is for what learns.
        """
        learns = torch.is_grad_enabled() and retriever_gradient != "none"
        with torch.set_grad_enabled(learns), nullcontext() if learns else in_eval_mode(self.question_encoder):
            vectors = self.encode_questions(batch)
            if batch.golds is not None:
                return retrieve_with_golds(self, vectors, batch)
            return *self.retrieve(vectors, batch.hits, batch.asked), None

    def _forward_together(
        self, batch: RagBatch, rows: Tensor, prior: Tensor, retriever_gradient: str, label_smoothing: float,
        reading: str,
    ) -> RagOutput:  # fmt: skip
        trains = retriever_gradient in retriever_losses.LOSS and torch.is_grad_enabled()
        found = read_together(self, batch, rows, reading, prior, label_smoothing, alone=trains)
        nll = -found.joint.masked_fill(~batch.target_mask, 0.0).sum(-1)
        if not trains:
            return RagOutput(nll, prior.detach(), rows, found.context_tokens, 1)
        loss = retriever_losses.LOSS[retriever_gradient](prior, found.alone, batch.target_mask)
        return RagOutput(nll, prior.detach(), rows, found.context_tokens, 1 + rows.shape[1] / 3, loss)

    def token_log_probs(
        self, batch: RagBatch, input_ids: Tensor, attention_mask: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """log p(y_t | y_<t, x, z) [B, K, T] of the batch's targets under contexts [B * K, L]."""
        questions = len(batch.targets)
        n_docs = len(input_ids) // questions
        if self.packed:
            packed = self.pack(batch, input_ids, attention_mask)
            return self.packed_log_probs(packed, label_smoothing).unflatten(0, (questions, n_docs))
        contexts = self.generator.encode(input_ids, attention_mask)
        targets = batch.targets.repeat_interleave(n_docs, 0)
        scored = padded_log_probs(self.generator, contexts, targets, label_smoothing)
        return scored.unflatten(0, (questions, n_docs))

    def pack(self, batch: RagBatch, input_ids: Tensor, attention_mask: Tensor) -> PackedAnswers:
        """The batch's targets under contexts [B * K, L] without padding, for a packed likelihood."""
        n_docs = len(input_ids) // len(batch.targets)
        repeated = [part.repeat_interleave(n_docs, 0) for part in (batch.targets, batch.target_mask)]
        return self.packed.pack(input_ids, attention_mask, *repeated)

    def packed_log_probs(self, packed: PackedAnswers, label_smoothing: float) -> Tensor:
        """What the packed likelihood says of them, by the working copy where there is one."""
        with self.working.computing() if self.working else nullcontext():
            return self.packed.score(packed, label_smoothing)


def packed_likelihood(generator: Generator) -> PackedBart | PackedCausal | None:
    """The generator's likelihood without padding, for the families that have one."""
    if PackedBart.fits(generator.model.config):
        return PackedBart(generator.model, *generator.decoder_prefix)
    return PackedCausal(generator) if PackedCausal.fits(generator.model.config) else None
