"""The update directions: one formula per optimizer, all of them here.

A rule is ``rule(g, state, h) -> (u, new_state)``; the step kernel then does ``p <- p - lr u``.
``g`` and each state are blocks of float32 values (float64 for float64 parameters); ``h`` are the
group's numbers, computed in float64 by ``hyper`` in ``fusedopt/<optimizer>.py``. There is no pointer,
mask, dtype, learning rate, weight decay or clipping in a rule. The torch twin of each has the same
name and reads the same.
"""

import triton
import triton.language as tl

from .arithmetic import divide, ema, ema_of_squares, sign, sqrt


@triton.jit
def sgd(g, state, h):
    """u = g"""
    return g, state


@triton.jit
def momentum(g, state, h):
    """b <- mu b + (1 - dampening) g, but b_1 = g;  u = b  (Nesterov: u = g + mu b)"""
    b = state[0]
    mu, weight, nesterov, first = h
    b = tl.where(first != 0, g, mu * b + weight * g)
    return tl.where(nesterov != 0, g + mu * b, b), (b,)


@triton.jit
def momentum_velocity(g, state, h):
    """v <- mu v - lr g;  u = -v, for p <- p + v  (Nesterov: u = lr g - mu v)"""
    v = state[0]
    mu, lr, nesterov = h
    v = mu * v - lr * g
    return tl.where(nesterov != 0, lr * g - mu * v, -v), (v,)


@triton.jit
def momentum_average(g, state, h):
    """m <- mu m + (1 - mu) g;  u = m  (Nesterov: u = (1 - mu) g + mu m)"""
    m = state[0]
    mu, weight, nesterov = h
    m = ema(m, g, weight)
    return tl.where(nesterov != 0, weight * g + mu * m, m), (m,)


@triton.jit
def adagrad(g, state, h):
    """G <- G + g^2;  u = g / (sqrt(G) + eps)"""
    sum = state[0]
    eps = h[0]
    sum = sum + g * g
    return divide(g, sqrt(sum) + eps), (sum,)


@triton.jit
def rmsprop(g, state, h):
    """v <- alpha v + (1 - alpha) g^2;  u = g / (sqrt(v) + eps)"""
    v = state[0]
    weight, eps, mu = h
    v = ema_of_squares(v, g, weight)
    return divide(g, sqrt(v) + eps), (v,)


@triton.jit
def rmsprop_centered(g, state, h):
    """a <- alpha a + (1 - alpha) g;  u = g / (sqrt(v - a^2) + eps)"""
    v, a = state
    weight, eps, mu = h
    v = ema_of_squares(v, g, weight)
    a = ema(a, g, weight)
    return divide(g, sqrt(variance(v, a)) + eps), (v, a)


@triton.jit
def variance(v, a):
    """v - a^2; where v overflowed, a^2 may have too, and v stays"""
    return tl.where(v < float("inf"), v - a * a, v)


@triton.jit
def rmsprop_momentum(g, state, h):
    """b <- mu b + u of rmsprop;  u = b"""
    return accumulated(rmsprop, g, state, h)


@triton.jit
def rmsprop_centered_momentum(g, state, h):
    """b <- mu b + u of rmsprop_centered;  u = b"""
    return accumulated(rmsprop_centered, g, state, h)


@triton.jit
def accumulated(RULE: tl.constexpr, g, state, h):
    """b <- mu b + u, where u is the rule's and b the second of the states;  u = b"""
    u, rest = RULE(g, state[:1] + state[2:], h)
    b = h[2] * state[1] + u
    return b, rest[:1] + (b,) + rest[1:]  # noqa: RUF005, Triton knows no star in a tuple


@triton.jit
def adam(g, state, h):
    """m <- beta1 m + (1 - beta1) g       m_hat = m / (1 - beta1^t)
    v <- beta2 v + (1 - beta2) g^2     v_hat = v / (1 - beta2^t)     u = m_hat / (sqrt(v_hat) + eps)
    """
    m, v = state
    weight1, weight2, eps, correction1, correction2 = h
    m = ema(m, g, weight1)
    v = ema_of_squares(v, g, weight2)
    m_hat = m * correction1
    root_v_hat = sqrt(v) * correction2
    return divide(m_hat, root_v_hat + eps), (m, v)


@triton.jit
def amsgrad(g, state, h):
    """adam, with the largest v so far in place of v"""
    m, v, v_max = state
    weight1, weight2, eps, correction1, correction2 = h
    m = ema(m, g, weight1)
    v = ema_of_squares(v, g, weight2)
    v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
    m_hat = m * correction1
    root_v_hat = sqrt(v_max) * correction2
    return divide(m_hat, root_v_hat + eps), (m, v, v_max)


@triton.jit
def nadam(g, state, h):
    """m and v of adam;  u = (g_weight g + m_weight m) / (sqrt(v_hat) + eps)"""
    m, v = state
    weight1, weight2, eps, g_weight, m_weight, correction2 = h
    m = ema(m, g, weight1)
    v = ema_of_squares(v, g, weight2)
    root_v_hat = sqrt(v) * correction2
    return divide(g_weight * g + m_weight * m, root_v_hat + eps), (m, v)


@triton.jit
def radam(g, state, h):
    """m and v of adam;  u = r m_hat / (sqrt(v) + eps), or m_hat where r is 0"""
    m, v = state
    weight1, weight2, eps, correction1, rectification = h
    m = ema(m, g, weight1)
    v = ema_of_squares(v, g, weight2)
    m_hat = m * correction1
    adaptive = divide(m_hat * rectification, sqrt(v) + eps)
    return tl.where(rectification != 0, adaptive, m_hat), (m, v)


@triton.jit
def adamax(g, state, h):
    """m of adam;  n <- max(beta2 n, |g| + eps);  u = m / n"""
    m, n = state
    weight1, beta2, eps = h
    m = ema(m, g, weight1)
    n = tl.maximum(beta2 * n, tl.abs(g) + eps, propagate_nan=tl.PropagateNan.ALL)
    return divide(m, n), (m, n)


@triton.jit
def adadelta(g, state, h):
    """v <- rho v + (1 - rho) g^2;  u = sqrt((d + eps) / (v + eps)) g;  d <- rho d + (1 - rho) u^2"""
    v, d = state
    weight, eps = h
    v = ema_of_squares(v, g, weight)
    u = sqrt(divide(d + eps, v + eps)) * g
    return u, (v, ema_of_squares(d, u, weight))


@triton.jit
def asgd(g, state, h):
    """u = g"""
    return g, state


@triton.jit
def rprop(g, state, h):
    """s <- s eta_plus or s eta_minus, as g has the sign of the gradient before or the other, and then g <- 0;
    u = sign(g) s
    """
    previous, s = state
    eta_minus, eta_plus, step_min, step_max = h
    agreement = g * previous
    s = s * tl.where(agreement > 0, eta_plus, tl.where(agreement < 0, eta_minus, 1.0))
    s = tl.maximum(s, step_min, propagate_nan=tl.PropagateNan.ALL)
    s = tl.minimum(s, step_max, propagate_nan=tl.PropagateNan.ALL)
    g = tl.where(agreement < 0, 0.0, g)
    return sign(g) * s, (g, s)


@triton.jit
def lion(g, state, h):
    """u = sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g"""
    m = state[0]
    weight1, weight2 = h
    ahead = ema(m, g, weight1)
    return sign(ahead), (ema(m, g, weight2),)


@triton.jit
def adan(g, state, h):
    """d = g - g_before, d_1 = 0        m <- beta1 m + (1 - beta1) g        b <- beta2 b + (1 - beta2) d
    v <- beta3 v + (1 - beta3) (g + beta2 d)^2        u = (m_hat + beta2 b_hat) / (sqrt(v_hat) + eps)
    """
    m, v, b, before = state
    weight1, weight2, weight3, beta2, eps, correction1, correction2, correction3, first = h
    d = tl.where(first != 0, 0.0, g + before)
    m = ema(m, g, weight1)
    b = ema(b, d, weight2)
    v = ema_of_squares(v, g + beta2 * d, weight3)
    m_hat = m * correction1
    b_hat = b * correction2
    root_v_hat = sqrt(v) * correction3
    return divide(m_hat + beta2 * b_hat, root_v_hat + eps), (m, v, b, -g)


@triton.jit
def ademamix(g, state, h):
    """m1, v of adam        m2 <- beta3 m2 + (1 - beta3) g        u = (m1_hat + alpha m2) / (sqrt(v_hat) + eps)"""
    fast, slow, v = state
    weight1, weight2, weight3, eps, correction1, correction2, alpha = h
    fast = ema(fast, g, weight1)
    slow = ema(slow, g, weight3)
    v = ema_of_squares(v, g, weight2)
    root_v_hat = sqrt(v) * correction2
    return divide(fast * correction1 + alpha * slow, root_v_hat + eps), (fast, slow, v)


# Textbook variants. What only the formula named first needs, its root and division, the compiler leaves out.


@triton.jit
def adagrad_eps_inside(g, state, h):
    """adagrad with u = g / sqrt(G + eps)"""
    _, state = adagrad(g, state, h)
    return divide(g, sqrt(state[0] + h[0])), state


@triton.jit
def rmsprop_eps_inside(g, state, h):
    """rmsprop with u = g / sqrt(v + eps)"""
    _, state = rmsprop(g, state, h)
    return divide(g, sqrt(state[0] + h[1])), state


@triton.jit
def rmsprop_centered_eps_inside(g, state, h):
    """rmsprop_centered with u = g / sqrt(v - a^2 + eps)"""
    _, state = rmsprop_centered(g, state, h)
    v, a = state
    return divide(g, sqrt(variance(v, a) + h[1])), state


@triton.jit
def rmsprop_momentum_eps_inside(g, state, h):
    """b <- mu b + u of rmsprop_eps_inside;  u = b"""
    return accumulated(rmsprop_eps_inside, g, state, h)


@triton.jit
def rmsprop_centered_momentum_eps_inside(g, state, h):
    """b <- mu b + u of rmsprop_centered_eps_inside;  u = b"""
    return accumulated(rmsprop_centered_eps_inside, g, state, h)


@triton.jit
def adam_eps_inside(g, state, h):
    """adam with u = m_hat / sqrt(v_hat + eps)"""
    _, state = adam(g, state, h)
    m, v = state
    weight1, weight2, eps, correction1, correction2 = h
    v_hat = v * (correction2 * correction2)
    return divide(m * correction1, sqrt(v_hat + eps)), state


@triton.jit
def amsgrad_eps_inside(g, state, h):
    """adam_eps_inside, with the largest v so far in place of v"""
    _, state = amsgrad(g, state, h)
    m, v, v_max = state
    weight1, weight2, eps, correction1, correction2 = h
    v_hat = v_max * (correction2 * correction2)
    return divide(m * correction1, sqrt(v_hat + eps)), state
