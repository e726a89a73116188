"SageWorld: the same everywhere, valid throughout, disjoint and quick"
import hashlib, os, random, re, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest

import sage_paper.world as world
from sage_paper.calls import ToolCall, sample_to_json
from sage_paper.world import (ACTIONS, PARAMETERS, Tool, WorldError, check_arguments, make_queries, make_tools, normalise_query,
                              sageworld, tool_document, tool_queries, world_objects)

DIGEST = '''
import hashlib
from sage_paper.calls import sample_to_json
from sage_paper.world import make_tools, sageworld, tool_document
text = [tool_document(t) for t in make_tools()] + [sample_to_json(s) for part in sageworld(150, seed=3) for s in part]
print(hashlib.sha256('\\n'.join(text).encode()).hexdigest())
'''


@pytest.fixture(scope='module')
def tools(): return make_tools()


@pytest.fixture(scope='module')
def by_name(tools): return {t.name: t for t in tools}


def test_identical_across_processes_and_hash_seeds():
    def digest(seed):
        env = os.environ | {'PYTHONHASHSEED': seed}
        return subprocess.run([sys.executable, '-c', DIGEST], env=env, capture_output=True, text=True, check=True,
                              cwd=Path(world.__file__).parents[1]).stdout
    assert len({digest(s) for s in ('0', '1', '4242')}) == 1


def test_import_is_light():
    code = "import sys, sage_paper.world; print(sorted({'numpy', 'torch', 'pandas', 'fastcore'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(world.__file__).parents[1])
    assert out.stdout.strip() == '[]'


def test_1200_unique_tools(tools):
    assert len({t.name for t in tools}) == len(tools) == 1200
    assert len({t.domain for t in tools}) == 60 and len({o for _, _, o in world_objects()}) == 300
    assert all(re.fullmatch('[a-z]+_[a-z]+_[a-z_]+', t.name) and t.name.startswith(t.domain + '_') for t in tools)
    assert len({tool_document(t) for t in tools}) == 1200
    assert all(set(t.parameters['required']) <= set(t.parameters['properties']) for t in tools)


def test_fewer_tools_are_the_beginning_of_more(tools):
    assert make_tools(0) == () and make_tools(37) == tools[:37]
    assert {t.name for t in make_tools(seed=9)} == {t.name for t in tools}
    for n in (-1, 1201):
        with pytest.raises(WorldError, match='1200 tools'): make_tools(n)


def test_tools_share_no_state():
    a, b = make_tools(1)[0], make_tools(1)[0]
    a.parameters['properties'].clear()
    assert b.parameters['properties'] and all(PARAMETERS.values())


def test_gold_calls_are_valid(tools, by_name):
    samples = make_queries(tools, 5)
    assert len(samples) == 6000
    for s in samples:
        call, = s.calls
        check_arguments(by_name[s.tool_ids[0]], call)
        assert 1 <= len(call.arguments) <= 3 and call.name == s.tool_ids[0]
        assert list(call.arguments) == [p for p in by_name[call.name].parameters['properties'] if p in call.arguments]


def test_queries_read_well(tools):
    for s in make_queries(tools, 11):
        noun = s.tool_ids[0].split('_', 2)[2].replace('_', ' ')
        assert noun in s.query.lower() or world.plural(noun) in s.query.lower()
        assert s.query[0].isupper() or s.query[0] in '"0123456789'
        assert s.query[-1] in '.?!' and '{' not in s.query and '  ' not in s.query and not re.search(r'\ba [aeio]', s.query.lower())
        assert 3 <= len(s.query.split()) <= 25


def test_ids_are_unique_and_stable(tools):
    some = tools[::100]
    long = {s.id: s for s in make_queries(some, 20)}
    assert len(long) == 20*len(some)
    for n, start in ((1, 0), (7, 0), (5, 9)):
        part = make_queries(some, n, start=start)
        assert [s.id for s in part] == [f'sageworld/{t.name}/{k}' for t in some for k in range(start, start + n)]
        assert all(long[s.id] == s for s in part)
    assert make_queries(reversed(some), 2) != make_queries(some, 2)
    assert sorted(map(sample_to_json, make_queries(reversed(some), 2))) == sorted(map(sample_to_json, make_queries(some, 2)))


WRONG = {'string': [None, 3, '', ' ', ['a'], True], 'integer': [None, True, '3', 2.5, 0, 10**6], 'boolean': [0, 1, 'true', None],
         'number': [None, True, '$20', float('nan'), float('inf'), 0, -1]}


def test_mutated_arguments_are_rejected(tools, by_name):
    rng = random.Random(0)
    for s in rng.sample(make_queries(tools, 1), 600):
        call, = s.calls
        tool = by_name[call.name]
        p = rng.choice(list(call.arguments))
        fragment = tool.parameters['properties'][p]
        wrong = list(WRONG[fragment['type']])
        if 'enum' in fragment: wrong.append('something else')
        if fragment.get('format') in ('date', 'hh:mm'): wrong += ['tomorrow', '2026-13-01', '2026-1-1', '7:5', '25:00', call.arguments[p] + '\n']
        bad = [call.arguments | {p: w} for w in wrong] + [call.arguments | {'unheard_of': 1}]
        required = rng.choice(tool.parameters['required'])
        bad.append({k: v for k, v in call.arguments.items() if k != required})
        for arguments in bad:
            with pytest.raises(WorldError, match=tool.name): check_arguments(tool, ToolCall(call.name, arguments))
        with pytest.raises(WorldError, match='called as'): check_arguments(tool, replace(call, name='other'))


def test_errors_name_tool_parameter_and_expectation(by_name):
    tool = next(t for t in by_name.values() if '_rate_' in t.name)
    with pytest.raises(WorldError, match=f'{tool.name}: stars is 7, expected integer from 1 to 5'):
        check_arguments(tool, ToolCall(tool.name, {'stars': 7}))
    with pytest.raises(WorldError, match=f'{tool.name}: stars is missing'): check_arguments(tool, ToolCall(tool.name, {}))
    with pytest.raises(WorldError, match='not a tool of SageWorld'): next(tool_queries(Tool('x', 'x', '', {})))


def test_train_and_test_are_disjoint():
    train, test = sageworld(1200, 6, 3, seed=1)
    assert (len(train), len(test)) == (7200, 3600)
    assert len({normalise_query(s.query) for s in train + test}) == 10_800
    assert list(dict.fromkeys(s.tool_ids[0] for s in train)) == [t.name for t in make_tools(1200, seed=1)]


def test_every_tool_has_enough_queries(tools):
    seen = {}
    for t in tools: seen.setdefault(t.name.split('_')[1], t)
    assert set(seen) == set(ACTIONS)
    assert len(make_queries(seen.values(), 50)) == 50*len(ACTIONS)


def test_speed():
    start = time.process_time()
    assert len(make_queries(make_tools(), 17)) > 20_000
    assert time.process_time() - start < 10


def test_nothing_is_evaluated():
    source = Path(world.__file__).read_text(encoding='utf-8')
    assert not re.search(r'\b(eval|exec|compile|__import__)\(', source.replace('re.compile(', ''))
