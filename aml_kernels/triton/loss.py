"""BCE and Dice of a pixel, and whether it counts: what the forward and the backward share."""

import triton
import triton.language as tl

from .arithmetic import widen
from .resize import load_plane, next_row, rows_from


@triton.jit
def pixels_from(
    y, x, logit_size, map_size, size, RESIZED: tl.constexpr, MAP_RESIZED: tl.constexpr, INDEX: tl.constexpr,
):
    """What next_pixels() goes by, and its state before row `y`: of columns `x` of a target of `size`."""
    z_way, s_way, z_state, s_state = 0, 0, 0, 0  # nothing to go by: Triton 3.6 returns no None in a tuple
    if RESIZED:
        z_way, z_state = rows_from(y, x, logit_size, size, True, INDEX)
    if MAP_RESIZED:
        s_way, s_state = rows_from(y, x, map_size, size, False, INDEX)
    return (z_way, s_way), (z_state, s_state)


@triton.jit
def read_row(planes, y, x, end, inside, RESIZED: tl.constexpr, MAP_RESIZED: tl.constexpr):
    """What memory has of row `y`, of rows before `end`. Read a row ahead, so that it is there when it is needed."""
    logits, target, similarity, valid = planes
    inside &= y < end
    z, value, exists = 0, 0, 0
    if not RESIZED:
        z = load_plane(logits, y, x, inside)
    if similarity is not None and not MAP_RESIZED:
        value = load_plane(similarity, y, x, inside)
    if valid is not None:
        exists = load_plane(valid, y, x, inside)
    return z, load_plane(target, y, x, inside), value, exists


@triton.jit
def next_pixels(
    row, planes, ways, states, limit, inside, RESIZED: tl.constexpr, MAP_RESIZED: tl.constexpr, PROTECT: tl.constexpr,
):
    """Of what read_row() gave: logits, labels, which exist, which are kept; and the state before the next row."""
    logits, _, similarity, valid = planes
    z, label, value, exists = row
    z_way, s_way = ways
    z_state, s_state = states
    if RESIZED:
        z, z_state = next_row(logits, z_way, z_state, inside)
    if MAP_RESIZED:
        value, s_state = next_row(similarity, s_way, s_state, inside)
    exists = inside if valid is None else inside & (exists != 0)
    label = widen(label)
    keep = exists
    if similarity is not None:
        similar = widen(value) >= limit
        keep = exists & (similar | (label > 0.5)) if PROTECT else exists & similar
    return widen(z), label, exists, keep, (z_state, s_state)


@triton.jit
def sigmoid(z):
    """exp(-|z|), 1 / (1 + exp(-|z|)) and sigmoid(z)."""
    e = tl.exp2(tl.abs(z) * -1.44269504)
    root = tl.rsqrt(1.0 + e)  # a division takes twice the instructions
    reciprocal = root * root
    return e, reciprocal, tl.where(z >= 0, reciprocal, e * reciprocal)


@triton.jit
def cross_entropy(z, y, e):
    """Binary cross entropy with logits: max(z, 0) - z y + log(1 + exp(-|z|)), with e = exp(-|z|)."""
    return tl.fma(e, log1p_over_e(e), tl.maximum(z, 0.0) - z * y)


@triton.jit
def log1p_over_e(e):
    """log(1 + e) / e for 0 <= e <= 1, relative error 3e-8 before rounding."""
    p = tl.fma(e, -3.25637846e-3, 1.99071616e-2)
    p = tl.fma(p, e, -5.70642017e-2)
    p = tl.fma(p, e, 1.06142648e-1)
    p = tl.fma(p, e, -1.53118625e-1)
    p = tl.fma(p, e, 1.96781173e-1)
    p = tl.fma(p, e, -2.49545589e-1)
    p = tl.fma(p, e, 3.33300054e-1)
    p = tl.fma(p, e, -4.99999046e-1)
    return tl.fma(p, e, 1.0)


@triton.jit
def loss_gradient(grad, samples, sums, bce_weight, dice_weight, smooth, MEAN: tl.constexpr):
    """The parts of d loss / dz = bce w_y (p - y) + p (1 - p) (dice_p + dice_py y), from a sample's row of `sums`.

    grad: points to the gradient in the sample's loss; in the mean of `samples` losses if MEAN.
    """
    grad = tl.load(grad)
    if MEAN:
        grad = tl.div_rn(grad, samples.to(tl.float32))
    weight, p, y, py = tl.load(sums + 3), tl.load(sums + 4), tl.load(sums + 5), tl.load(sums + 6)
    denominator = p + y + smooth
    dice = tl.div_rn(grad * dice_weight, denominator)
    dice_p = dice * tl.div_rn(2.0 * py + smooth, denominator)
    bce = tl.where(weight > 0, tl.div_rn(grad * bce_weight, tl.where(weight > 0, weight, 1.0)), 0.0)
    return bce, dice_p, -2.0 * dice


@triton.jit
def pixel_gradient(z, y, keep, parts, negative_weight, weight_step):
    """d loss / dz; exactly 0 of a pixel that is left out, whatever it holds."""
    bce, dice_p, dice_py = parts
    e, reciprocal, p = sigmoid(z)
    slope = e * reciprocal * reciprocal  # p (1 - p)
    weight = tl.fma(y, weight_step, negative_weight)
    return tl.where(keep, tl.fma(slope, tl.fma(y, dice_py, dice_p), bce * weight * (p - y)), 0.0)
