#!/bin/sh
# install.sh FOLDER PREFIX: puts libwarmswap, which was built into FOLDER (target/release), with its header, its pkg-config
# file and the Python module below PREFIX. Needs nothing but a shell: packagers may call it with PREFIX below their own root,
# because nothing that it writes names PREFIX.
set -eu
[ $# = 2 ] || { echo "usage: $0 FOLDER PREFIX" >&2; exit 2; }
built=$1
prefix=$2
here=$(dirname "$0")

version=$(sed -n 's/^#define WS_VERSION "\(.*\)"$/\1/p' "$here/include/warmswap.h")
[ -n "$version" ] || { echo "$0: include/warmswap.h has no WS_VERSION" >&2; exit 1; }
# As build.rs has it.
soname=libwarmswap.so.0

# Programs may have the old library mapped: it is replaced, never written into.
put() {
    mkdir -p "$(dirname "$2")"
    cp "$1" "$2.new"
    chmod "$3" "$2.new"
    mv -f "$2.new" "$2"
}

put "$built/libwarmswap.so" "$prefix/lib/libwarmswap.so.$version" 755
put "$built/libwarmswap.a" "$prefix/lib/libwarmswap.a" 644
ln -sfn "libwarmswap.so.$version" "$prefix/lib/$soname"
ln -sfn "$soname" "$prefix/lib/libwarmswap.so"
put "$here/include/warmswap.h" "$prefix/include/warmswap.h" 644
put "$here/python/warmswap.py" "$prefix/share/warmswap/python/warmswap.py" 644
sed "s/@VERSION@/$version/" "$here/warmswap.pc.in" >"$prefix/lib/warmswap.pc.$$"
put "$prefix/lib/warmswap.pc.$$" "$prefix/lib/pkgconfig/warmswap.pc" 644
rm -f "$prefix/lib/warmswap.pc.$$"
