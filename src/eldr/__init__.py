"""Expert-locality-aware decode routing for prefill/decode-disaggregated Mixture-of-Experts serving."""

__version__ = "0.2.0.dev0"
