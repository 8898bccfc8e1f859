"""WIDEN from its definition, column by column, in fractions and decimals of 60 digits."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import torch


def numbers(column):
    return [Decimal(float(x)) for x in column]


def length(column):
    return sum((x * x for x in column), Decimal(0)).sqrt()


def differences(before, after):
    """(dm, dd) of one column, exact to 40 digits; a column of length 0 has no direction."""
    m0, m = length(before), length(after)
    if before == after:
        direction = Decimal(0)
    elif m == 0 or m0 == 0:
        direction = Decimal(1)
    else:
        direction = 1 - sum((x * y for x, y in zip(before, after, strict=True)), Decimal(0)) / (m * m0)
    grain = Decimal(10) ** -40
    return abs(m - m0).quantize(grain), direction.quantize(grain)


def softmax(values, n):
    powers = [(Decimal(value.numerator) / value.denominator).exp() for value in values]
    return powers[n] / sum(powers)


def scores(significance, n, j, t, s):
    """S_nj from the significances (fractions, so that nothing is above its own average) of every expert's columns."""
    mine = significance[n]
    if mine[j] > Fraction(t) * sum(mine) / len(mine):
        return Decimal(s)
    return softmax([theirs[j] for theirs in significance], n)


def ranks(values):
    order = sorted(range(len(values)), key=lambda j: values[j])  # sorted() is stable
    return [Fraction(order.index(j), len(values)) for j in range(len(values))]


def plain(base, experts, *, by_row=False, t=1.0, s=1.0):
    """W0 + sum_n 1/2 (S_m + S_d)_n (Wn - W0); a vector by its raw changes."""
    with localcontext() as context:
        context.prec = 60
        if base.ndim == 1:
            old, new = numbers(base), [numbers(expert) for expert in experts]
            change = [[Fraction(abs(x - y)) for x, y in zip(theirs, old, strict=True)] for theirs in new]
            out = [
                old[j] + sum(scores(change, n, j, t, s) * (new[n][j] - old[j]) for n in range(len(new)))
                for j in range(len(old))
            ]
            return torch.tensor([float(x) for x in out], dtype=torch.float64)
        if by_row:
            return plain(base.T, [expert.T for expert in experts], t=t, s=s).T
        C = base.shape[1]
        old = [numbers(base[:, j]) for j in range(C)]
        new = [[numbers(expert[:, j]) for j in range(C)] for expert in experts]
        pairs = [[differences(old[j], theirs[j]) for j in range(C)] for theirs in new]
        by_measure = [[ranks([pair[i] for pair in theirs]) for theirs in pairs] for i in (0, 1)]
        out = torch.empty(base.shape, dtype=torch.float64)
        for j in range(C):
            weights = [sum(scores(r, n, j, t, s) for r in by_measure) / 2 for n in range(len(new))]
            for i in range(base.shape[0]):
                theta = old[j][i] + sum(w * (new[n][j][i] - old[j][i]) for n, w in enumerate(weights))
                out[i, j] = float(theta)
        return out


def pair(K, shape, seed=0, size=0.1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(K)]
    return base, [(base.double() + size * x).to(dtype) for x in noise]
