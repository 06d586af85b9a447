"""Training, validation and generation on a pretended GPU: no mix of devices, the CPU's values, the host's waits."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megacontext.config import MCConfig
from megacontext.focus_allocator import Focus
from megacontext.gistnet import Encoder
from megacontext.lensnet import Demand
from megacontext.networks import MCNetworks
from megacontext.objective import MCObjective
from megacontext.session import MCSession
from nanochat.common import autocast
from nanochat.decode import Decoder
from nanochat.engine import Engine
from nanochat.gpt import Block, GPTConfig
from nanochat.kv_cache import KVCache, RowCaches
from nanochat.loss_eval import evaluate_bpb
from nanochat.sampling import Sampling
from nanochat.training import PlainObjective, Training
from tests.helpers import BOS, RECENT, K, T, make_model, tokens
from tests.pretended_gpu import CUDA, Pretended, moved, pretended_gpu


def objective_of(model, **options):
    options = {"block_size": K, "allocator_recent_tokens": RECENT, "mc_aux_dtype": "fp32", **options}
    config = MCConfig(**options).resolve(T)
    torch.manual_seed(1)
    networks = MCNetworks(model.config.n_embd, model.config.n_layer, config)
    for p in networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return model, networks, config


def on_gpu(model):
    """The model on the pretended GPU, with its embedding in bf16 as there."""
    model.transformer.wte.to(dtype=torch.bfloat16)
    return moved(model)


def test_a_plain_step_waits_for_its_loss_alone(monkeypatch):
    """Of four micro-batches in bf16: nothing before the loss is shown, the optimizers included."""
    x, y = tokens(B=4)
    with autocast(torch.device("cpu"), torch.bfloat16):
        expected = make_model()(x, y).item()
    model, seen, losses = on_gpu(make_model()), [], []
    precisions(model, seen)
    optimizers = model.setup_optimizers()
    training = SimpleNamespace(step=0, device=CUDA, optimizers=optimizers, parameters=list(model.parameters()))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss))  # pretended tensors have none
    with pretended_gpu() as gpu:
        batches = iter([tuple(t.to(CUDA, non_blocking=True) for t in (x, y))] * 4)
        loss, _ = Training.accumulate(training, PlainObjective(model), batches, 4, 0.0, torch.bfloat16)
        for parameter in training.parameters:
            parameter.grad = torch.ones_like(parameter)
        norm = Training.optimize(training, 1.0, grad_clip=1.0)
        assert gpu.waits == []
        assert loss.item() == pytest.approx(expected, rel=1e-2)
        assert norm.item() == pytest.approx(sum(p.numel() for p in training.parameters) ** 0.5, rel=1e-4)
        assert len(gpu.waits) == 2
    assert len(losses) == 4
    assert set(seen) == {torch.bfloat16}


def test_plain_validation_waits_for_its_sums():
    model, batches, token_bytes = make_model(), [tokens(B=4), tokens(B=4, seed=1)], torch.ones(70, dtype=torch.long)
    expected = evaluate_bpb(model, iter(batches), 2, token_bytes)
    model, batches = moved(model), [(Pretended(x), Pretended(y)) for x, y in batches]
    with pretended_gpu() as gpu:
        assert evaluate_bpb(model, iter(batches), 2, Pretended(token_bytes)) == pytest.approx(expected, rel=1e-5)
        assert len(gpu.waits) == 1


def test_a_training_step_waits_for_nothing():
    x, y = tokens(B=4)
    expected = MCObjective(*objective_of(make_model()), BOS).process_batch(x, y, 1.0, torch.Generator().manual_seed(0))
    model, networks, config = objective_of(make_model())
    model, networks = moved(model), moved(networks)
    with pretended_gpu() as gpu:
        with autocast(CUDA, torch.float32):
            objective = MCObjective(model, networks, config, BOS)
            result = objective.process_batch(Pretended(x), Pretended(y), 1.0, torch.Generator().manual_seed(0))
        assert gpu.waits == []
        assert result.loss.device.type == "cuda"
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert gpu.waits == ["aten._local_scalar_dense.default"]


def precisions(module, seen):
    """Notes the precision of what each block of a model or network gives, in `seen`."""
    for part in module.modules():
        if isinstance(part, Block | Encoder):
            part.register_forward_hook(lambda m, _, out: seen.append((out[0] if isinstance(out, tuple) else out).dtype))


def test_activations_are_bf16_under_autocast():
    """In training, of the model, GistNet and LensNet, with the embedding in bf16 as on a GPU."""
    model, networks, config = objective_of(make_model(), mc_aux_dtype="bf16")
    model, networks, seen = on_gpu(model), moved(networks), []
    precisions(model, seen)
    precisions(networks.gistnet, seen)
    precisions(networks.lensnet, seen)
    x, y = tokens(B=4)
    with pretended_gpu() as gpu, autocast(CUDA, torch.bfloat16):
        objective = MCObjective(model, networks, config, BOS)
        result = objective.process_batch(Pretended(x), Pretended(y), 1.0, torch.Generator().manual_seed(0))
        assert gpu.waits == []
        assert result.loss.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    layers = len(model.transformer.h)
    assert len(seen) == 2 * layers + 2 * 3 + 1  # dense and compressed; two trees of 3 levels; keys


def test_validation_waits_for_scores_and_its_sums():
    """Once per round of focus of a batch, and at the end for the sums; the figures are the CPU's."""
    model, networks, config = objective_of(make_model().eval())
    batches = [tokens(B=4), tokens(B=4, seed=1)]
    token_bytes = torch.ones(70, dtype=torch.long)
    with torch.no_grad():
        expected = MCObjective(model, networks, config, BOS).validate(iter(batches), 2, token_bytes)
    model, networks = moved(model), moved(networks)
    batches = [(Pretended(x), Pretended(y)) for x, y in batches]
    with pretended_gpu() as gpu, torch.no_grad():
        got = MCObjective(model, networks, config, BOS).validate(iter(batches), 2, Pretended(token_bytes))
        assert len(gpu.waits) <= 2 * config.mc_infer_allocator_iterations + len(expected), gpu.waits
    for name in ("val/mc_bpb", "val/mc_full_bpb", "val/mc_truncated_bpb"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4)


def answers(model, networks, config, device):
    """Logits of a prompt and of each of 40 tokens after it."""
    session = MCSession(model, networks, config, decoder=Decoder(model, graph=False))
    ids = torch.randint(0, 70, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    yield session.prefill(ids)
    for i in range(40):
        token = torch.tensor([i])
        yield session.step(Pretended(token) if device == CUDA else token)


@pytest.fixture
def asked(monkeypatch):
    """
    Notes each time that a session has reason to wait: "most", for what is wanted most; "scores", of a refocus; "again",
    where a token is chosen anew after one.
    """
    noted = []

    def note(owner, name, what):
        call = getattr(owner, name)

        def noting(*args, **more):
            result = call(*args, **more)
            if result is not None:
                noted.append(what)
            return result

        monkeypatch.setattr(owner, name, noting)

    note(Demand, "most", "most")
    note(Focus, "refocus", "scores")
    note(MCSession, "follow", "again")
    return noted


def test_a_session_waits_for_what_is_wanted_alone(asked):
    """Once per token, for what it wants most, and once more per refocus, for the scores."""
    options = {"allocator_soft_max": 48, "mc_infer_refocus_interval": 6, "mc_infer_allocator_iterations": 1}
    model, networks, config = objective_of(make_model().eval(), **options)
    networks.eval()
    expected = list(answers(model, networks, config, "cpu"))
    model, networks = moved(model), moved(networks)
    asked.clear()
    with pretended_gpu() as gpu, torch.inference_mode():
        calls = answers(model, networks, config, CUDA)
        for i, (logits, values) in enumerate(zip(calls, expected, strict=True)):
            assert len(gpu.waits) == asked.count("most") + asked.count("scores"), (i, gpu.waits, asked)
            assert asked.count("most") <= 1
            assert asked.count("scores") <= 1 or i == 0
            gpu.waits.clear()
            asked.clear()
            torch.testing.assert_close(logits.value, values, atol=1e-4, rtol=1e-4)


WAYS = [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"top_p": 0.5, "top_k": 5, "repetition_penalty": 1.1}]


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize(("mc", "rows"), [(False, 1), (False, 3), (True, 1)])
def test_a_token_of_every_row_is_one_wait(tokenizer, mc, rows, settings, asked):
    """Of the Engine, whatever the sampling: for the ids and what they want; with --mc, two more per refocus."""
    model = make_model(GPTConfig(T, tokenizer.get_vocab_size(), 2, 2, 2, 32)).eval()
    prompt, options = list(range(1, 100)), {"num_samples": rows, "max_tokens": 20, **settings}
    mc_options = {"allocator_soft_max": 48, "mc_infer_refocus_interval": 6, "mc_infer_allocator_iterations": 1}
    model, networks, config = objective_of(model, **mc_options)
    networks.eval()

    def generate():
        session = MCSession(model, networks, config, Decoder(model, graph=False)) if mc else None
        return Engine(model, tokenizer, graph=False).generate(prompt, session=session, **options)

    expected = list(generate())
    model, networks = moved(model), moved(networks)
    asked.clear()
    with pretended_gpu() as gpu:
        for i, (step, same) in enumerate(zip(generate(), expected, strict=True)):
            assert step == same
            assert len(gpu.waits) == 1 + asked.count("scores") + min(1, asked.count("again")), (i, gpu.waits, asked)
            assert bool(asked) == mc
            gpu.waits.clear()
            asked.clear()


@pytest.mark.parametrize("mc", [False, True])
def test_a_step_of_the_servers_streams_is_one_wait(tokenizer, mc, asked):
    """Of three streams that came one by one: for the ids of all; with --mc, those of each refocus too."""
    model = make_model(GPTConfig(T, tokenizer.get_vocab_size(), 2, 2, 2, 32)).eval()
    mc_options = {"allocator_soft_max": 48, "mc_infer_refocus_interval": 6, "mc_infer_allocator_iterations": 1}
    model, networks, config = objective_of(model, **mc_options)
    networks.eval()

    def steps():
        batch = Engine(model, tokenizer, graph=False).batch()
        for i in range(12):
            if i < 3:
                session = None
                if mc:
                    session = MCSession(model, networks, config, decoder=Decoder(model, graph=False))
                batch.add(list(range(1, 60 + i)), 40, Sampling(top_k=50, seed=i), session)
            asked.clear()
            yield [id for _, id, _ in batch.step()]

    expected = list(steps())
    model, networks = moved(model), moved(networks)
    with pretended_gpu() as gpu:
        for i, (ids, same) in enumerate(zip(steps(), expected, strict=True)):
            assert ids == same
            assert len(gpu.waits) == 1 + asked.count("scores") + min(1, asked.count("again")), (i, gpu.waits, asked)
            assert bool(asked) == mc
            gpu.waits.clear()


@pytest.mark.parametrize("several", [False, True])
def test_recording_a_graph_leaves_the_cache_as_it_is(several, monkeypatch):
    """Its first run is for real: it must not write where another token's key is."""
    model, prompt = make_model().eval(), tokens(B=1)[0][:, :9]

    def steps(model, graph):
        decoder, rows = Decoder(model, graph=graph), RowCaches()
        cache = KVCache(model.config.n_layer, 10)
        decoder.extend(prompt if model.get_device().type == "cpu" else Pretended(prompt), cache)
        if several:
            rows.join(cache)
        step = decoder.stepper(rows if several else cache)
        replay = SimpleNamespace(replay=lambda: step._step())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: replay)
        for i in range(3):
            ids, at = torch.tensor([i]), [9 + i] if several else 9 + i
            yield step(ids if model.get_device().type == "cpu" else Pretended(ids), positions=at)

    expected = list(steps(model, False))
    for name in ("Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    model = moved(model)
    with pretended_gpu(), torch.inference_mode():
        for logits, values in zip(steps(model, True), expected, strict=True):
            torch.testing.assert_close(logits.value, values, atol=1e-4, rtol=1e-4)
