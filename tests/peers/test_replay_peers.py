"Importance-weighted replay against torchrl and cpprb: the same priorities, the same weights, the same frequencies"
import numpy as np, pytest
from scipy.stats import chisquare

from sage_paper.replay import ImportanceBuffer

SEEDS = range(20)


def case(seed):
    "Importance, its exponent, and that of the weights"
    rng = np.random.default_rng(seed)
    return 10**rng.uniform(-3, 3, rng.integers(2, 300)), rng.uniform(.1, 1.5), rng.uniform(0, 1)


class Ours:
    def __init__(self, importance, a, b):
        self.buffer = ImportanceBuffer(len(importance), a, b)
        self.buffer.extend(range(len(importance)), importance)

    def update(self, slots, importance): self.buffer.update(slots, importance)
    def draw(self, n, progress=0):
        draws = [self.buffer.draw(len(self.buffer), progress) for _ in range(-(-n//len(self.buffer)))]
        return np.concatenate([d.slots for d in draws]), np.concatenate([d.weights for d in draws])


class TorchRL:
    tolerance = 1e-12

    def __init__(self, importance, a, b):
        torch = pytest.importorskip('torch', reason='needs torch')
        data = pytest.importorskip('torchrl.data', reason='needs torchrl')
        try: self.sampler = data.PrioritizedSampler(len(importance), a, b, eps=0., dtype=torch.double, max_priority_within_buffer=True)
        except RuntimeError as e: pytest.skip(f'torchrl without its compiled trees: {e}')
        self.torch, self.storage = torch, data.LazyTensorStorage(len(importance))
        self.storage.set(range(len(importance)), torch.arange(len(importance)))
        self.update(np.arange(len(importance)), importance)

    def update(self, slots, importance): self.sampler.update_priority(self.torch.as_tensor(slots), self.torch.as_tensor(importance))

    def priorities(self): return self.sampler._sum_tree[self.torch.arange(len(self.storage))].numpy()

    def largest(self): return float(self.sampler._max_priority[0])

    def draw(self, n, b):
        self.sampler.beta = b
        slots, info = self.sampler.sample(self.storage, n)
        return slots.numpy(), info['priority_weight'].numpy()


class CppRB:
    tolerance = 1e-5   # it keeps priorities and weights in single precision

    def __init__(self, importance, a, b):
        cpprb = pytest.importorskip('cpprb', reason='needs cpprb')
        self.buffer = cpprb.PrioritizedReplayBuffer(len(importance), dict(x={}), alpha=a, eps=0)
        self.buffer.add(x=np.arange(len(importance)), priorities=importance)

    def update(self, slots, importance): self.buffer.update_priorities(slots, importance)

    def draw(self, n, b):
        d = self.buffer.sample(n, b)
        return d['indexes'].astype(int), d['weights']


PEERS = pytest.mark.parametrize('peer', [TorchRL, CppRB])


def both(peer, seed):
    "Ours and theirs, filled alike and updated alike"
    importance, a, b = case(seed)
    ours, theirs, rng = Ours(importance, a, b), peer(importance, a, b), np.random.default_rng(seed)
    slots = rng.permutation(len(importance))[:len(importance)//2]
    new = 10**rng.uniform(-2, 2, len(slots))
    for each in (ours, theirs): each.update(slots, new)
    return ours, theirs, b


@pytest.mark.parametrize('seed', SEEDS)
def test_priorities(seed):
    "Number by number; and the largest one held, which newcomers get"
    ours, theirs, _ = both(TorchRL, seed)
    np.testing.assert_allclose(ours.buffer.priorities.leaves, theirs.priorities(), rtol=1e-12)
    assert ours.buffer.largest.top == pytest.approx(theirs.largest()**ours.buffer.a, rel=1e-9)


@PEERS
@pytest.mark.parametrize('seed', SEEDS)
def test_weights(peer, seed):
    "Item by item, for every item that either of them has drawn"
    ours, theirs, start = both(peer, seed)
    p = ours.buffer.priorities.leaves
    for progress in (0, .3, 1):
        b = start + (1 - start)*progress
        slots, weights = theirs.draw(1000, b)
        np.testing.assert_allclose(weights, (p.min()/p[slots])**b, rtol=peer.tolerance)
        slots, weights = ours.draw(1000, progress)
        np.testing.assert_allclose(weights, (p.min()/p[slots])**b, rtol=1e-12)


@PEERS
@pytest.mark.parametrize('seed', range(5))
def test_probabilities(peer, seed):
    "Theirs are drawn independently, so their counts fit our probabilities by a chi-square test; items too rare for it count as one"
    ours, theirs, b = both(peer, seed)
    p = ours.buffer.priorities.leaves
    np.random.seed(seed)
    counts, expected = np.bincount(theirs.draw(20_000, b)[0], minlength=len(p)), 20_000*p/p.sum()
    rare = expected < 10
    if rare.any(): counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    assert chisquare(counts, expected).pvalue > 1e-4
