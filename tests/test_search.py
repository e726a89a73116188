"Search: the order of a walk, its limits and its way back are exact; what is found for a query depends on that query alone"
import dataclasses
from collections import Counter
from functools import cache, partial

import pytest, torch
from hypothesis import given, settings, strategies as st

from sage_paper.calls import Sample, ToolCall, format_calls, parse_calls
from sage_paper.evaluation import Answers, ListEnd, TurnEnd, generate
from sage_paper.model import encode, forward, render, tiny_lm
from sage_paper.queries import sageworld_set
from sage_paper.search import CallEnd, Planned, Proposal, Request, begun, depth_first, propose, read_call, tree_of_thoughts
from sage_paper.world import UnknownTool, make_world, reaches_end_state

JSON = st.recursive(st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab[]{}",\\ é', max_size=6), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text('k{"', max_size=3), x, max_size=3), max_leaves=6)
CALLS = st.lists(st.builds(ToolCall, st.text('ab{}[]",\\', min_size=1, max_size=6), st.dictionaries(st.text('pq"', min_size=1, max_size=3), JSON, max_size=3)), max_size=4)
WORLD = make_world()
PLANS = [s for s in sageworld_set(0, 12, 'planning', 200).splits['test']]


def written(calls, text):
    "What would be written of an answer, character by character, up to the end of one more call"
    end, rest = CallEnd(bool(calls)), text[len(begun(calls)):]
    return rest[:next(k for k, c in enumerate(rest, 1) if end.read(c))]


@given(CALLS)
@settings(max_examples=200, deadline=None)
def test_a_plan_read_call_by_call_is_the_plan(calls):
    text, done, ends = format_calls(calls), (), False
    while not ends:
        piece = written(done, text)
        new, ends, error = read_call(done, piece)
        assert error == '' and len(new) == bool(calls)
        assert text.startswith(begun(done) + piece)
        done = (*done, *new)
    assert list(done) == calls


@given(CALLS.filter(bool), st.data())
@settings(max_examples=150, deadline=None)
def test_what_comes_in_one_token_with_the_end_changes_nothing(calls, data):
    k = data.draw(st.integers(0, len(calls) - 1))
    piece = written(calls[:k], format_calls(calls))
    more = data.draw(st.sampled_from(['', '"', '"name', ' and more', ']}']))
    assert read_call(calls[:k], piece + more) == ((calls[k],), k == len(calls) - 1, '')
    cut = data.draw(st.integers(0, len(piece) - 1))
    assert read_call(calls[:k], piece[:cut])[2]


def test_an_answer_is_over_where_its_own_end_says():
    tokenizer, text = tiny_lm().tokenizer, '[{"name":"a"},{"name":"b"}] x'
    answers = Answers(tokenizer, [ListEnd(), TurnEnd(), CallEnd()])
    for t in tokenizer(text)['input_ids']: answers.add([t]*3)
    assert answers.texts() == ['[{"name":"a"},{"name":"b"}]', text, '[{"name":"a"},{']


# Plans as words: a call is a letter, and a script says which letters come at which node.

def call(letter): return ToolCall(letter)


def word(calls): return ''.join(c.name for c in calls)


class Letters:
    "A policy that goes through the letters of a query in turn, node by node; a capital ends the plan"
    def __init__(self, said): self.said, self.asked, self.rounds, self.turn = said, [], 0, Counter()

    def __call__(self, requests):
        self.rounds += 1
        return [self.one(r) for r in requests]

    def one(self, r):
        node = (r.sample.id, word(r.calls))
        letters = self.said[r.sample.id].get(node[1], '?')
        x = letters[0 if r.draw is None else self.turn[node] % len(letters)]
        self.turn[node] += 1
        self.asked.append(node[1] + x)
        if x == '?': return Proposal(x, *read_call(r.calls, x), 1)
        plan = (*r.calls, call(x.lower()))
        text = (format_calls(plan) if x.isupper() else begun(plan))[len(begun(r.calls)):]
        return Proposal(text, *read_call(r.calls, text), 1, -1.)


def refuse_x(world, calls):
    "Runs everything but an x"
    if calls[-1].name == 'x': raise UnknownTool(len(calls), 'x', 'name', 'x', 'another letter')


@pytest.fixture
def runs(monkeypatch): monkeypatch.setattr('sage_paper.search.execute', refuse_x)


def search(said, ids=None, **limits):
    policy = Letters(said)
    return policy, depth_first(policy, [Sample(i, i, ()) for i in ids or said], None, **limits)


def test_where_the_first_path_runs_nothing_else_is_asked(runs):
    policy, (p,) = search(dict(q={'': 'a', 'a': 'b', 'ab': 'C'}))
    assert policy.asked == ['a', 'ab', 'abC'] and p == Planned((call('a'), call('b'), call('c')), True, 3, 3, 3)


def test_it_goes_back_to_the_parent_and_then_one_level_up(runs):
    policy, (p,) = search(dict(q={'': 'ad', 'a': 'xb', 'ab': 'xx?', 'd': 'E'}), width=2, draws=2)
    # ab is a dead end with both of its children alike; a has no third child; d is tried
    assert policy.asked == ['a', 'ax', 'ab', 'abx', 'abx', 'd', 'dE'] and word(p.calls) == 'de' and p.ended
    assert (p.executed, p.proposals, p.tokens) == (6, 7, 7)


def test_a_repeated_child_is_not_run_again_and_does_not_count_as_one(runs):
    policy, (p,) = search(dict(q={'': 'xxxxA'}), width=2, draws=5)
    assert p.ended and p.executed == 2 and p.proposals == 5
    policy, (p,) = search(dict(q={'': 'xxxxA'}), width=2, draws=4)
    assert not p.ended and p.executed == 1 and p.proposals == 4


def test_going_on_and_ending_with_the_same_call_are_two_children(runs):
    policy, (p,) = search(dict(q={'': 'aA', 'a': 'x'}), width=2, draws=2)
    assert p.ended and word(p.calls) == 'a' and policy.asked == ['a', 'ax', 'ax', 'A']


def test_what_is_unreadable_is_a_dead_end(runs):
    policy, (p,) = search(dict(q={'': 'a', 'a': '?B'}))
    assert p.ended and word(p.calls) == 'ab' and p.executed == 2


@pytest.mark.parametrize('most', [0, 1, 2, 5])
def test_limits_hold_and_the_longest_plan_that_ran_is_left(runs, most):
    said = dict(q={'': 'ab', 'a': 'xc', 'ac': 'x', 'b': 'x'})
    policy, (p,) = search(said, width=2, draws=2, max_executed=most)
    assert p.executed == most and not p.ended and word(p.calls) == {0: '', 1: 'a', 2: 'a', 5: 'ac'}[most]
    policy, (q,) = search(said, width=2, draws=2, max_tokens=most)
    assert q.tokens == most and not q.ended


TREES = st.dictionaries(st.text('abx', max_size=3), st.text('abxABX?', min_size=1, max_size=4), max_size=12)


@given(st.lists(TREES, min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_search_is_the_same_alone_and_beside_others(trees, width, draws):
    said = dict(zip('pqrs', trees))
    with pytest.MonkeyPatch.context() as m:
        m.setattr('sage_paper.search.execute', refuse_x)
        together = search(said, width=width, draws=draws)[1]
        alone = [search(said, [i], width=width, draws=draws)[1][0] for i in said]
    assert together == alone
    for p, t in zip(together, said.values()):
        assert 'x' not in word(p.calls) and p.executed <= 31 and p.proposals >= 1
        if p.ended: assert word(p.calls)[-1].upper() in t.get(word(p.calls)[:-1], '')


def test_a_round_is_one_batch(runs):
    policy, found = search({i: {'': 'a', 'a': 'b'*n + 'B'} for n, i in enumerate('pqrs', 1)}, draws=9, width=9)
    assert len(found) == 4 and policy.rounds <= max(p.proposals for p in found)


def test_the_gold_calls_make_no_difference():
    lm, _ = taught()
    blind = [dataclasses.replace(s, calls=()) for s in PLANS[:3]]
    policy = partial(propose, lm, temperature=2., max_new_tokens=30, score=True)
    for find in (lambda ss: depth_first(policy, ss, WORLD, max_tokens=100), lambda ss: tree_of_thoughts(policy, ss, 2, 1, 2)): assert find(PLANS[:3]) == find(blind)


# breadth first

class Scores(Letters):
    "As `Letters`, with a log-probability for every letter at every node"
    def one(self, r):
        p = super().one(r)
        return dataclasses.replace(p, logp=LOGP[self.asked[-1]])


LOGP = {'a': -.1, 'aC': -4., 'b': -1., 'bD': -.2, 'bE': -.1, 'F': -.5, '?': -.1, 'a?': -.1, 'b?': -.1}


@pytest.mark.parametrize('said, breadth, right', [({'': 'ab', 'a': 'C', 'b': 'DE'}, 1, 'ac'), ({'': 'ab', 'a': 'C', 'b': 'DE'}, 2, 'be'),
                                                  ({'': 'aF', 'a': 'C'}, 2, 'f'), ({'': 'aF', 'a': '?'}, 2, 'f')])
def test_it_keeps_what_is_worth_most_a_call(said, breadth, right):
    p, = tree_of_thoughts(Scores(dict(q=said)), [Sample('q', '', ())], breadth, n_proposals=4)
    assert word(p.calls) == right and p.ended and p.executed == 0


def test_a_level_asks_each_kept_plan_once_greedily_and_n_times_by_draw():
    seen = []
    def policy(requests):
        seen.append([(word(r.calls), r.draw) for r in requests])
        return [Proposal(t := written(r.calls, begun(plan := (*r.calls, call('ab'[r.draw is None])))), *read_call(r.calls, t), 2, -float(len(plan))) for r in requests]
    p, = tree_of_thoughts(policy, [Sample('q', '', ())], 2, n_proposals=2, max_calls=2)
    assert [[w for w, _ in x] for x in seen] == [['']*3, ['b']*3 + ['a']*3]
    draws = [d for x in seen for _, d in x if d is not None]
    assert len(set(draws)) == len(draws) == 6 and not p.ended and p.proposals == 9 and p.tokens == 18


def test_where_nothing_can_be_read_the_plan_is_as_far_as_it_came():
    p, = tree_of_thoughts(Scores(dict(q={'': 'a', 'a': '?'})), [Sample('q', '', ())])
    assert word(p.calls) == 'a' and not p.ended
    p, = tree_of_thoughts(Scores(dict(q={'': '?'})), [Sample('q', '', ())])
    assert p.calls == () and not p.ended


# a tiny model

@cache
def taught():
    "A tiny model that has learnt two short plans by heart, and the queries"
    short = sorted(PLANS, key=lambda s: len(format_calls(s.calls)))[:2]
    asked = [dataclasses.replace(s, query=f'Task {x}') for s, x in zip(short, 'ab')]
    lm = tiny_lm()
    batch, opt = lm.collate(encode(asked, lm.tokenizer)), torch.optim.AdamW(lm.model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1, 0, 300)
    for _ in range(300):
        forward(lm, batch).nll.mean().backward()
        opt.step(); opt.zero_grad(); decay.step()
    return lm, asked


def test_what_runs_through_is_what_is_written_in_one_go_and_costs_no_more():
    lm, asked = taught()
    greedy = generate(lm, asked, 400)
    found = depth_first(partial(propose, lm, max_new_tokens=200), asked, WORLD)
    for s, text, p in zip(asked, greedy, found):
        assert parse_calls(text).calls == p.calls == tuple(s.calls) and p.ended and reaches_end_state(WORLD, s.calls, p.calls)
        assert p.executed == p.proposals == len(s.calls) and p.tokens <= len(lm.tokenizer(text)['input_ids'])


def test_proposals_are_drawn_alike_in_any_company():
    lm, asked = taught()
    requests = [Request(s, s.calls[:k], d) for s in asked for k in (0, 1) for d in (None, 0, 1)]
    ask = partial(propose, lm, temperature=3., max_new_tokens=25, score=True)
    together = ask(requests)
    for r, p in zip(requests, together):
        q, = ask([r])
        assert (p.text, p.tokens) == (q.text, q.tokens) and p.logp == pytest.approx(q.logp, abs=1e-3)
    assert len({p.text for p in together}) > 8
    assert [p.text for p in ask(requests, seed=1) if p.text] != [p.text for p in together]
    assert propose(lm, []) == []


def test_a_plans_proposals_are_together_as_likely_as_the_plan():
    lm, asked = taught()
    batch = lm.collate(encode(asked, lm.tokenizer))
    with torch.no_grad(): nll = forward(lm, batch).token_nll
    for k, s in enumerate(asked):
        parts = propose(lm, [Request(s, s.calls[:j]) for j in range(len(s.calls))], score=True, max_new_tokens=200)
        own = nll[batch.row == k]
        # the byte that opens a key is read, not written, with this tokenizer; then the end of the turn
        skipped = sum(own[len(begun(s.calls[:j])) - 1] for j in range(1, len(s.calls))) + own[-1]
        assert sum(p.logp for p in parts) == pytest.approx(-(own.sum() - skipped).item(), abs=1e-2)


@pytest.mark.model
def test_a_model_reads_at_a_node_what_it_would_have_written(smollm):
    def ids(text): return smollm.tokenizer(text, add_special_tokens=False)['input_ids']
    for s in PLANS:
        prompt, answer = render(s, smollm.tokenizer)
        for k in range(len(s.calls)):
            before = ids(prompt + begun(s.calls[:k]))
            assert ids(prompt) + ids(answer) == ids(prompt + answer) and ids(prompt + answer)[:len(before)] == before
