"Retrieval: rankings are right, silent and the same everywhere; measures agree with scikit-learn's; candidates give nothing away"
import os, subprocess, sys
from collections import Counter
from dataclasses import replace

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity

from conftest import ROOT
from sage_paper.calls import Sample, Tool, ToolCall, tool_document
from sage_paper.retrieval import (BM25, Nearest, TfIdf, candidate_recall, copy_nearest, hits, match_documents, ndcg, recall_at, reciprocal_rank, tokens, top, top_k,
                                  with_candidates)

RETRIEVERS = {'bm25': BM25, 'tfidf': TfIdf}
NOUNS, VERBS = 'kettle lamp tea door window radio garden oven fridge train'.split(), 'start stop dim open close order list paint'.split()
TOOLS = {f'{n}_{v}': Tool(f'{n}_{v}', f'{v.title()}s a {n}') for n in NOUNS for v in VERBS}
SAMPLES = [Sample(f's{i}', f'please {k.split("_")[1]} the {k.split("_")[0]}', (ToolCall(k),), tool_ids=(k,)) for i, k in enumerate(TOOLS)]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_top_is_a_stable_sort(n, m, data):
    scores = np.array(data.draw(st.lists(st.lists(st.sampled_from([0, .5, 1, -2]), min_size=m, max_size=m), min_size=n, max_size=n)), float)
    k = data.draw(st.integers(1, m))
    assert top(scores, k).tolist() == [sorted(range(m), key=lambda j: (-row[j], j))[:k] for row in scores]


@pytest.mark.parametrize('retriever', RETRIEVERS.values(), ids=RETRIEVERS)
def test_the_named_tool_comes_first(retriever):
    keys = list(TOOLS)
    ranked, scores = retriever().fit([tool_document(t) for t in TOOLS.values()]).rank([s.query for s in SAMPLES], 5)
    assert [keys[i] for i in ranked[:, 0]] == [s.tool_ids[0] for s in SAMPLES]
    assert (np.diff(scores) <= 0).all() and ranked.shape == scores.shape == (80, 5)


def bm25_by_definition(query, documents, k1=1.5, b=0.75):
    "Lucene's BM25 of each document: idf·tf/(tf + k1·(1 − b + b·length/mean length)), summed over the query's words"
    docs = [Counter(tokens(d)) for d in documents]
    mean = sum(d.total() for d in docs)/len(docs)
    def one(d):
        parts = [(np.log(1 + (len(docs) - n + .5)/(n + .5)), d[w]) for w in tokens(query) if (n := sum(w in x for x in docs))]
        return sum(idf*tf/(tf + k1*(1 - b + b*d.total()/mean)) for idf, tf in parts)
    return [one(d) for d in docs]


SENTENCES = st.lists(st.sampled_from('a b c kettle Lamp'.split()), max_size=6).map(' '.join)


@settings(deadline=None, max_examples=60)
@given(st.lists(SENTENCES, min_size=2, max_size=8).filter(any), SENTENCES)
def test_bm25_by_its_definition(documents, query):
    np.testing.assert_allclose(BM25().fit(documents).score([query])[0], bm25_by_definition(query, documents), atol=1e-9)


def test_nearest_by_sklearn():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 8)), rng.normal(size=(700, 8))
    ranked, scores = Nearest().fit(x).rank(y, 3)
    cosine = cosine_similarity(y, x)
    np.testing.assert_allclose(scores, -np.sort(-cosine)[:, :3], atol=1e-6)
    assert (ranked == np.argsort(-cosine, kind='stable')[:, :3]).all()


def test_texts_are_embedded_where_asked():
    embed = lambda texts: np.array([[len(t), 1] for t in texts])
    assert Nearest(embed).fit(['a', 'a'*100]).rank(['b'*50, 'c'], 1)[0].tolist() == [[1], [0]]
    assert Nearest().fit([[0, 0], [1, 0]]).rank([[0, 0], [2, 0]], 2)[0].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize('make', [BM25, TfIdf, lambda: Nearest(lambda texts: np.array([[len(t), t.count('e'), 1] for t in texts]))], ids=['bm25', 'tfidf', 'nearest'])
def test_a_ranking_does_not_depend_on_what_is_asked_with_it(make):
    documents, queries = [tool_document(t) for t in TOOLS.values()], [s.query for s in SAMPLES]
    r = make().fit(documents)
    whole = r.rank(queries, 7)
    for block in (1, 3, 1000):
        for a, b in zip(whole, r.rank(queries, 7, block)): assert np.array_equal(a, b)
    for a, b in zip(whole, r.rank(queries[11:12], 7)): assert np.array_equal(a[11:12], b)
    twice = make().fit(documents*2)
    ranked, scores = twice.rank(queries, 2)
    assert (ranked[:, 1] == ranked[:, 0] + len(documents)).all() or (scores[:, 0] == scores[:, 1]).all()
    assert (ranked[:, 0] < len(documents)).all()


SAME = '''
import hashlib
from test_retrieval import *
found = [(c.id, c.candidates) for make in (BM25, TfIdf) for c in with_candidates(SAMPLES, TOOLS, make(), 5, 'always', seed=3)]
print(hashlib.sha256(repr(found).encode()).hexdigest())
'''


def test_identical_and_silent_across_processes_and_hash_seeds():
    def run(seed):
        env = os.environ | dict(PYTHONHASHSEED=seed, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests'), os.environ.get('PYTHONPATH', '')]))
        return subprocess.run([sys.executable, '-c', SAME], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    runs = [run(s) for s in ('0', '1', '99')]
    assert len({r.stdout for r in runs}) == 1 and len(runs[0].stdout.split()) == 1 and [r.stderr for r in runs] == ['']*3


def test_import_leaves_the_heavy_libraries_alone():
    code = "import sys, sage_paper.retrieval; print(sorted({'sklearn', 'bm25s', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == '[]'


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_measures_agree_with_sklearn(n, m, seed):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(m, dtype=float), (n, 1)), axis=1)   # no ties, which sklearn averages
    gold = rng.random((n, m)) < .4
    gold[np.arange(n), rng.integers(m, size=n)] = True
    ranked, relevant = top(scores, m), [set(np.flatnonzero(g)) for g in gold]
    for k in (1, 2, m, None):
        for i in range(n): assert ndcg(ranked, relevant, k)[i] == pytest.approx(ndcg_score(gold[i:i + 1], scores[i:i + 1], k=k))
    one = rng.integers(m, size=n)
    if m > 2:
        for k in range(1, m): assert top_k(ranked, [{j} for j in one], k).mean() == pytest.approx(top_k_accuracy_score(one, scores, k=k, labels=range(m)))
    single = np.eye(m, dtype=bool)[one]
    assert reciprocal_rank(ranked, [{j} for j in one]).mean() == pytest.approx(label_ranking_average_precision_score(single, scores))
    assert recall_at(ranked, relevant, m).tolist() == [1]*n == top_k(ranked, relevant, m).tolist()


def test_what_is_not_ranked_is_not_found():
    assert hits([[1, 2]], [{3}]).tolist() == [[False, False]]
    assert ndcg([[1, 2]], [{3}])[0] == reciprocal_rank([[1, 2]], [{3}])[0] == 0
    assert ndcg([[1]], [{1, 2, 3}])[0] == 1   # as sklearn's: the ideal is cut at the same rank
    assert recall_at([['a', 'b']], [['b', 'c']], 2)[0] == .5


def test_copied_answers_are_those_of_the_query_itself():
    assert copy_nearest(SAMPLES, SAMPLES, TfIdf()) == [s.calls for s in SAMPLES]
    assert copy_nearest([SAMPLES[0]], [replace(SAMPLES[0], calls=())], BM25()) == [()]


@pytest.mark.parametrize('k', [1, 3, 10])
@pytest.mark.parametrize('gold', ['as found', 'always'])
def test_candidates_are_k_different_tools(k, gold):
    for s in with_candidates(SAMPLES, TOOLS, BM25(), k, gold):
        assert len(set(s.candidates)) == len(s.candidates) == k and set(s.candidates) <= set(TOOLS)
        assert gold == 'as found' or s.tool_ids[0] in s.candidates


def hard():
    "Samples whose tool no word of the query names"
    return [replace(s, query='please dim something', tool_ids=('train_order',), calls=(ToolCall('train_order'),)) for s in SAMPLES*5]


def test_position_tells_nothing():
    easy = [replace(s, id=f'{s.id}/{i}') for i in range(5) for s in SAMPLES]
    never = [replace(s, id=f'{i}') for i, s in enumerate(hard())]
    for samples in (easy, never):
        at = Counter(s.candidates.index(s.tool_ids[0]) for s in with_candidates(samples, TOOLS, BM25(), 4, 'always'))
        chi2 = sum((at[j] - 100)**2/100 for j in range(4))
        assert sum(at.values()) == 400 and chi2 < 16.3   # 0.999 quantile of χ² with 3 degrees of freedom


def test_only_the_lowest_ranked_give_way():
    s = replace(SAMPLES[0], tool_ids=('train_order', 'kettle_start'))
    found, always = (with_candidates([s], TOOLS, BM25(), 5, g)[0].candidates for g in ('as found', 'always'))
    ranked, _ = BM25().fit([tool_document(t) for t in TOOLS.values()]).rank([s.query], 5)
    best = [list(TOOLS)[j] for j in ranked[0]]
    assert set(found) == set(best) and best[0] == 'kettle_start'
    assert set(always) == set(best[:4]) | {'train_order'}


def test_recall_is_counted_over_what_is_needed():
    samples = with_candidates(SAMPLES + hard(), TOOLS, BM25(), 3) + [Sample('none', 'Hello', (), candidates=('kettle_start',))]
    assert candidate_recall(samples, TOOLS) == pytest.approx(80/480)
    assert candidate_recall(with_candidates(hard(), TOOLS, BM25(), 3, 'always'), TOOLS) == 1


def test_matching_stays_among_the_candidates():
    samples = with_candidates(SAMPLES, TOOLS, TfIdf(), 4)
    assert match_documents(samples, TOOLS, TfIdf(), block=7) == [s.calls for s in SAMPLES]
    others = [replace(s, candidates=tuple(c for c in s.candidates if c not in s.tool_ids)) for s in samples]
    assert all(calls[0].name in s.candidates for calls, s in zip(match_documents(others, TOOLS, TfIdf()), others))


def test_tools_of_one_name_are_kept_apart():
    tools = {'kettle': Tool('kettle', 'Boils water'), 'kettle#2': Tool('kettle', 'Plays a drum')}
    s = Sample('0', 'play the drum', (ToolCall('kettle'),), tool_ids=('kettle#2',))
    assert with_candidates([s], tools, BM25(), 1)[0].candidates == ('kettle#2',)
    assert match_documents([s], tools, BM25()) == [(ToolCall('kettle'),)]
