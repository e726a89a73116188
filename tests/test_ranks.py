"Several processes that train one model: the same result as one, the same state in all of them, one record, and an end for all if one dies"
import json, os, signal, subprocess, sys, time
from pathlib import Path

import psutil, pytest

from conftest import ROOT
from sage_paper.records import read_record
from sage_paper.running import alive

HEAD = '''
import hashlib, json, os, sys
from pathlib import Path
import numpy as np, torch
from sage_paper.calls import Sample, ToolCall
from sage_paper.evaluation import grade, write
from sage_paper.model import encode, tiny_lm
from sage_paper.ranks import GradientSum, Ranks, leave, ranks
from sage_paper.records import record_path, run_or_load, sweep
from sage_paper.replay import ImportanceBuffer
from sage_paper.scaling import alike_on_all
from sage_paper.sharding import shard
from sage_paper.ssis import SSIS
from sage_paper.trainers import Stream, Trainer, train_stream
team, folder = ranks(), Path(sys.argv[1])
lm = tiny_lm()
some = encode([Sample(str(i), 'tea '*(i % 5) + str(i), (ToolCall(f'tool{i}'),)) for i in range(23)], lm.tokenizer)
def weights(lm): return torch.cat([(p.full_tensor() if hasattr(p, 'full_tensor') else p).detach().flatten() for p in lm.model.parameters()])
def gap(a, b): return float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
def told(**found): (folder/f'{team.rank}.json').write_text(json.dumps(dict(rank=team.rank, size=team.size) | found))
'''

TRAIN = '''
def stream(team, capture=True, total=23*8, **kw):
    "A stream in batches of seven, which two ranks cannot halve"
    lm = tiny_lm()
    t = Trainer(lm, 2e-3, total, cooldown=0.5, capture=capture, team=team)
    buffer, selector = ImportanceBuffer(16, seed=0), SSIS(0.5)
    train_stream(t, some, list(range(23)), 7, buffer, [], selector, **kw)
    s = Stream(t, buffer, selector)
    return dict(nll=grade(lm, some).nll, held=[k.encoded for k in buffer.items], n=len(buffer), budget={k: v for k, v in vars(t.budget).items() if k != 'seconds'}, wrapped=type(lm.wrapped).__name__, alike=alike_on_all(s), weights=weights(lm))
def against(one, many): return dict(gap=gap(one['nll'], many['nll']), held=one['held'] == many['held'], n=many['n'], budget=one['budget'] == many['budget'], wrapped=many['wrapped'], alike=many['alike'])
found = {}
for name, kw in dict(plain={}, scored=dict(total=12, score_first=True)).items():
    one = stream(Ranks(), **kw)
    for capture in (True, False): found[f'{name} {capture}'] = against(one, stream(None, capture, **kw))

def steps(team, batch, lm=None, capture=True, n=3, bucket=None, overlap=True, own=None):
    "Some steps on a batch with weights, what the last one met, and the gradients that were clipped"
    lm, seen = lm or tiny_lm(), []
    def look(): seen[:] = [p.grad.clone() for p in lm.model.parameters()]
    t = Trainer(lm, 2e-3, 100, capture=capture, team=team, after_backward=[look])
    if bucket: t.sums = GradientSum(lm.model.parameters(), t.team, bucket, overlap)
    for _ in range(n): met = t.step(batch, own)
    return met, [g.full_tensor() if hasattr(g, 'full_tensor') else g for g in seen], weights(lm)
for n in (1, 2, 5):
    own = 0.2 + np.arange(n)/n
    for capture in (True, False):
        one, many = steps(Ranks(), some[:n], own=own), steps(None, some[:n], own=own, capture=capture)
        found[f'step {n} {capture}'] = dict(met=[gap(a, b) for a, b in zip(one[0], many[0])], shapes=[list(a.shape) == list(b.shape) for a, b in zip(one[0], many[0])],
                                            gradient=max(gap(a, b) for a, b in zip(one[1], many[1])), largest=max(float(g.abs().max()) for g in one[1]))
bits = [steps(None, some[:6], bucket=b, overlap=o)[2] for b, o in ((2**24, True), (2**24, False), (500, True), (1, True), (1, False))]
found['buckets'] = [torch.equal(bits[0], b) for b in bits]
told(**found)
leave()
'''

SHARD = TRAIN.partition('found = {}')[0] + TRAIN[TRAIN.index('def steps'):TRAIN.index('for n in (1, 2, 5)')] + '''
found = {}
for checkpoint in (False, True):
    lm = shard(tiny_lm(), checkpoint)
    own = np.array([1., 0.5, 2., 1., 1.])
    one, many = steps(Ranks(), some[:5], own=own), steps(None, some[:5], lm, own=own)
    held = sum(p.to_local().numel() for p in lm.model.parameters())
    found[f'checkpoint {checkpoint}'] = dict(met=[gap(a, b) for a, b in zip(one[0], many[0])], gradient=max(gap(a, b) for a, b in zip(one[1], many[1])), weights=gap(one[2], many[2]),
                                             part=held/len(one[2]), nll=gap(grade(lm, some).nll, grade(lm, some[::-1]).nll[::-1].copy()), moved=gap(one[2], weights(tiny_lm())))
try: write(lm, ['tea'])
except ValueError as e: found['written'] = str(e)
made = []
def run(spec):
    made.append(spec['x'])
    return dict(y=spec['x'], rank=team.rank)
def breaks(spec): raise MemoryError('no room')
runs = folder/'runs'
records = [run_or_load(run, 'demo', 1, dict(x=3), runs) for _ in range(2)] + sweep(run, 'demo', 1, [dict(x=x) for x in (3, 4, 5)], runs, jobs=4)
try: run_or_load(breaks, 'demo', 1, dict(x=9), runs)
except MemoryError as e: found['error'] = str(e)
told(made=made, records=[r['result'] for r in records], **found)
leave()
'''

KILLED = '''
def run(spec):
    t = Trainer(lm, 1e-3, 10**6)
    while True:
        t.step(some[:4])
        if team.rank == 1 and t.spent == 8: os.kill(os.getpid(), 9)
        (folder/f'pid{team.rank}').write_text(str(os.getpid()))
run_or_load(run, 'demo', 1, dict(x=1), folder/'runs')
'''

ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes=2', '--num_machines=1', '--mixed_precision=no', '--dynamo_backend=no', '--main_process_port=0']


def launch(folder, code, launcher=TORCHRUN):
    "Two ranks that run a program; its end, its seconds, and what it says"
    (script := folder/'program.py').write_text(HEAD + code)
    start = time.monotonic()
    p = subprocess.run([*launcher, str(script), str(folder)], env=ENV, capture_output=True, text=True, timeout=300)
    return p, time.monotonic() - start


def both(folder, code, launcher=TORCHRUN):
    "What each of two ranks has found"
    p, _ = launch(folder, code, launcher)
    assert p.returncode == 0, p.stderr[-3000:]
    found = [json.loads((folder/f'{k}.json').read_text()) for k in range(2)]
    assert [(f.pop('rank'), f.pop('size')) for f in found] == [(0, 2), (1, 2)]
    return found


@pytest.fixture(scope='module')
def trained(tmp_path_factory): return both(tmp_path_factory.mktemp('trained'), TRAIN, ACCELERATE)


@pytest.mark.parametrize('capture', [True, False])
@pytest.mark.parametrize('kind', ['plain', 'scored'])
def test_a_stream_ends_alike_on_one_rank_and_on_two(trained, kind, capture):
    for f in (t[f'{kind} {capture}'] for t in trained):
        assert f['gap'] < 1e-4 and f['held'] and f['n'] > 4 and f['budget'] and f['alike'], f
        assert f['wrapped'] == ('NoneType' if capture else 'DistributedDataParallel')


@pytest.mark.parametrize('capture', [True, False])
@pytest.mark.parametrize('n', [1, 2, 5])
def test_a_step_meets_the_same_whatever_the_ranks_shares(trained, n, capture):
    for f in (t[f'step {n} {capture}'] for t in trained):
        assert all(f['shapes']) and len(f['met']) == 3 and max(f['met']) < 1e-4, f
        assert f['gradient'] < 1e-4*f['largest'], f


def test_buckets_and_overlap_change_no_bit(trained):
    assert [t['buckets'] for t in trained] == [[True]*5]*2


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    return folder, both(folder, SHARD)


@pytest.mark.parametrize('checkpoint', [True, False])
def test_a_sharded_model_learns_the_same(sharded, checkpoint):
    for f in (s[f'checkpoint {checkpoint}'] for s in sharded[1]):
        assert max(f['met']) < 1e-4 and f['gradient'] < 1e-4 and f['weights'] < 1e-4 < 1e-3 < f['moved'] and f['nll'] < 1e-4, f
    assert sum(s[f'checkpoint {checkpoint}']['part'] for s in sharded[1]) == pytest.approx(1) and all(s[f'checkpoint {checkpoint}']['part'] < 0.6 for s in sharded[1])


def test_a_sharded_model_writes_nothing(sharded):
    assert all('writes no answers' in s['written'] for s in sharded[1])


def test_all_ranks_run_and_the_first_one_writes(sharded):
    folder, found = sharded
    assert [f['made'] for f in found] == [[3, 4, 5]]*2
    assert [f['records'] for f in found] == [[dict(y=x, rank=0) for x in (3, 3, 3, 4, 5)]]*2
    records = [p for p in (folder/'runs').glob('*.json') if 'failed' not in p.name]
    assert sorted(read_record(p)['result']['y'] for p in records) == [3, 4, 5]
    note, = (folder/'runs').glob('*.failed.json')
    assert [f['error'] for f in found] == ['no room']*2 and 'no room' in json.loads(note.read_text())['error']


def test_if_a_rank_is_killed_all_end(tmp_path):
    p, seconds = launch(tmp_path, KILLED)
    assert p.returncode and seconds < 60
    assert not [p for p in (tmp_path/'runs').glob('*.json') if 'failed' not in p.name]   # the other rank may have noted what it has met
    for pid in (int((tmp_path/f'pid{k}').read_text()) for k in range(2)): assert not psutil.pid_exists(pid) or not alive(psutil.Process(pid))


def test_the_command_measures_and_writes_one_record(tmp_path):
    p = subprocess.run([*ACCELERATE, '-m', 'sage_paper.scaling', 'large', '--shape', 'tiny', '--precision', 'fp32', '--length', '16', '--per-rank', '2', '--out', str(tmp_path)], env=ENV, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    path, = tmp_path.glob('*.json')
    record, said = read_record(path), json.loads(p.stdout)
    assert said['result'] == record['result'] and record['spec']['ranks'] == 2 and len(record['result']['peak_bytes']) == 2
    assert record['result']['tokens_per_step'] == 2*2*16
