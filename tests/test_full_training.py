"The whole method: what each variant leaves out, what all of them spend, and what the table makes of the records"
import copy, dataclasses, json
from types import SimpleNamespace

import numpy as np, pytest, torch
from hypothesis import assume, given, settings as examples, strategies as st

from conftest import ROOT
from sage_paper.calls import Sample, ToolCall
from sage_paper.cli import main
from sage_paper.config import SettingsError, load_settings, read_changes
from sage_paper.experiments import CATALOGUE
from sage_paper.full_training import BUFFERS, AdaptiveStream, Successes, train_adaptively
from sage_paper.full_training_report import (LABELS, check_full_training, costs, decisive, full_training_chart, full_training_differences, full_training_latex, full_training_numbers, measures, rows, stage_means,
                                             write_full_training)
from sage_paper.full_training_runs import (CHANGES, FULL_TRAINING_VERSION, RL_ONLY, TERMS, full_training_records, full_training_spec, full_training_specs, learn_batch, learn_stream, run_full_training,
                                           stream_parts, term_weights)
from sage_paper.model import encode, tiny_lm
from sage_paper.records import RecordError, canonical, record_key, run_or_load
from sage_paper.replay import Draw, ImportanceBuffer
from sage_paper.report import ReportError
from sage_paper.running import lend, make_plan
from sage_paper.rl_runs import grounds
from sage_paper.samples import near_duplicates
from sage_paper.selectors import Random
from sage_paper.ssis import SSIS
from sage_paper.trainers import Trainer

FILE = ROOT/'settings.ini'
SMOKE, PAPER = load_settings('full_training', 'smoke', FILE), load_settings('full_training', 'paper', FILE)
LM_ = tiny_lm()
SOME = encode([Sample(str(i), 'tea '*(1 + i % 5), (ToolCall(f'tool{i % 7}'),)) for i in range(60)], LM_.tokenizer)
LONGEST = max(len(e.ids) for e in SOME)


@pytest.fixture(scope='module')
def settings(tiny_folder):
    "The smoke profile, somewhat larger, with a random model in a folder and all variants"
    return dataclasses.replace(SMOKE, model=tiny_folder, precision='fp32', variants=tuple(CHANGES), train_per_set=4, batch_size=4, buffer_size=6, remembered=0.5, n_queries=2, passes=8., max_new_tokens=4)


@pytest.fixture(scope='module')
def records(settings): return [dict(key=record_key('full_training', FULL_TRAINING_VERSION, s), spec=s, result=run_full_training(s)) for s in full_training_specs(settings)]


# ---- What a run is described by

DIFFER = dict(full=set(), no_ssis={'selector', 'ssis', 'sharpness', 'priority_exponent'}, no_uncertainty={'ssis'}, no_distance={'ssis'}, no_risk={'ssis'}, no_priority={'replay'}, no_weights={'replay'},
              no_adaptive={'swing', 'gain'}, no_rl={'rl_part', *RL_ONLY}, batch={'training', 'lr_batch', 'lr_stream', 'cooldown', 'remembered', 'ssis', 'sharpness', 'priority_exponent', 'swing', 'gain', 'selector', 'replay'})


@pytest.mark.parametrize('variant', CHANGES)
def test_a_variant_changes_what_it_names_and_nothing_else(variant):
    for s in (SMOKE, PAPER):
        full, spec = full_training_spec(s, 'full', 0), full_training_spec(s, variant, 0)
        assert {k for k in {*full, *spec} if full.get(k, '') != spec.get(k, '')} - {'variant'} == DIFFER[variant]


def test_every_run_has_a_key_of_its_own_that_needs_no_data(monkeypatch):
    def gone(name): raise AssertionError(f'{name} was loaded')
    monkeypatch.setattr('sage_paper.challenge_parts.load_dataset', gone)
    specs = full_training_specs(PAPER)
    assert len({record_key('full_training', 1, s) for s in specs}) == len(specs) == 10*5 and canonical(specs) == canonical(full_training_specs(PAPER))
    few = dataclasses.replace(PAPER, variants=('full', 'batch'))
    assert {canonical(s) for s in full_training_specs(few)} < {canonical(s) for s in specs}


@given(st.tuples(*[st.floats(0.01, 10)]*3), st.sampled_from(['', *TERMS]))
def test_terms_that_stay_keep_their_proportions(weights, without):
    left = term_weights(weights, without)
    assert sum(left) == pytest.approx(1) and [w == 0 for w in left] == [t == without for t in TERMS]
    kept = [(a, b) for a, b in zip(left, weights) if a]
    assert all(a*kept[0][1] == pytest.approx(b*kept[0][0]) for a, b in kept)


@pytest.mark.parametrize('change,said', [
    (dict(variants=['no_rl']), 'expected full among them'), (dict(variants=['full', 'no_buffer']), 'variants = '), (dict(ssis=[1, 0, 0]), 'two or more above'), (dict(ssis=[0.5, 0.5]), 'three numbers'),
    (dict(practice=[1, 2]), 'practice = '), (dict(rl_part=0), 'rl_part = 0'), (dict(passes=1.2), 'passes = 1.2'), (dict(swing=1.5), 'swing = 1.5'), (dict(test_per_set=1), 'test_per_set = 1'), (dict(rounds=0), 'rounds = 0'),
    (dict(lr_rl=0), 'lr_rl = 0')])
def test_wrong_settings_are_named(change, said):
    with pytest.raises(SettingsError) as e: load_settings('full_training', 'smoke', FILE, **change)
    assert said in str(e.value)


def test_nothing_asked_arrives_or_is_practised_on():
    s = dataclasses.replace(SMOKE, n_tools=30, train_per_set=150, test_per_set=50, practice=(40, 70, 40))
    parts, ground = stream_parts(s)
    assert all(145 <= len(p.train) <= 150 for p in parts) and [len(p.test) for p in parts] == [50]*3 and 145 <= len(ground.practice) <= 150
    assert [p.train[0].challenge for p in parts] == [p.challenge for p in parts] == ['timing', 'planning', 'selection']
    learnt = [x for p in parts for x in p.train] + [*ground.practice]
    assert len({x.id for x in learnt}) == len(learnt) and not {x.id for x in learnt} & {t.id for p in parts for t in p.test}
    assert not near_duplicates([x.query for x in learnt], [t.query for p in parts for t in p.test])
    as_drawn = grounds(s.n_tools, s.train_per_set, s.practice, s.test_per_set, 'report')
    assert len(learnt) < len(as_drawn.demonstrations) + len(as_drawn.practice)   # there were some


# ---- What is replayed

def filled(name, seed, a=0.6):
    b = BUFFERS[name](30, a, seed=seed)
    b.extend(range(200), 1. + (np.arange(200)*37) % 101)
    return b


@given(st.integers(0, 50))
@examples(max_examples=15, deadline=None)
def test_the_three_buffers_hold_the_same(seed):
    weighted, unweighted, uniform = (filled(n, seed) for n in ('weighted', 'unweighted', 'uniform'))
    assert weighted.items == unweighted.items == uniform.items
    a, b, c = weighted.draw(20, 0.5), unweighted.draw(20, 0.5), uniform.draw(20, 0.5)
    assert a.items == b.items and a.weights.min() < 1 and (b.weights == 1).all() and (c.weights == 1).all()
    assert len({*c.items}) == 20


def test_uniform_draws_are_uniform_and_the_others_go_by_priority():
    for name in BUFFERS:
        b = filled(name, 0)
        p = b.priorities.leaves[:30]/b.priorities.leaves[:30].sum() if name != 'uniform' else np.full(30, 1/30)
        found = np.bincount(np.concatenate([b.draw(10).slots for _ in range(2000)]), minlength=30)/20_000
        assert np.abs(found - p).max() < 5*np.sqrt(p.max()/20_000)


# ---- How much is replayed

@given(st.floats(0, 2), st.floats(0.01, 5), st.floats(0, 200), st.floats(-5, 100), st.floats(0, 1), st.floats(0, 20))
def test_a_part_is_as_far_from_the_even_pace_as_the_swing_and_the_room(forgetting, drift, to_come, left, swing, gain):
    stream = AdaptiveStream(None, None, None, swing, gain)
    even = stream.part(to_come, left)
    assert even == (max(0, 1 - to_come/left) if left > 0 else 0)
    stream.forgetting, stream.drift = forgetting, drift
    part, room = stream.part(to_come, left), min(swing, even, 1 - even)
    assert 0 <= part <= 1 and even - room - 1e-9 <= part <= even + room + 1e-9
    stream.forgetting += 0.1
    assert stream.part(to_come, left) >= part - 1e-12


def test_forgetting_is_what_was_lost_since_the_best_replay():
    stream, (a, b) = AdaptiveStream(None, None, None), (['a'], ['b'])
    def told(items, slots, nll): stream.measure(0, Draw(np.array(slots), items, np.ones(len(items))), nll)
    told([a, b], [0, 1], [1., 2.])
    assert stream.forgetting is None and stream.drift is None   # seen once
    told([a, b], [0, 1], [1.5, 1.])
    assert stream.forgetting == pytest.approx((0.5 + 0)/2)
    told([b], [1], [1.3])
    assert stream.forgetting == pytest.approx(0.9*0.25 + 0.1*0.3)
    told([a], [1], [9.])   # another sample lies there now
    assert stream.forgetting == pytest.approx(0.9*0.25 + 0.1*0.3)
    stream.measure(2, Draw(np.zeros(0, int), [], np.ones(0)), [3., 5.])
    assert stream.drift == 4


class Ledger(Trainer):
    "A trainer that does not train, and keeps what it is asked to"
    def __init__(self, total, unit): super().__init__(LM_, 1e-3, total, unit=unit); self.batches, self.weights, self.rng = [], [], np.random.default_rng(0)

    def step(self, encoded, weights=None):
        self.batches.append(list(encoded)); self.weights.append(np.array(weights))
        self.budget.samples += len(encoded); self.budget.tokens += sum(len(e.ids) for e in encoded)
        draw = lambda *shape: torch.as_tensor(self.rng.exponential(size=shape), dtype=torch.float32)
        return draw(len(encoded)), draw(len(encoded), 4), draw(len(encoded), 4)


@given(st.integers(2, 60), st.floats(1., 6.), st.integers(1, 12), st.integers(1, 50), st.sampled_from([0.3, 1.]), st.floats(0, 1), st.sampled_from(['samples', 'tokens']), st.sampled_from([*BUFFERS]), st.booleans())
@examples(max_examples=60, deadline=None)
def test_all_arrive_once_in_order_and_the_budget_is_met(n, passes, batch_size, capacity, fraction, swing, unit, buffer, ssis):
    order = np.random.default_rng(n).permutation(60)[:n].tolist()
    size = sum(len(SOME[i].ids) if unit == 'tokens' else 1 for i in order)
    trainer = Ledger(int(np.ceil(passes*size)), unit)
    stream = AdaptiveStream(trainer, BUFFERS[buffer](capacity), SSIS(fraction) if ssis else Random(fraction), swing)
    try: train_adaptively(trainer, SOME, order, batch_size, stream)
    except ValueError as e:
        assert 'nothing was kept' in str(e) and fraction == 0.3
        return
    assert abs(trainer.left) <= batch_size*(LONGEST if unit == 'tokens' else 1)
    firsts = dict.fromkeys(id(e) for b in trainer.batches for e in b)
    assert list(firsts) == [id(SOME[i]) for i in order] and max(map(len, trainer.batches)) <= batch_size


def test_without_a_swing_the_part_stays_the_same_and_with_one_it_follows_what_is_measured():
    def shares(swing, forgetting):
        trainer = Ledger(60*4*10, 'samples')
        stream = AdaptiveStream(trainer, ImportanceBuffer(60), Random(1.), swing)
        stream.measure = lambda *_: vars(stream).update(forgetting=forgetting, drift=1.)
        train_adaptively(trainer, SOME*10, range(600), 12, stream)
        assert abs(trainer.left) <= 12
        return stream.shares
    assert np.abs(np.array(shares(0., 5.)[:-12]) - 0.75).max() < 0.02
    little, much = shares(0.25, 0.), shares(0.25, 5.)
    assert np.mean(little[:60]) < 0.65 < 0.85 < np.mean(much[:60])
    assert little.index(1.) < 0.93*len(little) and 1. not in much[:int(0.93*len(much))]   # what replays late has seen all of the stream early


def test_a_budget_below_what_arrives_is_refused():
    with pytest.raises(ValueError, match='a budget of 59 samples, expected 60 or more'): train_adaptively(t := Ledger(59, 'samples'), SOME, range(60), 8, AdaptiveStream(t, ImportanceBuffer(9), Random(0.5)))


# ---- What each variant does

@pytest.fixture(scope='module')
def watched(settings):
    "Each variant's stream, on a random model: its steps, and what it left"
    parts, _ = stream_parts(s := dataclasses.replace(settings, train_per_set=12, buffer_size=12))
    found = {}
    for v in [v for v in CHANGES if v != 'no_rl']:   # which only trains longer
        lm, steps, streams = tiny_lm(), [], []
        encoded = [e for p in parts for e in encode(p.train, lm.tokenizer, p.tools)]
        with pytest.MonkeyPatch.context() as m:
            step, made = Trainer.step, AdaptiveStream.__init__
            def kept(self, batch, weights=None, extra=None):
                steps.append((list(batch), None if weights is None else np.array(weights)))
                return step(self, batch, weights, extra)
            def keep(self, *args): streams.append(self); made(self, *args)
            m.setattr(Trainer, 'step', kept); m.setattr(AdaptiveStream, '__init__', keep)
            spec = SimpleNamespace(**full_training_spec(s, v, 0))
            budget, memory, _ = (learn_batch if v == 'batch' else learn_stream)(spec, lm, encoded, 4*sum(len(e.ids) for e in encoded))
        end = torch.cat([p.detach().flatten() for p in lm.model.parameters()])
        found[v] = SimpleNamespace(steps=steps, stream=streams[0] if streams else None, memory=memory, end=end, budget=budget, encoded=encoded)
    return found


def test_every_variant_ends_elsewhere(watched):
    ends = {v: w.end for v, w in watched.items()}
    assert all(not torch.equal(a, b) for v, a in ends.items() for u, b in ends.items() if u < v)


def weights(w): return np.concatenate([x for _, x in w.steps])


def test_what_is_left_out_is_left_out(watched):
    full = watched['full'].stream
    assert isinstance(full.selector, SSIS) and all((k.terms > 0).all() for k in full.buffer.items) and weights(watched['full']).min() < 1
    assert isinstance(watched['no_ssis'].stream.selector, Random) and (weights(watched['no_ssis']) == 1).all() and np.ptp(watched['no_ssis'].stream.buffer.priorities.leaves[:12]) == 0
    for i, t in enumerate(TERMS):
        w = watched[f'no_{t}'].stream.selector.weights
        assert w[i] == 0 and w.sum() == pytest.approx(1) and (np.delete(w, i) > 0).all() and weights(watched[f'no_{t}']).min() < 1
    for v in ('no_priority', 'no_weights'): assert (weights(watched[v]) == 1).all() and np.ptp(watched[v].stream.buffer.priorities.leaves[:12]) > 0
    even, measured = (np.array(watched[v].stream.shares) for v in ('no_adaptive', 'full'))
    assert np.ptp(even[:even.argmax()][:-8]) < 0.12 < np.abs(measured[:20] - 0.75).max()


def test_a_random_share_is_as_large_as_one_that_was_chosen():
    def kept(selector):
        stream = AdaptiveStream(t := Ledger(2400, 'samples'), ImportanceBuffer(50), selector)
        train_adaptively(t, SOME*20, range(1200), 16, stream)
        return selector.gate.kept
    assert all(abs(kept(s) - 600) <= 20 for s in (SSIS(0.5), SSIS(0.5, (0.5, 0.5, 0), 4.), Random(0.5)))


def test_the_reference_sees_everything_equally_often(watched):
    often = [sum(e is x for batch, _ in watched['batch'].steps for x in batch) for e in watched['batch'].encoded]
    assert max(often) - min(often) <= 1 and {*watched['batch'].memory} <= {*watched['batch'].encoded}


def test_all_variants_spend_the_same_tokens_up_to_a_batch_a_stage(settings, records):
    parts, _ = stream_parts(settings)
    lengths = [len(e.ids) for p in parts for e in encode(p.train, LM_.tokenizer, p.tools)]
    spent = {r['spec']['variant']: sum(b['tokens'] for b in r['result']['stages'].values()) for r in records}
    assert {*spent} == {*CHANGES}
    for v, tokens in spent.items(): assert abs(tokens - settings.passes*sum(lengths)) < settings.batch_size*max(lengths)*(1 if v == 'no_rl' else 2), v
    for r in records:
        stages = r['result']['stages']
        assert ('rl' in stages) == (r['spec']['variant'] != 'no_rl') == bool(r['result']['before'])
        if 'rl' in stages: assert abs(stages['rl']['tokens'] - settings.rl_part*settings.passes*sum(lengths)) < settings.batch_size*max(lengths) and stages['rl']['answers'] == 4 and 0 < stages['rl']['written'] <= 16


def test_a_record_says_how_all_sets_were_answered_before_and_after_practice(settings, records):
    canonical(records)   # no NaN, nothing but JSON
    for r in records:
        result = r['result']
        assert [*result['parts']] == ['timing/sageworld', 'planning/sageworld', 'selection/sageworld'] and all(len(p['items']['id']) == settings.test_per_set for p in result['parts'].values())
        for k, p in result['before'].items(): assert {*result['parts'][k]['items']} - {*p['items']} == {'id', 'cluster'} and {*p['scores']} == {*result['parts'][k]['scores']}


def timeless(result): return json.loads(canonical({k: {n: {f: x for f, x in b.items() if f not in ('seconds', 'log')} for n, b in v.items()} if k == 'stages' else v for k, v in result.items()}))


@pytest.mark.parametrize('how', [KeyboardInterrupt, RuntimeError])
def test_a_run_that_was_killed_starts_over(settings, records, tmp_path, how, monkeypatch):
    one = dataclasses.replace(settings, variants=('full',))
    whole = next(r for r in records if r['spec']['variant'] == 'full')
    with monkeypatch.context() as m:
        def pulled(self, k): raise how('pulled')
        m.setattr(Successes, 'round', pulled)
        with pytest.raises(RecordError if how is RuntimeError else how, match='pulled'): full_training_records(one, tmp_path)
    folder = tmp_path/'runs/full_training'/one.profile
    assert [p.name for p in folder.glob('*.json')] == [f'{whole["key"]}.failed.json']*(how is RuntimeError)
    again, = full_training_records(one, tmp_path)
    assert timeless(again['result']) == timeless(whole['result']) and [p.name for p in folder.glob('*.json')] == [f'{whole["key"]}.json']


# ---- The table

@pytest.mark.parametrize('variant', ['full', 'no_ssis'])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bits(settings, records, tmp_path, variant, monkeypatch):
    "Power cuts after random numbers of steps, in the stream and in practice"
    monkeypatch.setenv('SAGE_CHECKPOINT_DIR', str(tmp_path))
    spec, step, rng, stops = full_training_spec(settings, variant, 0), Trainer.step, np.random.default_rng(0), 0
    want = next(r['result'] for r in records if r['spec'] == spec)
    while True:
        left = int(rng.integers(1, 6)) if stops < 8 else 10**6
        def cut(self, *args, **kwargs):
            nonlocal left
            if not left: raise KeyboardInterrupt
            left -= 1
            return step(self, *args, **kwargs)
        monkeypatch.setattr(Trainer, 'step', cut)
        try: found = run_full_training(spec, pause=0.)
        except KeyboardInterrupt: stops += 1
        else: break
    assert stops >= 3 and timeless(found) == timeless(want)
    assert not [*tmp_path.glob('*.safetensors')]


def made_up(variant, seed, tool, plan, tool_before=None, ids='abcd'):
    def part(field, right, **more): return dict(items={field: right} | more, arguments=False, n_train=5, n_tools=3, tokens=40)
    def answered(tool): return {'selection/toolstream': part('name', tool), 'planning/sageworld': part('node_f1', [float(x) for x in plan], success=plan)}
    after = answered(tool)
    for p in after.values(): p['items'] |= dict(id=list(ids)[:len(p['items'].get('name', plan))], cluster=['x', 'y', 'x', 'z'][:len(p['items'].get('name', plan))])
    rl = {} if variant == 'no_rl' else dict(rl=dict(tokens=300, seconds=2., written=60, answers=4, log=[]))
    stages = dict(stream=dict(tokens=900 - 300*bool(rl), seconds=3., part=[0.6, 0.7])) | rl
    return dict(key=f'{variant}-{seed}', spec=dict(variant=variant, seed=seed), result=dict(parts=after, before=answered(tool_before or tool) if rl else {}, stages=stages, arrived=1200, remembered=5))


RUNS = [made_up('full', 0, '1110', '10', '1100'), made_up('full', 1, '1111', '11', '1100'), made_up('no_ssis', 0, '1000', '10'), made_up('no_ssis', 1, '1100', '00'), made_up('no_rl', 0, '0000', '00'), made_up('no_rl', 1, '0000', '00')]


def test_the_mean_counts_sets_and_not_queries():
    frame = measures(RUNS).set_index(['method', 'part', 'measure']).value
    assert frame['full', 'selection/toolstream', 'name'] == pytest.approx(7/8) and frame['full', 'planning/sageworld', 'node_f1'] == pytest.approx(3/4)
    assert frame['full', 'mean', 'mean'] == pytest.approx((7/8 + 3/4)/2) and frame['no_ssis', 'mean', 'mean'] == pytest.approx((3/8 + 1/4)/2) and frame['no_rl', 'mean', 'mean'] == 0
    scores, w, clusters = decisive(RUNS[0]['result'], ['planning/sageworld', 'selection/toolstream'])
    assert w.tolist() == [1/4]*2 + [1/8]*4 and clusters[0] == 'planning/sageworld x' and clusters[2] == 'selection/toolstream x'


def test_differences_are_those_of_the_items_and_each_family_is_corrected():
    d = full_training_differences(RUNS)
    assert d.family.tolist() == ['mean']*2 + ['set']*4 + ['rl']*3
    by = d.set_index(['family', 'method', 'part'])
    assert by.difference['mean', 'no_ssis', 'mean'] == pytest.approx((7/8 + 3/4)/2 - (3/8 + 1/4)/2) and by.difference['set', 'no_rl', 'selection/toolstream'] == pytest.approx(7/8)
    assert by.difference['rl', 'full', 'selection/toolstream'] == pytest.approx(7/8 - 1/2) and by.difference['rl', 'full', 'mean'] == pytest.approx(3/16) and by.difference['rl', 'full', 'planning/sageworld'] == 0
    assert (d.low <= d.difference + 1e-9).all() and (d.difference <= d.high + 1e-9).all()
    alone = full_training_differences([r for r in RUNS if r['spec']['variant'] != 'no_rl'])
    assert (alone[alone.family == 'mean'].p.item() <= by.p['mean', 'no_ssis', 'mean']) and (alone[alone.family == 'rl'].p.values == d[d.family == 'rl'].p.values).all()


def test_whoever_was_asked_something_else_is_not_compared():
    other = copy.deepcopy(RUNS)
    for r in other[2:4]: r['result']['parts']['selection/toolstream']['items']['id'] = list('abce')
    with pytest.raises(ReportError, match='full and no_ssis were asked different queries'): full_training_differences(other)
    with pytest.raises(ReportError, match='no_ssis: not the same queries'): full_training_differences([*RUNS[:3], other[3], *RUNS[4:]])


def test_the_table_shows_what_was_measured():
    text = full_training_latex(measures(RUNS), RUNS, SMOKE)
    line = {x.split(' & ')[0]: x for x in text.splitlines()}
    assert line['SAGE-Agent'].startswith('SAGE-Agent & 81.2') or line['SAGE-Agent'].startswith(r'SAGE-Agent & \textbf{81.2')
    assert line['without RL'] == r'without RL & 0.0 & 0.0 & 0.0 & 0.0 \\' and line['without SSIS'].startswith('without SSIS & 31.2')
    assert r'\cmidrule(lr){3-4}\cmidrule(lr){5-5}' in text and 'profile smoke' in text and '25\\% of them in practice' in text
    assert len({x.count('&') for x in text.splitlines() if x.split(' & ')[0] in LABELS.values()}) == 1
    assert costs(RUNS).tokens.tolist() == [900]*3 and costs(RUNS).stream_tokens.tolist() == [600, 600, 900] and costs(RUNS).seconds['no_rl'] == 3
    means = stage_means(RUNS)
    assert means.stream['full'] == pytest.approx((1/2 + 3/4)/2) and means.practice['full'] == pytest.approx((7/8 + 3/4)/2) and np.isnan(means.practice['no_rl']) and means.stream['no_rl'] == 0


def test_every_number_has_a_name_of_its_own():
    frame, d = measures(RUNS), full_training_differences(RUNS)
    numbers = full_training_numbers(frame, d, RUNS, SMOKE)
    assert len(numbers) == 6 + len(frame) + len(d) + 3*3 and all(k.startswith('Full') and k.isalpha() for k in numbers)
    assert numbers['FullArrived'] == '1,200' and numbers['FullValueFullSelectionToolstreamName'] == '87.5' and numbers['FullOverNoRlSelectionToolstream'].startswith('$+87.5$') and numbers['FullPracticeAddsMean'].startswith('$+18.8$')


def test_a_table_is_not_made_of_other_runs_than_asked(settings, records, tmp_path):
    check_full_training(records, settings)
    with pytest.raises(ReportError, match='1 of 10 runs have no record: .*variant no_rl'): check_full_training([r for r in records if r['spec']['variant'] != 'no_rl'], settings)
    with pytest.raises(ReportError, match='two records'): check_full_training([*records, records[0]], settings)
    with pytest.raises(ReportError, match='were not asked for'): check_full_training([*records, records[0] | dict(spec=records[0]['spec'] | dict(n_tools=13))], settings)
    with pytest.raises(ReportError, match='no record'): write_full_training(records[1:], settings, tmp_path)
    assert not list(tmp_path.rglob('*.tex'))


def test_what_is_written_depends_on_the_records_alone(settings, records, tmp_path):
    first, again = (write_full_training(x, settings, tmp_path/name) for name, x in (('a', records), ('b', records[::-1])))
    assert [p.name for p in first] == [p.name for p in again] == ['full_training.tex', 'full_training_numbers.tex'] and [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert rows(records[::-1]) == [*CHANGES] and sum(l.split(' & ')[0] in LABELS.values() for l in first[0].read_text().splitlines()) == 10


def test_the_chart_has_a_point_for_every_comparison():
    d = full_training_differences(RUNS)
    spec = full_training_chart(d).to_dict()
    data = [r for name, values in spec['datasets'].items() for r in values if 'difference' in r]
    assert len(data) == 6 and {r['part'] for r in data} == {'mean', 'planning: SageWorld', 'selection: ToolStream'} and {r['method'] for r in data} == {'without SSIS', 'without RL'}


# ---- A file of one's own

MISTAKES = {'unknown': ('bufer_size: 4', "unknown key 'bufer_size' in mine.yaml; did you mean 'buffer_size'?"), 'word for int': ('rounds: two', "rounds = 'two' in mine.yaml: expected a whole number"),
            'float for int': ('rounds: 2.0', 'rounds = 2.0 in mine.yaml'), 'truth value': ('passes: true', 'passes = True'), 'nothing': ('passes:', 'passes = None'), 'a mapping': ('passes: {a: 1}', "passes = {'a': 1}"),
            'bad list': ('seeds: [0, one]', "seeds = [0, 'one'] in mine.yaml: expected one or more"), 'empty list': ('seeds: []', 'seeds = []'), 'not a choice': ('precision: fp8', "expected one of 'auto', 'fp32', 'bf16'"),
            'not a choice in a list': ('variants: [full, no_rll]', "'no_rl'"), 'a date': ('model: 2024-01-01', 'model = datetime.date'), 'twice': ('rounds: 1\nrounds: 2', "'rounds' is there twice"), 'a list': ('- rounds', 'expected lines like'),
            'a word': ('rounds', 'expected lines like'), 'empty': ('', 'expected lines like'), 'comments': ('# nothing', 'expected lines like'), 'open bracket': ('seeds: [0', 'mine.yaml is no YAML'), 'not a date': ('model: 2024-99-99', 'mine.yaml is no YAML'),
            'tag': ('model: !!python/name:os.system', 'mine.yaml is no YAML'), 'list as key': ('? [a]\n: 2', 'mine.yaml is no YAML'), 'a profile': ('profile: paper', "unknown key 'profile'"), 'out of range': ('swing: 3', 'swing = 3.0: expected a number from 0 to 1')}


@pytest.mark.parametrize('text,said', MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_of_settings_is_named_and_ends_with_2(tmp_path, capsys, monkeypatch, text, said):
    monkeypatch.chdir(ROOT)
    (tmp_path/'mine.yaml').write_text(text)
    code = main(['--experiment', 'full_training', '--config', str(tmp_path/'mine.yaml'), '--yes'])
    out, err = capsys.readouterr()
    assert code == 2 and err.startswith('sage-paper: ') and said in err and 'Traceback' not in err and out == ''


def test_bytes_that_are_no_text_and_files_that_are_not_there_are_named(tmp_path):
    (tmp_path/'mine.yaml').write_bytes(b'model: \xff\xfe')
    with pytest.raises(SettingsError, match='mine.yaml is no YAML'): read_changes(tmp_path/'mine.yaml', 'full_training')
    with pytest.raises(SettingsError, match='none.yaml cannot be read: No such file'): read_changes(tmp_path/'none.yaml', 'full_training')
    with pytest.raises(SettingsError, match='cannot be read: Is a directory'): read_changes(tmp_path, 'full_training')


def test_a_file_is_for_an_experiment(capsys):
    with pytest.raises(SystemExit) as e: main(['--list', '--config', 'mine.yaml'])
    assert e.value.code == 2 and 'name it with --experiment' in capsys.readouterr().err


def test_what_a_file_says_is_typed_and_only_what_differs_is_a_change(tmp_path):
    file = tmp_path/'mine.yaml'
    file.write_text('seeds: 3\nlr_stream: 1e-4\npractice: [1, 1, 1]\nvariants: [full, no_rl]\n')
    assert read_changes(file, 'full_training') == dict(seeds=(3,), lr_stream=1e-4, practice=(1, 1, 1), variants=('full', 'no_rl'))
    plan = make_plan(CATALOGUE['full_training'], 'smoke', ROOT, config=file)
    assert plan.settings.profile == 'smoke-custom' and plan.parameters == dict(profile='smoke', seeds=[3], lr_stream=1e-4, variants=['full', 'no_rl']) and len(plan.needed) == 2
    assert f'--config {file}' in plan.command and '--seeds' not in plan.command
    more = make_plan(CATALOGUE['full_training'], 'smoke', ROOT, 2, file)
    assert more.settings.seeds == (3, 0) and '--seeds 2' in more.command
    file.write_text('seeds: [0]\n')
    assert make_plan(CATALOGUE['full_training'], 'smoke', ROOT, config=file).settings == SMOKE


@pytest.mark.parametrize('e', CATALOGUE.values(), ids=CATALOGUE)
def test_a_file_works_for_every_experiment(e, tmp_path):
    (tmp_path/'mine.yaml').write_text('seeds: [7]\njobs: 2\n')
    plan = make_plan(e, 'smoke', ROOT, config=tmp_path/'mine.yaml')
    assert plan.settings.profile == 'smoke-custom' and plan.settings.seeds == (7,) and plan.settings.jobs == 2 and all(r.spec.get('seed', 7) == 7 for r in plan.needed if r.folder == e.settings)


def test_records_that_a_change_leaves_alone_are_lent(tmp_path):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').write_text(FILE.read_text())
    (tmp_path/'mine.yaml').write_text('gain: 4\n')
    for x in full_training_specs(SMOKE): run_or_load(lambda spec: dict(parts={}), 'full_training', FULL_TRAINING_VERSION, x, tmp_path/'runs/full_training/smoke')
    plan = make_plan(CATALOGUE['full_training'], 'smoke', tmp_path, config=tmp_path/'mine.yaml')
    assert {r.spec['variant'] for r in plan.needed} - {r.spec['variant'] for r in plan.missing} == {'no_adaptive', 'batch'} and lend(plan) == 2
