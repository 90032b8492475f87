"""A context encoder that trains and the index that follows it: gradients, which vectors are searched when, kills."""

import copy
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, DPRContextEncoder

from stages.bm25.hits import Hits
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder, padded_rows
from stages.encoders.loading import load_encoder
from stages.generation import marginalization
from stages.machine.signals import Interrupted
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.rag.prior import PriorWeights, Weights
from stages.search.passage_encoder import PassageEncoder
from stages.search.passage_index import index_folders, load_index
from stages.storage.checkpoints import Checkpoints, own_weights
from stages.training.accumulation import Accumulation
from stages.training.index_refresh import Refresh, check_ranks
from stages.training.optimizer import make_optimizer
from stages.training.trainer import Trainer
from tests.test_params import SHIPPED, load
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS, TEXTS, TITLES, tiny_rag, tokenizer
from tests.training.test_trainer import Killed, assert_same_weights, untimed
from tests.training.test_trainer import run as run_without

CPU = torch.device("cpu")
EVERYTHING = list(range(len(QUESTIONS)))
# Each of nine questions has three BM25 hits, the last one no third.
HITS = Hits(torch.arange(27).view(9, 3) * 5 % 9, torch.linspace(6, 1, 27).view(9, 3))
HITS.rows[-1, -1], HITS.scores[-1, -1] = -1, 0


def refreshing_rag(n_docs=3, dropout=0.1, **options):
    """The tiny model with a context encoder of its own weights, whose vectors the index holds."""
    rag = tiny_rag(n_docs)
    config = copy.deepcopy(rag.question_encoder.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(3)
    encoder = Encoder(DPRContextEncoder(config).eval(), tokenizer("encoder"))
    tokens = TokenStore.from_rows(encoder.passage_rows(TITLES, TEXTS, LENGTHS.passage_tokens))
    contexts = PassageEncoder(encoder, tokens)
    torch.manual_seed(0)
    return open_rag(
        rag.encoder, rag.generator, contexts.index(), rag.passages, n_docs, LENGTHS, CPU, passage_encoder=contexts,
        **options,
    )  # fmt: skip


def trainer_of(rag, folder=None, recipe=NEW, **settings):
    chosen = {"index_refresh_steps": 2, "max_steps": 7, "save_steps": 3, **settings}
    checkpoints = Checkpoints(folder, 2) if folder else None
    return Trainer(rag, recipe, SETTINGS.model_copy(update=chosen), "no", 7, checkpoints)


def run(folder=None, on_point=lambda point: None, rag=None, recipe=NEW, asked=lambda: None, **settings):
    trainer = trainer_of(rag or refreshing_rag(), folder, recipe, **settings)
    examples = trainer.rag.examples(QUESTIONS, ANSWERS)
    trainer.run(examples, examples, on_point, asked)
    return trainer


def curve(trainer):
    return [{name: value for name, value in point.items() if name != "refresh_wait"} for point in untimed(trainer)]


def vectors_by(rag, weights):
    """All passages' vectors by transformers' own padded forward."""
    contexts = rag.passage_encoder.frozen()
    contexts.encoder.model.load_state_dict(weights)
    ids, mask = padded_rows(contexts.tokens, torch.arange(len(TITLES)), 1, CPU)
    with torch.no_grad():
        return contexts.encoder.embed(ids, mask)


@pytest.mark.parametrize("hybrid", [False, True], ids=["dense", "hybrid"])
def test_the_gradient_is_that_of_a_loss_written_out_over_all_passages(hybrid):
    """Scores of all passages from one padded forward, then those of the retrieved rows: the same loss and gradients."""
    rag = refreshing_rag(prior=PriorWeights(Weights(1.5, 0.4 if hybrid else 0.0)))
    # The index is old: what is found comes from other weights than the scores.
    with torch.no_grad():
        rag.context_encoder.ctx_encoder.encode_proj.weight.mul_(0.9).add_(0.01)
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS, HITS if hybrid else None), EVERYTHING)
    output = rag(batch, marginal="sequence")
    output.nll.sum().backward()
    found = {name: p.grad.clone() for name, p in rag.named_parameters() if p.grad is not None}
    rag.zero_grad()

    ids, mask = padded_rows(rag.passage_encoder.tokens, torch.arange(len(TITLES)), 1, CPU)
    passages, questions = rag.passage_encoder.encoder.embed(ids, mask), rag.encode_questions(batch)
    stale, scores = questions @ rag.index.vectors.T, 1.5 * questions @ passages.T
    if hybrid:
        of_words = HITS.scores[:, -1:].repeat(1, len(TITLES))
        for question, (rows, values) in enumerate(zip(*HITS, strict=True)):
            of_words[question, rows[rows >= 0]] = values[rows >= 0]
        scores, stale = scores + 0.4 * of_words, 1.5 * stale + 0.4 * of_words
    best = stale.topk(3).indices
    assert torch.equal(output.rows, best)
    prior = scores.gather(1, best).log_softmax(-1)
    torch.testing.assert_close(output.log_prior, prior.detach())
    answers = rag.token_log_probs(batch, *rag.contexts(batch, best))
    marginalization.NLL["sequence"](prior, answers, batch.target_mask).sum().backward()
    assert found["context_encoder.ctx_encoder.encode_proj.weight"].abs().max() > 1e-3
    for name, parameter in rag.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_the_finite_difference():
    rag = refreshing_rag(n_docs=len(TITLES))
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    rag(batch, marginal="token").nll.sum().backward()
    weight = rag.context_encoder.ctx_encoder.encode_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            weight += step * direction
            losses.append(rag(batch, marginal="token").nll.double().sum().item())
    assert (weight.grad * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=2e-2)


def test_a_missing_passage_has_no_part_in_loss_and_gradient():
    """Of nine passages eleven are wanted."""
    few, many = refreshing_rag(9), refreshing_rag(11)
    losses = []
    for rag in (few, many):
        losses.append(rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING), marginal="sequence").nll)
        losses[-1].sum().backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    gradients = [rag.context_encoder.ctx_encoder.encode_proj.weight.grad for rag in (few, many)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_bert_like_context_encoder_has_the_vectors_of_its_padded_forward():
    config = BertConfig(
        vocab_size=7168, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=48, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    encoder = Encoder(BertModel(config, add_pooling_layer=False).eval(), tokenizer("encoder"), "mean", True)
    tokens = TokenStore.from_rows(encoder.passage_rows(TITLES, TEXTS, LENGTHS.passage_tokens))
    contexts = PassageEncoder(encoder, tokens)
    rows = torch.tensor([[4, 0], [2, 8]])
    expected = encoder.embed(*padded_rows(tokens, rows.flatten(), 1, CPU)).view(2, 2, 8)
    torch.testing.assert_close(contexts.vectors(rows), expected)
    torch.testing.assert_close(contexts.index().vectors[rows], expected.detach())
    contexts.vectors(rows).sum().backward()
    assert all(weight.grad is not None for weight in encoder.model.parameters())


def test_the_search_runs_over_the_vectors_of_the_weights_of_that_many_steps_ago():
    rag = refreshing_rag()
    first, weights, used, losses = rag.index.vectors.clone(), {}, {}, []

    def look(point):
        weights[point["step"]] = own_weights(rag.context_encoder)
        used[point["step"]] = rag.index.vectors.clone()
        losses.append(point)
        questions = torch.randn(5, 8, generator=torch.Generator().manual_seed(point["step"]))
        expected = (questions @ rag.index.vectors.T).topk(3).indices
        assert torch.equal(rag.index.search(questions, 3), expected)

    trainer = run(rag=rag, on_point=look, max_steps=8, learning_rate=1e-2)
    snapshot = {0: None, 1: None, 2: None, 3: None, 4: 2, 5: 2, 6: 4, 7: 4, 8: 6}
    assert used.keys() == snapshot.keys()
    for step, taken in snapshot.items():
        expected = first if taken is None else vectors_by(rag, weights[taken])
        torch.testing.assert_close(used[step], expected, rtol=1e-5, atol=1e-5)
        again = rag.passage_encoder.frozen()
        if taken is not None:
            again.encoder.model.load_state_dict(weights[taken])
            assert torch.equal(used[step], again.index().vectors)
    assert (used[8] - first).abs().max() > 1e-2
    assert [point["step"] for point in trainer.progress.history if "refresh_wait" in point] == [4, 6, 8]
    assert all(p["context_encoder_gradient_norm"] > 0 for p in losses if "learning_rate" in p)


def test_how_long_the_encoding_takes_changes_nothing_but_the_wait(monkeypatch):
    prompt = run()
    index, use, there = PassageEncoder.index, Refresh._use, []

    def noting_use(self, step):
        there.append(self.making.done())
        use(self, step)

    monkeypatch.setattr(Refresh, "_use", noting_use)
    early = trainer_of(refreshing_rag())
    examples = early.rag.examples(QUESTIONS, ANSWERS)
    early.run(examples, examples, lambda point: early.refresh.making and early.refresh.making.exception())  # waits
    assert there == [True, True], "nothing is waited for that is there"
    assert curve(early) == curve(prompt)

    rag, wanted = refreshing_rag(), threading.Semaphore(0)

    def late_index(self, unwanted):
        assert wanted.acquire(timeout=600)
        time.sleep(0.3)
        return index(self, unwanted)

    def late_use(self, step):
        wanted.release()
        use(self, step)

    monkeypatch.setattr(PassageEncoder, "index", late_index)
    monkeypatch.setattr(Refresh, "_use", late_use)
    late = run(rag=rag)
    assert all(point["refresh_wait"] >= 0.3 for point in late.progress.history if "refresh_wait" in point)
    assert curve(late) == curve(prompt)
    assert_same_weights(late, prompt, 0)


# Checkpoints at 3 (the first vectors in the making), 6 (others in use) and, at every step, 1 to 6.
@pytest.mark.parametrize(("killed_at", "save_steps"), [(4, 3), (7, 3), (3, 1), (5, 1), (6, 1)])
def test_killed_and_resumed_equals_never_killed(tmp_path, killed_at, save_steps):
    whole = run(tmp_path / "whole", save_steps=save_steps, max_steps=8)

    def kill(point):
        if point["step"] == killed_at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", kill, save_steps=save_steps, max_steps=8)
    assert not list((tmp_path / "killed").glob("step-*/*.bin"))
    resumed = run(tmp_path / "killed", save_steps=save_steps, max_steps=8)
    assert curve(resumed) == curve(whole)
    assert_same_weights(whole, resumed, 0)
    assert torch.equal(whole.rag.index.vectors, resumed.rag.index.vectors)


def test_a_signal_does_not_wait_for_the_encoding_and_the_next_start_makes_it_again(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")

    def endless(self, unwanted):
        deadline = time.monotonic() + 600
        while not unwanted():
            assert time.monotonic() < deadline, "nobody ended it"
            time.sleep(0.01)

    stopped = refreshing_rag()
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(PassageEncoder, "index", endless)
        steps = []
        run(tmp_path / "stopped", steps.append, stopped, asked=lambda: signal.SIGTERM if len(steps) == 4 else None)
    kept = load_file(tmp_path / "stopped/step-00000003/weights.safetensors")
    assert {name.split("/")[0] for name in kept if name.startswith("snapshot-")} == {"snapshot-2"}
    resumed = run(tmp_path / "stopped")
    assert curve(resumed) == curve(whole)
    assert_same_weights(whole, resumed, 0)


def test_what_fails_in_the_background_ends_the_training(monkeypatch):
    def broken(self, unwanted):
        raise RuntimeError("no such kernel")

    rag, points = refreshing_rag(), []
    monkeypatch.setattr(PassageEncoder, "index", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(on_point=points.append, rag=rag)
    assert points[-1]["step"] == 3


def test_however_a_step_is_cut_up_the_update_is_the_same(monkeypatch):
    monkeypatch.setattr(
        "stages.training.trainer.make_optimizer",
        lambda rag, settings: torch.optim.SGD(rag.parameters(), lr=settings.learning_rate),
    )
    settings = {"max_steps": 5, "learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 1e9}
    whole = run(rag=refreshing_rag(dropout=0.0), batch_size=8, gradient_accumulation_steps=1, **settings)
    parts = run(rag=refreshing_rag(dropout=0.0), batch_size=2, gradient_accumulation_steps=4, **settings)
    assert_same_weights(whole, parts, 1e-6)
    original = Accumulation.add

    def limited(self, training, passes, *rest):
        if max(map(len, passes)) > 3:
            raise torch.OutOfMemoryError("out of memory, says the test")
        original(self, training, passes, *rest)

    monkeypatch.setattr(Accumulation, "add", limited)
    halved = run(rag=refreshing_rag(dropout=0.0), batch_size=8, gradient_accumulation_steps=1, **settings)
    assert halved.progress.micro_batch == 2
    assert_same_weights(whole, halved, 1e-6)


def test_each_encoder_may_learn_at_its_own_rate():
    rag = refreshing_rag()

    def rates(**settings):
        chosen = SETTINGS.model_copy(update={"learning_rate": 3e-3, **settings})
        of = {id(p): group["lr"] for group in make_optimizer(rag, chosen).param_groups for p in group["params"]}
        assert len(of) == len(list(rag.parameters()))
        return [
            {of[id(p)] for p in part.parameters()}
            for part in (rag.generator_model, rag.question_encoder, rag.context_encoder)
        ]

    assert rates() == [{3e-3}, {3e-3}, {3e-3}]
    assert rates(question_encoder_learning_rate=2e-3) == [{3e-3}, {2e-3}, {2e-3}]
    assert rates(context_encoder_learning_rate=1e-3) == [{3e-3}, {3e-3}, {1e-3}]


@pytest.mark.parametrize("kept", ["best", "last"])
def test_the_index_that_a_training_leaves_belongs_to_the_weights_that_it_leaves(tmp_path, kept):
    recipe = NEW.model_copy(update={"checkpoints": kept})
    trainer = run(tmp_path / "checkpoints", recipe=recipe, eval_steps=3, learning_rate=1e-2)
    if kept == "best":
        assert trainer.progress.best_step > 0
    save_rag(trainer.rag, tmp_path / "model", "sequence")
    encoder = load_encoder(str(tmp_path / "model/context_encoder"), "models.context_encoder", DPRContextEncoder)
    index = load_index(tmp_path / "model/index", tmp_path / "model/index")
    expected = vectors_by(trainer.rag, encoder.model.state_dict())
    torch.testing.assert_close(index.vectors, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(index.index.reconstruct_n(0, 9), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert (index.vectors - trainer.rag.index.vectors).abs().max() > 1e-4

    # What is asked later: no context encoder, the written vectors; the same losses.
    asking, generator = load_rag_parts(tmp_path / "model")
    again = open_rag(asking, generator, index, trainer.rag.passages, 3, LENGTHS, CPU)
    trainer.rag.index = index
    with torch.no_grad():
        losses = [
            rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING), marginal="sequence").nll
            for rag in (again, trainer.rag)
        ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_a_finished_training_is_written_again_as_it_was(tmp_path):
    first, again = run(tmp_path / "checkpoints"), run(tmp_path / "checkpoints")
    for name, trainer in (("first", first), ("again", again)):
        save_rag(trainer.rag, tmp_path / name, "sequence")
    names = sorted(file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*") if file.is_file())
    assert any("index.faiss" in str(name) for name in names)
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_the_models_own_index_is_used_and_a_damaged_one_is_named(tmp_path):
    before = tmp_path / "index"
    save_rag(tiny_rag(), tmp_path / "without", "sequence")
    assert index_folders(tmp_path / "without", before, tmp_path / "vectors") == (before, tmp_path / "vectors")
    save_rag(refreshing_rag(), tmp_path / "model", "sequence")
    assert index_folders(tmp_path / "model", before, before) == (tmp_path / "model/index",) * 2
    vectors = np.load(tmp_path / "model/index/vectors.npy")
    vectors[0, 0] += 1
    np.save(tmp_path / "model/index/vectors.npy", vectors)
    for read in (
        lambda: load_index(tmp_path / "model/index", tmp_path / "model/index"),
        lambda: load_rag_parts(tmp_path / "model"),
    ):
        with pytest.raises(ValueError, match="damaged .*vectors.npy was altered"):
            read()


def test_off_nothing_is_there(tmp_path):
    points = []
    trainer = run_without(NEW, tmp_path, points.append, max_steps=3, save_steps=2)
    parts = ("question_encoder.", "generator_model.")
    assert all(name.startswith(parts) for name in load_file(tmp_path / "finished/weights.safetensors"))
    assert len(trainer.optimizer.param_groups) == 2 and not trainer.refresh.tensors()
    assert not any("refresh" in name or "context_encoder" in name for point in points for name in point)
    save_rag(trainer.rag, tmp_path / "model", "sequence")
    assert not [file for file in (tmp_path / "model").iterdir() if file.name in ("index", "context_encoder")]


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("train", {"recipe": "old"}, "index_refresh_steps: 20, but recipes.old.retriever_gradient: none .*use exact"),
        ("index", {"import_path": "my.faiss"}, "20, but index.import_path: my.faiss .*set it to null"),
        ("index", {"factory": "IVF64,Flat"}, "20, but index.factory: IVF64,Flat .*use Flat"),
        ("train", {"index_refresh_steps": -1}, "train.index_refresh_steps:.*greater than or equal to 0"),
        ("train", {"context_encoder_learning_rate": 0}, "train.context_encoder_learning_rate:.*greater than 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path, section, changes, says):
    values = yaml.safe_load(SHIPPED)
    values["train"]["index_refresh_steps"] = 20
    assert load(tmp_path, yaml.safe_dump(values)).train.index_refresh_steps == 20
    values[section] |= changes
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path, yaml.safe_dump(values))
    assert "\n" not in str(error.value)


def test_averaging_and_several_processes_are_refused(tmp_path):
    values = yaml.safe_load(SHIPPED)
    values["train"]["index_refresh_steps"] = 20
    values["recipes"]["new"]["marginalization"] = "average"
    with pytest.raises(ValueError, match=r"20, but recipes.new.marginalization: average .*use sequence or token"):
        load(tmp_path, yaml.safe_dump(values))
    check_ranks(20, 1)
    check_ranks(0, 4)
    with pytest.raises(ValueError, match="train.index_refresh_steps: 20, but 4 processes.*runtime.processes: 1"):
        check_ranks(20, 4)


def test_a_copy_for_the_background_shares_no_weight():
    rag = refreshing_rag()
    frozen = rag.passage_encoder.frozen()
    assert not frozen.encoder.model.training and not any(p.requires_grad for p in frozen.encoder.model.parameters())
    before = frozen.index().vectors.clone()
    with torch.no_grad():
        for parameter in rag.context_encoder.parameters():
            parameter.add_(1.0)
    assert torch.equal(frozen.index().vectors, before)
    assert replace(frozen.encoder, model=None) == replace(rag.passage_encoder.encoder, model=None)
