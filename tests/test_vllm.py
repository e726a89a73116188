"A real vLLM server with the default model: what it answers, what it counts, and what is left when it is killed"
import json, os, signal, threading, time

import numpy as np, pytest, torch

from sage_paper.assets import AssetError
from sage_paper.inference import IncompleteBatch, InProcess, UnifiedInferenceClient, served
from sage_paper.model import load_lm
from sage_paper.queries import sageworld_set
from sage_paper.serving import VLLM, ServeError, vllm_binary

try: vllm_binary()
except ServeError as e: pytest.skip(str(e), allow_module_level=True)


@pytest.fixture(scope='module')
def lm():
    try: return load_lm('smollm2-135m-instruct')
    except AssetError as e:
        if 'download' not in str(e): raise
        pytest.skip(f'the model cannot be had: {str(e).splitlines()[0]}')


@pytest.fixture(scope='module')
def server(lm):
    with VLLM() as s: yield s


@pytest.fixture(scope='module')
def client(server):
    with UnifiedInferenceClient(server.backend()) as c: yield c


PLAIN = [[dict(role='user', content=f'Count from {k} to {k + 3}.')] for k in range(256)]


def kill_after(server, client, requests):
    "Kill a server once a client has had some answers of it"
    while client.stats()['requests'] < requests: time.sleep(0.05)
    os.killpg(server.process.pid, signal.SIGKILL)


def test_it_is_found(server, monkeypatch):
    monkeypatch.setenv('SAGE_VLLM_URL', server.url)
    with UnifiedInferenceClient.create_auto() as c:
        assert repr(c) == 'UnifiedInferenceClient(smollm2-135m-instruct, vLLM)' and served(server.url) == ['smollm2-135m-instruct']


def test_a_chat_is_answered_with_tokens_and_counts(client, lm):
    before = client.stats()
    (answer,) = client.chat(PLAIN[0], max_new_tokens=8)
    assert lm.tokenizer.decode(answer.ids, skip_special_tokens=True) == answer.text and len(answer.ids) == 8
    assert lm.tokenizer.apply_chat_template(PLAIN[0], add_generation_prompt=True)['input_ids'] == list(answer.prompt_ids)
    after = client.stats()
    assert after['completion_tokens'] - before['completion_tokens'] == 8 and after['prompt_tokens'] - before['prompt_tokens'] == len(answer.prompt_ids)


def test_a_batch_of_256_comes_back_whole_and_in_order(client):
    before = client.backend.metrics()
    answers = client.chats(PLAIN, max_new_tokens=4)
    assert len(answers) == 256 and len({a.prompt_ids for a, in answers}) == 256
    alone = [client.chat(PLAIN[k], max_new_tokens=4) for k in (0, 100, 255)]
    assert [answers[k][0].prompt_ids for k in (0, 100, 255)] == [a[0].prompt_ids for a in alone]
    after = client.backend.metrics()
    assert after['request_success_total'] - before['request_success_total'] == 259 and after['num_requests_running'] == 0


def test_what_is_drawn_depends_on_the_seed_alone(client):
    def draw(seed): return client.chats(PLAIN[:4], n=3, temperature=1., max_new_tokens=8, seed=seed)
    first = draw(1)
    assert [len(x) for x in first] == [3]*4 and len({a.text for x in first for a in x}) > 6
    assert draw(1) == first != draw(2)


def test_log_probabilities_are_those_of_the_model_in_this_process(client, lm):
    samples = sageworld_set(0, 12, 'planning', 60).splits['test']
    with UnifiedInferenceClient(InProcess(lm)) as near: here, there = near.logprobs(samples), client.logprobs(samples)
    assert [len(x) for x in here] == [len(x) for x in there]
    assert max(np.abs(x - y).mean() for x, y in zip(here, there)) < (0.1 if lm.bf16 else 1e-3)


def test_answers_follow_a_schema(client):
    schema = dict(type='object', properties=dict(tool=dict(enum=['kettle', 'lamp']), on=dict(type='boolean')), required=['tool', 'on'], additionalProperties=False)
    said = [json.loads(client.chat([dict(role='user', content=q)], schema=schema, max_new_tokens=48)[0].text) for q in ('Tea, please.', 'It is dark.')]
    assert all(set(x) == {'tool', 'on'} and x['tool'] in ('kettle', 'lamp') and isinstance(x['on'], bool) for x in said)


def test_too_long_a_question_is_the_askers_fault(client):
    asked = [PLAIN[0], [dict(role='user', content='word '*3000)], PLAIN[1]]
    with pytest.raises(IncompleteBatch, match='1 of 3 have no answer; number 1: BadRequestError') as e: client.chats(asked, max_new_tokens=4)
    assert [r is None for r in e.value.results] == [False, True, False]


def test_greedy_answers_are_those_of_the_model_in_this_process_or_part_where_two_tokens_are_nearly_as_likely(client, lm):
    asked = list(sageworld_set(0, 100, 'selection', 100).splits['test'])
    with UnifiedInferenceClient(InProcess(lm, 25)) as near: here, there = near.generate(asked, max_new_tokens=12), client.generate(asked, max_new_tokens=12)
    part = [(x, y) for (x,), (y,) in zip(here, there) if x.ids != y.ids[:len(x.ids)]]
    assert len(part) <= 5
    for x, y in part:
        k = next(k for k, (a, b) in enumerate(zip(x.ids, y.ids)) if a != b)
        ids = torch.tensor([[*x.prompt_ids, *x.ids[:k]]], device=lm.device)
        with torch.no_grad(), lm.autocast(): logp = lm.model(ids).logits[0, -1].float().log_softmax(-1)
        assert abs(logp[x.ids[k]] - logp[y.ids[k]]) < (0.2 if lm.bf16 else 0.01)


def test_a_server_that_is_killed_in_mid_batch_loses_nothing(lm):
    server, long = VLLM(), dict(max_new_tokens=32)
    with server, UnifiedInferenceClient(server.backend(), concurrency=8, attempts=3) as c:
        threading.Thread(target=kill_after, args=(server, c, 10)).start()
        with pytest.raises(IncompleteBatch, match='APIConnectionError') as e: c.chats(PLAIN, **long)
        done = [k for k, r in enumerate(e.value.results) if r]
        assert 0 < len(done) < 256
    with server, UnifiedInferenceClient(server.backend(), concurrency=8) as c:   # at the same address
        rest = c.chats([PLAIN[k] for k in range(256) if k not in done][:8], **long)
        assert len(rest) == 8 and [r[0].ids for r in c.chats([PLAIN[done[0]]], **long)] == [e.value.results[done[0]][0].ids]


def test_one_that_comes_back_in_time_answers_the_rest(lm):
    server = VLLM()
    def again():
        kill_after(server, c, 10)
        server.process.wait()
        server.start()
    with server, UnifiedInferenceClient(server.backend(), concurrency=8, attempts=30) as c:
        back = threading.Thread(target=again)
        back.start()
        answers = c.chats(PLAIN[:48], max_new_tokens=16)
        back.join()
        assert len(answers) == 48 and all(len(a.ids) for a, in answers) and c.stats()['retried'] > 0 and c.stats()['failed'] == 0


def test_adapters_are_taken_in(lm, tmp_path):
    from peft import LoraConfig, get_peft_model
    tuned = get_peft_model(lm.model, LoraConfig(r=8, target_modules=['q_proj', 'v_proj'], init_lora_weights=False, task_type='CAUSAL_LM'))
    tuned.save_pretrained(tmp_path)
    asked = [dict(role='user', content='Name a fruit.')]
    def greedy(net, n=6):
        ids = torch.tensor([lm.tokenizer.apply_chat_template(asked, add_generation_prompt=True)['input_ids']], device=lm.device)
        with torch.no_grad(), lm.autocast(): return net.generate(ids, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(ids))[0, ids.shape[1]:].tolist()
    try:
        with_it = greedy(tuned)
        with tuned.disable_adapter(): without = greedy(tuned)
    finally: tuned.unload()
    assert with_it != without
    with VLLM(adapters=True) as server:
        plain = UnifiedInferenceClient(server.backend())
        async def load(): return await plain.backend.with_adapter('fruity', tmp_path)
        with plain, UnifiedInferenceClient(plain.submit(load()).result()) as adapted:
            assert list(plain.chat(asked, max_new_tokens=6)[0].ids) == without and list(adapted.chat(asked, max_new_tokens=6)[0].ids) == with_it
