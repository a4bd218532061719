"""``slowlens doctor``: what is wrong with slowlens on a Kubernetes cluster, from what its API server says."""
