"""A RAG model's folder: what training starts from, what it writes, what evaluation reads.

What transformers makes of such a folder: `generate` for one context gives our answers, by `model.generate(ids)` of what
lies in generator/ and, in the RAG layout, by `model.rag.generator.generate(ids, attention_mask=mask,
generation_config=GenerationConfig.from_pretrained(folder))`; so does `RagTokenForGeneration.generate`. Greedy search
(`num_beams=1`) always does, beams wherever no hypothesis fills the answer's length: there transformers' forced EOS costs
nothing, ours its probability. Evaluation then takes candidates that read the same for one answer, which transformers does
not. `RagSequenceForGeneration.generate` need not agree at all: it reads padding as text while it looks for candidates, and
scores them with the prior on a token.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    DPRQuestionEncoder,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    RagConfig,
)

from stages.compute.precision import cast_weights
from stages.encoders.encoder import Encoder
from stages.encoders.loading import load_encoder, one_line
from stages.generation.generator import Generator, generator_from, load_generator, load_saved_generator
from stages.generation.lora import merge_lora
from stages.rag.model import Rag
from stages.storage import manifest

BEAMS = 4  # of transformers' `generate` where it is not told: evaluate.num_beams as shipped


def save_rag(rag: Rag, folder: Path, marginal: str, reading: str = "each") -> None:
    """Writes the checkpoint, all of it safetensors and each part loadable by `from_pretrained`.

    A DPR question encoder with a sequence-to-sequence generator that reads each passage: transformers' RAG layout (config,
    weights and both tokenizers in one folder); its RAG classes would read those of one that reads them together in another
    way than it was trained. Anything else: question_encoder/ (see Encoder.save) and generator/. LoRA adapters become
    part of the generator's weights, in `rag` too. Where the context encoder was trained: context_encoder/, and index/
    with all passages' vectors by it. With a reranker: reranker/. Where the prior's weights learned: prior.json.
    """
    merge_lora(rag.generator_model)
    as_rag = fits_transformers(rag) and reading == "each"
    _describe_answers(rag.generator, rag.lengths.answer_tokens, as_rag)
    if as_rag:
        _save_transformers_rag(rag, folder, marginal)
    else:
        rag.encoder.save(folder / "question_encoder")
        rag.generator_model.save_pretrained(folder / "generator")
        rag.generator.tokenizer.save_pretrained(folder / "generator")
    if rag.passage_encoder:
        rag.passage_encoder.save(folder)
    if rag.reranker:
        rag.reranker.encoder.save(folder / "reranker")
    rag.prior.save(folder)
    manifest.record_folder(folder)


def fits_transformers(rag: Rag) -> bool:
    """Whether transformers' RAG classes can hold the two models."""
    return rag.encoder.is_plain_dpr and rag.generator_model.config.is_encoder_decoder


def _describe_answers(generator: Generator, answer_tokens: int, as_rag: bool) -> None:
    """Makes the model's configurations say how it was trained to answer, whatever its base model's said.

    A base model may ask for forced first tokens, penalties and sampling, and BART's starts from another token.
    """
    model, eos = generator.model, generator.eos_token_id
    settings = {"max_new_tokens": answer_tokens}
    if model.config.is_encoder_decoder:
        start = generator.decoder_prefix[-1]
        # Not max_new_tokens: RagTokenForGeneration.generate does not know it.
        settings = {"max_length": answer_tokens + len(generator.decoder_prefix), "decoder_start_token_id": start}
        model.config.decoder_start_token_id, model.config.forced_bos_token_id = start, None
        # In the RAG layout the generator's own generation configuration is made from these; alone, T5's may not hold them.
        if as_rag or hasattr(model.config, "forced_eos_token_id"):
            model.config.forced_eos_token_id = eos
    model.generation_config = GenerationConfig(
        num_beams=BEAMS, length_penalty=0.0, eos_token_id=eos, pad_token_id=generator.pad_token_id,
        bos_token_id=generator.tokenizer.bos_token_id, forced_eos_token_id=eos, **settings,
    )  # fmt: skip


def _save_transformers_rag(rag: Rag, folder: Path, marginal: str) -> None:
    # Here and not above: they import `datasets`, a second that a question to another model need not wait for.
    from transformers import RagSequenceForGeneration, RagTokenForGeneration, RagTokenizer

    generator = rag.generator
    config = RagConfig.from_question_encoder_generator_configs(
        rag.question_encoder.config, generator.model.config, n_docs=rag.n_docs, title_sep=" / ", doc_sep=" // ",
        max_combined_length=rag.lengths.context_tokens, retrieval_vector_size=rag.encoder.dimension,
        index_name="custom", do_deduplication=True,
        bos_token_id=generator.model.config.bos_token_id if hasattr(generator.model.config, "bos_token_id") else None,
        eos_token_id=generator.eos_token_id, pad_token_id=generator.pad_token_id,
        decoder_start_token_id=generator.decoder_prefix[-1],
    )  # fmt: skip
    kind = RagTokenForGeneration if marginal == "token" else RagSequenceForGeneration
    model = kind(config=config, question_encoder=rag.question_encoder, generator=generator.model)
    model.save_pretrained(folder)
    generator.model.generation_config.save_pretrained(folder)  # RagSequenceForGeneration keeps none itself
    RagTokenizer(rag.encoder.tokenizer, generator.tokenizer).save_pretrained(folder)


def load_rag_parts(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Encoder, Generator]:
    """The question encoder that `save_rag` wrote, in fp32, and the generator, whose weights get this type.

    Raises ValueError where it is incomplete."""
    in_parts = (folder / "generator" / "config.json").is_file()
    if not in_parts and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no trained model; run `dvc repro` (or python -m stages.train) first")
    manifest.check(folder, None, "run `dvc repro --force train`")
    if in_parts:
        encoder = load_encoder(str(folder / "question_encoder"), "models.question_encoder", DPRQuestionEncoder)
        return encoder, load_saved_generator(folder / "generator", dtype)
    try:
        config = RagConfig.from_pretrained(folder)
        generator_class = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config.generator)]
        weights = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        encoder = _part(DPRQuestionEncoder, config.question_encoder, weights, "rag.question_encoder.")
        generator = _part(generator_class, config.generator, weights, "rag.generator.")
        encoder_tokenizer = AutoTokenizer.from_pretrained(
            folder / "question_encoder_tokenizer", trust_remote_code=False
        )
        generator_tokenizer = AutoTokenizer.from_pretrained(folder / "generator_tokenizer", trust_remote_code=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: damaged or not a RAG checkpoint ({one_line(error)}); run `dvc repro --force train`"
        ) from None
    cast_weights(generator, dtype)
    return Encoder(encoder, encoder_tokenizer), generator_from(generator, generator_tokenizer)


def _part(model_class: type, config: PretrainedConfig, weights: dict[str, Tensor], prefix: str) -> PreTrainedModel:
    """One of the two models of transformers' RAG layout, in fp32 and eval mode, as RagSequenceForGeneration holds it.

    By itself, because the class of both imports `datasets`, a second that a question need not wait for.
    """
    mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not mine:
        raise ValueError(f"no weights {prefix}*")
    return model_class.from_pretrained(None, config=config, state_dict=mine, dtype=torch.float32).eval()


def load_base_parts(
    question_encoder: str, generator: str, chat_template: bool = False, loading: dict | None = None
) -> tuple[Encoder, Generator]:
    """The models that training starts from; `loading` as `load_generator` takes it."""
    encoder = load_encoder(question_encoder, "models.question_encoder", DPRQuestionEncoder)
    return encoder, load_generator(generator, chat_template, loading)
