"A second model: the first one's column is what the paper prints, and what is not there is left out"
import json, re, shutil

import numpy as np, pytest
from hypothesis import given, strategies as st

from conftest import ROOT
from sage_paper.config import SettingsError, load_settings
from sage_paper.experiments import CATALOGUE, wanted_runs
from sage_paper.records import record_key
from sage_paper.report import latex_difference
from sage_paper.streaming_runs import STREAMING_METHODS
from sage_paper.two_models import BOUNDS, CLAIMS, THREE, VERSIONS, backbones, claims_frame, claims_latex, compared_runs, in_all, what_is_missing, write_two_models

PAPER = load_settings('two_models', 'paper', ROOT/'settings.ini')
PRINTED = {k: v for f in ('streaming', 'coreset', 'continual') for k, v in re.findall(r'\\newcommand\{\\(\w+)\}\{(.*)\}', (ROOT/f'tables/{f}_numbers.tex').read_text())}
SAME = dict(ssis_random='CoresetToolstreamThreeTenthsSsisOverRandom', ssis_sure='CoresetToolstreamThreeTenthsSsisOverSure',   # claim → macro of the experiment's own report
            **{f'mean_{x}': f'ContinualToolstreamOver{y}' for x, y in dict(er='Er', sure='Sure', der='Der', ewc_online='EwcOnline', finetune='Finetune').items()})


@pytest.fixture(scope='module')
def models(): return backbones(PAPER, ROOT)


@pytest.fixture(scope='module')
def frame(models): return claims_frame(models)


@pytest.fixture
def first(frame): return frame[frame.profile == 'paper'].set_index('claim')


@pytest.mark.parametrize('claim,macro', SAME.items(), ids=SAME)
def test_the_first_models_numbers_are_those_of_the_paper(first, claim, macro):
    assert latex_difference(*first.loc[claim, ['difference', 'low', 'high']]) == PRINTED[macro]


@pytest.mark.parametrize('claim,start', [('stream_all', 'StreamingFull'), ('stream_half', 'StreamingCoreset')])
def test_streamings_intervals_are_those_of_the_paper(first, claim, start):
    assert [f'{100*x:+.1f}' for x in first.loc[claim, ['difference', 'low', 'high']]] == [PRINTED[start + x] for x in ('Difference', 'Low', 'High')]


def test_means_that_the_paper_prints_differ_by_as_much(first):
    def value(k): return float(PRINTED[k])
    late = value('StreamingFullLate') - value('BatchFullLate')
    lost = value('ContinualToolstreamSageLost') - value('ContinualToolstreamFinetuneLost')/4
    new = value('ContinualToolstreamSageNew') - value('ContinualToolstreamDerNew')
    for claim, points in dict(stream_late=late, lost_finetune=lost, new_der=new).items(): assert 100*first.difference[claim] == pytest.approx(points, abs=0.11)


def test_every_claim_has_a_row_of_every_model_that_has_records(models, frame):
    for m in models: assert [*frame[frame.profile == m.profile].claim] == [c.name for c in CLAIMS if c.experiment in m.records]


def test_both_models_have_all_their_runs(models, frame):
    assert what_is_missing(models) == '' and [*frame.claim] == [c.name for m in models for c in CLAIMS] and frame.low.notna().all()


def test_the_runs_are_those_of_the_three_experiments(models):
    "Nothing is compared that an experiment does not report"
    for m, runs in zip(models, compared_runs(PAPER, [x.settings for x in models])):
        for e in THREE:
            asked = {r.key for r in wanted_runs(next(x for x in CATALOGUE.values() if x.settings == e), m.settings[e])}
            assert runs[e] and {record_key(e, VERSIONS[e], x) for x in runs[e]} <= asked


def test_the_models_are_compared_on_the_same_methods_and_queries_with_seeds_in_common(models):
    a, b = compared_runs(PAPER, [x.settings for x in models])
    for e in THREE:
        seeds = {x['seed'] for x in a[e]} & {y['seed'] for y in b[e]}
        one, other = ([x for x in runs if x['seed'] in seeds] for runs in (a[e], b[e]))
        assert len(seeds) >= 3 and len(one) == len(other) > 0
        for x, y in zip(one, other):
            assert {k: x[k] for k in ('seed', 'data', *{'method', 'selector', 'strategy'} & {*x})} == {k: y[k] for k in ('seed', 'data', *{'method', 'selector', 'strategy'} & {*y})}
            assert x['model'] != y['model'] and x['weights'] != y['weights']


@pytest.fixture
def one_experiment(tmp_path):
    "A project that has the first model's streaming records alone"
    shutil.copy(ROOT/'settings.ini', tmp_path)
    shutil.copytree(ROOT/'runs/streaming/paper', tmp_path/'runs/streaming/paper')
    return tmp_path


def test_what_is_missing_is_named_and_left_out(one_experiment):
    models = backbones(PAPER, one_experiment)
    frame, said = claims_frame(models), what_is_missing(models)
    assert {*frame.experiment} == {'streaming'} and {*frame.profile} == {'paper'}
    assert all(x in said for x in ('35 of coreset under paper', '30 of continual under paper', '20 of streaming under gemma', 'Gemma 3 270M')) and 'streaming under paper' not in said
    rows = [l for l in claims_latex(models, frame, PAPER).splitlines() if l.startswith(('SSIS', 'lost', 'new', 'mean'))]
    assert len(rows) == len(CLAIMS) - 3 and all(r.endswith('--- & --- & --- & --- ' + r'\\') for r in rows)
    assert {p.name for p in write_two_models(models, frame, PAPER, one_experiment)} == {'two_models.pdf', 'two_models.tex', 'two_models_numbers.tex'}
    assert {*json.loads((one_experiment/'tables/manifest.json').read_text())['two_models.tex']['records']} == {p.stem for p in (one_experiment/'runs/streaming/paper').glob('*.json') if json.loads(p.read_text())['spec']['method'] in STREAMING_METHODS}


def test_one_record_less_is_one_experiment_less(one_experiment):
    next((one_experiment/'runs/streaming/paper').glob('*.json')).unlink()
    models = backbones(PAPER, one_experiment)
    assert models[0].records == {} and models[0].missing['streaming'] == 1
    assert write_two_models(models, claims_frame(models), PAPER, one_experiment) == [] and not (one_experiment/'tables').exists()


def test_a_profile_without_the_experiments_is_named(tmp_path):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    with pytest.raises(SettingsError, match=r'no section \[other\]'): backbones(load_settings('two_models', 'paper', ROOT/'settings.ini', profiles=['paper', 'other']), tmp_path)


@given(st.tuples(*[st.floats(-1, 1)]*2).map(sorted))
def test_a_claim_and_its_contrary_do_not_both_hold(ends):
    d = dict(zip(('low', 'high'), ends))
    holds = {k: f(d) for k, f in BOUNDS.items()}
    assert not (holds['above 0'] and holds['below 0']) and holds['not below 0'] >= holds['above 0'] and holds['above -1'] >= holds['above 0']


@given(st.lists(st.lists(st.integers(0, 9), unique=True), min_size=1, max_size=4))
def test_what_all_hold_is_in_the_order_of_the_first(lists):
    out = in_all(lists)
    assert {*out} == set.intersection(*map(set, lists)) and out == [x for x in lists[0] if x in out]


def test_the_table_shows_what_was_measured(models, frame):
    text = claims_latex(models, frame, PAPER)
    for r in frame[np.isfinite(frame.low)].itertuples(): assert latex_difference(r.difference, r.low, r.high) in text
    lines = {c.name: next(l for l in text.splitlines() if l.startswith(c.label + ' &')) for c in CLAIMS}
    for r in frame.itertuples():
        cells = [x.strip(' \\') for x in lines[r.claim].split(' & ')]
        assert cells[3 + 2*PAPER.profiles.index(r.profile)] == {None: '---', True: 'yes', False: 'no'}[r.holds]


def test_no_number_is_made_of_what_cannot_be_told(models, frame):
    "One seed has no interval over seeds, and where no tool comes last there is no difference"
    text = claims_latex(models, frame.assign(low=np.nan, high=np.nan), PAPER)
    assert f'${100*frame.difference[0]:+.1f}$' in text and 'nan' not in text
    assert 'nan' not in claims_latex(models, frame.assign(difference=np.nan), PAPER)
