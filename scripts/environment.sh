# Sourced by demo.sh and test.sh: prepares a virtual environment with clipkit.

# prepare_environment PACKAGE: create or activate the environment and install PACKAGE (".[demo]").
prepare_environment() {
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        local venv="${CLIPKIT_VENV:-.venv}"
        if [[ ! -x "$venv/bin/python" ]]; then
            local python
            python="$(find_python)"
            echo "creating a virtual environment in $venv with $("$python" --version)"
            "$python" -m venv "$venv"
        fi
        # shellcheck disable=SC1091
        source "$venv/bin/activate"
    fi
    echo "installing clipkit and its dependencies (takes some minutes the first time)"
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
    echo "error: Python 3.11 or newer not found; install it and run this script again" >&2
    return 1
}
