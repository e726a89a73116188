"PPO against TRL 1.12.0, the last to have it: the same token rewards, advantages, returns, losses and clipped parts, step by step of its own training"
import sys

import numpy as np, pytest, torch

from sage_paper.ppo import Rollouts, advantages, masked_mean, policy_loss, token_rewards, value_loss, whitened

trl = pytest.importorskip('trl', reason='needs trl 1.12.0')
if not trl.__version__.startswith('1.12.'): pytest.skip(f'needs trl 1.12.0; {trl.__version__} is installed, and later ones have no PPO', allow_module_level=True)
pytest.importorskip('datasets', reason='needs datasets')
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

KEPT = ('logprobs', 'ref_logprobs', 'values', 'scores', 'rewards', 'advantages', 'returns', 'padding_mask',
        'mb_advantage', 'mb_logprobs', 'mb_values', 'mb_return', 'new_logprobs', 'vpred', 'pg_loss', 'vf_loss', 'vf_clipfrac')
# Where an answer is shorter than the others TRL puts its reward one token behind it, and counts that token among the values;
# ours comes with the last one. So all answers here are of one length: the seed is one with which no padding is drawn.
VOCABULARY, GAMMA, LAM, CLIP, BETA = 200, 0.97, 0.9, 0.03, 0.2


def a_model(cls, seed, **kw):
    torch.manual_seed(seed)
    return cls(LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                           pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=0.3, **kw))


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    "What TRL's training holds at each of its steps"
    names = {f't{k}': k for k in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(names, unk_token='t1')), pad_token='t0', eos_token='t1')
    rng = np.random.default_rng(0)
    prompts = Dataset.from_dict(dict(input_ids=rng.integers(2, VOCABULARY, (16, 4)).tolist()))
    args = PPOConfig(output_dir=str(tmp_path_factory.mktemp('trl')), per_device_train_batch_size=8, gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=3, total_episodes=16,
                     response_length=5, kl_coef=BETA, gamma=GAMMA, lam=LAM, cliprange=CLIP, cliprange_value=CLIP, learning_rate=0.01, num_sample_generations=0, report_to=[], save_strategy='no', use_cpu=True, bf16=False, seed=2)
    seen, mean = [], ppo_trainer.masked_mean
    def listening(values, mask, axis=None):
        there, out = sys._getframe(1).f_locals, mean(values, mask, axis)
        if 'pg_losses2' in there and 'pg_loss' in there:   # the fourth mean of a step, of what is clipped
            seen.append({k: there[k].detach().clone() for k in KEPT} | dict(pg_clipfrac=out))
        return out
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ppo_trainer, 'masked_mean', listening)
        PPOTrainer(args, tokenizer, a_model(LlamaForCausalLM, 0), a_model(LlamaForCausalLM, 1), a_model(LlamaForSequenceClassification, 2, num_labels=1), prompts,
                   a_model(LlamaForSequenceClassification, 3, num_labels=1), eval_dataset=prompts).train()
    return seen


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_it_was_listened_to(steps):
    assert len(steps) == 2*3*2 and steps[0]['logprobs'].shape == (8, 5)   # batches, passes, minibatches
    assert not any(s['padding_mask'].any() for s in steps) and 0 < max(s['pg_clipfrac'] for s in steps) and 0 < max(s['vf_clipfrac'] for s in steps)


def test_token_rewards_advantages_and_returns(steps):
    for s in steps:
        r = Rollouts(s['logprobs'], s['ref_logprobs'], s['values'], ~s['padding_mask'], s['scores'].flatten())
        close(token_rewards(r, BETA), s['rewards'])
        advantage, returns = advantages(s['rewards'], r.value, r.mask, GAMMA, LAM)
        close(whitened(advantage, r.mask), s['advantages'])
        close(returns, s['returns'])


def test_losses_and_clipped_parts(steps):
    every = torch.ones_like(steps[0]['mb_values'])
    for s in steps:
        loss, clipped = policy_loss(s['new_logprobs'], s['mb_logprobs'], s['mb_advantage'], every, CLIP)
        close(loss, s['pg_loss']); close(clipped, s['pg_clipfrac'])
        loss, clipped = value_loss(s['vpred'], s['mb_values'], s['mb_return'], every, CLIP)
        close(loss, s['vf_loss']); close(clipped, s['vf_clipfrac'])


@pytest.mark.parametrize('seed', range(20))
def test_masked_means_and_whitening(seed):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(6, 9, generator=g), torch.rand(6, 9, generator=g) < 0.6
    close(masked_mean(x, mask), ppo_trainer.masked_mean(x, mask))
    close(whitened(x, mask), ppo_trainer.masked_whiten(x, mask)*mask)
