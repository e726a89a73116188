"Ranking by beam search: exact where it is wide, honest where it is narrow"
import numpy as np, pytest

from sage_paper.model import tiny_lm
from sage_paper.queries import sageworld_set
from sage_paper.ranking import NameTree, rank_names, score_names

NASTY = ['a', 'ab', 'abc', 'a b', 'a"b', 'ä', '[]', 'tea_pot', 'tea', 'tea_pots', '工具']
LM = tiny_lm()
QUERIES = list(sageworld_set(0, 6, 'selection', 60).splits['test'])


def exact(query, names):
    scores = score_names(LM, query, names, batch_size=4)
    return [(names[j], scores[j]) for j in np.argsort(-scores)]


@pytest.mark.parametrize('names', [NASTY, NASTY[:1], NASTY[:2], sorted(t.name for t in sageworld_set(0, 3, 'selection', 200).tools.values())])
def test_wide_enough_it_finds_what_trying_all_finds(names):
    tree = NameTree(names, LM.tokenizer)
    for query, found in zip(QUERIES, rank_names(LM, QUERIES, tree, k=len(names), width=len(names), batch_size=4)):
        right = exact(query, names)
        assert [n for n, _ in found] == [n for n, _ in right]
        assert [s for _, s in found] == pytest.approx([s for _, s in right], abs=1e-3)


def test_what_a_narrow_one_finds_has_its_true_probability_and_is_in_order():
    names = sorted(t.name for t in sageworld_set(0, 3, 'selection', 200).tools.values())
    for query, found in zip(QUERIES, rank_names(LM, QUERIES, NameTree(names, LM.tokenizer), k=5, width=3)):
        scores = dict(exact(query, names))
        assert 0 < len(found) <= 5 and len({n for n, _ in found}) == len(found) and [s for _, s in found] == sorted((s for _, s in found), reverse=True)
        assert all(s == pytest.approx(scores[n], abs=1e-3) for n, s in found)


def test_a_query_is_ranked_alike_in_any_company():
    tree = NameTree(NASTY, LM.tokenizer)
    alone = [rank_names(LM, [q], tree)[0] for q in QUERIES]
    for a, b in zip(alone, rank_names(LM, QUERIES, tree, batch_size=3)): assert [n for n, _ in a] == [n for n, _ in b]
    assert rank_names(LM, [], tree) == []
