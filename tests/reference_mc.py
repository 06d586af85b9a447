"""The working context and the tree the slow, obvious way: Python lists, one entry and one node at a time."""

import math

import torch


def bias_of(lods, limit):
    """What is added to the scores of entries of these levels, as keys: [1, W]."""
    gists = sum(lod > 0 for lod in lods)
    return torch.tensor([[-2 * math.log(gists / limit) if limit and lod and gists > limit else 0.0 for lod in lods]])


def num_blocks(N, K):
    return -(-N // K)


def levels(N, K):
    """Levels that have at least one complete node over N tokens."""
    lod = 0
    while K ** (lod + 1) <= N:
        lod += 1
    return lod


def entries(lod_row, N, K):
    """[(lod, start, span)] of one row, walking along the tokens."""
    out, token = [], 0
    while token < N:
        lod = lod_row[token // K]
        out.append((lod, token, K**lod))
        token += K**lod
    return out


def near_positions(lod_row, N, K, T):
    """[(first position, positions)] of one row in the mode "near", walking back from the newest entry."""
    far, place, out = 0, N, []
    while N > T and N - far > T // 2:
        far += max(1, T // 4)
    for _, start, span in reversed(entries(lod_row, N, K)):
        place, taken = (start, span) if start >= far else (place - 1, 1)
        out.append((place, taken))
    return out[::-1]


def is_valid(lod_row, N, K):
    """Whether every block is covered by exactly the node that its level says."""
    for block, lod in enumerate(lod_row):
        if lod < 0:
            return False
        if lod == 0:
            continue
        node = block * K // K**lod
        first, last = node * K**lod // K, (node + 1) * K**lod // K
        if (node + 1) * K**lod > N or any(lod_row[b] != lod for b in range(first, last)):
            return False
    return True


def random_row(rng, N, K, coarse=0.5):
    """A valid row of levels: at each place some node that may begin there, LOD 0 with probability 1 − coarse."""
    row, block = [], 0
    while block < num_blocks(N, K):
        fits = [lod for lod in range(1, levels(N, K) + 1) if block * K % K**lod == 0 and block * K + K**lod <= N]
        lod = rng.choice(fits) if fits and rng.random() < coarse else 0
        count = K ** max(lod - 1, 0)
        row += [lod] * count
        block += count
    return row


def targets(lod_row, y_row, N, K):
    es = entries(lod_row, N, K)
    out = []
    for i, (_, start, span) in enumerate(es):
        end = start + span
        predicts = end == N or es[i + 1][0] == 0
        out.append(y_row[end - 1] if predicts else -1)
    return out


def smallest_length(N, K, recent):
    """Fewest entries of any valid row whose blocks with recent tokens are LOD 0, by dynamic programming."""
    fewest = {N: 0}
    for block in reversed(range(num_blocks(N, K))):
        token = block * K
        end = min(token + K, N)
        options = [end - token + fewest[end]]
        for lod in range(1, levels(N, K) + 1):
            end = token + K**lod
            if token % K**lod == 0 and end <= N - recent:
                options.append(1 + fewest[end])
        fewest[token] = min(options)
    return fewest[0]


def common_prefix(a, b):
    """How many entries two lists begin with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def tree(gist, leaves, K):
    """Levels of one row: lists of vectors, from a list of vectors and gist(list of K vectors, level)."""
    out = [leaves]
    while len(out[-1]) >= K:
        below = out[-1]
        out.append([gist(below[i * K : (i + 1) * K], len(out)) for i in range(len(below) // K)])
    return out


class DenseContext:
    """A working context of one row as the level of each block of K tokens: the whole stream at each step."""

    def __init__(self, lods, N, K):
        self.lods, self.N, self.K = list(lods), N, K

    def entries(self):
        return entries(self.lods, self.N, self.K)

    def append(self, n):
        more = num_blocks(self.N + n, self.K) - len(self.lods)
        return DenseContext(self.lods + [0] * more, self.N + n, self.K)

    def truncate(self, n):
        lods = self.lods[: num_blocks(n, self.K)]
        for lod in range(max(lods), 0, -1):
            for block in range(n // self.K**lod * self.K ** (lod - 1), len(lods)):
                lods[block] -= lods[block] == lod
        return DenseContext(lods, n, self.K)

    def groups(self, recent):
        """(level, first block, blocks) of all that may collapse, finest level first, oldest first."""
        for lod in range(levels(self.N, self.K)):
            size = self.K**lod
            for first in range(0, (self.N - recent) // self.K - size + 1, size):
                if self.lods[first : first + size] == [lod] * size:
                    yield lod, first, size

    def collapse_oldest(self, budget, recent, first_block=0):
        context = self
        for level in range(levels(self.N, self.K)):
            for lod, first, size in list(context.groups(recent)):
                if lod == level and first >= first_block and len(context.entries()) > budget:
                    context = context.edit(first, size, lod + 1)
        return context

    def edit(self, first, count, lod):
        return DenseContext(self.lods[:first] + [lod] * count + self.lods[first + count :], self.N, self.K)
