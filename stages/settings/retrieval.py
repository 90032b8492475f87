"""models, lengths, retriever, index: what is trained, how long texts may be, how passages are found."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.settings.section import Count, Name, Positive, Rate, Section


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
