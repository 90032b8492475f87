"""How questions become updates, recipe by recipe."""

from itertools import islice

import pytest
import torch

from stages.compute.precision import mixed_precision
from stages.corpus.epochs import epoch_order
from stages.training.recipes import updates
from tests.tiny_rag import NEW, OLD


def take(count, recipe, batch_size, accumulation, updates_wanted, seed=3):
    return list(islice(updates(count, seed, recipe, batch_size, accumulation), updates_wanted))


def flat(update):
    return [row for rows in update.micro_batches for row in rows]


@pytest.mark.parametrize("recipe", [NEW, NEW.model_copy(update={"batching": "one_at_a_time"})])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 16), (8, 4), (32, 1)])
def test_cutting_up_a_step_changes_neither_its_questions_nor_their_weight(recipe, batch_size, accumulation):
    whole = take(70, NEW, 32, 1, 6)
    parts = take(70, recipe, batch_size, accumulation, 6)
    assert [flat(update) for update in parts] == [flat(update) for update in whole]
    assert [(update.divisor, update.applied) for update in parts] == [(32, True)] * 6
    largest = 1 if recipe.batching == "one_at_a_time" else batch_size
    assert max(len(rows) for update in parts for rows in update.micro_batches) == largest


def test_an_epoch_is_a_permutation_and_another_one_each_time():
    first, second = epoch_order(50, 1, 0), epoch_order(50, 1, 1)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert epoch_order(50, 1, 0) == first and epoch_order(50, 2, 0) != first
    two = take(50, NEW, 10, 1, 10, seed=1)
    assert [row for update in two[:5] for row in flat(update)] == first


@pytest.mark.parametrize("count", [9, 33, 65, 5])
def test_no_update_is_small_and_every_question_comes_once_an_epoch(count):
    """33 questions in steps of 32: the single one that is left would else weigh as much as a whole step."""
    found = take(count, NEW, 8, 4, count)
    assert all(update.questions == update.divisor == 32 for update in found)
    rows = [row for update in found for row in flat(update)]
    assert all(sorted(rows[first : first + count]) == list(range(count)) for first in range(0, len(rows), count))
    resumed = islice(updates(count, 3, NEW, 8, 4), 3, count)
    assert list(resumed) == found[3:]


def test_the_old_recipe_updates_inside_the_batch():
    found = take(16, OLD, 8, 4, 4)
    assert [[len(rows) for rows in update.micro_batches] for update in found] == [[1] * 4] * 4
    assert all(update.divisor == 4 and update.applied and update.questions == 4 for update in found)


def test_the_old_recipe_drops_what_is_left_of_a_batch():
    found = take(12, OLD, 6, 4, 4)
    assert [(update.questions, update.divisor, update.applied) for update in found] == [(4, 4, True), (2, 4, False)] * 2


def test_within_batch_alone_keeps_true_batches():
    recipe = NEW.model_copy(update={"accumulation": "within_batch"})
    assert [[len(rows) for rows in update.micro_batches] for update in take(16, recipe, 8, 4, 4)] == [[4]] * 4


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    assert [mixed_precision(name, cpu) for name in ("auto", "fp32", "bf16")] == ["no", "no", "bf16"]
    with pytest.raises(ValueError, match="fp16"):
        mixed_precision("fp16", cpu)
