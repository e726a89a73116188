"Streaming: what is trained on, what is remembered and when, how priorities follow the losses"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from sage_paper.calls import Sample, ToolCall
from sage_paper.model import encode, tiny_lm
from sage_paper.replay import FIFOBuffer, ImportanceBuffer, ReservoirBuffer
from sage_paper.selectors import Random, Uncertainty, see
from sage_paper.ssis import SSIS
from sage_paper.trainers import Stream, Trainer, train_stream

LM_ = tiny_lm()
SOME = encode([Sample(str(i), 'tea '*(1 + i % 5), (ToolCall(f'tool{i % 7}'),)) for i in range(40)], LM_.tokenizer)


class Ledger(Trainer):
    "A trainer that does not train, and keeps what it is asked to"
    def __init__(self, total): super().__init__(LM_, 1e-3, total); self.batches, self.weights, self.rng = [], [], np.random.default_rng(0)

    def step(self, encoded, weights=None):
        self.batches.append(list(encoded)); self.weights.append(np.array(weights))
        self.budget.samples += len(encoded)
        draw = lambda *shape: torch.as_tensor(self.rng.exponential(size=shape), dtype=torch.float32)
        self.told = draw(len(encoded)), draw(len(encoded), 4), draw(len(encoded), 4)
        return self.told


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 12), st.integers(1, 50), st.sampled_from([None, 0.3, 1.]), st.booleans(),
       st.sampled_from([ReservoirBuffer, FIFOBuffer, ImportanceBuffer]))
def test_the_budget_is_met_exactly(n, total, batch_size, capacity, fraction, score_first, buffer):
    selector, trainer = None if fraction is None else Random(fraction), Ledger(total)
    order = np.random.default_rng(n).permutation(40)[:n].tolist()
    def run(): train_stream(trainer, SOME, order, batch_size, buffer(capacity), [], selector, score_first)
    if total < n and not (selector and score_first):
        with pytest.raises(ValueError, match='scored first'): run()
        return
    try: run()
    except ValueError as e:
        assert 'nothing was kept' in str(e) and fraction == 0.3
        return
    assert sum(map(len, trainer.batches)) == total
    if not (selector and score_first):   # all that arrives is trained on as it arrives, in order
        firsts = dict.fromkeys(id(e) for b in trainer.batches for e in b)
        assert list(firsts) == [id(SOME[i]) for i in order]


def test_what_arrives_is_replayed_two_steps_later():
    trainer, buffer = Ledger(1000), FIFOBuffer(100)
    stream = Stream(trainer, buffer)
    for k in range(5): stream.feed(SOME[2*k:2*k + 2], 40)
    assert [len(b) for b in trainer.batches] == [2, 2, 4, 6, 8]
    assert {id(e) for e in trainer.batches[4][2:]} == {id(e) for e in SOME[:6]}
    stream.finish()
    assert [k.encoded for k in buffer.items] == SOME[:10]


def test_half_is_remembered_and_priorities_follow_the_losses():
    trainer, buffer, ssis = Ledger(10_000), ImportanceBuffer(1000, seed=1), SSIS(0.5, seed=2)
    stream = Stream(trainer, buffer, ssis)
    for k in range(60): stream.feed([SOME[j % 40] for j in range(8*k, 8*k + 8)], 24)
    new, terms, draw, told = stream.open
    nll = trainer.told[0].numpy()
    stream.finish()
    assert 480*0.5 - 70 < len(buffer) < 480*0.5 + 70
    for slot, item, loss in list(zip(draw.slots, draw.items, nll[len(new):]))[::-1]:
        u = (np.sort(ssis.scales[0].latest.held) < loss).mean()   # the rank of the newest loss, its neighbours may have moved since
        expected = 0.4*u + 0.3*item.terms[1] + 0.3*item.terms[2]
        assert buffer.priorities.leaves[slot]**(1/buffer.a) == pytest.approx(expected, abs=0.02)
        assert buffer.items[slot] is item


def test_new_samples_weigh_one_and_replayed_ones_at_most():
    trainer, buffer = Ledger(10_000), ImportanceBuffer(1000)
    stream = Stream(trainer, buffer, SSIS(0.5))
    for k in range(20): stream.feed(SOME[2*k:2*k + 2], 12)
    for w in trainer.weights:
        assert (w[:2] == 1).all() and (w > 0).all() and (w <= 1).all()
    assert min(w.min() for w in trainer.weights) < 0.9


def test_a_slot_taken_over_keeps_its_new_priority():
    "Between a draw and its losses others arrive, and may take a slot"
    trainer, buffer = Ledger(1000), FIFOBuffer(4)
    told = []
    buffer.update = lambda slots, importance: told.append([buffer.items[s] for s in slots])
    stream = Stream(trainer, buffer, SSIS(1.))
    for k in range(12): stream.feed(SOME[2*k:2*k + 2], 6)
    drawn = [[e for e in b[2:]] for b in trainer.batches]
    assert all({id(i.encoded) for i in t} <= {id(e) for e in d} for t, d in zip(told, [d for d in drawn if d]))
    assert sum(map(len, told)) < sum(map(len, drawn))


def test_what_a_step_does_not_tell_has_to_be_scored_first():
    with pytest.raises(ValueError, match='Uncertainty needs `Seen.entropy`'):
        train_stream(Ledger(100), SOME, range(40), 8, ReservoirBuffer(8), [], Uncertainty(0.5, measure='entropy'))
    trainer = Ledger(100)
    train_stream(trainer, SOME, range(40), 8, ReservoirBuffer(8), [], Uncertainty(0.5, measure='entropy'), score_first=True)
    assert (trainer.budget.samples, trainer.budget.scored_samples) == (100, 40)


def test_a_steps_own_scores_are_those_of_a_pass_of_its_own():
    lm = tiny_lm()
    seen = see(lm, lm.collate(SOME[:8]), ['nll', 'embedding', 'gradient'])
    told = Trainer(lm, 1e-3, 100).step(SOME[:8])
    for a, b in zip((seen.nll, seen.embedding, seen.gradient), told): np.testing.assert_allclose(a, b.numpy(), atol=2e-6)
