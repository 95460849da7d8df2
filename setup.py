"""What is compiled.

Inner loops are C, called through Cython. Where there is no compiler the installation goes on without, and numpy does
the same more slowly. With ELDR_COMPILE=1 in the environment mypyc makes C of the Python that every request passes
through as well: a request then takes two thirds of the processor time. That takes a minute, so it is for a router that
is installed, not for one that is worked on.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

# The path of a request, from the socket to the policy and back.
COMPILED = [f"src/eldr/{name}" for name in Path("build_backend/compiled_modules.txt").read_text().split()]


def kernels() -> list[Extension]:
    """The inner loops; none without Cython or numpy, which a build without isolation may lack."""
    if not (find_spec("Cython") and find_spec("numpy")):
        return []
    import numpy

    extension = Extension(
        "eldr.kernels._compiled",
        ["src/eldr/kernels/_compiled.pyx"],
        depends=[f"src/eldr/kernels/{name}.h" for name in ("loops", "json_text", "words")],
        include_dirs=["src/eldr/kernels", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        extra_compile_args=["-O3", "-g0", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
        optional=True,
    )
    extension.cython_c_in_temp = True
    return [extension]


def request_path() -> list[Extension]:
    from mypyc.build import mypycify

    return mypycify(["--config-file=", "--ignore-missing-imports", *COMPILED], opt_level="3", debug_level="0")


# Checked in every build, not only in those that compile: a module that has moved is noticed at once.
missing = [name for name in COMPILED if not Path(name).is_file()]
if missing:
    raise SystemExit(f"build_backend/compiled_modules.txt lists files that do not exist: {', '.join(missing)}")

setup(ext_modules=kernels() + (request_path() if os.environ.get("ELDR_COMPILE") == "1" else []))
