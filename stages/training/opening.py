"""What a training starts from: its questions, the model over the pipeline's files, the trainer."""

from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from transformers import DPRContextEncoder

from stages.bm25.hits import read_hits
from stages.compute import ranks
from stages.compute.precision import mixed_precision
from stages.corpus.arrow import own_rows, read_rows
from stages.encoders.loading import load_encoder
from stages.encoders.mining import tokenize_passages
from stages.generation.lora import QUANTIZED, add_lora, loading
from stages.params import Params
from stages.rag import folder
from stages.rag.batches import Examples
from stages.rag.model import Rag
from stages.rag.opening import open_rag_on
from stages.rag.prior import starting_prior
from stages.rag.together import APART
from stages.search.passage_encoder import PassageEncoder
from stages.search.reranking import load_reranker
from stages.storage.checkpoints import digest
from stages.storage.model_folders import part_files, part_of
from stages.storage.outside_files import find
from stages.training import fsdp
from stages.training.index_refresh import check_ranks
from stages.training.skipped_steps import Skips
from stages.training.targets import POSITIVES, aimed
from stages.training.trainer import Trainer
from stages.training.workplace import Workplace

PREPARED, TOKENS, LEXICAL = Path("data/prepared"), Path("data/tokens"), Path("data/lexical")
RETRIEVER, VECTORS, INDEX = Path("data/retriever"), Path("data/vectors"), Path("data/index")
RERANKER = Path("data/reranker")
SPLITS = ("train", "validation")


def open_rows() -> dict[str, Dataset]:
    """Passages and the questions of both splits."""
    return {name: read_rows(PREPARED / f"{name}.arrow") for name in ("passages", *SPLITS)}


def data_sets() -> Iterator[tuple[str, str, str, str, dict]]:
    """What was trained and validated on: name, digest, file of that digest, context and facts of each."""
    for name, rows in open_rows().items():
        file = PREPARED / f"{name}.arrow"
        content = digest(file)
        yield name, content, f"{file}#{content}", name, {"rows": len(rows)}


def inputs_of(params: Params) -> list[Path]:
    """The files that decide what comes out, for the fingerprint."""
    encoders = ["question_encoder", *(["context_encoder"] if params.train.index_refresh_steps else [])]
    generator = map(find, part_files(params.models.generator, "generator"))
    ranking = params.models.reranker or params.retriever.learn_weights
    return [
        PREPARED, TOKENS, *(RETRIEVER / encoder for encoder in encoders), VECTORS, INDEX,
        *([POSITIVES] if params.data.answers_are == "regex" or params.train.positives_weight else []),
        *([LEXICAL] if params.retriever.hybrid_depth else []), *([RERANKER] if ranking else []),
        *(file for file in generator if file.exists()),
    ]  # fmt: skip


def build_rag(
    params: Params, device: torch.device, passages: Dataset, sharded: fsdp.Sharding | None
) -> tuple[Rag, str]:
    """The model on its device, ready to train, and accelerate's name of its precision.

    Raises ValueError where parameters, files and number of ranks do not go together.
    """
    check_ranks(params.train.index_refresh_steps, ranks.world())
    lora = params.models.lora
    if sharded:
        fsdp.check_retriever(params.models.reranker, params.retriever.learn_weights)
        fsdp.check_base(lora and lora.base)
    base = str(find(part_of(params.models.generator, "generator")))
    encoder, generator = folder.load_base_parts(
        str(RETRIEVER / "question_encoder"), base, params.models.chat_template,
        lora and loading(lora.base, device),
    )  # fmt: skip
    torch.manual_seed(params.train.seed)
    if lora:
        add_lora(generator.model, lora)
    passage_encoder = None
    if params.train.index_refresh_steps:
        of_passages = load_encoder(str(RETRIEVER / "context_encoder"), "models.context_encoder", DPRContextEncoder)
        tokens = tokenize_passages(of_passages, passages, params.lengths.passage_tokens)
        passage_encoder = PassageEncoder(of_passages, tokens)
    precision = mixed_precision(params.recipe.precision, device)
    rag = open_rag_on(
        (encoder, generator), (INDEX, VECTORS), TOKENS, params, device,
        starting_prior(params.retriever, RERANKER), passage_encoder,
        load_reranker(RERANKER, params.models.reranker), models_move=sharded is None,
    )  # fmt: skip
    if sharded:
        fsdp.shard(rag, sharded, device, precision)
        if ranks.is_main():
            print("FSDP: padded forward passes, without CUDA graphs and without train.compile")
    few_bits = lora and lora.base in QUANTIZED
    if few_bits and ranks.is_main():
        print(f"models.lora.base: {lora.base}: without CUDA graphs and without train.compile")
    if params.train.bf16_copy and precision == "bf16":
        rag.work_in(torch.bfloat16)
    if params.train.compile and rag.packed and not few_bits:
        rag.packed.compile()
    # Gradient checkpointing reads the random state on its way back, which a graph cannot.
    record = params.runtime.cuda_graphs and device.type == "cuda" and not params.train.gradient_checkpointing
    if record and not few_bits:
        if params.recipe.reading in APART and ranks.is_main():
            print(f"recipes: reading: {params.recipe.reading}: without CUDA graphs")
        rag.record_graphs(params.recipe.reading)
    return rag, precision


def open_examples(
    params: Params, rag: Rag, rows: dict[str, Dataset]
) -> tuple[dict[str, Examples], dict[str, list[str]]]:
    """Both splits' questions with their answers (validation's: the first) and, where retrieval is hybrid, their hits; the
    training questions with their gold passages, where these teach the retriever.

    Beside them the questions' ids.
    """
    names = {}
    examples = {}
    for split in SPLITS:
        questions = rows[split]
        hits = read_hits(LEXICAL, split, params.retriever.hybrid_depth, len(questions), len(rows["passages"]))
        some, kept = aimed(params.data, split, rows)
        hits = hits and hits.select(torch.tensor(kept))
        names[split] = some["id"][:]
        if split == "train" and params.train.answers == "drawn":
            answers = [list(dict.fromkeys(answers)) for answers in some["answers"][:]]
        else:
            answers = [answers[0] for answers in some["answers"][:]]
        golds = known_golds(rows, kept) if split == "train" and params.train.positives_weight else None
        examples[split] = rag.examples(some["question"][:], answers, hits, golds)
    return examples, names


def known_golds(rows: dict[str, Dataset], kept: list[int]) -> list[list[int]]:
    """Rows of the gold passages of the training questions `kept`, as the warm-up takes them; [] where none is known.

    Raises ValueError where none is known of any.
    """
    own = own_rows(rows["train"], read_rows(POSITIVES / "train.arrow"), rows["passages"])
    golds = [own[row] for row in kept]
    if not any(golds):
        raise ValueError(
            f"{PREPARED / 'train.arrow'}: no question has a positive passage, train.positives_weight needs some; name them in "
            "data.fields.positive_ids, raise data.positives.depth to find them by answer, or set it to 0"
        )
    return golds


def make_trainer(params: Params, rag: Rag, precision: str, workplace: Workplace, names: list[str]) -> Trainer:
    """The trainer of this recipe; `names` are the training questions' ids, for what it has to say of them."""
    skips = Skips(params.train.max_skipped_steps, names, workplace.skipped)
    return Trainer(
        rag, params.recipe, params.train, precision, params.train.seed, workplace.checkpoints, skips,
        keep_threads=bool(params.runtime.threads),
    )  # fmt: skip
