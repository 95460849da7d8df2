"""Expert parallelism inside a worker: which rank holds which experts, and which replica of one computes.

A layer of a step ends when the rank that reads the most experts has read them. `placement` is the arrangement and the
contiguous one, `eplb` balances tokens, `union_aware` the experts that steps activate together. `replicas` chooses
between the copies of an expert.
"""
