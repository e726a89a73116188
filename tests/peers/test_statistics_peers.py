"Statistics against scipy and statsmodels"
import numpy as np, pytest
from scipy import stats

from sage_paper.statistics import holm, interquartile_mean, paired_bootstrap, t_interval

multipletests = pytest.importorskip('statsmodels.stats.multitest', reason='needs statsmodels').multipletests


@pytest.mark.parametrize('seed', range(200))
def test_holm(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(rng.integers(1, 12))**rng.integers(1, 6)
    if seed % 3 == 0: p = np.round(p, 1)   # ties, 0 and 1
    np.testing.assert_allclose(holm(p), multipletests(p, method='holm')[1], atol=1e-12)


@pytest.mark.parametrize('n', range(1, 30))
def test_interquartile_mean(n):
    x = np.random.default_rng(n).normal(size=n)
    assert interquartile_mean(x) == pytest.approx(stats.trim_mean(np.repeat(x, 4), .25))
    if n % 4 == 0: assert interquartile_mean(x) == pytest.approx(stats.trim_mean(x, .25))


@pytest.mark.parametrize('level', [.8, .95, .99])
def test_t_interval(level):
    x = np.random.default_rng(0).normal(size=7)
    mean, half = t_interval(x, level)
    assert (mean - half, mean + half) == pytest.approx(stats.t.interval(level, 6, x.mean(), stats.sem(x)))


@pytest.mark.parametrize('seed', range(4))
def test_paired_bootstrap(seed):
    "Both resample pairs of a cluster's sum and size; what is left is the chance of 20,000 draws"
    rng = np.random.default_rng(seed)
    tool = np.repeat(np.arange(80), rng.integers(1, 12, 80))
    a, b = (rng.random(len(tool)) < rng.random(80)[tool] for _ in 'ab')
    ours = paired_bootstrap(a, b, tool, n_boot=20_000, seed=seed)
    total, size = np.bincount(tool, a*1. - b), np.bincount(tool)
    theirs = stats.bootstrap((total, size), lambda t, s, axis=-1: t.sum(axis)/s.sum(axis), paired=True, vectorized=True, method='percentile', n_resamples=20_000,
                             rng=np.random.default_rng(seed))
    se = theirs.standard_error
    assert ours['difference'] == pytest.approx(total.sum()/size.sum())
    assert (ours['low'], ours['high']) == pytest.approx(tuple(theirs.confidence_interval), abs=.08*se)   # a quantile's own error is .019 se, a difference's .027
