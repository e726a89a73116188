"Faults: a full disk, a folder that cannot be written, damaged and outdated files, a clock that jumps, a plug that is pulled: an error that says so, or the right numbers"
import ast, concurrent.futures.process, errno, json, os, resource, signal, subprocess, sys, tempfile, time, zlib
from pathlib import Path

import filelock, pytest, safetensors, torch, tqdm   # the children that may not read much get these from here

import sage_paper.records
from conftest import ROOT
from sage_paper.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from sage_paper.model import tiny_lm
from sage_paper.practice import practise
from sage_paper.records import RecordError, read_record, record_key, run_or_load, sweep, write_atomically
from sage_paper.trainers import Stopwatch, weights_once

SPEC = dict(x=1)
KEY = record_key('demo', 1, SPEC)


@pytest.fixture(autouse=True)
def light(monkeypatch): monkeypatch.setattr(sage_paper.records, 'environment', lambda: dict(device='CPU'))


def files(folder): return sorted(p.name for p in folder.iterdir() if not p.name.endswith('.lock'))


def in_a_child(act):
    "What a forked process returns, or the words of what it raises"
    there, here = os.pipe()
    if not (pid := os.fork()):
        signal.alarm(60)            # rather than wait for what never comes
        torch.set_num_threads(1)    # the others have stayed behind
        try: said = str(act())
        except BaseException as e: said = f'{type(e).__name__}: {e}'
        os.write(here, said.encode())
        os._exit(0)
    os.close(here)
    with os.fdopen(there) as f: said = f.read()
    assert os.waitpid(pid, 0)[1] == 0
    return said


# ---- A disk that is full

def full(act, size=4096):
    "Let a child process act where no file may grow beyond a size"
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return act()
    return in_a_child(limited)


def test_a_record_that_does_not_fit_is_an_error_and_leaves_nothing(tmp_path):
    said = full(lambda: run_or_load(lambda spec: dict(big='x'*10_000), 'demo', 1, SPEC, tmp_path))
    assert said.startswith(f'OSError: [Errno {errno.EFBIG}]') and files(tmp_path) == []
    assert run_or_load(lambda spec: dict(n=1), 'demo', 1, SPEC, tmp_path)['result'] == dict(n=1)


def test_a_sweep_on_a_full_disk_names_the_runs_that_did_not_fit(tmp_path):
    specs = [dict(x=k) for k in range(3)]
    said = full(lambda: sweep(lambda spec: dict(big='x'*spec['x']*5000), 'demo', 1, specs, tmp_path))
    assert said.startswith('RecordError: 2 of 3 runs failed') and all(record_key('demo', 1, s) in said for s in specs[1:]) and 'File too large' in said
    assert files(tmp_path) == [f'{record_key("demo", 1, specs[0])}.json']


def test_what_failed_is_said_even_where_no_note_of_it_fits(tmp_path):
    def fails(spec): raise ValueError('the loss is nan ' + 'x'*10_000)
    said = full(lambda: sweep(fails, 'demo', 1, [SPEC], tmp_path))
    assert 'ValueError: the loss is nan' in said and 'no note of it could be written' in said and files(tmp_path) == []


@pytest.mark.parametrize('size', [0, 4096, 100_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, size):
    path = tmp_path/'run.safetensors'
    save_checkpoint(dict(a=torch.ones(3)), path)
    said = full(lambda: save_checkpoint(dict(a=torch.ones(100_000)), path), size)
    assert said.startswith(f'CheckpointError: {path} could not be written') and files(tmp_path) == ['run.safetensors']
    assert torch.equal(load_checkpoint(path)['a'], torch.ones(3))


def test_no_space_is_said_as_the_system_says_it(tmp_path, monkeypatch):
    def none(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', none)
        with pytest.raises(OSError, match='No space left'): write_atomically(tmp_path/'a.json', '{}')
        with pytest.raises(CheckpointError, match='No space left'): save_checkpoint({}, tmp_path/'a.safetensors')
    assert files(tmp_path) == []


# ---- A folder that cannot be written to

@pytest.fixture
def locked():
    "A folder that others than root cannot write to, and a way to act as another"
    nobody = 65534
    with tempfile.TemporaryDirectory() as box:
        os.chmod(box, 0o755)
        folder = Path(box)/'runs'
        folder.mkdir()
        folder.chmod(0o555)
        def act(what):
            def other():
                if os.getuid() == 0: os.setgid(nobody); os.setuid(nobody)
                return what()
            return in_a_child(other)
        yield folder, act
        folder.chmod(0o755)


@pytest.mark.parametrize('where', ['', 'below'])
def test_nothing_is_run_for_a_folder_that_cannot_be_written(locked, tmp_path, where):
    folder, act = locked
    folder /= where
    said = act(lambda: run_or_load(lambda spec: pytest.fail('ran'), 'demo', 1, SPEC, folder))
    assert said.startswith(f'RecordError: {folder} cannot be ') and ('written to' in said or 'Permission denied' in said)
    assert act(lambda: sweep(lambda spec: pytest.fail('ran'), 'demo', 1, [SPEC, dict(x=2)], folder)) == said


def test_a_record_in_a_folder_that_cannot_be_written_is_read(locked):
    folder, act = locked
    folder.chmod(0o755)
    run_or_load(lambda spec: dict(n=1), 'demo', 1, SPEC, folder)
    folder.chmod(0o555)
    assert act(lambda: sweep(lambda spec: pytest.fail('ran'), 'demo', 1, [SPEC], folder)[0]['result']) == "{'n': 1}"


def test_a_checkpoint_that_cannot_be_written_is_an_error(locked):
    folder, act = locked
    assert 'could not be written' in act(lambda: save_checkpoint({}, folder/'run.safetensors'))


# ---- Records: damaged, or of another time

@pytest.fixture
def record(tmp_path):
    run_or_load(lambda spec: dict(n=1, curve=[0.5]*20), 'demo', 1, SPEC, tmp_path)
    return tmp_path/f'{KEY}.json'


def test_a_record_cut_anywhere_is_refused(record):
    whole = record.read_bytes()
    for n in range(len(whole) - 1):   # the last character ends the line
        record.write_bytes(whole[:n])
        with pytest.raises(RecordError, match=KEY): read_record(record)


@pytest.mark.parametrize('bad', [b'\xff\xfe', b'null', b'"text"', b'\x00'*100, b'{"key": 1}'], ids=['not text', 'null', 'a string', 'zeros', 'no record'])
def test_other_content_is_refused_and_never_overwritten(record, bad):
    record.write_bytes(bad)
    with pytest.raises(RecordError, match=KEY): sweep(lambda spec: pytest.fail('ran'), 'demo', 1, [SPEC], record.parent)
    assert record.read_bytes() == bad


@pytest.mark.parametrize('field', ['result', 'seconds', 'environment'])
def test_a_record_of_an_older_schema_is_refused_by_name(record, field):
    r = json.loads(record.read_text())
    r[f'old_{field}'] = r.pop(field)
    record.write_text(json.dumps(r))
    with pytest.raises(RecordError, match=f'{KEY}.json lacks {field}: an older version'): run_or_load(lambda spec: pytest.fail('ran'), 'demo', 1, SPEC, record.parent)


def test_a_record_of_an_older_version_is_not_taken_for_the_new_one(record):
    assert run_or_load(lambda spec: dict(n=2), 'demo', 2, SPEC, record.parent)['result'] == dict(n=2)
    assert read_record(record)['result']['n'] == 1 and len(files(record.parent)) == 2


# ---- Checkpoints

STATE = dict(model=dict(w=torch.arange(6.).reshape(2, 3), b=torch.tensor(1, dtype=torch.bfloat16)), opt={0: dict(step=torch.tensor(3.)), 1: (1, 2.5)}, log=[dict(nll=0.1)])


def test_a_checkpoint_cut_or_changed_anywhere_is_refused(tmp_path):
    path = tmp_path/'run.safetensors'
    save_checkpoint(STATE, path)
    whole = path.read_bytes()
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match='is damaged'): load_checkpoint(path)
    same = 0
    for n in range(len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 4]) + whole[n + 1:])
        try: state = load_checkpoint(path)
        except CheckpointError: continue
        same += 1
        assert str(state) == str(STATE)   # such as a blank of the header's padding
    assert same < len(whole)/20


@pytest.mark.parametrize('header', [None, {}, dict(state='{"tensor": "9"}', crc32='0'), dict(state='[1', crc32='0'), dict(state='{"a": 1, "b": 2}', crc32='0')])
def test_safetensors_that_are_no_checkpoint_are_refused(tmp_path, header):
    from safetensors.torch import save_file
    if header and 'state' in header: header = header | dict(crc32=f'{zlib.crc32(torch.ones(1).numpy().tobytes(), zlib.crc32(header["state"].encode())):08x}')   # right, so that what it says is looked at
    save_file({'0': torch.ones(1)}, tmp_path/'x', header)
    with pytest.raises(CheckpointError, match='is damaged'): load_checkpoint(tmp_path/'x')


def test_weights_that_were_cut_are_made_again(tmp_path):
    lm, made = tiny_lm(), []
    first = weights_once(lm, tmp_path/'w.safetensors', lambda: made.append(1))
    whole = (tmp_path/'w.safetensors').read_bytes()
    (tmp_path/'w.safetensors').write_bytes(whole[:len(whole)//2])
    assert weights_once(lm, tmp_path/'w.safetensors', lambda: made.append(2)) == first and made == [1, 2]


def calls(tree): return {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}


def test_nothing_is_unpickled():
    unsafe = {f'{m}.{f}' for m in ('pickle', 'cloudpickle', 'dill', 'joblib', 'torch', 'marshal', 'shelve', 'pd', 'pandas') for f in ('load', 'loads', 'Unpickler', 'open', 'read_pickle')}
    for p in sorted((ROOT/'sage_paper').glob('*.py')):
        tree = ast.parse(p.read_text())
        modules = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} | {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not modules & {'pickle', 'cloudpickle', 'dill', 'marshal', 'shelve'} and not calls(tree) & unsafe, p.name
        assert 'allow_pickle=True' not in p.read_text() and 'torch.load' not in p.read_text() and 'torch.save' not in p.read_text(), p.name


# ---- A clock that jumps

@pytest.mark.parametrize('jump', [-1e6, 1e6], ids=['back', 'ahead'])
def test_durations_do_not_follow_the_clock(tmp_path, monkeypatch, jump):
    now, n = time.time(), iter(range(10**9))
    monkeypatch.setattr(time, 'time', lambda: now + jump*next(n))
    assert time.time() != time.time()
    r = run_or_load(lambda spec: time.sleep(0.02) or dict(n=1), 'demo', 1, SPEC, tmp_path)
    watch = Stopwatch('cpu')
    with watch: time.sleep(0.02)
    assert 0.02 <= r['seconds'] < 60 and 0.02 <= watch.seconds < 60


def test_what_a_notebook_has_written_is_listed_whatever_the_clock_says(tmp_path):
    from types import SimpleNamespace
    from sage_paper.report import Artefacts
    from sage_paper.running import _stamps, _written
    plan = SimpleNamespace(settings=SimpleNamespace(profile='smoke'), root=tmp_path, experiment=SimpleNamespace(notebook='exp_streaming'))
    tables = Artefacts('smoke', tmp_path).base/'tables'
    tables.mkdir(parents=True)
    (tables/'manifest.json').write_text(json.dumps({f'{k}.tex': dict(notebook='exp_streaming') for k in 'abc'}))
    for k in 'ab': (tables/f'{k}.tex').write_text(k)
    before = _stamps(plan)
    for k in 'bc':
        write_atomically(tables/f'{k}.tex', k)
        os.utime(tables/f'{k}.tex', (0, 0))   # 1970
    assert _written(plan, before) == (tables/'b.tex', tables/'c.tex')


# ---- A plug that is pulled

SCRIPT = '''
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_rl import learner_of, practise, state_of, timeless
def ask(learner): return lambda: dict(weight=float(state_of(learner).norm()))
def run(path):
    learner = learner_of('best')
    done = practise(learner, 4, ask(learner), 2, path)
    return json.dumps([timeless(done['log']), timeless(done['points']), state_of(learner).double().sum().item(), state_of(learner).tolist()])
learner_of('best')   # what all of them begin with is made once
start = time.perf_counter()
whole = run(None)
took = time.perf_counter() - start
folder, rng = Path(sys.argv[2]), random.Random(int(sys.argv[3]))
kills, ends, later, wrong, ended = 0, 0, 0, 0, 0
while kills < 20 or not ended:
    later += (folder/'run').exists()
    pid = os.fork()
    if not pid:
        (folder/'end').write_text(run(folder/'run'))
        os._exit(0)
    until = time.perf_counter() + (rng.random()*took if kills < 20 else 600)
    while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and time.perf_counter() < until: time.sleep(0.002)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    elif (folder/'end').exists():
        ends += 1
        wrong += (folder/'end').read_text() != whole
        (folder/'end').unlink()
    else: sys.exit('a child ended without a result')
print(json.dumps(dict(kills=kills, ends=ends, later=later, wrong=wrong, left=sorted(p.name for p in folder.iterdir() if not p.name.endswith('.tmp')))))
'''


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(tmp_path):
    out = subprocess.run([sys.executable, '-W', 'error::UserWarning:sage_paper', '-c', SCRIPT, str(ROOT/'tests'), str(tmp_path), '7'], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'), timeout=300)
    assert out.returncode == 0, out.stderr
    said = json.loads(out.stdout)
    assert said['kills'] == 20 and said['ends'] >= 1 and said['later'] >= 3 and said['wrong'] == 0 and said['left'] == []


def test_a_damaged_checkpoint_begins_anew_with_the_same_numbers(tmp_path):
    from test_rl import learner_of, state_of, timeless
    straight, again = learner_of('more'), learner_of('more')
    expected = practise(straight, 3, dict, 1)
    (tmp_path/'run').write_bytes(b'cut')
    with pytest.warns(UserWarning, match='the run begins anew'): found = practise(again, 3, dict, 1, tmp_path/'run')
    assert timeless(found['log']) == timeless(expected['log']) and torch.equal(state_of(straight), state_of(again))


def test_the_checkpoint_of_another_method_is_refused(tmp_path):
    from test_rl import learner_of
    save_checkpoint(dict(learner=learner_of('more').state(), log=[{}, {}], points=[], seconds=0.), tmp_path/'run')
    with pytest.raises(CheckpointError, match='of another run'): practise(learner_of('ppo'), 3, dict, 1, tmp_path/'run')


def test_a_lock_falls_with_its_holder(tmp_path):
    code = f"import sys, time; from pathlib import Path; from filelock import FileLock\nwith FileLock({str(tmp_path/f'{KEY}.lock')!r}): print('held', flush=True); time.sleep(600)"
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'held\n' and (tmp_path/f'{KEY}.lock').exists()
    p.kill()
    p.wait()
    start = time.monotonic()
    assert run_or_load(lambda spec: dict(n=1), 'demo', 1, SPEC, tmp_path)['result'] == dict(n=1) and time.monotonic() - start < 30
