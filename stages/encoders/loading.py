"""Loading encoders: embedded models, hub names and local folders, those of sentence-transformers too, through the same
`from_pretrained`; what goes wrong is told in one line that names the parameter.
"""

import inspect

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DPRContextEncoder,
    DPRQuestionEncoder,
    PretrainedConfig,
)

from stages.corpus.text_tokens import special_ids
from stages.encoders.encoder import ROOTS, Encoder
from stages.encoders.sentence_layout import SentenceLayout, read_layout
from stages.storage.model_folders import OTHERWISE, RAG_TOKENIZERS, typed_parts
from stages.storage.outside_files import hint, split_revision

ARCHITECTURES = {"DPRQuestionEncoder": DPRQuestionEncoder, "DPRContextEncoder": DPRContextEncoder}
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "electra", "modernbert")


def found_model(path_or_name: str, key: str) -> tuple[SentenceLayout, str, dict[str, str], PretrainedConfig]:
    """How a folder or repository is laid out, its name without a revision, what says where in it the model lies, and that
    model's configuration. Raises ValueError, which names the parameter `key`, where there is none."""
    nothing = f"{key}: no model at '{path_or_name}'"
    try:
        layout = read_layout(path_or_name, key)
    except OSError as error:
        raise ValueError(f"{nothing} ({one_line(error)}); give a folder or a hub name{hint(path_or_name)}") from None
    source, within = split_revision(path_or_name)
    within |= {"subfolder": layout.subfolder} if layout.subfolder else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **within)
    except (OSError, ValueError) as error:
        raise ValueError(f"{nothing} ({one_line(error)}); give a folder or a hub name{hint(path_or_name)}") from None
    return layout, source, within, config


def load_encoder(
    path_or_name: str,
    key: str,
    as_class: type = DPRQuestionEncoder,
    pooling: str = "auto",
    normalize: str | bool = "auto",
    prefixes: tuple[str, str] | None = None,
    weights: bool = True,
) -> Encoder:
    """Loads an encoder in fp32; one saved as either DPR class is returned as `as_class`.

    `key` is the parameter that named it (`models.question_encoder`), for messages. "auto" and no `prefixes` (of questions,
    of passages) take what the folder says: its sentence-transformers files, DPR's own pooler, else the first state,
    unscaled. Without `weights` its model is made of the configuration alone, on the meta device. Raises ValueError.
    """
    layout, source, within, config = found_model(path_or_name, key)
    from_rag = config.model_type == "rag" and key == "models.question_encoder"
    architecture = "DPRQuestionEncoder" if from_rag else (config.architectures or ["?"])[0]
    if from_rag and config.question_encoder.model_type != "dpr":
        raise ValueError(
            f"{key}: the RAG checkpoint '{path_or_name}' has a question encoder of type "
            f"{config.question_encoder.model_type}; DPR is supported there"
        )
    is_dpr = architecture in ARCHITECTURES
    if config.model_type == "rag" and not from_rag:
        part = key.removeprefix("models.")
        what = OTHERWISE.get(part, "name another").format(name=path_or_name)
        raise ValueError(f"{key}: '{path_or_name}' is a RAG checkpoint, which holds no {part}; {what}")
    if not is_dpr and config.model_type not in BERT_LIKE:
        known = " or ".join(ARCHITECTURES)
        raise ValueError(
            f"{key}: '{path_or_name}' is a {architecture} (model type {config.model_type}); give a {known} or one of "
            f"{', '.join(BERT_LIKE)}"
        )
    if is_dpr and pooling == "mean":
        raise ValueError(f"models.pooling: mean, but '{path_or_name}' is a DPR encoder, which pools by its first state")
    try:
        of_tokenizer = within
        if from_rag:
            of_tokenizer = within | {"subfolder": RAG_TOKENIZERS["question_encoder"], "config": config.question_encoder}
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **of_tokenizer)
        options = {"dtype": torch.float32, **within}
        # BERT's own pooler is a layer of another task: no weights that never learn.
        if not is_dpr and "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)]).parameters:
            options["add_pooling_layer"] = False
        if not weights:
            with torch.device("meta"):
                plain = {name: options[name] for name in ("add_pooling_layer",) if name in options}
                of_dpr = config.question_encoder if from_rag else config
                model = as_class(of_dpr) if is_dpr else AutoModel.from_config(config, **plain)
        elif from_rag:
            # Here and not above: it imports `datasets`, a second that others need not wait for.
            from transformers import RagSequenceForGeneration

            config = typed_parts(config, torch.float32)
            whole = RagSequenceForGeneration.from_pretrained(source, config=config, use_safetensors=True, **options)
            model = as_role(whole.rag.question_encoder, as_class)
        elif is_dpr:
            model = ARCHITECTURES[architecture].from_pretrained(source, use_safetensors=True, **options)
            model = as_role(model, as_class)
        else:
            model = AutoModel.from_pretrained(
                source, trust_remote_code=False, use_safetensors=True, config=config, **options
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{key}: '{path_or_name}' is incomplete: {one_line(error)}") from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{key}: the tokenizer in '{path_or_name}' has no padding token")
    if pooling == "auto":
        if not (is_dpr or layout.pooling):
            print(
                f"{key}: '{path_or_name}' does not say how it pools; its first state is taken (models.pooling: cls or mean)"
            )
        pooling = layout.pooling or "cls"
    question_prefix, passage_prefix = prefixes or (layout.query_prefix, layout.passage_prefix)
    for prefix in (question_prefix, passage_prefix):
        if special_ids(tokenizer) & set(tokenizer(prefix, add_special_tokens=False)["input_ids"]):
            raise ValueError(
                f"{key}: the prefix '{prefix}' names a special token of the tokenizer in '{path_or_name}', but prefixes "
                "are read as text; give models.question_prefix and models.passage_prefix without it"
            )
    return Encoder(
        model.eval(), tokenizer, "dpr" if is_dpr else pooling, layout.normalize if normalize == "auto" else normalize,
        question_prefix, passage_prefix, layout.max_tokens,
    )  # fmt: skip


def check_pair(question_encoder: Encoder, context_encoder: Encoder) -> None:
    """Raises ValueError where the vectors of the two have no inner product."""
    if question_encoder.dimension != context_encoder.dimension:
        raise ValueError(
            f"models.context_encoder: its vectors have {context_encoder.dimension} dimensions, those of "
            f"models.question_encoder {question_encoder.dimension}; inner products need the same number"
        )


def as_role(model: torch.nn.Module, as_class: type) -> torch.nn.Module:
    """The same weights as the other DPR class; a copy, so that the two can be trained apart."""
    if isinstance(model, as_class):
        return model
    old, new = ROOTS[type(model)], ROOTS[as_class]
    other = as_class(model.config)
    other.load_state_dict({new + name.removeprefix(old): value for name, value in model.state_dict().items()})
    return other


def one_line(error: Exception) -> str:
    """What a library says, short enough for a line of ours."""
    return " ".join(str(error).split())[:200]
