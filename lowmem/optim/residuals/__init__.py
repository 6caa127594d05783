"""What becomes of the part of a gradient that its projection does not see.

    rest = G - up(down(G))

A residual may add what it owes to the gradient before it is projected (`inject`)
and may turn the rest into a step of its own (`absorb`). Both work on `Blocks`,
so no full-size copy is made.
"""
