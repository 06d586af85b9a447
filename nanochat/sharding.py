"""
Collectives of the sharded optimizers (ZeRO stage 2, arXiv 1910.02054): each rank averages and keeps one equal share of
the gradients, updates that share of the parameters with its own optimizer state, and distributes the result.
"""

import torch
import torch.distributed as dist


def padded(flat, multiple):
    """`flat` padded with zeros along dimension 0 to a multiple; unchanged if it is one."""
    missing = -flat.size(0) % multiple
    return torch.cat((flat, flat.new_zeros(missing, *flat.shape[1:]))) if missing else flat


class MeanShard:
    """
    This rank's share of the mean over ranks of `tensor` [n, …], in flight: [⌈n / world⌉, …].

    The object keeps the collective's input alive until `wait`, since an asynchronous collective does not.
    """

    def __init__(self, tensor):
        world = dist.get_world_size()
        self.input = padded(tensor, world)
        self.output = self.input.new_empty(self.input.size(0) // world, *self.input.shape[1:])
        self.work = dist.reduce_scatter_tensor(self.output, self.input, op=dist.ReduceOp.SUM, async_op=True)

    def wait(self):
        if self.work is not None:
            self.work.wait()
            self.work = self.input = None
            self.output /= dist.get_world_size()  # gloo has no mean
        return self.output


class Gathered:
    """The shares of all ranks joined, in flight: [world · m, …] from [m, …]."""

    def __init__(self, shard):
        self.input = shard.contiguous()
        self.output = shard.new_empty(shard.size(0) * dist.get_world_size(), *shard.shape[1:])
        self.work = dist.all_gather_into_tensor(self.output, self.input, async_op=True)

    def wait(self):
        self.work.wait()
        self.input = None
        return self.output


def own_share(tensor):
    """This rank's share of `tensor` [n, …], padded like MeanShard's."""
    return padded(tensor, dist.get_world_size()).chunk(dist.get_world_size())[dist.get_rank()]


def clip_gradients(optimizers, max_norm):
    """
    Scale gradients so that their global norm, over all parameters and ranks, is at most max_norm; 0 for no clipping.

    Returns that norm before clipping; None without. Sharded optimizers start to reduce their gradients here, all at
    once; the norm is that of the mean gradient, the same number on every rank and with any number of ranks.
    """
    sharded = [optimizer for optimizer in optimizers if hasattr(optimizer, "start_reduce")]
    for optimizer in sharded:
        optimizer.start_reduce()
    if max_norm == 0:
        return None
    grads = [grad for optimizer in sharded for grad in optimizer.shards()]
    whole = [p.grad for o in optimizers if o not in sharded for g in o.param_groups for p in g["params"]]
    grads += [grad for grad in whole if grad is not None]
    squared = torch.stack([grad.float().square().sum() for grad in grads]).sum()
    if sharded:
        if whole:
            raise ValueError("expected all optimizers to be sharded, or none")
        dist.all_reduce(squared)
    total = squared.sqrt()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale)
    return total
