"Sweeps: the same records whichever engine made them, and no run lost with the process or the machine that was at work on it"
import importlib.util, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import psutil, pytest

from conftest import ROOT
from sage_paper.engines import RETRIES, Lost, on_joblib
from sage_paper.records import RecordError, read_record, record_key, sweep
from sage_paper.running import alive
from test_experiments import SETTINGS, notebook, project, sage

HEAD = '''
import json, os, sys, time
from pathlib import Path
import sage_paper.records
from sage_paper.records import RecordError, read_record, record_key, run_or_load, sweep
folder, SLOW = Path(sys.argv[1]), float(sys.argv[2])
def light():
    "Without loading PyTorch"
    import sage_paper.records
    return dict(revision=sage_paper.records.revision(), device='CPU')
sage_paper.records.environment = light
class Recorded:
    "A run that says where it was made, and waits"
    def __init__(self, folder, slow): self.folder, self.slow = str(folder), slow
    def __call__(self, spec):
        import os, time, sage_paper.records
        sage_paper.records.environment = light
        with open(os.path.join(self.folder, 'begun'), 'a') as f: f.write(f"{spec['x']} {os.getpid()} {os.getppid()}\\n")
        if spec['x'] == 'poison': raise ValueError('the loss is nan')
        if spec['x'] == 'deadly': os.kill(os.getpid(), 9)
        time.sleep(self.slow)
        with open(os.path.join(self.folder, 'made'), 'a') as f: f.write(f"{spec['x']}\\n")
        return dict(y=[spec['x']/3]*3, text='né')
run = Recorded(folder, SLOW)
def make(xs, jobs=2): return sweep(run, 'demo', 1, [dict(x=x) for x in xs], folder/'runs', jobs)
'''


def start(code, folder, slow=0., **env):
    "A process that makes a sweep"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1') | env
    return subprocess.Popen([sys.executable, '-c', HEAD + code, str(folder), str(slow)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(p, code=0):
    out, err = p.communicate(timeout=240)
    assert p.returncode == code, err
    return out


def lines(path): return [l.split() for l in path.read_text().splitlines()] if path.exists() else []


def records(folder): return {p.stem: read_record(p) for p in sorted((folder/'runs').glob('*.json')) if not p.name.endswith('.failed.json')}


def timeless(folder): return {k: {f: v for f, v in r.items() if f not in ('seconds', 'environment')} for k, r in records(folder).items()}


def wait_for(what, seconds=120):
    until = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < until: time.sleep(0.05)
    assert found
    return found


def notes(folder): return {p.name: {f: v for f, v in json.loads(p.read_text()).items() if f in ('key', 'experiment', 'version', 'spec')} for p in (folder/'runs').glob('*.failed.json')}


# ---- One machine

def deadly(x):
    if x == 'deadly': os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_what_kills_its_process_is_given_up_and_the_rest_is_made():
    found = dict(on_joblib(deadly, [(str(k), 'deadly' if k == 1 else k) for k in range(6)], 3))
    assert isinstance(found.pop('1'), Lost) and found == {str(k): k for k in range(6) if k != 1}


def once(x):
    "Kills its process the first time"
    path, first = Path(x), not Path(x).exists()
    path.touch()
    if first: os.kill(os.getpid(), signal.SIGKILL)
    return 'made'


def test_what_dies_by_accident_is_made_again(tmp_path):
    assert dict(on_joblib(once, [(str(k), str(tmp_path/str(k))) for k in range(2)], 2)) == {'0': 'made', '1': 'made'}


def test_a_poison_run_and_a_deadly_one_are_recorded_and_the_sweep_goes_on(tmp_path):
    said = ended(start("try: make(['poison', 1, 'deadly', 2])\nexcept RecordError as e: print(e)", tmp_path))
    keys = {x: record_key('demo', 1, dict(x=x)) for x in ('poison', 'deadly')}
    assert '2 of 4 runs failed' in said and f'{keys["poison"]}: ValueError: the loss is nan' in said and f'{keys["deadly"]}: Lost: ' in said
    assert sorted(r['spec']['x'] for r in records(tmp_path).values()) == [1, 2]
    failed = {x: json.loads((tmp_path/'runs'/f'{k}.failed.json').read_text()) for x, k in keys.items()}
    assert failed['poison']['error'] == 'ValueError: the loss is nan' and 'died 3 times' in failed['deadly']['error'] and failed['deadly']['spec'] == dict(x='deadly')
    assert sum(l[0] == 'deadly' for l in lines(tmp_path/'begun')) == RETRIES + 1


def test_two_sweeps_make_each_run_once(tmp_path):
    both = [start('print(len(make(range(6))))', tmp_path, 0.3) for _ in range(2)]
    assert [ended(p) for p in both] == ['6\n']*2
    assert sorted(lines(tmp_path/'made')) == [[str(x)] for x in range(6)]


def test_a_run_that_asks_for_the_end_of_the_program_fails(tmp_path):
    def leaves(spec): sys.exit(3)
    with pytest.raises(RecordError, match='SystemExit: 3'): sweep(leaves, 'demo', 1, [{}], tmp_path)


# ---- A cluster of two machines, both on this one

needs_ray = pytest.mark.skipif(importlib.util.find_spec('ray') is None, reason="Ray is not installed: pip install -c constraints.txt -e '.[ray]'")


class Node:
    "A raylet with all that belongs to it, of one processor"
    def __init__(self, env, *args):
        command = [sys.executable, '-m', 'ray.scripts.scripts', 'start', '--block', '--num-cpus=1', f'--object-store-memory={100*2**20}', '--disable-usage-stats', *args]
        for _ in range(3):   # Ray gives a raylet half a minute to start, which is short where others are at work
            self.process, said = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), []
            while (line := self.process.stdout.readline()) and 'Ray runtime started' not in line: said.append(line)
            if line: return
            self.end()
        raise AssertionError(''.join(said))

    def family(self): return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    @property
    def raylet(self):
        found, = (p for p in self.family() if p.name() == 'raylet')
        return found

    def end(self):
        if self.process.poll() is None:
            family = self.family()
            for p in family:
                if alive(p): p.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def cluster():
    "Its nodes, and the environment of those who use it"
    folder = Path(f'/tmp/sage-ray-{os.getpid()}')   # short, since sockets lie in it
    port = 20000 + os.getpid() % 10000
    env = {k: v for k, v in os.environ.items() if k != 'RAY_ADDRESS'} | dict(RAY_USAGE_STATS_ENABLED='0', PYTHONPATH='', OMP_NUM_THREADS='1')
    nodes = []
    try:
        nodes.append(Node(env, '--head', f'--port={port}', '--include-dashboard=false', f'--temp-dir={folder}', '--node-ip-address=127.0.0.1'))
        nodes.append(Node(env, f'--address=127.0.0.1:{port}', '--node-ip-address=127.0.0.1'))
        yield nodes, dict(RAY_ADDRESS=f'127.0.0.1:{port}', SAGE_ENGINE='ray')
    finally:
        for n in reversed(nodes): n.end()
        subprocess.run(['rm', '-rf', str(folder)], check=True)


CELL = """import time
from pathlib import Path
import sage_paper.records
from sage_paper.streaming_runs import STREAMING_VERSION, streaming_specs
def run(spec):
    import sage_paper.records
    sage_paper.records.environment = lambda: dict(device='CPU')   # without loading PyTorch
    return dict(curve=[dict(accuracy=0.5)], of=sage_paper.__file__)
records = sage_paper.records.experiment_records(run, 'streaming', STREAMING_VERSION, streaming_specs(settings), settings)"""


@needs_ray
def test_an_experiment_is_run_on_a_cluster_by_the_code_that_asked(cluster, project):
    notebook(project, SETTINGS, CELL)
    out = sage('--experiment', 'streaming_comparison', '--yes', '--engine', 'ray', RAY_ADDRESS=cluster[1]['RAY_ADDRESS'])
    assert out.returncode == 0 and 'on a Ray cluster' in out.stdout, out
    found = [read_record(p) for p in (project/'runs/streaming/smoke').glob('*.json')]
    assert len(found) == 4 and all('py_modules' in r['result']['of'] for r in found)   # sent along
    assert sage('--experiment', 'streaming_comparison', '--yes').returncode == 0   # all there for the other engine


@needs_ray
def test_who_is_interrupted_leaves_no_run_behind(cluster, tmp_path):
    p = start('make(range(4))', tmp_path, 600, **cluster[1])
    begun = wait_for(lambda: lines(tmp_path/'begun'))
    p.send_signal(signal.SIGINT)
    assert 'KeyboardInterrupt' in p.communicate(timeout=120)[1] and p.returncode
    wait_for(lambda: not any(psutil.pid_exists(int(pid)) and alive(psutil.Process(int(pid))) for _, pid, _ in begun))
    assert not records(tmp_path) and not notes(tmp_path)


@needs_ray
def test_a_cluster_makes_the_same_records_and_loses_none_with_a_machine(cluster, tmp_path):
    "One after the other on the same cluster, which takes a while to start"
    (head, other), env = cluster

    here, there = tmp_path/'here', tmp_path/'there'
    for f in (here, there): f.mkdir()
    xs = "['poison', 1, 'deadly', 2, 3]"
    code = f"try: make({xs})\nexcept RecordError as e: print(e)"
    said = [ended(start(code, here)), ended(start(code, there, **env))]
    assert timeless(here) == timeless(there) and len(timeless(there)) == 3
    named = [sorted(re.findall(r'^[0-9a-f]{16}: [^(\n]+', x, re.M)) for x in said]   # Ray itself has said more
    assert named[0] == named[1] and len(named[0]) == 2 and all('2 of 5 runs failed' in x for x in said)
    assert notes(here) == notes(there) and len(notes(there)) == 2
    assert sum(l[0] == 'deadly' for l in lines(there/'begun')) == RETRIES + 1
    assert {r['environment']['revision'] for r in records(there).values()} == {r['environment']['revision'] for r in records(here).values()}

    twice = tmp_path/'twice'
    twice.mkdir()
    both = [start('print(len(make(range(6))))', twice, 0.3, **env) for _ in range(2)]
    assert all(ended(p).endswith('6\n') for p in both) and sorted(lines(twice/'made')) == [[str(x)] for x in range(6)]

    killed = tmp_path/'killed'
    killed.mkdir()
    p = start('print(len(make(range(8))))', killed, 1.5, **env)
    raylet = other.raylet
    victims = wait_for(lambda: [l for l in lines(killed/'begun') if int(l[2]) == raylet.pid])
    assert len(records(killed)) < 6
    raylet.kill()
    assert ended(p).endswith('8\n') and not alive(raylet)
    assert sorted(r['spec']['x'] for r in records(killed).values()) == [*range(8)] and not [*(killed/'runs').glob('*.failed.json')]
    made, begun = [l[0] for l in lines(killed/'made')], [l[0] for l in lines(killed/'begun')]
    again = {x for x in begun if begun.count(x) > 1}
    assert again <= {l[0] for l in victims} and sorted(made) == [str(x) for x in range(8)]   # none twice


@needs_ray
@pytest.mark.parametrize('address', ['127.0.0.1:1', 'nowhere'])
def test_a_cluster_that_is_not_there_is_named(tmp_path, address):
    code = "from sage_paper.engines import EngineError\ntry: make([1])\nexcept EngineError as e: print(e)"
    assert ended(start(code, tmp_path, SAGE_ENGINE='ray', RAY_ADDRESS=address)).startswith(f'no Ray cluster answers at RAY_ADDRESS = {address!r}') and not lines(tmp_path/'begun')
