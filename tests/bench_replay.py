"Microseconds to update 64 priorities and to sample 64 items, by size and implementation: `python tests/bench_replay.py`"
import time

import numpy as np

from sage_paper.replay import ImportanceBuffer, SumTree

SIZES, BATCH = (10**4, 10**5, 10**6), 64


def stratified(rng): return (np.arange(BATCH) + rng.random(BATCH))/BATCH


def sum_tree(p, rng, branching=16):
    tree = type('Tree', (SumTree,), dict(branching=branching))(len(p))
    tree.fill(p)
    return tree.update, lambda: tree.find(stratified(rng)*tree.total)


def buffer(p, rng):
    "The whole buffer: four trees, checks and weights"
    b = ImportanceBuffer(len(p), a=1)
    b.load_state_dict(b.state_dict() | dict(items=[None]*len(p), priorities=p, keys=np.zeros(len(p)), gumbel=np.zeros(len(p))))
    return b.update, lambda: b.draw(BATCH, .5)


def cumulative_sum(p, rng):
    "What one would write first: everything anew for every batch"
    p = p.copy()
    def sample():
        c = np.cumsum(p)
        return np.searchsorted(c, stratified(rng)*c[-1], 'right')
    return p.__setitem__, sample


def torchrl(p, rng):
    import torch
    from torchrl.data import LazyTensorStorage, PrioritizedSampler
    sampler, storage = PrioritizedSampler(len(p), 1., .5, dtype=torch.double), LazyTensorStorage(len(p))
    storage.set(range(len(p)), torch.zeros(len(p)))
    sampler.update_priority(torch.arange(len(p)), torch.from_numpy(p))
    return lambda i, v: sampler.update_priority(torch.from_numpy(i), torch.from_numpy(v)), lambda: sampler.sample(storage, BATCH)


def cpprb(p, rng):
    from cpprb import PrioritizedReplayBuffer
    b = PrioritizedReplayBuffer(len(p), dict(x={}), alpha=1., eps=0)
    b.add(x=np.zeros(len(p)), priorities=p)
    return b.update_priorities, lambda: b.sample(BATCH, .5)


METHODS = dict(sum_tree=sum_tree, cumulative_sum=cumulative_sum, buffer=buffer, torchrl=torchrl, cpprb=cpprb)


def microseconds(make, n, repeat=7, number=200):
    "Least mean of `repeat` times `number` batches: of an update, and of a draw"
    rng = np.random.default_rng(0)
    update, sample = make(rng.random(n) + .01, rng)
    batches = [(rng.integers(n, size=BATCH), rng.random(BATCH) + .01) for _ in range(number)]
    def took(f, args):
        start = time.perf_counter()
        for a in args: f(*a)
        return (time.perf_counter() - start)/len(args)*1e6
    return min(took(update, batches) for _ in range(repeat)), min(took(sample, [()]*number) for _ in range(repeat))


def bench_replay():
    "{(method, n): (µs of an update, µs of a draw)}, of those that are installed"
    out = {}
    for name, make in METHODS.items():
        for n in SIZES:
            try: out[name, n] = microseconds(make, n, *((3, 20) if name == 'cumulative_sum' else ()))
            except ImportError: break
    return out


def main():
    print(f'{"µs a batch of 64":16} {"N":>9} {"update":>8} {"draw":>8} {"both":>8}')
    for (name, n), (update, draw) in bench_replay().items(): print(f'{name:16} {n:9,} {update:8.0f} {draw:8.0f} {update + draw:8.0f}')
    print('\nThe tree of a million leaves by branching factor')
    for k in (2, 4, 8, 16, 32, 64, 128, 256, 1024):
        update, draw = microseconds(lambda p, rng: sum_tree(p, rng, k), 10**6, 5, 100)
        print(f'{k:16} {10**6:9,} {update:8.0f} {draw:8.0f} {update + draw:8.0f}')


if __name__ == '__main__': main()
