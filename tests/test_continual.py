"Continual learning: what a run's description holds, whom a memory holds, what a round makes untrue"
import dataclasses, json
from collections import Counter

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from conftest import ROOT
from sage_paper.calls import Sample, ToolCall
from sage_paper.config import SettingsError, load_settings
from sage_paper.continual import Held, Phase, Replay, Strategy, TopBuffer, learn_phases
from sage_paper.continual_runs import (accuracy_matrix, continual_choices, continual_spec, continual_specs, continual_tuning_specs, in_rounds, old_and_new,
                                       read_choice, with_changes)
from sage_paper.model import encode, tiny_lm
from sage_paper.replay import FIFOBuffer, ImportanceBuffer, ReservoirBuffer
from sage_paper.sage import BalancedBuffer, Dark, Sage, replay_share
from sage_paper.trainers import Learnt, Trainer

PAPER, SMOKE, GEMMA = (load_settings('continual', p, ROOT/'settings.ini') for p in ('paper', 'smoke', 'gemma'))


# ---- settings ----

@pytest.mark.parametrize('s,n', [(PAPER, 4), (GEMMA, 2)], ids=['paper', 'gemma'])
def test_every_strategy_has_as_many_tries(s, n):
    tries = Counter(read_choice(x)[0] for x in s.grid)
    assert set(tries) >= set(s.strategies) and set(tries.values()) == {n}
    assert len(set(s.grid)) == len(s.grid)


@pytest.mark.parametrize('s', [PAPER, SMOKE, GEMMA], ids=['paper', 'smoke', 'gemma'])
def test_every_strategy_has_one_choice(s):
    chosen = [read_choice(x)[0] for x in s.chosen]
    assert len(set(chosen)) == len(chosen) and set(chosen) >= set(s.strategies)


@pytest.mark.parametrize('s', [PAPER, GEMMA], ids=['paper', 'gemma'])
def test_the_choices_are_among_the_tries(s): assert {read_choice(x) for x in s.chosen} <= {read_choice(x) for x in s.grid}


@pytest.mark.parametrize('s', [PAPER, GEMMA], ids=['paper', 'gemma'])
def test_the_choices_are_the_ones_found(s):
    found = [json.loads(p.read_text()) for p in sorted((ROOT/'runs/continual_tuning'/s.profile).glob('*.json'))]
    assert {json.dumps(r['spec'], sort_keys=True) for r in found} == {json.dumps(x, sort_keys=True) for x in continual_tuning_specs(s)}
    assert continual_choices(found) == {name: tuple(rest) for name, *rest in map(read_choice, s.chosen)}


@pytest.mark.parametrize('change', [dict(gain=2.), dict(share=(0.1, 0.2)), dict(logit_weight=1.), dict(sharpness=1.5), dict(rank=3), dict(n_changed=50), dict(buffers=(9,)), dict(ablations=('ratio',)), dict(seeds=(7,))])
def test_a_run_is_described_by_its_own_settings_alone(change):
    def of(s, name, **kw): return continual_spec(s, 'toolstream', name, 0, **kw)
    other, sages, lora, changes = dataclasses.replace(PAPER, **change), {'gain', 'share', 'logit_weight', 'sharpness'}, {'rank'}, {'n_changed'}
    assert of(PAPER, 'er') == of(other, 'er')
    assert (of(PAPER, 'sage') == of(other, 'sage')) == (not set(change) & sages)
    assert (of(PAPER, 'finetune_lora') == of(other, 'finetune_lora')) == (not set(change) & lora)
    assert (of(PAPER, 'er', protocol='changes') == of(other, 'er', protocol='changes')) == (not set(change) & changes)


def test_no_run_is_made_twice():
    runs = [json.dumps(x, sort_keys=True) for x in [*continual_specs(PAPER), *continual_tuning_specs(PAPER)]]
    assert len(set(runs)) == len(runs)


def test_tuning_never_touches_what_is_reported():
    assert {x['split'] for x in continual_tuning_specs(PAPER)} == {'tuning'} and {x['split'] for x in continual_specs(PAPER)} == {'report'}
    a, b = (old_and_new('sageworld', 20, 10, 2, 1, split) for split in ('report', 'tuning'))
    assert not {x.query for t in a for x in (*t.train, *t.test)} & {x.query for t in b for x in (*t.train, *t.test)}


@pytest.mark.parametrize('change, wrong', [(dict(n_old=(1, 2)), 'n_old'), (dict(share=(0.9, 0.1)), 'share'), (dict(n_changed=3), 'even'), (dict(warmup=2.), 'warmup')])
def test_settings_that_make_no_sense_are_refused(change, wrong):
    with pytest.raises(SettingsError, match=wrong): dataclasses.replace(PAPER, **change)


# ---- rounds ----

OLD, NEW = old_and_new('sageworld', 20, 10, 2, 1, 'report')

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10), st.sampled_from(['date', 'reverse', 'random']), st.integers(0, 5))
def test_rounds_part_the_new_tools(n, order, seed):
    r = in_rounds(OLD, NEW, n, order, seed)
    assert len(r.train) == n + 1 and list(r.test)[0] == 'old'
    for parts, whole in ((r.train, OLD.train + NEW.train), (r.test.values(), OLD.test + NEW.test)): assert Counter(x.id for p in parts for x in p) == Counter(x.id for x in whole)
    tools = [{x.tool_ids[0] for x in p} for p in r.train[1:]]
    assert max(map(len, tools)) - min(map(len, tools)) <= 1
    assert all({x.tool_ids[0] for x in t} <= own for t, own in zip(list(r.test.values())[1:], tools))


def test_the_order_of_dates_is_kept_and_reversed():
    def first(order): return {x.tool_ids[0] for x in in_rounds(OLD, NEW, 5, order, 0).train[1]}
    assert first('date') == {*NEW.tools[:2]} and first('reverse') == {*NEW.tools[-2:]}
    assert first('random') != {x.tool_ids[0] for x in in_rounds(OLD, NEW, 5, 'random', 1).train[1]}


@pytest.mark.parametrize('seed', range(3))
def test_what_changes_is_exchanged_in_pairs(seed):
    r = with_changes(OLD, NEW, 4, 3, seed)
    now = {x.tool_ids[0]: x.calls[0].name for x in r.test['changed']}
    assert len(now) == 4 and all(now[now[t]] == t != now[t] for t in now) and set(now) == r.stale[3]
    before = {x.id: x for x in r.test['changed before']}
    assert all(x.calls[0].arguments == before[x.id.removesuffix('/changed')].calls[0].arguments for x in r.test['changed'])
    assert not {x.tool_ids[0] for x in r.test['old']} & (r.stale[2] | r.stale[3]) and not r.stale[2] & r.stale[3]
    assert {x.tool_ids[0] for x in r.test['added']} | {x.tool_ids[0] for x in r.test['later']} == {*NEW.tools}


def test_a_matrix_has_the_shares_of_right_answers(): assert accuracy_matrix([dict(name='1100'), dict(name='1111')], [0, 1, 1, 1]).tolist() == [[1, 1/3], [1, 1]]


# ---- memories ----

GROUPS = st.lists(st.sampled_from('abcde'), min_size=1, max_size=60)

@given(GROUPS, st.integers(1, 12), st.integers(0, 3))
def test_groups_are_as_even_as_they_can_be(groups, capacity, seed):
    b = BalancedBuffer(capacity, seed)
    for k, g in enumerate(groups): b.add(Held(k, g, 0))
    held, come = Counter(h.group for h in b.items), Counter(groups)
    assert len(b.items) == min(capacity, len(groups)) and len({h.encoded for h in b.items}) == len(b.items)
    if (n := len(come)) <= capacity: assert all(held[g] >= min(come[g], max(held.values()) - 1) for g in come), n


@given(st.lists(st.floats(0, 9), min_size=1, max_size=40), st.integers(1, 9))
def test_the_top_stays(importance, capacity):
    b = TopBuffer(capacity)
    b.extend(range(len(importance)), importance)
    assert sorted(importance[k] for k in b.items) == sorted(importance)[-capacity:] and [importance[k] for k in b.items] == b.importance


@pytest.mark.parametrize('kind', [ReservoirBuffer, FIFOBuffer, ImportanceBuffer, TopBuffer])
def test_what_is_not_true_any_more_goes(kind):
    b = kind(8)
    b.extend(range(1, 9), range(1, 9))
    b.discard(lambda x: x > 6)
    b.extend([20, 21], [5, 6])
    assert sorted(b.items) == [1, 2, 3, 4, 5, 6, 20, 21]
    assert set(b.draw(8).items) <= {*b.items}


# ---- the loop ----

LM_ = tiny_lm()
KINDS = {kind: encode([Sample(str(i), f'{kind} {i}', (ToolCall(f'{kind}{i}'),)) for i in range(12)], LM_.tokenizer) for kind in ('tea', 'sky')}

class Dry(Trainer):
    "A trainer that keeps its books and trains on nothing"
    def step(self, encoded, weights=None, extra=None):
        self.steps = [*getattr(self, 'steps', []), encoded]
        self.budget.samples, self.budget.tokens = self.budget.samples + len(encoded), self.budget.tokens + sum(len(e.ids) for e in encoded)
        return Learnt(*(torch.zeros(len(encoded), *d) for d in ((), (4,), (4,))))


def go(strategy, epochs=6, batch_size=4):
    trainer, groups = Dry(LM_, 1e-3, 1, unit='tokens'), [str(i) for i in range(12)]
    strategy.begin(trainer)
    strategy.after_phase(Phase(KINDS['tea'], groups, 0))
    learn_phases(trainer, strategy, [Phase(KINDS['sky'], groups, epochs*sum(len(e.ids) for e in KINDS['sky']))], batch_size, lambda: None)
    return trainer


MAKERS = dict(finetune=Strategy, er=lambda: Replay(ReservoirBuffer(12), 0.5), der=lambda: Dark(ReservoirBuffer(12), 0.25, 1.), sage=lambda: Sage(BalancedBuffer(12)), fixed=lambda: Sage(BalancedBuffer(12), ratio=0.5, by_phase=False))

@pytest.mark.parametrize('name', MAKERS)
def test_all_train_on_as_much(name):
    trainer, total = go(MAKERS[name]()), 6*sum(len(e.ids) for e in KINDS['sky'])
    assert abs(trainer.budget.tokens - total) <= 2*max(len(e.ids) for e in KINDS['sky'])
    assert {len(x) for x in trainer.steps} == {4}


@pytest.mark.parametrize('name, part', [('finetune', 0.), ('er', 0.5), ('der', 0.25), ('fixed', 0.5)])
def test_a_step_has_the_part_of_memory_that_was_asked_for(name, part):
    steps, tea = go(MAKERS[name](), 40).steps, {*KINDS['tea']}
    assert abs(np.mean([e in tea for x in steps for e in x]) - part) < 0.05


def test_new_samples_are_met_equally_often():
    met = Counter(e for x in go(Strategy(), 7).steps for e in x)
    assert set(met) == {*KINDS['sky']} and max(met.values()) - min(met.values()) <= 1


@given(st.floats(-1, 5), st.floats(0, 5), st.floats(0, 20), st.floats(0, 0.5), st.floats(0.5, 0.9))
def test_the_share_is_within_its_bounds_and_rises_with_forgetting(f, d, gain, low, high):
    share = replay_share(f, d, gain, low, high)
    assert low <= share <= high and share <= replay_share(f + 0.1, d, gain, low, high) + 1e-9


def test_phases_that_are_forgotten_come_more_often():
    sage = Sage(ReservoirBuffer(200), seed=0)
    sage.buffer.extend([Held(None, '', p, 0.) for p in (0, 1) for _ in range(100)])
    sage.rise = {0: 0.3, 1: 0.}
    drawn = Counter(h.phase for _ in range(50) for h in sage.draw(10).items)
    assert 0.85 < drawn[0]/500 < 0.98   # 0.32 to 0.02, without replacement


def test_going_back_keeps_the_part_it_should():
    lm = tiny_lm()
    sage = Sage(BalancedBuffer(4), logit_weight=0., slow=0.25)
    sage.begin(Trainer(lm, 1e-3, 1, unit='tokens'))
    sage.after_phase(Phase(KINDS['tea'], ['']*12, 0))
    first = [p.detach().clone() for p in lm.model.parameters()]
    with torch.no_grad():
        for p in lm.model.parameters(): p.add_(1.)
    sage.after_phase(Phase(KINDS['sky'], ['']*12, 0))
    assert all(torch.allclose(p, q + 0.25, atol=1e-6) for p, q in zip(lm.model.parameters(), first))
