"""What is compiled.

Inner loops are C; where there is no compiler the installation goes on without, and numpy does the same more slowly.
With ELDR_COMPILE=1 in the environment mypyc makes C of what every request passes through as well, from the same
Python: it then takes two thirds of the processor time. That takes a minute, so it is for a router that is installed,
not for one that is worked on.
"""

import os
from importlib.util import find_spec

from setuptools import Extension, setup

COMPILE = os.environ.get("ELDR_COMPILE") == "1"
# mypyc compiles what the types say, those of the libraries among them.
TO_COMPILE = ["mypy>=2.4,<3", "httptools>=0.6.4", "orjson>=3.10", "prometheus-client>=0.21"]
# The path of a request, from the socket to the policy and back.
COMPILED = [
    "activation", "counts", "fleet", "policies/base", "policies/expected_union", "policies/logged",
    "policies/unions", "router/admission", "router/answer", "router/deadlines", "router/decision_log",
    "router/ejection", "router/fair_queue", "router/flow", "router/forwarding", "router/handoff",
    "router/heads", "router/http", "router/intake", "router/keys", "router/legs", "router/metrics",
    "router/openai", "router/outcomes", "router/placement", "router/prefix", "router/retries",
    "router/services", "router/upstream", "router/verdict",
]  # fmt: skip


def kernels() -> list[Extension]:
    """The inner loops; none without Cython or numpy, which a build without isolation may lack."""
    if not (find_spec("Cython") and find_spec("numpy")):
        return []
    import numpy

    extension = Extension(
        "eldr.kernels._compiled",
        ["src/eldr/kernels/_compiled.pyx"],
        depends=["src/eldr/kernels/loops.h"],
        include_dirs=["src/eldr/kernels", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
        optional=True,
    )
    extension.cython_c_in_temp = True
    return [extension]


extensions = kernels()
# Asked first what the build needs, this file runs without mypy.
if COMPILE and find_spec("mypyc"):
    from mypyc.build import mypycify

    options = ["--config-file=", "--ignore-missing-imports"]
    extensions += mypycify([*options, *(f"src/eldr/{name}.py" for name in COMPILED)], opt_level="3", debug_level="0")

setup(ext_modules=extensions, setup_requires=TO_COMPILE if COMPILE else [])
