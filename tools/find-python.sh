#!/bin/sh
# Prints a Python that can run the embedded server, or one sentence on what is missing.
# Triton's Python models need 3.10 to 3.12, as a shared library.
fit='
import ctypes, ensurepip, os, sys, sysconfig, venv
if not (3, 10) <= sys.version_info < (3, 13): sys.exit(1)
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
if not os.path.exists(os.path.join(sysconfig.get_config_var("LIBDIR") or "", name)): ctypes.CDLL(name)
print(os.path.realpath(sys.executable))
'
for python in ${PYTHON:-python3 python3.12 python3.11 python3.10 \
    "$HOME"/.pyenv/versions/3.1[0-2]*/bin/python3 "$HOME"/.local/share/uv/python/*/bin/python3}; do
    "$python" -c "$fit" 2>/dev/null && exit 0
done
if [ -n "$PYTHON" ]; then
    found="PYTHON=$PYTHON is $("$PYTHON" --version 2>/dev/null || echo "no program that runs")"
else
    found="This machine has no fit Python"
fi
echo "$found: the embedded server needs Python 3.10, 3.11 or 3.12 with venv and its shared library" \
    "(Debian 12: apt-get install python3 python3-venv libpython3.11; Ubuntu 24.04: apt-get install" \
    "python3 python3-venv libpython3.12; or make PYTHON=/path/to/python3)" >&2
exit 1
