"Greedy k-center against scikit-learn's distances, fpsample's farthest points and apricot's facility location; ranks against scipy"
import numpy as np, pytest
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import pairwise_distances

from sage_paper.selectors import KCenter, Seen, k_center, ranks, unit
from sage_paper.ssis import term_correlations


def points(seed, n=400, d=12):
    "Unit vectors around a few centers"
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(n, d)) + 2*rng.normal(size=(9, d))[rng.integers(9, size=n)])


def greedy(x, k, start=0):
    "The plain algorithm on a full matrix of distances"
    far, chosen = pairwise_distances(x), [start]
    while len(chosen) < k: chosen.append(int(far[:, chosen].min(1).argmax()))
    return chosen


def radius(x, chosen): return pairwise_distances(x, x[chosen]).min(1).max()


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('active', [1, 16, 1024])
def test_k_center_against_sklearn(seed, active):
    x = points(seed)
    assert k_center(x, 60, seed, active).tolist() == greedy(x, 60, seed)


@pytest.mark.parametrize('seed', range(20))
def test_k_center_against_fpsample(seed):
    fpsample = pytest.importorskip('fpsample', reason='needs fpsample')
    x = points(seed).astype(np.float32)
    ours, theirs = k_center(x, 60), fpsample.fps_sampling(x, 60, start_idx=0)
    assert ours[:20].tolist() == theirs[:20].tolist() and radius(x, ours) == pytest.approx(radius(x, theirs), rel=0.02)


@pytest.mark.parametrize('seed', range(5))
def test_each_is_best_at_its_own_objective(seed):
    "k-center leaves no sample far; facility location is near on average"
    apricot = pytest.importorskip('apricot', reason='needs apricot-select')
    x = points(seed)
    theirs = apricot.FacilityLocationSelection(30, metric='cosine', optimizer='lazy').fit(x).ranking
    ours = KCenter(0.1, seed=seed).pool(Seen(embedding=x), 30)
    mean = lambda chosen: pairwise_distances(x, x[chosen]).min(1).mean()
    assert radius(x, ours) < radius(x, theirs) and mean(ours) > mean(theirs)


@pytest.mark.parametrize('seed', range(20))
def test_ranks_and_correlations_against_scipy(seed):
    x = np.random.default_rng(seed).integers(0, 20, (4, 50))
    assert ranks(x[0], x[0]) == pytest.approx((rankdata(x[0]) - 0.5)/50)
    assert term_correlations(x) == pytest.approx(spearmanr(x.T).statistic)
