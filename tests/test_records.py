"Records: made once, whole or not at all, named by their settings, and free of texts and places"
import dataclasses, json, re, subprocess, sys, time

import pytest
from hypothesis import given, strategies as st

from conftest import ROOT
from sage_paper.config import Streaming, load_settings
from sage_paper.streaming_runs import STREAMING_METHODS, streaming_spec
from sage_paper.records import RecordError, pack, read_record, record_key, run_or_load, sweep, unpack

SPEC = dict(method='batch_full', seed=0, lr=1e-3, ssis=[0.4, 0.3], data=dict(name='x', n=3))
KEY = record_key('demo', 1, SPEC)
RECORDS = sorted(p for p in (ROOT/'runs').rglob('*.json') if p.parent.name == 'paper')


def files(folder): return sorted(p.name for p in folder.iterdir())


def child(code, folder, *args):
    "A Python process in which `folder`, `args`, `SPEC` and `run_or_load` are at hand"
    head = f'import os, sys, time\nfrom pathlib import Path\nfrom sage_paper.records import run_or_load\nfolder, args, SPEC = Path(sys.argv[1]), sys.argv[2:], {SPEC!r}\n'
    return subprocess.Popen([sys.executable, '-c', head + code, str(folder), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


HANGS = {
    'while running': "def run(spec): (folder/'here').touch(); time.sleep(60)",
    'while writing': "def run(spec): return {}\ndef hang(*_): (folder/'here').touch(); time.sleep(60)\nos.replace = hang",
}


@pytest.mark.parametrize('hang', HANGS.values(), ids=HANGS)
def test_a_killed_process_leaves_no_record(tmp_path, hang):
    p = child(f"{hang}\nrun_or_load(run, 'demo', 1, SPEC, folder)", tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path/'here').exists() and p.poll() is None and time.monotonic() < until: time.sleep(0.05)
    assert (tmp_path/'here').exists(), p.communicate()[1]
    p.kill()
    p.communicate()
    assert not [f for f in files(tmp_path) if f.endswith('.json')]
    assert run_or_load(lambda spec: {'n': 1}, 'demo', 1, SPEC, tmp_path)['result'] == {'n': 1}


def test_four_processes_make_a_run_once(tmp_path):
    code = '''def run(spec):
    while len(list(folder.glob('asked-*'))) < 4: time.sleep(0.02)
    with open(folder/'made', 'a') as f: f.write(args[0])
    return dict(by=args[0])
(folder/f'asked-{args[0]}').touch()
print(run_or_load(run, 'demo', 1, SPEC, folder)['result']['by'])'''
    outs = [p.communicate(timeout=120) for p in [child(code, tmp_path, str(k)) for k in range(4)]]
    made = (tmp_path/'made').read_text()
    assert len(made) == 1 and [out for out, _ in outs] == [made + '\n']*4, outs


def test_a_run_that_has_a_record_is_not_repeated(tmp_path):
    first = run_or_load(lambda spec: {'n': 1}, 'demo', 1, SPEC, tmp_path)
    assert run_or_load(lambda spec: 1/0, 'demo', 1, SPEC, tmp_path) == first == read_record(tmp_path/f'{KEY}.json')
    assert files(tmp_path) in ([f'{KEY}.json'], [f'{KEY}.json', f'{KEY}.lock'])


def fails(spec):
    if spec['seed']: raise ValueError('the loss is nan')
    return {}


def test_what_makes_many_runs_fail_is_said_once(tmp_path):
    bad = [SPEC | dict(seed=k) for k in (1, 2, 3)]
    with pytest.raises(RecordError) as e: sweep(fails, 'demo', 1, [SPEC, *bad], tmp_path)
    said = str(e.value)
    assert said.startswith('3 of 4 runs failed') and said.count('the loss is nan') == 1 and all(record_key('demo', 1, x) in said for x in bad)


def test_a_failed_run_is_recorded_and_raised(tmp_path):
    bad = SPEC | dict(seed=1)
    key = record_key('demo', 1, bad)
    with pytest.raises(RecordError, match=f'(?s)1 of 2 runs failed.*{key}.*ValueError: the loss is nan'): sweep(fails, 'demo', 1, [SPEC, bad], tmp_path)
    failed = json.loads((tmp_path/f'{key}.failed.json').read_text())
    assert failed['spec'] == bad and failed['error'] == 'ValueError: the loss is nan' and failed['environment']['packages']
    assert (tmp_path/f'{KEY}.json').exists() and not (tmp_path/f'{key}.json').exists()
    with pytest.raises(ValueError, match='the loss is nan'): run_or_load(fails, 'demo', 1, bad, tmp_path)
    run_or_load(lambda spec: {}, 'demo', 1, bad, tmp_path)
    assert not (tmp_path/f'{key}.failed.json').exists()


def test_a_result_that_is_no_json_is_a_failure(tmp_path):
    with pytest.raises(ValueError): run_or_load(lambda spec: dict(nll=float('nan')), 'demo', 1, SPEC, tmp_path)
    assert f'{KEY}.json' not in files(tmp_path) and not [f for f in files(tmp_path) if f.endswith('.tmp')]


EDITS = {
    'a setting': lambda t: t.replace('"seed":0', '"seed":1'), 'the version': lambda t: t.replace('"version":1', '"version":2'),
    'the experiment': lambda t: t.replace('"demo"', '"other"'), 'the key': lambda t: t.replace(KEY, KEY[::-1]),
    'a key left out': lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k != 'version'}),
    'cut short': lambda t: t[:len(t)//2], 'emptied': lambda t: '', 'another type': lambda t: '[]',
}


@pytest.mark.parametrize('edit', EDITS.values(), ids=EDITS)
def test_an_edited_record_is_refused(tmp_path, edit):
    run_or_load(lambda spec: {'n': 1}, 'demo', 1, SPEC, tmp_path)
    path = tmp_path/f'{KEY}.json'
    before = path.read_text()
    path.write_text(edit(before))
    assert path.read_text() != before
    with pytest.raises(RecordError, match=KEY): read_record(path)
    with pytest.raises(RecordError, match=KEY): run_or_load(lambda spec: {'n': 1}, 'demo', 1, SPEC, tmp_path)


def test_a_misnamed_record_is_refused(tmp_path):
    run_or_load(lambda spec: {}, 'demo', 1, SPEC, tmp_path)
    (tmp_path/f'{KEY}.json').rename(tmp_path/f'{KEY[::-1]}.json')
    with pytest.raises(RecordError, match='misnamed'): read_record(tmp_path/f'{KEY[::-1]}.json')


json_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
specs = st.dictionaries(st.text(min_size=1, max_size=5), json_values, min_size=1, max_size=6)


@given(specs, st.randoms())
def test_the_key_does_not_depend_on_order(spec, rng):
    items = list(spec.items())
    rng.shuffle(items)
    assert record_key('demo', 1, dict(items)) == record_key('demo', 1, spec)


@given(specs, st.data())
def test_the_key_depends_on_every_value(spec, data):
    name = data.draw(st.sampled_from(sorted(spec)))
    other = data.draw(json_values.filter(lambda v: json.dumps(v) != json.dumps(spec[name])))
    keys = [record_key('demo', 1, s) for s in (spec, spec | {name: other}, {k: v for k, v in spec.items() if k != name}, spec | {'another': 0})]
    assert len({*keys, record_key('demo', 2, spec), record_key('demo2', 1, spec)}) == 6


NOT_OF_A_RUN = {'controls', 'profile', 'seeds', 'tuning_seeds', 'jobs', 'jobs_gpu_gb', 'lr_grid', 'lr_batch_full', 'lr_batch_50pct', 'lr_streaming_full', 'lr_streaming_coreset'}
OF_SSIS = {'ssis', 'scale', 'sharpness', 'priority_exponent'}   # of the one method that selects
BASE = load_settings('streaming', 'smoke', ROOT/'settings.ini', epochs=4)


def another(name, value, folder):
    "Another value for a setting"
    if name == 'model':
        (folder/'model.safetensors').write_bytes(b'weights')
        return str(folder)
    if isinstance(value, str): return next(v for v in dict(stream=['toolstream'], split=['tuning'], precision=['fp32', 'bf16'], scale=['quantile']).get(name, [value + 'x']) if v != value)
    return tuple(reversed(value)) + (9,) if isinstance(value, tuple) else value/2 if isinstance(value, float) else value + 1


@pytest.mark.parametrize('name', [f.name for f in dataclasses.fields(Streaming)])
def test_a_run_is_named_by_every_setting_it_depends_on(tmp_path, name):
    changed = dataclasses.replace(BASE, **{name: another(name, getattr(BASE, name), tmp_path)})
    for method in STREAMING_METHODS:
        a, b = (record_key('streaming', 1, streaming_spec(s, method, 0, 1e-4)) for s in (BASE, changed))
        assert (a == b) == (name in NOT_OF_A_RUN | (set() if method == 'streaming_coreset' else OF_SSIS))


def test_a_run_is_named_by_method_seed_rate_and_split():
    runs = [('batch_full', 0, 1e-4), ('batch_50pct', 0, 1e-4), ('batch_full', 1, 1e-4), ('batch_full', 0, 2e-4), ('batch_full', 0, 1e-4, 'tuning')]
    assert len({record_key('streaming', 1, streaming_spec(BASE, *r)) for r in runs}) == len(runs)


def strings(o):
    "Every string in a JSON value, keys included"
    if isinstance(o, str): yield o
    elif isinstance(o, dict): yield from (s for k, v in o.items() for s in (k, *strings(v)))
    elif isinstance(o, list): yield from (s for v in o for s in strings(v))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=20))
def test_what_is_packed_comes_out_again(value): assert unpack(pack(value)) == value


@given(st.text())
def test_other_text_is_not_unpacked(text):
    try: value = unpack(text)
    except ValueError: return
    assert unpack(pack(value)) == value


NAMES = 'id', 'cluster', 'tool', 'part', 'category'   # of what was asked


def blocks_of(result):
    "What was asked and how it was answered, each an entry a query"
    items = result.get('items')
    if 'end' in result: return [{k: v for k, v in x.items() if not isinstance(v, float)} for x in result['end'].values()]
    if isinstance(items, str): return [unpack(items) | {f'{k} {f}': row[f] for k, row in enumerate(result['rows']) for f in ('name', 'exact')}]
    parts = result.get('parts')   # of a measurement of times: a list, and nothing was asked
    return [items] if items else [p['items'] for p in parts.values()] if isinstance(parts, dict) else []


def test_there_are_records(): assert RECORDS


@pytest.mark.parametrize('path', RECORDS, ids=lambda p: f'{p.parent.parent.name}-{p.stem}')
def test_a_committed_record_holds_no_text_and_no_place(path):
    r = read_record(path)
    assert set(r) == {'key', 'experiment', 'version', 'spec', 'result', 'seconds', 'environment'}
    assert set(r['environment']) == {'revision', 'python', 'device', 'packages'}
    blocks = blocks_of(r['result'])
    assert blocks or r['experiment'] in ('efficiency', 'scaling')   # times, and no queries
    for items in blocks:
        ids, values = items['id'], {k: v for k, v in items.items() if k not in NAMES}
        assert all(re.fullmatch(r'[\w-]+(/\S+)+|[a-z_]+_[\d-]+', i) for i in ids) and len(set(ids)) == len(ids)   # the latter are BFCL's own
        assert values and all(len(v) == len(ids) for v in values.values())
        assert all(re.fullmatch('[01]+', v) if isinstance(v, str) else all(x is None or -(k == 'reward') <= x <= 1 for x in v) for k, v in values.items())
    said = {s for items in blocks for k, v in items.items() for s in ([v] if isinstance(v, str) else v if k in NAMES else [])}
    for s in set(strings(r)) - said:
        if s == r['result'].get('items') or re.fullmatch('[0-9]+', s): continue   # packed, and seen above; levels of answers, a digit each
        assert len(s) <= 200 and len(s.split()) <= 5 and not re.search(r'(^|[\s"\'=(:])[/\\~]|\.(local|internal|lan)\b|[A-Z]:\\', s), s


# Some of the tuning runs were made where there was no git, and nobody wrote the revision down.
WITHOUT_REVISION = {'27f96629bd6d5dfb', '9171abe63b18e254', 'aea750f650f0d2e2', 'c206933bbda45c21', 'cdbd7601b6d19a4f', 'f281050d5262b63d'}


@pytest.mark.parametrize('experiment', sorted({p.parent.parent.name for p in RECORDS}))
def test_a_committed_record_names_its_revision(experiment):
    revisions = {p.name: read_record(p)['environment']['revision'] for p in RECORDS if p.parent.parent.name == experiment}
    assert {name[:16] for name, r in revisions.items() if not re.fullmatch('[0-9a-f]{40}', r)} <= WITHOUT_REVISION


def test_no_query_stands_in_a_record(pages):
    queries = {q for p in pages for q, _ in p.examples if len(q) >= 20}
    for path in RECORDS: assert not queries & set(strings(read_record(path))), path.name
