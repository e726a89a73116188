"BFCL's verdicts: ours and those of BFCL's own checker, on every gold answer and on spoilt ones"
import hashlib, json, random, re, subprocess, sys, zipfile
from collections import Counter
from pathlib import Path

import pytest

from sage_paper.assets import AssetError
from sage_paper.ast_match import _NoVerdict, ast_error, java_value, javascript_value
from sage_paper.bfcl import BFCL_CATEGORIES, BFCL_TYPES, BFCLCase, bfcl_cases, gold_calls, java_source, javascript_source, language
from sage_paper.calls import ToolCall

PACKAGE, WHEEL = 'bfcl-eval==2026.3.23', '3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a'
SPOILT = dict(live_multiple=8, live_irrelevance=2, irrelevance=2, simple_java=60, simple_javascript=120, live_parallel=100, live_parallel_multiple=100, live_relevance=20)  # a case


@pytest.fixture(scope='module')
def checker(request):
    "Folder of the unpacked package; skips where it cannot be had"
    folder = request.config.cache.mkdir('bfcl-eval')
    wheel = next(folder.glob('*.whl'), None)
    if not wheel:
        out = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--retries', '1', '--no-deps', '--dest', str(folder), PACKAGE], capture_output=True, text=True)
        if out.returncode: pytest.skip(f'needs the package {PACKAGE}, and pip download failed: {out.stderr.strip()[-200:]}')
        wheel = next(folder.glob('*.whl'))
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL, f'{wheel} is not the wheel that was read: delete it'
    with zipfile.ZipFile(wheel) as z: z.extractall(folder/'unpacked')
    return folder/'unpacked'


@pytest.fixture(scope='module')
def cases():
    try: return bfcl_cases()
    except AssetError as e:
        if 'pip download' not in str(e): raise
        pytest.skip(f'needs the data of {PACKAGE}: {str(e).splitlines()[0]}')


# ---- Made-up cases for types that BFCL v4 declares nowhere, or in one place ----

def made(category, answers, **types):
    "A case of one function `made.up`; a type is its name, or (name, name of the items' type)"
    spec = lambda t: dict(type=t[0], items=dict(type=t[1])) if isinstance(t, tuple) else dict(type=t)
    f = dict(name='made.up', description='', parameters=dict(type='dict', required=[], properties={p: spec(t) for p, t in types.items()}))
    return BFCLCase(f'made-{category}-{"-".join(map(str, types.values()))}', category, '', (f,), tuple({'made.up': a} for a in answers))


MADE = [
    made('simple_java', [dict(a=[7], b=[-8], c=[9])], a='byte', b='short', c='long'),
    made('simple_java', [dict(a=[1.5], b=[2e3], c=["'x'", 'x'])], a='float', b='double', c='char'),
    made('simple_java', [dict(a=[True], b=[False, ''])], a='boolean', b='boolean'),
    made('simple_java', [dict(a=[[1.5, 2.0]], b=[['x', 'y']])], a=('Array', 'double'), b=('ArrayList', 'char')),
    made('simple_java', [dict(a=[[True, False]], b=[[3, 4]])], a=('ArrayList', 'boolean'), b=('Array', 'long')),
    made('simple_java', [dict(a=[['x y', 'z']], b=[['1', '2'], ''])], a=('ArrayList', 'String'), b=('Array', 'any')),
    made('simple_java', [dict(a=[{'k': [1, 2], 'l': ['v', ''], 'm': [True]}], b=[{}, ''])], a='HashMap', b='HashMap'),
    made('simple_java', [dict(a=[[[1, 2], [3]]], b=[[1.5, 2.5]])], a=('Array', 'Array'), b=('ArrayList', 'float')),
    made('simple_javascript', [dict(a=[7], b=[1.5], c=[9])], a='Bigint', b='float', c='integer'),
    made('simple_javascript', [dict(a=[[7, 8]], b=[[True, False]])], a=('array', 'Bigint'), b=('array', 'Boolean')),
    made('simple_javascript', [dict(a=[[[1, 2], [3, 4]]], b=[[['x', 'y'], ['z']]])], a=('array', 'array'), b=('array', 'array')),
    made('simple_javascript', [dict(a=[{'k': [1, 2], 'l': ['v', ''], 'm': [True], 'n': [[1, 'x']]}], b=[{}, ''])], a='dict', b='dict'),
    made('simple_javascript', [dict(a=[['x', 'y']], b=[[{'k': ['v']}]])], a=('array', 'String'), b=('array', 'dict')),
    made('simple_python', [dict(a=[[{'k': ['v', 'w'], 'l': [1, '']}, {'k': ['x']}]], b=[[{'k': ['v']}], ''])], a=('array', 'dict'), b=('array', 'dict')),
    made('simple_python', [dict(a=[[1.5, 2.0]], b=[[[1, 2], [3]]], c=[[1, 2], ''])], a=('tuple', 'float'), b=('array', 'array'), c=('array', 'any')),
    made('simple_python', [dict(a=['rows', [1, 2]], b=[[1, 2], 'rows'], c=[None, 'x'], d=['x', None])], a=('array', 'integer'), b=('array', 'integer'), c='string', d='string'),
    made('simple_python', [dict(a=[3, 4.0], b=[True, 1], c=[''], d=[1, 'x'])], a='float', b='boolean', c='integer', d='any'),
    made('parallel', [dict(a=[1, 2]), dict(a=[1]), dict(a=[2, 3])], a='integer'),
    made('parallel', [dict(a=[[{'k': ['v']}], '']), dict(a=[[{'k': ['w']}], ''])], a=('array', 'dict')),
]


# ---- Answers ----

def right_answers(case, rng):
    "The gold answer, and for each accepted value of each parameter one that has it"
    yield gold_calls(case)
    for i, a in enumerate(case.possible_answers):
        (name, accepted), = a.items()
        for p, values in accepted.items():
            for v in values:
                one = BFCLCase(case.id, case.category, '', case.functions, tuple({n: {q: [v] if (j, q) == (i, p) and v != '' else w for q, w in g.items()} for n, g in b.items()} for j, b in enumerate(case.possible_answers)))
                calls = list(gold_calls(one))
                yield calls
    if len(case.possible_answers) > 1: yield rng.sample(gold_calls(case), len(case.possible_answers))


NASTY = [None, '', ' ', [], {}, [[]], [{}], [''], [None], True, False, 0, 1, -1, 0.0, 1.5, 10**400, float('nan'), float('inf'), '1', 'true', 'null', '[]', '{}', 'x'*5000, '7'*5000]
MARKS = list(' ,./-_*^\'"\t\n\\`~;:()[]{}<>') + ['\u00a0', '\u200b', 'ß', 'İ', 'Σ', '٣', 'n', 'L', 'f', '.0', 'e3', '_0', '],[', ']]', '], [', '],\n[', "{'a': 1}", 'new ', ', ', '"x"']
SOURCES = ['new int[]{1, 2}', 'new int[] { }', 'new String[]{"x", "y"}', 'new ArrayList<>()', 'new ArrayList<Integer>(Arrays.asList(1, 2))', 'new ArrayList<>() {{ add(1); add("x"); }}',
           'new HashMap<>()', 'new HashMap<String, Object>() {{ put("k", 1); put("l", "v"); put("m", true); }}', 'new HashMap<String, List<Integer>>() { { put("k", 2L); } }', 'List.of(1, 2)',
           '[1, 2]', "['x', 'y']", 'new Array(1, 2)', '[[1, 2], [3, 4]]', '[[1, 2],\n [3, 4]]', 'new Array([1, 2], [3])', '[ [1], x, [2] ]', '{}', "{'k': 1, 'l': 'v', 'm': true}", '{k: 1, n: [1, "x"], m: true}',
           "{'k': {'l': 1}}", '{k: "1", l: 2,}', 'null', 'undefined', '1', '1.5', '1L', '1n', '1f', '1e3', '-1', '+1', '.5', '1_000', 'true', 'false', '"true"', "'x'", '"x"', 'x']


def spoil_text(s, rng):
    "A string, changed a little"
    i = rng.randrange(len(s) + 1)
    mark = rng.choice(MARKS)
    return rng.choice([
        lambda: s.upper(), lambda: s.lower(), lambda: s.swapcase(), lambda: s.title(), lambda: s[:i] + mark + s[i:], lambda: s[:i] + s[i + 1:], lambda: s[:i],
        lambda: s + mark, lambda: mark + s, lambda: s.replace("'", '"'), lambda: s.replace('"', "'"), lambda: s.replace(' ', ''), lambda: s.replace(', ', ','), lambda: s.replace(',', ',\n'),
        lambda: s.replace('-', ' ').replace('.', ''), lambda: f'"{s}"', lambda: f"'{s}'", lambda: s.strip('"\''), lambda: s + '\n', lambda: f' {s} ', lambda: s[::-1], lambda: [s], lambda: s.split(),
        lambda: int(s) if s.isdecimal() and len(s) < 400 else len(s), lambda: s.replace('"', ''), lambda: s.replace('[', '[[').replace(']', ']]')])()


def spoil_value(v, rng):
    "A JSON value, changed a little: at the top or somewhere within"
    if rng.random() < .08: return rng.choice(NASTY)
    if isinstance(v, bool): return rng.choice([not v, int(v), str(v), str(v).lower(), None])
    if isinstance(v, (int, float)):
        whole = int(v) if abs(v) < 1e300 else 0
        return rng.choice([float(whole), whole, str(v), v + 1, -v, whole + .5, [v], None, bool(v), f'{v}.0', whole + 0.0])
    if isinstance(v, str): return spoil_text(v, rng)
    if isinstance(v, dict):
        keys, w = list(v), dict(v)
        if not keys: return rng.choice([{'x': 1}, [], '', None])
        k, do = rng.choice(keys), rng.randrange(7)
        if do < 3: w[k] = spoil_value(v[k], rng)
        elif do == 3: del w[k]
        elif do == 4: w['made_up'] = v[k]
        elif do == 5: w = {(q + 's' if q == k else q): x for q, x in v.items()}
        else: return rng.choice([[v], list(v.items()), json.dumps(v), list(v), dict(reversed(v.items()))])
        return w
    if isinstance(v, list):
        if not v: return rng.choice([[''], [1], {}, '', None, [[]]])
        i, do = rng.randrange(len(v)), rng.randrange(8)
        if do < 4: return [spoil_value(x, rng) if j == i else x for j, x in enumerate(v)]
        return rng.choice([v[:i] + v[i + 1:], v + [v[i]], v[::-1], {'x': v}, str(v), str(tuple(v)), v[i], [v], [*v, None], [str(x) for x in v], [float(x) if type(x) is int and abs(x) < 1e9 else x for x in v]])
    return rng.choice(NASTY)


def other_source(case, p, accepted, rng):
    "An accepted value in Java or JavaScript source, as if the parameter had another type"
    source = {'java': java_source, 'javascript': javascript_source}[language(case.category)]
    value = rng.choice([v for v in accepted if v != ''] or [''])
    value = {k: v[0] if isinstance(v, list) and v else v for k, v in value.items()} if isinstance(value, dict) else value
    kinds = ['integer', 'long', 'float', 'double', 'Array', 'ArrayList', 'Bigint', 'array']
    return rng.choice([source(value, rng.choice(kinds), rng.choice(['String', 'integer', 'long', 'any'])), rng.choice(SOURCES), json.dumps(value)])


def spoil_call(call, case, rng):
    "A call, changed in its name, its parameters or a value"
    name, args = call.name, dict(call.arguments)
    functions = [f for f in case.functions if f['name'] == name] or list(case.functions)
    documented = list(functions[0]['parameters']['properties']) if functions else []
    accepted = next((a[name] for a in case.possible_answers if name in a), {})
    do = rng.random()
    if do < .07: name = rng.choice([name.replace('.', '_'), name.replace('_', '.'), name.upper(), name + 's', name.split('.')[-1], '', *(f['name'] for f in case.functions)])
    elif do < .14 and args: del args[rng.choice(list(args))]
    elif do < .18: args[rng.choice([*documented, 'made_up'])] = rng.choice(NASTY)
    elif do < .22 and args: p = rng.choice(list(args)); args = {(p.swapcase() if q == p else q): v for q, v in args.items()}
    elif do < .30 and accepted: p = rng.choice(list(accepted)); args[p] = rng.choice(accepted[p] or [''])
    elif do < .34 and len(args) > 1: p, q = rng.sample(list(args), 2); args[p], args[q] = args[q], args[p]
    elif do < .60 and language(case.category) != 'python' and accepted: p = rng.choice(list(accepted)); args[p] = other_source(case, p, accepted[p], rng)
    elif args: p = rng.choice(list(args)); args[p] = spoil_value(args[p], rng)
    return ToolCall(name, args)


def spoil(calls, case, rng):
    "An answer, changed in one or two places"
    calls = list(calls)
    for _ in range(rng.choice([1, 1, 1, 2])):
        do = rng.random()
        if not calls and do < .3: return []
        if not calls or do < .05: calls.append(ToolCall(rng.choice(case.functions)['name'] if case.functions else 'made_up', rng.choice([{}, {'x': 1}])))
        elif do < .09: calls.append(rng.choice(calls))
        elif do < .13: calls.pop(rng.randrange(len(calls)))
        elif do < .25 and len(calls) > 1: rng.shuffle(calls)
        else:
            i = rng.randrange(len(calls))
            calls[i] = spoil_call(calls[i], case, rng)
    return calls


def answers(case):
    "(is it gold?, the answer, whether dots are underscores) of a case; the same ones in every run"
    rng = random.Random(case.id)
    right = [list(a) for a in right_answers(case, rng)]
    for calls in right if case.category != 'live_relevance' else ():   # it has no gold answer
        yield True, calls, False
        yield True, [ToolCall(c.name.replace('.', '_'), c.arguments) for c in calls], True
    for _ in range(400 if case.id.startswith('made') else SPOILT.get(case.category, 10)): yield False, spoil(rng.choice(right), case, rng), rng.random() < .1


# ---- The comparison ----

KINDS = {'wrong_count': 'count', 'wrong_func_name': 'name', 'missing_required': 'missing', 'missing_optional': 'missing', 'unexpected_param': 'unexpected', 'cannot_find_match': 'no-match',
         'type_error': 'type', 'value_error': 'value', 'dict_checker': 'value', 'list_dict_checker': 'value', 'relevance': 'timing', '': ''}


def kind(error):
    "The name that we give to one of BFCL's kinds of error; an exception is no verdict"
    return next((KINDS[part] for part in reversed(error.split(':')) if part in KINDS), 'no-verdict')


def official(checker, cases, asked):
    "What BFCL's loader finds, and its answers to what it is asked"
    sent = '\n'.join(map(json.dumps, [BFCL_CATEGORIES, [[c.category, c.functions, c.possible_answers] for c in cases], *asked]))
    out = subprocess.run([sys.executable, str(Path(__file__).with_name('bfcl_official.py')), str(checker)], input=sent, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    found, *verdicts = map(json.loads, out.stdout.splitlines())
    assert len(verdicts) == len(asked)
    return found, verdicts


@pytest.fixture(scope='module')
def compared(checker, cases):
    "Both checkers' opinions: BFCL's loading, and for each item (case, gold?, answer, underscores, ours, theirs)"
    everything = [*cases, *MADE]
    items = [(k, *a) for k, c in enumerate(everything) for a in answers(c)]
    found, verdicts = official(checker, everything, [[k, [{c.name: c.arguments} for c in calls], u] for k, _, calls, u in items])
    return found, [(everything[k], gold, calls, u, ast_error(calls, everything[k], u), v) for (k, gold, calls, u), v in zip(items, verdicts)]


def test_the_same_cases_are_loaded(compared, cases):
    of = {c: [[x.id, list(x.functions), list(x.possible_answers)] for x in cases if x.category == c] for c in BFCL_CATEGORIES}
    assert compared[0] == {c: [len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()] for c, rows in of.items()}


def test_verdicts_agree(compared):
    items = compared[1]
    wrong = [i for i in items if (not i[4]) != i[5][0]]
    kinds = [i for i in items if i[4] != kind(i[5][1])]
    table = Counter((c.category, gold, not error) for c, gold, _, _, error, _ in items)
    print('\n' + f'{"":24}{"gold":>14}{"":8}{"spoilt":>14}\n' + f'{"category":24}{"right":>8}{"wrong":>8}{"right":>12}{"wrong":>8}')
    for c in BFCL_CATEGORIES: print(f'{c:24}{table[c, True, True]:8}{table[c, True, False]:8}{table[c, False, True]:12}{table[c, False, False]:8}')
    print(f'{len(items)} comparisons, {sum(g for _, g, *_ in items)} of them on gold answers: {len(wrong)} disagreements, {len(kinds)} on the kind of error; '
          f'{sum(v[1] != "" and kind(v[1]) == "no-verdict" for *_, v in items)} without a verdict')
    for c, _, calls, u, ours, theirs in (wrong or kinds)[:50]: print(c.id, calls, u, 'ours:', ours, 'theirs:', theirs)
    assert not wrong and not kinds
    spoilt = Counter(not error for _, gold, _, _, error, _ in items if not gold)
    assert min(spoilt.values()) > 2500
    for c in BFCL_CATEGORIES: assert min(table[c, False, True], table[c, False, False]) >= 10, c
    assert set(Counter(error for *_, error, _ in items)) == {*KINDS.values(), 'no-verdict'}   # every kind of error occurs


TOKENS = ['[', ']', ']', '{', '}', '(', ')', ',', ',', ', ', ':', ': ', ' ', '\n', '"', "'", '"a"', "'b'", 'c', '1', '-2', '3.5', '4L', '5f', '6n', '7e2', 'true', 'false', '\u0661',
          'new ', 'new int[]', 'new String[] ', 'new ArrayList<>', 'new ArrayList<Long>', 'new HashMap<>', 'new HashMap<A, B>', '()', '{{', '}}', 'Arrays.asList(', 'add(', 'put("k", ', 'new Array(', '],[', '],\n[', ']]', '[[']


FRAMES = dict(Array=['new int[]{%s}'], ArrayList=['new ArrayList<>(Arrays.asList(%s))', 'new ArrayList<>() {{ add(%s); add(%s); }}', 'new ArrayList<Long>() {{%s}}'],
              HashMap=['new HashMap<A, B>() {{ put("k", %s); put("l", %s); }}', 'new HashMap<>() {%s}'],
              array=['[%s, %s]', 'new Array(%s)', '[[%s], [%s]]', 'new Array([%s],%s)', '[[%s],\n[%s]]'], dict=['{%s: %s, b: %s}', "{'a': [%s], %s}", '{%s}'])


def source(rng, type):
    "A Java or JavaScript source: a collection's frame filled with what may not belong there, or anything; perhaps spoilt"
    some = lambda: ''.join(rng.choices(TOKENS, k=rng.randrange(1, 6)))
    fill = lambda: rng.choice([some, lambda: rng.choice(TOKENS), lambda: ', '.join(rng.choices(TOKENS, k=3))])()
    s = re.sub('%s', lambda _: fill(), rng.choice([*FRAMES.get(type, ['%s'])*3, *SOURCES, '%s']))
    if rng.random() < .3: s = spoil_text(s, rng)
    return s if isinstance(s, str) else str(s)


def test_conversions_agree(checker):
    rng, ask = random.Random(0), []
    for lang in ('java', 'javascript'):
        for type in BFCL_TYPES[lang]:
            listed = type in ('Array', 'ArrayList', 'array')
            for inner in (*BFCL_TYPES[lang], None) if listed else (None,):
                ask += [[lang, source(rng, type), type, inner] for _ in range(3000 if type in ('HashMap', 'dict') else 500)]
    _, theirs = official(checker, [], ask)
    def ours(lang, s, type, inner):
        try: return repr({'java': java_value, 'javascript': javascript_value}[lang](s, type, inner))
        except _NoVerdict: return ''
    wrong = [(a, o, t) for a, t in zip(ask, theirs) if (o := ours(*a)) != t]
    read = sum(t not in ('', repr(a[1]), repr(a[1].strip())) for a, t in zip(ask, theirs))
    print(f'\n{len(ask)} conversions, {read} of them to another value than the source: {len(wrong)} disagreements')
    for w in wrong[:20]: print(w)
    assert not wrong and read > 3000
