"Judges of whether a tool is needed: thresholds, rules, a model asked, a classifier, and a cascade"
import numpy as np, pytest
from hypothesis import given, strategies as st

from sage_paper.calls import Sample, ToolCall
from sage_paper.judges import QUESTION, EmbeddingJudge, HybridJudge, Judge, LMJudge, RuleJudge, best_threshold, log_likelihood, rules_met, sure_from, yes_no_prompt
from sage_paper.model import embed, tiny_lm
from sage_paper.queries import sageworld_set
from sage_paper.retrieval import with_candidates, BM25

LM = tiny_lm()
WORLD = sageworld_set(80, 40, 'timing', 60)
TRAIN, TEST = WORLD.splits['train'], WORLD.splits['test']
NEEDED = np.array([bool(s.calls) for s in TRAIN])
SCORES = st.sampled_from([-np.inf, -1., 0., .25, .5, 3., np.inf])


def sample(query, needed=False): return Sample(query, query, (ToolCall('t'),)*bool(needed))


def accuracy(judge, samples): return np.mean(judge.decide(samples) == [bool(s.calls) for s in samples])


def one_by_one(scores, needed):
    "The threshold by trying each level on all samples, as it is defined"
    scores, needed = np.asarray(scores, float), np.asarray(needed, bool)
    levels = np.r_[np.unique(scores), np.inf]
    return float(levels[np.argmax([((scores >= t) == needed).sum() for t in levels])])


@given(st.lists(st.tuples(SCORES, st.booleans())))
def test_the_threshold_is_what_trying_all_finds(pairs):
    scores, needed = [x for x, _ in pairs], [y for _, y in pairs]
    assert best_threshold(scores, needed) == one_by_one(scores, needed)


def test_a_million_scores_are_no_trouble():
    rng = np.random.default_rng(0)
    scores = rng.random(1_000_000)
    assert best_threshold(scores, scores >= .25) == scores[scores >= .25].min()


def test_a_threshold_refuses_what_is_not_a_number():
    with pytest.raises(ValueError, match='2 of 3 scores are NaN'): best_threshold([np.nan, 1, np.nan], [True]*3)


@given(st.lists(st.tuples(SCORES.filter(np.isfinite), st.booleans())), st.floats(0, 1))
def test_sure_begins_at_the_first_level_that_is_right_often_enough(pairs, confidence):
    scores, right = np.array([x for x, _ in pairs]), np.array([y for _, y in pairs], bool)
    good = [t for t in np.unique(scores) if (right[scores >= t].sum() + 1)/((scores >= t).sum() + 2) >= confidence]
    assert sure_from(scores, right, confidence) == min(good, default=np.inf)


@pytest.mark.parametrize('query, needed', [('Rename wine list 3 to "Autumn"', True), ('could you please book a table for four tonight', True), ('Hello there, how are you?', False),
                                           ('Why do cats purr?', False), ('Write a poem about trains', False), ('Don’t bother, I already called.', False)])
def test_rules_are_right_where_words_say_it_all(query, needed): assert RuleJudge().decide([sample(query)])[0] == needed


@given(st.text())
def test_any_text_has_a_score_within_the_rules_number(text):
    assert len(set(rules_met(text))) == len(rules_met(text)) and -6 <= RuleJudge().score([sample(text)])[0] <= 4


def judges():
    vectors = lambda texts: embed(LM, texts)
    return [RuleJudge(), LMJudge(LM), EmbeddingJudge(vectors), HybridJudge(EmbeddingJudge(vectors)), HybridJudge(LMJudge(LM), confidence=.5)]


@pytest.mark.parametrize('judge', judges(), ids=lambda j: type(j).__name__)
def test_every_judge_keeps_to_the_interface(judge):
    assert judge.fit(TRAIN) is judge
    scores, verdicts = judge.score(TEST), judge.decide(TEST)
    assert scores.shape == (len(TEST),) and np.isfinite(scores).all() and verdicts.dtype == bool
    assert (verdicts == (scores >= judge.threshold)).all() and judge.score([]).shape == (0,)
    hidden = [Sample(s.id, s.query, (), s.candidates) for s in TEST]   # the calls are what is asked for
    assert (judge.decide(hidden) == verdicts).all()
    assert accuracy(judge, TRAIN) >= max(NEEDED.mean(), 1 - NEEDED.mean()) - .03


def test_fitting_needs_samples_and_for_a_classifier_both_kinds():
    with pytest.raises(ValueError, match='no samples'): RuleJudge().fit([])
    with pytest.raises(ValueError, match='2 of 2 samples need a call'): EmbeddingJudge(lambda t: embed(LM, t)).fit([sample('a', True), sample('b', True)])


def test_a_models_score_is_the_difference_of_its_own_log_probabilities():
    import torch
    prompt = yes_no_prompt(TEST[0], LM.tokenizer)
    assert QUESTION in prompt and TEST[0].query in prompt
    def logp(answer):
        ids = torch.tensor([LM.tokenizer(prompt + answer, add_special_tokens=False)['input_ids']])
        n = len(LM.tokenizer(answer, add_special_tokens=False)['input_ids'])
        with torch.no_grad(): lines = LM.model(ids).logits[0].log_softmax(-1)
        return sum(lines[t - 1, ids[0, t]].item() for t in range(ids.shape[1] - n, ids.shape[1]))
    assert LMJudge(LM).score(TEST[:3])[0] == pytest.approx(logp('Yes') - logp('No'), abs=1e-4)


def test_a_score_does_not_depend_on_the_company():
    whole = LMJudge(LM, batch_size=7).score(TEST)
    assert whole == pytest.approx([LMJudge(LM).score([s])[0] for s in TEST], abs=1e-4)
    assert (log_likelihood(LM, ['a', 'b'], 'Yes') < 0).all()


def test_candidates_are_shown_to_the_model():
    given_ = with_candidates(TEST[:2], WORLD.tools, BM25(), 3)
    prompt = yes_no_prompt(given_[0], LM.tokenizer, WORLD.tools)
    assert all(f'{k}(' in prompt for k in given_[0].candidates)
    with pytest.raises(ValueError, match='no tool is known'): LMJudge(LM).score(given_)


def test_the_default_model_answers_in_single_tokens(smollm):
    for word in ('Yes', 'No'): assert len(smollm.tokenizer(word, add_special_tokens=False)['input_ids']) == 1
    scores = LMJudge(smollm).score([sample('Good morning!'), sample('Send an e-mail to Ada')])
    assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_a_classifier_learns_what_vectors_hold():
    rng = np.random.default_rng(0)
    kinds = dict(zip(map(str, range(60)), rng.random(60) < .5))
    vectors = lambda texts: np.array([[1. if kinds[t] else -1.] + list(np.random.default_rng(int(t)).normal(size=4)) for t in texts])
    samples = [sample(t, kinds[t]) for t in kinds]
    assert accuracy(EmbeddingJudge(vectors).fit(samples[:40]), samples[40:]) == 1


class Fixed(Judge):
    "Scores that stand in the query, and which queries were asked"
    def __init__(self): self.seen = []
    def score(self, samples):
        self.seen += [s.query for s in samples]
        return np.array([float(s.query.split()[self.at]) for s in samples])


class First(Fixed): at = 0
class Second(Fixed): at = 1


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), min_size=1), st.floats(0, 1))
def test_a_cascade_asks_the_second_only_where_the_first_is_not_sure(rows, confidence):
    samples, first, second = [sample(f'{a} {b}', y) for a, b, y in rows], First(), Second()
    judge = HybridJudge(second, first, confidence).fit(samples)
    verdicts, sure = judge.decide(samples), judge.sure(first.score(samples))
    second.seen.clear()
    scores = judge.score(samples)
    assert second.seen == [s.query for s, x in zip(samples, sure) if x == 0]
    assert (verdicts[sure == 1]).all() and not verdicts[sure == -1].any()
    for s, x, v in zip(samples, sure, verdicts):
        if x == 0: assert v == (float(s.query.split()[1]) >= second.threshold)
    assert np.isfinite(scores).all() and (np.abs(scores[sure == 0]) <= 1).all()


def test_a_cascade_is_as_right_as_it_asks_for_where_it_is_sure():
    rng = np.random.default_rng(0)
    first = rng.integers(-3, 4, 2000)
    needed = rng.random(2000) < 1/(1 + np.exp(-1.5*first))
    samples = [sample(f'{a} 0', y) for a, y in zip(first, needed)]
    judge = HybridJudge(Second(), First(), .95).fit(samples[:1000])
    assert -3 <= judge.low < judge.high <= 3
    sure = judge.sure(first[1000:])
    assert .3 < (sure != 0).mean() < 1 and ((sure > 0) == needed[1000:])[sure != 0].mean() > .93
    with pytest.raises(ValueError, match='confidence'): HybridJudge(Second(), confidence=1.5)
