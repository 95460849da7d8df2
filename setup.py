"""What is compiled.

Inner loops are C; where there is no compiler the installation goes on without, and numpy does the same more slowly.
With ELDR_COMPILE=1 in the environment mypyc makes C of what every request passes through as well, from the same
Python: it then takes two thirds of the processor time. That takes a minute, so it is for a router that is installed,
not for one that is worked on.
"""

import os
from importlib.util import find_spec

from setuptools import Extension, setup

try:
    from numpy import get_include

    NUMPY_HEADERS = [get_include()]
except ImportError:  # built without isolation: the kernels are then left out
    NUMPY_HEADERS = []

COMPILE = os.environ.get("ELDR_COMPILE") == "1"
# mypyc compiles what the types say, those of the libraries among them.
TO_COMPILE = ["mypy>=2.4,<3", "httptools>=0.6.4", "orjson>=3.10", "prometheus-client>=0.21"]
# The path of a request, from the socket to the policy and back.
COMPILED = [
    "activation", "counts", "policies/base", "policies/expected_union", "policies/logged", "policies/unions",
    "router/api/keys",
    "router/request/answer", "router/request/attempts", "router/request/deadlines", "router/request/flow",
    "router/request/intake",
    "router/request/legs", "router/request/openai", "router/request/services", "router/request/verdict",
    "router/protocols/handoff",
    "router/placement/admission", "router/placement/decode", "router/placement/fair_queue", "router/placement/prefill",
    "router/fleet/ejection", "router/fleet/outcomes", "router/fleet/workers",
    "router/observe/counters", "router/observe/decision_log",
    "router/http/client", "router/http/exchange", "router/http/forwarding", "router/http/heads", "router/http/message",
    "router/http/pool", "router/http/server",
]  # fmt: skip

extensions = [
    Extension(
        "eldr._kernels",
        ["src/eldr/_kernels.c"],
        include_dirs=NUMPY_HEADERS,
        extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
        optional=True,
    )
]
# Asked first what the build needs, this file runs without mypy.
if COMPILE and find_spec("mypyc"):
    from mypyc.build import mypycify

    options = ["--config-file=", "--ignore-missing-imports"]
    extensions += mypycify([*options, *(f"src/eldr/{name}.py" for name in COMPILED)], opt_level="3", debug_level="0")

setup(ext_modules=extensions, setup_requires=TO_COMPILE if COMPILE else [])
