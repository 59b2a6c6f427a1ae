#!/usr/bin/env bash
# Unpacks into FOLDER what the C++ runtime is built with, from Debian packages, and installs nothing:
#
#   runtime/cpp/dependencies.sh FOLDER PYTHON
#
#   FOLDER/usr/include               nlohmann-json and doctest, which are headers only
#   FOLDER/onnxruntime/include       headers of ONNX Runtime. No wheel has them, and Debian has them from 13 on.
#   FOLDER/onnxruntime/lib           links to the library in the wheel `onnxruntime` of PYTHON's environment
#
# Without apt, pass -DONNXRUNTIME_ROOT= to CMake and install nlohmann-json (and doctest, for the tests) in your own way.
set -euo pipefail
folder=$(realpath -m "$1") python=$2
json=nlohmann-json3-dev tests=doctest-dev headers=libonnxruntime-dev headers_release=trixie
done_file=$folder/.done.2
[[ -e $done_file ]] || rm -rf "$folder"
mkdir -p "$folder/onnxruntime/lib"

unpack() { # unpack NAME [apt options]: downloads a Debian package and unpacks it
    local name=$1
    shift
    (cd "$folder/packages" && apt-get "$@" -q download "$name" >log 2>&1) || { cat "$folder/packages/log" >&2; return 1; }
    dpkg -x "$folder/packages/$name"_*.deb "$folder"
}

if [[ ! -e $done_file ]]; then
    command -v apt-get dpkg >/dev/null || { echo "needs apt and dpkg; see the first lines of $0" >&2; exit 1; }
    mkdir -p "$folder/packages"
    # A source list and package lists of its own, so that those of the machine stay as they are. The mirror is the
    # machine's.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | grep -m1 '/debian/\?$' || true)
    [[ -n $mirror ]] || { echo "this is not Debian; see the first lines of $0" >&2; exit 1; }
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    printf 'deb [signed-by=%s] %s %s main\n' "$keys" "$mirror" "$headers_release" >"$folder/packages/newer.list"
    mkdir -p "$folder/packages/lists/partial"
    own=(-o Dir::Etc::SourceList="$folder/packages/newer.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::State::Lists="$folder/packages/lists" -o Acquire::Languages=none)
    apt-get "${own[@]}" -q update >"$folder/packages/log" 2>&1 || { cat "$folder/packages/log" >&2; exit 1; }
    for name in "$json" "$tests" "$headers"; do
        unpack "$name" "${own[@]}"
    done
    ln -sfn ../usr/include/onnxruntime "$folder/onnxruntime/include"
    rm -rf "$folder/packages"
    touch "$done_file"
fi

# The library's name inside is libonnxruntime.so.1; the wheel only has the file with the whole version.
library=$("$python" -c 'import glob, importlib.util as u, os
found = u.find_spec("onnxruntime")
print(*glob.glob(os.path.join(os.path.dirname(found.origin), "capi", "libonnxruntime.so.*")) if found else [])')
[[ -e $library ]] || { echo "$python has no onnxruntime: pip install onnxruntime" >&2; exit 1; }
for name in libonnxruntime.so libonnxruntime.so.1; do
    ln -sfn "$library" "$folder/onnxruntime/lib/$name"
done
