"""A RAG model's folder: what training starts from, what it writes, what evaluation reads."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    DPRQuestionEncoder,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    RagTokenizer,
)

from stages.encoders.encoder import Encoder, load_encoder
from stages.generation.generator import Generator, generator_from, load_generator, load_saved_generator
from stages.generation.lora import merge_lora
from stages.rag.model import Rag
from stages.storage import manifest

CLASSES = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration, "average": RagSequenceForGeneration}


def save_rag(rag: Rag, folder: Path, marginal: str) -> None:
    """Writes the checkpoint, all of it safetensors and each part loadable by `from_pretrained`.

    A DPR question encoder with a sequence-to-sequence generator: transformers' RAG layout (config, weights and both
    tokenizers in one folder). Anything else: question_encoder/ (see Encoder.save) and generator/. LoRA adapters become
    part of the generator's weights, in `rag` too. Where the context encoder was trained: context_encoder/, and index/
    with all passages' vectors by it.
    """
    merge_lora(rag.generator_model)
    if fits_transformers(rag):
        _save_transformers_rag(rag, folder, marginal)
    else:
        rag.encoder.save(folder / "question_encoder")
        rag.generator_model.save_pretrained(folder / "generator")
        rag.generator.tokenizer.save_pretrained(folder / "generator")
    if rag.passage_encoder:
        rag.passage_encoder.save(folder)
    manifest.record_folder(folder)


def fits_transformers(rag: Rag) -> bool:
    """Whether transformers' RAG classes can hold the two models."""
    return rag.encoder.is_plain_dpr and rag.generator_model.config.is_encoder_decoder


def _save_transformers_rag(rag: Rag, folder: Path, marginal: str) -> None:
    generator = rag.generator
    config = RagConfig.from_question_encoder_generator_configs(
        rag.question_encoder.config, generator.model.config, n_docs=rag.n_docs, title_sep=" / ", doc_sep=" // ",
        max_combined_length=rag.lengths.context_tokens, retrieval_vector_size=rag.encoder.dimension,
        index_name="custom", do_deduplication=True,
        bos_token_id=generator.model.config.bos_token_id if hasattr(generator.model.config, "bos_token_id") else None,
        eos_token_id=generator.eos_token_id, pad_token_id=generator.pad_token_id,
        decoder_start_token_id=generator.decoder_prefix[-1],
    )  # fmt: skip
    model = CLASSES[marginal](config=config, question_encoder=rag.question_encoder, generator=generator.model)
    model.save_pretrained(folder)
    RagTokenizer(rag.encoder.tokenizer, generator.tokenizer).save_pretrained(folder)


def load_rag_parts(folder: Path) -> tuple[Encoder, Generator]:
    """The question encoder and generator that `save_rag` wrote, in fp32; raises ValueError where it is incomplete."""
    in_parts = (folder / "generator" / "config.json").is_file()
    if not in_parts and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no trained model; run `dvc repro` (or python -m stages.train) first")
    manifest.check(folder, None, "run `dvc repro --force train`")
    if in_parts:
        encoder = load_encoder(str(folder / "question_encoder"), "models.question_encoder", DPRQuestionEncoder)
        return encoder, load_saved_generator(folder / "generator")
    try:
        model = RagSequenceForGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        encoder_tokenizer = AutoTokenizer.from_pretrained(
            folder / "question_encoder_tokenizer", trust_remote_code=False
        )
        generator_tokenizer = AutoTokenizer.from_pretrained(folder / "generator_tokenizer", trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: damaged or not a RAG checkpoint ({reason}); run `dvc repro --force train`"
        ) from None
    encoder = Encoder(model.rag.question_encoder.eval(), encoder_tokenizer)
    return encoder, generator_from(model.rag.generator.eval(), generator_tokenizer)


def load_base_parts(question_encoder: str, generator: str, chat_template: bool = False) -> tuple[Encoder, Generator]:
    """The models that training starts from."""
    encoder = load_encoder(question_encoder, "models.question_encoder", DPRQuestionEncoder)
    return encoder, load_generator(generator, chat_template=chat_template)
