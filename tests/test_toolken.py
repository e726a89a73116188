"Tools as tokens: only rows are learnt, what is learnt comes out again, and answers can always be read"
import dataclasses

import numpy as np, pytest, torch
from hypothesis import given, strategies as st

from sage_paper.calls import Sample, Tool, ToolCall, format_calls, parse_calls
from sage_paper.model import forward, render, tiny_lm
from sage_paper.queries import sageworld_set
from sage_paper.toolken import Toolkens, argument_prompt, arguments_of, call_pieces, contexts, read, start_rows, toolken_loss, write_arguments

PLANS, TIMING = sageworld_set(4, 0, 'planning', 8), sageworld_set(12, 0, 'timing', 8)
TRAIN = [*PLANS.splits['train'], *TIMING.splits['train']]
TOOLS = PLANS.tools | TIMING.tools
NAMES = [t.name for t in TOOLS.values()]
BLIND = [Sample(s.id, s.query, ()) for s in TRAIN]   # without the calls that are asked for


@pytest.fixture(scope='module')
def lm(): return tiny_lm(hidden_size=128)


@pytest.fixture(scope='module')
def learnt(lm): return Toolkens().fit(lm, TRAIN, NAMES, lr=1., epochs=800, batch_size=64)


def follows(samples): return [n for s in samples for n in (*(c.name for c in s.calls), None)]


def test_the_model_is_left_alone_and_the_rows_are_not(lm, learnt):
    fresh = tiny_lm(hidden_size=128).model
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(lm.model.parameters(), fresh.parameters()))
    assert learnt.rows.shape == (len(NAMES), 128) and not torch.equal(learnt.rows, start_rows(lm, NAMES)) and not learnt.rows.requires_grad


def test_the_loss_falls_to_what_frozen_ends_leave(lm, learnt):
    states, end = read(lm, contexts(lm, TRAIN)), torch.tensor([n is None for n in follows(TRAIN)])
    least = ((states.words - states.end)*end).mean().item()
    assert least <= learnt.losses[-1] and learnt.losses[-1] - least < (learnt.losses[0] - least)/4 and len(learnt.losses) == 800


def test_what_was_learnt_is_chosen(lm, learnt):
    right = follows(TRAIN)
    assert {len(s.calls) for s in TRAIN} >= {0, 1, 2} and {*right} > {None}
    assert np.mean([a == b for a, b in zip(learnt.choose(read(lm, contexts(lm, TRAIN))), right)]) > .8


def test_answers_are_lists_of_known_tools(lm, learnt):
    answers = learnt.write(lm, BLIND, TOOLS, max_new_tokens=3, max_calls=4)
    parsed = [parse_calls(a) for a in answers]
    assert len(answers) == len(BLIND) and all(p.clean and format_calls(p.calls) == a for p, a in zip(parsed, answers))
    assert {c.name for p in parsed for c in p.calls} <= {*NAMES} and max(len(p.calls) for p in parsed) <= 4
    begins = [p.calls[0].name if p.calls else None for p in parsed]
    assert np.mean([a == (s.calls[0].name if s.calls else None) for a, s in zip(begins, TRAIN)]) > .8
    for n, p in zip(learnt.n_tokens, parsed): assert len(p.calls) + (len(p.calls) < 4) <= n <= len(p.calls)*(1 + 3) + 1


class Told(Toolkens):
    "Chooses by a list of what comes next for each query, told by how many calls it has read"
    def __init__(self, lm, plans): self.names, self.plans, self.lm = NAMES, plans, lm
    def read_calls(self, text): return next(p for q, p in self.plans.items() if q in text), text.count('"arguments"')


def test_several_calls_one_and_none_come_out_in_order(lm, monkeypatch):
    plans = {'first query': NAMES[:3], 'second query': [], 'third query': NAMES[4:5]}
    told, samples = Told(lm, plans), [Sample(q, q, ()) for q in plans]
    seen = []
    def look(lm, contexts, batch_size=64):
        seen.append([lm.tokenizer.decode(c.ids) for c in contexts])
        return [told.read_calls(t) for t in seen[-1]]
    monkeypatch.setattr('sage_paper.toolken.read', look)
    told.choose = lambda states: [plan[k] if k < len(plan) else None for plan, k in states]
    answers = told.write(lm, samples, TOOLS, max_new_tokens=2)
    assert [[c.name for c in parse_calls(a).calls] for a in answers] == list(plans.values())
    assert [len(s) for s in seen] == [3, 2, 1, 1]   # who has ended is not asked again
    assert seen[2][0].endswith(answers[0][:answers[0].index(',{"name":"' + NAMES[2])])
    assert told.write(lm, samples, TOOLS, max_new_tokens=2, max_calls=2)[0].count('"name"') == 2


def test_what_is_read_in_training_is_what_is_read_in_writing(lm):
    for s in TRAIN:
        whole, grown = contexts(lm, [s])[0], contexts(lm, [s], calls=False)[0]
        for piece in call_pieces(s.calls): grown.grow(lm.tokenizer(piece, add_special_tokens=False)['input_ids'])
        assert whole == grown and len(whole.at) == len(s.calls) + 1
        assert lm.tokenizer.decode(whole.ids) == render(dataclasses.replace(s, candidates=()), lm.tokenizer)[0] + (format_calls(s.calls)[:-1] if s.calls else '')


def test_states_are_the_models_own_in_any_company(lm):
    together = read(lm, contexts(lm, TRAIN), batch_size=5)
    at = 0
    for c in contexts(lm, TRAIN):
        with torch.no_grad(): logits = lm.model(torch.tensor([c.ids])).logits[0, c.at]
        part = slice(at, at := at + len(c.at))
        for own, ours in ((logits.logsumexp(-1), together.words), (logits.max(-1).values, together.best), (logits[:, lm.tokenizer.eos_token_id], together.end)):
            assert torch.allclose(own, ours[part], atol=1e-4)
    assert at == len(together.hidden)


def test_the_rows_gradient_is_that_of_a_softmax_over_words_and_tools(lm):
    states, head = read(lm, contexts(lm, TRAIN[:3])), lm.model.get_output_embeddings().weight.detach()
    n, target = len(head), torch.arange(len(states.hidden)) % (len(NAMES) + 1)
    grads = []
    for fast in (True, False):
        rows = start_rows(lm, NAMES).requires_grad_()
        if fast: loss = toolken_loss(states.hidden @ rows.T, states.words, states.end, target).mean()
        else:
            label = torch.where(target < len(NAMES), n + target, lm.tokenizer.eos_token_id)
            loss = torch.nn.functional.cross_entropy(states.hidden @ torch.cat([head, rows]).T, label)
        loss.backward()
        grads.append((loss.item(), rows.grad))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-4) and torch.allclose(grads[0][1], grads[1][1], atol=1e-5)


def test_equal_seeds_equal_rows(lm):
    a, b, c = (Toolkens().fit(lm, TRAIN, NAMES, lr=.05, epochs=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.rows, b.rows) and a.losses == b.losses and not torch.equal(a.rows, c.rows)


def test_rows_may_start_from_names(lm):
    named = Toolkens().fit(lm, TRAIN, NAMES, epochs=0, start='name')
    ids = lm.tokenizer(NAMES[0], add_special_tokens=False)['input_ids']
    assert torch.allclose(named.rows[0], lm.model.get_output_embeddings().weight[ids].mean(0)) and named.losses == []
    assert named.budget.tokens == 0 and named.budget.scored_tokens == sum(len(c.ids) for c in contexts(lm, TRAIN))


def test_mistakes_are_named(lm, learnt):
    for names, said in ((NAMES[:1], 'not among the names'), ([*NAMES, NAMES[0]], '1 of the names')):
        with pytest.raises(ValueError, match=said): Toolkens().fit(lm, TRAIN, names)
    with pytest.raises(ValueError, match='no samples'): Toolkens().fit(lm, [], NAMES)
    with pytest.raises(ValueError, match='start is'): Toolkens().fit(lm, TRAIN, NAMES, start='ones')
    with pytest.raises(ValueError, match='no document of'): learnt.write(lm, BLIND, dict(list(TOOLS.items())[:1]))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=6)


@given(st.dictionaries(st.text(), JSON), st.text())
def test_arguments_end_where_their_object_does(arguments, rest):
    text = format_calls([ToolCall('', arguments)])[len('[{"name":"","arguments":'):-2]
    assert arguments_of(text + rest) == arguments_of(' \n' + text) == arguments
    assert arguments_of(text[:-1]) == {}


@given(st.text() | st.text(alphabet='{}[]":,\\ 1an'))
def test_any_text_gives_arguments_that_can_be_written(text):
    call = ToolCall('t', arguments_of(text))
    assert parse_calls(format_calls([call])).calls == (call,)


def test_a_model_that_knows_how_writes_its_arguments():
    lm = tiny_lm()
    tools = {'kettle': Tool('kettle', 'Boils'), 'lamp': Tool('lamp', 'Shines')}
    samples = [Sample(k, q, (ToolCall(k, a),)) for k, q, a in (('kettle', 'Tea at 8', {'time': '08:00'}), ('lamp', 'Light', {'on': [{'where': '}'}]}))]
    prompts = [argument_prompt(lm, s, s.id, tools) for s in samples]
    from sage_paper.model import Encoded
    rows = [(lm.tokenizer(p)['input_ids'], lm.tokenizer(format_calls(s.calls)[len(f'[{{"name":"{s.id}","arguments":'):])['input_ids']) for p, s in zip(prompts, samples)]
    batch, opt = lm.collate([Encoded((*p, *a), len(p), 0) for p, a in rows]), torch.optim.AdamW(lm.model.parameters(), lr=5e-3)
    for _ in range(150):
        forward(lm, batch).nll.mean().backward()
        opt.step(); opt.zero_grad()
    written = write_arguments(lm, prompts, 60)
    assert [a for a, _ in written] == [s.calls[0].arguments for s in samples]
    assert [n for _, n in written] == [len(a) - 2 for _, a in rows]   # it stops before the call's brace and the list's
    assert write_arguments(lm, prompts, 5) == [({}, 5), ({}, 5)] and write_arguments(lm, [], 5) == []
    first = Toolkens()
    first.names = ['kettle', 'lamp']
    first.rows = torch.zeros(2, 32)
    first.choose = lambda states: ['kettle', 'lamp'][:len(states.hidden)]
    assert first.write(lm, [dataclasses.replace(s, calls=(), candidates=('x',)) for s in samples], tools, 60, max_calls=1) == [format_calls(s.calls) for s in samples]
    assert first.n_tokens == [1 + n for _, n in written]
