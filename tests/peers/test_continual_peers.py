"Elastic weight consolidation and the reservoir against Avalanche: the same importances, springs and weights, the same sets held"
from itertools import combinations
from types import SimpleNamespace

import numpy as np, pytest, torch
from scipy.stats import chi2_contingency, chisquare
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from sage_paper.calls import Sample, ToolCall
from sage_paper.ewc import EWC, diagonal_fisher
from sage_paper.model import encode, forward, tiny_lm
from sage_paper.replay import ReservoirBuffer

try: pytest.importorskip('avalanche', reason='needs avalanche-lib')
except RuntimeError as e: pytest.skip(f'avalanche-lib with a torchvision that this torch does not load: {e}', allow_module_level=True)
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training import EWC as Strategy
from avalanche.training.plugins import EWCPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer

# Their penalty is lambda times the sum of F (w - w*)^2, ours half of that.
STRENGTH = 3.
FORMS = pytest.mark.parametrize('decay', [None, .5], ids=['separate', 'online'])


@pytest.fixture
def double():
    "Double precision, in which both are told apart from their rounding; it holds for the parameters that Avalanche keeps too"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(before)


def stream(seed, n_tasks=3, n=24):
    "Tasks of three classes, each with a rule of its own"
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, 5, generator=g) for _ in range(n_tasks)]
    return [(x, (x @ torch.randn(5, 3, generator=g)).argmax(1)) for x in inputs]

def small(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

def move(net, seed):
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data.add_(torch.randn(p.shape, generator=g), alpha=.3)

def squares(net, x, y, size=1):
    "Mean over batches of the squared gradient"
    params = list(net.parameters())
    each = [torch.autograd.grad(cross_entropy(net(x[i:i + size]), y[i:i + size]), params) for i in range(0, len(x), size)]
    return [torch.stack(g).pow(2).mean(0) for g in zip(*each)]

def apart(ours, theirs):
    "The largest difference, as a part of the largest number"
    ours, theirs = (torch.cat([t.detach().flatten() for t in ts]) for ts in (ours, theirs))
    return float((ours - theirs).abs().max()/theirs.abs().max())


def form(decay):
    "In Avalanche's words"
    return dict(mode='separate') if decay is None else dict(mode='online', decay_factor=decay)

def importances(net, data, size, loss=cross_entropy):
    "Avalanche's, over batches of `size`"
    return [i.data for i in EWCPlugin(STRENGTH/2).compute_importances(net, loss, torch.optim.SGD(net.parameters(), 1.), data, 'cpu', size).values()]


@pytest.mark.parametrize('seed', range(5))
def test_importances(seed, double):
    "Theirs are of batches; with a sample a batch they are the Fisher information's diagonal, and nowhere near it with eight"
    net, (x, y) = small(seed), stream(seed)[0]
    found = {size: importances(net, TensorDataset(x, y), size) for size in (1, 8)}
    differences = {size: apart(squares(net, x, y, size), theirs) for size, theirs in found.items()}
    left = float(sum(f.sum() for f in found[8])/sum(f.sum() for f in found[1]))
    print(f'\nimportances: apart by {max(differences.values()):.0e} of the largest; batches of 8 have {left:.2f} of the importance of single samples')
    assert max(differences.values()) < 1e-12 and left < .5


def test_importances_of_a_language_model():
    "`diagonal_fisher` itself; samples of different lengths"
    lm = tiny_lm()
    encoded = encode([Sample(str(i), 'tea '*(1 + i % 4), (ToolCall(f'tool{i}'),)) for i in range(6)], lm.tokenizer)
    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = lm.model
        def forward(self, which): return forward(lm, lm.collate([encoded[i] for i in which])).nll
    k = torch.arange(len(encoded))
    theirs = importances(Losses(), TensorDataset(k, k), 1, lambda nll, _: nll.mean())
    difference = apart(diagonal_fisher(lm, encoded), theirs)
    print(f'\nimportances of a language model: apart by {difference:.0e} of the largest')
    assert difference < 1e-5


@FORMS
@pytest.mark.parametrize('seed', range(5))
def test_springs(seed, decay, double):
    "The penalty, which Avalanche adds up in single precision, and its gradient, after one task, two and three"
    net = small(seed)
    ours, theirs, differences = EWC(net, STRENGTH, decay), EWCPlugin(STRENGTH/2, **form(decay)), []
    s = SimpleNamespace(model=net, device='cpu', _criterion=cross_entropy, optimizer=torch.optim.SGD(net.parameters(), 1.), train_mb_size=1)
    for k, (x, y) in enumerate(stream(seed)):
        s.clock, s.experience = SimpleNamespace(train_exp_counter=k), SimpleNamespace(dataset=TensorDataset(x, y))
        theirs.after_training_exp(s)
        ours.consolidate(squares(net, x, y))
        s.clock, s.loss = SimpleNamespace(train_exp_counter=k + 1), torch.zeros(())
        move(net, 10*seed + k)
        theirs.before_backward(s)
        wanted = torch.autograd.grad(s.loss, list(net.parameters()))
        for p in net.parameters(): p.grad = torch.zeros_like(p)
        ours.pull()
        differences.append((abs(ours.penalty()/s.loss.item() - 1), apart([p.grad for p in net.parameters()], wanted)))
        assert ours.penalty() > .01
    penalty, gradient = map(max, zip(*differences))
    print(f'\n{form(decay)["mode"]} springs: penalties apart by {penalty:.0e}, gradients by {gradient:.0e} of the largest')
    assert penalty < 1e-6 and gradient < 1e-12


@FORMS
@pytest.mark.filterwarnings('ignore:No loggers specified')
@pytest.mark.parametrize('seed', range(3))
def test_weights_after_a_stream(seed, decay, double):
    "Three tasks of plain gradient descent, a sample a step; Avalanche's own loop against ours"
    tasks, rate, epochs = stream(seed), .1, 3
    net = small(seed)
    strategy = Strategy(model=net, optimizer=torch.optim.SGD(net.parameters(), rate), criterion=torch.nn.CrossEntropyLoss(), ewc_lambda=STRENGTH/2,
                        train_mb_size=1, train_epochs=epochs, evaluator=None, **form(decay))
    for experience in benchmark_from_datasets(train=[AvalancheDataset([TensorDataset(x, y)]) for x, y in tasks]).train_stream:
        strategy.train(experience, shuffle=False)

    def ours(strength):
        net = small(seed)
        ewc, opt = EWC(net, strength, decay), torch.optim.SGD(net.parameters(), rate)
        for x, y in tasks:
            for i in list(range(len(x)))*epochs:
                opt.zero_grad()
                cross_entropy(net(x[[i]]), y[[i]]).backward()
                ewc.pull()
                opt.step()
            ewc.consolidate(squares(net, x, y))
        return list(net.parameters())

    held, free = (apart(ours(strength), list(net.parameters())) for strength in (STRENGTH, 0))
    print(f'\n{form(decay)["mode"]} springs, weights after three tasks: apart by {held:.0e} of the largest, without springs by {free:.2f}')
    assert held < 1e-10 and free > .05


def test_reservoir():
    "Tasks of 4, 1 and 5 items, a buffer of 3: after each, every set of three is held equally often, by ours and by theirs"
    runs, ends, capacity = 2000, (4, 5, 10), 3
    sets = {n: {c: k for k, c in enumerate(combinations(range(n), capacity))} for n in ends}
    counts = {n: np.zeros((2, len(sets[n])), int) for n in ends}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {n: AvalancheDataset([TensorDataset(torch.arange(start, n))]) for start, n in zip((0, *ends), ends)}
        for run in range(runs):
            ours, theirs = ReservoirBuffer(capacity, seed=run), ReservoirSamplingBuffer(capacity)
            for start, n in zip((0, *ends), ends):
                ours.extend(range(start, n))
                theirs.update_from_dataset(parts[n])
                for row, held in enumerate((ours.items, [int(x) for x, in theirs.buffer])): counts[n][row, sets[n][tuple(sorted(held))]] += 1
    for n, c in counts.items():
        p = [chisquare(c[0]).pvalue, chisquare(c[1]).pvalue, chi2_contingency(c).pvalue]
        print(f'\n{runs} reservoirs of {capacity} after {n} items: p = {p[0]:.2f} for ours against uniform, {p[1]:.2f} for theirs, {p[2]:.2f} for one against the other', end='')
        assert min(p) > 1e-3
