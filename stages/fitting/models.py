"""The models that params.yaml names, read without their weights and held against each other, the lengths and the machine.

What stages would refuse hours later is refused here by the very code that they run. Weights are looked for, not read: a
model of its configuration alone, on torch's meta device, takes no memory.
"""

import torch
from transformers import DPRContextEncoder, DPRQuestionEncoder

from stages.compute.precision import generator_dtype, mixed_precision
from stages.encoders.cross_encoder import load_cross_encoder
from stages.encoders.loading import check_pair, load_encoder
from stages.generation.generator import load_generator
from stages.generation.lora import add_lora, check_base
from stages.params import Params
from stages.rag.opening import check_lengths, check_reading
from stages.search.adopted_index import check_header
from stages.search.index_kinds import empty_index, set_search_parameters
from stages.search.own_vectors import open_own
from stages.settings.retrieval import Models
from stages.storage.model_folders import check_weights, part_of
from stages.storage.outside_files import find
from stages.training import index_refresh, recipes

ENCODERS = {"question_encoder": DPRQuestionEncoder, "context_encoder": DPRContextEncoder}
ANY_NUMBER = 1 << 62


def check(params: Params) -> None:
    """Raises ValueError, one line, for what a later stage would refuse; prints what it would do in another way than named."""
    models, lengths = params.models, params.lengths
    check_machine(params)
    for part in ("question_encoder", "context_encoder", "generator", "reranker"):
        if name := getattr(models, part):
            check_weights(part_of(name, part), f"models.{part}")

    encoders = {part: _encoder(models, part) for part in ENCODERS}
    check_pair(*encoders.values())
    for part, what in (("question_encoder", "question"), ("context_encoder", "passage")):
        asked, most = getattr(lengths, f"{what}_tokens"), encoders[part].most_tokens
        if asked > most:
            print(f"models.{part} reads {most} tokens: {what}s are cut there, not at lengths.{what}_tokens ({asked})")
    check_index(params, encoders["context_encoder"].dimension)
    if models.reranker:
        reranker = load_cross_encoder(str(find(part_of(models.reranker, "reranker"))), weights=False)
        reranker.passage_room(lengths.question_tokens, lengths.passage_tokens)
    base = str(find(part_of(models.generator, "generator")))
    generator = load_generator(base, models.chat_template, weights=False)
    check_reading(generator, params.recipe.reading)
    check_lengths(generator, lengths, params.retriever.n_docs if params.recipe.reading == "together" else 1)
    if models.lora:
        add_lora(generator.model, models.lora)


def check_machine(params: Params) -> None:
    """What this machine cannot do. Where runtime.device says cuda, one that can is taken to do the work."""
    no_gpu = params.runtime.device == "cpu" or (params.runtime.device == "auto" and not torch.cuda.is_available())
    device = torch.device("cpu" if no_gpu else "cuda")
    if no_gpu:
        mixed_precision(params.recipe.precision, device)
        generator_dtype(params.evaluate.precision, device)
    if params.models.lora:
        check_base(params.models.lora.base, device.type)
    if params.runtime.processes > 1:
        recipes.check_ranks(params.recipe, params.runtime.processes)
        index_refresh.check_ranks(params.train.index_refresh_steps, params.runtime.processes)


def check_index(params: Params, dimension: int) -> None:
    """Whether the index can be built, or the file to import belongs to vectors of the context encoder's dimension."""
    settings = params.index
    if settings.import_path:
        path = find(settings.import_path)
        check_header(path, dimension) if settings.imports_index else open_own(path, dimension)
    if not settings.imports_index:
        set_search_parameters(empty_index(dimension, settings.factory, ANY_NUMBER), settings.nprobe, settings.ef_search)


def _encoder(models: Models, part: str):
    return load_encoder(
        str(find(part_of(getattr(models, part), part))), f"models.{part}", ENCODERS[part], models.pooling,
        models.normalize, (models.question_prefix, models.passage_prefix), weights=False,
    )  # fmt: skip
