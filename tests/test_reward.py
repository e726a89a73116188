"The reward of SageWorld's answers: bounded, highest for the gold answer, blind to an order that does not matter, and lowest for doing nothing"
import json, time
from dataclasses import asdict, replace
from itertools import permutations

import pytest
from hypothesis import given, settings, strategies as st

from sage_paper.calls import ToolCall, format_calls, parse_calls
from sage_paper.queries import sageworld_set
from sage_paper.reward import WEIGHTS, Reward, agreement, judge, rewards
from sage_paper.world import CallError, execute, is_reference, make_world, reaches_end_state

WORLD = make_world()
SAMPLES = [x for c in ('planning', 'selection', 'timing') for x in sageworld_set(0, 60, c, seed=3).splits['test']]
PLANS, IDLE = [x for x in SAMPLES if len(x.calls) > 1], [x for x in SAMPLES if not x.calls]
ACTING = [x for x in SAMPLES if x.calls]


def worth(sample, text): return rewards(WORLD, [sample], [text])[0]
def of(sample, calls): return worth(sample, format_calls(calls))


@pytest.mark.parametrize('sample', SAMPLES, ids=lambda x: x.id)
def test_the_gold_answer_is_worth_1(sample):
    r = of(sample, sample.calls)
    assert r.total == pytest.approx(1) and r.error == '' and r.timing == 1


def test_the_weights_share_out_the_whole(): assert sum(WEIGHTS.values()) == pytest.approx(1) and max(WEIGHTS, key=WEIGHTS.get) == 'state'


@st.composite
def spoilt(draw):
    "A sample, and an answer made of gold calls of several samples, some of them bent"
    sample = draw(st.sampled_from(SAMPLES))
    calls = list(draw(st.sampled_from([sample, *SAMPLES])).calls)
    for _ in range(draw(st.integers(0, 3))):
        if not calls: break
        k = draw(st.integers(0, len(calls) - 1))
        what = draw(st.sampled_from(['drop', 'double', 'rename', 'value', 'reference', 'move']))
        if what == 'drop': calls.pop(k)
        elif what == 'double': calls.insert(k, calls[k])
        elif what == 'rename': calls[k] = replace(calls[k], name=draw(st.sampled_from(ACTING)).calls[0].name)
        elif what == 'move': calls.append(calls.pop(k))
        elif calls[k].arguments:
            p = draw(st.sampled_from(sorted(calls[k].arguments)))
            v = draw(st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)) if what == 'value' else f'${draw(st.integers(0, 99999))}{draw(st.sampled_from(["", ".id", ".."]))}'
            calls[k] = replace(calls[k], arguments=calls[k].arguments | {p: v})
    return sample, calls


@given(spoilt())
@settings(max_examples=300, deadline=None)
def test_no_calls_beat_the_gold_ones(pair):
    sample, calls = pair
    r = of(sample, calls)
    assert -1 <= r.total <= of(sample, sample.calls).total + 1e-12
    assert all(0 <= v <= 1 for k, v in asdict(r).items() if k not in ('total', 'error'))
    if sample.calls and calls and len(calls) <= 20: assert r.state == reaches_end_state(WORLD, sample.calls, calls)


@given(st.sampled_from(SAMPLES), st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_text_beats_the_gold_answer(sample, text): assert -1 <= worth(sample, text).total <= 1


@given(spoilt())
@settings(max_examples=300, deadline=None)
def test_doing_nothing_is_never_better_than_trying(pair):
    sample, calls = pair
    if sample.calls: assert of(sample, []).total == -1 <= of(sample, calls).total
    else: assert of(sample, calls).total == (-1 if calls else pytest.approx(1))


@pytest.mark.parametrize('sample', ACTING[:20], ids=lambda x: x.id)
def test_a_wrong_try_is_worth_more_than_silence(sample):
    other = next(x for x in ACTING if {c.name for c in x.calls}.isdisjoint(c.name for c in sample.calls))
    assert -1 < of(sample, other.calls).total < 0


def reordered(calls, order):
    "Calls in another order, their references renumbered; None where one would stand before what it refers to"
    new = {old + 1: k + 1 for k, old in enumerate(order)}
    def say(v, at):
        step, dot, rest = v[1:].partition('.')
        return None if new[int(step)] >= at else f'${new[int(step)]}{dot}{rest}'
    out = [replace(calls[old], arguments={p: say(v, k + 1) if is_reference(v) else v for p, v in calls[old].arguments.items()}) for k, old in enumerate(order)]
    return None if any(v is None for c, o in zip(out, order) for p, v in c.arguments.items() if is_reference(calls[o].arguments[p])) else out


@pytest.mark.parametrize('sample', PLANS[:40], ids=lambda x: x.id)
def test_the_order_of_steps_that_do_not_need_each_other_does_not_matter(sample):
    n = 0
    for order in permutations(range(len(sample.calls))):
        calls = reordered(sample.calls, order)
        if calls is None: continue
        assert agreement(calls, sample.calls) == dict(name=1., keys=1., values=1.)
        try: execute(WORLD, calls)
        except CallError: continue   # the state needed that order
        if reaches_end_state(WORLD, sample.calls, calls):
            n += 1
            assert of(sample, calls).total == pytest.approx(1)
    assert n >= 1


@given(st.lists(st.tuples(st.sampled_from('ab'), st.dictionaries(st.sampled_from('xyz'), st.integers(0, 2), max_size=3)), max_size=5), st.lists(st.tuples(st.sampled_from('ab'), st.dictionaries(st.sampled_from('xyz'), st.integers(0, 2), max_size=3)), max_size=5), st.randoms())
@settings(max_examples=300, deadline=None)
def test_agreement_is_blind_to_order_and_to_sides(pred, gold, rng):
    pred, gold = ([ToolCall(n, a) for n, a in calls] for calls in (pred, gold))
    found = agreement(pred, gold)
    mixed = pred[:]
    rng.shuffle(mixed)
    assert agreement(mixed, gold) == pytest.approx(found) and agreement(gold, pred) == pytest.approx(found)
    assert found['values'] <= found['keys'] + 1e-12 and (found['name'] == 1) == (sorted(c.name for c in pred) == sorted(c.name for c in gold))


def test_the_best_pairing_is_found_by_hand():
    # 3 calls and 3 arguments a side: pairing 1-2, 2-1, 3-3 shares 3 calls and 2 arguments, so 2*(3 + 2)/12
    pred, gold = ([ToolCall('t', dict(x=v)) for v in values] for values in ((1, 2, 3), (2, 1, 9)))
    assert agreement(pred, gold) == pytest.approx(dict(name=1., keys=1., values=10/12))


def test_text_around_the_calls_costs_half_of_the_format():
    sample = PLANS[0]
    assert worth(sample, f'Here: {format_calls(sample.calls)}').total == pytest.approx(1 - WEIGHTS['format'])


@pytest.mark.parametrize('text,error', [('Sure!', 'no-json'), ('[{"name": "a"', 'cut-off'), ('[{"name": 1, "arguments": {}}]', 'not-a-call'), ('[' + '{"name":"a","arguments":{}},'*20 + '{"name":"a","arguments":{}}]', '21 calls, expected at most 20')])
def test_what_cannot_be_read_or_run_is_worth_the_least(text, error):
    for sample in (PLANS[0], IDLE[0]): assert worth(sample, text) == Reward(-1., error=error)


def test_why_calls_do_not_run_is_said():
    sample = PLANS[0]
    assert of(sample, [ToolCall('nothing_of_the_kind')]).error.startswith("call 1, 'nothing_of_the_kind'")


def test_a_broken_executor_is_the_answers_fault_and_is_kept(monkeypatch, caplog):
    sample = PLANS[0]
    monkeypatch.setattr('sage_paper.reward.same_end_state', lambda *_: 1/0)
    assert of(sample, sample.calls) == Reward(-1., error='ZeroDivisionError: division by zero')
    assert sample.id in caplog.text
    monkeypatch.setattr('sage_paper.reward.execute', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): of(sample, sample.calls)   # the gold calls themselves: no answer's fault


def test_a_judge_may_be_given_the_gold_run():
    sample = PLANS[1]
    parsed = parse_calls(format_calls(sample.calls[:-1]))
    assert judge(WORLD, sample, parsed) == judge(WORLD, sample, parsed, execute(WORLD, sample.calls))


def test_answers_and_queries_have_to_be_as_many():
    with pytest.raises(ValueError): rewards(WORLD, PLANS[:2], ['[]'])


@pytest.mark.alone
def test_a_group_of_answers_is_judged_in_time():
    many = [x for x in PLANS[:20] for _ in range(8)]
    start = time.perf_counter()
    rewards(WORLD, many, [format_calls(x.calls) for x in many])
    assert time.perf_counter() - start < 0.02*len(many)
