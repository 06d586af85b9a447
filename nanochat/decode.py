"""
Fast decoding: a GPT's weights are copied once into the layout and precision in which generation is fastest.

The model itself has no code for generation and no cache. Decoder and GPT.forward are equal up to rounding.

Shapes: B rows, T tokens, D = n_embd, H = n_head, K = n_kv_head, d = D / H, L layers, V = vocab_size.
"""

from contextlib import nullcontext
from functools import partial, singledispatch

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from nanochat.common import autocast_dtype
from nanochat.gpt import LOGIT_SOFTCAP, apply_rotary, attention, causal_mask, cos_sin_at, deepened, split_deep
from nanochat.kv_cache import RowCaches, key_bias


def compute_dtype(model):
    """The precision in which the model computes: autocast's where it is on, else that of its matrices."""
    return autocast_dtype(model.get_device().type, model.lm_head.weight.dtype)


_optimizer_steps = 0  # of all optimizers of the process


def _after_optimizer_step(*_):
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_after_optimizer_step)


def weights_version(model):
    """
    A value that changes when the model's weights do, computed without reading the weights.

    It notices changes in place, replaced tensors, and optimizer steps (fused AdamW does not increase the version of its
    parameters). It does not notice changes through `.data`, such as `weight.data.mul_(2)`.
    """
    return _optimizer_steps, [
        (StorageWeakRef(p.untyped_storage()), p.data_ptr(), object() if p.is_inference() else p._version)
        for p in model.parameters()
    ]


class Matrix:
    """
    A weight [out, in] laid out for products: called with x [N, in] it gives [N, out].

    On x86 oneDNN packs it into blocks, which suits one row as well as a whole prompt: see dev/LOG.md.
    """

    def __init__(self, weight, dtype):
        weight = weight.to(dtype)
        self.packed = packs(weight.device, dtype)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        else:
            self.weight = weight.T.contiguous() if weight.device.type == "cpu" else weight.T

    def __call__(self, x):
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return torch.mm(x, self.weight)


def packs(device, dtype):
    """Whether oneDNN multiplies packed weights fast here."""
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    supported = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return torch.backends.mkldnn.is_available() and supported.get(dtype, False)


class Decoder:
    """
    What GPT.forward computes, with a KVCache, and with weights converted once to `dtype` (see compute_dtype).

    Making one takes as long as a few steps. It does not follow the model: make another when `weights_version` has
    changed. A surrounding autocast has no effect. `graph`: whether steps are CUDA graphs (None: if there is CUDA);
    without CUDA, True runs the same static shapes without a graph.
    """

    @torch.no_grad()
    def __init__(self, model, dtype=None, graph=None):
        self.config, self.device = model.config, model.get_device()
        self.dtype = dtype or compute_dtype(model)
        self.graph = self.device.type == "cuda" if graph is None else graph
        self.network, self.frequencies = network_of(model, self.dtype), model.frequencies
        self.cos, self.sin = model.cos.to(self.dtype), model.sin.to(self.dtype)
        self.states = None  # of the inputs of the last call, before the last layer: [B·T, D], or of a step [B, D]

    @property
    def max_seq_len(self) -> int:
        """Number of positions in the table of rotary angles; angles beyond it must be passed."""
        return self.cos.size(1)

    @torch.inference_mode()
    def extend(self, inputs, cache, positions=None, seen=None, last=(slice(None), -1)):
        """
        Append inputs to the cache; logits [B, V] in float32 after the last of them, or after those at index `last`.

        inputs: ids [B, T], or embeddings [B, T, D] from GPT.embed. positions: that of the first input, or the rotary
        angles (cos, sin) or (cos, sin, fade) of all, each [B, T, 1, ...]; None for cache.pos. ValueError for positions
        beyond the model's table; angles may be for any. seen: None if each input attends to the whole cache and the
        inputs up to itself, else [T, pos + T]: bool, or a bias on the attention scores.
        """
        T = inputs.size(1)
        positions = self.checked(positions, cache, T)
        if seen is None and cache.bias is not None:
            seen = causal_mask(key_bias([cache], cache.pos + T), T, self.dtype)

        def attend(layer, q, k, v):
            return attend_causally(q, *cache.insert(layer, k, v), seen)

        logits = self._run(inputs, self._rotary(positions, T), attend, last)
        cache.advance(T)
        return logits

    def step(self, ids, cache, positions=None):
        """Logits [B, V] after one more token per row, ids [B]; positions: None or an int."""
        return self.extend(ids[:, None], cache, positions)

    def stepper(self, cache):
        """
        The fastest step for this cache: a function (ids [B], positions=None) -> logits [B, V]; for RowCaches (ids,
        positions, rows=None), with a list of positions and the numbers of the rows that take part: the logits of other
        rows are meaningless, and their caches do not change.
        """
        if self.graph:
            return StaticStep(self, cache)
        return partial(self._step_rows if isinstance(cache, RowCaches) else self.step, cache=cache)

    @torch.inference_mode()
    def _step_rows(self, ids, positions, rows=None, *, cache):
        """A step for RowCaches that reads only their filled slots."""
        n, longest = len(ids), cache.longest + 1
        cache.reserve(longest)
        data, lengths = cache.data[:, :, :n, :, :longest], [row.pos + 1 for row in cache.rows]
        slot, bias = cache.pos.to(self.device), key_bias(cache.rows[:n], longest)
        cos_sin = self._rotary(positions, 1)
        if n * longest <= 2 * sum(lengths):
            attend = self._attend_masked(slot, data, bias)
        else:  # one is much longer than others: each is read as far as it goes
            attend = self._attend_one_by_one(slot, data, lengths, bias)
        logits = self._run(ids[:, None], cos_sin, attend)
        cache.advance(1, rows)
        return logits

    def _attend_masked(self, slot, data, bias=None):
        """
        One query per row, on what is in the cache's data [2, L, B, K, capacity, d] up to the slot in which its own key
        goes; slot [1], or [B] where rows differ. bias: see key_bias.
        """
        hidden = torch.arange(data.size(4), device=self.device) > slot[:, None]
        if bias is None:
            bias = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        mask = bias.masked_fill(hidden, -torch.inf)[:, None, None]
        put = self._put(slot, data)

        def attend(layer, q, k, v):
            return attend_to_all(q, *put(layer, k, v), mask)

        return attend

    def _attend_one_by_one(self, slot, data, lengths, bias=None):
        put = self._put(slot, data)
        masks = [None] * len(lengths) if bias is None else [b[None, :n] for b, n in zip(bias, lengths, strict=False)]

        def attend(layer, q, k, v):
            keys, values = put(layer, k, v)
            rows = zip(q.split(1), keys.split(1), values.split(1), lengths, masks, strict=True)
            return torch.cat([attend_to_all(q, k[:, :, :n], v[:, :, :n], mask) for q, k, v, n, mask in rows])

        return attend

    def _put(self, slot, data):
        """A function that puts k, v [B, K, 1, d] of a layer into their slots and returns all its keys and values."""
        rows = torch.arange(data.size(2), device=self.device)

        def put(layer, k, v):
            keys, values = data[:, layer]
            if len(slot) == 1:
                keys.index_copy_(2, slot, k)
                values.index_copy_(2, slot, v)
            else:
                keys[rows, :, slot] = k[:, :, 0]
                values[rows, :, slot] = v[:, :, 0]
            return keys, values

        return put

    @torch.inference_mode()
    def turn(self, cache, slots, by):
        """Rotate the keys in slots [n] of a KVCache of one row, so that they stand `by` [n] positions further on."""
        slots, keys = slots.to(self.device, non_blocking=True), cache.data[0]
        cos_sin = cos_sin_at(by.to(self.device, non_blocking=True), self.frequencies)
        keys[..., slots, :] = apply_rotary(keys[..., slots, :].float(), *cos_sin).to(keys.dtype)

    def checked(self, positions, cache, T):
        """The positions of T more tokens: the given ones, or the next ones. Raises ValueError beyond the table."""
        if positions is None and cache.pos + T > self.max_seq_len:
            raise ValueError(f"{cache.pos + T} tokens are more than the {self.max_seq_len} positions of this model")
        return cache.pos if positions is None else positions

    def _rotary(self, positions, T):
        """(cos, sin), each [1 or B, T, 1, d/2]."""
        if isinstance(positions, tuple):
            return [t.to(self.dtype) for t in positions]
        if isinstance(positions, int):
            if 0 <= positions <= self.max_seq_len - T:
                return self.cos[:, positions : positions + T], self.sin[:, positions : positions + T]
            positions = torch.arange(positions, positions + T, device=self.device)[None]
        if isinstance(positions, list):  # one per row
            known = min(positions) >= 0 and max(positions) < self.max_seq_len
            positions = torch.tensor(positions, device=self.device)[:, None]
            if known:
                return self.cos[0][positions], self.sin[0][positions]
        cos_sin = cos_sin_at(positions.flatten(), self.frequencies)
        return [t.view(*positions.shape, 1, -1).to(self.dtype) for t in cos_sin]

    def _run(self, *arguments):
        """The network in its own precision."""
        device = self.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            logits, self.states = self.network(*arguments)
        return logits


@singledispatch
def network_of(model, dtype):
    """What a Decoder calls, see Network, for a model of this class, its weights as they are now."""
    return Network(model, dtype)


class Network:
    """The layers and the head of a GPT, with weights laid out in `dtype`."""

    def __init__(self, model, dtype):
        self.config, self.dtype = model.config, dtype
        self.embedding = model.transformer.wte.weight  # looked up, not multiplied: in its own precision, as in training
        self.layers = []
        for attn, mlp in ((block.attn, block.mlp) for block in model.transformer.h):
            qkv = torch.cat((attn.c_q.weight, attn.c_k.weight, attn.c_v.weight))
            weights = (qkv, attn.c_proj.weight, mlp.c_fc.weight, mlp.c_proj.weight)
            self.layers.append([Matrix(weight, dtype) for weight in weights])
        self.head = Matrix(model.lm_head.weight, dtype)

    def __call__(self, inputs, cos_sin, attend, last=(slice(None), -1)):
        """
        (logits [B, V] in float32, states [B·T, D] before the last layer) of inputs: ids [B, T] or what GPT.trunk takes.

        attend(layer, q [B, H, T, d], k, v [B, K, T, d]) -> [B·T, H·d] is the network's only memory. last: index of the
        inputs that the logits come after, one per row.
        """
        B, T = inputs.shape[:2]
        H, K = self.config.n_head, self.config.n_kv_head
        x = inputs.flatten(0, 1)  # [B·T, D]
        cos, sin, *fade = cos_sin
        rotation = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1), *fade
        if not x.is_floating_point():
            x = norm(F.embedding(x, self.embedding))
        x, deep = split_deep(x, self.config.n_embd, self.config.n_layer)
        for layer, (qkv, attn_proj, fc, mlp_proj) in enumerate(self.layers):
            states = x = deepened(x, deep, layer)
            heads = qkv(norm(x).to(self.dtype)).view(B, T, H + 2 * K, -1)
            qk, v = heads.split((H + K, K), dim=2)
            q, k = positioned(qk, *rotation).transpose(1, 2).split((H, K), dim=1)
            x = x + attn_proj(attend(layer, q, k, v.transpose(1, 2)))
            x = x + mlp_proj(F.relu(fc(norm(x).to(self.dtype))).square_())
        last = norm(x.view(B, T, -1)[last]).to(self.dtype)
        logits = self.head(last)[:, : self.config.vocab_size].float()
        # C·tanh(x / C), by a function that is several times as fast on the CPU
        return logits.mul_(2 / LOGIT_SOFTCAP).sigmoid_().mul_(2 * LOGIT_SOFTCAP).sub_(LOGIT_SOFTCAP), states


def norm(x):
    """GPT's norm, where autocast is known to be off."""
    return torch.rms_norm(x, (x.size(-1),))


def positioned(x, cos, sin, fade=None):
    """GPT's `positioned` in half as many operations, with (cos, cos) for its cos and (sin, −sin) for its sin."""
    x = norm(torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin))
    return x if fade is None else x * fade


def attend_causally(q, k, v, mask=None):
    """[B·T, D]. The T queries are at the last T of k's positions; each sees all up to its own, or what mask says."""
    B, H, T, d = q.shape
    if T == 1:
        return attend_to_all(q, k, v, mask)
    past = k.size(2) - T
    causal = mask is None and not past
    if past and mask is None:
        mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
    return attention(q, k, v, mask, causal).transpose(1, 2).reshape(B * T, H * d)


def attend_to_all(q, k, v, mask=None):
    """[B, D]. One query per head, q [B, H, 1, d], on all that the mask, added to the scores, leaves."""
    B, H, _, d = q.shape
    G = H // k.size(1)
    q = q.reshape(B, -1, G, d)  # heads that share keys become queries of one head
    if G == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        q = q.expand(-1, -1, 2, -1)  # twice the work in a third of the time: a lone query takes a slow path there
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, :G].reshape(B, H * d)


class StaticStep:
    """
    `Decoder.step` for one cache in static shapes, on CUDA recorded as a graph: one launch per token, not hundreds.

    Recorded at the first call, and again when the cache has moved because it grew.
    """

    def __init__(self, decoder, cache):
        self.decoder, self.cache, self.data, self.graph = decoder, cache, None, None
        self.biased = False  # whether the last step's keys had a bias

    @torch.inference_mode()
    def __call__(self, ids, positions=None, rows=None):
        cache, n = self.cache, len(ids)
        several = isinstance(cache, RowCaches)
        if not several:
            positions = self.decoder.checked(positions, cache, 1)
        cache.reserve(cache.longest + 1)
        moved = self.data is not cache.data
        if moved:
            self._allocate(several)
        self.ids[:n] = ids
        self.slot[:n] = cache.pos
        self.positions[:n] = torch.as_tensor(positions, device=ids.device)
        bias = key_bias(cache.rows[:n] if several else [cache], self.bias.size(1))
        if self.biased:  # also what rows had that have left
            self.bias.zero_()
        if bias is not None:
            self.bias[:n] = bias
        self.biased = bias is not None
        if moved:
            self._record()
        if self.graph:
            self.graph.replay()
        else:
            self._step()
        self.decoder.states = self.states[:n]
        cache.advance(1, rows) if several else cache.advance(1)
        return self.logits[:n].clone()  # the next step writes over it

    def _allocate(self, several):
        device, self.data = self.decoder.device, self.cache.data
        if not several:  # masked values count 0 times: they must not be infinite or NaN
            self.data[..., self.cache.longest :, :] = 0
        B = self.data.size(2)
        self.ids, self.positions = torch.zeros(2, B, dtype=torch.long, device=device)
        self.slot = torch.zeros(B if several else 1, dtype=torch.long, device=device)
        self.bias = torch.zeros(B if several else 1, self.data.size(4), dtype=self.decoder.dtype, device=device)

    def _record(self):
        """The inputs are in their places: the first run is a step like others, and writes where the next one does."""
        device = self.decoder.device
        if device.type == "cuda":
            side = torch.cuda.Stream(device)  # a first run, unrecorded: libraries set themselves up in it
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._step()
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may use other GPUs
                self._step()

    def _step(self):
        decoder = self.decoder
        attend = decoder._attend_masked(self.slot, self.data, self.bias)
        self.logits = decoder._run(self.ids[:, None], decoder._rotary(self.positions[:, None], 1), attend)
        self.states = decoder.states
