"PPO: advantages by their definition, padding that counts for nothing, a clip that takes gradients away, a price that finds its level"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from sage_paper.ppo import PPO, KLPrice, Rollouts, advantages, masked_mean, policy_loss, token_rewards, value_loss, whitened

SEEDS = st.integers(0, 2**31)


def some(seed, n=5, T=7, full=False):
    "Rollouts of different lengths"
    g = torch.Generator().manual_seed(seed)
    length = torch.full((n,), T) if full else torch.randint(1, T + 1, (n,), generator=g)
    mask = torch.arange(T) < length[:, None]
    logp, ref, value = (torch.randn(n, T, generator=g, dtype=torch.double) for _ in range(3))
    return Rollouts(-logp.abs(), -ref.abs(), value, mask, torch.randn(n, generator=g, dtype=torch.double))


def by_definition(rewards, value, mask, gamma, lam):
    "Sum over the steps ahead of (gamma*lam)^k times the surprise k steps ahead"
    out = torch.zeros_like(value)
    for i, n in enumerate(mask.sum(1).tolist()):
        after = [*value[i, 1:n].tolist(), 0.]
        delta = [rewards[i, t].item() + gamma*after[t] - value[i, t].item() for t in range(n)]
        for t in range(n): out[i, t] = sum((gamma*lam)**k*delta[t + k] for k in range(n - t))
    return out


@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_advantages_are_what_they_are_defined_as(seed, gamma, lam):
    r = some(seed)
    rewards = token_rewards(r, 0.3)
    found, returns = advantages(rewards, r.value, r.mask, gamma, lam)
    torch.testing.assert_close(found, by_definition(rewards, r.value, r.mask, gamma, lam))
    torch.testing.assert_close(returns, (found + r.value)*r.mask)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_with_lambda_1_a_return_is_what_came(seed):
    r = some(seed)
    rewards = token_rewards(r, 0.)
    torch.testing.assert_close(advantages(rewards, r.value, r.mask, lam=1.)[1], r.reward[:, None]*r.mask)


@given(SEEDS, st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_the_reward_is_paid_once_and_leaving_has_its_price(seed, beta):
    r = some(seed)
    paid = token_rewards(r, beta)
    torch.testing.assert_close(paid.sum(1), r.reward - beta*((r.logp - r.ref)*r.mask).sum(1))
    assert (paid[~r.mask] == 0).all()


def padded(r, k, fill):
    "The same rollouts with k more columns of nonsense"
    more = lambda x: torch.cat([x, torch.full((len(x), k), fill, dtype=x.dtype)], 1)
    return Rollouts(more(r.logp), more(r.ref), more(r.value), torch.cat([r.mask, torch.zeros(len(r.mask), k, dtype=torch.bool)], 1), r.reward)


@given(SEEDS, st.integers(1, 4), st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_padding_counts_for_nothing(seed, k, fill):
    def all_of(r):
        a, ret = advantages(token_rewards(r, 0.1), r.value, r.mask)
        a, g = whitened(a, r.mask), torch.Generator().manual_seed(1)
        now = r.logp[:, :7] + 0.3*torch.randn(5, 7, generator=g, dtype=torch.double)
        now = torch.cat([now, r.logp[:, 7:]], 1)
        return *policy_loss(now, r.logp, a, r.mask), *value_loss(now, r.value, ret, r.mask), a[:, :7], ret[:, :7]
    for x, y in zip(all_of(some(seed)), all_of(padded(some(seed), k, fill))): torch.testing.assert_close(x, y)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_at_the_first_step_the_gradient_is_the_policy_gradient(seed):
    r = some(seed)
    a, logp = whitened(r.value, r.mask), r.logp.clone().requires_grad_()
    loss, clipped = policy_loss(logp, r.logp, a, r.mask)
    loss.backward()
    torch.testing.assert_close(logp.grad, -a*r.mask/r.mask.sum())
    assert clipped == 0


@pytest.mark.parametrize('ratio,advantage,moves', [(1.5, 1., False), (1.5, -1., True), (0.5, 1., True), (0.5, -1., False), (1.1, 1., True), (0.9, -1., True)])
def test_only_what_goes_further_the_same_way_is_clipped(ratio, advantage, moves):
    logp = torch.tensor([[np.log(ratio)]], requires_grad=True)
    loss, clipped = policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), 0.2)
    loss.backward()
    assert (logp.grad.item() != 0) == moves == (clipped.item() == 0)


@given(SEEDS, st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_the_values_loss_is_never_less_than_the_plain_one(seed, clip):
    r = some(seed)
    now = r.value + torch.randn(r.value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    assert value_loss(now, r.value, r.ref, r.mask, clip)[0] >= masked_mean((now - r.ref)**2, r.mask)/2 - 1e-12


def test_a_single_token_is_whitened_to_nothing():
    assert whitened(torch.tensor([[3.]]), torch.ones(1, 1)).item() == 0


def test_the_price_finds_the_divergence_that_is_asked_for():
    "Where the divergence is inversely proportional to the price, as it nearly is for a Gibbs policy"
    price = KLPrice(1., target=2., horizon=100)
    for _ in range(2000): price.update(6/price.beta, 10)
    assert 6/price.beta == pytest.approx(2., rel=0.01)


def table(seed=0, n=64, T=3, actions=4):
    "A policy that is a table, and rollouts of it"
    g = torch.Generator().manual_seed(seed)
    logits, value = torch.zeros(T, actions, requires_grad=True), torch.zeros(T, requires_grad=True)
    said = torch.randint(0, actions, (n, T), generator=g)
    def evaluate(k):
        now = logits.log_softmax(1)
        return now[torch.arange(T), said[k]], value.expand(len(k), T), -(now.exp()*now).sum(1).expand(len(k), T)
    logp, v, _ = (x.detach().clone() for x in evaluate(torch.arange(n)))
    return logits, value, evaluate, Rollouts(logp, logp, v, torch.ones(n, T, dtype=torch.bool), (said == 0).float().mean(1))


def learnt(passes=4, clip=0.2, minibatch=16, lr=0.1, seed=0):
    logits, value, evaluate, r = table()
    ppo = PPO([logits, value], torch.optim.SGD([logits, value], lr=lr), KLPrice(0.), clip=clip, passes=passes, minibatch=minibatch, seed=seed, max_norm=1e9)
    log = ppo.update(r, evaluate)
    return logits.detach(), log


def test_the_same_seed_learns_the_same(): assert (learnt()[0] == learnt()[0]).all() and learnt()[1] == learnt()[1]


def test_a_clip_keeps_the_policy_near():
    far, near = (learnt(passes=60, clip=c, lr=1.)[1] for c in (1e9, 0.2))
    assert near['moved'] < 0.25*far['moved'] and near['clipped'] > 0 == far['clipped']


def test_what_was_good_becomes_likelier():
    probability = learnt(passes=20)[0].softmax(1)
    assert (probability[:, 0] > 0.3).all() and (probability.argmax(1) == 0).all()


def test_what_is_logged():
    log = learnt()[1]
    assert set(log) == {'policy_loss', 'value_loss', 'entropy', 'clipped', 'clipped_value', 'moved', 'kl', 'beta', 'reward', 'explained'}
    assert log['kl'] == 0 and log['entropy'] == pytest.approx(np.log(4), abs=0.01) and all(np.isfinite(v) for v in log.values())


def test_nothing_to_explain_is_no_number():
    logits, value, evaluate, r = table()
    ppo = PPO([logits, value], torch.optim.SGD([logits, value], lr=0.1), KLPrice(0.), lam=1.)
    assert np.isnan(ppo.update(r._replace(reward=torch.ones(64)), evaluate)['explained'])
