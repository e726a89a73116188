"The model: the loss sees the answer alone, grading means what writing would show, precision is as asked, training repeats"
import dataclasses

import numpy as np, pytest, torch

from sage_paper.calls import Sample, Tool, ToolCall, format_calls, name_end, parse_calls, tool_document
from sage_paper.samples import arrivals
from sage_paper.evaluation import KeyValues, TurnEnd, generate, grade, next_tokens, write
from sage_paper.streaming_runs import load_task
from sage_paper.model import LM, byte_tokenizer, check_head, collate, computes_bf16, embed, encode, forward, load_lm, render, tiny_lm
from sage_paper.replay import ImportanceBuffer, ReservoirBuffer
from sage_paper.ssis import SSIS
from sage_paper.trainers import Curve, Trainer, train_batch, train_stream
from sage_paper.queries import sageworld

SAMPLES = [Sample('none', 'Thanks, that is all.', ()), Sample('plain', 'Show the disk usage of "/", please.', (ToolCall('du', {'args': '-sh {{path/to/folder}}'}),)),
           Sample('named', 'Réserve l’été 🙂 à 8 h', (ToolCall('book_été', {'time': '08:00', 'note': '<|im_end|> “🙂”', 'n': 2}),)),
           Sample('plan', 'List them, then count the lines.', (ToolCall('ls', {'args': ''}), ToolCall('wc', {'args': '-l'})))]


def decode(lm, ids): return lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def rows(lm, samples):
    "The samples as one batch, then each with its answer tokens, their positions and whether they fix the name"
    b = lm.collate(encode(samples, lm.tokenizer))
    return b, [(s, b.label[b.row == k], b.at[b.row == k], b.in_name[b.row == k]) for k, s in enumerate(samples)]


@pytest.fixture(params=['tiny', pytest.param('smollm', marks=pytest.mark.model)])
def lm(request): return tiny_lm() if request.param == 'tiny' else request.getfixturevalue('smollm')


def test_the_loss_sees_the_answer_and_its_end(lm):
    batch, each = rows(lm, SAMPLES)
    for k, (s, label, at, _) in enumerate(each):
        assert decode(lm, label) == format_calls(s.calls) + '<|im_end|>'
        assert decode(lm, batch.input_ids[k, :at[0] + 1]).endswith(f'{s.query}<|im_end|>\n<|im_start|>assistant\n')
        assert batch.input_ids[k, at + 1].tolist() == label.tolist()   # each is predicted from the token before it
        assert batch.attention_mask[k].sum() == at[-1] + 2             # nothing follows, padding is not seen


def test_the_name_ends_with_its_quote(lm):
    _, each = rows(lm, SAMPLES)
    for s, label, _, in_name in each:
        n, text = int(in_name.sum()), format_calls(s.calls)
        name = text[:name_end(text)]
        assert in_name[:n].all() and decode(lm, label[:n]).startswith(name) and not decode(lm, label[:n - 1]).startswith(name)


def test_prompts_are_the_chat_template(lm):
    for s, e in zip(SAMPLES, encode(SAMPLES, lm.tokenizer)):
        chat = [dict(role='system', content='Answer with a JSON list of tool calls.'), dict(role='user', content=s.query)]
        assert list(e.ids[:e.n_prompt]) == lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_the_loss_is_that_of_the_model_itself(lm):
    batch, each = rows(lm, SAMPLES)
    with torch.no_grad(): nll = forward(lm, batch).nll
    for k, (s, _, at, _) in enumerate(each):
        n = int(batch.attention_mask[k].sum())
        ids = batch.input_ids[k:k + 1, :n]
        labels = torch.where(torch.arange(n) > at[0], ids, -100)
        with torch.no_grad(): own = lm.model(input_ids=ids, labels=labels).loss
        assert nll[k].item() == pytest.approx(own.item(), abs=2e-4)


@pytest.fixture(scope='module')
def taught(request):
    "SmolLM2 after a few steps on four queries of SageWorld: some held-out answers are right, some wrong"
    request.getfixturevalue('smollm')
    lm, (train, test) = load_lm('smollm2-135m-instruct', 'fp32', 'cpu'), sageworld(4, 1, 1)
    lm.bf16 = computes_bf16(lm.device)
    trainer, encoded = Trainer(lm, 2e-4, 20, 0.1, 0.3), encode(train, lm.tokenizer)
    for _ in range(5): trainer.step(encoded)
    lm.bf16 = False
    return lm, train + test


@pytest.mark.model
def test_grading_agrees_with_writing(taught):
    lm, samples = taught
    graded, written = grade(lm, encode(samples, lm.tokenizer), batch_size=3), generate(lm, samples, 48)
    gold = [format_calls(s.calls) for s in samples]
    assert 0 < graded.exact.sum() < len(samples) and 0 < graded.name.sum() < len(samples)
    assert graded.exact.tolist() == [w == g for w, g in zip(written, gold)]
    assert graded.name.tolist() == [w.startswith(g[:name_end(g)]) for w, g in zip(written, gold)]


@pytest.mark.model
def test_stopping_at_the_end_of_the_list_cuts_nothing_off(taught, monkeypatch):
    lm, samples = taught
    short = generate(lm, samples, 48)
    monkeypatch.setattr('sage_paper.evaluation.ListEnd.read', lambda self, text: False)
    long = generate(lm, samples, 48)
    assert all(b.startswith(a) for a, b in zip(short, long)) and parse_calls(short[0]).calls
    assert [parse_calls(a).calls for a in short] == [parse_calls(b).calls for b in long]


def test_candidates_are_documented_in_the_prompt(lm):
    tools = {k: Tool(k, f'What {k} does.', dict(type='object', properties=dict(n=dict(type='integer')))) for k in ('first', 'second', 'third')}
    s = Sample('s', 'Do the second thing.', (ToolCall('second', dict(n=2)),), candidates=('second', 'first'))
    prompt, answer = render(s, lm.tokenizer, tools)
    closed, same = render(dataclasses.replace(s, candidates=()), lm.tokenizer, tools)
    assert [prompt.index(tool_document(tools[k])) for k in s.candidates] == sorted(prompt.index(tool_document(tools[k])) for k in s.candidates)
    assert tool_document(tools['third']) not in prompt and 'What' not in closed and answer == same
    e, = encode([s], lm.tokenizer, tools)
    assert decode(lm, e.ids) == prompt + answer
    with pytest.raises(ValueError, match="no tool is known for its candidates .'second'"): render(s, lm.tokenizer, {'first': tools['first']})


def test_an_embedding_does_not_depend_on_its_batch(lm):
    texts = ['Show the disk usage.', '', 'Réserve l’été 🙂 à 8 h', 'Show the disk usage.']
    together = embed(lm, texts, batch_size=4)
    for t, v in zip(texts, together): assert embed(lm, [t], 1)[0] == pytest.approx(v, abs=2e-3)
    assert abs(together[0] - together[2]).max() > 0.01


def product_dtype(lm):
    "The type in which a layer's matrix product comes out"
    seen = []
    hook = lm.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    forward(lm, lm.collate(encode(SAMPLES[:1], lm.tokenizer)))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'auto'])
def test_precision_is_as_asked(tmp_path, precision):
    lm = tiny_lm()
    for part in (lm.model, lm.tokenizer): part.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path), precision, 'cpu')
    bf16 = precision == 'bf16' or precision == 'auto' and computes_bf16(torch.device('cpu'))
    assert product_dtype(loaded) == (torch.bfloat16 if bf16 else torch.float32)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(lm.model.state_dict().values(), loaded.model.state_dict().values()))


def trained(streaming, seed=0):
    "The tiny model's weights and curve after a short run"
    lm, task = tiny_lm(), load_task('sageworld', 6, 4, 1)
    train, test = encode(task.train, lm.tokenizer), encode(task.test, lm.tokenizer)
    selector = SSIS(0.5, (0.4, 0.3, 0.3), 1., seed) if streaming else None
    curve, trainer = Curve(lambda: dict(nll=grade(lm, test).nll.tolist()), 3), Trainer(lm, 1e-3, 24)
    if streaming: train_stream(trainer, train, arrivals(task, 0.5, seed), 4, ImportanceBuffer(8, seed=seed), [curve], selector)
    else: train_batch(trainer, train, 4, [curve], seed)
    points = [{k: v for k, v in p.items() if k != 'seconds'} for p in curve.points]
    return {k: v.clone() for k, v in lm.model.state_dict().items()}, points


@pytest.mark.parametrize('streaming', [False, True], ids=['batch', 'streaming'])
def test_training_twice_gives_the_same_bits(streaming):
    (a, points), (b, again), (c, _) = trained(streaming), trained(streaming), trained(streaming, seed=1)
    assert points == again and points[0]['nll'] != points[-1]['nll']
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_a_gpus_shapes_change_nothing(monkeypatch):
    "On a GPU batches come in few shapes, so both samples and answers are padded"
    plain, plain_points = trained(True)
    encoded = encode(SAMPLES, tiny_lm().tokenizer)
    graded = grade(tiny_lm(), encoded)
    monkeypatch.setattr(LM, 'collate', lambda lm, e: collate(e, lm.tokenizer.pad_token_id, lm.device, 32, 512))
    check_head(tiny_lm())
    padded, points = trained(True)
    np.testing.assert_allclose(points[-1]['nll'], plain_points[-1]['nll'], rtol=1e-4)
    np.testing.assert_allclose(grade(tiny_lm(), encoded).nll, graded.nll, rtol=1e-5)
    assert all(torch.allclose(plain[k], padded[k], atol=1e-4) for k in plain)


def test_a_step_with_weights_is_a_step_on_copies():
    "A sample of weight 2 pulls as two copies do; what a step tells does not depend on the weights"
    lm, other, encoded = tiny_lm(), tiny_lm(), encode(SAMPLES[:3], tiny_lm().tokenizer)
    told = Trainer(lm, 1e-3, 100, warmup=0, max_norm=1e-2).step(encoded, [1, 2, 1])
    copied = Trainer(other, 1e-3, 100, warmup=0, max_norm=1e-2).step([*encoded, encoded[1]])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(lm.model.parameters(), other.model.parameters()))
    assert torch.allclose(told.gradient, copied.gradient[:3], atol=1e-5) and torch.allclose(told.nll, copied.nll[:3], atol=1e-5)


@pytest.fixture
def windowed():
    "A random Gemma 3 whose layers look back over 24 tokens, all but every third"
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    torch.manual_seed(0)
    tok = byte_tokenizer()
    config = Gemma3TextConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=24, sliding_window=24,
                              layer_types=['sliding_attention', 'sliding_attention', 'full_attention'], eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None)
    return LM(Gemma3ForCausalLM._from_config(config, attn_implementation='sdpa').eval(), tok, 'fp32')


def test_a_window_is_kept_to(windowed):
    "The loss is the model's own, though the batch is longer than its layers look back"
    lm = windowed
    batch = lm.collate(encode(SAMPLES, lm.tokenizer))
    assert batch.input_ids.shape[1] > 2*lm.model.config.sliding_window
    with torch.no_grad(): ours, own = forward(lm, batch).logits, lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.row, batch.at]
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    lm.model.config.sliding_window = 10**6
    with torch.no_grad(): assert (forward(lm, batch).logits - own).abs().max() > 1e-3   # so that it matters


def test_a_model_with_windows_writes_what_transformers_writes(windowed):
    lm = windowed
    prompts = [render(s, lm.tokenizer)[0] for s in SAMPLES]
    ours = [ids for _, ids in write(lm, prompts, 40, ends=[TurnEnd() for _ in prompts])]
    for prompt, ids in zip(prompts, ours):
        given = lm.tokenizer(prompt, return_tensors='pt', add_special_tokens=False)['input_ids']
        own = lm.model.generate(given, max_new_tokens=40, do_sample=False)[0, given.shape[1]:].tolist()
        assert ids == own and len({*ids}) > 1


def test_keys_and_values_do_not_count_in_python(windowed):
    "A graph would keep the number, and with it the mask"
    cache = KeyValues(windowed, 60)
    next(iter(next_tokens(windowed, *(torch.ones(2, 30, dtype=torch.long),)*2, 5)))
    assert len(cache.layers) == 3 and not any(layer.is_sliding for layer in cache.layers)
    windowed.model.get_decoder()(input_ids=torch.ones(2, 30, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert all(isinstance(layer.get_seq_length(), torch.Tensor) and layer.get_seq_length() == 30 and layer.keys.shape[2] == 60 for layer in cache.layers)


def test_attention_is_counted_by_its_own_width(windowed):
    from sage_paper.model import Encoded, forward_flops, shape
    s = shape(windowed)
    assert (s.attention, s.hidden) == (48, 32)
    assert forward_flops(s, [Encoded((1,)*10, 9, 1)]) == 2*s.body*10 + 4*3*48*100 + 2*32*s.vocabulary
