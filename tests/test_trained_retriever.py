"The trained retriever: pairs, the loss against a naive loop, and whether it finds more than before"
from dataclasses import asdict

import numpy as np, pytest, torch

from sage_paper.calls import Sample, Tool, ToolCall, tool_document
from sage_paper.model import embed, tiny_lm
from sage_paper.queries import sageworld_set
from sage_paper.retrieval import Nearest, gold_keys, recall_at
from sage_paper.trained_retriever import PairTrainer, Texts, pooled, ranking_loss, retrieval_pairs, train_retriever

PLANS = sageworld_set(12, 0, 'planning', 12)


def naive_loss(queries, documents, query_of, tool_of, gold, scale=20.):
    "The loss as a sentence: each query against its own document and those in the batch that it does not need"
    losses = []
    for i, q in enumerate(queries):
        own = torch.cosine_similarity(q, documents[i], dim=0)
        wrong = [torch.cosine_similarity(q, documents[j], dim=0) for j in range(len(documents)) if j != i and tool_of[j] not in gold[query_of[i]]]
        losses.append(torch.stack([own, *wrong]).mul(scale).logsumexp(0) - scale*own)
    return torch.stack(losses).mean()


def test_loss_and_gradient_are_those_of_a_naive_loop():
    pairs, needed, queries = retrieval_pairs(PLANS.splits['train'], PLANS.tools)
    keys = list(PLANS.tools)
    gold = [{keys[j] for j in np.flatnonzero(row)} for row in needed]
    part = pairs[np.random.default_rng(0).permutation(len(pairs))[:10]]
    also = needed[part[:, 0][:, None], part[:, 1]]
    assert also.sum() > len(part)   # some documents are needed by another's query
    grads = []
    for fast in (True, False):
        lm = tiny_lm()
        texts = [Texts(lm, t, 48) for t in (queries, [tool_document(t) for t in PLANS.tools.values()])]
        q, d = (pooled(lm, *t.batch(k)) for t, k in zip(texts, part.T))
        loss = ranking_loss(q, d, torch.as_tensor(also)) if fast else naive_loss(q, d, part[:, 0], [keys[j] for j in part[:, 1]], gold)
        loss.backward()
        grads.append((loss.item(), torch.cat([p.grad.flatten() for p in lm.model.parameters()])))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-5*grads[1][1].abs().max())


def test_what_a_query_needs_is_never_pushed_away():
    q, d = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert ranking_loss(q, d, everything).item() == 0   # nothing to be told from
    also = torch.eye(3, dtype=torch.bool)
    also[0, 2] = also[1, 2] = True
    ranking_loss(q[:2], d[:2], also[:2, :2]).backward()
    own = d.grad[:2].clone()
    d.grad = None
    scores = ranking_loss(q, d, also)
    third = torch.nn.functional.cross_entropy(20*torch.nn.functional.normalize(q[2:]) @ torch.nn.functional.normalize(d).T, torch.tensor([2]))
    (3*scores - third).backward()
    assert torch.allclose(d.grad[:2], 2*own, atol=1e-5) and torch.allclose(d.grad[2], torch.zeros(4), atol=1e-5)


def test_the_loss_is_one_sided():
    q, d = torch.tensor([[1., 0.], [1., 0.]]), torch.tensor([[1., 0.], [0., 1.]])
    also = torch.eye(2, dtype=torch.bool)
    assert ranking_loss(q, d, also).item() != pytest.approx(ranking_loss(d, q, also).item(), abs=.1)


def test_pairs_hold_every_needed_tool_once():
    pairs, needed, queries = retrieval_pairs(PLANS.splits['train'], PLANS.tools)
    keys = list(PLANS.tools)
    assert sorted((queries[i], keys[j]) for i, j in pairs) == sorted((s.query, k) for s in PLANS.splits['train'] for k in gold_keys(s, PLANS.tools))
    assert needed.sum() == len(pairs) and needed.shape == (12, 12)
    with pytest.raises(ValueError, match='is not among the tools'): retrieval_pairs([Sample('0', 'q', (ToolCall('nowhere'),))], PLANS.tools)
    with pytest.raises(ValueError, match='no pairs'): retrieval_pairs([Sample('0', 'q', ())], PLANS.tools)


def test_trained_vectors_are_those_that_are_retrieved_by():
    lm, texts = tiny_lm(), ['', 'a', 'put a kettle on', 'Größe 工具', 'x'*50]
    t = Texts(lm, texts, 200)
    for k in ([0, 1, 2, 3, 4], [4, 0]): assert np.allclose(pooled(lm, *t.batch(k)).detach().numpy(), embed(lm, [texts[j] for j in k]), atol=1e-5)
    assert np.allclose(pooled(lm, *Texts(lm, texts, 5).batch([4])).detach().numpy(), embed(lm, ['x'*5]), atol=1e-5)


TOY = {n: Tool(n, n) for n in ('kettle', 'lamp', 'tea', 'door')}
ASKED = [Sample(f'{n}{k}', q.format(n), (ToolCall(n),)) for n in TOY for k, q in enumerate(('the {} please', 'my {}', 'use the {}', 'where is the {}'))]


def test_it_finds_what_it_did_not_and_counts_what_that_took():
    lm = tiny_lm()
    start = [p.detach().clone() for p in lm.model.parameters()]
    spent = train_retriever(lm, ASKED, TOY, lr=3e-3, epochs=12, batch_size=8)
    assert (spent.samples, spent.steps, len(spent.losses)) == (16*12, 24, 24) and spent.seconds > 0
    length = lambda t: len(lm.tokenizer(t)['input_ids']) + 1
    assert spent.tokens == 12*sum(length(s.query) + length(tool_document(TOY[s.calls[0].name])) for s in ASKED) and spent.flops > 0
    assert spent.losses[-1] < spent.losses[0]/2 and not all(torch.equal(p, q) for p, q in zip(start, lm.model.parameters()))
    ranked, _ = Nearest(lambda t: embed(lm, t)).fit([tool_document(t) for t in TOY.values()]).rank([s.query for s in ASKED], 1)
    assert sum(list(TOY)[j] == s.calls[0].name for j, s in zip(ranked[:, 0], ASKED)) >= 15
    assert {*asdict(spent)} >= {'steps', 'tokens', 'seconds', 'losses'}


def test_equal_seeds_equal_models():
    def run(seed):
        lm = tiny_lm()
        spent = train_retriever(lm, ASKED, TOY, lr=1e-3, epochs=2, batch_size=5, seed=seed)
        return spent.losses, torch.cat([p.detach().flatten() for p in lm.model.parameters()])
    (a, p), (b, q), (c, r) = run(0), run(0), run(1)
    assert a == b and torch.equal(p, q) and a != c and not torch.equal(p, r)


def test_a_batch_is_never_larger_than_the_pairs_and_the_total_is_met():
    spent = train_retriever(tiny_lm(), ASKED[:3], TOY, lr=1e-3, epochs=2, batch_size=64)
    assert (spent.samples, spent.steps) == (6, 2)
    spent = train_retriever(tiny_lm(), ASKED[:5], TOY, lr=1e-3, epochs=1, batch_size=4)
    assert (spent.samples, spent.steps) == (5, 2)


def test_the_rate_rises_and_falls():
    lm = tiny_lm()
    trainer, rates = PairTrainer(lm, 1., 40, warmup=.25), []
    t = Texts(lm, ['a', 'b', 'c', 'd'])
    trainer.learn = lambda *_: (rates.append(trainer.rate.item()), torch.zeros(()))[1:]
    for _ in range(10): trainer.step(t.batch(range(4)), t.batch(range(4)), np.eye(4, dtype=bool))
    assert np.allclose(rates, [.2, .6, 1., 13/15, 11/15, 9/15, 7/15, 5/15, 3/15, 1/15]) and trainer.spent == 40


def test_it_finds_more_of_sageworld_than_before():
    world, lm = sageworld_set(160, 40, 'selection', 4), tiny_lm()
    keys, documents = list(world.tools), [tool_document(t) for t in world.tools.values()]
    def found():
        ranked, _ = Nearest(lambda t: embed(lm, t)).fit(documents).rank([s.query for s in world.splits['test']], 1)
        return recall_at([[keys[j] for j in r] for r in ranked], [gold_keys(s, world.tools) for s in world.splits['test']], 1).mean()
    before = found()
    train_retriever(lm, world.splits['train'], world.tools, lr=5e-3, epochs=6, batch_size=16, max_tokens=96)
    assert found() > before + .1
