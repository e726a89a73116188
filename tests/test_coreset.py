"Coresets: what a run's description holds, rates against their search, budgets in tokens"
import dataclasses, json

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from conftest import ROOT
from sage_paper.config import SettingsError, load_settings
from sage_paper.coreset_runs import ablation_specs, coreset_rates, coreset_spec, coreset_specs, coreset_tuning_specs, run_coreset
from sage_paper.model import encode, fresh_lm, load_lm, tiny_lm
from sage_paper.calls import Sample, ToolCall
from sage_paper.replay import ReservoirBuffer
from sage_paper.selectors import Longest, Random
from sage_paper.trainers import Curve, Trainer, train_batch, train_stream

PAPER, GEMMA = (load_settings('coreset', p, ROOT/'settings.ini') for p in ('paper', 'gemma'))
LM_ = tiny_lm()
MIXED = encode([Sample(str(i), 'tea '*(i % 9), (ToolCall(f'tool{i % 7}'),)) for i in range(60)], LM_.tokenizer)


def tuning(profile='paper'): return [json.loads(p.read_text()) for p in sorted((ROOT/'runs/coreset_tuning'/profile).glob('*.json'))]


@pytest.mark.parametrize('s', [PAPER, GEMMA], ids=lambda s: s.profile)
def test_the_rates_are_the_ones_found(s):
    found = tuning(s.profile)
    assert coreset_rates(found) == dict(zip(s.streams, s.lr))


def test_tuning_never_touches_what_is_reported():
    assert {r['spec']['split'] for r in tuning()} == {'tuning'} == {x['split'] for x in coreset_tuning_specs(PAPER)}
    assert not {r['spec']['seed'] for r in tuning()} & set(PAPER.seeds)
    wanted = coreset_tuning_specs(PAPER)
    assert all(r['spec'] in wanted for r in tuning())


def test_each_stream_has_its_own_rate():
    assert {(x['stream'], x['lr']) for x in coreset_specs(PAPER)} == set(zip(PAPER.streams, PAPER.lr))
    with pytest.raises(SettingsError, match='one for each'): dataclasses.replace(PAPER, lr=PAPER.lr[:1])


@pytest.mark.parametrize('change', [dict(ssis=(1., 0., 0.)), dict(scale='quantile'), dict(sharpness=1.5), dict(ablations=('risk',)), dict(ablation_fraction=0.2), dict(fractions=(0.9,)), dict(seeds=(7,))])
def test_a_run_is_described_by_its_own_settings_alone(change):
    of = lambda s, name: coreset_spec(s, 'toolstream', name, 0.3, 0)
    other = dataclasses.replace(PAPER, **change)
    assert of(PAPER, 'random') == of(other, 'random')
    assert (of(PAPER, 'ssis') == of(other, 'ssis')) == (not set(change) & {'ssis', 'scale', 'sharpness'})


def test_no_run_is_made_twice():
    runs = [json.dumps(x, sort_keys=True) for x in [*coreset_specs(PAPER), *(x for _, x in ablation_specs(PAPER))]]
    assert len(set(runs)) == len(runs)


# ---- a budget in tokens ----

class Dry(Trainer):
    "A trainer that keeps its books and trains on nothing"
    def step(self, encoded, weights=None):
        self.budget.samples += len(encoded)
        self.budget.tokens += sum(len(e.ids) for e in encoded)
        return LEARNT


class Told:
    is_cuda = False
    def numpy(self): return np.zeros((8, 4))
LEARNT = (Told(), Told(), Told())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0.2, 12), st.integers(1, 8), st.booleans(), st.sampled_from([Random, Longest]), st.integers(0, 5))
def test_token_budgets_are_met_to_within_a_batch(n, passes, batch_size, score_first, kind, seed):
    order = np.random.default_rng(seed).permutation(60)[:n].tolist()
    arriving = sum(len(MIXED[i].ids) for i in order)
    trainer, total = Dry(LM_, 1e-3, max(1, round(passes*arriving)), unit='tokens'), max(1, round(passes*arriving))
    curve = Curve(lambda: {}, 3)
    try: train_stream(trainer, MIXED, order, batch_size, ReservoirBuffer(20, seed), [curve], kind(0.5, seed=seed) if score_first else None, score_first)
    except ValueError as e:
        assert ('nothing was kept' in str(e) and score_first) or ('scored first' in str(e) and total < arriving and not score_first)
        return
    longest = max(len(e.ids) for e in MIXED)
    assert abs(trainer.budget.tokens - total) <= batch_size*longest
    assert curve.points[-1]['tokens'] == trainer.budget.tokens


def test_selectors_that_keep_long_samples_train_on_fewer():
    def trained(selector):
        trainer = Dry(LM_, 1e-3, 20_000, unit='tokens')
        train_stream(trainer, MIXED, range(60), 4, ReservoirBuffer(60), [], selector, score_first=True)
        return trainer.budget
    long, some = trained(Longest(0.3, sharpness=np.inf)), trained(Random(0.3))
    assert long.samples <= some.samples and abs(long.tokens - some.tokens) < 0.03*some.tokens


def test_a_budget_of_tokens_in_batches():
    trainer = Dry(LM_, 1e-3, 3*sum(len(e.ids) for e in MIXED), unit='tokens')
    train_batch(trainer, MIXED, 7, [])
    assert 0 <= trainer.budget.tokens - trainer.total <= 7*max(len(e.ids) for e in MIXED)
    with pytest.raises(ValueError, match='samples, tokens'): Trainer(LM_, 1e-3, 5, unit='steps')


# ---- one model a process ----

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny model, saved like any other"
    path = tmp_path_factory.mktemp('tiny')
    LM_.model.save_pretrained(path)
    LM_.tokenizer.save_pretrained(path)
    return str(path)


def test_a_run_leaves_nothing_to_the_next_one(folder):
    s = load_settings('coreset', 'smoke', ROOT/'settings.ini', model=folder, n_tools=5)
    def run(name, seed=0):
        r = run_coreset(coreset_spec(s, 'sageworld', name, 0.5, seed))
        return {k: r[k] for k in ('nll', 'items', 'correlations')} | {'tokens': r['budget']['tokens'], 'curve': [p['accuracy'] for p in r['curve']]}
    alone = {name: run(name) for name in ('ssis', 'rho_loss')}
    for name in ('random', 'rho_loss', 'ssis', 'all', 'ssis', 'rho_loss'):
        again = run(name)
        if name in alone: assert again == alone[name]
    assert run('ssis', seed=1) != alone['ssis']


def test_there_is_one_model_a_process_and_it_starts_anew(folder):
    lm = fresh_lm(folder, 'fp32')
    own = {k: v.clone() for k, v in load_lm(folder, 'fp32', 'cpu').model.state_dict().items()}
    trainer = Trainer(lm, 1e-2, 40)
    trainer.step(encode([Sample('a', 'tea', (ToolCall('kettle'),))], lm.tokenizer))
    assert any(not torch.equal(v.cpu(), own[k]) for k, v in lm.model.state_dict().items())
    assert fresh_lm(folder, 'fp32') is lm and all(p.grad is None for p in lm.model.parameters())
    assert all(torch.equal(v.cpu(), own[k]) for k, v in lm.model.state_dict().items())
