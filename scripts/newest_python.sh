#!/bin/sh
# Print the newest Python from 3.12 to 3.14 that starts, of the PATH or of pyenv; fail if there is none.
for minor in 14 13 12; do
    for python in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor."*/bin/python; do
        # a shim of pyenv is found although nothing stands behind it, so each is asked
        "$python" -c "import sys, venv; print(sys.executable); sys.exit(sys.version_info[:2] != (3, $minor))" \
            2>/dev/null && exit 0
    done
done
echo "memmeta: found no Python 3.12, 3.13 or 3.14, neither on the PATH nor below ~/.pyenv/versions;" \
    "install one, or name it: make test-latest NEWEST=/path/to/python" >&2
exit 1
