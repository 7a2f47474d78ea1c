# Sourced by the scripts beside it: a virtual environment with clipkit in it.

# prepare_environment WHAT: activate (or make) the environment and install WHAT, such as ".[demo]".
prepare_environment() {
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        local venv="${CLIPKIT_VENV:-.venv}"
        if [[ ! -x "$venv/bin/python" ]]; then
            local python
            python="$(find_python)"
            echo "making a virtual environment in $venv with $("$python" --version)"
            "$python" -m venv "$venv"
        fi
        # shellcheck disable=SC1091
        source "$venv/bin/activate"
    fi
    echo "installing clipkit and what it needs (the first time takes some minutes)"
    python -m pip install --quiet --disable-pip-version-check --editable "$1"
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or newer was found; install one and run this again" >&2
    return 1
}
