"""The sampler draws what the model says: the same tokens as `generate` when greedy, the right frequencies when not,
and the same completions whatever the slots, the order and the company."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tests.models import tiny
from tests.models_made import make_tokenizer
from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling, closed, filtered, groups
from trueup.models.net import Net
from trueup.records import Completion

PROMPTS = [[7, 8, 9, 10, 11], [12], [13, 14, 15, 16, 17, 18, 19, 20, 21], [22, 23, 24], [25, 26], [27] * 7]


def words(ids: list[int]) -> str:
    """Token n as the letter of its number, two tokens a letter."""
    return "".join(chr(97 + i % 26) for i in ids)


def sampler(model: PreTrainedModel, slots: int = 4) -> Sampler:
    return Sampler(model, end_id=tiny.END, pad_id=tiny.PAD, decode=words, slots=slots)


def eager_for_the_end(model: PreTrainedModel, likely: float = 2.0) -> PreTrainedModel:
    """The same model with an end token that comes now and then."""
    head = model.get_output_embeddings()
    bias = torch.zeros(tiny.VOCAB)
    bias[tiny.END] = likely
    head.bias = torch.nn.Parameter(bias)
    return model


@pytest.mark.parametrize("name", tiny.ALL)
def test_greedy_is_generate(name: str) -> None:
    plain = eager_for_the_end(tiny.policy(name))
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=tiny.END, pad_token_id=tiny.PAD)
    want = [
        plain.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), generation_config=settings)[0, len(p) :]
        for p in PROMPTS
    ]
    got = sampler(eager_for_the_end(tiny.policy(name))).sample(PROMPTS, Sampling(max_tokens=12, greedy=True), seed=0)
    assert [list(c.ids) for c in got] == [w.tolist() for w in want]
    assert [c.stop for c in got] == ["eos" if w[-1] == tiny.END else "length" for w in want]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", tiny.ALL)
def test_logprobs_equal_a_plain_forward(name: str, temperature: float) -> None:
    model = eager_for_the_end(tiny.policy(name))
    settings = Sampling(max_tokens=12, temperature=temperature, top_k=20, top_p=0.9)
    done = sampler(model).sample(PROMPTS, settings, seed=1)
    plain = eager_for_the_end(tiny.policy(name))
    for prompt, completion in zip(PROMPTS, done, strict=True):
        ids = torch.tensor(prompt + list(completion.ids))
        mask = torch.arange(len(ids)) >= len(prompt)
        batch = {"ids": ids[None], "lengths": torch.tensor([len(ids)]), "mask": mask[None]}
        want = tiny.plain_logprobs(plain, batch, temperature)[0, len(prompt) :]
        assert (want - torch.tensor(completion.logprobs)).abs().max() < 1e-5


def test_the_training_path_agrees() -> None:
    """What PPO rests on: the log-probs of sampling and of the learner's forward are the same numbers."""
    model = tiny.policy()
    done = sampler(model).sample(PROMPTS, Sampling(max_tokens=10, temperature=0.8), seed=1)
    rows = [p + list(c.ids) for p, c in zip(PROMPTS, done, strict=True)]
    lengths = torch.tensor([len(r) for r in rows])
    width = int(lengths.max())
    start = torch.tensor([len(p) for p in PROMPTS])[:, None]
    column = torch.arange(width)[None]
    batch = {
        "ids": torch.tensor([r + [0] * (width - len(r)) for r in rows]),
        "lengths": lengths,
        "mask": (column >= start) & (column < lengths[:, None]),
    }
    with torch.no_grad():
        out = Net(model, "policy", temperature=0.8)(batch)["logprobs"]
    want = [out[b, len(p) : n].tolist() for b, (p, n) in enumerate(zip(PROMPTS, lengths.tolist(), strict=True))]
    for a, c in zip(want, done, strict=True):
        assert a == pytest.approx(c.logprobs, abs=1e-5)


def many() -> tuple[list[list[int]], Sampling]:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(1, tiny.VOCAB, generator.integers(1, 12)).tolist() for _ in range(23)]
    return prompts, Sampling(max_tokens=14)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_slots_and_order_do_not_matter(name: str) -> None:
    model = eager_for_the_end(tiny.policy(name))
    prompts, settings = many()
    want = sampler(model, 23).sample(prompts, settings, seed=5, step=3)
    assert {c.stop for c in want} == {"eos", "length"}
    for slots in (1, 2, 7, 64):
        got = sampler(model, slots).sample(prompts, settings, seed=5, step=3)
        assert [c.ids for c in got] == [c.ids for c in want], slots
        assert all(a.logprobs == pytest.approx(b.logprobs, abs=1e-5) for a, b in zip(got, want, strict=True))
    order = np.random.default_rng(1).permutation(len(prompts)).tolist()
    got = sampler(model, 5).sample([prompts[i] for i in order], settings, seed=5, step=3, index=order)
    assert [c.ids for c in got] == [want[i].ids for i in order]
    part = sampler(model, 5).sample(prompts[8:12], settings, seed=5, step=3, index=range(8, 12))
    assert [c.ids for c in part] == [c.ids for c in want[8:12]]


def test_numbers_depend_on_seed_step_and_index() -> None:
    model, settings = tiny.policy(), Sampling(max_tokens=12)
    one = sampler(model)
    draws = [
        tuple(c.ids for c in one.sample([[5, 6]] * 3, settings, seed=seed, step=step, index=index))
        for seed, step, index in [
            (0, 0, None),
            (1, 0, None),
            (0, 1, None),
            (0, 0, [3, 4, 5]),
            (1, 2, None),
            (2, 1, None),
        ]
    ]
    flat = [ids for draw in draws for ids in draw]
    assert len(set(flat)) == len(flat)
    assert draws[0] == tuple(c.ids for c in one.sample([[5, 6]] * 3, settings, seed=0, step=0, index=[0, 1, 2]))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """(X^2 - df) / sqrt(2 df) over cells that expect 5 or more: about standard normal when all is right."""
    big = expected >= 5
    cells = np.append(counts[big], counts[~big].sum()), np.append(expected[big], expected[~big].sum())
    keep = cells[1] >= 5
    x2 = float(((cells[0][keep] - cells[1][keep]) ** 2 / cells[1][keep]).sum())
    df = int(keep.sum()) - 1
    return (x2 - df) / (2 * df) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_models(temperature: float) -> None:
    """Pairs of tokens after one prompt against their exact probabilities, 6000 draws; the end token ends a pair."""
    count, prompt = 6000, [5, 9, 3]
    model = eager_for_the_end(tiny.policy(), 1.0)
    settings = Sampling(max_tokens=2, temperature=temperature)
    done = sampler(model, 500).sample([prompt] * count, settings, seed=11)
    with torch.no_grad():
        first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1).double()
        rows = torch.tensor([[*prompt, i] for i in range(tiny.VOCAB)])
        second = torch.softmax(model(rows).logits[:, -1] / temperature, -1).double()
    expected = count * first[:, None] * second
    expected[tiny.END] = 0
    expected[tiny.END, 0] = count * first[tiny.END]
    counts = np.zeros((tiny.VOCAB, tiny.VOCAB))
    for c in done:
        counts[c.ids[0], c.ids[1] if len(c.ids) > 1 else 0] += 1
    assert abs(chi_square(counts.sum(1), expected.sum(1).numpy())) < 4
    assert abs(chi_square(counts.ravel(), expected.numpy().ravel())) < 4
    # The check can fail: the same counts against another temperature.
    wrong = count * torch.softmax(first.log() * 1.3, -1)
    assert chi_square(counts.sum(1), wrong.numpy()) > 10


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (5, 0.7), (1, 1.0), (0, 1e-6)])
def test_top_k_and_top_p(top_k: int, top_p: float) -> None:
    count, prompt = 1500, [5, 9, 3]
    model = tiny.policy()
    done = sampler(model, 500).sample([prompt] * count, Sampling(max_tokens=1, top_k=top_k, top_p=top_p), seed=2)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1).double()
    order = p.argsort(descending=True).tolist()
    kept = order[: top_k or None]
    total, nucleus, reached = float(p[kept].sum()), [], 0.0
    for token in kept:
        if reached >= top_p * total:
            break
        nucleus.append(token)
        reached += float(p[token])
    counts = np.bincount([c.ids[0] for c in done], minlength=tiny.VOCAB)
    assert set(np.flatnonzero(counts)) <= set(nucleus)
    if len(nucleus) > 1:
        expected = np.zeros(tiny.VOCAB)
        expected[nucleus] = count * (p[nucleus] / p[nucleus].sum()).numpy()
        assert abs(chi_square(counts, expected)) < 4
    # Log-probs are of the whole distribution all the same.
    assert done[0].logprobs[0] == pytest.approx(float(p[done[0].ids[0]].log()), abs=1e-5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "want"),
    [
        (2, 1.0, [0, 0.4, 0, 0.3]),
        (0, 0.5, [0, 0.4, 0, 0.3]),
        (0, 0.3, [0, 0.4, 0, 0]),
        (3, 0.7, [0, 0.4, 0, 0.3]),  # 0.63 of the 0.9 that top-k leaves
        (9, 1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_filtered_by_hand(top_k: int, top_p: float, want: list[float]) -> None:
    assert filtered(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), top_k, top_p)[0].tolist() == pytest.approx(want)


def scripted(*after: int, vocab: int = tiny.VOCAB) -> PreTrainedModel:
    """A model that says these tokens one after another, by position, whatever it reads, from a prompt of one token."""
    model = tiny.policy("gpt2")
    width = len(after) + 1
    assert width <= 32
    model.transformer.wte = torch.nn.Embedding(vocab, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        head = torch.nn.Linear(32, vocab, bias=False)
        head.weight.zero_()
        for position, token in enumerate(after):
            model.transformer.wpe.weight[position, position] = 1.0
            head.weight[token, position] = 9.0
    model.lm_head = head
    return model


def said(model: PreTrainedModel, prompts: int = 1, **settings: object) -> list[Completion]:
    return sampler(model).sample([[5]] * prompts, Sampling.model_validate({"greedy": True, **settings}), seed=0)


def test_reasons_for_stopping() -> None:
    """Tokens 1 2 3 4 5 are the letters b c d e f."""
    model = scripted(1, 2, 3, 4, 5, tiny.END, 7)
    ended = said(model, max_tokens=20)[0]
    assert (ended.text, ended.stop, ended.ids) == ("bcdef", "eos", (1, 2, 3, 4, 5, tiny.END))
    assert len(ended.logprobs) == 6 and ended.ended
    cut = said(model, max_tokens=3)[0]
    assert (cut.text, cut.stop, cut.ids) == ("bcd", "length", (1, 2, 3)) and not cut.ended
    stopped = said(model, max_tokens=20, stop=("de", "zz"))[0]
    assert (stopped.text, stopped.stop, stopped.ids) == ("bc", "stop", (1, 2, 3, 4)) and stopped.ended
    at_the_limit = said(model, max_tokens=4, stop=("de",))[0]
    assert (at_the_limit.text, at_the_limit.stop) == ("bc", "stop")
    end_at_the_limit = said(model, max_tokens=6)[0]
    assert (end_at_the_limit.text, end_at_the_limit.stop) == ("bcdef", "eos")
    first = said(model, max_tokens=20, stop=("ef", "cd"))[0]
    assert (first.text, first.stop) == ("b", "stop")


def test_the_earliest_stop_string_cuts() -> None:
    """Two that end in the same token: the text stands before the one that begins first."""
    assert said(scripted(1, 2, 3, 4), max_tokens=9, stop=("d", "bcd"))[0].text == ""


def test_stop_strings_far_from_the_start() -> None:
    tokens = [1 + i % 3 for i in range(25)] + [20, 21, 22]
    done = said(scripted(*tokens), max_tokens=40, stop=("uvw",))[0]
    assert done.stop == "stop" and done.text == words(tokens[:25])


@pytest.mark.parametrize(
    "says, stop, text, written",
    [
        (" yes please\nno", "\n", "yes please", "yes please\n"),
        (" yes please \n\nno", "\n\n", "yes please ", "yes please \n\n"),
        (" yes please. no", "e. ", "yes pleas", "yes please. "),
        ("\nUser: no", "\nUser:", "", "\nUser:"),
        (" \n yes please \n", "no", "yes please", "\n yes please \n"),
    ],
)
def test_whitespace_in_stop_strings(mesh: Mesh, says: str, stop: str, text: str, written: str) -> None:
    """The token that ends a stop string is the last, whitespace or not; the space of the template counts as none."""
    chat = Chat(make_tokenizer())
    ids = [t for c in says for t in chat.tokenizer(c)["input_ids"]]
    model = scripted(*ids, chat.end_id, vocab=len(chat.tokenizer))
    one = Sampler.speaking(chat, model, mesh)
    (done,) = one.sample([[5]], Sampling(greedy=True, max_tokens=30, stop=(stop,)), seed=0)
    assert (done.text, chat.decode(done.ids)) == (text, written)
    assert done.stop == ("eos" if stop == "no" else "stop")


def test_answers_of_one_token() -> None:
    assert [(c.text, c.stop, c.ids) for c in said(scripted(tiny.END, 3), 9, max_tokens=8)] == [
        ("", "eos", (tiny.END,))
    ] * 9
    assert [(c.text, c.stop) for c in said(scripted(4, 3), 9, max_tokens=1)] == [("e", "length")] * 9


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_prompts_that_fill_the_context(name: str) -> None:
    """The tiny models hold 64 tokens: a prompt of 62 leaves room for 2, one of 64 or 70 for none."""
    model = eager_for_the_end(tiny.policy(name), -1e9)
    model.config.max_position_embeddings = 64
    prompts = [[5] * 62, [6] * 64, [7, 8], [9] * 70]
    done = sampler(model, 2).sample(prompts, Sampling(max_tokens=6, greedy=True), seed=0)
    assert [len(c.ids) for c in done] == [2, 0, 6, 0]
    assert [c.stop for c in done] == ["length"] * 4 and done[1].text == ""
    assert done[2].ids == sampler(model, 1).sample([[7, 8]], Sampling(max_tokens=6, greedy=True), seed=0)[0].ids


def test_no_prompts_and_an_empty_prompt() -> None:
    one = sampler(tiny.policy())
    assert one.sample([], Sampling(), seed=0) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        one.sample([[3], []], Sampling(), seed=0)


def test_it_sees_new_weights() -> None:
    model = tiny.policy()
    one = sampler(model)
    before = one.sample(PROMPTS, Sampling(max_tokens=8, greedy=True), seed=0)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = one.sample(PROMPTS, Sampling(max_tokens=8, greedy=True), seed=0, version="step-2")
    assert [c.ids for c in before] != [c.ids for c in after]
    assert {c.version for c in after} == {"step-2"}


def test_cost_follows_real_tokens() -> None:
    """Rows that the model decodes, over all steps, are little more than the tokens that come out."""
    model = eager_for_the_end(tiny.policy(), 4.0)
    prompts, _ = many()
    decoded = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: decoded.append(args[0].shape[0]) if args[0].shape[1] == 1 else None
    )
    done = sampler(model, 8).sample(prompts * 4, Sampling(max_tokens=40), seed=0)
    tokens = sum(len(c.ids) for c in done)
    longest = max(len(c.ids) for c in done)
    assert tokens < 0.6 * len(done) * longest  # lengths differ, so that padding to the longest would show
    assert sum(decoded) <= tokens + 8
    assert len(decoded) < 1.6 * tokens / 8


def test_slots_close_and_stay_sorted() -> None:
    """Groups of 8 rows: each row of one is at least as long as each of the next, whichever rows end."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = sorted(generator.integers(1, 99, 32).tolist(), reverse=True)
        while lengths:
            count = len(lengths)
            over = sorted(generator.choice(count, min(count, int(generator.integers(1, 4))), replace=False).tolist())
            place = closed(lengths, over)
            assert sorted(place) == sorted(set(range(count)) - set(over))
            assert sum(slot != row for slot, row in enumerate(place)) <= 4 * len(over)
            lengths = [lengths[row] for row in place]
            parts = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
            assert all(min(a) >= max(b) for a, b in pairwise(parts))


def test_a_hole_is_closed_from_group_to_group() -> None:
    """Three groups, of which the first loses a row: the longest of each of the others moves down."""
    lengths = [90] * 8 + [50, 50, 60, *[50] * 5] + [10, 10, 10, 20, 10]
    place = closed(lengths, [3])
    assert place == [0, 1, 2, 10, *range(4, 10), 19, *range(11, 19), 20]


def test_groups_of_like_length() -> None:
    assert groups([50] * 64) == [(slice(0, 64), 50)]
    assert groups([90] * 8 + [50] * 8 + [45] * 8 + [9] * 4) == [
        (slice(0, 8), 90),
        (slice(8, 24), 50),
        (slice(24, 28), 9),
    ]
    assert groups([7]) == [(slice(0, 1), 7)]


def test_the_same_prompt_goes_through_the_model_once() -> None:
    model, prompts = tiny.policy(), [[5, 6, 7, 8], [9, 10, 11], [12]]
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1]) if args[0].shape[1] > 1 else None
    )
    alone = [
        sampler(model).sample([p], Sampling(max_tokens=6), seed=0, index=[i])[0].ids for i, p in enumerate(prompts * 5)
    ]
    seen.clear()
    together = sampler(model, 15).sample(prompts * 5, Sampling(max_tokens=6), seed=0)
    assert [c.ids for c in together] == alone
    assert seen == [3 + 2] and len(set(alone)) == 15


def test_slots_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 14 tokens of the tiny Llama holds 14 x 2 layers x 2 heads x 8 x keys and values x 4 bytes = 3584."""
    prompts = [[5, 6, 7, 8]] * 9
    settings, widths = Sampling(max_tokens=10), []
    model = tiny.policy()
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape))
    want = sampler(model, 128).sample(prompts, settings, seed=0)
    assert max(shape[0] for shape in widths) == 9
    widths.clear()
    monkeypatch.setattr("trueup.engine.sampler.CACHE_BYTES", 3 * 3584 + 100)
    got = sampler(model, 128).sample(prompts, settings, seed=0)
    assert max(shape[0] for shape in widths) == 3
    assert [c.ids for c in got] == [c.ids for c in want]
