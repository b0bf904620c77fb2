#!/usr/bin/env bash
# GCC 12: _tile_loadconfig is declared to read 8 bytes of the 64, so the stores of the tile sizes vanish
#
# Expected: _tile_loadconfig(p) loads the AMX tile configuration from the 64 bytes at p (Intel's
#   Intrinsics Guide; ldtilecfg m512). What a program stores there before the call is loaded.
# Observed (GCC 12.2.0, -O2): amxtileintrin.h describes the memory operand of its inline assembly as
#   *(const void **)p. The optimizer sees 8 bytes being read and removes the stores to the others
#   when the structure is not used otherwise: the palette arrives, rows and columns are all 0. With
#   -fno-dse they arrive; -fno-tree-dse alone does not help. Later releases call a builtin.
# Output:
#   GCC 12.2.0
#   -O2:               palette 1, columns 0 0, rows 0 0
#   -O2 -fno-tree-dse: palette 1, columns 0 0, rows 0 0
#   -O2 -fno-dse:      palette 1, columns 64 32, rows 8 16
#   -O0:               palette 1, columns 64 32, rows 8 16
# Why it matters: the first tile instruction after that ends the process with SIGILL. ggml fills its
#   configuration in exactly this way, so a llama-cpp-python that pip compiles with GCC 12, the
#   compiler of Debian 12, dies on the first product in Q4_0, Q8_0 or Q4_K on a CPU with AMX. Compile
#   it with CXXFLAGS="-fno-dse -fno-tree-dse", or with Clang.
#
# The CPU needs no AMX: in the compiler's assembly a call that prints the operand takes ldtilecfg's place.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >configure.cpp <<'CODE'
#include <immintrin.h>
struct Config { unsigned char palette, start, reserved[14]; unsigned short columns[16]; unsigned char rows[16]; };
void configure() {
    alignas(64) Config tiles = {};
    tiles.palette = 1;
    tiles.rows[0] = 8;  tiles.columns[0] = 64;
    tiles.rows[1] = 16; tiles.columns[1] = 32;
    _tile_loadconfig(&tiles);
}
CODE
cat >show.cpp <<'CODE'
#include <cstdio>
#include <cstdlib>
extern "C" void show(const unsigned char * c) {
    printf("palette %d, columns %d %d, rows %d %d\n", c[0], c[16] | c[17] << 8, c[18] | c[19] << 8, c[48], c[49]);
    exit(0);
}
void configure();
int main() { configure(); }
CODE
loaded() {  # FLAG...: what ldtilecfg reads
    g++ -mamx-tile -mno-red-zone "$@" -S -o configure.s configure.cpp
    sed -Ei 's/ldtilecfg\s+(\S+)/leaq \1, %rdi; andq $-64, %rsp; call show/' configure.s
    g++ -no-pie configure.s show.cpp -o program
    ./program
}
version=$(g++ -dumpfullversion)
echo "GCC $version"
[ "$version" = 12.2.0 ] || { echo "this is about GCC 12.2.0; on Debian 12: apt-get install g++-12=12.2.0-14+deb12u1" >&2; exit 1; }
plain=$(loaded -O2) tree=$(loaded -O2 -fno-tree-dse) without=$(loaded -O2 -fno-dse) unoptimized=$(loaded -O0)
echo "-O2:               $plain"
echo "-O2 -fno-tree-dse: $tree"
echo "-O2 -fno-dse:      $without"
echo "-O0:               $unoptimized"
[ "$plain" = "palette 1, columns 0 0, rows 0 0" ]
[ "$tree" = "$plain" ]
[ "$without" = "palette 1, columns 64 32, rows 8 16" ]
[ "$unoptimized" = "$without" ]
