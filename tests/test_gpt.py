"""The model against slow, obvious references; shapes, losses, KV cache, other people's checkpoints' shapes."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.common import autocast, has_fast_bf16
from nanochat.cross_entropy import softcap, softcap_cross_entropy
from nanochat.decode import Decoder
from nanochat.gpt import GPT, GPTConfig, apply_rotary, attend, causal_mask, norm, rotary_cos_sin
from nanochat.kv_cache import KVCache
from tests.helpers import CLOSE, make_model

CONFIG = GPTConfig(sequence_len=16, vocab_size=70, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


def reference_logits(model, ids):
    """The forward pass of one sequence, written out position by position and head by head, in float64."""
    c = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    d, half = c.n_embd // c.n_head, c.n_embd // c.n_head // 2

    def rms(v):
        return v / torch.sqrt((v * v).mean() + torch.finfo(torch.float32).eps)

    def rotate(v, position):
        out = v.clone()
        for i in range(half):
            angle = position / 10000 ** (2 * i / d)
            out[i] = v[i] * math.cos(angle) + v[i + half] * math.sin(angle)
            out[i + half] = -v[i] * math.sin(angle) + v[i + half] * math.cos(angle)
        return out

    xs = [rms(w["transformer.wte.weight"][i]) for i in ids]
    for layer in range(c.n_layer):
        get = lambda name, layer=layer: w[f"transformer.h.{layer}.{name}.weight"]  # noqa: E731
        h = [rms(x) for x in xs]
        out = []
        for t in range(len(xs)):
            heads = []
            for head in range(c.n_head):
                kv = head // (c.n_head // c.n_kv_head)
                q = rms(rotate((get("attn.c_q") @ h[t])[head * d : (head + 1) * d], t))
                keys = [rms(rotate((get("attn.c_k") @ h[s])[kv * d : (kv + 1) * d], s)) for s in range(t + 1)]
                values = [(get("attn.c_v") @ h[s])[kv * d : (kv + 1) * d] for s in range(t + 1)]
                p = torch.softmax(torch.stack([q @ k / math.sqrt(d) for k in keys]), 0)
                heads.append(sum(p[s] * values[s] for s in range(t + 1)))
            out.append(get("attn.c_proj") @ torch.cat(heads))
        xs = [x + o for x, o in zip(xs, out, strict=True)]
        xs = [x + get("mlp.c_proj") @ torch.relu(get("mlp.c_fc") @ rms(x)) ** 2 for x in xs]
    logits = torch.stack([w["lm_head.weight"] @ rms(x) for x in xs])[:, : c.vocab_size]
    return 15 * torch.tanh(logits / 15)


def test_forward_equals_the_reference():
    model = make_model(CONFIG)
    ids = torch.randint(0, 70, (2, 9))
    logits = model(ids)
    assert logits.shape == (2, 9, 70)
    assert logits.dtype == torch.float32
    for row in range(2):
        expected = reference_logits(model, ids[row].tolist())
        torch.testing.assert_close(logits[row].double(), expected, atol=2e-4, rtol=1e-4)


def test_state_dict_keys_and_depth():
    config = GPTConfig.from_depth(20, 2048, 65536)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (20, 1280, 10, 10)
    with torch.device("meta"):
        assert GPT(config).num_params() == 560_988_160  # the $100 model
    for depth in range(1, 33):
        config = GPTConfig.from_depth(depth, 8, 64)
        assert config.n_embd == 64 * depth
        assert config.n_head >= -(-config.n_embd // 128)
    keys = set(make_model(CONFIG).state_dict())
    block = {"attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    expected = {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in block}
    assert keys == expected | {"transformer.wte.weight", "lm_head.weight"}


@pytest.mark.parametrize(("vocab", "padded"), [(64, 64), (65, 128), (70, 128), (65536, 65536), (50257, 50304)])
def test_vocabulary_is_padded(vocab, padded):
    assert GPTConfig(vocab_size=vocab).padded_vocab_size == padded


def test_init_scales():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=512, n_layer=1, n_head=2, n_kv_head=2, n_embd=128))
    model.init_weights()
    block = model.transformer.h[0]
    assert not model.lm_head.weight.any()
    assert not block.attn.c_proj.weight.any()
    assert not block.mlp.c_proj.weight.any()
    assert block.attn.c_q.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert model.transformer.wte.weight.std().item() == pytest.approx(1.0, rel=0.1)


def test_causality():
    model = make_model(CONFIG)
    a = torch.randint(0, 70, (1, 12))
    b = a.clone()
    b[0, 7] = (b[0, 7] + 1) % 70
    la, lb = model(a), model(b)
    assert torch.equal(la[:, :7], lb[:, :7])
    assert not torch.equal(la[:, 7:], lb[:, 7:])


def test_inputs_embeds_and_cos_sin_are_the_same_model():
    model = make_model(CONFIG)
    ids = torch.randint(0, 70, (2, 9))
    cos, sin = rotary_cos_sin(torch.arange(9), 8)
    cos_sin = cos[None, :, None, :], sin[None, :, None, :]
    assert torch.equal(model(ids), model(inputs_embeds=model.embed(ids), cos_sin=cos_sin))
    per_row = tuple(t.expand(2, -1, -1, -1) for t in cos_sin)
    assert torch.equal(model(ids), model(ids, cos_sin=per_row))
    shifted = tuple(t[:, :, :, :] for t in (cos.roll(1, 0)[None, :, None], sin.roll(1, 0)[None, :, None]))
    assert not torch.allclose(model(ids), model(ids, cos_sin=shifted))
    with pytest.raises(ValueError, match="exactly one of idx and inputs_embeds"):
        model(ids, inputs_embeds=model.embed(ids))
    with pytest.raises(ValueError, match="exactly one of idx and inputs_embeds"):
        model()


@torch.no_grad()
@pytest.mark.parametrize(("n", "layers"), [(1, [1]), (2, [1, 2]), (1, [2])])
def test_what_stands_behind_an_embedding_is_added_further_up(n, layers):
    """Model, states and Decoder: as the layers are written out one after another."""
    depth = 4 if layers == [2] else n + 1
    model = make_model(dataclasses.replace(CONFIG, n_layer=depth)).eval()
    x, deep = model.embed(torch.randint(0, 70, (2, 9))), torch.randn(2, 9, n * CONFIG.n_embd)
    inputs, cos_sin, h, before = torch.cat((x, deep), -1), (model.cos[:, :9], model.sin[:, :9]), x, []
    for layer, block in enumerate(model.transformer.h):
        if layer in layers:
            h = h + h.square().mean(-1, keepdim=True).sqrt() * deep.chunk(n, -1)[layers.index(layer)]
        before.append(h)
        h = block(h, cos_sin)
    expected = 15 * torch.tanh(model.lm_head(norm(h))[..., :70] / 15)
    torch.testing.assert_close(model(inputs_embeds=inputs), expected, **CLOSE)
    torch.testing.assert_close(model.states(inputs), before[-1], **CLOSE)
    decoder, cache = Decoder(model), KVCache(depth, 8)
    decoder.extend(inputs[:1, :4], cache)
    torch.testing.assert_close(decoder.extend(inputs[:1, 4:], cache), expected[:1, -1], **CLOSE)
    torch.testing.assert_close(decoder.states, before[-1][0, 4:], **CLOSE)
    assert torch.equal(model(inputs_embeds=F.pad(x, (0, deep.size(-1)))), model(inputs_embeds=x))


def test_a_key_that_is_damped_weighs_as_a_part_of_one():
    """Two equal keys of half the weight are as one; what comes later is not seen."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    plain, _ = attend(q, k, v, None)
    twice = torch.tensor([0, 1, 1, 2, 3, 4])
    bias = torch.tensor([[0, -1, -1, 0, 0, 0]]) * math.log(2)
    damped, _ = attend(q[:, :, twice], k[:, :, twice], v[:, :, twice], None, causal_mask(bias, 6, torch.float32))
    torch.testing.assert_close(damped[:, [0, 2, 3, 4, 5]], plain)


@torch.no_grad()
def test_where_there_is_a_mask_each_head_has_its_keys(monkeypatch):
    """Else CUDA has only the kernel that needs memory for T² scores of each head."""
    model = make_model(dataclasses.replace(CONFIG, n_head=4, n_kv_head=2)).eval()
    inputs, real, heads = model.embed(torch.randint(0, 70, (1, 9))), F.scaled_dot_product_attention, []

    def noting(q, k, v, attn_mask=None, **more):
        heads.append((attn_mask is not None, q.size(1) == k.size(1)))
        return real(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    model(inputs_embeds=inputs)
    assert set(heads) == {(False, False)}
    heads.clear()
    bias = torch.zeros(1, 9)
    expected = model(inputs_embeds=inputs, key_bias=bias)[:, -1]
    decoder, cache = Decoder(model), KVCache(CONFIG.n_layer, 9)
    decoder.extend(inputs[:, :4], cache)
    cache.bias = bias[0, :4]
    torch.testing.assert_close(decoder.extend(inputs[:, 4:], cache), expected, **CLOSE)
    assert set(heads) == {(True, True), (False, False)}


def test_rotation_turns_backwards():
    cos, sin = rotary_cos_sin(torch.tensor([1]), 2)
    turned = apply_rotary(torch.tensor([[[[1.0, 0.0]]]]), cos[None, :, None], sin[None, :, None])
    torch.testing.assert_close(turned.flatten(), torch.tensor([math.cos(1), -math.sin(1)]))


def test_rotary_phase_is_exact_far_out():
    position = 2**24 + 1  # float32 cannot hold this integer
    cos, _ = rotary_cos_sin(torch.tensor([position]), 8)
    assert cos[0, 0].item() == pytest.approx(math.cos(position), abs=1e-6)


def test_too_long_input_says_so():
    with pytest.raises(ValueError, match="161 tokens are more than the 160 positions"):
        make_model(CONFIG)(torch.zeros(1, 161, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------
# Loss


# Sums of 21 rows in float32, of terms up to 10 whose logits, up to 15, are off by ε: 10 · 15 · ε · √21 = 8e-5
SUMS = {"atol": 1e-4, "rtol": 1e-5}


def reference_loss(x, weight, targets, vocab_size, cap, reduction):
    logits = (x @ weight.T)[..., :vocab_size].float()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize("cap", [15.0, None])
def test_cross_entropy_and_gradients(reduction, block, cap, monkeypatch):
    monkeypatch.setitem(softcap_cross_entropy.__globals__["BLOCK_ELEMENTS"], "cpu", block)
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16, requires_grad=True)
    weight = torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(0, 50, (3, 7))
    targets[0, :4] = -1
    losses, gradients = [], []
    for function in (reference_loss, softcap_cross_entropy):
        x.grad = weight.grad = None
        loss = function(x, weight, targets, 50, cap, reduction)
        (loss * 3).sum().backward()
        losses.append(loss.detach())
        gradients += [x.grad, weight.grad]
    torch.testing.assert_close(losses[0], losses[1], **SUMS)
    torch.testing.assert_close(gradients[0], gradients[2], **SUMS)
    torch.testing.assert_close(gradients[1], gradients[3], **SUMS)
    with torch.no_grad():
        torch.testing.assert_close(softcap_cross_entropy(x, weight, targets, 50, cap, reduction), losses[0], **SUMS)


@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize("cap", [15.0, None])
def test_cross_entropy_with_weights_of_rows(block, cap, monkeypatch):
    monkeypatch.setitem(softcap_cross_entropy.__globals__["BLOCK_ELEMENTS"], "cpu", block)
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16, requires_grad=True)
    weight = torch.randn(64, 16, requires_grad=True)
    targets, row_weights = torch.randint(0, 50, (3, 7)), torch.rand(3, 7)
    targets[0, :4] = -1
    expected = reference_loss(x, weight, targets, 50, cap, "none")
    weighted = (expected * row_weights.flatten()).sum()
    (weighted * 3).backward()
    gradients = [x.grad, weight.grad]
    x.grad = weight.grad = None
    loss, losses = softcap_cross_entropy(x, weight, targets, 50, cap, row_weights=row_weights)
    (loss * 3).backward()
    assert not losses.requires_grad
    for got, wanted in zip((loss, losses, x.grad, weight.grad), (weighted, expected, *gradients), strict=True):
        torch.testing.assert_close(got, wanted, **SUMS)
    with torch.no_grad():
        again = softcap_cross_entropy(x, weight, targets, 50, cap, row_weights=row_weights)
    torch.testing.assert_close(again, (weighted.detach(), expected.detach()), **SUMS)


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products run while it is in use, backward passes included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cap", [15.0, None])
def test_divergence_from_a_teacher_against_autograd(cap):
    """The loss and its gradient, where a target says that there is one; nothing for what the teacher says itself."""
    torch.manual_seed(0)
    x, teacher = torch.randn(2, 3, 7, 16).mul_(2).unbind()
    weight, targets, row_weights = torch.randn(64, 16), torch.randint(-1, 3, (3, 7)), torch.rand(3, 7)

    def through(function):
        again = x.clone().requires_grad_()
        loss = function(again)
        loss.backward()
        return loss.detach(), again.grad

    def plain(x):
        log_p, log_q = (softcap(t @ weight[:50].T, cap).log_softmax(-1) for t in (teacher, x))
        return ((log_p.exp() * (log_p - log_q)).sum(-1) * row_weights * (targets >= 0)).sum()

    def ours(x):
        more = {"row_weights": row_weights, "teacher": teacher}
        return softcap_cross_entropy(x, weight, targets, 50, cap, **more)[0]

    for got, expected in zip(through(ours), through(plain), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    same = softcap_cross_entropy(
        *(teacher.requires_grad_(), weight, targets, 50, cap), row_weights=row_weights, teacher=teacher.detach()
    )
    assert same[0].abs() < 1e-5


@pytest.mark.parametrize(
    ("x_needs", "weight_needs", "products"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_makes_only_the_gradients_that_are_needed(x_needs, weight_needs, products, weighted):
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2, 7, 16), torch.randn(64, 16), torch.randint(0, 50, (2, 7))
    row_weights = torch.rand(2, 7) if weighted else None
    whole = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    x.requires_grad_(x_needs), weight.requires_grad_(weight_needs)

    def loss_of(x, weight):
        loss = softcap_cross_entropy(x, weight, targets, 50, 15.0, row_weights=row_weights)
        return loss[0] if weighted else loss

    expected = loss_of(*whole)
    expected.backward()
    with MatrixProducts() as run:
        loss = loss_of(x, weight)
        if loss.requires_grad:
            loss.backward()
    assert run.count == products
    torch.testing.assert_close(loss.detach(), expected.detach())
    for got, needed, reference in zip((x, weight), (x_needs, weight_needs), whole, strict=True):
        assert (got.grad is not None) == needed
        if needed:
            assert torch.equal(got.grad, reference.grad)


def test_autocast_whatever_surrounds_it():
    a, cpu = torch.randn(4, 4), torch.device("cpu")
    for around in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            for dtype in (torch.float32, torch.bfloat16):
                with autocast(cpu, dtype):
                    assert (a @ a).dtype == dtype


def test_a_bf16_table_without_autocast():
    """As on a GPU with --dtype=fp32: everything after the lookup is float32."""
    model = make_model(CONFIG)
    model.transformer.wte.bfloat16()
    ids = torch.randint(0, 70, (2, 5))
    assert model(ids, ids).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.embed(ids).dtype == torch.bfloat16


def test_the_residual_stream_stays_bf16_on_cuda():
    """Autocast makes rms_norm float32 there, though not on a CPU. Fake tensors have a device but no data."""
    seen = []
    cuda = torch.device("cuda")
    with (
        FakeTensorMode(),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        with cuda:
            model = GPT(CONFIG)
            table = torch.empty(CONFIG.padded_vocab_size, CONFIG.n_embd, dtype=torch.bfloat16)  # as init_weights has it
            model.transformer.wte = torch.nn.Embedding.from_pretrained(table, freeze=False)
            ids = torch.zeros(2, 5, dtype=torch.long)
        for block in model.transformer.h:
            block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
        with autocast(cuda, torch.bfloat16):
            assert model(ids).dtype == torch.float32  # the logits
        assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
        with autocast(cuda, torch.float32):
            model(ids)
        assert seen[2:] == [(torch.float32, torch.float32)] * 2


def test_bf16_only_where_the_hardware_has_it(monkeypatch):
    """A T4 or V100: PyTorch emulates bf16 there, slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fast_bf16("cuda")


def test_nothing_to_predict_is_loss_zero():
    model = make_model(CONFIG)
    ids = torch.randint(0, 70, (2, 5))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            loss = model(ids, torch.full_like(ids, -1))
            assert loss.item() == 0.0
    model(ids, torch.full_like(ids, -1)).backward()
    assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())


def test_loss_in_bf16_is_close_and_finite():
    model = make_model(CONFIG, spread=3.0)  # logits far into the softcap
    ids = torch.randint(0, 70, (2, 16))
    exact = model(ids, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(ids, ids)
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)
    assert rough.dtype == torch.float32


def test_bad_reduction():
    with pytest.raises(ValueError, match="mean, sum or none, got 'median'"):
        make_model(CONFIG)(
            torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long), loss_reduction="median"
        )
