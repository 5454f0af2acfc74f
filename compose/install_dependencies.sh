#!/bin/sh
# Installs what the extras of pyproject.toml that $1 names need, and not MuxMesh itself: an empty package stands for it.
# Part of an image build, in a folder with pyproject.toml.
set -eu
build=/opt/build/bin/python
mkdir -p /tmp/empty/muxmesh
cp pyproject.toml /tmp/empty
touch /tmp/empty/README.md /tmp/empty/LICENSE
echo '__version__ = "0"' > /tmp/empty/muxmesh/__init__.py
$build -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /tmp/empty /tmp/empty
$build -m pip --python /opt/muxmesh/bin/python install --quiet "$(echo /tmp/empty/*.whl)[$1]"
$build -m pip --python /opt/muxmesh/bin/python uninstall --quiet --yes muxmesh
rm -r /tmp/empty
# Tests of the libraries with native code are a tenth of an image.
find /opt/muxmesh/lib/python3*/site-packages -type d -name tests \
    \( -path '*/numpy/*' -o -path '*/numba/*' -o -path '*/llvmlite/*' \) -prune -exec rm -r {} +
