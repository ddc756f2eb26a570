"""A hypothesis strategy for any sizes of attention work."""

from hypothesis import strategies as st

from crossattention.plan import Sizes

sizes = st.builds(
    lambda z, n, m, a, b, heads, k, v, o, dtype: Sizes(z, n, m, a, b, heads[0], heads[1], k, v, o, dtype=dtype),
    *[st.integers(1, 500)] * 5,
    st.sampled_from([(1, 1), (8, 8), (8, 2), (12, 1)]),
    *[st.integers(1, 128)] * 3,
    st.sampled_from(["float32", "bfloat16", "float64"]),
)
