"Calls: whatever a model writes is read, in time linear in its length, and what was written is read back; tools in one line"
import json, math, sys, time, timeit

import pytest
from hypothesis import example, given, settings, strategies as st

from sage_paper.calls import PARSE_ERRORS, ParsedCalls, Tool, ToolCall, expected, format_calls, parse_calls, tool_document

TEXT = st.text(st.characters(exclude_categories=()), max_size=40)   # surrogates, controls, bidi and zero-width characters included
PIECES = st.sampled_from(['[', ']', '{', '}', '"', ':', ',', ' ', '\n', '\\', '\\u00', '\\ud800', '[{', '{"', '"name"', '"arguments"', 'null', 'NaN', '-Infinity', '1e999', '9'*500,
                          '-0', '1.5', '```json', '\u202e', '\u200b', '\ufeff', '\ud800', '\x00', '[{"name":"a","arguments":{}}]', '{"name":"a","arguments":{}}', '[]'])
JSON = st.recursive(st.none() | st.booleans() | st.integers(-10**399 + 1, 10**399 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
                    lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=12)
CALLS = st.lists(st.builds(ToolCall, TEXT, st.dictionaries(TEXT, JSON, max_size=4)), max_size=4).map(tuple)


def well_formed(p):
    "Whether a result keeps what `ParsedCalls` promises"
    return (p.error in ('', *PARSE_ERRORS) and not (p.error and p.calls) and p.clean == (p.bare and not p.error)
            and all(type(c.name) is str and type(c.arguments) is dict for c in p.calls))


@settings(deadline=None, max_examples=1500)
@given(st.lists(PIECES | TEXT, max_size=30).map(''.join))
@example('')
@example('\ud800')
@example('[{"name":"\\ud800"}]')
def test_any_text_is_read(text): assert well_formed(parse_calls(text))


@settings(deadline=None)
@given(CALLS)
def test_what_is_written_is_read_back(calls): assert parse_calls(format_calls(calls)) == ParsedCalls(calls)


@settings(deadline=None)
@given(CALLS.filter(bool), st.text(st.characters(exclude_characters='[{'), max_size=30), TEXT)
def test_prose_around_the_calls_costs_the_format_and_nothing_else(calls, before, after):
    p = parse_calls(before + format_calls(calls) + after)
    assert p.calls == calls and not p.error
    assert p.clean == (not (before + after).strip(' \t\n\r'))


@settings(deadline=None)
@example((ToolCall('a', dict(x=1.5, y=-2.5e+16, z=[True, None, 'b\n\u2603'])),))
@given(CALLS.filter(bool))
def test_a_beginning_is_not_taken_for_the_whole(calls):
    text = format_calls(calls)
    for n in range(len(text)):
        p = parse_calls(text[:n])
        assert not p.calls and p.error in ('cut-off', 'no-json'), text[:n]


BARE = ['[{"name":"a"}]', ' [ {"arguments":{}, "name":"a"} ] ', '\n[\n  {\n    "name": "a"\n  }\n]\n']
WRAPPED = ['{"name":"a","arguments":{}}', '```json\n[{"name":"a"}]\n```', 'x [1] y [{"name":"a"}]', '[[{"name":"a"}]]', '{"thought":"b"} [{"name":"a","arguments":{}}]',
           '[] but then [{"name":"a"}]', '[{"name":"a"}] [{"name":"b"}]', '[{"name":"a"}] {"name":"b"}', '[{"name":"a"}] oops [', '\ufeff[{"name":"a"}]', '[{"name":"a"}]\x0b']


@pytest.mark.parametrize('text, clean', [(t, True) for t in BARE] + [(t, False) for t in WRAPPED])
def test_one_call_is_found(text, clean):
    p = parse_calls(text)
    assert p.calls == (ToolCall('a'),) and not p.error and p.clean == clean


@pytest.mark.parametrize('text, error', [
    ('', 'no-json'), ('No.', 'no-json'), ('[1]', 'no-json'), ('["a"]', 'no-json'), ('null', 'no-json'), ('a[0] = {x}', 'no-json'),
    ('[{"name":"a"', 'cut-off'), ('[{"name":"a","arg', 'cut-off'), ('[{"name":"a"},', 'cut-off'), ('{"name":"a"', 'cut-off'), ('[{', 'cut-off'), ('[{"name":"a"}\n', 'cut-off'),
    ("[{'name':'a'}]", 'broken'), ('[{"name":"a"}{"name":"b"}]', 'broken'), ('[{"name":"a",}]', 'broken'), ('[{"name":"a\nb"}]', 'broken'), ('{"name": oops []', 'broken'),
    ('[{"name":"a"} oops [{"name":"b"}]', 'broken'), ('{"name":"a"} {"name":"b"}', 'not-a-list'), ('{"nom":"a"}', 'not-a-call'), ('[{}]', 'not-a-call'),
    ('[{"name":1}]', 'not-a-call'), ('[{"name":null}]', 'not-a-call'), ('[{"name":["a"]}]', 'not-a-call'), ('[{"name":"a","arguments":[]}]', 'not-a-call'),
    ('[{"name":"a","arguments":null}]', 'not-a-call'), ('[{"name":"a","arguments":"{}"}]', 'not-a-call'), ('[{"name":"a","id":1}]', 'not-a-call'), ('[{"name":"a"},1]', 'not-a-call'),
    ('[{"name":"a","name":"a"}]', 'duplicate-key'), ('[{"name":"a","arguments":{"x":{"y":1,"y":1}}}]', 'duplicate-key'), (r'[{"name":"a","n\u0061me":"b"}]', 'duplicate-key'),
    *((f'[{{"name":"a","arguments":{{"x":{x}}}}}]', 'bad-number') for x in ('NaN', 'Infinity', '-Infinity', '1e999', '-1e999', '9'*401, '0.' + '1'*400, '9'*5000)),
    ('[{"name":"a","arguments":{"x":' + '['*62 + ']'*62 + '}}]', 'too-deep'), ('[{"name":"a","arguments":{"x":' + '['*100_000 + ']'*100_000 + '}}]', 'too-deep'),
    ('[{"name":"a","arguments":{"x":' + '['*62 + 'oops', 'too-deep'), ('{"a":'*100_000, 'too-deep'),
])
def test_faults_have_their_category(text, error):
    p = parse_calls(text)
    assert (p.error, p.calls, p.clean) == (error, (), False)


def test_limits_are_exact():
    deep = '[{"name":"a","arguments":{"x":' + '['*61 + ']'*61 + '}}]'
    long = '[{"name":"a","arguments":{"x":' + '9'*400 + ',"y":1e308}}]'
    strings = format_calls([ToolCall('a', {'x': '[{"\\'*1000})])
    assert all(parse_calls(t).clean for t in (deep, long, strings))


def test_the_limit_of_depth_does_not_move_with_the_stack():
    def at(depth, text): return at(depth - 1, text) if depth else parse_calls(text).error
    texts = ['{"x":' + '['*n + end for n in (62, 63, 64, 300) for end in (']'*n + '}', ' oops')]
    assert [at(0, t) for t in texts] == [at(sys.getrecursionlimit() - 500, t) for t in texts]


def test_characters_are_taken_as_they_are():
    for name in ('ke\u200bttle', '\u202eelttek', 'kettle\ufeff', 'ＫＥＴＴＬＥ', 'ke\u0301ttle', '\ud800'):
        call, = parse_calls(json.dumps([dict(name=name, arguments={name: name})])).calls
        assert call == ToolCall(name, {name: name}) and call.name != 'kettle'
    assert not parse_calls('\ufeff[]').clean


N = 10**6
LONG = {'brackets': '['*N, 'braces': '{'*N, 'lists of objects': '[{'*(N//2), 'keys': '[{"a":'*(N//6), 'empty lists': '[]'*(N//2), 'empty lists in a list': '[' + '[],'*(N//3),
        'objects': '{"a":1}'*(N//7), 'objects and brackets': '{"a":1}[1'*(N//9), 'blanks': '[' + ' '*N, 'open string': '[{"name":"' + 'a'*N, 'quotes': '"'*N,
        'escapes': '[{"name":"' + '\\"'*(N//2), 'digits': '[{"name":"a","arguments":{"x":' + '1'*N + '}}]', 'decimals': '[{"name":"a","arguments":{"x":0.' + '1'*N + '}}]',
        'arguments': '[{"name":"a","arguments":{' + ','.join(f'"{i}":{i}' for i in range(N//13)) + '}}]', 'nested lists': '[{"name":"a","arguments":{"x":[' + '[],'*(N//3) + '1]}}]',
        'a long string': format_calls([ToolCall('a', {'x': 'b'*N})]), 'many calls': format_calls([ToolCall('a')]*(N//28)), 'many lists of calls': '[{"name":"a"}]'*(N//14)}


@pytest.mark.parametrize('text', LONG.values(), ids=LONG)
def test_a_megabyte_is_read_quickly(text):
    assert well_formed(parse_calls(text))
    assert min(timeit.repeat(lambda: parse_calls(text), number=1, repeat=3, timer=time.process_time)) < 1


SCHEMAS = st.recursive(JSON, lambda s: st.fixed_dictionaries({}, optional=dict(
    type=st.sampled_from(['string', 'integer', 'object', 'array', 'dict', 7, None, ['string', 'null'], []]), enum=st.lists(JSON, max_size=25), const=JSON, minimum=JSON, exclusiveMaximum=JSON,
    format=TEXT, items=s, properties=st.dictionaries(TEXT, s, max_size=3), required=st.lists(TEXT, max_size=2) | st.booleans(), anyOf=st.lists(s, max_size=3))), max_leaves=6)


@settings(deadline=None, max_examples=300)
@given(TEXT, TEXT, SCHEMAS.filter(lambda s: isinstance(s, dict)))
def test_any_tool_is_documented_in_one_line(name, description, schema):
    line = tool_document(Tool(name, description, schema))
    assert len(line.splitlines()) <= 1 and line == ' '.join(line.split())
    assert line.startswith(' '.join(name.split()))


def test_schemas_in_words():
    point = dict(type='object', properties=dict(x=dict(type='number'), tags=dict(type='array', items=dict(type='string', enum=['a', 'b']))), required=['x'])
    assert expected(dict(type='array', items=point)) == 'list of {x: number; tags?: list of one of a, b}'
    nested = dict(type='object', properties=dict(a=dict(type='object', properties=dict(b=dict(type='object', properties=dict(c={}))))))
    assert expected(nested) == '{a?: {b?: object}}'
    assert expected(dict(type='number', exclusiveMinimum=0, maximum=math.pi)) == f'number above 0 to {math.pi}'
    assert expected(dict(anyOf=[dict(type='string'), dict(type='integer', minimum=1)])) == 'string or integer from 1'
    assert expected(dict(type='string', enum=[str(i) for i in range(21)])).endswith('18, 19, …')


def test_documents_are_compact():
    long = Tool('t', 'First. ' + 'Second one. '*100, {})
    assert len(tool_document(long)) < 210 and len(tool_document(Tool('t', 'x'*10_000))) < 310
