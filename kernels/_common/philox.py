"""Counter-based normals: Philox 4x32-10 and Box-Muller, the same numbers on every device.

The logarithm, sine and cosine are polynomials in float32: the functions of the GPU libraries either
miss the 1e-6 that implementations must agree to, or branch into a slow path that uses a stack.
"""

import triton
import triton.language as tl

UNIFORM_SCALE = tl.constexpr(float.fromhex("0x1.fffffep-32"))  # 31 bits to [0, 1)
UNIFORM_STEPS = tl.constexpr((31 << 23) + 1)
COUNT_MIN = tl.constexpr(float.fromhex("0x1.ad7f2cp+7"))  # whose uniform is 1e-7 in float32
TWO_PI = tl.constexpr(6.2831855)  # 2 pi in float32
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2) in float32
MINUS_2_LN_2 = tl.constexpr(-1.3862943649291992 * 2.0**-23)  # of an exponent where its bits lie
ONE_BY_PI = tl.constexpr(0.31830987334251404)
# pi in two parts: multiples up to 2 of the first are exact in float32, with and without FMA.
PI_HIGH = tl.constexpr(float.fromhex("0x1.921fap+1"))
PI_LOW = tl.constexpr(2.5351816930196946e-06)
ROUND_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer


@triton.jit
def count(bits):
    """32 random bits to a float32 in [0, 2**31]: the second half of the words counts down."""
    signed = bits.to(tl.int32, bitcast=True)
    return tl.cast(signed ^ (signed >> 31), tl.float32)


@triton.jit
def uniform(bits):
    """32 random bits to a float32 in [0, 1)."""
    return count(bits) * UNIFORM_SCALE


@triton.jit
def clamped_uniform(bits):
    """`uniform`, but at least UNIFORM_MIN, so that |normal| <= sqrt(-2 ln 1e-7) = 5.678.

    A positive float32 times UNIFORM_SCALE is the float before it times 2**-31: a subtraction of
    integers, which the compiler joins with those of the logarithm.
    """
    word = tl.maximum(count(bits), COUNT_MIN).to(tl.int32, bitcast=True)
    return (word - UNIFORM_STEPS).to(tl.float32, bitcast=True)


@triton.jit
def minus_2_log(u):
    """-2 ln(u) of a normal float32 u in (0, 1), to 1e-7 relative."""
    bits = u.to(tl.int32, bitcast=True)
    shifted = (bits - SQRT_HALF_BITS) & -0x800000
    # u = (1 + f) * 2**e with 1 + f in [sqrt(1/2), sqrt(2))
    f = (bits - shifted).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.17469686269760132, 0.28615042567253113)
    p = tl.fma(p, f, -0.2983594834804535)
    p = tl.fma(p, f, 0.33141016960144043)
    p = tl.fma(p, f, -0.39924144744873047)
    p = tl.fma(p, f, 0.5000351071357727)
    p = tl.fma(p, f, -0.6666790246963501)
    p = tl.fma(p, f, 0.9999998211860657)
    return tl.fma(f, tl.fma(p, f, -2.0), tl.cast(shifted, tl.float32) * MINUS_2_LN_2)


@triton.jit
def polar(r, theta):
    """r cos(theta) and r sin(theta) of float32 r >= 0 and theta in [0, 2 pi], to 1.5e-7 of r."""
    rounded = tl.fma(theta, ONE_BY_PI, ROUND_MAGIC)
    k = rounded - ROUND_MAGIC
    x = tl.fma(-k, PI_LOW, tl.fma(-k, PI_HIGH, theta))
    x2 = x * x
    s = tl.fma(x2, 2.6000515877351354e-06, -0.00019806613772671173)
    s = tl.fma(s, x2, 0.008333017271928944)
    s = tl.fma(s, x2, -0.1666665709570972)
    s = tl.fma(s * x2, x, x)
    c = tl.fma(x2, -2.6193787391729294e-07, 2.4769302912937117e-05)
    c = tl.fma(c, x2, -0.001388856914203914)
    c = tl.fma(c, x2, 0.041666655772260724)
    c = tl.fma(c, x2 * x2, tl.fma(x2, -0.5, 1.0))
    # Odd numbers of half turns negate both: bit 0 of the number is added to the sign of r.
    turns = rounded.to(tl.int32, bitcast=True) << 31
    r = tl.add(r.to(tl.int32, bitcast=True), turns, sanitize_overflow=False)
    r = r.to(tl.float32, bitcast=True)
    return r * c, r * s


@triton.jit
def normal_pair(bits_a, bits_b):
    """Two standard normals from two words of random bits."""
    return polar(tl.sqrt(minus_2_log(clamped_uniform(bits_a))), uniform(bits_b) * TWO_PI)


@triton.jit
def multiply(word, factor: tl.constexpr):
    """Upper and lower half of a 32 by 32 bit product: one instruction, unlike umulhi and mul."""
    product = tl.cast(word, tl.uint64) * tl.full((), factor, tl.uint64)
    return tl.cast(product >> 32, tl.uint32), tl.cast(product, tl.uint32)


@triton.jit
def halves(word):
    """Lower and upper 32 bits of an int64."""
    word = tl.cast(tl.cast(word, tl.int64), tl.uint64, bitcast=True)
    return tl.cast(word, tl.uint32), tl.cast(word >> 32, tl.uint32)


@triton.jit
def philox_bits(seed, first, o_q):
    """The four random words of quads `first` + `o_q` (int64, int32 >= 0): Philox 4x32-10.

    They are those of tl.philox. The sum is one of 32 bits and a carry, and not of 64 bits: the
    compilers then see that all products are of 32 bits.
    """
    k0, k1 = halves(seed)
    low, high = halves(first)
    c0 = tl.add(low, tl.cast(o_q, tl.uint32), sanitize_overflow=False)
    c1 = tl.where(c0 < low, tl.add(high, 1, sanitize_overflow=False), high)
    c2, c3 = c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        high_a, low_a = multiply(c0, 0xD2511F53)
        high_b, low_b = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def tile_normals(seed, first, LENGTH: tl.constexpr, WIDE: tl.constexpr):
    """The normals [R, LENGTH] of the elements from quads `first` [R, 1] (int64) on, in order.

    WIDE makes a thread hold 8 neighbours and not 4, as loads of a 16-bit dtype want them: the
    tiles then meet without an exchange between threads.
    """
    NEIGHBOURS: tl.constexpr = 2 if WIDE else 1  # quads
    o_q = NEIGHBOURS * tl.arange(0, LENGTH // (4 * NEIGHBOURS))[None, None, :]
    o_q += tl.arange(0, NEIGHBOURS)[None, :, None]
    x0, x1, x2, x3 = philox_bits(seed, first[:, None], o_q)
    n0, n1 = normal_pair(x0, x1)
    n2, n3 = normal_pair(x2, x3)
    tile = tl.permute(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (0, 2, 1, 3, 4))
    return tl.reshape(tile, (first.shape[0], LENGTH))
