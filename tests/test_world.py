"SageWorld's state and tools: the same everywhere, typed, bounded, and changed by calls that can be run only"
import copy, json, os, random, re, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import sage_paper.world as world
from sage_paper.calls import ToolCall
from sage_paper.world import (ACTIONS, KINDS, LISTS, PARAMETERS, STATUSES, BadReference, CallError, IllTypedArgument, MissingArgument, TooManySteps, UnknownArgument,
                              UnknownId, UnknownTool, UnmetPrecondition, WorldError, accepts, check_arguments, execute, make_tools, make_world,
                              plural, reaches_end_state, same_end_state, things, world_tool)

DIGEST = '''
import hashlib
from sage_paper.samples import digest
from sage_paper.world import make_tools, make_world
entities = repr([(e.id, e.fields) for e in make_world(seed=2).entities.values()])
print(digest(make_tools(seed=5)), hashlib.sha256(entities.encode()).hexdigest())
'''


@pytest.fixture(scope='module')
def tools(): return make_tools()


@pytest.fixture(scope='module')
def by_name(tools): return {t.name: t for t in tools}


def a_world(*pairs):
    "A world with the tools of `action thing`"
    return make_world([world_tool(things()[key], action) for action, key in map(str.split, pairs)])


def call(w, action, key, **arguments): return ToolCall(world_tool(things()[key], action).name, arguments)


def outputs_of(code, seeds=('0', '1', '4242')):
    "What a program prints under each of several hash seeds"
    run = lambda s: subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONHASHSEED': s}, capture_output=True, text=True, check=True,
                                   cwd=Path(world.__file__).parents[1]).stdout
    return {run(s) for s in seeds}


def test_identical_across_processes_and_hash_seeds(): assert len(outputs_of(DIGEST)) == 1


def test_import_is_light():
    assert outputs_of("import sys, sage_paper.world; print(sorted({'numpy', 'torch', 'pandas', 'fastcore'} & set(sys.modules)))", ['0']) == {'[]\n'}


def test_nothing_is_evaluated():
    source = Path(world.__file__).read_text(encoding='utf-8')
    assert not re.search(r'\b(eval|exec|compile|__import__|getattr)\(', source.replace('re.compile(', ''))


# Tools

def test_1200_unique_tools(tools):
    assert len({t.name for t in tools}) == len(tools) == 1200
    assert len({t.domain for t in tools}) == 60 and len({t.collection for t in tools}) == len(things()) == 300
    assert len({t.description for t in tools}) == 1200
    assert all(re.fullmatch('[a-z]+_[a-z]+_[a-z_]+', t.name) and t.name == f'{t.domain}_{t.action}_{t.collection}' for t in tools)
    assert not [t.description for t in tools if re.search(r'\ban [^aeiou]|\ba [aeiou]|\{', t.description)]


def test_parameters_are_valid_json_schema_and_agree_with_the_checks(tools):
    jsonschema = pytest.importorskip('jsonschema')
    rng, values = random.Random(0), ['kettle-3', 'attic', '2026-05-03', '08:30', 3, 12.5, True, 'edit', 'urgent', 'nl', 'weather', None, [], {}]
    for t in rng.sample(tools, 60):
        jsonschema.Draft202012Validator.check_schema(t.parameters)
        for p, fragment in t.parameters['properties'].items():
            for v in values:
                if accepts(fragment, v): jsonschema.validate(v, fragment)


def test_fewer_tools_are_the_beginning_of_more(tools):
    assert make_tools(0) == () and make_tools(37) == tools[:37]
    assert {t.name for t in make_tools(seed=9)} == {t.name for t in tools} and make_tools(seed=9) != tools
    for n in (-1, 1201):
        with pytest.raises(WorldError, match='1200 tools'): make_tools(n)


def test_tools_share_no_state():
    a, b = make_tools(1)[0], make_tools(1)[0]
    a.parameters['properties'].clear()
    assert b.parameters['properties'] and all(PARAMETERS.values())


def test_effects_are_plain_data(tools):
    for t in tools: assert json.loads(json.dumps(t.effects)) and len(t.effects) <= 4


@pytest.mark.parametrize('noun, many', [('kettle', 'kettles'), ('grape press', 'grape presses'), ('inventory', 'inventories'), ('tray', 'trays'),
                                        ('bill of lading', 'bills of lading'), ('torch', 'torches'), ('mailbox', 'mailboxes')])
def test_plural(noun, many): assert plural(noun) == many


# What calls do, by hand

def test_a_device_is_repaired_hired_out_moved_and_counted():
    w = a_world('repair kiln', 'rent kiln', 'move kiln', 'count kiln', 'locate kiln', 'assign kiln', 'find kiln', 'retire kiln')
    broken = next(e.id for e in w.entities.values() if e.collection == 'kiln' and e.fields['status'] == 'broken')
    before = sum(e.collection == 'kiln' and e.fields['place'] == 'crypt' for e in w.entities.values())
    r = execute(w, [call(w, 'repair', 'kiln', id=broken, priority='urgent'), call(w, 'rent', 'kiln', id=broken, date='2026-05-03', days=3),
                    call(w, 'move', 'kiln', id=broken, place='crypt'), call(w, 'count', 'kiln', place='crypt'), call(w, 'locate', 'kiln', id=broken),
                    call(w, 'assign', 'kiln', id=broken, person='Nemo'), call(w, 'find', 'kiln', person='Nemo')])
    assert r.outputs == (None, None, None, before + 1, 'crypt', None, broken)
    assert r.world.entities[broken].fields.items() >= dict(status='lent', days=3, date='2026-05-03', priority='urgent', place='crypt', keeper='Nemo').items()
    assert 'repairer' not in r.world.entities[broken].fields   # optional, and not given
    with pytest.raises(UnmetPrecondition, match='status is working or broken'): execute(r.world, [call(w, 'retire', 'kiln', id=broken)])
    with pytest.raises(UnmetPrecondition, match='status is broken'): execute(r.world, [call(w, 'repair', 'kiln', id=broken, priority='low')])


def test_what_is_deleted_is_gone_and_numbers_are_not_reused():
    w = a_world('register kiln', 'retire kiln', 'locate kiln')
    free = next(e.id for e in w.entities.values() if e.collection == 'kiln' and e.fields['status'] != 'lent')
    new = call(w, 'register', 'kiln', title='A', place='attic')
    r = execute(w, [new, call(w, 'retire', 'kiln', id='$1'), new, call(w, 'retire', 'kiln', id=free)])
    assert r.outputs[::2] == ('kiln-9', 'kiln-10') and not {'kiln-9', free} & set(r.world.entities)
    for gone in ('kiln-9', free):
        with pytest.raises(UnknownId): execute(r.world, [call(w, 'locate', 'kiln', id=gone)])


def test_events_have_an_order_and_guests():
    w = a_world('schedule regatta', 'next regatta', 'invite regatta', 'cancel regatta', 'postpone regatta')
    first = execute(w, [call(w, 'next', 'regatta')]).outputs[0]
    planned = {e.id: e.fields['date'] for e in w.entities.values() if e.collection == 'regatta' and e.fields['status'] == 'planned'}
    assert first == min(planned, key=planned.get)
    r = execute(w, [call(w, 'schedule', 'regatta', date='2024-01-01', time='10:00'), call(w, 'next', 'regatta'), call(w, 'invite', 'regatta', id='$2', person='Zoe', time='09:00'),
                    call(w, 'invite', 'regatta', id='$1', person='Amara'), call(w, 'cancel', 'regatta', id='$1', reason='weather'), call(w, 'next', 'regatta')])
    assert r.outputs == ('regatta-9', 'regatta-9', None, None, None, first)
    assert r.world.entities['regatta-9'].fields['guests'] == (('Amara',), ('Zoe', '09:00'))
    everyone = [call(w, 'cancel', 'regatta', id=i, reason='money') for i in planned]
    with pytest.raises(UnmetPrecondition, match='at least one planned regatta'): execute(w, [*everyone, call(w, 'next', 'regatta')])


def test_a_translation_is_a_document_of_its_own():
    w = a_world('translate recipe', 'print recipe', 'oldest recipe')
    r = execute(w, [call(w, 'oldest', 'recipe'), call(w, 'translate', 'recipe', id='$1', language='fr'), call(w, 'print', 'recipe', id='$2', copies=3), call(w, 'print', 'recipe', id='$2', copies=4)])
    old, new = (r.world.entities[i].fields for i in r.outputs[:2])
    assert (old['copies'], new['copies'], new['language'], new['original'], new['title']) == (0, 7, 'fr', r.outputs[0], old['title'])
    assert old['date'] == min(e.fields['date'] for e in w.entities.values() if e.collection == 'recipe')


def test_places_close_and_are_booked():
    w = a_world('book vault', 'close vault', 'open vault')
    open_ = next(e.id for e in w.entities.values() if e.collection == 'vault' and e.fields['status'] == 'open')
    book = call(w, 'book', 'vault', id=open_, date='2026-05-03', person='Zoe')
    r = execute(w, [book, call(w, 'close', 'vault', id=open_, reason='money')])
    assert r.world.entities['booking-1'].fields == dict(item=open_, date='2026-05-03', person='Zoe')
    with pytest.raises(UnmetPrecondition, match='status is open'): execute(r.world, [book])


def test_references_read_the_entity_as_it_is_now():
    w = a_world('find kiln', 'move kiln', 'move kettle')
    k = w.entities['kiln-1'].fields
    r = execute(w, [call(w, 'find', 'kiln', person=k['keeper']), call(w, 'move', 'kiln', id='$1', place='crypt'), call(w, 'move', 'kettle', id='kettle-1', place='$1.place')])
    assert r.world.entities['kettle-1'].fields['place'] == 'crypt'


@pytest.mark.parametrize('value', ['$0', '$2', '$99999', '$1.', '$1.height', '$1.place.x', '$1x', '$3.place', '$01'])
def test_bad_references(value):
    w = a_world('find kiln', 'move kettle')
    with pytest.raises(BadReference) as e:
        execute(w, [call(w, 'find', 'kiln', person=w.entities['kiln-1'].fields['keeper']), call(w, 'move', 'kettle', id='kettle-1', place=value)])
    assert (e.value.step, e.value.parameter, e.value.value) == (2, 'place', value)


def test_a_call_without_output_cannot_be_referred_to():
    w = a_world('move kettle', 'rename kettle')
    with pytest.raises(BadReference): execute(w, [call(w, 'move', 'kettle', id='kettle-1', place='attic'), call(w, 'rename', 'kettle', id='kettle-1', title='$1')])


def test_another_things_id_is_ill_typed_and_a_number_too_high_unknown():
    w = a_world('move kettle')
    for wrong, error in (('kiln-1', IllTypedArgument), ('kettle-99', UnknownId), ('kettle-', UnknownId), ('kettle', IllTypedArgument), (3, IllTypedArgument)):
        with pytest.raises(error, match='kitchen_move_kettle: id is'): execute(w, [call(w, 'move', 'kettle', id=wrong, place='attic')])


def test_steps_are_bounded():
    w = a_world('order kettle')
    one = call(w, 'order', 'kettle', count=1)
    assert len(execute(w, [one]*20).outputs) == 20
    for n, limit in ((21, 20), (4, 3), (10_000, 20)):
        with pytest.raises(TooManySteps, match=f'{n} calls.*at most {limit}'): execute(w, [one]*n, limit)
    assert not w.members['order']


WRONG = {'string': [None, 3, '', ' ', ['a'], True], 'integer': [None, True, '3', 2.5, 0, 10**6], 'boolean': [0, 1, 'true', None],
         'number': [None, True, '$x', float('nan'), float('inf'), 0, -1]}


def test_mutated_arguments_are_rejected(tools):
    from sage_paper.queries import make_queries
    rng, by_name = random.Random(0), {t.name: t for t in tools}
    samples = [s for s in make_queries(rng.sample(tools, 400), 1) if s.calls[0].arguments]
    for s in samples:
        c, = s.calls
        tool, p = by_name[c.name], rng.choice(list(c.arguments))
        fragment = tool.parameters['properties'][p]
        wrong = list(WRONG[fragment['type']])
        if 'enum' in fragment: wrong.append('something else')
        if fragment.get('format') in ('date', 'hh:mm'): wrong += ['tomorrow', '2026-13-01', '2026-1-1', '7:5', '25:00', c.arguments[p] + '\n']
        for w in wrong:
            with pytest.raises(IllTypedArgument, match=f'{tool.name}: {p} is'): check_arguments(tool, c.arguments | {p: w})
        with pytest.raises(UnknownArgument): check_arguments(tool, c.arguments | {'unheard_of': 1})
        required = rng.choice(tool.parameters['required'])
        with pytest.raises(MissingArgument): check_arguments(tool, {k: v for k, v in c.arguments.items() if k != required})
    assert len(samples) > 300


# Anything a model might write

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(['$1', '$2.place', '$$', 'attic', '2026-05-03', 'kettle-1', 'kiln-2']),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=6)
SMALL = [('move', 'kettle'), ('find', 'kettle'), ('repair', 'kettle'), ('draft', 'recipe'), ('share', 'recipe'), ('print', 'recipe'), ('next', 'tasting'), ('order', 'kettle'), ('book', 'vault'), ('count', 'kiln')]
WORLD = make_world([world_tool(things()[k], a) for a, k in SMALL])
BEFORE = copy.deepcopy((WORLD.entities, WORLD.members, WORLD.made))
NAMES = st.sampled_from([*WORLD.tools]) | st.text(max_size=12)


@st.composite
def garbage(draw):
    "A call that has a tool's parameters or not, with any values"
    name = draw(NAMES)
    known = list(WORLD.tools[name].parameters['properties']) if name in WORLD.tools else []
    plausible = {'id': st.sampled_from(['kettle-1', 'kettle-77', 'recipe-1', 'vault-2', '$1', '$1.id']), 'person': st.sampled_from(['Zoe', '$1.keeper', '$1']), 'copies': st.integers(-2, 70)}
    arguments = {p: draw(plausible.get(p, JSON) | JSON) for p in known if draw(st.integers(0, 5))}
    return ToolCall(name, arguments | draw(st.dictionaries(st.text(max_size=4), JSON, max_size=1)))


def well_typed(w):
    "Whether all fields in a world are of their types"
    fragments = PARAMETERS | {'keeper': PARAMETERS['person'], 'repairer': PARAMETERS['person'], 'reviewer': PARAMETERS['person']}
    for e in w.entities.values():
        kind = things()[e.collection].kind if e.collection in things() else e.collection
        assert set(e.fields) <= set(KINDS[kind]), e
        for f, v in e.fields.items():
            if f == 'status': assert v in STATUSES[kind]
            elif f in LISTS: assert list(v) == sorted(set(v))
            elif f in ('original', 'item'): assert isinstance(v, str)
            elif f == 'copies': assert type(v) is int and v >= 0
            else: assert accepts(fragments[f], v) or (f, v) == ('language', 'en'), (e, f)


@settings(max_examples=400, deadline=None)
@given(st.lists(garbage(), max_size=4))
def test_garbage_raises_call_errors_only_and_changes_nothing(calls):
    try: run = execute(WORLD, calls)
    except CallError as e:
        assert 1 <= e.step <= len(calls) and e.expected and len(str(e)) < 1000
    else:
        assert len(run.outputs) == len(calls)
        well_typed(run.world)
    assert (WORLD.entities, WORLD.members, WORLD.made) == BEFORE


@pytest.mark.parametrize('name, arguments', [(None, {}), (['a'], {}), ({}, {}), (3, {}), ('x'*10**6, {}), ('kitchen_move_kettle', []), ('kitchen_move_kettle', None),
                                             ('kitchen_move_kettle', {'id': 'x'*10**6, 'place': 'a'}), ('kitchen_move_kettle', {'id': 'kettle-1', 'place': [[[]]]})])
def test_ill_formed_calls(name, arguments):
    with pytest.raises((UnknownTool, IllTypedArgument)) as e: execute(WORLD, [ToolCall(name, arguments)])
    assert len(str(e.value)) < 1000


def test_the_start_is_well_typed_and_has_every_status():
    for seed in (0, 1):
        w = make_world(seed=seed)
        well_typed(w)
        for key, t in things().items(): assert {w.entities[f'{key}-{k}'].fields['status'] for k in range(1, 9)} == set(STATUSES[t.kind])


def test_copies_are_independent():
    w = make_world()
    c = w.copy()
    c.entities.pop('kettle-1'), c.members.update(kettle=()), c.made.update(['kettle'])
    assert 'kettle-1' in w.entities and w.members['kettle'] and not w.made and 'kettle-1' in make_world().entities


# The same outcome

def test_independent_steps_may_come_in_any_order():
    w = a_world('draft recipe', 'translate recipe', 'share recipe', 'move kettle')
    steps = lambda a, b: [call(w, 'draft', 'recipe', title=a), call(w, 'draft', 'recipe', title=b)]
    share = lambda n: [call(w, 'translate', 'recipe', id=n, language='fr'), call(w, 'share', 'recipe', id='$3', person='Zoe', access='read')]
    gold = execute(w, steps('A', 'B') + share('$1'))
    assert same_end_state(gold, execute(w, steps('B', 'A') + share('$2')))          # the translated one is A
    assert not same_end_state(gold, execute(w, steps('B', 'A') + share('$1')))      # the translated one is B
    assert not same_end_state(gold, execute(w, steps('A', 'B') + share('$1') + [call(w, 'move', 'kettle', id='kettle-1', place='crypt')]))


def test_order_matters_where_one_step_undoes_another():
    w = a_world('move kettle')
    a, b = (call(w, 'move', 'kettle', id='kettle-1', place=p) for p in ('crypt', 'attic'))
    assert not same_end_state(execute(w, [a, b]), execute(w, [b, a])) and same_end_state(execute(w, [a, b]), execute(w, [b]))


def test_what_was_asked_for_has_to_be_found_out():
    w = a_world('locate kettle', 'locate kiln', 'move kettle')
    ask = call(w, 'locate', 'kettle', id='kettle-1')
    assert reaches_end_state(w, [ask], [call(w, 'locate', 'kiln', id='kiln-1'), ask])
    assert not reaches_end_state(w, [ask], []) and not reaches_end_state(w, [ask], [call(w, 'locate', 'kiln', id='kiln-1')])
    used = [call(w, 'locate', 'kiln', id='kiln-1'), call(w, 'move', 'kettle', id='kettle-1', place='$1')]
    assert reaches_end_state(w, used, [call(w, 'move', 'kettle', id='kettle-1', place=w.entities['kiln-1'].fields['place'])])


def test_calls_that_cannot_be_run_reach_nothing():
    w = a_world('move kettle')
    good = call(w, 'move', 'kettle', id='kettle-1', place='crypt')
    assert reaches_end_state(w, [good], [good]) and not reaches_end_state(w, [good], [good, ToolCall('nothing')]) and not reaches_end_state(w, [], [ToolCall('nothing')])
    with pytest.raises(CallError): reaches_end_state(w, [ToolCall('nothing')], [])   # a gold plan has to run
