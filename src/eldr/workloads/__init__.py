"""Named workloads with the shapes of the paper (ELDR, arXiv 2607.00466), for the load client and the replay."""
