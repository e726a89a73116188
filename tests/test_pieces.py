"A head in pieces: the same losses, gradients, scores and training, and no tensor as large as all logits"
import numpy as np, pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode

from sage_paper import model, pieces
from sage_paper.calls import Sample, ToolCall
from sage_paper.evaluation import grade
from sage_paper.ewc import diagonal_fisher
from sage_paper.model import encode, forward, tiny_lm
from sage_paper.pieces import Logits, PieceLoss
from sage_paper.replay import ReservoirBuffer
from sage_paper.sage import Dark, teach
from sage_paper.selectors import FIELDS, gain_gradients, gain_gradients_from_backward, see
from sage_paper.continual import Phase, learn_phases
from sage_paper.ssis import SELECTORS
from sage_paper.toolken import Context, read
from sage_paper.trainers import Trainer, train_stream

SAMPLES = [Sample(str(i), 'tea '*(i % 9), (ToolCall(f'tool{i % 5}'),)) for i in range(24)]


def encoded(lm): return encode(SAMPLES, lm.tokenizer)


@pytest.fixture(params=[7, 256])
def in_pieces(monkeypatch, request):
    "A function: from now on every vocabulary counts as large"
    def begin():
        monkeypatch.setattr(pieces, 'PIECE', request.param)
        monkeypatch.setattr(model, 'LARGE', 1)
    return begin


def both(in_pieces, do):
    "What `do` makes of a new model whose logits are whole, and of one whose are not"
    whole = do(lm := tiny_lm())
    assert isinstance(forward(lm, lm.collate(encoded(lm)[:2])).logits, torch.Tensor)
    in_pieces()
    parts = do(lm := tiny_lm())
    assert isinstance(forward(lm, lm.collate(encoded(lm)[:2])).logits, Logits)
    return whole, parts


def close(a, b, tol=1e-5):
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=tol, atol=tol)


def weights(lm): return [p.detach().clone() for p in lm.model.parameters()]


def test_a_pass_says_the_same(in_pieces):
    def do(lm):
        f = forward(lm, lm.collate(encoded(lm)))
        return [x.detach() for x in (f.token_nll, f.greedy, f.nll, f.embedding, f.hidden)]
    close(*both(in_pieces, do))


def test_every_parameter_gets_the_same_gradient(in_pieces):
    "The head is the embedding, too"
    def do(lm):
        f = forward(lm, lm.collate(encoded(lm)))
        (f.nll @ torch.linspace(0.5, 2, len(f.nll))).backward()
        return [p.grad for p in lm.model.parameters()]
    whole, parts = both(in_pieces, do)
    assert max(g.abs().max() for g in whole) > 0.01
    close(whole, parts)


@pytest.mark.parametrize('fields', [FIELDS, ('gradient',), ('entropy',), ('nll', 'margin')], ids=' '.join)
def test_scores_are_the_same(in_pieces, fields):
    def do(lm): return [getattr(see(lm, lm.collate(encoded(lm)), fields), k) for k in fields]
    close(*both(in_pieces, do))


def test_the_closed_form_is_what_the_backward_pass_tells(in_pieces):
    in_pieces()
    lm = tiny_lm()
    batch = lm.collate(encoded(lm))
    f = forward(lm, batch)
    f.hidden.retain_grad()
    f.nll.mean().backward()
    close([gain_gradients(lm, batch, f)], [gain_gradients_from_backward(batch, f)])


def test_grades_fisher_and_likeliest_words_are_the_same(in_pieces):
    def do(lm):
        g = grade(lm, encoded(lm), 8)
        words, logits = zip(*teach(Trainer(lm, 0., 1), encoded(lm)[:6]))
        return [g.name, g.exact, g.nll, *words, *(x.float() for x in logits), *diagonal_fisher(lm, encoded(lm)[:3])]
    close(*both(in_pieces, do), tol=2e-3)   # remembered logits are of half precision


def test_states_of_tokens_as_tools_are_the_same(in_pieces):
    def do(lm): return [*vars(read(lm, [Context([*e.ids], [len(e.ids) - 3, len(e.ids) - 1]) for e in encoded(lm)[:5]])).values()]
    close(*both(in_pieces, do))


@pytest.mark.parametrize('name', ['ssis', 'gradient_similarity'])
def test_a_stream_trains_the_same(in_pieces, name):
    def do(lm):
        trainer = Trainer(lm, 1e-3, 96)
        train_stream(trainer, encoded(lm), [*range(24)], 8, ReservoirBuffer(8, 0), [], SELECTORS[name](0.5, seed=0))
        return weights(lm)
    whole, parts = both(in_pieces, do)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(whole, weights(tiny_lm())))
    close(whole, parts, 1e-4)


def test_dark_experience_trains_the_same(in_pieces):
    "The distance to remembered logits sends gradients through a few words only"
    def do(lm):
        strategy, e = Dark(ReservoirBuffer(8, 0), 0.5, 1.), encoded(lm)
        trainer = Trainer(lm, 1e-3, 1, unit='tokens', extra_loss=strategy.extra_loss)
        strategy.begin(trainer)
        learn_phases(trainer, strategy, [Phase(e[k:k + 8], ['t']*8, 1500) for k in (0, 8, 16)], 8, lambda: None)
        return weights(lm)
    whole, parts = both(in_pieces, do)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(whole, weights(tiny_lm())))
    close(whole, parts, 1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_precision_is_that_of_a_linear_layer_under_autocast(dtype):
    torch.manual_seed(0)
    hidden, head, label = torch.randn(300, 16, requires_grad=True), torch.nn.Linear(16, 500, bias=False), torch.randint(500, (300,))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16): logits = head(hidden).float()
    whole = torch.nn.functional.cross_entropy(logits, label, reduction='none')
    nll, greedy = PieceLoss.apply(hidden, head.weight, label, dtype)
    assert torch.equal(nll, whole) and torch.equal(greedy, logits.argmax(-1) == label)
    for a, b in zip(*(torch.autograd.grad(x.mean(), (hidden, head.weight)) for x in (nll, whole))):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() < (1e-6 if dtype == torch.float32 else 0.01)*b.norm()   # of half precision, sums of pieces round elsewhere


class Largest(TorchDispatchMode):
    "Notes the largest tensor, in rows of the vocabulary"
    def __init__(self, vocabulary): super().__init__(); self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] == self.vocabulary: self.rows = max(self.rows, len(x))
        return out


def test_logits_are_never_there_as_a_whole(monkeypatch):
    def rows(do):
        lm = tiny_lm()
        batch = lm.collate(encoded(lm))
        with Largest(len(lm.tokenizer)) as seen: do(lm, batch)
        return seen.rows, len(batch.label)
    doings = [lambda lm, b: forward(lm, b).nll.mean().backward(), lambda lm, b: see(lm, b), lambda lm, b: grade(lm, encoded(lm), 24), lambda lm, b: teach(Trainer(lm, 0., 1), encoded(lm))]
    for do in doings:
        seen, m = rows(do)
        assert seen >= m
    monkeypatch.setattr(pieces, 'PIECE', 50)
    monkeypatch.setattr(model, 'LARGE', 1)
    for do in doings: assert 0 < rows(do)[0] <= 50


def test_gemmas_vocabulary_is_large_and_smollms_is_not(): assert 49_152 < model.LARGE <= 262_144
