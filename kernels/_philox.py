"""Counter-based normals: Philox 4x32-10 and Box-Muller, the same numbers on every device.

The logarithm, sine and cosine are polynomials in float32: the functions of the GPU libraries either
miss the 1e-6 that implementations must agree to, or branch into a slow path that uses a stack.
"""

import triton
import triton.language as tl

UNIFORM_SCALE = tl.constexpr(float.fromhex("0x1.fffffep-32"))  # 31 bits to [0, 1)
UNIFORM_MIN = tl.constexpr(1e-7)  # so |eps| <= sqrt(-2 ln 1e-7) = 5.678
TWO_PI = tl.constexpr(6.2831855)  # 2 pi in float32
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2) in float32
MINUS_2_LN_2 = tl.constexpr(-1.3862943649291992)
TWO_BY_PI = tl.constexpr(0.6366197466850281)
# pi/2 in two parts: multiples up to 4 of the first are exact in float32, with and without FMA.
HALF_PI_HIGH = tl.constexpr(float.fromhex("0x1.921fap+0"))
HALF_PI_LOW = tl.constexpr(1.2675908465098473e-06)
ROUND_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer


@triton.jit
def uniform(bits):
    """32 random bits to a float32 in [0, 1)."""
    signed = bits.to(tl.int32, bitcast=True)
    return tl.cast(signed ^ (signed >> 31), tl.float32) * UNIFORM_SCALE


@triton.jit
def minus_2_log(u):
    """-2 ln(u) of a normal float32 u in (0, 1), to 1e-7 relative."""
    bits = u.to(tl.int32, bitcast=True)
    shifted = (bits - SQRT_HALF_BITS) & -0x800000
    # u = (1 + f) * 2**e with 1 + f in [sqrt(1/2), sqrt(2))
    f = (bits - shifted).to(tl.float32, bitcast=True) - 1.0
    e = tl.cast(shifted >> 23, tl.float32)
    p = tl.fma(f, -0.17469686269760132, 0.28615042567253113)
    p = tl.fma(p, f, -0.2983594834804535)
    p = tl.fma(p, f, 0.33141016960144043)
    p = tl.fma(p, f, -0.39924144744873047)
    p = tl.fma(p, f, 0.5000351071357727)
    p = tl.fma(p, f, -0.6666790246963501)
    p = tl.fma(p, f, 0.9999998211860657)
    return tl.fma(e, MINUS_2_LN_2, tl.fma(f * f, p, -2.0 * f))


@triton.jit
def cos_sin(theta):
    """cos and sin of a float32 theta in [0, 2 pi], to 1e-7 absolute."""
    rounded = theta * TWO_BY_PI + ROUND_MAGIC
    quadrant = rounded.to(tl.int32, bitcast=True)
    k = rounded - ROUND_MAGIC
    x = tl.fma(-k, HALF_PI_LOW, tl.fma(-k, HALF_PI_HIGH, theta))
    x2 = x * x
    s = tl.fma(x2, -0.0001951729936990887, 0.008332177996635437)
    s = tl.fma(x2 * x, tl.fma(s, x2, -0.16666655242443085), x)
    c = tl.fma(x2, 2.4438451873720624e-05, -0.001388736767694354)
    c = tl.fma(c, x2, 0.04166664555668831)
    c = tl.fma(x2 * x2, c, tl.fma(x2, -0.5, 1.0))
    swap = (quadrant & 1) != 0
    cos = tl.where(swap, s, c).to(tl.int32, bitcast=True)
    sin = tl.where(swap, c, s).to(tl.int32, bitcast=True)
    # Quadrants 1 and 2 negate the cosine, 2 and 3 the sine: bit 1 moves into the sign.
    cos = cos ^ (((quadrant + 1) & 2) << 30)
    sin = sin ^ ((quadrant & 2) << 30)
    return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)


@triton.jit
def normal_pair(bits_a, bits_b):
    """Two standard normals from two words of random bits."""
    square = minus_2_log(tl.maximum(uniform(bits_a), UNIFORM_MIN))
    r = square * tl.rsqrt(square)
    cos, sin = cos_sin(uniform(bits_b) * TWO_PI)
    return r * cos, r * sin


@triton.jit
def multiply(word, factor: tl.constexpr):
    """Upper and lower half of a 32 by 32 bit product: one instruction, unlike umulhi and mul."""
    product = tl.cast(word, tl.uint64) * tl.full((), factor, tl.uint64)
    return tl.cast(product >> 32, tl.uint32), tl.cast(product, tl.uint32)


@triton.jit
def philox_bits(seed, o_quad):
    """The four random words of each quad number (int64): Philox 4x32-10, as in tl.philox."""
    key = tl.cast(tl.cast(seed, tl.int64), tl.uint64, bitcast=True)
    k0, k1 = tl.cast(key, tl.uint32), tl.cast(key >> 32, tl.uint32)
    c0, c1 = tl.cast(o_quad, tl.uint32), tl.cast(o_quad >> 32, tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        high_a, low_a = multiply(c0, 0xD2511F53)
        high_b, low_b = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def quad_normals(seed, o_quad):
    """The normals of quads [R, Q], lanes 0 to 3 in four tiles [R, Q]."""
    x0, x1, x2, x3 = philox_bits(seed, o_quad)
    n0, n1 = normal_pair(x0, x1)
    n2, n3 = normal_pair(x2, x3)
    return n0, n1, n2, n3


@triton.jit
def tile_normals(seed, first, LENGTH: tl.constexpr, WIDE: tl.constexpr):
    """The normals [R, LENGTH] of the elements from quads `first` [R, 1] (int64) on, in order.

    WIDE makes a thread hold 8 neighbours and not 4, as loads of a 16-bit dtype want them: the
    tiles then meet without an exchange between threads.
    """
    if WIDE:
        o_quad = first + 2 * tl.arange(0, LENGTH // 8)[None, :]
        a0, a1, a2, a3 = quad_normals(seed, o_quad)
        b0, b1, b2, b3 = quad_normals(seed, o_quad + 1)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    else:
        n0, n1, n2, n3 = quad_normals(seed, first + tl.arange(0, LENGTH // 4)[None, :])
        even, odd = tl.join(n0, n2), tl.join(n1, n3)
    return tl.reshape(tl.join(even, odd), (first.shape[0], LENGTH))
