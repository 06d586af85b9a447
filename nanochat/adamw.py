"""AdamW (arXiv 1711.05101) with its state sharded over ranks; equal to torch.optim.AdamW on one process."""

import torch

from nanochat.sharding import Gathered, MeanShard, own_share


class DistAdamW(torch.optim.Optimizer):
    """
    Each parameter is a flat vector of which each rank owns an equal part, for any shape and number of ranks. `step`
    expects the local gradients of each rank and averages them.
    """

    def __init__(self, param_groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(param_groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._reduced = None

    def _params(self):
        return [p for group in self.param_groups for p in group["params"]]

    def start_reduce(self):
        self._reduced = {p: MeanShard(p.grad.flatten()) for p in self._params() if p.grad is not None}

    def shards(self):
        """The averaged gradients of this rank's share."""
        return [reduced.wait() for reduced in self._reduced.values()]

    @torch.no_grad()
    def step(self):
        if self._reduced is None:
            self.start_reduce()
        gathered = []
        for group in self.param_groups:
            for p in group["params"]:
                if p in self._reduced:
                    grad = self._reduced[p].wait()
                    gathered.append((p, Gathered(self._updated(p, grad, group))))
        for p, whole in gathered:
            p.copy_(whole.wait()[: p.numel()].view_as(p))
        self._reduced = None

    def _updated(self, p, grad, group):
        """The new values of this rank's part of p (flat), given its averaged gradient."""
        beta1, beta2 = group["betas"]
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (state["exp_avg_sq"] / bias2).sqrt_().add_(group["eps"])  # eps after the correction
        part = own_share(p.flatten()) * (1 - group["lr"] * group["weight_decay"])
        return part.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / bias1)
