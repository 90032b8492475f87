"""Decoding against references that share no code with it: enumeration and beam search in plain Python, in
float64 without padding and caches, and transformers' own beam search and RAG-Token."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RagConfig,
    RagTokenForGeneration,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutput

from stages.evaluation import beam_search as searching
from stages.evaluation import rescoring
from stages.evaluation.decoding import generate
from stages.evaluation.states import start
from stages.generation.generator import generator_from, load_generator

BOS, PAD, EOS, UNK = 0, 1, 2, 3
CAUSAL = ("gpt2", "llama")
FAMILIES = ["bart", "t5", *CAUSAL]


def tiny_generator(folder, family, words, spread=0.5):
    """A random generator over four special tokens and some words, saved and loaded."""
    vocab = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNK} | {f"w{i}": 4 + i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    ids = dict(vocab_size=len(vocab), pad_token_id=PAD, eos_token_id=EOS)
    if family == "gpt2":
        config = GPT2Config(**ids, bos_token_id=BOS, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    elif family == "llama":
        layers = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32)
        config = LlamaConfig(**ids, **layers, bos_token_id=BOS, hidden_size=16, max_position_embeddings=32)
    elif family == "bart":
        heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, forced_eos_token_id=None)
        layers = dict(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
        start = dict(bos_token_id=BOS, decoder_start_token_id=BOS)
        config = BartConfig(**ids, **heads, **layers, **start, d_model=16, max_position_embeddings=32)
    else:
        layers = dict(num_layers=2, num_heads=2, d_kv=8, d_ff=16)
        config = T5Config(**ids, **layers, d_model=16, decoder_start_token_id=PAD)
    auto_class = AutoModelForCausalLM if family in CAUSAL else AutoModelForSeq2SeqLM
    model = auto_class.from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, spread)
    model.save_pretrained(folder)
    return load_generator(str(folder))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of generators that half learned to copy the first one to three words of a context. Unlike
    random ones they end their answers, and what they say depends on the context and on what they said."""
    folders = {}
    for family, words in itertools.product(FAMILIES, [2, 12]):
        folder = folders[family, words] = tmp_path_factory.mktemp(family)
        generator = tiny_generator(folder, family, words, spread=0.2)
        optimizer = torch.optim.Adam(generator.model.parameters(), lr=0.01)
        for step in range(80):
            input_ids, mask, _ = (tensor.flatten(0, 1) for tensor in questions(generator, 16, 2, seed=step))
            lengths = 1 + input_ids[:, 0] % 3
            targets = torch.nn.functional.pad(input_ids[:, :3], (0, 1), value=EOS)
            targets[torch.arange(4) >= lengths[:, None]] = EOS
            counted = torch.arange(4) <= lengths[:, None]
            logits = generator.logits(generator.encode(input_ids, mask), targets)
            torch.nn.functional.cross_entropy(logits[counted], targets[counted]).backward()
            optimizer.step()
            optimizer.zero_grad()
        generator.model.save_pretrained(folder)
    return folders


@pytest.fixture
def small(family, trained):
    """Six tokens in all, so that every answer can be enumerated: 156 of up to four tokens."""
    return load_generator(str(trained[family, 2]))


@pytest.fixture
def medium(family, trained):
    return load_generator(str(trained[family, 12]))


def questions(generator, n_questions, n_docs, seed=1):
    """Contexts of 2 to 7 tokens, padded on the right, and a log prior that is far from uniform."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (n_questions, n_docs, 1), generator=random)
    mask = torch.arange(7) < lengths
    vocab = generator.model.config.vocab_size
    input_ids = torch.randint(UNK, vocab, mask.shape, generator=random).masked_fill(~mask, PAD)
    return input_ids, mask.long(), torch.randn(n_questions, n_docs, generator=random).log_softmax(1)


def run(generator, batch, num_beams, max_answer_tokens, decoding="thorough", marginalization="sequence", merge=False):
    return generate(
        generator,
        *batch,
        num_beams=num_beams,
        max_answer_tokens=max_answer_tokens,
        decoding=decoding,
        marginalization=marginalization,
        merge=merge,
    )


class Reference:
    """log p(y_t | y_<t, x, z) in float64 for the passages of one question."""

    def __init__(self, generator, input_ids, mask):
        self.model = copy.deepcopy(generator.model).double()
        self.prefix = generator.decoder_prefix if generator.model.config.is_encoder_decoder else None
        self.contexts = [ids[real.bool()][None] for ids, real in zip(input_ids, mask, strict=True)]
        self.known = {}

    @torch.no_grad()
    def read(self, prefixes):
        """Compute what `next_tokens` says to some prefixes of one length, under every passage."""
        if not (prefixes := [tokens for tokens in prefixes if (0, tokens) not in self.known]):
            return
        fed = torch.tensor([(self.prefix or []) + list(tokens) for tokens in prefixes], dtype=torch.long)
        for doc, context in enumerate(self.contexts):
            read = context.expand(len(fed), -1)
            if self.prefix is None:
                logits = self.model(input_ids=torch.cat([read, fed], dim=1)).logits[:, -1]
            else:
                logits = self.model(input_ids=read, decoder_input_ids=fed).logits[:, -1]
            for tokens, log_probs in zip(prefixes, logits.log_softmax(-1).tolist(), strict=True):
                self.known[doc, tokens] = log_probs

    def next_tokens(self, doc, tokens):
        """The distribution after `tokens`: a list of V log-probabilities."""
        if (doc, tokens) not in self.known:
            self.read([tokens])
        return self.known[doc, tokens]

    def log_prob(self, doc, answer):
        return sum(self.next_tokens(doc, answer[:t])[token] for t, token in enumerate(answer))

    def marginal_next(self, prior, tokens):
        docs = [self.next_tokens(doc, tokens) for doc in range(len(prior))]
        return [logsumexp(p + d[v] for p, d in zip(prior, docs, strict=True)) for v in range(len(docs[0]))]


def logsumexp(values):
    values = list(values)
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values)) if top > -math.inf else top


def beam_search(next_tokens, read, num_beams, max_answer_tokens):
    """Textbook beam search that never stops early: the best finished (tokens, score), best first.

    `read` is told what will be asked next, which is faster than one by one.
    """
    live, finished = [((), 0.0)], []
    for step in range(max_answer_tokens):
        read([tokens for tokens, _ in live])
        options = [
            (tokens + (token,), score + log_prob)
            for tokens, score in live
            for token, log_prob in enumerate(next_tokens(tokens))
            if token == EOS or step < max_answer_tokens - 1
        ]
        options.sort(key=lambda option: -option[1])
        finished += [option for option in options[:num_beams] if option[0][-1] == EOS]
        finished = sorted(finished, key=lambda option: -option[1])[:num_beams]
        live = [option for option in options if option[0][-1] != EOS][:num_beams]
    return finished


def all_answers(reference, vocab, max_answer_tokens):
    """Every answer of at most max_answer_tokens with its EOS; the reference reads them on the way."""
    words = [token for token in range(vocab) if token != EOS]
    answers = []
    for length in range(max_answer_tokens):
        prefixes = list(itertools.product(words, repeat=length))
        reference.read(prefixes)
        answers += [tokens + (EOS,) for tokens in prefixes]
    return answers


def check(answer, tokens, log_prob, doc_log_probs, max_answer_tokens):
    assert answer.token_ids == list(tokens[:-1])
    assert answer.log_prob == pytest.approx(log_prob, abs=1e-4)
    assert answer.doc_log_probs == pytest.approx(doc_log_probs, abs=1e-4)
    assert answer.finished == (len(tokens) < max_answer_tokens)


@pytest.mark.parametrize("max_answer_tokens", [1, 3, 4])
def test_thorough_finds_the_most_probable_of_all_answers(small, max_answer_tokens):
    batch = questions(small, 4, 3)
    answers = run(small, batch, 156, max_answer_tokens)
    for answer, input_ids, mask, prior in zip(answers, *batch, strict=True):
        reference, prior = Reference(small, input_ids, mask), prior.tolist()
        candidates = all_answers(reference, 6, max_answer_tokens)
        docs = {y: [p + reference.log_prob(z, y) for z, p in enumerate(prior)] for y in candidates}
        best = max(candidates, key=lambda y: logsumexp(docs[y]))
        check(answer, best, logsumexp(docs[best]), docs[best], max_answer_tokens)


def first_word(text):
    """In place of normalising: many candidates are then alike."""
    return text.partition(" ")[0]


@pytest.mark.parametrize(("num_beams", "decoding"), [(156, "thorough"), (4, "thorough"), (4, "fast")])
def test_merged_candidates_are_one_answer_with_the_probability_of_all(small, num_beams, decoding, monkeypatch):
    """Against sums over all candidates, every one scored under every passage that may speak for it: nothing is pruned."""
    monkeypatch.setattr("stages.evaluation.decoding.normalize_answer", first_word)
    batch = questions(small, 8, 3, seed=2)
    answers = run(small, batch, num_beams, 3, decoding, merge=True)
    alone = run(small, batch, num_beams, 3, decoding)
    changed = 0
    for answer, single, input_ids, mask, prior in zip(answers, alone, *batch, strict=True):
        reference, prior = Reference(small, input_ids, mask), prior.tolist()
        found = [dict(beam_search(partial(reference.next_tokens, z), reference.read, num_beams, 3)) for z in range(3)]
        docs = {
            y: [
                p + reference.log_prob(z, y) if decoding == "thorough" or y in found[z] else -math.inf
                for z, p in enumerate(prior)
            ]
            for y in dict.fromkeys(y for some in found for y in some)
        }
        alike = {}
        for y in docs:
            alike.setdefault(first_word(small.decode(list(y[:-1]))) or y, []).append(y)
        best = max(alike.values(), key=lambda some: logsumexp(logsumexp(docs[y]) for y in some))
        assert tuple(answer.token_ids) == max(best, key=lambda y: logsumexp(docs[y]))[:-1]
        per_doc = [logsumexp(docs[y][z] for y in best) for z in range(3)]
        assert answer.doc_log_probs == pytest.approx(per_doc, abs=1e-4)
        assert answer.log_prob == pytest.approx(logsumexp(per_doc), abs=1e-4) and answer.log_prob >= single.log_prob
        changed += answer.log_prob > single.log_prob + 1e-3
    assert changed


def test_rag_token_finds_the_most_probable_of_all_answers(small):
    batch = questions(small, 4, 3)
    answers = run(small, batch, 156, 4, marginalization="token")
    for answer, input_ids, mask, prior in zip(answers, *batch, strict=True):
        reference, prior = Reference(small, input_ids, mask), prior.tolist()
        candidates = all_answers(reference, 6, 4)
        score = {y: sum(reference.marginal_next(prior, y[:t])[token] for t, token in enumerate(y)) for y in candidates}
        best = max(candidates, key=score.get)
        docs = [p + reference.log_prob(z, best) for z, p in enumerate(prior)]
        check(answer, best, score[best], docs, 4)


def test_rag_token_merges_what_its_search_found(small, monkeypatch):
    monkeypatch.setattr("stages.evaluation.decoding.normalize_answer", first_word)
    batch = questions(small, 6, 3)
    merged = run(small, batch, 156, 3, marginalization="token", merge=True)
    for answer, input_ids, mask, prior in zip(merged, *batch, strict=True):
        reference, prior = Reference(small, input_ids, mask), prior.tolist()
        alike = {}
        for y in all_answers(reference, 6, 3):
            score = sum(reference.marginal_next(prior, y[:t])[token] for t, token in enumerate(y))
            alike.setdefault(first_word(small.decode(list(y[:-1]))) or y, {})[y] = score
        best = max(alike.values(), key=lambda some: logsumexp(some.values()))
        assert tuple(answer.token_ids) == max(best, key=best.get)[:-1]
        assert answer.log_prob == pytest.approx(logsumexp(best.values()), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [2, 4])
def test_every_finished_hypothesis_equals_plain_python(medium, num_beams):
    input_ids, mask, prior = questions(medium, 6, 1)
    state = start(medium, medium.encode(input_ids[:, 0], mask[:, 0]))
    first = state.first()
    found = searching.beam_search(medium, state, first, torch.zeros_like(prior), num_beams, 8)
    for row, hypotheses in enumerate(found):
        reference = Reference(medium, input_ids[row], mask[row])
        expected = dict(beam_search(partial(reference.next_tokens, 0), reference.read, num_beams, 8))
        assert list(hypotheses) == list(expected)
        assert list(hypotheses.values()) == pytest.approx(list(expected.values()), abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beam_search_rag_sequence_equals_plain_python(medium, num_beams):
    batch = questions(medium, 5, 3)
    fast = run(medium, batch, num_beams, 6, decoding="fast")
    thorough = run(medium, batch, num_beams, 6)
    for row, (input_ids, mask, prior) in enumerate(zip(*batch, strict=True)):
        reference, prior = Reference(medium, input_ids, mask), prior.tolist()
        found = [
            dict(beam_search(partial(reference.next_tokens, z), reference.read, num_beams, 6))
            for z in range(len(prior))
        ]
        union = set().union(*found)
        docs = {y: [p + f.get(y, -math.inf) for p, f in zip(prior, found, strict=True)] for y in union}
        best = max(union, key=lambda y: logsumexp(docs[y]))
        check(fast[row], best, logsumexp(docs[best]), docs[best], 6)

        docs = {y: [p + reference.log_prob(z, y) for z, p in enumerate(prior)] for y in union}
        best = max(union, key=lambda y: logsumexp(docs[y]))
        check(thorough[row], best, logsumexp(docs[best]), docs[best], 6)
        assert thorough[row].log_prob >= fast[row].log_prob - 1e-4
    assert any(-math.inf in answer.doc_log_probs for answer in fast), "the two modes should differ here"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beam_search_rag_token_equals_plain_python(medium, num_beams):
    batch = questions(medium, 5, 3)
    answers = run(medium, batch, num_beams, 6, marginalization="token")
    assert answers == run(medium, batch, num_beams, 6, decoding="fast", marginalization="token")
    for answer, input_ids, mask, prior in zip(answers, *batch, strict=True):
        reference, prior = Reference(medium, input_ids, mask), prior.tolist()
        best, score = beam_search(
            partial(reference.marginal_next, prior),
            reference.read,
            num_beams,
            6,
        )[0]
        docs = [p + reference.log_prob(z, best) for z, p in enumerate(prior)]
        check(answer, best, score, docs, 6)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_one_passage_gives_the_generators_own_beam_search(medium, num_beams):
    input_ids, mask, prior = questions(medium, 12, 1)
    ours = run(medium, (input_ids, mask, prior), num_beams, 12)
    if medium.model.config.is_encoder_decoder:
        rules = library_rules(medium, num_beams, max_answer_tokens=12)
        theirs = medium.model.generate(input_ids[:, 0], attention_mask=mask[:, 0], generation_config=rules).tolist()
    else:
        theirs = []
        for ids, real in zip(input_ids[:, 0], mask[:, 0].bool(), strict=True):
            rules = library_rules(medium, num_beams, max_answer_tokens=12, prompt=int(real.sum()))
            [whole] = medium.model.generate(ids[real][None], generation_config=rules).tolist()
            theirs.append(whole[int(real.sum()) - 1 :])
    assert compare(ours, theirs, 12) >= 8


@pytest.mark.parametrize("num_beams", [1, 4])
def test_rag_token_equals_transformers(trained, family, num_beams):
    if family in CAUSAL:
        return  # transformers' RAG is for encoder-decoder models alone; enumeration and plain Python stand for it above
    medium = load_generator(str(trained[family, 12]))
    batch = input_ids, mask, prior = questions(medium, 12, 3)
    ours = run(medium, batch, num_beams, 12, marginalization="token")
    encoder = BertModel(BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    config = RagConfig.from_question_encoder_generator_configs(
        encoder.config, medium.model.config, n_docs=3, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS
    )
    model = RagTokenForGeneration(config, question_encoder=encoder, generator=medium.model).eval()
    theirs = model.generate(
        context_input_ids=input_ids.flatten(0, 1),
        context_attention_mask=mask.flatten(0, 1),
        doc_scores=prior,
        n_docs=3,
        generation_config=library_rules(medium, num_beams, max_answer_tokens=12),
    )
    assert compare(ours, theirs.tolist(), 12) >= 8


def library_rules(generator, num_beams, max_answer_tokens, prompt=1):
    """transformers' generation without its extras: no length penalty, nothing forced, our prefix."""
    return GenerationConfig(
        num_beams=num_beams,
        length_penalty=0.0,
        early_stopping=False,
        do_sample=False,
        max_length=prompt + max_answer_tokens,
        decoder_start_token_id=generator.decoder_prefix[0] if generator.model.config.is_encoder_decoder else None,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


def compare(ours, theirs, max_answer_tokens):
    """Compare what ended by itself in both (at the limit transformers counts no EOS); how many that were."""
    compared = 0
    for answer, (_, *tokens) in zip(ours, theirs, strict=True):
        if EOS in tokens[: max_answer_tokens - 1] and answer.finished:
            assert answer.token_ids == tokens[: tokens.index(EOS)]
            compared += 1
    return compared


MODES = [("thorough", "sequence"), ("fast", "sequence"), ("thorough", "token")]


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_its_questions_one_at_a_time(medium, mode):
    batch = questions(medium, 6, 3)
    together = run(medium, batch, 3, 6, *mode)
    for row, answer in enumerate(together):
        input_ids, mask, prior = (tensor[row : row + 1] for tensor in batch)
        longest = mask.sum(-1).max()
        [alone] = run(medium, (input_ids[..., :longest], mask[..., :longest], prior), 3, 6, *mode)
        check(answer, (*alone.token_ids, EOS), alone.log_prob, alone.doc_log_probs, 6)
        assert answer.text == alone.text == " ".join(f"w{i - 4}" for i in answer.token_ids if i > UNK)
    assert len({answer.text for answer in together}) > 1


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_passage_contributes_nothing(medium, family, mode, monkeypatch):
    input_ids, mask, prior = questions(medium, 4, 3)
    # Whatever stands in its place: nothing but padding, and states that are not even numbers.
    if family in CAUSAL:
        reading = []
        encode = medium.encode
        monkeypatch.setattr(medium, "encode", lambda *batch: (reading.append(True), encode(*batch))[1])

        def spoil(_, given, states):  # of prompts, which are read first, not of answers
            return states.masked_fill((given[0] == UNK)[..., None], math.nan) if reading and reading.pop() else states

        medium.model.get_input_embeddings().register_forward_hook(spoil)
    else:
        encoder = medium.model.get_encoder()
        encoder.embed_tokens = copy.deepcopy(encoder.embed_tokens)
        with torch.no_grad():
            encoder.embed_tokens.weight[UNK] = math.nan
    input_ids[input_ids == UNK] = UNK + 1
    input_ids[0, 1], mask[0, 1], prior[0, 1] = PAD, 0, -math.inf
    input_ids[1, 0], mask[1, 0], prior[1, 0] = UNK, 1, -math.inf
    input_ids[1, 2], mask[1, 2], prior[1, 2] = UNK, 1, -math.inf
    answers = run(medium, (input_ids, mask, prior), 3, 6, *mode)
    for row, answer in enumerate(answers):
        there = prior[row] > -math.inf
        [alone] = run(medium, [tensor[row, there][None] for tensor in (input_ids, mask, prior)], 3, 6, *mode)
        assert not any(math.isnan(p) for p in answer.doc_log_probs)
        assert all(p == -math.inf for p, t in zip(answer.doc_log_probs, there, strict=True) if not t)
        present = [p for p, t in zip(answer.doc_log_probs, there, strict=True) if t]
        check(alone, (*answer.token_ids, EOS), answer.log_prob, present, 6)

    input_ids[2], mask[2] = UNK, 1
    with pytest.raises(ValueError, match="the generator's probabilities are not finite"):
        run(medium, (input_ids, mask, prior), 3, 6, *mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_at_the_limit_pays_for_its_eos(tmp_path, mode):
    generator = tiny_generator(tmp_path, "bart", words=6)
    generator.model.final_logits_bias[0, EOS] = -30.0
    batch = questions(generator, 2, 2)
    for answer, input_ids, mask, prior in zip(run(generator, batch, 2, 3, *mode), *batch, strict=True):
        reference = Reference(generator, input_ids, mask)
        assert len(answer.token_ids) == 2 and not answer.finished
        tokens = (*answer.token_ids, EOS)
        docs = [p + reference.log_prob(z, tokens) for z, p in enumerate(prior.tolist())]
        spoken = [d for d, found in zip(docs, answer.doc_log_probs, strict=True) if found > -math.inf]
        assert [d for d in answer.doc_log_probs if d > -math.inf] == pytest.approx(spoken, abs=1e-3)
        assert answer.log_prob < -20


def test_rescoring_in_small_chunks_changes_nothing(medium, monkeypatch):
    batch = questions(medium, 4, 3)
    whole = run(medium, batch, 3, 6)
    monkeypatch.setattr(rescoring, "LOGITS_AT_ONCE", 1)
    for answer, one_by_one in zip(whole, run(medium, batch, 3, 6), strict=True):
        check(one_by_one, (*answer.token_ids, EOS), answer.log_prob, answer.doc_log_probs, 6)


@pytest.mark.parametrize("mode", MODES)
def test_a_context_is_encoded_and_projected_once(medium, family, mode):
    encoded, projected = [], []
    if family in CAUSAL:
        medium.model.get_input_embeddings().register_forward_hook(lambda *call: encoded.append(call[1][0].shape))
        batch = questions(medium, 4, 3)
        run(medium, batch, 3, 6, *mode)
        if family == "llama":  # without padding, and all rows in one
            assert encoded[0] == (int(batch[1].sum()),) and max(encoded[1:6]) <= (4 * 3 * 3,)
            return
        assert encoded[0] == (4 * 3, 7), "prompts"
        assert all(width == 1 for _, width in encoded[1:7]) and all(width < 6 for _, width in encoded[1:]), "answers"
        return
    decoder = medium.model.get_decoder()
    attention = decoder.layers[0].encoder_attn if family == "bart" else decoder.block[0].layer[1].EncDecAttention
    keys = attention.k_proj if family == "bart" else attention.k
    keys.register_forward_hook(lambda *call: projected.append(len(call[2])))
    batch = questions(medium, 4, 3)
    if family == "bart":  # without padding: its real tokens alone go through the layers
        medium.model.get_encoder().layers[0].fc1.register_forward_hook(lambda *call: encoded.append(len(call[2])))
        expected = int(batch[1].sum())
    else:
        medium.model.get_encoder().register_forward_hook(lambda *call: encoded.append(len(call[2][0])))
        expected = 4 * 3
    run(medium, batch, 3, 6, *mode)
    assert encoded == [expected] and projected == [4 * 3]


def test_decoding_stops_when_every_question_is_answered(medium, family):
    batch = questions(medium, 12, 3)
    greedy = run(medium, batch, 1, 30, marginalization="token")
    short = [row for row, answer in enumerate(greedy) if len(answer.token_ids) < 5]
    calls = []
    bart = family == "bart"  # whose decoder takes the head's weights, not the head
    last = medium.model.get_decoder().layers[-1].fc2 if bart else medium.model.get_output_embeddings()
    last.register_forward_hook(lambda *call: calls.append(call))
    answers = run(medium, [tensor[short] for tensor in batch], 1, 30, marginalization="token")
    longest = max(len(answer.token_ids) for answer in answers)
    # The prefix, every token of the longest answer, and once more for the passages' shares.
    assert len(short) > 3 and longest > 0 and len(calls) == 1 + longest + 1


def test_the_generator_must_be_in_eval_mode(medium):
    medium.model.train()
    with pytest.raises(AssertionError, match="eval"):
        run(medium, questions(medium, 1, 1), 1, 2)


def test_a_wrapped_model_decodes_alike(medium):
    batch = questions(medium, 2, 2)
    assert run(generator_from(medium.model, medium.tokenizer), batch, 2, 4) == run(medium, batch, 2, 4)


def test_what_normalises_to_the_same_is_merged_and_to_nothing_is_not(tmp_path):
    generator = tiny_generator(tmp_path, "llama", 2)
    batch = questions(generator, 6, 2)
    alone = run(generator, batch, 40, 2)
    generator.decode = lambda ids: ("The", "a", "")[sum(ids) % 3]  # articles alone: nothing is left of any
    assert [answer.log_prob for answer in run(generator, batch, 40, 2, merge=True)] == [one.log_prob for one in alone]
    generator.decode = lambda ids: (
        "the Nile" if sum(ids) % 2 else "nile."
    )  # and here all are one answer, which is certain
    merged = run(generator, batch, 40, 2, merge=True)
    for answer, input_ids, mask, prior in zip(merged, *batch, strict=True):
        reference = Reference(generator, input_ids, mask)
        every = all_answers(reference, 6, 2)
        total = logsumexp(p + reference.log_prob(z, y) for z, p in enumerate(prior.tolist()) for y in every)
        assert answer.log_prob == pytest.approx(total, abs=1e-4)


def decode_together(generator, batch, num_beams, max_answer_tokens, **options):
    """As Rag.joined hands over: the states of all passages, or one prompt of them."""
    there = batch[2] > -math.inf

    def joined(contexts):
        if generator.model.config.is_encoder_decoder:
            contexts.mask = contexts.mask * there.flatten()[:, None]
            return contexts.joined(there.shape[1])
        rows = prompts(batch)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        return generator.encode(ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long())

    return generate(
        generator, *batch, num_beams=num_beams, max_answer_tokens=max_answer_tokens, decoding="thorough",
        marginalization="sequence", joined=joined, **options,
    )  # fmt: skip


def prompts(batch):
    kept = batch[1].bool() & (batch[2] > -math.inf)[..., None]
    return [ids[real] for ids, real in zip(batch[0], kept, strict=True)]


def with_missing(batch):
    """One passage of the first question and two of the second are missing."""
    for row, doc in ((0, 1), (1, 0), (1, 2)):
        batch[2][row, doc] = -math.inf
    return batch


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 4])
def test_reading_together_is_transformers_own_search_over_the_joint_context(medium, num_beams):
    batch = with_missing(questions(medium, 12, 3, seed=4))
    ours, theirs, probable = decode_together(medium, batch, num_beams, 10), [], []
    for row, given in enumerate(ours):
        answered = torch.tensor([[*given.token_ids, EOS]])
        if medium.model.config.is_encoder_decoder:
            contexts = [
                ids[real.bool()] for ids, real, p in zip(*(part[row] for part in batch), strict=True) if p > -99
            ]
            encoder = medium.model.get_encoder()
            states = torch.cat([encoder(ids[None]).last_hidden_state for ids in contexts], dim=1)
            joint = dict(
                encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=torch.ones(states.shape[:2])
            )
            fed = torch.cat([medium.prefix(1, states.device), answered[:, :-1]], dim=1)
            logits = medium.model(**joint, decoder_input_ids=fed).logits
            [found] = medium.model.generate(**joint, generation_config=library_rules(medium, num_beams, 10)).tolist()
        else:
            prompt = prompts(batch)[row]
            rules = library_rules(medium, num_beams, 10, prompt=len(prompt))
            logits = medium.model(torch.cat([prompt[None], answered[:, :-1]], dim=1)).logits[:, len(prompt) - 1 :]
            [found] = medium.model.generate(prompt[None], generation_config=rules).tolist()
            found = found[len(prompt) - 1 :]
        theirs.append(found)
        probable.append(logits[0].log_softmax(-1).gather(1, answered.T).sum().item())
    assert compare(ours, theirs, 10) >= 8
    assert [given.log_prob for given in ours] == pytest.approx(probable, abs=1e-4)


def test_reading_together_each_passage_alone_says_how_likely_the_answer_is(medium):
    batch = with_missing(questions(medium, 5, 3, seed=5))
    for given, input_ids, mask, prior in zip(decode_together(medium, batch, 3, 6), *batch, strict=True):
        reference = Reference(medium, input_ids, mask)
        tokens = (*given.token_ids, EOS)
        alone = [p + reference.log_prob(z, tokens) if p > -math.inf else p for z, p in enumerate(prior.tolist())]
        assert given.doc_log_probs == pytest.approx(alone, abs=1e-4)


def test_reading_together_what_reads_alike_is_one_answer_with_the_probability_of_all(medium, monkeypatch):
    monkeypatch.setattr("stages.evaluation.decoding.normalize_answer", lambda text: "one")
    batch = questions(medium, 6, 3, seed=6)
    merged, single = decode_together(medium, batch, 4, 6, merge=True), decode_together(medium, batch, 4, 6)
    for one, other in zip(merged, single, strict=True):
        assert one.token_ids == other.token_ids
        assert one.log_prob > other.log_prob + 1e-4 and max(one.doc_log_probs) > max(other.doc_log_probs)


def test_reading_together_a_batch_equals_its_questions_one_at_a_time(medium):
    batch = with_missing(questions(medium, 6, 3, seed=7))
    for row, given in enumerate(decode_together(medium, batch, 3, 6)):
        [alone] = decode_together(medium, [part[row : row + 1] for part in batch], 3, 6)
        check(given, (*alone.token_ids, EOS), alone.log_prob, alone.doc_log_probs, 6)


def test_one_passage_read_together_is_that_passage_alone(medium):
    batch = questions(medium, 6, 1, seed=8)
    for one, other in zip(decode_together(medium, batch, 3, 6), run(medium, batch, 3, 6), strict=True):
        check(one, (*other.token_ids, EOS), other.log_prob, other.doc_log_probs, 6)
