"Sets never seen: what a model is trained on, that none of it is asked, and what the table makes of the records"
import copy, dataclasses, json

import numpy as np, pytest

from conftest import ROOT
from sage_paper.assets import AssetError
from sage_paper.calls import Sample, ToolCall, format_calls
from sage_paper.challenge_parts import Part
from sage_paper.config import SettingsError, load_settings
from sage_paper.generalization_report import (MEASURES, bfcl_categories, check_generalization, comparisons, first, generalization_differences, generalization_latex, generalization_numbers,
                                              generalization_rate, measures, overview, rows, sets_asked, training_overview, write_generalization)
from sage_paper.generalization_runs import (GENERALIZATION_VERSION, USES, apart, as_learnt, experiment_parts, generalization_specs, generalization_tuning_specs, has_gold, marked, method_names,
                                            run_generalization, set_parts, shares, trained_on, training_parts, world_set)
from sage_paper.records import canonical, record_key
from sage_paper.report import ReportError
from sage_paper.retrieval import gold_keys
from sage_paper.samples import near_duplicates

FILE = ROOT/'settings.ini'
SMOKE, PAPER = load_settings('generalization', 'smoke', FILE), load_settings('generalization', 'paper', FILE)


@pytest.fixture(scope='module')
def settings(tiny_folder):
    "The smoke profile with a random model in a folder"
    return dataclasses.replace(SMOKE, model=tiny_folder, precision='fp32', test_per_set=4, max_new_tokens=4)


@pytest.fixture(scope='module')
def parts(): return experiment_parts(SMOKE.sources, SMOKE.transfer, 60, 6, 12)


@pytest.fixture(scope='module')
def records(settings): return [dict(key=record_key('generalization', GENERALIZATION_VERSION, s), spec=s, result=run_generalization(s)) for s in generalization_specs(settings)]


def test_every_model_has_the_same_number_of_samples(parts, records, settings):
    for sources in (('sageworld',), ('sageworld', 'sageworld-1')):
        for n in (7, 60, 150):   # fewer than there are, as many, and more: cut, or given again
            learnt = training_parts(parts, sources, n, 5, 0.8, 0)
            assert [len(p.train) for p in learnt] == list(shares(n, sources).values()) and sum(len(p.train) for p in learnt) == n
    own = next(p for p in parts if p.name == 'sageworld').train
    again = [s.id for s in training_parts(parts, ('sageworld',), 150, 5, 0.8, 0)[0].train]
    assert again == [own[k % len(own)].id for k in range(150)]
    budgets = {r['spec']['method']: r['result']['budget'] for r in records}
    assert {b['samples'] for b in budgets.values() if b} == {settings.steps*settings.batch_size}
    assert {m for m, b in budgets.items() if b is None} == {'zero_shot', 'bm25', 'tfidf'}


@pytest.mark.parametrize('n,m', [(0, 1), (1, 3), (32, 3), (3200, 4)])
def test_shares_are_as_even_as_can_be(n, m):
    s = shares(n, range(m))
    assert sum(s.values()) == n and max(s.values()) - min(s.values()) <= 1


def test_a_sample_shows_all_needed_tools_or_none_and_is_answered_accordingly(parts):
    for p in parts[:2]:
        learnt = as_learnt(p.train, p.tools, 5, 0.6, 3)
        for s, x in zip(p.train, learnt, strict=True):
            gold = set(gold_keys(s, p.tools))
            assert (s.id, s.query) == (x.id, x.query) and len(set(x.candidates)) == 5
            if has_gold(s, 0.6, 3): assert gold <= set(x.candidates) and x.calls == s.calls
            else: assert not gold & set(x.candidates) and x.calls == ()


@pytest.mark.parametrize('share', [0., 0.5, 0.8, 1.])
def test_as_many_abstain_as_asked_for(share):
    samples = [Sample(f'set/train/{i}', '', ()) for i in range(4000)]
    for seed in (0, 1): assert np.mean([has_gold(s, share, seed) for s in samples]) == pytest.approx(share, abs=4*np.sqrt(share*(1 - share)/4000))
    if 0 < share < 1: assert [has_gold(s, share, 0) for s in samples] != [has_gold(s, share, 1) for s in samples]


def test_a_query_is_learnt_alike_in_every_mixture_of_a_seed(parts):
    alone, mixed = (training_parts(parts, x, n, 5, 0.5, 2)[0].train for x, n in ((('sageworld',), 30), (('sageworld', 'sageworld-1'), 60)))
    assert alone == mixed
    assert alone != training_parts(parts, ('sageworld',), 30, 5, 0.5, 3)[0].train


def test_nothing_asked_is_trained_on(parts):
    for split in ('report', 'tuning'):
        of = parts if split == 'report' else experiment_parts(SMOKE.sources, (), 60, 6, 12, 'tuning')
        held = [t.query for p in of for t in p.test]
        assert held and not near_duplicates([s.query for p in of for s in p.train], held)
        assert not {s.id for p in of for s in p.train} & {s.id for p in of for s in p.test}
    assert all(not p.train for p in parts if p.name in SMOKE.transfer)


def test_a_query_near_one_of_another_set_is_not_trained_on():
    def of(*queries): return tuple(Sample(f'{i}', q, ()) for i, q in enumerate(queries))
    leak = 'Please book a table for 4 at the old harbour restaurant'
    mixed = apart([Part('ultratool', 'planning', of(leak, 'Water the plants on the balcony'), (), {}), Part('nestools', 'planning', (), of('please book a table for 6 at the old harbour restaurant!'), {})])
    assert [s.query for s in mixed[0].train] == ['Water the plants on the balcony'] and len(mixed[1].test) == 1


def test_worlds_share_no_tool():
    worlds = [world_set(n, 40, 6, 100) for n, u in USES.items() if u.world is not None]
    assert sum(len(w.tools) for w in worlds) == len({k for w in worlds for k in w.tools}) > 300
    for w in worlds: assert all(set(s.tool_ids) <= set(w.tools) for ss in w.splits.values() for s in ss)


def test_a_world_is_refused_where_none_of_its_tools_is_left():
    with pytest.raises(ValueError, match='smaller n_tools'): world_set('sageworld-1', 2, 2, 1200)


def test_methods_are_trained_on_what_their_names_say():
    sources = PAPER.sources
    of = {m: trained_on(m, sources) for m in method_names(PAPER.methods, sources)}
    assert len(of) == 3 + 4 + 1 + 4 and of['all'] == sources and of['only_metatool'] == ('metatool',) and of['zero_shot'] == ()
    for x in sources: assert set(of[f'without_{x}']) == set(sources) - {x}
    with pytest.raises(ValueError, match="'without_bfcl', expected one of"): trained_on('without_bfcl', sources)


def test_the_keys_of_the_runs_need_no_data(monkeypatch):
    def gone(name): raise AssertionError(f'{name} was loaded')
    monkeypatch.setattr('sage_paper.generalization_runs.load_dataset', gone)
    specs = generalization_specs(PAPER) + generalization_tuning_specs(PAPER)
    assert len({record_key('generalization', 1, s) for s in specs}) == len(specs) == 3 + 9*5 + len(PAPER.lr_grid)
    assert canonical(specs) == canonical(generalization_specs(PAPER) + generalization_tuning_specs(PAPER))


def test_tuning_asks_no_set_that_is_only_asked():
    for x in generalization_tuning_specs(PAPER): assert x['transfer'] == [] and set(x['data']) == set(PAPER.sources) and x['split'] == 'tuning' and x['seed'] not in PAPER.seeds


def test_one_more_method_leaves_the_other_runs_alone():
    few = dataclasses.replace(PAPER, methods=('bm25', 'all'))
    assert {canonical(s) for s in generalization_specs(few)} < {canonical(s) for s in generalization_specs(PAPER)}


def test_wrong_settings_are_named():
    for change, said in (dict(sources=['sageworld']), 'expected two or more'), (dict(gold_share=1.2), 'gold_share = 1.2'), (dict(transfer=['toolstream']), 'transfer = '), (dict(steps=0), 'steps = 0'):
        with pytest.raises(SettingsError, match=said): load_settings('generalization', 'smoke', FILE, **change)


def test_a_run_twice_gives_the_same_record(records):
    for r in records:
        again, before = copy.deepcopy(run_generalization(r['spec'])), copy.deepcopy(r['result'])
        for x in (again, before): (x['budget'] or {}).pop('seconds', None)
        assert canonical(again) == canonical(before)


def test_a_record_holds_a_value_a_query_and_no_text(records, settings):
    parts = experiment_parts(settings.sources, settings.transfer, settings.steps*settings.batch_size, settings.test_per_set, settings.n_tools)
    for r in records:
        for p in parts:
            items = r['result']['parts'][p.name]['items']
            assert {len(v) for v in items.values()} == {len(p.test)} and items['id'] == [s.id for s in p.test] and set(MEASURES[p.name]) - {'f1'} <= set(items)
        assert not any(s.query in canonical(r['result']) for p in parts for s in (*p.train, *p.test))
        assert set(r['result']['training']) == set(r['spec'].get('trained_on', ()))


def test_gold_answers_are_worth_everything(parts):
    for p in parts:
        items = marked(p, [format_calls(s.calls) for s in p.test])['items']
        for m in set(MEASURES[p.name]) - {'f1'}: assert set(items[m]) <= {'1', 1.}, (p.name, m)


def made_up(method, seed, **right):
    "A run on two sources and two other sets, right where the text says so"
    def items(k): return dict(id=[f'{k}/{i}' for i in range(4)], cluster=['w', 'x', 'y', 'z'])
    timing = items('when2call') | dict(correct=right['when2call'], needed='1100', called=''.join('01'[(c == '1') == (n == '1')] for c, n in zip(right['when2call'], '1100')))
    of = {'bfcl-live': items('bfcl-live') | dict(right=right['bfcl'], category=['live_simple', 'live_simple', 'live_multiple', 'live_parallel']), 'when2call': timing}
    of |= {k: items(k) | dict(name=right[k], exact='0000') for k in ('toolstream', 'metatool')}
    sources = trained_on(method, ('toolstream', 'metatool'))
    training = {x: dict(samples=6//len(sources), queries=3, abstained=1) for x in sources}
    return dict(key=f'{method}-{seed}', spec=dict(method=method, seed=seed, sources=['toolstream', 'metatool'], lr=1e-4),
                result=dict(parts={k: dict(items=x, n_tools=5, candidate_recall=None if k == 'bfcl-live' else 0.5) for k, x in of.items()}, training=training, budget=dict(samples=6, tokens=1_500_000 + seed) if sources else None))


RUNS = [made_up('zero_shot', 0, bfcl='0000', when2call='0011', toolstream='0000', metatool='0000'),
        made_up('all', 0, bfcl='1110', when2call='1111', toolstream='1111', metatool='1010'), made_up('all', 1, bfcl='1010', when2call='1101', toolstream='1111', metatool='1000'),
        made_up('without_toolstream', 0, bfcl='1110', when2call='1111', toolstream='1000', metatool='1111'), made_up('without_toolstream', 1, bfcl='1110', when2call='1111', toolstream='0100', metatool='1111')]


def test_the_table_holds_what_one_computes_by_hand():
    frame = measures(RUNS).set_index(['method', 'part', 'measure']).value
    assert frame['all', 'bfcl-live', 'right'] == 5/8 and frame['all', 'when2call', 'correct'] == 7/8 and frame['all', 'metatool', 'name'] == 3/8
    assert frame['all', 'when2call', 'f1'] == pytest.approx(2*4/(4 + 5))   # over both runs: 4 hits, 4 needed, 5 called
    assert frame['zero_shot', 'when2call', 'f1'] == 0
    text = generalization_latex(measures(RUNS), RUNS, SMOKE, False)
    line = {x.split(' & ')[0]: x for x in text.splitlines()}
    assert 'all sources & 62.5' in text and line['zero-shot'].startswith(r'zero-shot & 0.0 & 50.0') and line['all but ToolStream'].startswith('all but ToolStream & 75.0')
    assert r'\multicolumn{1}{c}{BFCL live} & \multicolumn{2}{c}{When2Call}' in text and 'ToolStream}' not in text and 'profile smoke' in text
    sources = generalization_latex(measures(RUNS), RUNS, SMOKE, True)
    assert 'BFCL' not in sources and r'all sources & \textbf{100.0} & 0.0 & 37.5' in sources   # ToolStream: all 100, the others below, intervals apart


def test_bold_is_only_what_lies_above_all_others():
    sources = generalization_latex(measures(RUNS), RUNS, SMOKE, True)
    best = [c for l in sources.splitlines() for c in l.split(' & ') if r'\textbf' in c]
    assert len(best) == 1 and '100.0' in best[0]   # ToolStream; on MetaTool another seed of the second could be all right as well
    level = [RUNS[0], *(r | dict(result=RUNS[0]['result'] | dict(training=r['result']['training'], budget=r['result']['budget'])) for r in RUNS[1:])]
    assert r'\textbf' not in generalization_latex(measures(level), level, SMOKE, True)


def test_differences_are_those_of_the_items_and_each_family_is_corrected():
    d = generalization_differences(RUNS)
    assert list(zip(d.family, d.method, d.against, d.part)) == comparisons(RUNS) and len(d) == 2*2 + 3
    by = d.set_index(['family', 'method', 'part'])
    assert by.difference['zero_shot', 'all', 'bfcl-live'] == pytest.approx(5/8) and by.difference['left_out', 'all', 'toolstream'] == pytest.approx(3/4)
    assert by.difference['left_out', 'all', 'when2call'] == pytest.approx(-1/8)
    assert (d.low <= d.difference + 1e-9).all() and (d.difference <= d.high + 1e-9).all()
    alone = generalization_differences([r for r in RUNS if r['spec']['method'] != 'without_toolstream'])   # a smaller family, smaller p
    assert len(alone) == 2 and (alone.p.values <= by.p[[('zero_shot', 'all', k) for k in alone.part]].values).all()


def test_two_that_were_asked_different_queries_are_not_compared():
    other = copy.deepcopy(RUNS)
    for r in other[1:3]: r['result']['parts']['bfcl-live']['items']['id'][0] = 'bfcl-live/9'
    with pytest.raises(ReportError, match='different queries of bfcl-live'): generalization_differences(other)
    with pytest.raises(ReportError, match='not the same queries of bfcl-live'): generalization_differences([*RUNS[:2], other[2], *RUNS[3:]])


def test_what_was_trained_and_asked_is_counted():
    t, o = training_overview(RUNS), overview(RUNS)
    assert list(t.index) == ['all', 'without_toolstream'] and t.samples.tolist() == [6, 6] and t.abstained.tolist() == [2, 1] and t.tokens['all'] == 1_500_000.5
    assert list(o.index) == ['bfcl-live', 'when2call', 'toolstream', 'metatool'] and o.test.tolist() == [4]*4 and o.recall['metatool'] == 0.5
    assert bfcl_categories(RUNS)['all'].to_dict() == dict(live_simple=0.75, live_multiple=1., live_parallel=0.) and bfcl_categories(RUNS).n['live_simple'] == 2


def test_every_number_has_a_name_of_its_own():
    frame, d = measures(RUNS), generalization_differences(RUNS)
    numbers = generalization_numbers(frame, d, RUNS, SMOKE)
    assert len(numbers) == 5 + len(frame) + len(d) + 4 + 2 + 4 and all(k.startswith('Generalization') and k.isalpha() for k in numbers)
    assert numbers['GeneralizationAllBfclLiveRight'] == '62.5' and numbers['GeneralizationAllTokens'] == '1.50' and numbers['GeneralizationRecallBfclLive'] == '---'
    assert numbers['GeneralizationAllOverZeroShotBfclLive'].startswith('$+62.5$')


def test_the_rate_has_the_best_mean_over_sources_and_seeds():
    def run(lr, **right): return made_up('all', 100, bfcl='1111', when2call='1111', **right) | dict(spec=dict(method='all', seed=100, sources=['toolstream', 'metatool'], lr=lr))
    tried = [run(1e-4, toolstream='1111', metatool='0000'), run(1e-4, toolstream='0000', metatool='1000'), run(2e-4, toolstream='1000', metatool='1000'), run(2e-4, toolstream='1110', metatool='1100'),
             run(4e-4, toolstream='0000', metatool='1111'), run(4e-4, toolstream='0000', metatool='0000')]
    assert generalization_rate(tried) == 2e-4   # means 5/16, 7/16, 4/16


def test_a_table_is_not_made_of_other_runs_than_asked(settings, records, tmp_path):
    check_generalization(records, settings)
    with pytest.raises(ReportError, match=f'1 of {len(records)} runs have no record: method all'): check_generalization([r for r in records if r['spec']['method'] != 'all'], settings)
    with pytest.raises(ReportError, match='two records'): check_generalization([*records, records[0]], settings)
    with pytest.raises(ReportError, match='were not asked for'): check_generalization([*records, records[0] | dict(spec=records[0]['spec'] | dict(n_tools=13))], settings)
    with pytest.raises(ReportError, match='no record'): write_generalization(records[1:], settings, tmp_path)
    assert not list(tmp_path.rglob('*.tex'))


def test_what_is_written_depends_on_the_records_alone(settings, records, tmp_path):
    (a, b), names = (tmp_path/'a', tmp_path/'b'), ['generalization.tex', 'generalization_sources.tex', 'generalization_numbers.tex']
    first_, again = write_generalization(records, settings, a), write_generalization(records[::-1], settings, b)
    assert [p.name for p in first_] == [p.name for p in again] == names and [p.read_bytes() for p in first_] == [p.read_bytes() for p in again]
    for p, sets in zip(first_, (SMOKE.transfer, SMOKE.sources)):
        body = [l for l in p.read_text().splitlines() if l.endswith(r'\\') and l[0] not in '&\\']
        assert len(body) - 2*(sets == SMOKE.transfer) == len(rows(records)) == 8 and len({l.count('&') for l in body}) == 1
    assert sets_asked(records, False) == list(SMOKE.transfer) and sets_asked(records, True) == list(SMOKE.sources)
    assert set(json.loads((a/'build/smoke/tables/manifest.json').read_text())) == set(names)


@pytest.fixture(scope='module')
def transfer():
    "The parts of the paper's sets that are only asked"
    try: return {p.name: p for name in PAPER.transfer for p in set_parts(name, 0, PAPER.test_per_set, PAPER.n_tools)}
    except AssetError as e: pytest.skip(f'needs the data sets: {str(e).splitlines()[0]}')


def test_the_papers_sets_are_what_their_measures_expect(transfer):
    assert set(transfer) == {k for k in MEASURES if k not in PAPER.sources and not k.startswith('sageworld')}
    for name, p in transfer.items():
        assert 180 < len(p.test) <= PAPER.test_per_set and not p.train
        assert all(bool(s.candidates) == USES[name].documented for s in p.test) and all(set(s.candidates) | set(s.tool_ids) <= set(p.tools) for s in p.test)
        gold = marked(p, [format_calls(s.calls) for s in p.test])['items']
        for m in set(MEASURES[name]) - {'f1'}:
            if m == 'link_f1': assert {x for x in gold[m] if x is not None} == {1.}
            elif name in ('bfcl-live', 'bfcl-non-live'): assert gold[m].count('1') >= 0.98*len(p.test)   # its matcher has no accepted value for some of its own answers
            else: assert set(gold[m]) <= {'1', 1.}, (name, m)


def test_no_call_in_prose_is_right_for_bfcl_and_not_for_us(transfer):
    p = transfer['bfcl-irrelevance']
    for text, ours, theirs in (('[]', '1', '1'), ('None of these fits.', '0', '1'), (format_calls([ToolCall('f')]), '0', '0')):
        items = marked(p, [text]*len(p.test))['items']
        assert (set(items['correct']), set(items['right'])) == ({ours}, {theirs})
    assert first('bfcl-irrelevance') == 'correct'
