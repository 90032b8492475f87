"""The typed form of params.yaml: every knob's type and range, and every message about a wrong one.

Values are coerced leniently, because tools rewrite them: `dvc exp run -S train.learning_rate=1e-5` leaves the text
`1e-05` in the file, which YAML 1.1 reads as a string.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

PARAMS_FILE = Path("params.yaml")

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
# One path or several; YAML may hold a text or a list.
Names = Annotated[
    list[Name], BeforeValidator(lambda names: [names] if isinstance(names, str | int) else names), Field(min_length=1)
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(Section):
    passages: Annotated[int, Field(ge=50)]
    train_questions: Positive
    validation_questions: Positive
    test_questions: Positive


class Files(Section):
    train: Names | None
    validation: Names | None
    test: Names | None
    passages: Names | None


class Qrels(Section):
    train: Names | None
    validation: Names | None
    test: Names | None


class Tables(Section):
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None
    question_columns: Annotated[list[Name], Field(min_length=1)] | None
    passage_columns: Annotated[list[Name], Field(min_length=1)] | None
    quoting: bool | None
    separator: Name | None


class Fields(Section):
    question: Name
    answers: Name | None
    id: Name
    positive_ids: Name
    passage_id: Name
    title: Name
    text: Name | None


class Shares(Section):
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]


class Positives(Section):
    depth: Annotated[int, Field(ge=0, le=1000)]
    questions: Positive | None


class Nq(Section):
    questions: Name
    questions_revision: Name
    train_files: Name
    test_files: Name
    passages: Name
    passages_revision: Name
    passage_files: Name


class Data(Section):
    source: Literal["sample", "files", "nq"]
    # YAML 1.1 reads Norwegian's code as false.
    language: Annotated[
        str, BeforeValidator(lambda code: "no" if code is False else code), Field(pattern="^[a-z]{2,3}$")
    ]
    sample: Sample
    files: Files
    qrels: Qrels
    tables: Tables
    fields: Fields
    unanswerable: Name | None
    answers_are: Literal["text", "regex"]
    shares: Shares
    positives: Positives
    max_unusable: Share
    nq: Nq

    @model_validator(mode="after")
    def _files_are_named(self) -> "Data":
        if self.source == "files":
            for split in ("train", "passages"):
                if getattr(self.files, split) is None:
                    raise ValueError(f"data.files.{split}: missing; data.source: files needs its path")
            for split, name in self.qrels.model_dump().items():
                if name and not getattr(self.files, split):
                    raise ValueError(
                        f"data.qrels.{split}: {', '.join(name)}, but data.files.{split} names no questions"
                    )
            if self.shares.validation + self.shares.test >= 1:
                raise ValueError("data.shares: validation and test together must leave something to train on")
        return self


class Lora(Section):
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | list[Name] | None
    base: Literal["fp32", "bf16", "8bit", "4bit"]


class Models(Section):
    question_encoder: Name
    context_encoder: Name
    pooling: Literal["auto", "cls", "mean"]
    normalize: Literal["auto"] | bool
    question_prefix: str
    passage_prefix: str
    generator: Name
    chat_template: bool
    lora: Lora | None
    reranker: Name | None


class Lengths(Section):
    question_tokens: Annotated[int, Field(ge=8, le=512)]
    passage_tokens: Annotated[int, Field(ge=16, le=512)]
    context_tokens: Annotated[int, Field(ge=32)]
    answer_tokens: Annotated[int, Field(ge=2)]


class HardNegatives(Section):
    count: Count
    steps: Count
    depth: Positive
    skip: Count

    @model_validator(mode="after")
    def _second_round_has_steps_and_passages(self) -> "HardNegatives":
        where = "retriever.hard_negatives"
        if self.count and not self.steps:
            raise ValueError(
                f"{where}.steps: 0, but {where}.count is {self.count}; give the second round steps or set count to 0"
            )
        if self.count and self.depth < self.skip + self.count:
            raise ValueError(
                f"{where}.depth: {self.depth} hits cannot hold {where}.skip ({self.skip}) and {where}.count ({self.count}) "
                "passages; raise depth"
            )
        return self


class RerankerWarmUp(Section):
    steps: Count
    batch_size: Positive
    negatives: Annotated[int, Field(ge=1, le=100)]
    learning_rate: Rate


class Retriever(Section):
    n_docs: Positive
    steps: Count
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: Rate
    score_scale: Annotated[float, Field(gt=0)]
    hybrid_depth: Annotated[int, Field(ge=0, le=1000)]
    hybrid_weight: Annotated[float, Field(ge=0)]
    rerank_depth: Annotated[int, Field(ge=1, le=1000)]
    cross_weight: Annotated[float, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)]
    learn_weights: bool
    hard_negatives: HardNegatives
    reranker: RerankerWarmUp

    @model_validator(mode="after")
    def _enough_hits(self) -> "Retriever":
        if 0 < self.hybrid_depth < self.n_docs:
            raise ValueError(
                f"retriever.hybrid_depth: {self.hybrid_depth} hits are fewer than retriever.n_docs ({self.n_docs}); raise it "
                "or set it to 0"
            )
        return self


class Index(Section):
    factory: Name
    import_path: Name | None
    train_size: Annotated[int, Field(ge=256)]
    nprobe: Positive | None
    ef_search: Positive | None
    batch_tokens: Annotated[int, Field(ge=512)]

    @property
    def imports_index(self) -> bool:
        """Whether `import_path` names a whole index; a .npy file holds vectors, from which `factory` builds one."""
        return self.import_path is not None and not self.import_path.endswith(".npy")

    @model_validator(mode="after")
    def _the_kind_has_the_parameter(self) -> "Index":
        """Known before anything is encoded; of an imported index, once it is opened."""
        lists = re.search(r"IVF(\d+)(?![\dk])", self.factory)
        for name, value, kind in (("nprobe", self.nprobe, "IVF"), ("ef_search", self.ef_search, "HNSW")):
            if value is not None and not self.imports_index and kind not in self.factory:
                raise ValueError(
                    f"index.{name}: {value}, but index.factory: {self.factory} has no such parameter (one with {kind} has); "
                    "set it to null"
                )
        if self.nprobe and not self.imports_index and lists and self.nprobe > int(lists[1]):
            raise ValueError(
                f"index.nprobe: {self.nprobe}, but index.factory: {self.factory} has only {lists[1]} lists"
            )
        return self


class Train(Section):
    recipe: Name
    seed: Count
    max_steps: Positive
    batch_size: Positive
    gradient_accumulation_steps: Positive
    learning_rate: Rate
    question_encoder_learning_rate: Rate | None
    context_encoder_learning_rate: Rate | None
    reranker_learning_rate: Rate | None
    prior_learning_rate: Rate
    positives_weight: Annotated[float, Field(ge=0)]
    warmup_steps: Count
    weight_decay: Share
    max_grad_norm: Annotated[float, Field(gt=0)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    save_total_limit: Positive
    gradient_checkpointing: bool
    compile: bool
    bf16_copy: bool
    halve_on_oom: bool
    max_skipped_steps: Positive
    index_refresh_steps: Count
    answers: Literal["first", "drawn"]


# exact is the gradient of the likelihood itself, where that depends on the prior; the others are losses beside it.
RETRIEVER_GRADIENTS = {
    "each": ("exact", "none"),
    "weighted": ("exact", "none"),
    "together": ("emdr2", "perplexity_distillation", "none"),
    "parallel": ("emdr2", "perplexity_distillation", "none"),
}


class Recipe(Section):
    reading: Literal["each", "together", "weighted", "parallel"]
    marginalization: Literal["sequence", "token", "average"]
    accumulation: Literal["across_batches", "within_batch"]
    batching: Literal["true_batches", "one_at_a_time"]
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    checkpoints: Literal["best", "last"]
    tensorboard: bool
    retriever_gradient: Literal["exact", "emdr2", "perplexity_distillation", "none"]


class Evaluate(Section):
    split: Literal["test", "validation"]
    num_samples: Positive | None
    further_depths: list[Annotated[int, Field(ge=1, le=1000)]]
    decoding: Literal["thorough", "fast"]
    num_beams: Positive
    batch_size: Positive
    precision: Literal["auto", "bf16", "fp16", "fp32"]


class Signs(Section):
    seconds_per_batch: Annotated[float, Field(gt=0)]
    gpu_utilization: Annotated[float, Field(ge=0, le=100)]
    gpu_memory: Annotated[float, Field(ge=0, le=100)]
    val_loss_drop: Annotated[float, Field(ge=0)]
    val_loss_rise: Annotated[float, Field(ge=0)]
    exact_match: Annotated[float, Field(ge=0, le=100)]
    distinct_passages: Share
    prior_entropy: Share


class Tracking(Section):
    experiment: Name
    system_metrics_seconds: Annotated[float, Field(ge=0)]
    model_gigabytes: Annotated[float, Field(ge=0)]


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"]
    threads: Count
    processes: Count
    cuda_graphs: bool


class Params(Section):
    seed: Count
    data: Data
    models: Models
    lengths: Lengths
    retriever: Retriever
    index: Index
    train: Train
    recipes: dict[str, Recipe]
    evaluate: Evaluate
    signs: Signs
    tracking: Tracking
    runtime: Runtime

    @property
    def recipe(self) -> Recipe:
        """The recipe that `train.recipe` names."""
        return self.recipes[self.train.recipe]

    @model_validator(mode="after")
    def _pairs_agree(self) -> "Params":
        if self.train.recipe not in self.recipes:
            known = ", ".join(sorted(self.recipes))
            raise ValueError(f"train.recipe: no recipe named '{self.train.recipe}' under recipes; there are: {known}")
        batch_size, accumulation = self.train.batch_size, self.train.gradient_accumulation_steps
        if self.recipe.accumulation == "within_batch" and batch_size < accumulation:
            raise ValueError(
                f"train.batch_size: {batch_size} is smaller than train.gradient_accumulation_steps ({accumulation}); with "
                f"recipes.{self.train.recipe}.accumulation: within_batch no update would ever happen; raise the batch size"
            )
        if self.lengths.context_tokens < self.lengths.question_tokens + 16:
            raise ValueError(
                f"lengths.context_tokens: {self.lengths.context_tokens} leaves no room for a passage beside a question of "
                f"lengths.question_tokens ({self.lengths.question_tokens}); use at least 16 more"
            )
        if self.train.warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"train.warmup_steps: {self.train.warmup_steps} must be less than train.max_steps ({self.train.max_steps})"
            )
        return self

    @model_validator(mode="after")
    def _the_reranker_has_enough_candidates(self) -> "Params":
        depth, n_docs = self.retriever.rerank_depth, self.retriever.n_docs
        if self.models.reranker and depth < n_docs:
            raise ValueError(
                f"retriever.rerank_depth: {depth} candidates are fewer than retriever.n_docs ({n_docs}); raise it or set "
                "models.reranker to null"
            )
        return self

    @model_validator(mode="after")
    def _the_losses_go_with_the_reading(self) -> "Params":
        if self.train.recipe not in self.recipes:
            return self
        recipe, where = self.recipe, f"recipes.{self.train.recipe}"
        fitting = RETRIEVER_GRADIENTS[recipe.reading]
        if recipe.retriever_gradient not in fitting:
            raise ValueError(
                f"{where}.retriever_gradient: {recipe.retriever_gradient} does not go with {where}.reading: "
                f"{recipe.reading}; use {' or '.join(fitting)}"
            )
        if recipe.reading != "each" and recipe.marginalization != "sequence":
            raise ValueError(
                f"{where}.marginalization: {recipe.marginalization} is of answers under single passages; with {where}.reading: "
                f"{recipe.reading}, use sequence"
            )
        return self

    @model_validator(mode="after")
    def _gold_passages_teach_what_learns(self) -> "Params":
        weight = self.train.positives_weight
        if weight and self.train.recipe in self.recipes and self.recipe.retriever_gradient == "none":
            raise ValueError(
                f"train.positives_weight: {weight:g}, but recipes.{self.train.recipe}.retriever_gradient: none trains nothing "
                "that ranks passages; use exact (with reading: together, emdr2) or set train.positives_weight to 0"
            )
        return self

    @model_validator(mode="after")
    def _the_index_can_be_refreshed(self) -> "Params":
        where, recipe = f"train.index_refresh_steps: {self.train.index_refresh_steps}", f"recipes.{self.train.recipe}"
        if not self.train.index_refresh_steps or self.train.recipe not in self.recipes:
            return self
        if self.recipe.retriever_gradient == "none":
            raise ValueError(
                f"{where}, but {recipe}.retriever_gradient: none leaves the encoders without a gradient; use exact (with "
                "reading: together, emdr2) or set train.index_refresh_steps to 0"
            )
        if self.recipe.marginalization == "average":
            raise ValueError(
                f"{where}, but {recipe}.marginalization: average gives the encoders no gradient; use sequence or token, or "
                "set train.index_refresh_steps to 0"
            )
        if self.index.imports_index:
            raise ValueError(
                f"{where}, but index.import_path: {self.index.import_path} is an index that was built elsewhere; set it to "
                "null or train.index_refresh_steps to 0"
            )
        if self.index.factory != "Flat":
            raise ValueError(
                f"{where}, but index.factory: {self.index.factory} would have to be trained and built again each time; use "
                "Flat or set train.index_refresh_steps to 0"
            )
        return self

    @model_validator(mode="after")
    def _no_warm_up_parts_encoder_and_vectors(self) -> "Params":
        steps, hard = self.retriever.steps, self.retriever.hard_negatives.count
        if self.index.import_path is not None and (steps or hard):
            by = f"retriever.steps: {steps}" if steps else f"retriever.hard_negatives.count: {hard}"
            raise ValueError(
                f"index.import_path: {self.index.import_path} was made by models.context_encoder as it is, which the warm-up "
                f"({by}) would change; set retriever.steps and retriever.hard_negatives.count to 0, or import_path to null"
            )
        return self


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Reads and checks a parameter file; raises ValueError with one line naming file and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run from the folder that holds params.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise ValueError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold sections of 'key: value' pairs, not {type(values).__name__}")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = problems[0]
    key = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; check its spelling against the shipped params.yaml{more}"
    if problem["type"] == "missing":
        return f"{key}: missing; copy its line from the shipped params.yaml{more}"
    if problem["type"] == "value_error":
        return f"{problem['ctx']['error']}{more}"
    return f"{key}: {problem['msg'].lower()}, got {problem['input']!r}{more}"
