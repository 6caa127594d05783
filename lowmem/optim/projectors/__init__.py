"""Where a gradient is seen.

A projector maps an (m, n) gradient G to a smaller matrix R = down(G) and back.
`refresh` moves the basis when it is due and says how it changed; the basis is
fp32, whatever the weight is. A basis is kept as it was when the gradient is
zero or not finite, so it is orthonormal at all times.
"""
