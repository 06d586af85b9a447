"""
Cross-entropy of logits, softcapped or not, computed without storing all logits at once.

The logits [N, V] in float32 are the memory peak of training (17 GB at B 32, T 2048, V 65,536), and on a CPU
moving them through memory costs more than the matrix products. Therefore they are computed one block of rows at a
time, together with the block's gradient: loss, ∂loss/∂x and ∂loss/∂W need three matrix products, as in the plain
computation, and nothing is computed twice.

Shapes: N = B·T rows, D width, V vocabulary (the weight may have more rows than V; the rest is padding).
"""

import torch
import torch.nn.functional as F

from nanochat.common import autocast_dtype

BLOCK_ELEMENTS = {"cpu": 2**21}  # logits per block: they fit into the caches of a CPU
BLOCK_ELEMENTS_GPU = 2**29  # 2 GiB in float32


def softcap(logits, cap):
    """cap·tanh(logits / cap), always in float32: tanh in bf16 is too imprecise for training. None: no cap."""
    return logits.float() if cap is None else cap * torch.tanh(logits.float() / cap)


def loss_of_rows(x, w, targets, scale, cap):
    """
    (losses [n], the gradient [n, V] of their sum weighted by scale [n], with respect to the logits before the softcap,
    in x's precision) of x [n, D], w [V, D] and targets [n]. cap: None for no softcap.
    """
    scale, index, logits = scale[:, None], targets.clamp(min=0)[:, None], (x @ w.T).float()
    if cap is None:
        z = logits.sub_(logits.amax(dim=-1, keepdim=True))
    else:  # |z| < cap, so that exp(z) cannot overflow: no pass for the maximum is needed
        unit = logits.div_(cap).tanh_()
        z = unit * cap
    of_target = z.gather(1, index)
    p = z.exp_()
    normalizer = p.sum(dim=-1, keepdim=True)
    losses = normalizer.log() - of_target
    # d loss/d z = softmax(z) − onehot(target), and d z/d (x·w) = 1 − tanh²
    p.mul_(scale / normalizer)
    if torch.compiler.is_compiling():  # can be fused with what surrounds it; else it would be one more pass
        p = torch.where(torch.arange(len(w), device=x.device) == index, p - scale, p)
    else:
        p.scatter_add_(1, index, -scale)
    return losses[:, 0], (p if cap is None else p.addcmul_(p, unit.square_(), value=-1.0)).to(x.dtype)


def divergence_of_rows(x, w, teacher, scale, cap):
    """
    The same of the Kullback-Leibler divergence from what a teacher says, whose head would read teacher [n, D]: its
    distribution takes the place of a token.
    """
    log_p = softcap(teacher.to(x.dtype) @ w.T, cap).log_softmax(-1)
    capped = softcap(x @ w.T, cap)
    log_q = capped.log_softmax(-1)
    losses = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    grad = log_q.exp_().sub_(log_p.exp_()).mul_(scale[:, None])
    if cap is not None:
        grad *= 1 - (capped / cap) ** 2
    return losses, grad.to(x.dtype)


class _SummedLoss(torch.autograd.Function):
    """
    (sum of the rows' losses, weighted by row_weights [N] if given; the losses [N], for the log alone).

    teacher: None, or what takes the place of the targets, see divergence_of_rows. The gradients of x [N, D] and weight
    are computed during the forward pass, each only if it is required.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, cap, dtype, row_weights, loss_of_rows, teacher):
        block = max(1, BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS_GPU) // vocab_size)
        w = weight[:vocab_size].to(dtype)
        total = x.new_zeros((), dtype=torch.float32)
        counts = (targets >= 0).float()  # 0 for rows without a target
        scale = counts if row_weights is None else counts * row_weights
        losses = torch.empty_like(counts)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        says, loss_of_rows = (targets, loss_of_rows) if teacher is None else (teacher, divergence_of_rows)
        parts = [t.split(block) for t in (x, says, counts, scale, losses)]
        for i, (x_b, t_b, counts_b, scale_b, losses_b) in enumerate(zip(*parts, strict=True)):
            x_b = x_b.to(dtype)
            loss, grad = loss_of_rows(x_b, w, t_b, scale_b, cap)
            total += (loss * scale_b).sum()
            torch.mul(loss, counts_b, out=losses_b)
            if grad_x is not None:
                grad_x[i * block : (i + 1) * block] = grad @ w
            if grad_w is not None:
                grad_w[:vocab_size] += grad.T @ x_b
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx, grad_output, _):
        grad_x, grad_w = ctx.saved_tensors
        grad_x = None if grad_x is None else grad_x * grad_output
        grad_w = None if grad_w is None else (grad_w * grad_output).to(ctx.weight_dtype)
        return grad_x, grad_w, *[None] * 7


def _row_losses(x, weight, targets, vocab_size, cap):
    """The plain way, [N]: for evaluation (a block at a time), and where each loss has a gradient of its own."""
    logits = softcap(F.linear(x, weight)[:, :vocab_size], cap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def softcap_cross_entropy(
    x, weight, targets, vocab_size, cap, reduction="mean", row_weights=None, loss_of_rows=loss_of_rows, teacher=None
):
    """
    Cross-entropy in nats of softcap(x @ weight[:vocab_size].T, cap), cap None for none, against targets.

    x [B, T, D], weight [≥ vocab_size, D], targets [B, T] with −1 for positions without a target.
    reduction: "mean" over the targets (0 if there are none), "sum", or "none" ([B·T]). With row_weights
    [B, T], whatever the reduction: (the sum of the losses times their weights, the losses [B·T] without a gradient).
    loss_of_rows: the function above, or it compiled.
    teacher [B, T, D], with row_weights and a gradient: the losses are the divergences from what this makes of the same
    weight, see divergence_of_rows; targets say where there is one.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    x, targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    device_type = x.device.type
    if row_weights is not None:
        row_weights = row_weights.reshape(-1)
    if teacher is not None:
        teacher = teacher.reshape(x.shape)
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if with_gradient and (reduction != "none" or row_weights is not None):
        dtype = autocast_dtype(device_type, x.dtype)
        loss, losses = _SummedLoss.apply(x, weight, targets, vocab_size, cap, dtype, row_weights, loss_of_rows, teacher)
        if row_weights is not None:
            return loss, losses
    elif with_gradient:
        return _row_losses(x, weight, targets, vocab_size, cap)
    else:
        block = max(1, BLOCK_ELEMENTS.get(device_type, BLOCK_ELEMENTS_GPU) // vocab_size)
        pairs = zip(x.split(block), targets.split(block), strict=True)
        loss = torch.cat([_row_losses(x_b, weight, t_b, vocab_size, cap) for x_b, t_b in pairs])
        if row_weights is not None:
            return (loss * row_weights).sum(), loss
        if reduction == "none":
            return loss
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (targets >= 0).sum().clamp(min=1)
    return loss
