"""params.yaml as a whole: its sections (settings/), what must agree between them, and every message about a wrong one.

Values are coerced leniently, because tools rewrite them: `dvc exp run -S train.learning_rate=1e-5` leaves the text
`1e-05` in the file, which YAML 1.1 reads as a string.
"""

from pathlib import Path

import yaml
from pydantic import ValidationError, model_validator

from stages.settings.data import Data
from stages.settings.retrieval import Index, Lengths, Models, Retriever
from stages.settings.runs import RETRIEVER_GRADIENTS, Evaluate, Recipe, Runtime, Signs, Tracking, Train
from stages.settings.section import Count, Section

PARAMS_FILE = Path("params.yaml")


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
