"Statistics: intervals hold what they say, seeds decide everything, and large sets fit into memory"
import subprocess, sys

import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from conftest import ROOT
from sage_paper.statistics import anytime_average, first_reached, holm, interquartile_mean, paired_bootstrap, paired_bootstrap_many, t_interval

FLOATS = st.floats(-100, 100)
TENTHS = st.integers(0, 10).map(lambda i: i/10)
CURVES = st.lists(st.tuples(st.integers(1, 20), TENTHS), min_size=2, max_size=10)


def asked(rng, k=100):
    "Answers of two methods to 1 to 9 queries a tool: of the tools each knows, with probability .6 and .5, it gets queries right with .9, of others with .1"
    tool = np.repeat(np.arange(k), rng.integers(1, 10, k))
    def right(known): return rng.random(len(tool)) < np.where((rng.random(k) < known)[tool], .9, .1)
    return right(.6), right(.5), tool


def coverage(n, clustered):
    "How often the interval holds the true difference, (.6 − .5)·(.9 − .1)"
    rng, held = np.random.default_rng(0), []
    for i in range(n):
        a, b, tool = asked(rng)
        r = paired_bootstrap(a, b, tool if clustered else np.arange(len(tool)), n_boot=500, seed=i)
        held.append(r['low'] <= .08 <= r['high'])
    return np.mean(held)


def test_the_interval_covers_what_it_says(): assert .93 <= coverage(1000, clustered=True) <= .97   # binomial standard error .007


def seeds_coverage(n, drawn, n_runs=5):
    "How often the interval holds a true difference of 0 where each seed has its own and each tool as well"
    rng, held = np.random.default_rng(0), []
    for i in range(n):
        diff = rng.normal(0, .1, 100) + rng.normal(0, .02, n_runs)[:, None] + rng.normal(0, .1, (n_runs, 100))
        r = paired_bootstrap(diff if drawn else diff.mean(0), np.zeros((1, 100)) if drawn else np.zeros(100), np.arange(100), n_boot=500, seed=i)
        held.append(r['low'] <= 0 <= r['high'])
    return np.mean(held)


def test_the_interval_holds_other_seeds_too(): assert .92 <= seeds_coverage(600, drawn=True) <= .98


def test_averaging_the_seeds_does_not(): assert seeds_coverage(300, drawn=False) < .9


def test_ignoring_the_clusters_does_not(): assert coverage(200, clustered=False) < .75


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40).filter(lambda r: len({c for c, _, _ in r}) > 1), st.integers(0, 99))
def test_paired_bootstrap_keeps_its_promises(rows, seed):
    c, a, b = map(list, zip(*rows))
    r = paired_bootstrap(a, b, c, n_boot=300, seed=seed)
    assert r == paired_bootstrap(a, b, c, n_boot=300, seed=seed)
    back = paired_bootstrap(b, a, c, n_boot=300, seed=seed)
    assert (back['difference'], back['low'], back['high'], back['p']) == pytest.approx((-r['difference'], -r['high'], -r['low'], r['p']))
    assert r['low'] <= r['high'] and 0 < r['p'] <= 1
    assert paired_bootstrap([x + 1 for x in a], b, c, n_boot=300, seed=seed)['low'] == pytest.approx(r['low'] + 1)
    assert paired_bootstrap(a, b, [f'tool {x}' for x in c], n_boot=300, seed=seed) == r


def test_the_interval_excludes_nothing_when_p_is_small():
    rng, seen = np.random.default_rng(1), []
    for i in range(200):
        a, b, tool = asked(rng, 30)
        r = paired_bootstrap(a, b, tool, n_boot=999, seed=i)
        outside = not r['low'] <= 0 <= r['high']
        if abs(r['p'] - .05) > .01: assert outside == (r['p'] < .05)
        seen.append(outside)
    assert 0 < sum(seen) < 200


def test_blocks_do_not_change_the_draws():
    rng = np.random.default_rng(2)
    a, b, tool = rng.random(4000), rng.random(4000), rng.permutation(4000) % 700   # 1,497 draws a block
    r = paired_bootstrap(a, b, tool, n_boot=4000, seed=5)
    total, size = np.bincount(tool, a - b), np.bincount(tool)
    draws = np.random.default_rng(5).multinomial(700, np.full(700, 1/700), size=4000)
    means = draws @ total/(draws @ size)
    assert (r['low'], r['high']) == pytest.approx(tuple(np.quantile(means, [.025, .975])), abs=1e-11)


@pytest.fixture(scope='module')
def methods():
    rng = np.random.default_rng(3)
    return {m: rng.random(3000) < p for m, p in (('sage', .6), ('replay', .6), ('random', .5))}, rng.integers(300, size=3000)


def test_the_number_of_processes_changes_no_bit(methods):
    scores, tool = methods
    pairs = [('sage', 'replay'), ('sage', 'random'), ('replay', 'random')]
    one, two = (paired_bootstrap_many(scores, pairs, tool, n_boot=2000, seed=7, jobs=jobs) for jobs in (1, 2))
    assert repr(one) == repr(two)
    assert [r['p_holm'] for r in one] == holm([r['p'] for r in one]).tolist() and one[1]['p_holm'] < .05 < one[0]['p_holm']
    alone, = paired_bootstrap_many(scores, pairs[1:2], tool, n_boot=2000, seed=7)
    assert alone | dict(p_holm=0) == one[1] | dict(p_holm=0)


LARGE = '''
import resource, numpy as np
from sage_paper.statistics import paired_bootstrap
rng = np.random.default_rng(0)
a, b, tool = rng.random(100_000) < .5, rng.random(100_000) < .5, rng.permutation(100_000) % 5000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
paired_bootstrap(a, b, tool, n_boot=3000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
'''


def test_100_000_items_of_5000_tools_fit_into_little_memory():
    "All draws at once would take 114 MiB for these 3,000, and 381 for 10,000"
    out = subprocess.run([sys.executable, '-c', LARGE], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert float(out) < 60


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_controls_as_bonferroni_does_and_more(p):
    adjusted, p = holm(p), np.array(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(p*len(p), 1)).all()
    assert (np.diff(adjusted[np.argsort(p, kind='stable')]) >= 0).all()


@settings(deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=12), FLOATS)
def test_interquartile_mean_ignores_the_outer_quarters(x, shift):
    m = interquartile_mean(x)
    assert min(x) - 1e-9 <= m <= max(x) + 1e-9 and m == interquartile_mean(x[::-1])
    assert interquartile_mean([v + shift for v in x]) == pytest.approx(m + shift, abs=1e-6)
    if len(x) >= 4: assert interquartile_mean(sorted(x)[:-1] + [1e9]) == pytest.approx(m, abs=1e-6)


def test_t_interval_of_one_run_is_none(): assert np.isnan(t_interval([.5])[1]) and t_interval([.5])[0] == .5


@settings(deadline=None)
@given(CURVES, TENTHS)
def test_first_reached_is_the_first(steps, level):
    x, y = np.cumsum([s for s, _ in steps]), np.array([v for _, v in steps])
    at = first_reached(x, y, level)
    if np.isnan(at): assert (y < level).all()
    else:
        assert np.interp(at, x, y) == pytest.approx(level) if at > x[0] else y[0] >= level
        assert (np.interp(np.linspace(x[0], at, 50)[:-1], x, y) <= level + 1e-9).all() or at == x[0]


@settings(deadline=None)
@given(CURVES)
def test_anytime_average_is_that_of_the_curve(steps):
    x, y = np.cumsum([s for s, _ in steps]), np.array([v for _, v in steps])
    fine = np.linspace(x[0], x[-1], 20_001)
    assert anytime_average(x, y) == pytest.approx(np.interp(fine, x, y).mean(), abs=1e-3)
