"Reinforcement learning: what is killed goes on as if nothing had happened, what breaks is kept, and all methods meet the same queries"
import json, signal, subprocess, sys, time
from dataclasses import replace

import numpy as np, pytest, torch

import sage_paper.reward
from conftest import ROOT
from sage_paper.assets import AssetError
from sage_paper.calls import format_calls
from sage_paper.challenge_runs import CHALLENGES_VERSION
from sage_paper.client import LocalClient
from sage_paper.config import SettingsError, load_settings
from sage_paper.continual_runs import read_choice
from sage_paper.dpo import DPOLearner
from sage_paper.grpo import GRPOLearner
from sage_paper.model import encode, tiny_lm
from sage_paper.policy import PPOLearner
from sage_paper.ppo import KLPrice
from sage_paper.practice import BestAnswers, Demonstrations, practise, two_minded
from sage_paper.preferences import ModelledPPO, ranked_pairs
from sage_paper.queries import sageworld_set
from sage_paper.records import experiment_records, record_key, runs_dir
from sage_paper.rl_runs import ACTING, SUPERVISED, grounds, rl_choices, rl_records, rl_spec, rl_specs, rl_tuning_specs, start_spec, transfer_set, transferred
from sage_paper.rollouts import act, judged, summary
from sage_paper.world import make_world


def shown(toy): return encode(toy.queries, toy.client.lm.tokenizer)


LEARNERS = dict(
    more=lambda toy: Demonstrations(toy.client.lm, shown(toy), 1e-3, 3, 4, 4),
    best=lambda toy: BestAnswers(toy, shown(toy)[:1], 1e-3, 3, 4, 4),
    ppo=lambda toy: PPOLearner(toy, 1e-4, KLPrice(0.05, target=0.5, horizon=100), minibatch=12, at_once=8, warm=3),
    ppo_model=lambda toy: ModelledPPO(toy, 1e-4, KLPrice(0.05), 1e-3, 1, pairs=3, model_batch=4, minibatch=12),
    dpo=lambda toy: DPOLearner(toy, 1e-4, pairs=3, batch_size=4, warm=3),
    dpo_nll=lambda toy: DPOLearner(toy, 1e-4, nll_weight=1., pairs=3, passes=2, batch_size=4),
    grpo=lambda toy: GRPOLearner(toy, 1e-4, 12, at_once=6, passes=2, warm=3),
)


def learner_of(method):
    toy = two_minded()
    toy.queries *= 4   # a reward model holds a round out
    return LEARNERS[method](toy)


def state_of(learner): return torch.cat([p.detach().flatten() for p in learner.lm.model.parameters()])


def timeless(rows): return [{k: v for k, v in r.items() if k != 'seconds'} for r in rows]


class Plug(Exception): "pulled"


def pull(learner, at):
    "Let a learner's round fail, half done"
    whole = learner.round

    def round_(k):
        if k == at:
            with torch.no_grad(): next(learner.lm.model.parameters()).add_(1.)
            raise Plug
        return whole(k)
    learner.round = round_


def test_every_method_is_tried(): assert {*LEARNERS, 'gold'} == {*ACTING, *SUPERVISED} | {'gold'}


@pytest.mark.parametrize('method', LEARNERS)
def test_what_is_interrupted_ends_as_if_it_had_not_been(method, tmp_path):
    def ask(learner): return lambda: dict(weight=float(state_of(learner).norm()))
    straight = learner_of(method)
    expected = practise(straight, 4, ask(straight), 2)
    for at in (1, 3):
        stopped = learner_of(method)
        pull(stopped, at)
        with pytest.raises(Plug): practise(stopped, 4, ask(stopped), 2, tmp_path/method)
    again = learner_of(method)
    found = practise(again, 4, ask(again), 2, tmp_path/method)
    assert timeless(found['log']) == timeless(expected['log']) and timeless(found['points']) == timeless(expected['points'])
    assert torch.equal(state_of(again), state_of(straight))
    assert not (tmp_path/method).exists()


SCRIPT = '''
import sys
sys.path.insert(0, sys.argv[1])
from test_rl import learner_of, practise, state_of, timeless
import json
learner = learner_of('best')
done = practise(learner, 4, lambda: {}, 1, sys.argv[2])
print(json.dumps([timeless(done['log']), float(state_of(learner).double().sum())]))
'''


def test_a_process_that_is_killed_goes_on(tmp_path):
    def start(path): return subprocess.Popen([sys.executable, '-c', SCRIPT, str(ROOT/'tests'), str(path)], stdout=subprocess.PIPE, text=True)
    first, path = start(tmp_path/'run'), tmp_path/'run'
    while first.poll() is None and not path.exists(): time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.returncode == -signal.SIGKILL and path.exists()
    second, whole = start(path), learner_of('best')
    log = timeless(practise(whole, 4, lambda: {}, 1)['log'])
    assert json.loads(second.communicate()[0]) == json.loads(json.dumps([log, float(state_of(whole).double().sum())]))


def test_all_methods_meet_the_same_queries_in_the_same_order():
    seen = {}
    for method in ('ppo', 'dpo', 'grpo', 'best'):
        learner = learner_of(method)
        seen[method] = [[q.id for q in learner.practice.queries_of(k)] for k in range(5)]
    assert len({json.dumps(x) for x in seen.values()}) == 1


def test_a_pass_asks_every_query_once():
    toy = two_minded(n_queries=4)
    toy.n_queries = 3
    asked = [q.id for k in range(4) for q in toy.queries_of(k)]
    assert all(sorted(asked[i:i + 4]) == sorted(s.id for s in toy.queries) for i in (0, 4, 8))


@pytest.mark.parametrize('jobs', [1, 3])
def test_plans_are_judged_alike_by_any_number_of_processes(jobs):
    plans, world = sageworld_set(0, 31, 'planning', 200).splits['test'], make_world()
    said = [[format_calls(s.calls), format_calls(s.calls[:1]), 'no'][:1 + k%3] for k, s in enumerate(plans)]
    found = judged(world, plans, said, jobs)
    assert [len(f) for f in found] == [len(t) for t in said]
    assert all(f[0].total == pytest.approx(1) and all(r.total < 1 for r in f[1:]) for f in found)


def test_an_answer_that_breaks_the_executor_is_kept_as_unreadable(monkeypatch):
    toy, kept = two_minded(n_answers=8), sage_paper.reward.same_end_state
    before = toy.act(0)

    def breaks(gold, predicted):
        if predicted.calls != gold.calls: raise RecursionError('deep')
        return kept(gold, predicted)
    monkeypatch.setattr(sage_paper.reward, 'same_end_state', breaks)
    after = toy.act(0)
    broken = [e for e in after if 'RecursionError' in e.reward.error]
    assert broken and all(e.reward.total == -1 for e in broken) and len(after) == len(before)
    assert summary(after)['failed'] > summary(before)['failed']


def test_what_is_drawn_does_not_depend_on_the_batch():
    toy = two_minded()
    client, queries = toy.client, list(toy.queries)
    whole = client.generate(queries, 3, 1.3, 60, seed=5)
    few = LocalClient(client.lm, batch_size=2).generate(queries, 3, 1.3, 60, seed=5)
    assert [[c.ids for c in x] for x in whole] == [[c.ids for c in x] for x in few]
    lengths = {len(c.ids) for x in whole for c in x}
    assert len(lengths) > 1   # so that some rows were left out on the way


def test_frequencies_of_what_is_drawn_are_the_probabilities():
    lm, asked = tiny_lm(), [replace(two_minded().queries[0], query='Hm')]
    n, drawn = 4000, LocalClient(tiny_lm()).generate(asked, 4000, 1., 1, seed=1)[0]
    from sage_paper.model import Encoded, forward
    batch = lm.collate([Encoded((*drawn[0].prompt_ids, 0), len(drawn[0].prompt_ids), 0)])
    with torch.no_grad(): p = forward(lm, batch).logits[0].softmax(-1).numpy()
    found = np.bincount([c.ids[0] for c in drawn], minlength=len(p))/n
    assert np.abs(found - p).max() < 5*np.sqrt(p.max()/n)


def test_pairs_are_ranked_and_never_of_equals():
    toy = two_minded(n_answers=8)
    episodes = toy.act(0)
    worth = {(e.sample.id, e.completion.ids): e.reward.total for e in episodes}
    pairs = ranked_pairs(episodes, 0.2, 4)
    assert pairs
    for p in pairs: assert p.margin == pytest.approx(worth[p.sample.id, p.chosen.ids] - worth[p.sample.id, p.rejected.ids]) and p.margin >= 0.2


def test_queries_that_are_held_out_are_not_among_those_that_are_learnt_from():
    s = load_settings('rl', 'paper')
    start = start_spec(s, 0)
    report, tuning = (grounds(start['n_tools'], start['demonstrations'], s.practice, s.test_per_set, split) for split in ('report', 'tuning'))
    learnt = {q.query.lower() for q in (*report.demonstrations, *report.practice)}
    held = [{q.query.lower() for x in g.test.values() for q in x} for g in (report, tuning)]
    assert not learnt & (held[0] | held[1]) and not held[0] & held[1]
    assert [len(x) for x in report.test.values()] == [s.test_per_set]*3 and len(report.practice) == sum(s.practice)


def test_the_papers_start_is_a_run_of_the_three_challenges_but_for_its_demonstrations():
    s = load_settings('rl', 'paper')
    have = {p.stem for p in runs_dir(ROOT, 'challenges', 'paper').glob('*.json')}
    starts = [start_spec(s, seed) for seed in s.seeds]
    assert all((x.pop('demonstrations'), x.pop('repeats')) == (s.start_demonstrations, s.start_repeats) for x in starts)
    assert all(record_key('challenges', CHALLENGES_VERSION, x) in have for x in starts)


def test_the_choices_are_the_ones_found():
    s, found = load_settings('rl', 'paper'), [json.loads(p.read_text()) for p in sorted((ROOT/'runs/rl_tuning/paper').glob('*.json'))]
    assert {json.dumps(r['spec'], sort_keys=True) for r in found} == {json.dumps(x, sort_keys=True) for x in rl_tuning_specs(s)}
    assert rl_choices(found) == {name: tuple(rest) for name, *rest in map(read_choice, s.chosen)}


def test_a_method_without_a_rate_is_named():
    with pytest.raises(SettingsError, match='no rate is chosen for gold'): load_settings('rl', 'paper', methods='gold more')


def test_a_description_names_what_a_method_uses_and_nothing_else():
    s = load_settings('rl', 'paper')
    specs = {x['method']: x for x in rl_specs(s) if x['seed'] == s.seeds[0]}
    assert 'minibatch' in specs['ppo'] and 'minibatch' not in specs['dpo_nll'] and 'steps' in specs['more'] and 'steps' not in specs['ppo']
    assert not {'executors', 'checkpoint_seconds', 'jobs', 'methods', 'grid', 'chosen'} & {k for x in specs.values() for k in x}
    assert rl_spec(replace(s, executors=9, checkpoint_seconds=1.), 'ppo', 0) == specs['ppo'] != rl_spec(replace(s, passes=9), 'ppo', 0)


@pytest.mark.parametrize('name', ['bfcl', 'api-bank'])
def test_right_answers_to_other_sets_count_as_right(name):
    try: samples, tools = transfer_set(name, 60)
    except AssetError as e:
        if 'download' not in str(e): raise
        pytest.skip(f'{name} cannot be had: {str(e).splitlines()[0]}')
    right = [transferred(name, s, format_calls(s.calls)) for s in samples]
    assert np.mean(right) > 0.95 and all(c in tools for s in samples for c in s.candidates)
    assert not any(transferred(name, s, 'I would rather not') for s in samples if s.calls)
