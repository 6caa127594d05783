"""AdamW: in every precision."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "adamw",
        """AdamW with plain moments.

            W <- (1 - lr wd) W - lr m_hat / (sqrt(v_hat) + eps)

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 moments, 4 m n + 4 with bf16 ones, which are
        rounded at random.
        """,
        paper="1711.05101",
        rule="adam",
    )
)

register(
    Method(
        "adamw_8bit",
        """AdamW with moments of 8 or 4 bits.

        The arithmetic is AdamW's, in fp32; both moments are decoded before it and encoded after it. int8
        is the dynamic map, companded8 a curve without a table (faster), int4 half of it. Tensors below
        4096 elements keep fp32 moments. See also arXiv 2309.01507 and 2602.23349.

        Bytes for an (m, n) weight, d = m n: 2 d + 8 ceil(d / 256) + 4 (int8),
        2 d + 4 ceil(d / 32) + 4 (companded8), 2 ceil(d / 2) + 8 ceil(d / 128) + 4 (int4).
        """,
        paper="2110.02861",
        rule="adam",
        states="int8",
    )
)
