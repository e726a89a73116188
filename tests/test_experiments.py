"The one entry: what it knows of each experiment, what it starts, what it leaves behind when stopped, and what it does with records"
import fcntl, importlib, json, os, pty, re, select, shutil, signal, struct, subprocess, sys, termios, time

import nbformat, psutil, pytest

from conftest import ROOT
from sage_paper.assets import converted
from sage_paper.calls import Sample, ToolCall
from sage_paper.cli import main
from sage_paper.config import EXPERIMENTS, load_settings
from sage_paper.experiments import CATALOGUE, published_keys, record_files, remembered, state, wanted_runs, work_out
from sage_paper.inventory import commit_dates, headline, prunable, read_ends
from sage_paper.records import read_record, record_key, run_or_load
from sage_paper.running import ENVIRONMENT, alive
from sage_paper.samples import write_samples

PUBLISHED = [e for e in CATALOGUE.values() if published_keys(e, 'paper', ROOT)]
COMMAND = [sys.executable, '-c', 'import sys; from sage_paper.cli import main; sys.exit(main())']
HEAVY = ('torch', 'transformers', 'pandas', 'numpy', 'papermill')


def test_no_experiment_is_forgotten():
    "One that has settings and a notebook is an entry of the catalogue, and the reverse"
    notebooks = {p.stem for p in (ROOT/'nbs').glob('exp_*.ipynb')}
    assert {e.settings for e in CATALOGUE.values()} == {*EXPERIMENTS} and {e.notebook for e in CATALOGUE.values()} == notebooks
    assert all(k == e.id for k, e in CATALOGUE.items())


@pytest.mark.parametrize('e', CATALOGUE.values(), ids=CATALOGUE)
def test_the_catalogue_has_all_runs_of_an_experiment(e):
    module = importlib.import_module(f'sage_paper.{e.module}')
    own = {k for k, v in vars(module).items() if k.endswith('_specs') and v.__module__ == module.__name__}
    assert own == {*e.reported, *([e.tuning] if e.tuning else [])}
    assert ('tuning=True' in (ROOT/'nbs'/f'{e.notebook}.ipynb').read_text()) == e.shown


@pytest.mark.parametrize('e', PUBLISHED, ids=lambda e: e.id)
def test_what_the_settings_ask_for_is_what_the_tables_were_made_of(e):
    needed = {f'{r.folder}/{r.key}' for r in wanted_runs(e, load_settings(e.settings, 'paper', ROOT/'settings.ini')) if r.needed}
    assert needed == published_keys(e, 'paper', ROOT)
    assert not [k for k in needed if not (ROOT/'runs'/k.replace('/', '/paper/')).with_suffix('.json').exists()]


def test_the_readme_counts_the_runs_that_the_notebooks_ask_for():
    "By claim, in all, and what the table of all records has besides"
    text, needed = (ROOT/'README.md').read_text(), {e.notebook: published_keys(e, 'paper', ROOT) for e in PUBLISHED}
    rows = {re.search(r'\[(exp_\w+)\]', l)[1]: l.split('|')[-2] for l in text.splitlines() if l.startswith('| ') and '[exp_' in l}
    without = {e.notebook for e in CATALOGUE.values() if not e.reported}   # they compare runs of others
    assert {*rows} == {*needed} | without and not [k for k in without if 'runs anew' in rows[k]]
    assert {k: int(re.search(r'(\d+) runs anew', rows[k])[1]) for k in needed} == {k: len(v) for k, v in needed.items()}
    assert {k: int(m[1]) for k, l in rows.items() if (m := re.search(r'(\d+) of them to choose rates', l))} == {k: n for k, v in needed.items() if (n := sum('_tuning/' in r for r in v))}
    number = lambda x: int(x.replace(',', ''))
    counted = [*map(number, re.search(r'\*\*Which runs are counted.*?(\d+) in all.*?is, ([\d,]+): (\d+) more.*?shows, (\d+) of.*? and (\d+) of the second', text).groups())]
    kept = {f'{f}/{p.stem}' for e in CATALOGUE.values() for f in e.folders for p in record_files(ROOT/'runs'/f/'paper')} - {k for v in needed.values() for k in v}
    second, searched = (len([p for e in CATALOGUE.values() for f in e.folders for p in record_files(ROOT/'runs'/f/'gemma')]), sum('_tuning/' in k for k in kept))
    whole = number(re.search(r'^all & ([\d,]+)', (ROOT/'tables/compute.tex').read_text(), re.M)[1])
    assert counted == [sum(map(len, needed.values())), whole, searched, len(kept) - searched, second] and sum(counted[2:]) + counted[0] == whole


def test_figures_come_out_as_with_make():
    makefile = (ROOT/'Makefile').read_text()
    assert {k: re.search(rf'^export {k} *\?= *(\S+)', makefile, re.M)[1] for k in ENVIRONMENT} == ENVIRONMENT


# ---- A project that trains nothing

SETTINGS = "from sage_paper.config import notebook_settings\nsettings = notebook_settings('streaming', globals())"
RUNS = """import json, os, time
from pathlib import Path
import sage_paper.records
sage_paper.records.environment = lambda: dict(device='CPU')   # without loading PyTorch
from sage_paper.streaming_runs import STREAMING_VERSION, streaming_specs
def run(spec):
    with open(Path(os.environ['SAGE_ROOT'])/'made', 'a') as f: f.write(f"{spec['method']} {spec['seed']} {os.getpid()}\\n")
    if spec['method'] in os.environ.get('SLOW', '').split(): time.sleep(120)
    return dict(curve=[dict(accuracy=0.5)])
records = sage_paper.records.experiment_records(run, 'streaming', STREAMING_VERSION, streaming_specs(settings), settings)"""
WRITE = "from sage_paper.report import Artefacts\nArtefacts(settings.profile).write('tables', 'streaming.tex', 'none', records, 'exp_streaming')"


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A checkout whose streaming experiment trains nothing"
    for p in (ROOT/'nbs').glob('exp_*.ipynb'): (tmp_path/'nbs').mkdir(exist_ok=True); shutil.copy(p, tmp_path/'nbs')
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setenv('SAGE_ROOT', str(tmp_path))
    monkeypatch.setenv('SAGE_CACHE_DIR', str(tmp_path/'cache'))
    converted('smollm2-135m-instruct').mkdir(parents=True)   # as if the model were there
    notebook(tmp_path, SETTINGS, RUNS, WRITE)
    return tmp_path


def notebook(project, *cells):
    title = nbformat.v4.new_markdown_cell('# Nothing\n\n> Does nothing?')
    first = nbformat.v4.new_code_cell("profile = 'smoke'", metadata=dict(tags=['parameters']))
    kernel = dict(kernelspec=dict(name='python3', display_name='', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=[title, first, *map(nbformat.v4.new_code_cell, cells)], metadata=kernel), project/'nbs/exp_streaming.ipynb')


def sage(*argv, **env): return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, cwd=ROOT, env=os.environ | env, stdin=subprocess.DEVNULL)


def made(project): return [line.split()[:2] for line in (project/'made').read_text().splitlines()] if (project/'made').exists() else []


class Terminal:
    "A command that believes to have somebody in front of it"
    def __init__(self, *argv, **env):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 100, 0, 0))   # rows and columns, or the bar has no room
            signal.signal(signal.SIGINT, signal.SIG_DFL)   # which whoever runs the tests in the background ignores
            os.chdir(ROOT)
            os.execve(sys.executable, [*COMMAND, *argv], os.environ | dict(COLUMNS='100', TERM='dumb') | env)
        self.text, self.closed = '', False

    def read(self, until=None, seconds=120):
        "All that is shown up to a text, or up to the end"
        stop, seen = time.monotonic() + seconds, len(self.text)
        while time.monotonic() < stop and (until is None or until not in self.text[seen:]):
            if not select.select([self.fd], [], [], 0.2)[0]: continue
            try: piece = os.read(self.fd, 65536)
            except OSError:   # the other end is closed
                self.closed = True
                break
            self.text += piece.decode(errors='replace')
        assert until is None or until in self.text[seen:], self.text
        return self.text[seen:]

    def say(self, text): os.write(self.fd, text.encode())

    def code(self, again=''):
        "The exit code, after all that is still shown; what does not end is killed. `again` is said every other second, since Python can miss a Ctrl-C between its prompt and its reading"
        for _ in range(60 if again else 1):
            self.read(seconds=2 if again else 120)
            if self.closed: break
            self.say(again)
        for _ in range(100):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f'does not end after:\n{self.text}')


# ---- The list

@pytest.mark.alone
def test_the_list_is_there_at_once(project):
    "With nothing remembered and thousands of large records, without loading what takes long"
    folder = project/'runs/streaming/paper'
    folder.mkdir(parents=True)
    for k in range(3000):
        with open(folder/f'{k:016x}.json', 'wb') as f: f.truncate(4_000_000)
    code = f'import sys; from sage_paper.cli import main; main(["--list"]); print([m for m in {HEAVY} if m in sys.modules])'
    def one():
        start = time.perf_counter()
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        return time.perf_counter() - start, out
    took, out = min(one() for _ in range(5))
    assert took < 1 and out.splitlines()[-1] == '[]' and '3000 records, not yet compared' in out


@pytest.mark.alone
def test_the_list_is_as_quick_with_what_is_remembered(project):
    for profile in ('smoke', 'paper'): work_out(CATALOGUE['streaming_comparison'], profile, project)
    def one():
        start = time.perf_counter()
        out = sage('--list').stdout
        return time.perf_counter() - start, out
    took, out = min(one() for _ in range(5))
    n = sum(r.needed for r in wanted_runs(CATALOGUE['streaming_comparison'], load_settings('streaming', 'paper', ROOT/'settings.ini')))
    assert '4 runs to make' in out and f'{n} runs to make' in out and took < 1


def test_the_list_names_every_experiment_and_profile(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(['--list']) == 0
    out = capsys.readouterr().out
    for e in CATALOGUE.values(): assert re.search(rf'^{e.id}: \S', out, re.M)
    for e in PUBLISHED: assert not re.search(rf'{e.id}:(.(?!^\w+: ))*lacks', out, re.S | re.M)
    assert out.count('\n   smoke ') == out.count('\n   paper ') == len(CATALOGUE) and out.count('\n   gemma ') == 3 and out.count('no runs of its own') == 2


def test_the_list_knows_how_long_the_smoke_profile_takes(project):
    "On a machine that has run nothing yet"
    smoke = re.findall(r'^ +smoke +(.+(?:\n {10,}.+)*)', sage('--list').stdout, re.M)
    assert len(smoke) == len(CATALOGUE) and not [s for s in smoke if 'about' not in s or 'on 2 busy CPU' not in ' '.join(s.split())]


def test_what_is_remembered_is_forgotten_with_the_settings(project):
    e = CATALOGUE['streaming_comparison']
    work_out(e, 'smoke', project)
    assert state(e, 'smoke', project, remembered(project)).needed == 4
    ini = project/'settings.ini'
    ini.write_text(ini.read_text().replace('n_tools = 10\n', 'n_tools = 11\n'))
    assert remembered(project) == {}


# ---- Wrong input

@pytest.mark.parametrize('argv,said', [
    (['--experiment', 'streaming_comparisn', '--yes'], "did you mean 'streaming_comparison'?"), (['--experiment', 'coreset', '--yes'], "did you mean 'coreset_ablation'?"),
    (['--experiment', 'qqq', '--yes'], 'There are streaming_comparison'), (['--experiment', 'challenges', '--profile', 'gemma', '--yes'], "challenges has no settings in profile 'gemma'. It has them in smoke, paper"), (['--experiment', 'challenges', '--profile', 'papers', '--yes'], "did you mean 'paper'?"),
    (['--experiment', 'streaming_comparison', '--seeds', '0', '--yes'], '--seeds 0: expected a number 1 or more'), (['--experiment', 'streaming_comparison', '--config', 'none.yaml', '--yes'], 'none.yaml cannot be read'), (['--experiment', 'streaming_comparison'], 'add --yes'),
    (['runs', 'show', 'zzz'], "no record 'zzz'"), (['runs', 'list', 'continual'], "did you mean 'continual_learning'?"), ([], 'no terminal')])
def test_what_is_not_known_ends_with_2(project, argv, said):
    out = sage(*argv)
    assert out.returncode == 2 and said in out.stderr and 'Traceback' not in out.stderr and not made(project)


def test_a_model_that_cannot_be_had_is_said_once_and_before_any_work(project):
    converted('smollm2-135m-instruct').rmdir()
    out = sage('--experiment', 'streaming_comparison', '--yes', SAGE_DATA_DIR='', PIP_NO_INDEX='1')
    assert out.returncode == 2 and out.stderr.count('What to do: try again with a network') == 1 and 'Traceback' not in out.stderr, out
    assert not made(project) and not (project/'build').exists() and not (project/'runs').exists()


def test_the_exit_codes_are_in_the_help(): assert re.search(r'exit codes: 0 .*1 .*2 .*130', ' '.join(sage('--help').stdout.split()))


# ---- Running

def test_a_run_writes_elsewhere_and_says_where(project):
    before = (project/'nbs/exp_streaming.ipynb').read_bytes()
    out = sage('--experiment', 'streaming_comparison', '--yes')
    assert out.returncode == 0 and out.stderr == '' and len(made(project)) == 4, out
    assert all((project/l.strip()).is_file() for l in ('build/smoke/exp_streaming.ipynb', 'build/smoke/tables/streaming.tex') if f'  {l}\n' in out.stdout or pytest.fail(out.stdout))
    assert (project/'nbs/exp_streaming.ipynb').read_bytes() == before
    assert 'all 4 records; nothing to run; to draw: about' in sage('--list').stdout.replace('\n' + ' '*10, ' ')


def test_seeds_reach_the_notebook_and_no_run_is_made_twice(project):
    "Those of the profile are there already"
    for r in wanted_runs(CATALOGUE['streaming_comparison'], load_settings('streaming', 'smoke', project/'settings.ini')):
        if r.needed: run_or_load(lambda spec: dict(curve=[dict(accuracy=0.5)]), 'streaming', 1, r.spec, project/'runs/streaming/smoke')
    out = sage('--experiment', 'streaming_comparison', '--seeds', '3', '--yes')
    assert out.returncode == 0 and 'seeds 0 1 2' in out.stdout and '8 runs to make' in out.stdout, out
    assert sorted(seed for _, seed in made(project)) == ['1']*4 + ['2']*4
    assert len(record_files(project/'runs/streaming/smoke-custom')) == 12 and len(record_files(project/'runs/streaming/smoke')) == 4


@pytest.mark.parametrize('argv,env,engine', [([], '', 'joblib'), (['--engine', 'joblib'], 'ray', 'joblib')], ids=['by itself', 'as asked for'])
def test_the_engine_reaches_the_notebook(project, argv, env, engine):
    notebook(project, SETTINGS, RUNS, "Path(os.environ['SAGE_ROOT'], 'engine').write_text(os.environ['SAGE_ENGINE'])")
    out = sage('--experiment', 'streaming_comparison', '--yes', *argv, SAGE_ENGINE=env)
    assert out.returncode == 0 and (project/'engine').read_text() == engine, out


def test_an_engine_that_is_not_installed_or_not_known_ends_with_2(project):
    (project/'ray.py').write_text('raise ImportError')
    out = sage('--experiment', 'streaming_comparison', '--yes', '--engine', 'ray', PYTHONPATH=f'{project}:{ROOT}')
    assert out.returncode == 2 and "pip install -c constraints.txt -e '.[ray]'" in out.stderr and 'Traceback' not in out.stderr and not made(project), out
    out = sage('--experiment', 'streaming_comparison', '--yes', SAGE_ENGINE='slurm')
    assert out.returncode == 2 and "'slurm': known are joblib, ray" in out.stderr and not made(project), out
    assert sage('--experiment', 'streaming_comparison', '--yes', '--engine', 'slurm').returncode == 2


def test_a_file_of_settings_reaches_the_notebook(project):
    "Numbers, words and lists; what they leave alone is not made again"
    for r in wanted_runs(CATALOGUE['streaming_comparison'], load_settings('streaming', 'smoke', project/'settings.ini')):
        if r.needed: run_or_load(lambda spec: dict(curve=[dict(accuracy=0.5)]), 'streaming', 1, r.spec, project/'runs/streaming/smoke')
    (project/'mine.yaml').write_text('seeds: [0, 5]\nsharpness: 1.5\nsplit: report\n')
    out = sage('--experiment', 'streaming_comparison', '--config', str(project/'mine.yaml'), '--yes')
    assert out.returncode == 0 and 'seeds 0 5' in out.stdout and '5 runs to make' in out.stdout, out
    assert sorted(made(project)) == sorted([[m, '5'] for m in ('batch_full', 'batch_50pct', 'streaming_full', 'streaming_coreset')] + [['streaming_coreset', '0']])
    assert (project/'build/smoke-custom/tables/streaming.tex').is_file() and len(record_files(project/'runs/streaming/smoke-custom')) == 8


def test_a_failure_is_told_in_short_and_ends_with_1(project):
    notebook(project, SETTINGS, "raise ValueError('one\\ntwo')")
    out = sage('--experiment', 'streaming_comparison', '--yes')
    assert out.returncode == 1 and out.stderr.startswith('sage-paper: code cell 4: ValueError: one\ntwo\n') and 'Traceback' not in out.stderr, out
    assert (project/'build/smoke/exp_streaming.ipynb').is_file() and str(project/'build/smoke/exp_streaming.ipynb') in out.stderr


def test_a_kernel_that_dies_ends_with_1(project):
    notebook(project, "import os; os._exit(3)")
    out = sage('--experiment', 'streaming_comparison', '--yes')
    assert out.returncode == 1 and 'DeadKernelError' in out.stderr, out


def workers(project, n):
    "The processes that are making runs, once there are n"
    until = time.monotonic() + 90
    while len(made(project)) < n and time.monotonic() < until: time.sleep(0.1)
    return [psutil.Process(int(line.split()[2])) for line in (project/'made').read_text().splitlines()]


def family(pid): return [p for p in psutil.Process(pid).children(recursive=True)]


def test_ctrl_c_ends_all_processes_and_says_how_to_go_on(project):
    "On a terminal, with two runs under way in processes of their own, after two that were finished"
    ini = project/'settings.ini'
    ini.write_text(ini.read_text().replace('jobs = 1\n', 'jobs = 2\n', 1))
    t = Terminal('--experiment', 'streaming_comparison', '--yes', SLOW='streaming_full streaming_coreset')
    busy, started = workers(project, 4), family(t.pid)
    t.read('2/4')
    assert len(started) >= 4 and all(map(alive, started))   # papermill, the kernel, two workers
    t.say('\x03')
    assert t.code() == 130
    assert 'interrupted. 2 of 4 runs have a record and are kept.' in t.text and 'sage-paper --experiment streaming_comparison --profile smoke --yes' in t.text
    assert not [p for p in (*busy, *started) if alive(p)]
    assert len(record_files(project/'runs/streaming/smoke')) == 2 and not [*(project/'runs').rglob('*.tmp')]
    out = sage('--experiment', 'streaming_comparison', '--yes')
    assert out.returncode == 0 and '2 of 4 records; 2 runs to make' in out.stdout and len(made(project)) == 6


def test_a_signal_to_end_does_the_same(project):
    p = subprocess.Popen([*COMMAND, '--experiment', 'streaming_comparison', '--seeds', '2', '--yes'], cwd=ROOT, env=os.environ | dict(SLOW='batch_full'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    busy, started = workers(project, 1), family(p.pid)
    p.terminate()
    out, err = p.communicate(timeout=180)
    assert p.returncode == 130 and '0 of 8 runs' in err and '--seeds 2 --yes' in err and not [x for x in (*busy, *started) if alive(x)], err


# ---- The menu

def test_the_menu_asks_before_it_starts(project):
    t = Terminal()
    t.read('Enter leaves): ')
    assert '1. streaming_comparison: Nothing' in t.text
    t.say('streaming\n')
    assert "did you mean 'streaming_comparison'?" in t.read('Enter leaves): ')
    t.say('1\n')
    assert 'Profile (number or name: 1 smoke, 2 paper, 3 gemma; ' in t.read('Enter takes smoke): ')
    t.say('4\n')
    assert '4 is no number of the list, which goes from 1 to 3' in t.read('Enter takes smoke): ')
    t.say('\n')
    assert '4 runs to make' in t.read('Start? [y/N] ')
    t.say('n\n')
    assert t.code() == 0 and 'Nothing was started.' in t.text and not made(project)


def test_the_menu_starts_and_shows_progress(project):
    t = Terminal()
    for question, answer in (('leaves): ', '1'), ('takes smoke): ', '1'), ('[y/N] ', 'y')):
        t.read(question)
        t.say(answer + '\n')
    assert t.code() == 0 and len(made(project)) == 4
    assert re.search(r'streaming_comparison: 100%\|.*4/4 \[\d\d:\d\d<\d\d:\d\d', t.text) and 'build/smoke/exp_streaming.ipynb' in t.text
    again = Terminal('--experiment', 'streaming_comparison', '--yes')   # nothing to make: the notebook's cells are counted
    assert again.code() == 0 and len(made(project)) == 4 and re.search(r'streaming_comparison: +\d+%\|.*[1-4]/4 \[.*cell', again.text), again.text


def test_evaluating_shows_progress_on_a_terminal_only(project, tiny_folder, capsys):
    write_samples(project/'gold.jsonl', [Sample('one', 'Boil two.', (ToolCall('boil', dict(n=2)),))])
    argv = ['evaluate', '--data', str(project/'gold.jsonl'), '--model', tiny_folder, '--max-new-tokens', '4']
    t = Terminal(*argv)
    assert t.code() == 0 and re.search(r'answers: 100%\|.*1/1 \[\d\d:\d\d<\d\d:\d\d', t.text), t.text
    assert main(argv) == 0 and 'answers' not in capsys.readouterr().err


@pytest.mark.parametrize('answer,code', [('\n', 0), ('\x04', 0), ('\x03', 130)], ids=['enter', 'ctrl-d', 'ctrl-c'])
def test_the_menu_can_be_left(project, answer, code):
    t = Terminal()
    t.read('Enter leaves): ')
    t.say(answer)
    assert t.code(answer) == code and 'Traceback' not in t.text and not made(project)


# ---- Records

COMMITTED = sorted(p for e in CATALOGUE.values() for f in e.folders for p in record_files(ROOT/'runs'/f/'paper'))


def test_the_ends_of_a_record_say_what_the_whole_says():
    assert COMMITTED
    for p in COMMITTED: assert read_ends(p) == {k: v for k, v in json.loads(p.read_text()).items() if k != 'result'}, p


@pytest.mark.parametrize('experiment', sorted({p.parent.parent.name for p in COMMITTED}))
def test_a_record_has_measures(experiment):
    for p in COMMITTED:
        if p.parent.parent.name != experiment: continue
        found = headline(read_record(p)['result'])
        assert 0 < len(found) < 150 and all(isinstance(v, float) for v in found.values()), p


def test_the_measures_are_those_of_the_record():
    p = next(p for p in COMMITTED if p.parent.parent.name == 'streaming')
    r, found = read_record(p)['result'], headline(read_record(p)['result'])
    assert found['curve/accuracy'] == r['curve'][-1]['accuracy'] and found['written/exact'] == r['written']['exact']


@pytest.fixture
def recorded(project):
    "Four records that the settings ask for, one that they do not, a note of a failure and a lock"
    e, folder = CATALOGUE['streaming_comparison'], project/'runs/streaming/smoke'
    runs = [r for r in wanted_runs(e, load_settings('streaming', 'smoke', project/'settings.ini')) if r.needed]
    other = dict(runs[0].spec, n_tools=9)
    for k, spec in enumerate([*(r.spec for r in runs), other]): run_or_load(lambda spec: dict(curve=[dict(accuracy=k/8)]), 'streaming', 1, spec, folder)
    with pytest.raises(ZeroDivisionError): run_or_load(lambda spec: 1/0, 'streaming', 1, dict(other, n_tools=8), folder)
    return [r.key for r in runs], record_key('streaming', 1, other)


def test_runs_are_listed_with_what_is_used(project, recorded, capsys):
    keys, other = recorded
    assert main(['runs', 'list', 'streaming_comparison', '--profile', 'smoke']) == 0
    lines = capsys.readouterr().out.splitlines()
    used = {l.split()[0]: ' not used ' not in l for l in lines[1:]}
    assert used == {k: True for k in keys} | {other: False} and lines[0].startswith('streaming/smoke: 5 records')
    assert all(re.search(r'\d{4}-\d\d-\d\d +\d+\.\d s', l) for l in lines[1:]) and 'n_tools 9' in next(l for l in lines if other in l)


def test_a_run_is_shown_by_a_part_of_its_key(project, recorded, capsys):
    assert main(['runs', 'show', recorded[1][:9]]) == 0
    out = capsys.readouterr().out
    assert recorded[1] in out and re.search(r'n_tools +9\n', out) and re.search(r'accuracy +0.5\n', out) and 'packages.torch' in out


def test_two_runs_are_compared(project, recorded, capsys):
    assert main(['runs', 'compare', recorded[0][0], recorded[1]]) == 0
    rows = [l.split() for l in capsys.readouterr().out.splitlines()[1:]]
    assert ['n_tools', '10', '9'] in rows and ['curve/accuracy', '0', '0.5', '+0.5'] in rows and 'stream' not in [r[0] for r in rows]


def test_pruning_deletes_what_no_settings_ask_for_and_only_when_told(project, recorded, capsys):
    keys, other = recorded
    folder = project/'runs/streaming/smoke'
    before = sorted(p.name for p in folder.iterdir())
    assert main(['runs', 'prune']) == 0 and 'Nothing was deleted' in (out := capsys.readouterr().out) and f'{other}.json: no settings ask for it' in out
    assert sorted(p.name for p in folder.iterdir()) == before
    assert main(['runs', 'prune', '--yes']) == 0 and re.search(r'deleted: \d+ files, \d+\.\d MB', capsys.readouterr().out)
    assert sorted(p.name for p in folder.iterdir()) == sorted(f'{k}.json' for k in keys)


def test_another_seed_of_what_is_asked_for_is_listed_as_such_and_kept(project, recorded, capsys):
    "Of a run that differs in its seed alone, but not where it differs in more"
    folder = project/'runs/streaming/smoke'
    spec = read_ends(folder/f'{recorded[0][0]}.json')['spec']
    further, changed = (run_or_load(lambda spec: dict(curve=[dict(accuracy=0.5)]), 'streaming', 1, spec | more, folder)['key'] for more in (dict(seed=7), dict(seed=7, n_tools=9)))
    assert main(['runs', 'list', 'streaming_comparison', '--profile', 'smoke']) == 0
    lines = {l.split()[0]: l for l in capsys.readouterr().out.splitlines()[1:]}
    assert ' another seed ' in lines[further] and ' not used ' in lines[changed] and ' used ' in lines[recorded[0][0]]
    assert main(['runs', 'prune', '--yes']) == 0 and {p.stem for p in record_files(folder)} == {*recorded[0], further}


def test_the_committed_records_of_further_seeds_are_not_offered_for_deletion():
    for e in (CATALOGUE['coreset_ablation'], CATALOGUE['challenges']):
        assert not [x for x in prunable(ROOT, e, 'paper') if x.why == 'no settings ask for it']


def test_pruning_leaves_alone_what_is_being_made(project, recorded):
    "Another process holds the lock"
    _, other = recorded
    lock = project/'runs/streaming/smoke'/f'{other}.lock'
    code = f"from filelock import FileLock\nwith FileLock({str(lock)!r}): print('held', flush=True); input()"
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'held\n'
    assert main(['runs', 'prune', '--yes']) == 0 and lock.exists() and lock.with_suffix('.json').exists()
    p.communicate('\n', timeout=180)
    assert main(['runs', 'prune', '--yes']) == 0 and not lock.exists() and not lock.with_suffix('.json').exists()


def test_broken_settings_stop_pruning(project, recorded, capsys):
    (project/'settings.ini').write_text((project/'settings.ini').read_text().replace('n_tools = 10', 'n_tool = 10'))
    assert main(['runs', 'prune', '--yes']) == 2 and "unknown key 'n_tool'" in capsys.readouterr().err
    assert len(record_files(project/'runs/streaming/smoke')) == 5


def test_a_committed_record_has_the_date_of_its_commit():
    dates = commit_dates(ROOT)
    if not dates: pytest.skip('not a git checkout')
    tracked = subprocess.run(['git', 'ls-files', 'runs'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert tracked and {*tracked} <= {*dates} and all(re.fullmatch(r'\d{4}-\d\d-\d\d', d) for d in dates.values())


def test_a_reader_who_has_seen_enough_is_no_error():
    out = subprocess.run(['bash', '-c', 'set -o pipefail; "$@" runs list streaming_comparison --profile paper | head -1', 'bash', *COMMAND], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and out.stdout.startswith('streaming/paper: ') and out.stderr == '', out
