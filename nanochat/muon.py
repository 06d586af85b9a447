"""
Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, then the nearest semi-orthogonal matrix,
by a quintic Newton–Schulz iteration. For the matrices inside the network, not for embeddings and heads.

Matrices of the same shape are updated together, as a batch [n, rows, cols].
"""

import torch

from nanochat.common import has_fast_bf16
from nanochat.sharding import Gathered, MeanShard

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest slope at 0: fast, to within about 0.7 … 1.2


def orthogonalize(G, steps=5):
    """An approximation of UVᵀ, given G = USVᵀ [n, rows, cols]. In bf16 where that is fast: it is robust."""
    a, b, c = NEWTON_SCHULZ
    X = G.bfloat16() if has_fast_bf16(G.device.type) else G.float()
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the iteration converges for singular values ≤ 1
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """params: matrices, grouped by shape; a group has one momentum tensor [n, rows, cols]."""

    def __init__(self, params, lr=0.02, momentum=0.95, nesterov=True, ns_steps=5):
        by_shape = {}
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"Muon is for matrices, got a parameter of shape {tuple(p.shape)}")
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": by_shape[shape]} for shape in sorted(by_shape)]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            update = self._update(group, self._stacked_grads(group))
            for p, u in zip(group["params"], update, strict=True):
                p.add_(u, alpha=-group["lr"])

    def _stacked_grads(self, group):
        return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"]])

    def _update(self, group, grads):
        """The update to subtract, [n, rows, cols], scaled for the shape."""
        state = self.state[group["params"][0]]
        if not state:
            state["momentum"] = torch.zeros_like(grads)
        state["momentum"].lerp_(grads, 1 - group["momentum"])
        grads = grads.lerp(state["momentum"], group["momentum"]) if group["nesterov"] else state["momentum"]
        rows, cols = grads.shape[-2:]
        return orthogonalize(grads, group["ns_steps"]) * max(1.0, rows / cols) ** 0.5


class DistMuon(Muon):
    """Muon with the matrices of each shape distributed over ranks; `step` averages the local gradients."""

    _reduced = None

    def start_reduce(self):
        self._reduced = [MeanShard(self._stacked_grads(group)) for group in self.param_groups]

    def shards(self):
        """The averaged gradients of this rank's share, [⌈n / world⌉, rows, cols] per group."""
        return [reduced.wait() for reduced in self._reduced]

    @torch.no_grad()
    def step(self):
        if self._reduced is None:
            self.start_reduce()
        gathered = []
        for group, reduced in zip(self.param_groups, self._reduced, strict=True):
            gathered.append(Gathered(self._update(group, reduced.wait())))
        for group, whole in zip(self.param_groups, gathered, strict=True):
            update = whole.wait()
            for p, u in zip(group["params"], update[: len(group["params"])], strict=True):
                p.add_(u, alpha=-group["lr"])
        self._reduced = None
