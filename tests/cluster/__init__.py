"""slowlens on a real Kubernetes: what fails, and for how long, when something is changed, killed or taken away.

``KUBECONFIG`` names a cluster with the KubeRay operator, ``SLOWLENS_IMAGE`` an image of this checkout that its nodes
can run (``k8s/Dockerfile``). The namespaces ``slowlens`` and ``slowlens-callers`` are made, and deleted in the end.
``pytest tests/cluster -o faulthandler_timeout=1800``; ``SLOWLENS_ROUNDS`` says how often each disturbance is done (1),
``SLOWLENS_KEEP`` leaves everything there. A table of all is printed when the tests have ended.
"""
