"""What must be equal on a GPU and on the CPU: dev/gpu_check.py runs it there, and its rehearsal here."""

from functools import partial

import torch

from megacontext.session import MCSession
from nanochat.common import autocast
from nanochat.decode import Decoder
from nanochat.gpt import GPTConfig
from nanochat.kv_cache import CacheSession
from nanochat.loop import maybe_compile
from tests.helpers import CLOSE, K, make_model, make_objective, tokens

CPU = torch.device("cpu")


def checks(device, compiled=True):
    """(name, function that raises what is wrong) of each check. compiled: whether compiled models are among them."""
    torch.set_float32_matmul_precision("highest")
    for mc in (False, True):
        what = "with --mc" if mc else "plain"
        yield f"loss and gradients, {what}: device as CPU", partial(learns_as_the_cpu, device, mc)
        yield f"loss, {what}: bf16 near fp32", partial(learns_in_bf16, device, mc)
        if compiled:
            yield f"loss and gradients, {what}: compiled as eager", partial(learns_compiled, device, mc)
    yield "greedy tokens: graphs, eager, CPU", partial(answers_alike, device, plain_session)
    yield "greedy tokens with --mc: graphs, eager, CPU", partial(answers_alike, device, mc_session)
    yield "a model of 128-channel heads in bf16 decodes as it reads", partial(decodes_as_it_reads, device)


def learned(device, dtype=torch.float32, compile="off", mc=True):
    """(loss, gradients) of a training step."""
    x, y = (t.to(device) for t in tokens(B=4))
    model = make_model().to(device)
    objective = make_objective(maybe_compile(model, compile, device))
    objective.reader.networks.to(device)
    with autocast(device, dtype):
        if mc:
            loss = objective.process_batch(x, y, 1.0, torch.Generator().manual_seed(0)).loss
        else:
            loss = objective.model(x, y)
    loss.backward()
    return {"loss": loss.detach().cpu()} | {n: p.grad.float().cpu() for n, p in model.named_parameters()}


def compare(got, expected, tolerance):
    for name, value in expected.items():
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(
            got[name].float(), value.float(), atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def learns_as_the_cpu(device, mc):
    compare(learned(device, mc=mc), learned(CPU, mc=mc), 1e-3)


def learns_in_bf16(device, mc):
    got, expected = learned(device, torch.bfloat16, mc=mc), learned(device, mc=mc)
    torch.testing.assert_close(got["loss"].float(), expected["loss"], rtol=0.02, atol=0)


def learns_compiled(device, mc):
    compare(learned(device, compile="on", mc=mc), learned(device, mc=mc), 2e-3)


def plain_session(model, graph):
    return CacheSession(Decoder(model, torch.float32, graph), 1, 64)


def mc_session(model, graph):
    options = {"allocator_soft_max": 64, "mc_infer_refocus_interval": 8, "mc_aux_dtype": "fp32", "block_size": K}
    objective = make_objective(model, **options)
    networks = objective.reader.networks.to(model.get_device()).eval()
    return MCSession(model, networks, objective.config, decoder=Decoder(model, torch.float32, graph))


@torch.inference_mode()
def answered(session, n=48):
    """(logits, greedy ids) after each of n steps."""
    prompt = torch.randint(1, 70, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    logits, ids = [session.prefill(prompt)], []
    for _ in range(n):
        ids.append(logits[-1].argmax(-1))
        logits.append(session.step(ids[-1]))
    return torch.stack(logits).cpu(), torch.stack(ids).cpu()


def answers_alike(device, make_session):
    """make_session(model, graph): on the device, with and without graphs, and on the CPU."""
    on_cpu, _ = answered(make_session(make_model().eval(), False))
    model = make_model().to(device).eval()
    (graph, its), (eager, others) = (answered(make_session(model, graph)) for graph in (True, False))
    assert torch.equal(its, others), "graphs choose other tokens"
    torch.testing.assert_close(graph, eager, **CLOSE)
    n = (graph.argmax(-1) == on_cpu.argmax(-1)).all(1).long().cumprod(0).sum()  # until one differs by rounding
    torch.testing.assert_close(graph[:n], on_cpu[:n], atol=1e-2, rtol=1e-2)
    assert n > 8, f"other tokens than on the CPU after {n}"


def decodes_as_it_reads(device):
    model = make_model(GPTConfig(256, 1024, 2, 2, 2, 256), spread=0.05).to(device).eval()
    ids = torch.randint(0, 1024, (1, 100), device=device)
    with torch.no_grad(), autocast(device, torch.bfloat16):
        whole = model(ids)[:, -1]
    session = CacheSession(Decoder(model, torch.bfloat16, graph=True), 1, 4)
    session.prefill(ids[0, :-1].tolist())
    torch.testing.assert_close(session.step(ids[0, -1:]), whole, atol=0.1, rtol=0.05)
