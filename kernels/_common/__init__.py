"""Code shared by the kernels of several families.

All signatures are of one style, a line for each kind of argument, in this order: pointers; numbers,
such as a seed or eps; strides `x_sn, x_st` of samples, tokens, segments, heads and runs; sizes;
constants. Integers whose values must not make another binary are named in `do_not_specialize`; the
others, strides of attention and of logits, are left to the compiler, which moves 16 bytes at once
where they are multiples of 16. An integer has the type of its value, int32 or above 2^31 int64, so
that kernels over rows and attention cast where a product may be larger. It is annotated with a type
where arithmetic itself needs it: what elementwise kernels count may pass 2^31 in any product.
"""
