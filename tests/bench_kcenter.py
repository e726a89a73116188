"Greedy k-center against its peers: `python tests/bench_kcenter.py [n d k]` prints seconds and covering radii; peers that are not installed are left out"
import sys, time
from importlib.util import find_spec

import numpy as np
from sklearn.metrics import pairwise_distances

from sage_paper.selectors import k_center, unit


def data(n, d, seed=0):
    "Unit vectors, single precision: spread evenly, around 1,000 and around 20 centers, and near 12 dimensions"
    rng = np.random.default_rng(seed)
    def around(m, s): return rng.normal(size=(m, d))[rng.integers(m, size=n)] + s*rng.normal(size=(n, d))
    sets = dict(even=rng.normal(size=(n, d)), clusters_1000=around(1000, .3), clusters_20=around(20, .1), low_rank=2 + rng.normal(size=(n, 12)) @ rng.normal(size=(12, d)) + .05*rng.normal(size=(n, d)))
    return {name: np.ascontiguousarray(unit(x.astype(np.float32))) for name, x in sets.items()}


def greedy(distances):
    "The plain algorithm, O(n) memory; `distances(x, c)` are those of all rows to row c, squared or not"
    def choose(x, k):
        near, chosen = distances(x, 0), [0]
        while len(chosen) < k:
            chosen.append(int(near.argmax()))
            near = np.minimum(near, distances(x, chosen[-1]))
        return np.array(chosen)
    return choose


def by_product():
    "The same by one product of matrix and vector a step"
    norms = {}
    def distances(x, c):
        sq = norms.setdefault(id(x), np.einsum('ij,ij->i', x, x))
        return sq + sq[c] - 2*(x @ x[c])
    return greedy(distances)


def peers(n):
    "Name → function(x, k) → indices"
    yield 'numpy, differences', greedy(lambda x, c: ((x - x[c])**2).sum(1))
    yield 'numpy, a product a step', by_product()
    yield 'scikit-learn pairwise_distances', greedy(lambda x, c: pairwise_distances(x, x[[c]])[:, 0])
    if find_spec('fpsample'):
        import fpsample
        yield 'fpsample', lambda x, k: fpsample.fps_sampling(x, k, start_idx=0)
    if find_spec('apricot') and n <= 5000:   # another objective, and memory O(n²)
        from apricot import FacilityLocationSelection
        yield 'apricot facility location', lambda x, k: FacilityLocationSelection(k, metric='cosine', optimizer='lazy').fit(x).ranking


def radius(x, chosen): return float(np.sqrt(2*max(0, 1 - min((b @ x[chosen].T).max(1).min() for b in np.array_split(x, 20)))))


def main(n=50_000, d=384, k=1000):
    print(f'{k:,} of {n:,} × {d}, float32')
    for name, x in data(n, d).items():
        for who, choose in [('k_center', k_center), *peers(n)]:
            start = time.perf_counter()
            chosen = choose(x, k)
            print(f'{name:15}{who:34}{time.perf_counter() - start:8.2f} s   radius {radius(x, chosen):.4f}', flush=True)


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
