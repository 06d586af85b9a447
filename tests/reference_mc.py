"""The working context and the tree the slow, obvious way: Python lists, one entry and one node at a time."""


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


def per_block(lod_row, values, N, K):
    es = entries(lod_row, N, K)
    out = []
    for block in range(num_blocks(N, K)):
        inside = [
            v
            for (_, start, span), v in zip(es, values, strict=True)
            if start < (block + 1) * K and start + span > block * K
        ]
        out.append(sum(inside) / len(inside))
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
    """(entries, tokens) that two lists of entries begin with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n, a[n - 1][1] + a[n - 1][2] if n else 0


def tree(gist, leaves, K):
    """Levels of one row: lists of vectors, from a list of vectors and gist(list of K vectors, level)."""
    out = [leaves]
    while len(out[-1]) >= K:
        below = out[-1]
        out.append([gist(below[i * K : (i + 1) * K], len(out)) for i in range(len(below) // K)])
    return out
