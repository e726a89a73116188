"Replay: sums stay exact, what is drawn and what stays follow the priorities, memory is bounded, a stopped run goes on"
import pickle, sys
from itertools import combinations, pairwise, permutations

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare

from sage_paper.replay import Draw, FIFOBuffer, ImportanceBuffer, ReservoirBuffer, SumTree, Tree

KINDS = [ReservoirBuffer, FIFOBuffer, ImportanceBuffer]
importances = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


def check(tree):
    "Every node is `op` over its children, to the last bit, and what is above no child is empty"
    for below, above in pairwise(tree.levels):
        np.testing.assert_array_equal(above.reshape(-1)[:len(below)], tree.op.reduce(below, 1))
        assert not np.isfinite(above.reshape(-1)[len(below):]).any() or (above.reshape(-1)[len(below):] == 0).all()


# ---- the tree

def test_sums_are_exact_after_a_million_mixed_updates():
    rng = np.random.default_rng(0)
    tree, leaves, updates = SumTree(30_000), np.zeros(30_000), 0
    while updates < 1_000_000:
        n = int(rng.choice([1, 3, 64, 1000, 5000]))
        i = rng.integers(len(leaves), size=n)
        values = rng.choice([0., 1., 1e-9, 1e9], n)*rng.random(n)
        tree.update(i, values)
        leaves[i] = values
        updates += n
    np.testing.assert_array_equal(tree.leaves, leaves)
    check(tree)
    assert tree.total == pytest.approx(leaves.sum(), rel=1e-14)
    tree.update(np.arange(len(leaves)), 0.)
    assert not any(level.any() for level in tree.levels)   # differences would have left a remainder


@given(st.integers(1, 700), st.lists(st.tuples(st.integers(0, 699), st.floats(-1e6, 1e6)), max_size=40))
def test_least_and_largest(capacity, updates):
    leaves = {}
    least, largest = Tree(capacity, np.minimum, np.inf), Tree(capacity, np.maximum, -np.inf)
    for i, v in updates:
        leaves[i % capacity] = v
        for tree in (least, largest): tree.update(i % capacity, v)
    for tree, op in ((least, min), (largest, max)):
        check(tree)
        if leaves: assert tree.top == op(leaves.values()) == leaves[tree.where()]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=600).filter(any), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_find_is_a_search_in_the_cumulative_sum(values, parts):
    tree = SumTree(len(values))
    tree.update(np.arange(len(values)), values)
    targets = np.array(parts)*tree.total
    np.testing.assert_array_equal(tree.find(targets), np.searchsorted(np.cumsum(values), targets, 'right'))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=600).filter(any), st.floats(0, 1))
def test_a_leaf_without_value_is_never_found(values, part):
    "Not even at the very end, where running sums and sums round differently"
    tree = SumTree(len(values) + 20)
    tree.fill(np.array(values))
    for target in (part*tree.total, tree.total, np.nextafter(tree.total, 0), 2*tree.total): assert tree.leaves[tree.find([target])[0]] > 0


def test_the_last_of_equal_indices_stays():
    tree = SumTree(50)
    tree.update([7, 9, 7, 7], [1., 2., 3., 4.])
    assert (tree.leaves[7], tree.total) == (4, 6)


def test_errors_of_the_tree():
    for i in (-1, 50, [3, 50], [-1, 3]):
        tree = SumTree(50)
        with pytest.raises(IndexError, match='from 0 to 49|out of bounds'): tree.update(i, 1.)
        assert not any(level.any() for level in tree.levels)
    for value in (0., np.nan, np.inf):
        tree = SumTree(50)
        tree.update(3, value)
        with pytest.raises(ValueError, match='nothing can be found'): tree.find([0.])


# ---- what is drawn

def filled(importance, **kwargs):
    b = ImportanceBuffer(len(importance), **kwargs)
    b.extend(range(len(importance)), importance)
    return b


@pytest.mark.parametrize('a', [0, .6, 1, 2])
def test_frequencies_follow_the_priorities(a):
    "Single draws are independent, so a chi-square test applies; the exponent is applied once"
    importance = np.random.default_rng(1).uniform(1, 4, 40)
    b = filled(importance, a=a, seed=2)
    slots = [b.draw(1).slots[0] for _ in range(6000)]
    counts, share = np.bincount(slots, minlength=40), importance**a/(importance**a).sum()
    assert chisquare(counts, 6000*share).pvalue > .001
    if a: assert chisquare(counts, 6000*importance**(2*a)/(importance**(2*a)).sum()).pvalue < 1e-6


@given(importances, st.floats(0, 2), st.integers(0, 9))
def test_the_exponent_is_applied_once(importance, a, seed):
    "However often an item is updated, and in what order"
    b, rng = filled(importance, a=a, seed=seed), np.random.default_rng(seed)
    for _ in range(3):
        slots = rng.permutation(len(importance))
        b.update(slots, np.array(importance)[slots])
    np.testing.assert_allclose(b.priorities.leaves, np.array(importance)**a, rtol=1e-12)
    assert b.largest.top == b.priorities.leaves.max() and b.least.top == b.priorities.leaves.min()


@given(importances, st.integers(1, 40), st.integers(0, 9))
def test_a_batch_is_stratified(importance, n, seed):
    "An item's count differs from n times its probability by less than 2"
    b = filled(importance, seed=seed)
    n, p = min(n, len(importance)), b.priorities.leaves
    assert (abs(np.bincount(b.draw(n).slots, minlength=len(p)) - n*p/p.sum()) < 2).all()


@given(importances, st.floats(0, 1), st.floats(0, 2), st.floats(0, 1))
def test_weights_follow_the_formula(importance, b, a, progress):
    buffer = filled(importance, a=a, b=b)
    p = np.array(importance)**a
    w = (len(p)*p/p.sum())**-(b + (1 - b)*progress)
    drawn = buffer.draw(len(p), progress)
    np.testing.assert_allclose(drawn.weights, (w/w.max())[drawn.slots], rtol=1e-9)
    assert drawn.items == drawn.slots.tolist() and (drawn.weights <= 1).all()


def test_weights_by_hand():
    "Priorities 1, 4, 16; b = 0.5, then 0.75, then 1"
    buffer = filled([1, 16, 256], a=.5, b=.5)
    for progress, by_hand in ((0, [1, 1/2, 1/4]), (.5, [1, 2**-1.5, 1/8]), (1, [1, 1/4, 1/16])):
        drawn = buffer.draw(3, progress)
        np.testing.assert_allclose(drawn.weights, np.array(by_hand)[drawn.slots], rtol=1e-15)


def test_weights_and_draws_together_have_no_bias():
    "With b = 1 the mean of weight times loss is the plain mean, up to a factor that does not depend on the losses"
    buffer = filled([1, 2, 3, 10], a=1)
    loss = np.array([5., 1., 7., 2.])
    draws = [buffer.draw(4, 1) for _ in range(4000)]
    mean = np.mean([(d.weights*loss[d.slots]).mean() for d in draws])/np.mean([d.weights.mean() for d in draws])
    assert mean == pytest.approx(loss.mean(), rel=.02) and abs(np.mean([loss[d.slots].mean() for d in draws]) - loss.mean()) > .4


# ---- what stays

def in_order(weights, n):
    "Probability of each set of n items drawn one after another in proportion to weight, by enumeration"
    p = dict.fromkeys(combinations(range(len(weights)), n), 0.)
    for order in permutations(range(len(weights)), n):
        q, left = 1., sum(weights)
        for i in order: q, left = q*weights[i]/left, left - weights[i]
        p[tuple(sorted(order))] += q
    return p


def fits(outcomes, p):
    "Whether the sets that came out have the probabilities `p`, by a chi-square test"
    counts = [outcomes.count(s) for s in p]
    assert sum(counts) == len(outcomes)
    return chisquare(counts, len(outcomes)*np.array(list(p.values()))).pvalue > .001


@pytest.mark.parametrize('retention,a', [(1, 1), (.5, 2), (2, 1), (0, 1)])
def test_what_stays_is_a_sample_in_proportion_to_priority(retention, a):
    importance = [5, 1, 2, 4, 3]
    def held(seed):
        b = ImportanceBuffer(2, a, retention=retention, seed=seed)
        b.extend(range(5), importance)
        return tuple(sorted(b.items))
    outcomes = [held(seed) for seed in range(1500)]
    assert fits(outcomes, in_order([i**(a*retention) for i in importance], 2))
    if retention: assert not fits(outcomes, in_order([1]*5, 2))


def test_what_stays_follows_the_newest_importance():
    new = [4, 1, 1/4, 1]
    def held(seed):
        b = ImportanceBuffer(3, 1, seed=seed)
        b.extend(range(3), [1/4, 1, 4])
        b.update([0, 1, 2], new[:3])
        b.add(3, new[3])
        return tuple(sorted(b.items))
    outcomes = [held(seed) for seed in range(1500)]
    assert fits(outcomes, in_order(new, 3)) and not fits(outcomes, in_order([1/4, 1, 4, 1], 3))


def test_the_reservoir_is_uniform():
    def held(seed):
        b = ReservoirBuffer(2, seed)
        b.extend(range(5), [1, 9, 9, 9, 1])   # not looked at
        return tuple(sorted(b.items))
    assert fits([held(seed) for seed in range(3000)], in_order([1]*5, 2))


@given(st.integers(1, 9), st.integers(0, 40))
def test_fifo_holds_the_last(capacity, n):
    b = FIFOBuffer(capacity)
    b.extend(range(n))
    assert sorted(b.items) == list(range(max(0, n - capacity), n))


def test_the_largest_priority_falls():
    "What newcomers get follows what is held, down as well as up, also when the most important item is replaced"
    b = filled([1., 50., 2.], a=1)
    assert b.largest.top == 50
    b.update([1], [3.])
    assert b.largest.top == 3
    tops = []
    for step in range(200):
        b.update(np.arange(3), np.full(3, .99**step))
        b.add(step)
        tops.append(b.largest.top)
    np.testing.assert_allclose(tops, .99**np.arange(200))
    one = ImportanceBuffer(1, 1, retention=0, seed=0)
    one.add('large', 1e6)
    for i in range(200): one.add(i, 1.)
    assert one.items != ['large'] and one.largest.top == 1


def test_newcomers_enter_at_the_largest_priority():
    b = ImportanceBuffer(5, .5)
    b.add('first')
    assert b.priorities.leaves[0] == 1
    b.add('second', 9)
    b.add('third')
    assert b.priorities.leaves[:3].tolist() == [1, 3, 3]


# ---- one interface

def in_bytes(b): return len(pickle.dumps(b.state_dict()))


@pytest.mark.parametrize('kind', KINDS)
def test_memory_is_bounded(kind):
    b, sizes = kind(50), []
    for n in (50, 5000, 20_000):
        while b.seen < n:
            b.add(f'{b.seen:08}', 1 + b.seen % 7)
            if not b.seen % 100: b.update((d := b.draw(8)).slots, np.arange(1, 1 + len(d.slots)))
        sizes.append(in_bytes(b) + sum(sys.getsizeof(v) for v in vars(b).values()))
        assert len(b) == 50 and len(b.sample(500)) == 50
    assert max(sizes) - min(sizes) < 200   # the digits of numbers


@pytest.mark.parametrize('kind', KINDS)
def test_fewer_come_if_fewer_are_held(kind):
    b = kind(9)
    empty = b.draw(4)
    assert isinstance(empty, Draw) and (empty.items, len(empty.slots), len(empty.weights), b.sample(4)) == ([], 0, 0, [])
    b.update(empty.slots, [])
    b.extend('abc')
    for n in (0, 2, 3, 8):
        d = b.draw(n)
        assert len(d.items) == len(d.slots) == len(d.weights) == min(n, 3) and d.items == [b.items[k] for k in d.slots]


@pytest.mark.parametrize('kind', [ReservoirBuffer, FIFOBuffer])
def test_uniform_draws(kind):
    "All alike, none twice, weights of one, and a report of importance changes nothing"
    b = kind(10, seed=3)
    b.extend(range(10))
    counts = np.zeros(10)
    for k in range(2000):
        d = b.draw(3, k/2000)
        assert len(set(d.items)) == 3 and d.weights.tolist() == [1, 1, 1]
        b.update(d.slots, [9., 99., 999.])
        counts[d.items] += 1
    assert chisquare(counts).pvalue > .001


@pytest.mark.parametrize('kind', KINDS)
@given(st.integers(1, 40), st.integers(0, 90), st.integers(0, 9))
@settings(max_examples=30)
def test_a_restored_twin_goes_on_identically(kind, capacity, n, seed):
    b, twin = kind(capacity, seed=seed), kind(3, seed=seed + 1)
    for i in range(n):
        b.add(i, None if i % 3 else 1 + i % 5)
        b.update((d := b.draw(4, i/90)).slots, 1/(1 + np.arange(len(d.slots))))
    twin.add('forgotten')
    twin.load_state_dict(pickle.loads(pickle.dumps(b.state_dict())))
    for i in range(20):
        d, t = b.draw(5, i/20), twin.draw(5, i/20)
        assert (d.items, d.slots.tolist(), d.weights.tolist()) == (t.items, t.slots.tolist(), t.weights.tolist())
        for each in (b, twin):
            each.update(d.slots, 1 + (np.arange(len(d.slots)) + i) % 5)
            each.extend([i, i], [2, 3])
    assert repr(b.state_dict()) == repr(twin.state_dict())
    if kind is ImportanceBuffer:
        for name in ('priorities', 'least', 'largest', 'keys'): 
            for one, other in zip(getattr(b, name).levels, getattr(twin, name).levels): np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_state_stands_still(kind):
    b = kind(4)
    b.extend(range(9))
    state = b.state_dict()
    before = pickle.dumps(state)
    b.extend(range(30), np.arange(1, 31))
    b.update([0, 1], [3, 4])
    b.sample(2)
    assert pickle.dumps(state) == before != pickle.dumps(b.state_dict())


# ---- errors

@pytest.mark.parametrize('bad', [0, -1., np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('a', [0, .6, 2])
def test_a_bad_importance_is_named_and_changes_nothing(bad, a):
    "Also where the power would be a good number"
    b = filled([1., 2., 3.], a=a)
    before = repr(b.state_dict())
    for offend in (lambda: b.add('x', bad), lambda: b.update([0, 1], [1., bad])):
        with pytest.raises(ValueError, match=f'importance = {float(bad)}:'.replace('+', r'\+')): offend()
        assert repr(b.state_dict()) == before


@pytest.mark.parametrize('bad', [1e-300, 1e300])
def test_a_priority_out_of_range(bad):
    "Sums of them would overflow, or lose them"
    with pytest.raises(ValueError, match=f'importance = {bad}:'.replace('+', r'\+')): filled([1., bad])


def test_other_errors():
    for kind in KINDS:
        with pytest.raises(ValueError, match='at least one item'): kind(0)
        with pytest.raises(ValueError, match='shorter'): kind(4).extend('abc', [1., 2.])
    for bad in (dict(a=-1), dict(a=np.nan), dict(b=1.1), dict(b=-.1), dict(retention=-1), dict(retention=np.inf)):
        with pytest.raises(ValueError, match='none is below 0'): ImportanceBuffer(3, **bad)
    b = ImportanceBuffer(9)
    b.extend('abc')
    for progress in (-.1, 1.1, np.nan):
        with pytest.raises(ValueError, match='progress'): b.draw(2, progress)
    for slots in ([3], [-1], [0, 5], [0, -2]):
        before = repr(b.state_dict())
        with pytest.raises(IndexError, match='3 items are held|counted from 0'): b.update(slots, np.full(len(slots), 9.))
        assert repr(b.state_dict()) == before
