"""Few queries (decoding): query heads and tokens that read the same keys are computed together.

=============  =========================================================================
module         subject
=============  =========================================================================
``group``      a work item: one part of the keys of some heads, for all that read them
``products``   the two products of a tile, in float32 or on pairs of bfloat16
``vectors``    sums and maxima of vectors, as LLVM's assembly
=============  =========================================================================
"""
