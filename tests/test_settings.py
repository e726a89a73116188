"Settings: every mistake is named, in the file and on papermill's command line"
import ast, dataclasses, shutil, subprocess, sys

import nbformat, papermill, pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from conftest import ROOT
from sage_paper.config import EXPERIMENTS, Streaming, SettingsError, load_settings, read_ini

FILE = ROOT/'settings.ini'
PROFILES = [s for s in read_ini(FILE).sections() if '.' not in s]
OWN = [s.split('.') for s in read_ini(FILE).sections() if '.' in s]   # (profile, experiment)
NOTEBOOKS = sorted((ROOT/'nbs').glob('exp_*.ipynb'))
FIELDS = [f.name for f in dataclasses.fields(Streaming) if f.name != 'profile']
SECTION = '[smoke.streaming]'

MISTAKES = {  # what is wrong: (text of the smoke profile, what stands there instead, what the error names)
    'unknown key': ('epochs = 2', 'epochs = 2\nepoch = 3', ["'epoch'", "'epochs'", SECTION, *FIELDS]),
    'far from any key': ('epochs = 2', 'epochs = 2\nqqqqq = 3', ["unknown key 'qqqqq' in [smoke.streaming]. Accepted: batch_size"]),
    'list that does not end': ('seeds = 0', 'seeds = [0, 1', ['seeds', "'[0, 1'", '[smoke]']),
    'unknown shared key': ('[smoke]', '[smoke]\nlr = 1', ["'lr'", '[smoke]', 'model', 'precision', 'seeds']),
    'misplaced key': ('[smoke]', '[smoke]\nepochs = 2', ["'epochs'", '[smoke]', 'seeds']),
    'word for int': ('epochs = 2', 'epochs = two', ['epochs', "'two'", SECTION, 'a whole number']),
    'float for int': ('epochs = 2', 'epochs = 2.5', ['epochs', "'2.5'", SECTION, 'a whole number']),
    'word for float': ('spread = 0.1', 'spread = some', ['spread', "'some'", SECTION, 'a number']),
    'not a choice': ('stream = sageworld', 'stream = world', ['stream', "'world'", SECTION, "'sageworld'", "'toolstream'"]),
    'not a shared choice': ('precision = auto', 'precision = fp8', ['precision', "'fp8'", '[smoke]', "'auto'", "'fp32'", "'bf16'"]),
    'bad list': ('seeds = 0', 'seeds = 0 one', ['seeds', "'0 one'", '[smoke]', 'one or more, separated by blanks, each a whole number']),
    'empty list': ('seeds = 0', 'seeds =', ['seeds', '[smoke]', 'one or more, separated by blanks, each a whole number']),
    'missing key': ('epochs = 2\n', '', ['missing', SECTION, 'epochs']),
    'missing section': (SECTION, '[smoke.streeming]', [SECTION, 'smoke', 'paper']),
}


@pytest.mark.parametrize('profile,experiment', OWN)
def test_every_profile_loads(profile, experiment):
    s = load_settings(experiment, profile, FILE)
    assert s.profile == profile and type(s) is EXPERIMENTS[experiment] and len(set(s.seeds)) == len(s.seeds)


def test_every_section_is_of_a_profile_and_an_experiment(): assert {p for p, _ in OWN} == {*PROFILES} and {e for _, e in OWN} == {*EXPERIMENTS}


def test_smoke_and_paper_have_all_experiments(): assert all([p, e] in OWN for p in ('smoke', 'paper') for e in EXPERIMENTS)


@pytest.mark.parametrize('experiment', [e for p, e in OWN if p == 'gemma'])
def test_another_model_is_tried_as_the_papers_was(experiment):
    "All but rates, the number of seeds, and parts that are left out"
    free = {'profile', 'model', 'seeds', 'jobs', 'jobs_gpu_gb', 'streams', 'selectors', 'fractions', 'ablations', 'strategies', 'buffers', 'buffer_strategies', 'in_depth', 'changing_strategies', 'grid', 'chosen', 'lr_grid', 'controls'}
    per_stream = {'n_old', 'n_new', 'rounds', 'train_per_tool', 'test_per_tool'}
    a, b = (dataclasses.asdict(load_settings(experiment, p, FILE)) for p in ('gemma', 'paper'))
    for k in a.keys() - free:
        if k.startswith('lr'): continue
        assert a[k] == (b[k][:1] if k in per_stream and experiment == 'continual' else b[k]), k
    assert all({*a[k]} <= {*b[k]} for k in ('seeds', 'selectors', 'fractions', 'strategies', 'controls') if k in a)


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_the_paper_reports_seeds_it_was_not_tuned_on_or_says_so(experiment):
    s = load_settings(experiment, 'paper', FILE)
    if getattr(s, 'split', 'report') == 'tuning': assert 'tools of the tuning split' in (ROOT/f'tables/{experiment}.tex').read_text() and 'tools that learning rates were chosen on' in (ROOT/'README.md').read_text()
    else: assert len(s.seeds) == 5 and not set(s.seeds) & set(s.tuning_seeds)


@pytest.mark.parametrize('given', ['0 5', '[0, 5]', '[0,5]', '[0 5]', [0, 5], (0, 5)], ids=str)
def test_a_list_may_be_written_as_in_the_file_or_as_in_python(given): assert load_settings('streaming', 'smoke', FILE, seeds=given).seeds == (0, 5)


def test_words_of_a_list_too(): assert load_settings('coreset', 'smoke', FILE, selectors='[random, ssis]').selectors == ('random', 'ssis')


def test_papermills_command_line_takes_a_list(tmp_path):
    "Which reaches the notebook as text"
    code = "from sage_paper.config import notebook_settings\nprint(notebook_settings('streaming', globals()).seeds)"
    cells = [new_code_cell('profile = "smoke"', metadata=dict(tags=['parameters'])), new_code_cell(code)]
    nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))), tmp_path/'in.ipynb')
    subprocess.run([sys.executable, '-m', 'papermill', tmp_path/'in.ipynb', tmp_path/'out.ipynb', '-p', 'seeds', '[0, 1]', '--cwd', ROOT], check=True, capture_output=True)
    assert nbformat.read(tmp_path/'out.ipynb', 4).cells[-1].outputs[0].text == '(0, 1)\n'


def test_settings_are_frozen():
    s = load_settings('streaming', 'smoke', FILE)
    with pytest.raises(dataclasses.FrozenInstanceError): s.epochs = 4
    assert all(type(v) in (str, int, float, tuple) for v in dataclasses.asdict(s).values())


@pytest.mark.parametrize('old,new,named', MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_file_is_named(tmp_path, old, new, named):
    before, after = FILE.read_text().split('\n[paper]')
    assert old in before
    (tmp_path/'settings.ini').write_text(before.replace(old, new, 1) + '\n[paper]' + after)
    with pytest.raises(SettingsError) as e: load_settings('streaming', 'smoke', tmp_path/'settings.ini')
    for word in named: assert word in str(e.value)


def test_an_unknown_profile_is_named():
    with pytest.raises(SettingsError, match='papre') as e: load_settings('streaming', 'papre', FILE)
    for name in PROFILES: assert name in str(e.value)


@pytest.mark.parametrize('changes', [dict(epochs=2.5), dict(epochs=True), dict(epochs=None), dict(epochs=[2]), dict(spread='x'), dict(seeds=[]), dict(seeds='[]'), dict(seeds='[0, 1.5]'), dict(seeds=[0, 1.5]),
    dict(stream=3), dict(model=7)], ids=str)
def test_a_change_of_the_wrong_type_is_named(changes):
    with pytest.raises(SettingsError, match=f'{next(iter(changes))} = .* in the notebook parameters: expected'): load_settings('streaming', 'smoke', FILE, **changes)


def test_a_changed_profile_has_a_name_of_its_own():
    assert load_settings('streaming', 'smoke', FILE, epochs=2).profile == 'smoke-custom'


@pytest.fixture
def run_notebook(tmp_path):
    "A function that runs a small notebook under papermill and returns what it printed"
    code = "from sage_paper.config import notebook_settings\ns = notebook_settings('streaming', globals())\nprint(s.profile, s.epochs)"
    cells = [new_code_cell('profile = "smoke"', metadata=dict(tags=['parameters'])), new_code_cell(code)]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path/'in.ipynb')
    def run(**parameters):
        nb = papermill.execute_notebook(tmp_path/'in.ipynb', tmp_path/'out.ipynb', parameters, cwd=ROOT, progress_bar=False)
        return nb.cells[-1].outputs[0].text.split()
    return run


@pytest.mark.parametrize('parameters,named', [
    (dict(epoch=2), ["'epoch'", "'epochs'", 'notebook parameters']), (dict(epochs='two'), ['epochs', "'two'", 'a whole number']),
    (dict(profile='papre'), ['papre', *PROFILES])], ids=lambda x: next(iter(x)))
def test_a_wrong_parameter_stops_the_notebook(run_notebook, parameters, named):
    with pytest.raises(PapermillExecutionError) as e: run_notebook(**parameters)
    assert e.value.ename == 'SettingsError'
    for word in named: assert word in e.value.evalue


def test_a_right_parameter_gets_through(run_notebook):
    assert run_notebook(epochs=2) == ['smoke-custom', '2']


def test_there_are_experiment_notebooks(): assert NOTEBOOKS


def tagged(nb): return [k for k, c in enumerate(nb.cells) if 'parameters' in c.metadata.get('tags', [])]


def names(cell): return {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)} if cell.cell_type == 'code' else set()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_one_cell_holds_the_parameters(path):
    nb, values = nbformat.read(path, 4), {}
    k, = tagged(nb)
    exec(nb.cells[k].source, {}, values)
    assert values == {'profile': 'smoke'}
    assert not any(names(c) & {'profile', 'notebook_settings'} for c in nb.cells[:k])
    assert any('notebook_settings' in names(c) for c in nb.cells[k + 1:])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_clean_notebook_still_takes_parameters(tmp_path, path):
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/name, tmp_path)
    nb, copy = nbformat.read(path, 4), tmp_path/'nbs'/path.name
    k, = tagged(nb)
    nb.cells[k].metadata.update(papermill={'status': 'completed'})
    copy.parent.mkdir()
    nbformat.write(nb, copy)
    subprocess.run([sys.executable, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()'], cwd=tmp_path, check=True)
    assert nbformat.read(copy, 4).cells[k].metadata == {'tags': ['parameters']}
    out = papermill.execute_notebook(copy, tmp_path/'out.ipynb', dict(profile='paper'), prepare_only=True)
    assert out.cells[k + 1].metadata['tags'] == ['injected-parameters'] and "'paper'" in out.cells[k + 1].source.replace('"', "'")
