"A-GEM: the projection against its definition, and in a training step"
import pytest, torch
from hypothesis import given, settings, strategies as st

from sage_paper.agem import AGEM, project
from sage_paper.calls import Sample, ToolCall
from sage_paper.model import encode, forward, tiny_lm
from sage_paper.trainers import Trainer

LM_ = tiny_lm()
SOME = encode([Sample(str(i), 'tea '*(1 + i % 4), (ToolCall(f'tool{i}'),)) for i in range(8)], LM_.tokenizer)
numbers = st.lists(st.tuples(st.floats(-10, 10, width=32), st.floats(-10, 10, width=32)), min_size=2, max_size=12)


def flat(parts): return torch.cat([x.flatten() for x in parts]).double()


@settings(max_examples=100, deadline=None)
@given(numbers, st.integers(1, 11))
def test_what_points_against_the_reference_is_taken_out_and_nothing_else(pairs, cut):
    g, r = torch.tensor(pairs, dtype=torch.float32).T
    split = lambda x: [x[:cut].clone(), x[cut:].clone()]
    parts, g, r = split(g), g.double(), r.double()
    product = project(parts, split(r.float()))
    after = flat(parts)
    assert product.item() == pytest.approx((g @ r).item(), rel=1e-4, abs=1e-3)
    if g @ r >= 0 or r @ r < 1e-12: torch.testing.assert_close(after, g, rtol=1e-5, atol=1e-4)
    else:
        torch.testing.assert_close(after, g - (g @ r)/(r @ r)*r, rtol=1e-3, atol=1e-3)
        assert abs(after @ r) <= 1e-3*(1 + g.norm()*r.norm())
    assert after.norm() <= g.norm() + 1e-3   # a projection never makes longer


def test_the_reference_is_the_gradient_on_memory_and_leaves_none_behind():
    agem, params = AGEM(LM_), list(LM_.model.parameters())
    agem.refer(SOME[:4])
    wanted = torch.autograd.grad(forward(LM_, LM_.collate(SOME[:4])).nll.mean(), params)
    torch.testing.assert_close(flat(agem.reference), flat(wanted), rtol=1e-4, atol=1e-9)
    assert all(p.grad is None for p in params)
    first = agem.flops
    agem.refer(SOME[4:])
    assert not torch.allclose(flat(agem.reference), flat(wanted)) and agem.flops > first > 0


@pytest.mark.parametrize('sign', [-1, 1])
def test_a_step_does_not_raise_the_loss_in_memory(sign):
    "One small step of plain gradient descent, on a loss that is memory's own, or its negative"
    lm = tiny_lm()
    agem = AGEM(lm)
    trainer = Trainer(lm, 1e-3, 10, warmup=0, cooldown=0, max_norm=1e9, after_backward=[agem.hold])
    trainer.opt = torch.optim.SGD(lm.model.parameters(), lr=0.05)
    before, weights = forward(lm, lm.collate(SOME)).nll.mean().item(), [p.detach().clone() for p in lm.model.parameters()]
    agem.refer(SOME)
    trainer.step(SOME, torch.full((len(SOME),), float(sign)))
    after = forward(lm, lm.collate(SOME)).nll.mean().item()
    moved = max((p.detach() - w).abs().max().item() for p, w in zip(lm.model.parameters(), weights))
    if sign > 0: assert after < before - 1e-6 and agem.product > 0
    else: assert moved < 1e-6 and agem.product < 0   # all of it pointed against memory


def test_without_a_reference_steps_are_plain():
    def weights(hold):
        lm = tiny_lm()
        agem = AGEM(lm)
        trainer = Trainer(lm, 1e-3, 100, after_backward=[agem.hold] if hold else [])
        for _ in range(3): trainer.step(SOME)
        return flat(p.detach() for p in lm.model.parameters())
    assert torch.equal(weights(True), weights(False))
