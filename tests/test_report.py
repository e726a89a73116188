"Report: figures, tables and rates are those of the committed records, and no table hides what is missing"
import json, re, shutil
from pathlib import Path

import nbformat, pytest

from conftest import ROOT
from sage_paper.config import load_settings
from sage_paper.streaming_runs import STREAMING_METHODS, STREAMING_VERSION, streaming_specs, tuned_rates, tuning_specs
from sage_paper.records import read_record, record_key, runs_dir
from sage_paper.report import Artefacts, ReportError, check_manifest, check_runs
from sage_paper.efficiency_report import check_efficiency
from sage_paper.streaming_report import write_streaming

PAPER, GEMMA = (load_settings('streaming', p, ROOT/'settings.ini') for p in ('paper', 'gemma'))


def committed(experiment, profile='paper'): return [read_record(p) for p in sorted(runs_dir(ROOT, experiment, profile).glob('*.json'))]


def of_specs(experiment, specs):
    "The records of `specs`, in their order, read and never made"
    return [read_record(runs_dir(ROOT, experiment, 'paper')/f'{record_key("streaming", STREAMING_VERSION, s)}.json') for s in specs]


def keys(specs): return {record_key('streaming', STREAMING_VERSION, s) for s in specs}


@pytest.mark.parametrize('s', [PAPER, GEMMA], ids=lambda s: s.profile)
def test_the_rates_are_those_the_tuning_found(s):
    assert tuned_rates(committed('streaming_tuning', s.profile)) == {m: getattr(s, f'lr_{m}') for m in STREAMING_METHODS}


@pytest.mark.parametrize('s', [PAPER, GEMMA], ids=lambda s: s.profile)
@pytest.mark.parametrize('experiment,specs', [('streaming_tuning', tuning_specs), ('streaming', streaming_specs)], ids=['tuning', 'reported'])
def test_the_records_are_exactly_those_of_the_settings(s, experiment, specs):
    assert {r['key'] for r in committed(experiment, s.profile)} == keys(specs(s)) and len(specs(s)) == len(keys(specs(s)))


def test_every_method_is_tuned_as_much():
    tried = [{(s['seed'], s['lr']) for s in tuning_specs(PAPER) if s['method'] == m} for m in STREAMING_METHODS]
    assert all(t == tried[0] for t in tried) and len(tried[0]) == len(PAPER.lr_grid)*len(PAPER.tuning_seeds) > 1
    assert {s['split'] for s in tuning_specs(PAPER)} == {'tuning'}


def test_a_run_that_is_tuned_on_and_reported_is_called_so():
    both = keys(tuning_specs(PAPER)) & keys(streaming_specs(PAPER))
    caveat = 'StreamingCaveat}{These are runs of the search' in (ROOT/'tables/streaming_numbers.tex').read_text()
    assert bool(both) == caveat == (PAPER.split == 'tuning')


def run(method, seed, accuracy=0.5, **spec):
    "As much of a record as the checks read"
    spec = dict(method=method, seed=seed, lr=1e-4, n_tools=10, split='report') | spec
    return dict(key=record_key('demo', 1, spec), spec=spec, result=dict(curve=[dict(accuracy=0.), dict(accuracy=accuracy)]))


def test_the_tuned_rate_is_the_best_at_the_end_on_average():
    ends = {('a', 1e-4): (0.3, 0.5), ('a', 2e-4): (0.2, 0.5), ('b', 1e-4): (0.1, 0.1), ('b', 2e-4): (0.0, 0.3)}
    assert tuned_rates([run(m, k, end, lr=lr) for (m, lr), both in ends.items() for k, end in enumerate(both)]) == {'a': 1e-4, 'b': 2e-4}


SPECS = streaming_specs(PAPER)
FULL = [dict(key=record_key('streaming', STREAMING_VERSION, x), spec=x) for x in SPECS]
def other(r, **spec): return r | dict(spec=r['spec'] | spec)
SPOILT = {
    'a seed is missing': (FULL[1:], f'1 of {len(FULL)} runs have no record: spread {PAPER.spread} method batch_full seed {PAPER.seeds[0]}'),
    'a method is missing': ([r for r in FULL if r['spec']['method'] != 'streaming_coreset'], f'{len(PAPER.seeds)} of {len(FULL)} runs have no record: spread {PAPER.spread} method streaming_coreset seed {PAPER.seeds[0]}'),
    'a run stands twice': (FULL + FULL[:1], 'two records'),
    'another profile': ([other(FULL[0], n_tools=8)] + FULL[1:], f'1 of {len(FULL)} runs have no record'),
    'another split': ([other(FULL[0], split='tuning')] + FULL[1:], f'1 of {len(FULL)} runs have no record'),
    'one too many': (FULL + [other(FULL[0], seed=77)], '1 records were not asked for'),
    'nothing': ([], f'{len(FULL)} of {len(FULL)} runs have no record: spread {PAPER.spread} method batch_full seed {PAPER.seeds[0]}'),
}


def test_a_complete_set_is_taken():
    for records in (FULL, FULL[::-1]): check_runs(records, SPECS)


@pytest.mark.parametrize('records,named', SPOILT.values(), ids=SPOILT)
def test_a_table_refuses(tmp_path, records, named):
    with pytest.raises(ReportError, match=named): write_streaming(records, [], PAPER, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=['figures', 'tables'])
def kind(request): return request.param


def test_the_manifest_holds(kind):
    profiles = load_settings('two_models', 'paper', ROOT/'settings.ini').profiles
    every = {read_record(p)['key'] for profile in profiles for p in (ROOT/'runs').glob(f'*/{profile}/*.json')}
    assert check_manifest(ROOT/kind, every) > 0
    lines = json.loads((ROOT/kind/'manifest.json').read_text()).values()
    assert {line['profile'] for line in lines} == {'paper'} and all(line['records'] for line in lines)
    assert all((ROOT/'nbs'/f'{line["notebook"]}.ipynb').exists() for line in lines)


@pytest.fixture(scope='module')
def rebuilt(tmp_path_factory):
    "Figure and tables, made again from the committed records"
    reported, tuning = of_specs('streaming', streaming_specs(PAPER)), of_specs('streaming_tuning', tuning_specs(PAPER))
    root = tmp_path_factory.mktemp('root')
    write_streaming(reported, tuning, PAPER, root)
    return {p.name: p.read_bytes() for p in root.rglob('*.*') if p.is_file()}   # the figure is written twice, for paper and screen


def test_the_artefacts_are_those_of_the_records(rebuilt, kind):
    lines = json.loads((ROOT/kind/'manifest.json').read_text())
    mine = [name for name, line in lines.items() if line['notebook'] == 'exp_streaming']
    assert mine and [name for name in mine if rebuilt.get(name) != (ROOT/kind/name).read_bytes()] == []


LEFT = {
    'gone': (lambda d: (d/'a.tex').unlink(), 'figures/a.tex is missing'),
    'edited': (lambda d: (d/'a.tex').write_text('0.9'), 'figures/a.tex was changed by hand'),
    'unlisted': (lambda d: shutil.copy(d/'a.tex', d/'b.tex'), 'not in the manifest.*b.tex'),
    'without record': (lambda d: Artefacts('paper', d.parent).write('figures', 'a.tex', 'x', [run('batch_full', 9)], 'demo'), 'records that are gone'),
}


@pytest.mark.parametrize('spoil,named', LEFT.values(), ids=LEFT)
def test_a_spoilt_folder_is_refused(tmp_path, spoil, named):
    Artefacts('paper', tmp_path).write('figures', 'a.tex', '0.8', FULL, 'demo')
    known = {r['key'] for r in FULL}
    assert check_manifest(tmp_path/'figures', known) == 1
    spoil(tmp_path/'figures')
    with pytest.raises(ReportError, match=named): check_manifest(tmp_path/'figures', known)


def test_another_profile_does_not_touch_the_paper(tmp_path):
    path = Artefacts('smoke', tmp_path).write('tables', 'a.tex', 'x', FULL, 'demo')
    assert path == tmp_path/'build/smoke/tables/a.tex' and [p.name for p in tmp_path.iterdir()] == ['build']


def test_the_readme_says_what_the_paper_says():
    numbers = {k: v for name in ('streaming', 'continual') for k, v in re.findall(r'\\newcommand\{\\(\w+)\}\{(.*)\}', (ROOT/f'tables/{name}_numbers.tex').read_text())}
    said = (ROOT/'README.md').read_text()
    assert f'{numbers["StreamingFullAccuracy"]}% against {numbers["BatchFullAccuracy"]}%' in said
    assert f'{numbers["ContinualToolstreamSageLost"]} points lost where fine-tuning loses {numbers["ContinualToolstreamFinetuneLost"]}' in said
    over = [re.match(r'\$\+([0-9.]+)\$ \[\$([0-9.]+)\$, \$([0-9.]+)\$\]', numbers[f'ContinualToolstreamOver{k}']).groups() for k in ('Er', 'Sure')]
    (er, *er_within), (sure, *sure_within) = over
    assert f'{er} points [{", ".join(er_within)}] above replay and {sure} [{", ".join(sure_within)}] above SuRe on ToolStream' in said


def test_what_was_timed_is_what_the_settings_ask_for():
    s = load_settings('efficiency', 'paper', ROOT/'settings.ini')
    check_efficiency(committed('efficiency'), s)


def floats():
    "The paper's figures and tables in the order of its text: ('Figure' or 'Table', number) → files that it takes in, and whether it stands in the main text"
    sections = re.findall(r'\\input\{sections/(\w+)\}', (ROOT/'paper/main.tex').read_text())
    found, count = {}, dict(Figure=0, Table=0)
    for name in sections:
        for kind, body in re.findall(r'\\begin\{(figure|table)\*?\}(.*?)\\end\{\1\*?\}', (ROOT/f'paper/sections/{name}.tex').read_text(), re.S):
            count[kind.title()] += 1
            files = [Path(f).name for f in re.findall(r'\\(?:includegraphics|input)\{([^}]+)\}', body)]
            found[kind.title(), count[kind.title()]] = [f if '.' in f else f'{f}.tex' for f in files], name != 'appendix'
    return found


def numbered(text):
    "('Figure' or 'Table', number) of all that a text names: 'Figure 2, Tables 3 and 5 to 7'"
    found = set()
    for kind, which in re.findall(r'\b(Figure|Table)s? (\d+(?:(?:, | and | to )\d+)*)', text):
        for first, last in re.findall(r'(\d+)(?: to (\d+))?', which): found |= {(kind, n) for n in range(int(first), int(last or first) + 1)}
    return found


def test_numbers_of_figures_and_tables_are_read():
    assert numbered('Figure 4, Tables 5 and 7 to 9') == {('Figure', 4), ('Table', 5), ('Table', 7), ('Table', 8), ('Table', 9)}


def test_the_readme_names_the_figures_and_tables_of_each_claim():
    made_by = {f: line['notebook'] for kind in ('figures', 'tables') for f, line in json.loads((ROOT/kind/'manifest.json').read_text()).items()}
    rows = [line for line in (ROOT/'README.md').read_text().splitlines() if line.startswith('| ') and '](nbs/exp_' in line]
    assert len(rows) == 9
    for row in rows:
        notebook = re.search(r'\]\(nbs/(exp_\w+)\.ipynb\)', row)[1]
        of_it = {key: main for key, (files, main) in floats().items() if any(made_by.get(f) == notebook for f in files)}
        named = numbered(row.split('|')[2])
        assert {key for key, main in of_it.items() if main} <= named <= set(of_it), (notebook, sorted(of_it))


def test_no_notebook_numbers_figures_or_tables():
    "They move; what a notebook makes is named"
    assert [p.name for p in (ROOT/'nbs').glob('*.ipynb') if numbered(''.join(c.source for c in nbformat.read(p, 4).cells))] == []
