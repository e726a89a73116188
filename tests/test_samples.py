"Samples, tools and predictions in files: what is good comes back the same, and what is wrong is named; near-duplicates"
import json, os, re, time, tracemalloc

import pytest
from hypothesis import given, settings, strategies as st

from sage_paper.calls import Sample, Tool, ToolCall
from sage_paper.samples import (CHALLENGES, SampleError, add_tool, challenge_of, check_samples, containing_pairs, load_predictions, load_samples,
                                near_duplicates, plain, read_predictions, read_samples, read_tools, sample_to_json, words, write_samples, write_tools)

TEA = Sample('demo/1', 'Steep the tea for 3 minutes, then pour it.', (ToolCall('steep', {'minutes': 3}), ToolCall('pour', {'what': '$1'})),
             ('steep', 'pour'), 'planning', 'demo', ('steep', 'pour'))
GOOD = sample_to_json(TEA).encode()


def changed(**fields):
    "TEA's line with some fields replaced; `...` takes one out"
    o = json.loads(GOOD) | fields
    return json.dumps({k: v for k, v in o.items() if v is not ...}).encode()


@pytest.fixture
def path(tmp_path): return tmp_path/'queries.jsonl'


text = st.text(st.characters(blacklist_categories=['Cs']), min_size=1, max_size=8).filter(str.strip)
value = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | text,
                     lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
calls = st.lists(st.builds(ToolCall, text, st.dictionaries(text, value, max_size=3)), max_size=3).map(tuple)
keys = st.lists(text, max_size=3).map(tuple)
samples = st.lists(st.builds(Sample, text, text, calls, keys, st.sampled_from(CHALLENGES), st.text('ab', max_size=3), keys), max_size=5, unique_by=lambda s: s.id)


@settings(deadline=None, max_examples=60)
@given(samples)
def test_what_is_written_is_read(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp('samples')/'queries.jsonl'
    assert write_samples(path, samples) == len(samples) == check_samples(path)
    assert load_samples(path) == tuple(samples) == tuple(read_samples(path))


@pytest.mark.parametrize('raw, problem', {
    'no query': (changed(query=...), 'query: expected, but missing'),
    'no calls': (changed(calls=...), 'calls: expected, but missing'),
    'unknown field': (changed(colour='red'), 'colour: unknown; expected one of id, query, calls, candidates, challenge, source, tool_ids'),
    'id': (changed(id=5), 'id: expected a string that is not empty, found 5'),
    'query': (changed(query=' '), 'query: expected a string that is not empty, found " "'),
    'calls': (changed(calls={}), 'calls: expected a list, found an object'),
    'call': (changed(calls=['pour']), 'calls[0]: expected an object, found "pour"'),
    'name': (changed(calls=[{'name': None}]), 'calls[0].name: expected a string that is not empty, found null'),
    'no name': (changed(calls=[{'name': 'steep'}, {'arguments': {}}]), 'calls[1].name: expected, but missing'),
    'arguments': (changed(calls=[{'name': 'pour', 'arguments': []}]), 'calls[0].arguments: expected an object, found a list'),
    'field of a call': (changed(calls=[{'name': 'pour', 'args': {}}]), 'calls[0].args: unknown; expected one of name, arguments'),
    'challenge': (changed(challenge='planing'), 'challenge: expected one of timing, planning, selection, found "planing"'),
    'type of challenge': (changed(challenge=['planning']), 'challenge: expected one of timing, planning, selection, found a list'),
    'candidates': (changed(candidates='pour'), 'candidates: expected a list, found "pour"'),
    'candidate': (changed(candidates=['steep', True]), 'candidates[1]: expected a string that is not empty, found true'),
    'tool_ids': (changed(tool_ids=None), 'tool_ids: expected a list, found null'),
    'source': (changed(source=1.5), 'source: expected a string, found 1.5'),
    'no object': (b'[]', 'expected an object, found a list'),
    'empty': (b'', 'expected an object, found an empty line'),
    'blank': (b' \t', 'expected an object, found an empty line'),
    'no JSON': (b'{"id": 1,}', 'expected JSON, found an error at column 10'),
    'comma': (b'{"id" 1}', "expected JSON, found an error at column 7 (Expecting ':' delimiter)"),
    'open': (b'{"id": 1', "expected JSON, found an error at column 9 (Expecting ',' delimiter)"),
    'open, as on Windows': (b'{"id": [1\r', "expected JSON, found an error at column 10 (Expecting ',' delimiter)"),
    'two objects': (GOOD + b' ' + GOOD, 'expected JSON, found an error at column'),
    'twice': (b'{"id": "a", "id": "b", "query": "q", "calls": []}', 'id: expected once, found twice'),
    'NaN': (changed(calls=[{'name': 'a', 'arguments': {'x': float('nan')}}]), 'expected JSON, found NaN'),
    'infinity': (changed(calls=[{'name': 'a', 'arguments': {'x': float('-inf')}}]), 'expected JSON, found -Infinity'),
    'huge': (GOOD.replace(b'3', b'1e400', 1), 'expected a number that a float holds, found 1e400'),
    'long': (GOOD.replace(b'"minutes":3', b'"minutes":' + b'9'*5000), 'expected a number that a float holds, found 99999999999999999999'),
    'bad UTF-8': (GOOD.replace(b'tea', b't\xe9a'), 'expected UTF-8, found byte 0xe9 at column'),
    'UTF-16': (GOOD.decode().encode('utf-16'), 'expected UTF-8, found byte 0xff at column 1'),
    'BOM': (b'\xef\xbb\xbf' + GOOD, 'expected UTF-8 without a byte order mark'),
    'half a character': (GOOD.replace(b'tea', b'\\ud83c'), 'expected characters, found half of one, \\ud83c'),
    'deep': (b'['*100_000, 'nested too deeply'),
}.values(), ids=lambda v: '' if isinstance(v, bytes) else v.split(',')[0][:40])
def test_what_is_wrong_is_named(path, raw, problem):
    path.write_bytes(GOOD + b'\n' + raw + b'\n' + GOOD.replace(b'demo/1', b'demo/3') + b'\n')
    with pytest.raises(SampleError) as e: load_samples(path)
    shown, = e.value.problems
    assert shown.startswith(f'{path}, line 2: {problem}' if problem != 'nested too deeply' else f'{path}, line 2: expected JSON, found brackets {problem}')
    stream = read_samples(path)
    assert next(stream) == TEA
    with pytest.raises(SampleError, match='line 2'): next(stream)


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-be'])
def test_a_file_in_utf_16_is_named_as_a_whole(path, encoding):
    mark = b'' if encoding == 'utf-16' else b'\xfe\xff'   # which the first one writes by itself
    path.write_bytes(mark + ((GOOD.decode() + '\n')*30).encode(encoding))
    with pytest.raises(SampleError) as e: load_samples(path)
    assert e.value.problems == [f'{path}: expected UTF-8, found UTF-16'] and str(e.value) == e.value.problems[0]


def test_a_file_that_is_cut_off(path):
    for end in range(1, len(GOOD)):
        path.write_bytes(GOOD + b'\n' + GOOD.replace(b'demo/1', b'demo/2')[:end])
        with pytest.raises(SampleError, match='line 2: expected an object, found one that is cut off where the file ends'): load_samples(path)
    path.write_bytes(GOOD)
    assert load_samples(path) == (TEA,)                                  # the last line need not end
    path.write_bytes(GOOD + b'\r\n')
    assert load_samples(path) == (TEA,)                                  # nor end as on Unix


def test_an_id_comes_once(path):
    path.write_bytes(b'\n'.join([GOOD]*3))
    with pytest.raises(SampleError) as e: load_samples(path)
    assert e.value.problems == [f'{path}, line {n}: id: expected one that no other line has, found "demo/1"' for n in (2, 3)]


def test_what_is_missing_follows_from_the_calls(path):
    path.write_text('{"id": "a", "query": "q", "calls": []}\n{"id": "b", "query": "q", "calls": [{"name": "x"}]}\n'
                    '{"id": "c", "query": "q", "calls": [{"name": "x"}, {"name": "y", "arguments": {}}, {"name": "x"}]}\n')
    assert [(s.challenge, s.tool_ids) for s in load_samples(path)] == [('timing', ()), ('selection', ('x',)), ('planning', ('x', 'y'))]
    assert challenge_of(()) == 'timing'


def test_the_first_problems_are_shown_and_all_are_counted(path):
    path.write_bytes(b'{}\n'*100)
    with pytest.raises(SampleError) as e: load_samples(path, max_problems=5)
    assert len(e.value.problems) == 5 and '… and 295 more' in str(e.value)   # three fields are missing in each line


@pytest.fixture(scope='module')
def long_file(tmp_path_factory):
    "A file of 100,000 samples"
    path = tmp_path_factory.mktemp('long')/'queries.jsonl'
    line = GOOD.decode()
    path.write_text(''.join(line.replace('demo/1', f'demo/{i}') + '\n' for i in range(100_000)))
    return path


def test_one_bad_line_in_100_000(long_file, tmp_path):
    lines = long_file.read_bytes().splitlines(keepends=True)
    lines[77_776] = lines[77_776].replace(b'"calls":[{"arguments":{"minutes":3}', b'"calls":[{"arguments":[]')
    (bad := tmp_path/'bad.jsonl').write_bytes(b''.join(lines))
    for load in load_samples, check_samples:
        with pytest.raises(SampleError) as e: load(bad)
        assert e.value.problems == [f'{bad}, line 77777: calls[0].arguments: expected an object, found a list']


def test_100_000_lines_in_a_few_seconds(long_file):
    start = time.process_time()
    assert check_samples(long_file) == 100_000
    assert time.process_time() - start < 15   # 3 s where this was written


def test_reading_takes_flat_memory(path):
    with open(path, 'w') as f:
        for i in range(4000): f.write(sample_to_json(Sample(f'demo/{i}', 'tea '*2500, ())) + '\n')
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_samples(path)) == check_samples(path) == 4000
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert path.stat().st_size > 40_000_000 and peak < 2_000_000


@settings(deadline=None, max_examples=150)
@given(st.integers(0, len(GOOD)), st.integers(0, 30), st.binary(max_size=6))
def test_no_line_raises_anything_else(tmp_path_factory, start, length, patch):
    path = tmp_path_factory.mktemp('patched')/'queries.jsonl'
    path.write_bytes(GOOD[:start] + patch + GOOD[start + length:])
    try: loaded = load_samples(path)
    except SampleError as e: assert all(re.match(rf'{re.escape(str(path))}, line \d+: \S', p) for p in e.problems)
    else: assert write_samples(path, loaded) == len(loaded) and load_samples(path) == loaded


TOOLS = {'steep': Tool('steep', 'Steep tea', {'type': 'object', 'properties': {'minutes': {'type': ['integer', 'null']}}, 'required': []}),
         'pour': Tool('pour', 'Pour tea'), 'pour#2': Tool('pour', 'Pour milk', {'type': 'object', 'properties': {'a': {'type': 'array', 'items': {'type': 'string'}}}})}


def test_samples_know_their_tools(path):
    path.write_bytes(GOOD)
    assert load_samples(path, TOOLS) == (TEA,) == tuple(read_samples(path, TOOLS))
    path.write_bytes(changed(candidates=['steep', 'pour#3'], tool_ids=['drink'], calls=[{'name': 'pour#2'}]))
    with pytest.raises(SampleError) as e: load_samples(path, TOOLS)
    assert e.value.problems == [f'{path}, line 1: {p}' for p in (
        'candidates[1]: expected the key of a known tool, found "pour#3"', 'tool_ids[0]: expected the key of a known tool, found "drink"',
        'calls[0].name: expected the name of a known tool, found "pour#2"')]   # calls hold names, not keys


def test_tools_come_back(path):
    write_tools(path, TOOLS)
    assert read_tools(path) == TOOLS and list(read_tools(path)) == list(TOOLS)
    assert add_tool(dict(TOOLS), TOOLS['pour#2']) == 'pour#2' and add_tool(dict(TOOLS), Tool('pour', '')) == 'pour#3'


@pytest.mark.parametrize('tool, problem', [
    ({'description': 'Steep'}, 'name: expected, but missing'),
    ({'name': 'a', 'parameters': []}, 'parameters: expected an object, found a list'),
    ({'name': 'a', 'parameters': {'type': 'dict'}}, 'parameters.type: expected one of string, number'),
    ({'name': 'a', 'parameters': {'type': 'array'}}, 'parameters.type: expected one of object, found "array"'),
    ({'name': 'a', 'parameters': {'properties': {}}}, 'parameters.type: expected one of object, found null'),
    ({'name': 'a', 'parameters': {'type': 'object', 'properties': []}}, 'parameters.properties: expected an object, found a list'),
    ({'name': 'a', 'parameters': {'type': 'object', 'properties': {'b': {'type': 'array', 'items': {'type': 'str'}}}}}, 'parameters.properties.b.items.type: expected one of'),
    ({'name': 'a', 'parameters': {'type': 'object', 'required': 'b'}}, 'parameters.required: expected a list, found "b"'),
    ({'name': 'a', 'returns': {}}, 'returns: unknown; expected one of name, description, parameters'),
    ({'name': 'steep'}, 'tool: expected one that no other line has'),
])
def test_what_is_wrong_with_a_tool_is_named(path, tool, problem):
    path.write_text(json.dumps({'name': 'steep'}) + '\n' + json.dumps(tool) + '\n')
    with pytest.raises(SampleError) as e: read_tools(path)
    assert [p.startswith(f'{path}, line 2: {problem}') for p in e.value.problems] == [True]


def test_predictions(path):
    path.write_text('{"id": "a", "output": "[]"}\n{"output": "\\u00e9", "id": "b"}\n')
    assert load_predictions(path) == {'a': '[]', 'b': 'é'} == dict(read_predictions(path)) == load_predictions(path, ['b', 'a'])
    with pytest.raises(SampleError) as e: load_predictions(path, ['a', 'c', 'd'])
    assert e.value.problems == [f'{path}, line 2: id: expected the id of a sample, found "b"']
    with pytest.raises(SampleError) as e: load_predictions(path, ['a', 'b', 'c', 'd'])
    assert e.value.problems == [f'{path}: expected an output for "{i}", found none' for i in 'cd']


@pytest.mark.parametrize('line, problem', [
    ('{"id": "b", "output": []}', 'output: expected a string, found a list'),
    ('{"id": "b", "output": null}', 'output: expected a string, found null'),
    ('{"id": "b"}', 'output: expected, but missing'),
    ('{"id": 2, "output": ""}', 'id: expected a string that is not empty, found 2'),
    ('{"id": "a", "output": ""}', 'id: expected one that no other line has, found "a"'),
    ('{"id": "b", "output": "", "score": 1}', 'score: unknown; expected one of id, output'),
])
def test_what_is_wrong_with_a_prediction_is_named(path, line, problem):
    path.write_text('{"id": "a", "output": "x"}\n' + line + '\n')
    stream = read_predictions(path)
    assert next(stream) == ('a', 'x')
    for read in lambda: next(stream), lambda: load_predictions(path):
        with pytest.raises(SampleError) as e: read()
        assert e.value.problems == [f'{path}, line 2: {problem}']


def test_a_missing_file_is_said_to_be_missing(path):
    with pytest.raises(FileNotFoundError, match='queries.jsonl'): load_samples(path)


def shingles(t): return {t.ljust(3)[i:i + 3] for i in range(max(1, len(t) - 2))}


def jaccard(a, b): return len(a & b)/len(a | b) if a | b else 0.


phrase = st.lists(st.sampled_from('tea teas green black cup cups kettle 1 23 x'.split()), max_size=7).map(' '.join)


@settings(deadline=None, max_examples=100)
@given(st.lists(phrase, max_size=20), st.integers(0, 20), st.sampled_from([0.5, 0.8, 0.9, 1.0]))
def test_near_duplicates_are_all_found(texts, k, threshold):
    def near(a, b):
        a, b = plain(a), plain(b)
        return jaccard(set(a.split()), set(b.split())) >= threshold - 1e-9 or jaccard(shingles(a), shingles(b)) >= threshold - 1e-9
    every = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if near(texts[i], texts[j])]
    assert near_duplicates(texts, threshold=threshold) == every
    k = min(k, len(texts))
    assert near_duplicates(texts[:k], texts[k:], threshold) == sorted((i, j - k) for i, j in every if i < k <= j)


@pytest.mark.parametrize('a, b, near', [
    ('Play the given audio file', 'Play the given audio files', True),
    ('Limit the number of results to X', 'Limit the number of results to n', True),
    ('Wait for 5 minutes', 'Wait for 20 minutes', True),
    ('Sort all files in a directory by name', 'by name, sort all files in a directory!', True),
    ('Archive the file names of a directory', 'Archive the filenames of a directory', True),
    ('Show the class of an address', 'Show the mass of an address', False),
    ('Compress a file', 'Copy a file', False),
    ('Lock the door', 'Open the door', False),
    ('请帮我检索工单', '请帮我检索天气', False),
    ('Find me a book about the history of green tea in Japan', 'Hi! Find me a book about the history of green tea in Japan. I would like to buy it from a shop close by.', True),
    ('Find me a book', 'Find me a book. I would like to buy it from a shop close by.', False),
])
def test_what_counts_as_near(a, b, near):
    assert near_duplicates([a, b]) == ([(0, 1)] if near else [])
    assert near_duplicates([b], [a]) == ([(0, 0)] if near else [])


def test_no_texts(): assert near_duplicates([]) == near_duplicates([], []) == near_duplicates(['tea'], []) == [] and not len(containing_pairs([]))


def test_words_and_plain():
    assert words('Play, play the FILES!') == {'play', 'the', 'files'}
    assert plain('The class has 12 buses, x and a glass') == 'the class has # buse # and a glass'
