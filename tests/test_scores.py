"Scores: an answer is worth what it should be, nothing raises on what a model wrote, and a large file is quick to score"
import json, subprocess, sys
from collections import Counter
from random import Random

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from conftest import ROOT
from sage_paper.calls import ParsedCalls, Sample, ToolCall, format_calls, parse_calls
from sage_paper.scores import (api_bank_accuracy, argument_items, challenge_scores, item_scores, link_f1, multiset_f1, node_f1, planning_scores, same_call, score_call,
                               seal_tools_scores, selection_scores, timing_scores)

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=()), max_size=6),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=6)
TOOLS = st.builds(ToolCall, st.sampled_from('abcd'), st.dictionaries(st.sampled_from(['x', 'y', 'args']), VALUES | st.just('xf {{a}} -C {{b}}'), max_size=2))
PLANS = st.lists(TOOLS, max_size=5).map(tuple)
ANSWERS = PLANS.map(ParsedCalls) | st.just(ParsedCalls((), 'broken', False))
CHALLENGES = ('timing', 'planning', 'selection')


def sample(calls, challenge='planning'): return Sample('s', '', tuple(calls), challenge=challenge)


def fits(calls, challenge): return challenge == 'timing' or len(calls) == 1 or (challenge == 'planning' and len(calls) > 0)


@settings(deadline=None, max_examples=300)
@given(PLANS, ANSWERS)
def test_scores_are_in_range_and_gold_is_perfect(gold, answer):
    for c in (c for c in CHALLENGES if fits(gold, c)):
        scores = item_scores(sample(gold), answer, c)
        assert all(v is None or 0 <= v <= 1 for v in scores.values())
        perfect = item_scores(sample(gold), ParsedCalls(gold), c)
        for k in perfect.keys() - {'needed', 'called', 'node_f1', 'link_f1'}: assert perfect[k] == 1, (c, k)
        if c == 'planning' and len({x.name for x in gold}) == len(gold): assert perfect['node_f1'] == 1 and perfect['link_f1'] in (1, None)


@settings(deadline=None, max_examples=300)
@given(PLANS.filter(bool), ANSWERS)
def test_exact_implies_all_else(gold, answer):
    s = item_scores(sample(gold), answer)
    assert s['exact'] <= s['sequence'] <= s['readable'] and s['format'] <= s['readable']
    assert s['sequence'] == (s['step_accuracy'] == 1)
    if len(gold) == 1:
        one = item_scores(sample(gold), answer, 'selection')
        assert (one['name'], one['exact']) == (s['sequence'], s['exact'])
        assert not one['exact'] or one['argument_f1'] == 1
        assert one['name'] or one['argument_f1'] == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from('abc'), max_size=6), st.lists(st.sampled_from('abc'), max_size=6))
def test_multiset_f1_by_its_definition(pred, gold):
    hits, rest = 0, list(gold)
    for x in pred:
        if x in rest: rest.remove(x); hits += 1
    p, r = (hits/len(pred) if pred else 1), (hits/len(gold) if gold else 1)
    expected = 1. if not pred and not gold else 2*p*r/(p + r) if p and r and pred and gold else 0.
    assert multiset_f1(Counter(pred), Counter(gold)) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from('abcd'), unique=True, max_size=4), st.lists(st.sampled_from('abcd'), unique=True, max_size=4))
def test_node_f1_without_repetition_is_that_of_sets(pred, gold):
    items = sorted(set(pred) | set(gold))
    expected = f1_score([x in gold for x in items], [x in pred for x in items], zero_division=0) if items else 0
    assert node_f1(pred, gold) == pytest.approx(expected)
    assert link_f1(pred, gold) == node_f1(list(zip(pred, pred[1:])), list(zip(gold, gold[1:])))


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(['call', 'no', 'unreadable'])), min_size=1, max_size=30))
def test_timing_agrees_with_sklearn(items):
    call = (ToolCall('a'),)
    answer = dict(call=ParsedCalls(call), no=ParsedCalls(), unreadable=ParsedCalls((), 'no-json', False))
    r = timing_scores([sample(call if needed else ()) for needed, _ in items], [answer[a] for _, a in items])
    needed, called = [n for n, _ in items], [a == 'call' for _, a in items]
    assert r['precision'] == pytest.approx(precision_score(needed, called, zero_division=0))
    assert r['accuracy'] == pytest.approx(accuracy_score([('no', 'call')[n] for n in needed], [a for _, a in items]))
    if any(needed):
        assert r['recall'] == pytest.approx(recall_score(needed, called)) == pytest.approx(1 - r['missed_call'])
        assert r['f1'] == pytest.approx(f1_score(needed, called))
    if not all(needed): assert r['false_call'] == pytest.approx(np.mean([c for n, c in zip(needed, called) if not n]))


def test_values_are_compared_as_json():
    def same(a, b): return same_call(ToolCall('t', {'x': a}), ToolCall('t', {'x': b}))
    assert same(5, 5.0) and same([1, {'a': 2.0}], [1.0, {'a': 2}]) and same({'a': 1, 'b': 2}, {'b': 2, 'a': 1}) and same(1e300, 10**300*1.) and same(0, -0.0)
    for a, b in [(1, True), (0, False), (5, '5'), (None, ''), ([1, 2], [2, 1]), ('a', 'A'), ('a', 'a '), ('é', 'e\u0301'), ([], {})]: assert not same(a, b), (a, b)
    assert argument_items(ToolCall('t', {'args': 'x x', 'y': 1})) != argument_items(ToolCall('t', {'args': 'x x'})) == Counter(x=2)


def test_two_calls_are_no_selection():
    gold = ToolCall('a', {'x': 1})
    for calls in ((), (gold, gold)): assert score_call(ParsedCalls(calls), gold) == dict(format=True, readable=True, name=False, exact=False, argument_f1=0.)


def test_means_are_those_of_the_items():
    rng = Random(0)
    gold = [sample([ToolCall(rng.choice('abc'), {'x': rng.randrange(3)}) for _ in range(rng.randint(1, 4))]) for _ in range(200)]
    outputs = [rng.choice([format_calls(s.calls), format_calls(rng.choice(gold).calls), 'Sure: ' + format_calls(s.calls), 'oops']) for s in gold]
    rows = [item_scores(s, parse_calls(o)) for s, o in zip(gold, outputs)]
    r = challenge_scores(gold, outputs, 'planning')
    assert r['n'] == 200 and r['errors'] == dict(Counter('no-json' for o in outputs if o == 'oops'))
    for k in rows[0]: assert r[k] == pytest.approx(np.mean([x[k] for x in rows if x[k] is not None]))
    assert 0 < r['exact'] < 1 and r['format'] < r['readable'] < 1
    assert 'NaN' not in json.dumps(r, allow_nan=False)


@pytest.mark.parametrize('f', [timing_scores, planning_scores, selection_scores, seal_tools_scores, api_bank_accuracy])
def test_answers_and_samples_must_be_as_many(f):
    with pytest.raises(ValueError, match='shorter|longer'): f([sample([ToolCall('a')])]*2, [ParsedCalls()])
    with pytest.raises(ValueError, match='shorter|longer'): f([sample([ToolCall('a')])], [ParsedCalls()]*2)
    with pytest.raises(ValueError, match='no samples'): f([], [])


@settings(deadline=None)
@given(st.lists(st.tuples(PLANS.filter(bool), ANSWERS), min_size=1, max_size=5))
def test_published_scorers_never_raise_and_gold_is_perfect(items):
    gold, answers = [sample(g) for g, _ in items], [a for _, a in items]
    r = seal_tools_scores(gold, answers)
    assert 0 <= r['tool_precision'] <= 1 and 0 <= r['parameter_precision'] <= 1 and 0 <= r['format'] <= 1
    assert seal_tools_scores(gold, [ParsedCalls(s.calls) for s in gold])['tool_f1'] == 1
    ones = [sample(g.calls[:1]) for g in gold]
    assert 0 <= api_bank_accuracy(ones, answers) <= 1 == api_bank_accuracy(ones, [ParsedCalls(s.calls) for s in gold])


SPEED = '''
import resource, time
from random import Random
from sage_paper.calls import Sample, ToolCall, format_calls
from sage_paper.scores import challenge_scores

def samples(n):
    rng = Random(0)
    for i in range(n): yield Sample(str(i), '', tuple(ToolCall(f'tool_{rng.randrange(50)}', dict(time='08:00', cups=rng.randrange(9))) for _ in range(3)), challenge='planning')

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
r = challenge_scores(samples(100_000), (format_calls(s.calls) for s in samples(100_000)), 'planning')
print(r['n'], r['exact'], time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
'''


def test_100_000_predictions_are_scored_quickly_in_flat_memory():
    out = subprocess.run([sys.executable, '-c', SPEED], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    n, exact, seconds, mebibytes = map(float, out)
    assert (n, exact) == (100_000, 1)
    assert seconds < 20 and mebibytes < 50
