# Sourced by the other tools: makes .venv beside the sources, installs ddkit into it when that is not
# already so, and puts it first on PATH. $PYTHON chooses the interpreter, $DDKIT_VENV another folder.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DDKIT_VENV:-$root/.venv}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "ddkit needs Python 3.10 or later, and $python is $("$python" --version 2>&1). Name another: PYTHON=python3.12 $0" >&2
    exit 3
fi

# What was installed is known by the files that say what to install.
wanted=$(cat "$root/setup.cfg" "$root/setup.py" | cksum)
if [ ! -x "$venv/bin/ddkit" ] || [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing ddkit and what it needs into $venv: about 6 GB, a few minutes, once." >&2
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[test]"
    echo "$wanted" >"$venv/installed"
fi
export PATH="$venv/bin:$PATH"
