"""A model's card says what was trained on what, and no score that is not this model's."""

import re

import yaml

from stages.verdicts.card import model_card

TRAINED = {
    "name": "new-0123", "fingerprint": "0123456789abcdef",
    "params": {"train.recipe": "new", "train.seed": "13", "recipe.marginalization": "sequence", "data.source": "a|b"},
    "data": [{"name": "passages", "digest": "5ab85c5f7ef4e3cf", "rows": 120}],
}  # fmt: skip
SCORES = {
    "train": {"val_loss_per_sequence": 2.5, "val_loss_before_training": 5.0, "steps": 60, "questions_seen": 960},
    "evaluate": {"em": 74.25, "f1": 75.5, "questions": 400},
}


def test_a_card_names_recipe_data_scores_and_how_to_load():
    card = model_card("me/rag", TRAINED, SCORES, ("rag", "RagSequenceForGeneration"), whole=True)
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "question-answering"
    for part in (
        'RagSequenceForGeneration.from_pretrained("me/rag")', "AnsweringModel", "| EM | 74.2 |", "Validation loss 2.500",
        "| marginalization | sequence |", "| passages | 120 | `5ab85c5f7ef4e3cf` |", "a\\|b",
    ):  # fmt: skip
        assert part in card, part
    assert "recall@5" not in card, "not measured"


def test_a_card_says_how_passages_are_read():
    together, weighted, parallel = (
        TRAINED | {"params": TRAINED["params"] | {"recipe.reading": way}}
        for way in ("together", "weighted", "parallel")
    )
    for trained, said in (
        (TRAINED, "marginalising over retrieved"),
        (together, "reads all retrieved passages of a question"),
        (weighted, "MARGE.*each as much as the retriever weighs it"),
        (parallel, "Ratner et al. 2023.*none of which sees another"),
    ):
        assert re.search(
            said, model_card("me/rag", trained, SCORES, ("parts", "BartForConditionalGeneration"), whole=False)
        )


def test_a_card_without_scores_says_so():
    card = model_card("rag", TRAINED, {}, ("parts", "LlamaForCausalLM"), whole=False)
    assert "Not evaluated" in card and "EM" not in card and "AnsweringModel" not in card
    assert 'LlamaForCausalLM.from_pretrained("rag", subfolder="generator")' in card


def test_a_loss_that_was_not_finite_is_none():
    scores = {"train": {"val_loss_per_sequence": 2.5, "steps": 60, "questions_seen": 960}}
    assert "2.500 nats a question (nan before training)" in model_card(
        "rag", TRAINED, scores, ("parts", "X"), whole=False
    )
