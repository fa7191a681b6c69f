"""The mathematics of SECURA as pure tensor functions: no I/O, no distributed calls, no PEFT.

Everything is computed in float32 (float64 for float64 weights) and cast once. Row blocks of
`cabr.row_blocks` are the one grid on which results are bit-equal, whoever computes them.
"""
