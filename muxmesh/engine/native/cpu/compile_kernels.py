"""`python -m muxmesh.engine.native.cpu.compile_kernels IMAGE SPEC` compiles the kernels into numba's cache and exits.

In the process that compiles a kernel, the functions that it calls are machine code of their own; a process that loads
the kernel from the cache uses the copies in it, which are optimized differently: sums differ in their last bits. So
kernels are compiled in a process that computes nothing else, and all workers load the same code.
"""

import os
import sys
from pathlib import Path

from muxmesh.engine.native.cpu.forward import compute_once, spec_from_json
from muxmesh.engine.native.cpu.thread_team import Team
from muxmesh.parent_death import die_with_parent


def main() -> None:
    """IMAGE is the weight image of any model, SPEC its `ModelSpec` as `spec_to_json` encodes it."""
    die_with_parent(os.getppid())
    image, spec = sys.argv[1:]
    try:
        compute_once(spec_from_json(spec), Path(image), Team(1))
    except OSError as error:
        sys.exit(f"the kernels cannot be compiled: {error}")


if __name__ == "__main__":
    main()
