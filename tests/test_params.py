"""params.yaml: what is shipped loads, what is wrong is one line that names file and key."""

import re
from pathlib import Path

import pytest
import yaml

from stages.params import load_params

SHIPPED = Path("params.yaml").read_text(encoding="utf-8")


def load(tmp_path, text: str):
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    return load_params(file)


def changed(key: str, value) -> str:
    values = yaml.safe_load(SHIPPED)
    section = values
    *path, last = key.split(".")
    for part in path:
        section = section[part]
    if value is KeyError:
        del section[last]
    else:
        section[last] = value
    return yaml.safe_dump(values)


def test_shipped_file_loads_and_the_new_recipe_is_the_default():
    params = load_params()
    assert params.train.recipe == "new" and params.recipe.marginalization == "sequence"


def test_every_knob_has_a_comment_on_its_line():
    explained, section = set(), ""
    for line in SHIPPED.splitlines():
        match = re.match(r"( *)(\w+):(?: +([^#\s][^#]*))? *(#.*)?$", line)
        if not match or not line.strip():
            continue
        indent, key, value, comment = match.groups()
        section = key if not indent else section
        if value:
            # The old recipe's twin under `new` explains what the key is.
            assert comment or (section == "recipes" and key in explained), f"no comment: {line}"
        if comment:
            explained.add(key)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.learning_rate", "1e-05", 1e-5),
        ("train.max_steps", "600", 600),
        ("recipes.new.tensorboard", "false", False),
        ("evaluate.num_samples", "20", 20),
        ("evaluate.num_samples", None, None),
    ],
)
def test_numbers_that_a_tool_wrote_as_text_are_numbers(tmp_path, key, value, expected):
    params = load(tmp_path, changed(key, value))
    for part in key.split("."):
        params = params[part] if isinstance(params, dict) else getattr(params, part)
    assert params == expected and type(params) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("retriever.n_dogs", 5, "retriever.n_dogs: unknown key"),
        ("unknown", 1, "unknown: unknown key"),
        ("train.learning_rate", KeyError, "train.learning_rate: missing"),
        ("train", KeyError, "train: missing"),
        ("train.learning_rate", 0, "train.learning_rate:.*greater than 0"),
        ("train.learning_rate", "fast", "train.learning_rate:.*number.*'fast'"),
        ("train.learning_rate", 2, "train.learning_rate:.*less than or equal to 1"),
        ("train.max_steps", 0, "train.max_steps:.*greater than or equal to 1"),
        ("train.max_steps", 2.5, "train.max_steps:.*integer"),
        ("train.batch_size", -1, "train.batch_size"),
        ("train.label_smoothing", 1.0, "train.label_smoothing:.*less than 1"),
        ("retriever.n_docs", 0, "retriever.n_docs"),
        (
            "retriever.hard_negatives.count",
            1,
            "retriever.hard_negatives.steps: 0, but .*count is 1; give .* or set count to 0",
        ),
        (
            "retriever.hybrid_depth",
            1,
            "retriever.hybrid_depth: 1 hits are fewer than retriever.n_docs .2.; raise it or set it",
        ),
        ("retriever.hybrid_weight", -0.1, "retriever.hybrid_weight:.*greater than or equal to 0"),
        ("retriever.hard_negatives.count", -1, "retriever.hard_negatives.count:.*greater than or equal to 0"),
        ("retriever.hard_negatives.depth", 0, "retriever.hard_negatives.depth:.*greater than or equal to 1"),
        ("retriever.temperature", 0, "retriever.temperature:.*greater than 0"),
        ("retriever.reranker.negatives", 0, "retriever.reranker.negatives:.*greater than or equal to 1"),
        ("train.answers", "all", "train.answers:.*'first' or 'drawn'.*'all'"),
        ("train.positives_weight", -0.5, "train.positives_weight:.*greater than or equal to 0"),
        ("index.nprobe", 0, "index.nprobe:.*greater than or equal to 1"),
        ("index.ef_search", -1, "index.ef_search:.*greater than or equal to 1"),
        ("index.train_size", 10, "index.train_size:.*greater than or equal to 256"),
        ("index.import_path", "", "index.import_path"),
        ("evaluate.decoding", "slow", "evaluate.decoding:.*'thorough' or 'fast'.*'slow'"),
        ("evaluate.split", "train", "evaluate.split"),
        ("data.source", "web", "data.source"),
        ("data.sample.passages", 3, "data.sample.passages"),
        ("models.generator", "", "models.generator"),
        ("recipes.new.marginalization", "mean", "recipes.new.marginalization"),
        ("recipes.new.precision", "int8", "recipes.new.precision"),
        ("train.recipe", "newer", "train.recipe: no recipe named 'newer'.*new, old"),
        ("train.warmup_steps", 120, "train.warmup_steps.*train.max_steps"),
        ("lengths.context_tokens", 50, "lengths.context_tokens: 50 leaves no room"),
        ("signs.distinct_passages", 1.5, "signs.distinct_passages"),
        ("runtime.device", "tpu", "runtime.device"),
        ("seed", -1, "seed"),
    ],
)
def test_a_wrong_value_is_one_line_with_file_and_key(tmp_path, key, value, says):
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path, changed(key, value))
    assert "params.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_would_never_update_is_refused(tmp_path):
    values = yaml.safe_load(SHIPPED)
    values["train"] |= {"recipe": "old", "batch_size": 2, "gradient_accumulation_steps": 16}
    with pytest.raises(ValueError, match="train.batch_size: 2 .*recipes.old.accumulation.*no update"):
        load(tmp_path, yaml.safe_dump(values))


def test_fewer_candidates_than_passages_read_are_refused_where_there_is_a_reranker(tmp_path):
    values = yaml.safe_load(SHIPPED)
    values["retriever"] |= {"n_docs": 5, "rerank_depth": 4}
    load(tmp_path, yaml.safe_dump(values))
    values["models"]["reranker"] = "data/tiny/encoder"
    with pytest.raises(ValueError, match="retriever.rerank_depth: 4 candidates are fewer than retriever.n_docs .5."):
        load(tmp_path, yaml.safe_dump(values))


def test_fewer_hits_than_hard_negatives_are_refused(tmp_path):
    values = yaml.safe_load(SHIPPED)
    values["retriever"]["hard_negatives"] = {"count": 2, "steps": 5, "depth": 4, "skip": 2}
    assert load(tmp_path, yaml.safe_dump(values)).retriever.hard_negatives.skip == 2
    values["retriever"]["hard_negatives"]["skip"] = 3
    with pytest.raises(
        ValueError, match=r"params.yaml: retriever.hard_negatives.depth: 4 hits cannot hold .*raise depth"
    ):
        load(tmp_path, yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("recipe", "changes", "says"),
    [
        ("new", {"reading": "together"}, "recipes.new.retriever_gradient: exact does not .* together; use emdr2 or perplexity"),
        ("new", {"retriever_gradient": "emdr2"}, "recipes.new.retriever_gradient: emdr2 does not .* each; use exact or none"),
        ("new", {"reading": "together", "retriever_gradient": "emdr2", "marginalization": "token"},
         "recipes.new.marginalization: token.*use sequence"),
        ("new", {"reading": "parallel"}, "recipes.new.retriever_gradient: exact .*reading: parallel; use emdr2"),
        ("old", {"reading": "together"}, "recipes.old.marginalization: average.*use sequence"),
        ("new", {"reading": "weighted", "retriever_gradient": "emdr2"}, "retriever_gradient: emdr2 .*weighted; use exact"),
        ("new", {"reading": "weighted", "marginalization": "token"}, "recipes.new.marginalization: token.*use sequence"),
        ("new", {"reading": "all"}, "recipes.new.reading:.*'each', 'together', 'weighted' or 'parallel'.*'all'"),
    ],
)  # fmt: skip
def test_switches_without_a_meaning_together_are_one_line(tmp_path, recipe, changes, says):
    values = yaml.safe_load(SHIPPED)
    values["train"]["recipe"] = recipe
    values["recipes"][recipe] |= changes
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path, yaml.safe_dump(values))
    assert "\n" not in str(error.value)


def test_reading_together_without_a_gradient_for_the_encoders_cannot_refresh_the_index(tmp_path):
    values = yaml.safe_load(SHIPPED)
    values["train"]["index_refresh_steps"] = 20
    values["recipes"]["new"] |= {"reading": "together", "retriever_gradient": "perplexity_distillation"}
    assert load(tmp_path, yaml.safe_dump(values)).recipe.reading == "together"
    values["recipes"]["new"]["retriever_gradient"] = "none"
    with pytest.raises(ValueError, match="index_refresh_steps: 20.*none leaves .*with reading: together, emdr2"):
        load(tmp_path, yaml.safe_dump(values))


def test_gold_passages_cannot_teach_a_retriever_that_has_no_gradient(tmp_path):
    values = yaml.safe_load(SHIPPED)
    values["train"]["positives_weight"] = 0.5
    values["recipes"]["new"]["marginalization"] = "average"  # is no obstacle: they are a gradient by themselves
    assert load(tmp_path, yaml.safe_dump(values)).train.positives_weight == 0.5
    values["train"]["recipe"] = "old"
    with pytest.raises(
        ValueError, match="train.positives_weight: 0.5, but recipes.old.retriever_gradient: none"
    ) as error:
        load(tmp_path, yaml.safe_dump(values))
    assert "\n" not in str(error.value)
    values["train"]["positives_weight"] = 0
    load(tmp_path, yaml.safe_dump(values))


def test_a_recipe_of_ones_own(tmp_path):
    values = yaml.safe_load(SHIPPED)
    values["recipes"]["mine"] = values["recipes"]["new"] | {"marginalization": "token"}
    values["train"]["recipe"] = "mine"
    assert load(tmp_path, yaml.safe_dump(values)).recipe.marginalization == "token"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3"),
        ("a: 1\n\tb: 2\n", "line 2"),
        ("", "must hold sections"),
        ("- 1\n- 2\n", "must hold sections"),
        ("just words", "must hold sections"),
    ],
)
def test_a_file_that_is_not_parameters(tmp_path, text, says):
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path, text)
    assert "params.yaml" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="none.yaml: not found"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="params.yaml"):
        load_params(tmp_path / "params.yaml")
