"The three challenges: what a run sees, what its record says, and what the table makes of it"
import copy, dataclasses, json

import numpy as np, pytest

from conftest import ROOT
from sage_paper.calls import format_calls
from sage_paper.challenge_report import MEASURES, challenge_costs, challenge_differences, challenge_latex, check_challenges, columns, item_parts, measures, peer_latex, regime_rates, timing_items, trivial_measures
from sage_paper.challenge_parts import REGIMES, given_candidates, load_parts
from sage_paper.challenge_runs import CHALLENGES_VERSION, challenge_records, challenge_specs, challenge_tuning_specs, run_challenges, scored
from sage_paper.config import load_settings
from sage_paper.methods import METHODS, Contestant, contest, match_candidates, retrieve
from sage_paper.records import canonical, read_record, record_key, runs_dir
from sage_paper.report import ReportError
from sage_paper.retrieval import BM25, TfIdf, gold_keys

FILE = ROOT/'settings.ini'
SMOKE, PAPER = load_settings('challenges', 'smoke', FILE), load_settings('challenges', 'paper', FILE)


@pytest.fixture(scope='module')
def settings(tiny_folder):
    "The smoke profile with a random model in a folder, all methods, and a few more queries"
    return dataclasses.replace(SMOKE, model=tiny_folder, methods=tuple(METHODS), train_per_set=12, test_per_set=8, precision='fp32')


@pytest.fixture(scope='module')
def parts(settings): return load_parts(settings)


@pytest.fixture(scope='module')
def records(settings): return [dict(key=record_key('challenges', 1, s), spec=s, result=run_challenges(s)) for s in challenge_specs(settings)]


def test_each_challenge_has_its_queries(parts, settings):
    assert [p.challenge for p in parts] == ['timing', 'planning', 'selection']
    for p in parts:
        assert (len(p.train), len(p.test)) == (12, 8) and {s.challenge for s in p.train + p.test} == {p.challenge}
        assert not {s.query for s in p.train} & {s.query for s in p.test}
    assert 0 < sum(bool(s.calls) for s in parts[0].test) < 8 and all(len(s.calls) > 1 for s in parts[1].test)


def test_tuning_never_sees_a_held_out_query(settings):
    for report, tuning in zip(load_parts(settings), load_parts(settings, 'tuning')):
        held = {s.query for s in report.test}
        assert tuning.test and not held & {s.query for s in tuning.train + tuning.test} and not {s.query for s in tuning.train} & {s.query for s in tuning.test}


def test_candidates_in_training_hold_what_is_needed_and_in_testing_what_is_found(parts):
    for p in parts:
        given = given_candidates(p, 5)
        assert all(set(gold_keys(s, p.tools)) <= set(s.candidates) and len(s.candidates) == 5 for s in given.train)
        found = BM25().fit([f'{t.name} {t.description}' for t in p.tools.values()])
        assert found.n_documents == len(p.tools) and all(len(set(s.candidates)) == 5 for s in given.test)
        assert [s.calls for s in given.test] == [s.calls for s in p.test]


def test_the_keys_of_the_runs_need_no_data(monkeypatch):
    def gone(name): raise AssertionError(f'{name} was loaded')
    monkeypatch.setattr('sage_paper.challenge_parts.load_dataset', gone)
    specs = challenge_specs(PAPER) + challenge_tuning_specs(PAPER)
    assert len({canonical(s) for s in specs}) == len(specs) >= sum(len(METHODS[m].regimes) for m in PAPER.methods)


def test_what_learns_nothing_runs_once_and_what_is_trained_with_every_seed():
    s = dataclasses.replace(PAPER, methods=tuple(METHODS), seeds=(0, 1, 2))
    specs = challenge_specs(s)
    per = {(x['method'], x['regime']): sum((y['method'], y['regime']) == (x['method'], x['regime']) for y in specs) for x in specs}
    assert per == {(name, r): 3 if m.learn else 1 for name, m in METHODS.items() for r in m.regimes}
    assert {x['split'] for x in challenge_tuning_specs(s)} == {'tuning'} and len(challenge_tuning_specs(s)) == 2*len(s.lr_grid)*len(s.tuning_seeds)


def test_one_more_method_leaves_the_other_runs_alone():
    few, all_ = (dataclasses.replace(PAPER, methods=m) for m in (('bm25', 'tfidf'), tuple(METHODS)))
    assert {canonical(s) for s in challenge_specs(few)} < {canonical(s) for s in challenge_specs(all_)}


def test_a_run_twice_gives_the_same_record(settings, records):
    for r in records:
        again, first = copy.deepcopy(run_challenges(r['spec'])), copy.deepcopy(r['result'])
        for x in (again, first): (x['budget'] or {}).pop('seconds', None)
        assert canonical(again) == canonical(first)


def test_a_record_holds_a_value_a_query_and_no_text(settings, parts, records):
    for r in records:
        made_for = METHODS[r['spec']['method']].challenges
        assert list(r['result']['parts']) == [f'{p.challenge}/sageworld' for p in parts if p.challenge in made_for]
        for p in (p for p in parts if p.challenge in made_for):
            got = r['result']['parts'][f'{p.challenge}/sageworld']
            assert {len(v) for v in got['items'].values()} == {len(p.test)} and got['items']['id'] == [s.id for s in p.test]
        assert not any(s.query in canonical(r['result']) for p in parts for s in p.test)
        assert (r['result']['budget'] is not None) == bool(METHODS[r['spec']['method']].learn)


def test_gold_answers_are_worth_everything(parts):
    for p in parts:
        got = scored(p, [format_calls(s.calls) for s in p.test])
        for m in MEASURES[p.challenge]:
            num, den = item_parts(got['items'], m)
            assert num.sum() == den.sum() > 0, m


def test_measures_are_the_scores_of_the_set(records):
    names = dict(correct='accuracy')
    for r in measures(records[:3]).itertuples():
        of = [x['result']['parts'][r.part]['scores'] for x in records[:3] if (x['spec']['method'], x['spec']['regime']) == (r.method, r.regime)]
        if r.measure != 'success': assert r.value == pytest.approx(np.mean([x[names.get(r.measure, r.measure)] for x in of]), abs=1e-4)


def test_matching_documents_calls_only_candidates(parts):
    for p in (given_candidates(p, 6) for p in parts):
        calls = match_candidates(p, TfIdf())
        assert len(calls) == len(p.test) and all(c.name in s.candidates and not c.arguments for s, cs in zip(p.test, calls) for c in cs)
        lengths = {len(c) for c in calls}
        assert lengths == {round(np.median([len(s.calls) for s in p.train]))} if p.challenge != 'timing' else lengths <= {0, 1}


def test_closed_book_retrieval_answers_a_known_query_as_it_was_answered(settings, parts):
    known = [dataclasses.replace(p, test=p.train) for p in parts]
    c = Contestant(settings, 'closed', known)
    for p in known: assert retrieve('tfidf')(c, p).texts == [format_calls(s.calls) for s in p.train]


def test_the_table_tells_the_regimes_apart_and_shows_every_run(settings, records):
    trivial = trivial_measures(timing_items(records))
    text = challenge_latex(measures(records), trivial, settings)
    closed, given = text.split(r'\emph{5 candidates in the prompt}')
    assert r'\emph{closed book}' in closed
    assert closed.count('\nnever call & ') == closed.count('\nalways call & ') == 1 and 'never call' not in given
    for block in (closed, given): assert all(block.count(f'\n{name} & ') == 1 for name in ('zero-shot', 'BM25', 'TF-IDF', 'dense', 'fine-tuned', 'Gorilla'))
    assert closed.count('\nrules & ') == 1 and 'rules & ' not in given   # judges see no candidates
    rows = [l for l in text.splitlines() if l.startswith(tuple(f'{m.label} & ' for m in METHODS.values()))]
    assert {l.count('&') for l in rows} == {len(columns(records))} and 'profile smoke' in text


def test_a_table_is_not_made_of_other_runs_than_asked(settings, records):
    check_challenges(records, settings)
    with pytest.raises(ReportError, match=f'1 of {len(records)} runs have no record'): check_challenges(records[1:], settings)
    with pytest.raises(ReportError, match='two records'): check_challenges([*records, records[0]], settings)
    other = records[0] | dict(spec=records[0]['spec'] | dict(n_tools=13))
    with pytest.raises(ReportError, match='were not asked for'): check_challenges([*records, other], settings)


def test_differences_are_those_of_the_items(records):
    d = challenge_differences(records, 'tfidf')
    done = {(r['spec']['regime'], r['spec']['method'], k) for r in records for k in r['result']['parts'] if r['spec']['method'] != 'tfidf'}
    assert {(r.regime, r.method, r.part) for r in d.itertuples()} == done and len(d) == len(done) and (d.low <= d.difference).all() and (d.difference <= d.high).all() and d.p.between(0, 1).all()
    frame = measures(records).set_index(['regime', 'method', 'part', 'measure']).value
    first = dict(timing='correct', planning='node_f1', selection='name')
    for r in d.itertuples():
        m = first[r.part.split('/')[0]]
        assert r.difference == pytest.approx(frame[r.regime, r.method, r.part, m] - frame[r.regime, 'tfidf', r.part, m], abs=1e-4)


def test_the_committed_records_are_those_of_the_settings():
    files = {p.stem: read_record(p) for p in runs_dir(ROOT, 'challenges', 'paper').glob('*.json')}
    asked, possible = ({record_key('challenges', CHALLENGES_VERSION, x) for x in challenge_specs(s)} for s in (PAPER, dataclasses.replace(PAPER, methods=tuple(METHODS), seeds=(*range(5),))))
    assert asked <= set(files) <= possible


def test_a_regime_takes_the_rate_with_the_best_mean_over_sets_and_seeds():
    def run(lr, correct, node_f1): return dict(spec=dict(regime='closed', lr=lr), result=dict(parts={'timing/a': dict(items=dict(correct=correct)), 'planning/b': dict(items=dict(node_f1=node_f1))}))
    best_twice = [run(1e-4, '11', [.2, None]), run(1e-4, '01', [.2, .2]), run(2e-4, '01', [.6, None]), run(2e-4, '11', [.6, .8]), run(4e-4, '11', [0., .5])]
    assert regime_rates(best_twice) == dict(closed=2e-4)


def test_gorilla_learns_with_one_document_and_is_asked_with_it_or_without(settings, parts):
    asked = {regime: contest(settings_of(settings), dict(method='gorilla', regime=regime, seed=0, lr=1e-4), parts)[0] for regime in REGIMES}
    assert {len(s.candidates) for p in asked['candidates'] for s in p.test} == {1} and not any(s.candidates for p in asked['closed'] for s in p.test)


def settings_of(s): return dataclasses.make_dataclass('Run', ['epochs', *(f.name for f in dataclasses.fields(s))])(1, **dataclasses.asdict(s))


def test_streaming_and_batch_train_on_as_many_samples(records):
    n = {r['spec']['method']: r['result']['budget']['samples'] for r in records if r['spec']['method'] in ('sft', 'sage') and r['spec']['regime'] == 'closed'}
    assert n['sft'] == n['sage'] > 0


def test_a_judge_is_never_told_which_held_out_queries_need_a_call(settings, parts):
    flipped = [dataclasses.replace(p, test=tuple(dataclasses.replace(s, calls=()) for s in p.test)) for p in parts]
    for name in ('rules', 'lm_judge', 'embedding_judge', 'hybrid_judge'):
        spec = dict(method=name, regime='closed', seed=0)
        assert contest(settings, spec, parts)[1][0].texts == contest(settings, spec, flipped)[1][0].texts


def test_costs_are_means_over_queries_and_seeds(records, settings):
    costs = challenge_costs(records)
    for r in records:
        row = costs.loc[r['spec']['regime'], r['spec']['method']]
        n = sum(len(p['items']['id']) for p in r['result']['parts'].values())
        written = sum(p['tokens'] for p in r['result']['parts'].values())/n
        trained = (r['result']['budget'] or {}).get('tokens', 0)/1e6
        assert (row.written, row.trained) == tuple(f'{x:.1f}' if x else '0' for x in (written, trained))
    assert 'trained & written & tried' in peer_latex(records, settings)
