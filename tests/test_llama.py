"""Models of transformers in a GPT's place: the same logits, losses and tokens, whoever reads and decodes."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from megacontext.networks import COPIED_RATES, MCNetworks
from megacontext.reader import Reader
from megacontext.session import MCSession
from megacontext.working_context import WorkingContext
from nanochat.common import UserError
from nanochat.decode import Decoder, compute_dtype
from nanochat.engine import Engine
from nanochat.kv_cache import CacheSession, KVCache
from nanochat.llama import Llama
from nanochat.sampling import Sampling
from tests.helpers import K, root_mean_square, session_settings
from tests.helpers_hf import FAMILIES, SHAPE, D, V, of_transformers

T = 40
# Logits up to 10 through three layers in float32, whose order of sums differs: see CLOSE in tests/helpers.py
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(a model of transformers, the trunk made of another like it)."""
    model = of_transformers(FAMILIES[request.param])
    return model, Llama(copy.deepcopy(model)).eval()


def ids(n=T, seed=0, rows=2):
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(seed))


class NoChats:
    """A tokenizer for an Engine whose answers never end."""

    turn_ends = frozenset()

    def encode_special(self, token):
        return -1


def generated(model, prompt, n):
    """What transformers generates greedily."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def reader_of(trunk, **options):
    settings = session_settings(mc_aux_dtype="fp32", **options)
    torch.manual_seed(1)
    return Reader(trunk, MCNetworks(D, trunk.config.n_layer, settings, trunk).eval(), settings)


# ---------------------------------------------------------------------------------------------------------
# Reading


@torch.no_grad()
def test_logits_and_losses(pair):
    theirs, ours = pair
    x, y = ids(), ids(seed=1)
    y[0, :5] = -1
    expected = theirs(x).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    torch.testing.assert_close(ours(inputs_embeds=ours.embed(x)), expected, **CLOSE)
    losses = F.cross_entropy(expected.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(ours(x, y, loss_reduction="none"), losses, **CLOSE)
    torch.testing.assert_close(ours(x, y), losses.sum() / (y >= 0).sum(), **CLOSE)


def test_gradients_of_embeddings(pair):
    """What GistNet learns from, through a frozen model and with weights of the rows."""
    theirs, ours = pair
    y, weights = ids(seed=1), torch.rand(2, T)
    embeds = theirs.get_input_embeddings()(ids()).detach().requires_grad_()
    losses = F.cross_entropy(theirs(inputs_embeds=embeds).logits.flatten(0, 1), y.flatten(), reduction="none")
    (losses * weights.flatten()).sum().backward()
    mine = ours.embed(ids()).detach().requires_grad_()
    loss, nll = ours.requires_grad_(False)(inputs_embeds=mine, targets=y, row_weights=weights)
    loss.backward()
    torch.testing.assert_close(nll, losses.detach(), **CLOSE)
    length = (embeds / mine).detach().mean()  # of their embeddings, in ours
    torch.testing.assert_close(mine.grad / length, embeds.grad, **CLOSE)


@torch.no_grad()
def test_a_working_context_of_tokens_is_read_as_the_model_reads_them(pair):
    theirs, ours = pair
    x, y = ids(), ids(seed=1)
    reader = reader_of(ours)
    table = reader.tree(reader.embed(x))
    context = WorkingContext.finest(2, T, K)
    reading = reader.read(table.materialize(context), context, y)
    expected = F.cross_entropy(theirs(x).logits.transpose(1, 2), y, reduction="none")
    torch.testing.assert_close(reading.nll, expected, **CLOSE)
    assert table.values[:, T:].isfinite().all()


@torch.no_grad()
def test_the_keys_of_a_span_fade(pair):
    """A gist's key is the mean over the positions of its span, in the fading of high frequencies at least."""
    ours = pair[1]
    reader, layer = reader_of(ours, mc_positional="gaussian"), ours.transformer.h[0]
    context = WorkingContext.from_map(torch.tensor([[1, 0]], dtype=torch.int8), 2 * K, K)
    x = ours.embed(ids(1 + K, rows=1))
    _, keys, _ = layer.heads(x, *reader.positions(context))
    cos, sin = (t[:, :K] for t in (ours.cos, ours.sin))
    _, spread, _ = layer.heads(x[:, :1].expand(-1, K, -1), cos, sin)
    gist, mean = keys[0, :, 0], spread[0].mean(1)  # [H_kv, d]
    d = gist.size(-1)
    pairs = gist.unflatten(-1, (2, d // 2)), mean.unflatten(-1, (2, d // 2))
    angles = [torch.atan2(p[:, 1], p[:, 0]) for p in pairs]
    slow = ours.frequencies.abs() < 0.5
    assert slow.any()
    turned = torch.cos(angles[0] - angles[1])[:, slow]
    torch.testing.assert_close(turned, torch.ones_like(turned), atol=1e-3, rtol=0)
    lengths = [p.square().sum(1).sqrt()[:, slow] for p in pairs]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=0.05, atol=1e-3)


@torch.no_grad()
def test_looks_are_where_the_model_looks(pair):
    theirs, ours = pair
    x, asking = ids(), torch.tensor([[3, 20, 39], [0, 7, 30]])
    attentions = theirs(x, output_attentions=True).attentions
    states = theirs(x, output_hidden_states=True).hidden_states[-2]
    _, looks = ours.trunk(ours.embed(x), asking=asking)
    for q, k, weights in zip(looks.queries, looks.keys, attentions, strict=True):
        k = k.repeat_interleave(q.size(1) // k.size(1), 1)
        scores = (q @ k.mT) * q.size(-1) ** -0.5
        later = torch.arange(T) > asking[..., None]
        mine = scores.masked_fill(later[:, None], -torch.inf).softmax(-1)
        expected = weights.gather(2, asking[:, None, :, None].expand(-1, q.size(1), -1, T))
        torch.testing.assert_close(mine, expected, **CLOSE)
    asked = states.gather(1, asking[..., None].expand(-1, -1, D))
    length = asked.norm() / looks.states.norm()
    torch.testing.assert_close(looks.states * length, asked, **CLOSE)
    torch.testing.assert_close(ours.states(ours.embed(x)) * length, states, **CLOSE)


def test_embeddings_have_the_length_of_gists_and_rescaling_rounds_nothing(pair):
    theirs, ours = pair
    assert 0.7 < root_mean_square(ours.transformer.wte.weight) < 1.5
    ratio = ours.transformer.wte.weight / theirs.get_input_embeddings().weight
    assert ratio.unique().numel() == 1
    assert ratio.view(-1)[0].log2().frac() == 0


# ---------------------------------------------------------------------------------------------------------
# Decoding


def test_greedy_answers_are_those_of_transformers(pair):
    theirs, ours = pair
    prompt = ids(17, rows=1)[0].tolist()
    expected = generated(theirs, prompt, 20)
    assert len(set(expected)) > 5
    engine = Engine(ours, NoChats())
    rows, _ = engine.generate_batch(prompt, 3, max_tokens=20, temperature=0.0)
    assert [row[len(prompt) :] for row in rows] == [expected] * 3
    for graph in (False, True):
        reader = reader_of(ours, allocator_soft_max=200)
        options = reader.networks, reader.config, Decoder(ours, graph=graph)
        session = MCSession(ours, *options)
        rows, _ = engine.generate_batch(prompt, max_tokens=20, temperature=0.0, session=session)
        rows += engine.generate_batch(
            prompt, max_tokens=20, temperature=0.0, make_session=partial(MCSession, ours, *options)
        )[0]
        assert [row[len(prompt) :] for row in rows] == [expected] * 2
        assert session.focus_state()["lod"] == [[0, -(-36 // K)]]


def test_answers_to_several_prompts_at_once(pair):
    theirs, ours = pair
    prompts = [ids(n, seed=n, rows=1)[0].tolist() for n in (3, 30, 11)]
    batch = Engine(ours, NoChats()).batch()
    streams = [batch.add(prompt, 12, Sampling(temperature=0.0)) for prompt in prompts]
    answers = {id(stream): [] for stream in streams}
    while len(batch):
        for stream, token, _ in batch.step():
            answers[id(stream)].append(token)
    for stream, prompt in zip(streams, prompts, strict=True):
        assert [token for token in answers[id(stream)] if token is not None] == generated(theirs, prompt, 12)


@torch.no_grad()
@pytest.mark.parametrize("deep", [0, 2])
def test_a_session_with_gists_says_what_the_model_says_of_its_working_context(pair, deep):
    ours = pair[1]
    reader = reader_of(ours, mc_infer_exact=True, gistnet_deep=deep)
    if deep:
        torch.nn.init.normal_(reader.networks.gistnet.deep.head.c_proj.weight, std=0.2)
    session = MCSession(ours, reader.networks, reader.config)
    logits = session.prefill(ids(150, rows=1)[0].tolist())
    for token in range(20):
        context = session.context
        assert context.coarsest > 0
        inputs = session.tree.materialize(context)
        assert context.tiles[0, 0] > 0
        assert inputs.shape[-1] == (1 + deep) * D
        assert torch.equal(inputs[:, 0], F.pad(ours.embed(ids(150, rows=1)[:, 0]), (0, deep * D)))
        expected = ours(inputs_embeds=inputs, cos_sin=reader.positions(context))[:, -1]
        torch.testing.assert_close(logits, expected, **CLOSE)
        logits = session.step(torch.tensor([token]))


@torch.inference_mode()
def test_a_decoder_reads_in_parts(pair):
    theirs, ours = pair
    x, cache = ids(rows=1), KVCache(3, 8)
    expected, decoder = theirs(x).logits[0], Decoder(ours)
    torch.testing.assert_close(decoder.extend(x[:, :20], cache, last=0), expected[:20], **CLOSE)
    torch.testing.assert_close(decoder.extend(x[:, 20:30], cache)[0], expected[29], **CLOSE)
    torch.testing.assert_close(decoder.extend(x[:, 30:], cache, last=0), expected[30:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "decoded"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_precisions(weights, decoded):
    """bf16 has 8 bits: logits of a few units are off by some hundredths per layer."""
    weights, decoded = getattr(torch, weights), getattr(torch, decoded)
    theirs = of_transformers(FAMILIES["qwen2"])
    ours = Llama(copy.deepcopy(theirs).to(weights)).eval()
    assert compute_dtype(ours) == weights
    decoder = Decoder(ours, decoded)
    assert decoder.network.head.weight.dtype == decoded
    assert ours.lm_head.weight.dtype == weights
    x = ids(rows=1)
    expected = theirs(x).logits[0, -1]
    got = CacheSession(decoder).prefill(x[0].tolist())[0]
    for logits in (got, ours(x)[0, -1]):
        assert logits.dtype == torch.float32
        assert (logits - expected).square().mean().sqrt() < 0.1 * expected.std()


# ---------------------------------------------------------------------------------------------------------
# What is refused, and what is said


def test_positions_end_where_the_model_no_longer_sees_all():
    ours = Llama(of_transformers(MistralConfig(**SHAPE, sliding_window=32)))
    assert ours.max_seq_len == ours.config.sequence_len == 32
    with pytest.raises(ValueError, match="40 tokens are more than the 32 positions"):
        ours(ids())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**SHAPE, head_dim=16), "got one of type 'gemma2'"),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "yarn"),
    ],
)
def test_other_models_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        Llama(AutoModelForCausalLM.from_config(config))


def test_flops_and_parameters(pair):
    theirs, ours = pair
    assert ours.num_params() == theirs.num_parameters()
    c = theirs.config
    matrices = sum(p.numel() for name, p in theirs.named_parameters() if "embed" not in name and "lm_head" not in name)
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * 2 * len(ours.frequencies) * 256
    expected = 6 * (matrices + V * D) + attention
    assert abs(ours.flops_per_token() / expected - 1) < 1e-2


# ---------------------------------------------------------------------------------------------------------
# A GistNet that starts from the model's layers


def copied(trunk, layers=2):
    settings = session_settings(gistnet_type="copied", gistnet_layers=layers)
    return MCNetworks(trunk.config.n_embd, trunk.config.n_layer, settings, trunk, bos=7)


@torch.no_grad()
def test_a_copied_encoder_starts_as_the_models_lowest_layers(pair):
    trunk, seen, children = pair[1], {}, torch.randn(5, K, D)
    networks = copied(trunk)
    hooks = [
        trunk.transformer.h[1].register_forward_hook(lambda layer, args, x: seen.update(expected=x)),
        networks.gistnet.copied[1].register_forward_hook(lambda layer, args, x: seen.update(ours=x)),
    ]
    gists = networks.gistnet(children, 1)
    trunk.trunk(torch.cat((trunk.embed(torch.full((5, 1), 7)), children), dim=1))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen["ours"], seen["expected"], **CLOSE)
    torch.testing.assert_close(gists[:, :D], F.rms_norm(children[:, -1], (D,)))
    torch.testing.assert_close(networks.gistnet(children[3:], 2), gists[3:])


def test_a_copied_encoder_learns_and_the_model_stays(pair):
    trunk, children = pair[1], torch.randn(5, K, D)
    networks, before = copied(trunk), {name: p.clone() for name, p in trunk.state_dict().items()}
    start = {name: p.detach().clone() for name, p in networks.gistnet.named_parameters()}
    optimizers = networks.setup_optimizers()
    for _ in range(2):  # the last matrix is zero at first: what is before it learns from the second step on
        (networks.gistnet(children, 1) + networks.gistnet(children, 2)).square().mul(torch.randn(D)).sum().backward()
        for optimizer in optimizers[:2]:
            optimizer.step()
    assert all(not torch.equal(p, start[name]) for name, p in networks.gistnet.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in trunk.state_dict().items())
    rates = {
        id(p): group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    assert {rates[id(p)] for p in networks.gistnet.copied.parameters()} == {COPIED_RATES[1]}
    assert rates[id(networks.gistnet.head.c_fc.weight)] == COPIED_RATES[0]


def test_what_has_no_layers_to_copy_is_refused(pair):
    settings = session_settings(gistnet_type="copied")
    with pytest.raises(UserError, match="--gistnet_type: copied needs a trained model"):
        MCNetworks(D, 3, settings)
    with pytest.raises(UserError, match="--gistnet_layers: expected at most the model's 3, got 4"):
        copied(pair[1], layers=4)
