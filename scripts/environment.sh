# Sourced by the other scripts: creates a virtual environment in .venv with this package installed.
# Use: . scripts/environment.sh [EXTRA]

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

stage() { printf '\n== %s\n' "$*"; }

use_environment() {  # [EXTRA]
    stage "environment: .venv${1:+ with the extra '$1'} (llama-cpp-python is compiled the first time: about ten minutes)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    if has_amx && command -v ${CXX:-c++} clang++ >/dev/null; then
        install_amx_build
    fi
    .venv/bin/python -m pip install --quiet --constraint scripts/constraints.txt --editable ".${1:+[$1]}"
    PATH="$root/.venv/bin:$PATH"
    python --version
}

has_amx() { [ "$(uname -sm)" = "Linux x86_64" ] && grep -qw amx_int8 /proc/cpuinfo; }

# Installs llama-cpp-python with working AMX kernels, in place of any other build. Each build is compiled once and cached
# by compiler, options and CPU; pip's own cache ignores all three.
install_amx_build() (
    eval "$(.venv/bin/python -I granite4v/ggml/compiler.py)"
    release=$(grep '^llama-cpp-python==' scripts/constraints.txt)
    key=$({
        echo "$release"
        ${CXX:-c++} -dumpfullversion -dumpversion
        env | grep -E '^(CC|CXX|CFLAGS|CXXFLAGS|LDFLAGS|CMAKE_\w+|SKBUILD_\w+)=' | sort
        grep -m1 '^model name' /proc/cpuinfo
        grep -m1 '^flags' /proc/cpuinfo
    } | sha256sum | cut -c 1-16)
    wheels="${XDG_CACHE_HOME:-$HOME/.cache}/granite4v/wheels/$key"
    if grep -qs "$key" .venv/lib/python*/site-packages/llama_cpp_python-*.dist-info/direct_url.json; then
        return  # already installed from there
    fi
    if [ ! -d "$wheels" ]; then
        stage "$release: compiled for AMX with ${CXX:-c++} ${CXXFLAGS:-} (about ten minutes, once)"
        .venv/bin/python -m pip wheel --quiet --no-deps --no-cache-dir --no-binary llama-cpp-python \
            --wheel-dir "$wheels.$$" "$release"
        mv -T "$wheels.$$" "$wheels" || rm -r "$wheels.$$"  # another run was faster
    fi
    .venv/bin/python -m pip install --quiet --no-deps --force-reinstall "$wheels"/*.whl
)
