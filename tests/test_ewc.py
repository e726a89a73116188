"Elastic weight consolidation: springs against their sum, their gradient, and a training step"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from sage_paper.calls import Sample, ToolCall
from sage_paper.ewc import EWC, diagonal_fisher
from sage_paper.model import encode, forward, tiny_lm
from sage_paper.trainers import Trainer

SHAPES = (3, 4), (4,)


class Net(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.ParameterList([torch.randn(*s, generator=g) for s in SHAPES])
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def move(self, seed):
        g = torch.Generator().manual_seed(seed)
        for p in self.weights: p.data.add_(torch.randn(p.shape, generator=g))
    def copies(self): return [p.detach().clone() for p in self.weights]


def some_fisher(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(*s, generator=g) for s in SHAPES]

def springs(net, tasks): return sum((f.double()*(p.double() - at.double())**2).sum() for fisher, where in tasks for f, p, at in zip(fisher, net.weights, where))

def learn(net, ewc, seeds):
    "Tasks one after the other: where the weights were, and the Fisher information there"
    out = []
    for k in seeds:
        net.move(k)
        ewc.consolidate(fisher := some_fisher(k))
        out.append((fisher, net.copies()))
    return out


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.floats(0, 100), st.integers(100, 199))
def test_many_springs_are_one(seeds, strength, later):
    net = Net(0)
    ewc = EWC(net, strength)
    tasks = learn(net, ewc, seeds)
    net.move(later)
    wanted = (strength/2*springs(net, tasks)).item()
    assert ewc.penalty() == pytest.approx(wanted, rel=1e-4, abs=1e-4*strength)
    (strength/2*springs(net, tasks)).backward()
    wanted = [p.grad.clone() for p in net.weights]
    for p in net.weights: p.grad.zero_()
    ewc.pull()
    for p, w in zip(net.weights, wanted): torch.testing.assert_close(p.grad, w, rtol=1e-3, atol=1e-4*max(strength, 1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.floats(0, 1), st.integers(100, 199))
def test_the_online_form_fades_and_follows(seeds, decay, later):
    net = Net(0)
    ewc = EWC(net, 2., decay)
    tasks = learn(net, ewc, seeds)
    assert ewc.penalty() == pytest.approx(0, abs=1e-4)
    stiffness = [sum(decay**(len(tasks) - 1 - k)*fisher[i] for k, (fisher, _) in enumerate(tasks)) for i in range(len(SHAPES))]
    net.move(later)
    assert ewc.penalty() == pytest.approx(springs(net, [(stiffness, tasks[-1][1])]).item(), rel=1e-4, abs=1e-4)


def test_the_penalty_is_positive_and_grows_with_drift():
    net = Net(0)
    ewc = EWC(net, 3.)
    learn(net, ewc, [1])
    direction, seen = [torch.randn_like(p) for p in net.weights], []
    for _ in range(6):
        seen.append(ewc.penalty())
        for p, d in zip(net.weights, direction): p.data.add_(d, alpha=0.1)
    assert seen[0] == pytest.approx(0, abs=1e-5) and np.all(np.diff(seen) > 0) and np.all(np.diff(seen, 2) > 0)


def test_what_is_frozen_has_no_spring(): assert len(EWC(Net(0), 1.).params) == len(SHAPES)


@pytest.mark.parametrize('fisher,what', [([torch.ones(3, 4), torch.ones(5)], 'parameter 1'), ([torch.full((3, 4), float('nan')), torch.ones(4)], 'parameter 0'), ([torch.ones(3, 4), -torch.ones(4)], 'parameter 1')])
def test_what_is_no_fisher_information_is_named(fisher, what):
    net = Net(0)
    ewc = EWC(net, 1.)
    with pytest.raises(ValueError, match=what): ewc.consolidate(fisher)
    assert ewc.penalty() == 0 and not any(a.any() for a in ewc.stiffness)


# ---- with a language model ----

LM_ = tiny_lm()
SOME = encode([Sample(str(i), 'tea '*(1 + i % 4), (ToolCall(f'tool{i}'),)) for i in range(6)], LM_.tokenizer)


def test_the_fisher_information_is_of_single_samples():
    found = diagonal_fisher(LM_, SOME)
    params = [p for p in LM_.model.parameters()]
    each = [torch.autograd.grad(forward(LM_, LM_.collate([e])).nll.mean(), params) for e in SOME]
    for f, *gs in zip(found, *each):
        wanted = torch.stack(gs).pow(2).mean(0)
        torch.testing.assert_close(f, wanted, rtol=1e-3, atol=1e-6*float(wanted.max()))
    assert all(p.grad is None for p in params)


def test_a_trainer_steps_along_the_pulled_gradient():
    "One step of plain gradient descent, clipping out of reach: the weights move by the loss's gradient and the springs'"
    lm = tiny_lm()
    ewc = EWC(lm.model, 50.)
    ewc.consolidate([torch.rand_like(p) for p in lm.model.parameters()])
    with torch.no_grad():
        for p in lm.model.parameters(): p.add_(0.01*torch.randn_like(p))
    trainer = Trainer(lm, 0.1, 10, warmup=0, cooldown=0, max_norm=1e9, after_backward=[ewc.pull])
    trainer.opt = torch.optim.SGD(lm.model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in lm.model.parameters()]
    loss = forward(lm, lm.collate(SOME)).nll.mean()
    wanted = [g + 50*(a*p - b) for g, a, p, b in zip(torch.autograd.grad(loss, list(lm.model.parameters())), ewc.stiffness, before, ewc.moment)]
    trainer.step(SOME)
    for p, b, w in zip(lm.model.parameters(), before, wanted): torch.testing.assert_close(b - 0.1*w, p.detach(), rtol=1e-4, atol=1e-5)
