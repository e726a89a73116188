"Selectors: what each prefers, the fraction kept, seeds, bounded memory, exact restarts, odd inputs, and greedy k-center"
import copy, itertools, pickle

import numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from scipy.stats import spearmanr

from sage_paper.calls import Sample, ToolCall
from sage_paper.model import collate, encode, forward, tiny_lm
from sage_paper.selectors import FIELDS, AdaptiveThreshold, GradientSimilarity, KCenter, Ring, Running, Seen, Selector, Uncertainty, _farthest, gain_gradients, gain_gradients_from_backward, k_center, ranks, see, unit
from sage_paper.ssis import SELECTORS, SSIS, staleness, term_ablations, term_correlations

D = 6
FRACTIONS = st.floats(0.05, 1)
by_name = pytest.mark.parametrize('name', SELECTORS)


def make(name, fraction=0.5, sharpness=1., seed=0): return SELECTORS[name](fraction, sharpness=sharpness, seed=seed)


def some(rng, n=8, drift=0.):
    "n samples of a stream; with drift, all that is important moves that much"
    nll, embedding, gradient = rng.exponential(size=n) + drift, rng.normal(size=(n, D)), rng.normal(size=(n, D)) + drift
    return Seen(nll, embedding, gradient, entropy=nll + drift, margin=rng.random(n) - drift, length=np.ceil(9*nll), irreducible=rng.random(n))


def stream(seed=0, n=150, size=8, drift=0.):
    rng = np.random.default_rng(seed)
    return [some(rng, size, drift*t) for t in range(n)]


def kept(selector, seens): return np.concatenate([selector.keep(s) for s in seens])


class Step:
    "What a training step leaves behind"
    def __init__(self, seed, n=4):
        g = torch.Generator().manual_seed(seed)
        self.hidden, self.nll, self.row = torch.randn(2*n, D, generator=g), torch.zeros(n), torch.arange(2*n) % n
        self.hidden.grad = torch.randn(2*n, D, generator=g)

def gradients(k): return gain_gradients_from_backward(Step(k), Step(k)).numpy()


def fields(n, **odd): return Seen(**(dict(nll=np.ones(n), embedding=np.ones((n, D)), gradient=np.ones((n, D)), entropy=np.ones(n), margin=np.ones(n)/2, length=np.ones(n), irreducible=np.ones(n)) | odd))


# ---- every selector ----

@by_name
@pytest.mark.parametrize('drift', [0., 0.05, -0.05])
@pytest.mark.parametrize('fraction', [0.1, 0.5, 0.8])
def test_a_stream_keeps_the_fraction_asked_for(name, fraction, drift):
    mask = kept(make(name, fraction), stream(drift=drift))
    assert abs(mask.sum() - fraction*len(mask)) <= 64 + 8
    if not drift: assert abs(mask.mean() - fraction) < 0.04


@by_name
def test_everything_is_kept_if_that_is_asked_for(name): assert kept(make(name, 1.), stream(n=20)).all()


@by_name
def test_a_seed_decides(name):
    seens = stream(n=30)
    a, b, c = (kept(make(name, seed=s), seens) for s in (3, 3, 4))
    assert (a == b).all() and (a != c).any() == (name != 'sure')   # the top needs no luck
    pools = [make(name, seed=s).pool(seens[0], 4).tolist() for s in (3, 3)]
    assert pools[0] == pools[1] and len({*pools[0]}) == 4


@by_name
@pytest.mark.parametrize('pickled', [False, True])
def test_a_restart_goes_on_exactly(name, pickled):
    seens, one = stream(n=40), make(name)
    for k, s in enumerate(seens[:20]): one.keep(s); one.trained(gradients(k))
    state = one.state_dict()
    if pickled: state = pickle.loads(pickle.dumps(state))
    before, two = copy.deepcopy(state), make(name, 0.2, 3., seed=9)
    two.load_state_dict(state)
    assert (kept(one, seens[20:]) == kept(two, seens[20:])).all()
    for s in (one, two): s.trained(gradients(99))
    np.testing.assert_array_equal(one.importance(seens[0]), two.importance(seens[0]))
    assert one.pool(seens[0], 3).tolist() == two.pool(seens[0], 3).tolist()
    assert pickle.dumps(state) == pickle.dumps(before)   # a state is not touched by those who go on from it


@by_name
def test_memory_is_bounded(name):
    def size(n):
        s = make(name)
        for k, seen in enumerate(stream(n=n, size=32)): s.keep(seen); s.trained(gradients(k))
        return len(pickle.dumps(s.state_dict()))
    sizes = [size(n) for n in (70, 210)]
    assert abs(sizes[1] - sizes[0]) < 64   # counters may take a byte more


ODD = dict(constant=fields(5), zeros=fields(5, nll=np.zeros(5), embedding=np.zeros((5, D)), gradient=np.zeros((5, D)), entropy=np.zeros(5), margin=np.zeros(5), length=np.zeros(5)),
           huge=fields(5, **{k: np.full((5, D) if k in ('embedding', 'gradient') else 5, 1e37, np.float32)*s for k, s in
                             dict(nll=1, embedding=-1, gradient=1, entropy=1, length=1, irreducible=1).items()}),
           apart=fields(5, nll=np.array([0, 1e37, 1e-37, 1, 2], np.float32), gradient=np.array([[0], [1e37], [1e-37], [1], [-1e37]], np.float32)*np.ones((1, D), np.float32)),
           one=fields(1), none=fields(0))


@by_name
@pytest.mark.parametrize('odd', ODD)
@pytest.mark.parametrize('scale', ['rank', 'standard', 'quantile'])
def test_odd_inputs_have_an_importance(name, odd, scale):
    seen, s = ODD[odd], make(name)
    for r in s.scales: r.scale = scale
    for k in range(3): s.trained(gradients(k))
    with np.errstate(all='raise', under='ignore'):
        for _ in range(2):
            i = s.importance(seen)
            assert i.shape == (len(seen),) and np.isfinite(i).all() and (i > 0).all()
            assert s.keep(seen).shape == (len(seen),)
    if odd == 'constant': assert np.ptp(s.importance(seen)) == 0


@by_name
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_measure_that_is_no_number_is_named(name, value):
    s = make(name)
    for field in s.needs:
        seen = some(np.random.default_rng(0))
        getattr(seen, field)[3] = value
        before = pickle.dumps(s.state_dict())
        for use in (s.keep, s.importance, lambda x: s.pool(x, 2)):
            with pytest.raises(ValueError, match=f'{field} of sample 3 is NaN'): use(seen)
        assert pickle.dumps(s.state_dict()) == before   # nothing was spoilt
        setattr(seen, field, None)
        with pytest.raises(ValueError, match=f'needs `Seen.{field}`'): s.keep(seen)


@by_name
def test_a_selector_looks_at_what_it_says_it_needs(name):
    full = stream(n=10)
    bare = [Seen(**{k: getattr(s, k) for k in (*make(name).needs, 'length')}) for s in full]
    assert (kept(make(name), full) == kept(make(name), bare)).all()


PREFERS = dict(longest=('length', 1), nll=('nll', 1), entropy=('entropy', 1), margin=('margin', -1), sure=('nll', 1), rho_loss=('irreducible', -1), ssis=('nll', 1))


@pytest.mark.parametrize('name', PREFERS)
def test_it_prefers_what_it_says(name):
    field, sign = PREFERS[name]
    seens = stream(n=300)
    values, mask = np.concatenate([getattr(s, field) for s in seens])*sign, kept(make(name, 0.3, 4.), seens)
    assert values[mask].mean() > values[~mask].mean() + 0.2*values.std()
    first = make(name, sharpness=np.inf).pool(fields(5, **{field: np.array([5, 5, 1, 5, 5.] if sign < 0 else [1, 1, 5, 1, 1])}), 1)
    assert first.tolist() == [2]


@pytest.mark.parametrize('name', ['k_center', 'ssis'])
def test_it_prefers_what_is_far_from_what_was_kept(name):
    s, e = make(name, sharpness=np.inf), np.eye(D)
    s.remember(fields(2, embedding=e[:2]), np.ones(2, bool))
    assert s.importance(fields(4, embedding=e[[0, 1, 2, 0]])).argmax() == 2


def test_similar_gradients_are_preferred():
    s, step = GradientSimilarity(0.5, np.inf), Step(0)
    for _ in range(3): s.trained(gradients(0))
    mean = torch.zeros(4, D).index_add_(0, step.row, 4*step.hidden.grad*step.hidden).mean(0).numpy()
    assert s.raw(fields(3, gradient=np.stack([-mean, 7*mean, 0*mean])))[0] == pytest.approx([-1, 1, 0], abs=1e-5)
    fixed = GradientSimilarity(0.5, target=np.eye(D)[0])
    fixed.trained(gradients(0))
    assert fixed.target.tolist() == np.eye(D)[0].tolist()


def test_random_does_not_look(): assert (kept(make('random', sharpness=9.), stream(0)) == kept(make('random'), stream(1))).all()


# ---- scale, threshold, memory ----

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=9), st.integers(1, 7))
def test_a_ring_is_the_end_of_the_stream(parts, size):
    ring = Ring(size)
    for p in parts: ring.extend(np.array(p))
    assert sorted(ring.held) == sorted(sum(parts, [])[-size:]) and len(ring) == len(ring.held)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
@example([0.1]*7)
def test_scales_keep_the_order_and_stay_inside(x):
    for scale in ('rank', 'standard', 'quantile'):
        y = Running(scale)(x)
        assert ((0 < y) & ((y <= 1) if scale == 'quantile' else (y < 1))).all() and (np.diff(y[np.argsort(x, kind='stable')]) >= -1e-12).all()
    assert Running()(x).mean() == pytest.approx(0.5)


@settings(max_examples=60, deadline=None)
@given(FRACTIONS, st.sampled_from([0., 1., 5., np.inf]), st.integers(1, 40), st.sampled_from(['equal', 'rising', 'falling', 'steps']))
def test_no_stream_leads_the_threshold_astray(fraction, sharpness, size, kind):
    n = 40*size
    I = dict(equal=np.ones(n), rising=np.arange(1., n + 1), falling=np.arange(n, 0., -1), steps=np.arange(n)//(n//4) + 1.)[kind]
    gate, count = AdaptiveThreshold(fraction, sharpness), 0
    for k, part in enumerate(I.reshape(-1, size), 1):
        count += gate(part).sum()
        assert abs(count - fraction*size*k) <= 64 + size
    assert gate.kept == count


@pytest.mark.parametrize('sharpness', [0.5, 1., 2.])
def test_a_pool_is_drawn_in_proportion(sharpness):
    I, gate = np.array([1., 2., 4.]), AdaptiveThreshold(0.5, sharpness)
    first = np.bincount([gate.perturb(I).argmax() for _ in range(6000)], minlength=3)/6000
    assert first == pytest.approx(I**sharpness/(I**sharpness).sum(), abs=0.025)


def test_a_first_sample_passes_as_often_as_any():
    often = np.mean([[AdaptiveThreshold(0.3, seed=s)(np.ones(1))[0] for s in range(3000)]])
    assert often == pytest.approx(0.3, abs=0.03)


def test_a_pool_leaves_the_stream_alone():
    s = SSIS(0.5, sharpness=np.inf)
    kept(s, stream(n=5))
    scales = pickle.dumps([r.state_dict() for r in s.scales] + [s.kept.state_dict()])
    s.pool(some(np.random.default_rng(1), 700), 20)
    assert pickle.dumps([r.state_dict() for r in s.scales] + [s.kept.state_dict()]) == scales


# ---- what is seen ----

LM = tiny_lm()
ENCODED = encode([Sample(str(k), 'tea '*k, (ToolCall('t'*k),)) for k in range(1, 6)], LM.tokenizer)


@pytest.mark.parametrize('multiple_m', [1, 64], ids=['plain', 'padded'])
def test_entropy_and_margin(multiple_m):
    b = collate(ENCODED, LM.tokenizer.pad_token_id, multiple_m=multiple_m)
    seen, plain = see(LM, b), LM.collate(ENCODED)
    assert (b.row == 5).any() == (multiple_m > 1)
    with torch.no_grad(): logits = forward(LM, plain).logits
    top = logits.softmax(-1).sort(descending=True).values
    for k, e in enumerate(ENCODED):
        of = plain.row == k
        assert seen.entropy[k] == pytest.approx(torch.distributions.Categorical(logits=logits[of]).entropy().mean().item(), abs=1e-5)
        assert seen.margin[k] == pytest.approx((top[of, 0] - top[of, 1]).mean().item(), abs=1e-6)
        assert seen.nll[k] == pytest.approx(torch.nn.functional.cross_entropy(logits[of], plain.label[of]).item(), abs=1e-5)
    assert seen.length.tolist() == [e.n_answer for e in ENCODED]
    assert seen.gradient == pytest.approx(gain_gradients(LM, plain, forward(LM, plain)).numpy(), abs=1e-6)


def test_only_what_is_needed_is_computed(monkeypatch):
    calls, b = [], LM.collate(ENCODED)
    monkeypatch.setattr('sage_paper.selectors.forward', lambda *a: calls.append(1) or forward(*a))
    assert see(LM, b, ['length']).length is not None and calls == []
    full = see(LM, b, irreducible=np.arange(5.))
    assert calls == [1] and full.irreducible.tolist() == list(range(5))
    for k in FIELDS:
        one = see(LM, b, [k])
        np.testing.assert_allclose(getattr(one, k), getattr(full, k), rtol=1e-6)
        assert [f for f in FIELDS if getattr(one, f) is not None] == [k]


# ---- greedy k-center ----

def plain_k_center(x, k, start=0):
    chosen = [start]
    while len(chosen) < k: chosen.append(int(((x[:, None] - x[chosen])**2).sum(2).min(1).argmax()))
    return chosen


def radius(x, chosen): return ((x[:, None] - x[list(chosen)])**2).sum(2).min(1).max()**0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 9), st.integers(1, 60), st.integers(1, 300), st.booleans())
def test_k_center_is_the_plain_algorithm(seed, n, d, k, active, clusters):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + clusters*10*rng.normal(size=(4, d))[rng.integers(4, size=n)]
    start = int(rng.integers(n))
    assert k_center(x, k, start, active).tolist() == plain_k_center(x, min(k, n), start)


@pytest.mark.parametrize('seed', range(20))
def test_k_center_is_within_twice_the_best(seed):
    x = np.random.default_rng(seed).normal(size=(9, 2))
    best = min(radius(x, c) for c in itertools.combinations(range(9), 3))
    assert best <= radius(x, k_center(x, 3)) <= 2*best + 1e-12


def test_k_center_single_precision_covers_as_well():
    x = unit(np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)) + 100
    ours, plain = k_center(x, 50), plain_k_center((x - x.mean(0)).astype(float), 50)
    assert ours.dtype.kind == 'i' and radius(x.astype(float), ours) == pytest.approx(radius(x.astype(float), plain), rel=0.02)


def test_k_center_with_equal_points():
    assert sorted(k_center(np.ones((5, 3)), 9)) == list(range(5))
    assert {*k_center(np.repeat(np.eye(3), 4, 0), 3)//4} == {0, 1, 2}


def test_k_center_needs_no_more_passes_where_many_are_equal(monkeypatch):
    calls, x = [], np.random.default_rng(0).normal(size=(30, 64)).astype(np.float32)[np.arange(3000) % 30]
    monkeypatch.setattr('sage_paper.selectors._farthest', lambda *a: calls.append(1) or _farthest(*a))
    chosen = k_center(x, 500)
    assert {*chosen[:30] % 30} == {*range(30)} and len({*chosen}) == 500 and len(calls) < 40


def test_a_pool_is_covered():
    x = np.random.default_rng(0).normal(size=(400, D))
    mean = np.mean([radius(unit(x), make('random', seed=s).pool(fields(400, embedding=x), 40)) for s in range(5)])
    assert radius(unit(x), KCenter(0.1).pool(fields(400, embedding=x), 40)) < 0.9*mean


# ---- SSIS taken apart ----

def test_a_term_of_weight_zero_is_not_computed():
    for names, weights in term_ablations().items():
        s = SSIS(0.5, weights)
        assert len(s.needs) == len(names.split('+'))
        for k, seen in enumerate(stream(n=3)):
            s.keep(Seen(**{f: getattr(seen, f) for f in s.needs}))
            s.trained(gradients(k))
        assert (s.fisher.steps > 0) == ('risk' in names) and (len(s.kept) > 0) == ('distance' in names)


def test_alone_a_term_orders_as_it_says():
    seen, s = some(np.random.default_rng(0), 50), SSIS(0.5, (1, 0, 0))
    assert spearmanr(s.importance(seen), seen.nll).statistic == pytest.approx(1)
    assert spearmanr(SSIS(0.5, (1, 0, 0), scale='standard').importance(seen), seen.nll).statistic == pytest.approx(1)


@pytest.mark.parametrize('decay', [0.5, 0.99])
def test_the_running_fisher_is_a_mean_over_samples(decay):
    s = SSIS(0.5, decay=decay)
    squares = []
    for k in range(5):
        step = Step(k)
        s.trained(gradients(k))
        squares.append((torch.zeros(4, D).index_add_(0, step.row, 4*step.hidden.grad*step.hidden)**2).mean(0).numpy())
    w = decay**np.arange(5)[::-1]
    assert s.risk(np.eye(D)) == pytest.approx(w @ squares/w.sum(), rel=1e-5)


def test_correlations_and_staleness():
    x = np.random.default_rng(0).integers(0, 9, (3, 200)).astype(float)
    assert term_correlations(x) == pytest.approx(spearmanr(x.T).statistic)
    assert [staleness(x[0], y) for y in (x[0]**3, -x[0])] == pytest.approx([0, 2])
    assert np.isnan(staleness(x[0], np.ones(200)))


def test_wrong_settings_are_refused():
    for weights in [(1, 1), (1, -1, 1), (0, 0, 0)]:
        with pytest.raises(ValueError, match='weights'): SSIS(0.5, weights)
    for fraction in (0, 1.5, np.nan):
        with pytest.raises(ValueError, match='fraction'): SSIS(fraction)
    with pytest.raises(ValueError, match='sharpness'): SSIS(0.5, sharpness=np.nan)
    with pytest.raises(ValueError, match='scale'): SSIS(0.5, scale='minmax')
    with pytest.raises(ValueError, match='measure'): Uncertainty(0.5, measure='loss')
    with pytest.raises(TypeError, match='does not say'): Selector(0.5).keep(fields(2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
def test_ranks_count(x):
    x = np.array(x)
    expected = [((x < v).sum() + (x == v).sum()/2)/len(x) for v in x]
    assert ranks(x, x) == pytest.approx(expected)


@pytest.mark.parametrize('name', SELECTORS)
def test_of_an_empty_pool_nothing_is_chosen(name):
    nothing = fields(0, **{k: np.zeros((0, 4) if k in ('embedding', 'gradient') else 0) for k in (*FIELDS, 'irreducible')})
    assert make(name).pool(nothing, 3).tolist() == []
