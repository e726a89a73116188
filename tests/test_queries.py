"SageWorld's queries: the same everywhere, answerable, varied, and disjoint"
import re
from collections import Counter, defaultdict
from itertools import islice

import pytest

from sage_paper.queries import CHALLENGES, Pool, WORDINGS, _templates, make_queries, nearly_in, normalise_query, sageworld, sageworld_set, tool_queries
from sage_paper.samples import jaccard_pairs, load_samples, read_tools, sample_to_json, word_incidence, words, write_samples, write_tools
from sage_paper.world import ACTIONS, WorldError, WorldTool, check_arguments, execute, is_reference, make_tools, make_world, plural, things

from test_world import outputs_of

DIGEST = '''
import hashlib
from sage_paper.samples import sample_to_json
from sage_paper.queries import CHALLENGES, sageworld, sageworld_set
text = [sample_to_json(s) for part in sageworld(150, seed=3) for s in part]
print(hashlib.sha256('\\n'.join(text).encode()).hexdigest(), *(sageworld_set(150, 30, c, seed=4).digest for c in CHALLENGES))
'''


def alike(texts):
    "Pairs (i, j) of texts whose sets of words are 80% alike; numbers are words, since here they tell queries apart"
    return jaccard_pairs(word_incidence([' '.join(words(t)) for t in texts]), 0.8).tolist()


@pytest.fixture(scope='module')
def tools(): return make_tools()


@pytest.fixture(scope='module')
def start(): return make_world()


@pytest.fixture(scope='module')
def sets(): return {c: sageworld_set(3000, 600, c) for c in CHALLENGES}


def every(d): return d.splits['train'] + d.splits['test']


def test_identical_across_processes_and_hash_seeds(): assert len(outputs_of(DIGEST)) == 1


def test_the_seed_decides(): assert len({sageworld_set(20, 5, 'planning', seed=s).digest for s in (0, 1, 0)}) == 2


@pytest.mark.parametrize('n_tools', [30, 1200])
@pytest.mark.parametrize('challenge', CHALLENGES)
def test_sets_hold_what_was_asked_for(challenge, n_tools):
    d = sageworld_set(200, 50, challenge, n_tools=n_tools, seed=1)
    assert d.name == 'sageworld' and {k: len(v) for k, v in d.splits.items()} == dict(train=200, test=50)
    assert tuple(d.tools.values()) == make_tools(n_tools, 1) and all(k == t.name for k, t in d.tools.items())
    assert len({s.id for s in every(d)}) == 250 and {s.challenge for s in every(d)} == {challenge} and {s.source for s in every(d)} == {'sageworld'}
    assert all(set(s.tool_ids) == {c.name for c in s.calls} <= set(d.tools) for s in every(d))


def test_every_gold_plan_runs(sets, start):
    for d in sets.values():
        for s in every(d): execute(start, s.calls)


def test_every_gold_call_changes_or_tells_something(sets, start):
    for s in every(sets['selection']):
        run = execute(start, s.calls)
        assert run.outputs[0] is not None or run.world.entities != start.entities, s


def test_arguments_are_canonical(sets):
    for d in sets.values():
        for c in (c for s in every(d) for c in s.calls):
            properties = d.tools[c.name].parameters['properties']
            assert list(c.arguments) == [p for p in properties if p in c.arguments]
            if not any(map(is_reference, c.arguments.values())): check_arguments(d.tools[c.name], c.arguments)
            assert not [v for v in c.arguments.values() if isinstance(v, float) and v == int(v)]


def test_every_value_is_said(sets):
    "Each argument is in the query in one of its wordings, or refers to an earlier call"
    for d in sets.values():
        for s in every(d):
            for c in s.calls:
                for p, v in c.arguments.items():
                    says = WORDINGS.get(p)
                    if is_reference(v) or p in ('date', 'time', 'start', 'end', 'budget'): continue
                    if p == 'id': expected = [re.escape(f"{v.split('-')[1]}")]
                    elif p == 'title': expected = [v]
                    else: expected = [re.escape(w) for w in (*says[v], *WORDINGS.get(f'{p}.verb', {}).get(v, ()))]
                    assert any(re.search(rf'(?<![a-z0-9]){w}(?![a-z0-9])', s.query, re.I) for w in expected), (s, p)


def test_the_asked_for_thing_is_spoken_of(sets, tools):
    by_name = {t.name: t for t in tools}
    for s in islice(every(sets['selection']), 1500):
        t = things()[by_name[s.calls[0].name].collection]
        ways = [*(t.name, *t.synonyms, *t.descriptions), *map(plural, (t.name, *t.synonyms))]
        assert any(w.lower() in s.query.lower() for w in ways), s


def test_most_queries_do_not_say_the_things_name(sets, tools):
    by_name = {t.name: t for t in tools}
    verbatim = sum(things()[by_name[s.calls[0].name].collection].name in s.query.lower() for s in every(sets['selection']))
    assert verbatim/len(every(sets['selection'])) < .5


def test_queries_read_well(sets):
    for d in sets.values():
        for s in every(d):
            assert s.query[0].isupper() or s.query[0] in '"0123456789'
            assert s.query[-1] in '.?!"' and not re.search(r'[{}]|  |\.\.|\?\.|!\.| [.,;?]', s.query), s.query
            assert not re.search(r'[.?!] [a-z]', s.query) and not re.search(r'\ba [aeio]', s.query.lower()), s.query
    counts = {c: sorted(len(s.query.split()) for s in every(d)) for c, d in sets.items()}
    assert max(counts['selection']) <= 90 and counts['selection'][len(counts['selection'])//2] <= 35


def test_plans_have_two_to_five_steps_several_domains_and_references(sets):
    samples = every(sets['planning'])
    lengths = Counter(len(s.calls) for s in samples)
    assert set(lengths) == {2, 3, 4, 5} and min(lengths.values()) > len(samples)/6
    referring = sum(any(map(is_reference, c.arguments.values())) for s in samples for c in [*s.calls] if c is not s.calls[0])
    assert sum(any(is_reference(v) for c in s.calls for v in c.arguments.values()) for s in samples) > len(samples)/2 and referring
    assert sum(len({sets['planning'].tools[c.name].domain for c in s.calls}) > 1 for s in samples) > .9*len(samples)
    kinds = {v.partition('.')[2] for s in samples for c in s.calls for v in c.arguments.values() if is_reference(v)}
    assert kinds == {'', 'place', 'keeper', 'date'}


def test_a_lookup_comes_right_before_what_needs_it(sets):
    "Between a call and the one that refers to it stand only calls that the same one refers to, unless it created something"
    creating = {'register', 'draft', 'schedule', 'translate'}
    for s in every(sets['planning']):
        for k, c in enumerate(s.calls, 1):
            refs = {int(re.match(r'\$(\d+)', v)[1]) for v in c.arguments.values() if is_reference(v)}
            looked_up = {r for r in refs if sets['planning'].tools[s.calls[r - 1].name].action not in creating}
            assert looked_up == set(range(k - len(looked_up), k)), s


def test_a_property_is_got_in_one_way_only(sets):
    "A field of something found is read off where no tool of that thing tells it, and only there"
    getters = dict(place='locate', keeper='whose', date='when')
    tools = sets['planning'].tools
    having = defaultdict(set)
    for t in tools.values(): having[t.collection].add(t.action)
    for s in every(sets['planning']):
        for c in s.calls:
            for v in (v for v in c.arguments.values() if is_reference(v)):
                k, _, name = v[1:].partition('.')
                source = tools[s.calls[int(k) - 1].name]
                if name: assert getters[name] not in having[source.collection]
            if tools[c.name].action in getters.values(): assert not is_reference(c.arguments['id'])


def test_half_of_the_timing_queries_need_a_tool(sets):
    for split in sets['timing'].splits.values():
        assert abs(sum(bool(s.calls) for s in split)/len(split) - .5) < .02
    assert all(len(s.calls) <= 1 for s in every(sets['timing']))


def test_no_test_query_stands_in_training(sets):
    for d in sets.values():
        train, test = ([s.query for s in d.splits[k]] for k in ('train', 'test'))
        assert not {normalise_query(q) for q in train} & {normalise_query(q) for q in test}
        assert not [(i, j) for i, j in alike(train + test) if i < len(train) <= j]


def test_nearly_in_agrees_with_the_join(sets):
    queries = [s.query for s in sets['timing'].splits['train'][:400]]
    changed = [' '.join(w for k, w in enumerate(q.split()) if k % 7 != i % 5) for i, q in enumerate(queries)]
    near = nearly_in(queries)
    pairs = {j - len(queries) for i, j in alike(queries + changed) if i < len(queries) <= j}
    assert {j for j, q in enumerate(changed) if near(q)} == pairs and 0 < len(pairs) < len(changed)


def test_near_duplicates_agree_with_minhash(sets):
    "By other means: no train and test query whose estimated similarity of words is far above the limit"
    from datasketch import MinHash, MinHashLSH
    def sketch(q):
        m = MinHash(num_perm=128, seed=1)
        for w in words(q): m.update(w.encode())
        return m
    d, index = sets['selection'], MinHashLSH(threshold=.9, num_perm=128)
    for s in d.splits['train']: index.insert(s.id, sketch(s.query))
    assert [s.id for s in d.splits['test'] if index.query(sketch(s.query))] == []


# Single tools

def test_the_stream_is_disjoint_and_in_the_order_of_its_tools():
    train, test = sageworld(1200, 6, 3, seed=1)
    assert (len(train), len(test)) == (7200, 3600)
    assert len({normalise_query(s.query) for s in train + test}) == 10_800
    assert list(dict.fromkeys(s.tool_ids[0] for s in train)) == [t.name for t in make_tools(1200, seed=1)]
    near = nearly_in([s.query for s in train])
    assert not [s.query for s in test if near(s.query)]


def test_ids_are_unique_and_stable(tools):
    some = tools[::100]
    long = {s.id: s for s in make_queries(some, 20)}
    assert len(long) == 20*len(some)
    for n, start in ((1, 0), (7, 0), (5, 9)):
        part = make_queries(some, n, start=start)
        assert [s.id for s in part] == [f'sageworld/{t.name}/{k}' for t in some for k in range(start, start + n)]
        assert all(long[s.id] == s for s in part)
    assert sorted(map(sample_to_json, make_queries(reversed(some), 2))) == sorted(map(sample_to_json, make_queries(some, 2)))


def test_no_tool_runs_dry(tools):
    seen = {}
    for t in tools: seen.setdefault(t.action, t)
    assert set(seen) == set().union(*ACTIONS.values())
    alone = Pool([seen['next']])
    for t in [*seen.values()][::3] + [seen['next'], seen['oldest']]:
        queries = [s.query for s in make_queries([t], 500)]
        assert len({normalise_query(q) for q in queries}) == 500 and not alike(queries)
    with pytest.raises(WorldError, match='has no more than'): list(islice(tool_queries(seen['next'], pool=alone), 5000))


def test_tools_of_other_worlds_are_refused():
    with pytest.raises(WorldError, match='not a tool of SageWorld'): next(tool_queries(WorldTool('x')))
    with pytest.raises(WorldError, match='expected one of selection'): sageworld_set(1, 1, 'chess')
    with pytest.raises(WorldError, match='too few'): sageworld_set(5, 1, 'planning', n_tools=1)


# Wordings

def test_every_action_can_be_asked_for_in_many_ways():
    templates, slots = _templates('wordings.tsv'), lambda t: {p.split('.')[0] for p in t[1::2]}
    for kind, actions in ACTIONS.items():
        for name, a in actions.items():
            own = [t for form in ('do', 'say') for t in templates[f'{name}.{form}']]
            assert len(own) >= 9 and len(set(own)) == len(own)
            needed, allowed = ({x for x in p.replace('id', 'item', p.split()[:1] == ['id']).split()} for p in (a.required, f'{a.required} {a.optional}'))
            for t in own: assert needed <= slots(t) <= allowed | {'object', 'objects'}, (name, t)
            assert set().union(*map(slots, own)) >= allowed, name
    assert {k.split('.')[0] for k in templates} == set().union(*ACTIONS.values())


def test_frames_are_distinct_and_numbered():
    for group, frames in _templates('frames.tsv').items():
        assert len(set(frames)) == len(frames) or group in ('ask', 'created'), group
        for k in range(2, 6):
            if group == f'plan{k}': assert all(sorted(f[1::2]) == [str(i) for i in range(1, k + 1)] for f in frames)


def test_a_set_goes_through_files(tmp_path):
    d = sageworld_set(4, 4, 'planning', 30)
    write_samples(tmp_path/'test.jsonl', d.splits['test'])
    write_tools(tmp_path/'tools.jsonl', d.tools)
    tools = read_tools(tmp_path/'tools.jsonl')
    assert list(tools) == list(d.tools) and all((t.description, t.parameters) == (d.tools[k].description, d.tools[k].parameters) for k, t in tools.items())
    assert load_samples(tmp_path/'test.jsonl', tools) == d.splits['test']
