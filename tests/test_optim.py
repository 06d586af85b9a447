"""Optimizers against torch's own, and the sharded ones against one process."""

import os

import pytest
import torch
import torch.distributed as dist

import nanochat.muon
from nanochat.gpt import GPTConfig
from nanochat.muon import Muon, orthogonalize
from nanochat.sharding import clip_gradients
from tests.helpers import in_ranks, make_model


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(3, 8, 8), (2, 16, 8), (2, 8, 16)]:
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_muon_equals_torch():
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (64, 16), (16, 64)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = (
        Muon(ours, lr=0.02, momentum=0.95),
        torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True, ns_steps=5),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=3e-3, rtol=0)  # both iterate in bf16


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="for matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_clip_gradients_equals_torch():
    torch.manual_seed(0)
    a = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    for p, q in zip(a, b, strict=True):
        p.grad = torch.randn(4, 4)
        q.grad = p.grad.clone()
    total = clip_gradients([torch.optim.SGD(a[:1], lr=1.0), torch.optim.SGD(a[1:], lr=1.0)], 0.5)
    expected = torch.nn.utils.clip_grad_norm_(b, 0.5)
    torch.testing.assert_close(total, expected)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def train_on_shares(folder):
    """Six steps on this rank's share of each batch, the last two not clipped; the weights go to a file of the rank."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    nanochat.muon.has_fast_bf16 = lambda device_type: False  # float32, so that the comparison can be close
    model = make_model(GPTConfig(sequence_len=16, vocab_size=67, n_layer=3, n_head=2, n_kv_head=2, n_embd=32))
    optimizers = model.setup_optimizers(embedding_lr=0.01, weight_decay=0.1)
    for step in range(6):
        ids = torch.randint(0, 67, (6, 17), generator=torch.Generator().manual_seed(step))
        own = ids.chunk(world)[rank]
        model(own[:, :-1], own[:, 1:]).backward()
        if step < 4:
            assert clip_gradients(optimizers, 0.05) > 0.05  # small enough to bite
        else:
            assert clip_gradients(optimizers, 0.0) is None
        assert all(optimizer._reduced for optimizer in optimizers if world > 1)  # all are under way before the first
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    torch.save(model.state_dict(), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.barrier()


def test_sharded_optimizers_equal_one_process(tmp_path):
    """2, and 3, which divides neither the vocabulary (67 → 128) nor most matrices."""
    for world in (1, 2, 3):
        in_ranks(world, train_on_shares, tmp_path)
    one = torch.load(tmp_path / "1_0.pt", weights_only=True)
    for name in ("2_0", "2_1", "3_0", "3_1", "3_2"):
        many = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for key, tensor in one.items():
            torch.testing.assert_close(many[key], tensor, atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
