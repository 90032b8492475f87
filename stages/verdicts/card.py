"""A model's card: what a trained model is, what it was made of, how well it does and how to load it."""

import math

LOADING = {
    "rag": """from transformers import AutoTokenizer, {cls}

model = {cls}.from_pretrained("{name}")         # question encoder and generator
tokenizer = AutoTokenizer.from_pretrained("{name}", subfolder="generator_tokenizer")""",
    "parts": """from transformers import AutoModel, AutoTokenizer, {cls}

encoder = AutoModel.from_pretrained("{name}", subfolder="question_encoder")
generator = {cls}.from_pretrained("{name}", subfolder="generator")
tokenizer = AutoTokenizer.from_pretrained("{name}", subfolder="generator")""",
}
WHOLE = """With this project's code, from this folder alone, answers with their passages:

```python
from pathlib import Path

from stages.evaluation.pyfunc import AnsweringModel

folder = Path("{short}")  # on the hub: hf download {name} --local-dir {short}
model = AnsweringModel(folder / "retrieval", model=folder)
print(model.predict(["your question"]))
```

"""
READ = {
    "each": "Lewis et al. 2020): a question encoder and a generator, trained jointly by marginalising over retrieved passages",
    "together": "Izacard & Grave 2021): a generator that reads all retrieved passages of a question at once, trained with its "
    "question encoder",
    "weighted": "Lewis et al. 2020, MARGE): a generator that reads all retrieved passages of a question at once, each as much "
    "as the retriever weighs it, trained with its question encoder",
    "parallel": "Ratner et al. 2023): a generator that reads all retrieved passages of a question at once, none of which sees "
    "another, trained with its question encoder",
}
SAID = {
    "em": "EM", "f1": "F1", "recall_at_1": "recall@1", "recall_at_5": "recall@5", "mrr_at_10": "MRR@10",
    "ndcg_at_10": "nDCG@10", "answer_recall_at_5": "answer recall@5",
    "dense_recall_at_1": "recall@1 of dense search alone", "dense_recall_at_5": "recall@5 of dense search alone",
    "bm25_recall_at_1": "recall@1 of BM25 alone", "bm25_recall_at_5": "recall@5 of BM25 alone",
    "oracle_em": "EM with the gold passage given", "closed_book_em": "EM with no passage",
}  # fmt: skip


def model_card(name: str, trained: dict, scores: dict[str, dict], loader: tuple[str, str], whole: bool) -> str:
    """README.md of a published model.

    trained: the content of its run.json. scores: metrics of the stages `train`
    and `evaluate`, as far as they are this model's. loader: a key of LOADING and transformers' class. whole: index and
    passages lie beside the weights.
    """
    params, (layout, cls) = trained["params"], loader
    code = LOADING[layout].format(name=name, cls=cls)
    training, evaluation = scores.get("train"), scores.get("evaluate")
    recipe = {key.removeprefix("recipe."): value for key, value in params.items() if key.startswith("recipe.")}
    lines = [
        "---", "library_name: transformers", "pipeline_tag: question-answering", "tags: [rag, retrieval-augmented-generation]",
        "---", "", f"# {name}", "",
        f"Retrieval-augmented generation ({READ[recipe.get('reading', 'each')]}, under the recipe "
        f"`{params['train.recipe']}`. Trained as `{trained['name']}`, "
        f"fingerprint `{trained['fingerprint']}`.", "",
        "## How to load it", "", "```python", code, "```", "",
        *([WHOLE.format(name=name, short=name.split("/")[-1]).rstrip(), ""] if whole else []),
        "## Scores", "",
    ]  # fmt: skip
    if evaluation:
        lines += [f"On {evaluation['questions']:.0f} questions, in percent:", "", *_table("score", "value", {
            said: f"{evaluation[key]:.1f}" for key, said in SAID.items() if key in evaluation
        })]  # fmt: skip
    else:
        lines += ["Not evaluated, or not since the last change.", ""]
    if training and "val_loss_per_sequence" in training:
        before = training.get("val_loss_before_training", math.nan)
        lines += [
            f"Validation loss {training['val_loss_per_sequence']:.3f} nats a question ({before:.3f} before training), after "
            f"{training['steps']:.0f} steps and {training['questions_seen']:.0f} questions.", "",
        ]  # fmt: skip
    lines += ["## Recipe", "", *_table("switch", "value", recipe)]
    lines += ["## Data", "", "| set | rows | digest |", "|---|---|---|"]
    lines += [f"| {one['name']} | {one['rows']} | `{one['digest']}` |" for one in trained["data"]]
    lines += ["", "## Parameters", ""]
    wanted = ("data.", "models.", "lengths.", "retriever.", "index.", "train.")
    lines += _table("parameter", "value", {key: value for key, value in params.items() if key.startswith(wanted)})
    return "\n".join(lines)


def _table(left: str, right: str, rows: dict[str, str]) -> list[str]:
    cells = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return [f"| {left} | {right} |", "|---|---|", *cells, ""]
