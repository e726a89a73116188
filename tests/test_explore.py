"Exploring: every experiment's records become tables with the same numbers and charts with data, what is damaged is explained, and the notebook runs"
import json, os, shutil
from functools import cache

import nbformat, numpy as np, pandas as pd, pytest
from nbclient import NotebookClient

from conftest import ROOT
from sage_paper.config import SettingsError, load_settings
from sage_paper.continual_report import BOUNDS
from sage_paper.experiments import CATALOGUE, record_files
from sage_paper.explore import (CHARTS, FATES, REWARD_PARTS, VEGA_LITE, as_bundle, change, changes, chart_of, charts_of, curve_axes, forgotten_frame, kept_profiles,
                                learning_curves, matrix_frame, measure_frame, measures_of, measures_table, most_forgotten, pair_chart, read_kept, remark, reward_frame, settings_table)
from sage_paper.inventory import compare, headline
from sage_paper.records import canonical, record_key, unpack
from sage_paper.report import LOOKS, curve_chart
from sage_paper.rl_report import rl_chart, rl_curves
from sage_paper.widgets import Comparer, Explorer, run_folders, run_names

EXPERIMENTS = [*kept_profiles(ROOT)]


@cache
def kept_of(name): return read_kept(name, 'paper', ROOT)


@pytest.fixture(params=EXPERIMENTS)
def kept(request): return kept_of(request.param)


@cache
def on_disk(name): return {p.stem: json.loads(p.read_text()) for p in record_files(ROOT/'runs'/CATALOGUE[name].settings/'paper')}


def own(frame, key): return frame[frame.key == key]


# ---- What is read

def test_all_experiments_of_the_paper_have_records(): assert {*EXPERIMENTS} == {k for k, e in CATALOGUE.items() if e.reported} and all('paper' in p for p in kept_profiles(ROOT).values())


def test_every_record_is_there_once(kept):
    assert [r['key'] for r in kept.records] == kept.runs.key.tolist() == sorted(on_disk(kept.experiment.id)) and not kept.damaged and remark(kept) == ''
    assert {*kept.runs.method} == {*kept.methods} == {*kept.looks} and all(look.label == label for label, look in kept.looks.items())
    assert not kept.runs.duplicated(['method', 'case', 'seed']).any()   # so nothing that was run differently goes by one name


def test_a_part_of_the_records_goes_by_the_same_names(kept):
    case = kept.cases[0]
    part = kept.of(case, kept.methods[:2])
    assert {*part.runs.case} == {case} and {*part.runs.method} <= {*kept.methods[:2]} and part.looks == kept.looks
    assert [r['key'] for r in part.records] == part.runs.key.tolist() == kept.runs[(kept.runs.case == case) & kept.runs.method.isin(kept.methods[:2])].key.tolist()


def test_methods_look_as_in_the_report():
    kept = kept_of('streaming_comparison')
    assert kept.looks == {look.label: look for m, look in LOOKS.items() if m in {r['spec']['method'] for r in kept.records}} and len(kept.looks) >= 4
    assert kept_of('continual_learning').looks['SAGE'].colour == kept_of('coreset_ablation').looks['SSIS, sharpness 1'].colour == '#D55E00'
    assert len(kept_of('coreset_ablation').ablated) == len(load_settings('coreset', 'paper', ROOT/'settings.ini').ablations) > 5 and kept_of('rl_finetuning').ablated == frozenset()


def test_what_an_ablation_changes_is_what_is_rare():
    specs = [dict(strategy='sage', without=w) for w in ('', '', 'logits')] + [dict(strategy='er', without='logits')]
    assert changes(specs) == ['', '', 'without logits', ''] and change(dict(sharpness=1.), dict(sharpness='4.0')) == 'sharpness 1'


def test_an_experiment_that_is_none_is_refused():
    with pytest.raises(SettingsError, match="did you mean 'streaming_comparison'"): read_kept('streaming', root=ROOT)


# ---- Numbers

def test_measures_are_those_of_the_records(kept):
    frame = measure_frame(kept)
    for key, r in on_disk(kept.experiment.id).items(): assert dict(zip(own(frame, key).measure, own(frame, key).value)) == headline(r['result'])


@pytest.mark.parametrize('name,field', [('streaming_comparison', 'curve'), ('coreset_ablation', 'curve'), ('rl_finetuning', 'points')])
def test_curves_are_those_of_the_records(name, field):
    frame = learning_curves(kept_of(name))
    for key, r in on_disk(name).items():
        mine = own(frame, key)
        for k in r['result'][field][0]: assert mine[k].tolist() == [p[k] for p in r['result'][field]], (key, k)


def test_practice_is_that_of_the_records():
    frame, n = reward_frame(kept_of('full_training')), 0
    for key, r in on_disk('full_training').items():
        log = r['result']['stages'].get('rl', {}).get('log', [])
        for part, label in REWARD_PARTS.items(): assert own(frame, key)[own(frame, key).part == label].value.tolist() == [x[part] for x in log]
        n += len(log)
    assert n > 50 and len(frame) == n*len(REWARD_PARTS)


def test_matrices_are_those_of_the_records():
    frame = matrix_frame(kept_of('continual_learning'))
    for key, r in on_disk('continual_learning').items():
        mine = own(frame, key)
        if r['spec']['strategy'] in BOUNDS: assert mine.empty
        else: assert np.array_equal(mine.pivot(index='after', columns='task', values='accuracy'), r['result']['matrix'][1:])


def test_a_matrix_has_no_empty_step():
    "Every cell of a case is there for every method, those of tools that change too"
    for case, f in matrix_frame(kept_of('continual_learning')).groupby('case'):
        phases, tasks = (4, 7) if 'changes' in case else (9, 9) if 'metatool' in case else (11, 11)
        for _, m in f.groupby('method'): assert m.pivot_table(index='when', columns='asked', values='accuracy', dropna=False).notna().to_numpy().sum() == phases*tasks == f[['when', 'asked']].drop_duplicates().shape[0]


def test_a_tool_is_forgotten_if_its_queries_were_right_and_are_wrong():
    "Query by query, without the library's functions"
    frame = forgotten_frame(kept_of('continual_learning'))
    for key, r in [*on_disk('continual_learning').items()][::20]:
        if r['spec']['strategy'] in BOUNDS or r['spec']['protocol'] != 'rounds':
            assert own(frame, key).empty
            continue
        rows, items, expected = r['result']['rows'], unpack(r['result']['items']), {}
        for i, (tool, part) in enumerate(zip(items['tool'], items['part'])):
            then, now = rows[1 + part]['name'][i], rows[-1]['name'][i]
            fate = {'11': 'kept', '10': 'forgotten', '01': 'gained', '00': 'never right'}[then + now]
            expected.setdefault(tool, dict.fromkeys(FATES, 0))[fate] += 1
        assert own(frame, key).set_index('tool')[[*FATES]].to_dict('index') == expected
        assert (own(frame, key)[[*FATES]].sum(axis=1) == own(frame, key).queries).all()


def test_most_forgotten_tools_are_those_of_each_method():
    lost = pd.DataFrame([dict(method=m, tool=t, age='old', queries=2, kept=2 - n, forgotten=n, gained=0, **{'never right': 0}) for m, ns in dict(a=[0, 1, 2], b=[2, 0, 1]).items() for t, n in zip('xyz', ns)])
    found = most_forgotten(lost, 1)
    assert {(r.method, r.tool): r.lost for r in found.itertuples()} == {('a', 'z'): 1., ('b', 'x'): 1., ('b', 'z'): 0.5} and (found.right == 1).all()


# ---- Charts

def parts(spec):
    "A specification and all within it"
    yield spec
    for k in ('layer', 'hconcat', 'vconcat', 'concat'):
        for x in spec.get(k, ()): yield from parts(x)
    if 'spec' in spec: yield from parts(spec['spec'])


def check_chart(chart):
    "A chart that JupyterLab can draw: JSON, with data, no selection twice, none on a line with points of its own"
    spec = as_bundle(chart)[VEGA_LITE]   # Altair holds it against Vega-Lite's schema
    again = json.loads(json.dumps(spec, allow_nan=False))
    assert again['$schema'].endswith('/v5.json') and again['datasets'] and all(again['datasets'].values())
    names = [p['name'] for x in parts(again) for p in x.get('params', ())]
    assert len(names) == len({*names})
    for x in parts(again): assert not (isinstance(x.get('mark'), dict) and x['mark'].get('point')), 'a line with point=True has its selection twice'
    return again


def test_each_chart_that_applies_is_drawn(kept):
    for case in kept.cases:
        part = kept.of(case)
        for name in charts_of(part):
            for measure in measures_of(part, name)[:1] or [None]: check_chart(chart_of(part, name, measure))


def test_charts_apply_where_they_should():
    have = {name: charts_of(kept_of(name)) for name in EXPERIMENTS}
    assert have['continual_learning'] == ['learning curves', 'matrix R', 'forgotten tools', 'measures'] and {c for x in have.values() for c in x} == {*CHARTS}
    assert have['rl_finetuning'] == have['full_training'] == ['learning curves', 'parts of the reward', 'measures']
    assert have['streaming_comparison'] == have['coreset_ablation'] == ['learning curves', 'measures'] and have['efficiency'] == ['measures']
    assert curve_axes(learning_curves(kept_of('challenges'))) == ('', [])


def test_the_reports_charts_are_drawn_too():
    for y in ('accuracy', 'nll'): check_chart(curve_chart(kept_of('streaming_comparison').records, y=y))
    check_chart(rl_chart(rl_curves(kept_of('rl_finetuning').records)))


# ---- Damage

def spoilt(path, how):
    "A record that was spoilt; what is said of it"
    r = json.loads(path.read_text())
    if how == 'cut off': path.write_text(path.read_text()[:-300])
    if how == 'edited': path.write_text(canonical(r | dict(spec=r['spec'] | dict(epochs=99))) + '\n')
    if how == 'old': path.write_text(canonical({k: v for k, v in r.items() if k != 'environment'}) + '\n')
    return {'cut off': 'is no record', 'edited': 'it was edited, or misnamed', 'old': 'an older version of this library wrote it'}[how]


@pytest.fixture
def project(tmp_path):
    "A project with the records of one experiment"
    shutil.copytree(ROOT/'runs/streaming/paper', tmp_path/'runs/streaming/paper')
    return tmp_path


@pytest.mark.parametrize('how', ['cut off', 'edited', 'old'])
def test_a_damaged_record_is_explained(project, how):
    path = (files := record_files(project/'runs/streaming/paper'))[3]
    why = spoilt(path, how)
    kept = read_kept('streaming_comparison', root=project)
    assert len(kept.records) == len(files) - 1 and why in remark(kept) and path.stem in remark(kept) and str(project) not in remark(kept)
    explorer = Explorer(project)
    assert why in explorer.remark.value and explorer.remark.layout.display == '' and VEGA_LITE in explorer.chart.outputs[0]['data']
    comparer, label = Comparer(project), next(name for name, p in run_names(project/'runs/streaming/paper').items() if p.stem == path.stem)
    comparer.runs[0].label = label
    assert why in comparer.remark.value and not comparer.settings.outputs and not comparer.chart.outputs
    comparer.runs[0].index = (comparer.runs[0].index + 1) % len(files)
    assert why not in comparer.remark.value


def test_records_that_are_all_damaged_are_explained(project):
    for p in (files := record_files(project/'runs/streaming/paper')): p.write_text('')
    explorer = Explorer(project)
    assert f'{len(files)} records cannot be read' in explorer.remark.value and explorer.chart.outputs == ()


def test_nothing_is_explained_too(tmp_path):
    assert 'no records' in Explorer(tmp_path).remark.value and 'no records' in Comparer(tmp_path).remark.value
    assert '`sage-paper --experiment challenges --profile smoke` makes them' in remark(read_kept('challenges', 'smoke', tmp_path))


# ---- Widgets

def drawn(place): return [next(iter(o['data'])) for o in place.outputs]


def test_every_choice_of_the_explorer_shows_a_chart():
    explorer = Explorer(ROOT)
    for name in EXPERIMENTS:
        explorer.experiment.value = name
        assert explorer.profile.value == 'paper' and explorer.case.options == tuple(kept_of(name).cases) and explorer.methods.value
        for kind in explorer.kind.options:
            explorer.kind.value = kind
            assert drawn(explorer.chart) == [VEGA_LITE] and explorer.remark.value == '', (name, kind)
            assert (explorer.measure.layout.display == '') == (len(explorer.measure.options) > 1)


def test_the_explorer_shows_the_methods_and_the_measure_that_are_chosen():
    def methods(): return {x['method'] for rows in explorer.chart.outputs[0]['data'][VEGA_LITE]['datasets'].values() for x in rows}
    explorer = Explorer(ROOT)
    explorer.experiment.value = 'continual_learning'
    assert not {*explorer.methods.value} & kept_of('continual_learning').ablated and 'SAGE, without logits' in explorer.methods.options
    explorer.methods.value = ['SAGE', 'replay', 'SAGE, without logits']
    assert methods() == {'SAGE', 'replay', 'SAGE, without logits'}
    explorer.case.value = next(c for c in explorer.case.options if c.startswith('metatool'))
    assert explorer.methods.value == ('replay', 'SAGE') and methods() == {'SAGE', 'replay'}   # the third was not tried there
    explorer.kind.value, explorer.measure.value = 'measures', 'after/text_nll'
    assert explorer.chart.outputs[0]['data'][VEGA_LITE]['layer'][0]['encoding']['x']['field'] == 'value' and 'after/text_nll' in json.dumps(explorer.chart.outputs)
    explorer.methods.value = []
    assert explorer.chart.outputs == () and 'Choose one or more methods' in explorer.remark.value
    explorer.methods.value = ['all at once']
    explorer.kind.value = 'matrix R'
    assert explorer.chart.outputs == () and 'nothing to show' in explorer.remark.value


def choose(comparer, k, record):
    "Choose a run by its experiment and key"
    folders = {f.relative_to(ROOT/'runs').parts[0]: name for name, f in run_folders(ROOT).items() if f.name == 'paper'}
    comparer.experiments[k].value = folders[record['experiment']]
    comparer.runs[k].value = next(p for _, p in comparer.runs[k].options if p.stem == record['key'])


def test_two_runs_that_share_measures_are_compared():
    kept, comparer = kept_of('streaming_comparison'), Comparer(ROOT)
    a, b = (next(r for r in kept.records if r['spec']['method'] == m) for m in ('batch_full', 'streaming_full'))
    for k, r in enumerate((a, b)): choose(comparer, k, r)
    assert [drawn(x) for x in (comparer.settings, comparer.measures, comparer.chart)] == [['text/html'], ['text/html'], [VEGA_LITE]] and comparer.remark.value == ''
    settings, measures = settings_table(a, b), measures_table(a, b)
    assert {*settings.index} == {k for k in a['spec'] | b['spec'] if a['spec'].get(k) != b['spec'].get(k)} and settings.loc['method'].tolist() == ['batch_full', 'streaming_full']
    for r in (a, b): assert measures[r['key']].dropna().to_dict() == headline(r['result'])
    assert np.allclose(measures.difference, measures[b['key']] - measures[a['key']]) and 'streaming_full' in comparer.settings.outputs[0]['data']['text/html']
    rows = {len(x) for x in check_chart(pair_chart(a, b))['datasets'].values()}
    assert rows == {3*sum(len(r['result']['curve']) for r in (a, b))}


def test_two_runs_without_a_common_measure_show_their_settings():
    comparer, a, b = Comparer(ROOT), kept_of('streaming_comparison').records[0], kept_of('challenges').records[0]
    for k, r in enumerate((a, b)): choose(comparer, k, r)
    assert drawn(comparer.settings) == ['text/html'] and comparer.measures.outputs == comparer.chart.outputs == ()
    assert 'no measure in common' in comparer.remark.value and 'no curve in common' in comparer.remark.value and 'challenges' in comparer.settings.outputs[0]['data']['text/html']
    assert measures_table(a, b).difference.isna().all() and pair_chart(a, b) is None


def test_a_run_is_compared_with_itself():
    comparer, a = Comparer(ROOT), kept_of('rl_finetuning').records[0]
    for k in range(2): choose(comparer, k, a)
    assert 'The same settings.' in comparer.remark.value and comparer.settings.outputs == () and drawn(comparer.measures) == ['text/html']


def test_the_command_line_tells_null_from_nothing(tmp_path):
    "A setting that is null in one run and missing in the other is a difference"
    def write(spec):
        path = tmp_path/f'{record_key("demo", 1, spec)}.json'
        path.write_text(canonical(dict(key=path.stem, experiment='demo', version=1, spec=spec, result=dict(right='01'), seconds=1., environment={})))
        return path
    lines = compare(write(dict(seed=0, knob=None)), write(dict(seed=0))).splitlines()
    assert lines[1].split() == ['knob', 'null', '-'] and lines[3].split() == ['right', '0.5', '0.5', '+0']


# ---- The notebook

def test_the_notebook_runs_from_the_committed_records():
    nb = nbformat.read(ROOT/'nbs/explore.ipynb', 4)
    assert all(not c.get('outputs') for c in nb.cells)   # they are made where it is read
    NotebookClient(nb, timeout=120, resources=dict(metadata=dict(path=str(ROOT/'nbs')))).execute(env=os.environ | dict(PYTHONPATH=str(ROOT)))
    found = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert sum(VEGA_LITE in o.get('data', {}) for o in found) == 5 and not [o for o in found if o.output_type in ('error', 'stream')]
    views = [o for o in found if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    assert len(views) == 4
