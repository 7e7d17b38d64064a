"""A GPU's kernels on the host: a C++ compiler takes the same source, and a loop the place of the threads."""

import ctypes
import shutil
import subprocess

from lab.machines import skip

HOST = """
#include <cassert>
#include <cstring>
#include <utility>
#define __global__
#define __device__
struct Dim { unsigned x, y; };
static Dim blockIdx, blockDim, threadIdx;
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
#include "rows.cu"
template <class... A, std::size_t... I>
void call(void (*kernel)(A...), const int64 *arguments, std::index_sequence<I...>) { kernel((A)arguments[I]...); }
template <class... A> void launch(void (*kernel)(A...), Dim grid, Dim block, const int64 *arguments, unsigned count)
{
    assert(count == sizeof...(A));
    blockDim = block;
    for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
        for (threadIdx.y = 0; threadIdx.y < block.y; threadIdx.y++)
            for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++)
                call(kernel, arguments, std::index_sequence_for<A...>());
}
#define ON_HOST(kernel) \\
    extern "C" void kernel##_on_host(unsigned grid, unsigned x, unsigned y, const int64 *arguments, unsigned count) \\
    { launch(kernel, {grid, 1}, {x, y}, arguments, count); }
ON_HOST(move_rows)
ON_HOST(permute_rows)
ON_HOST(sum_rows)
ON_HOST(count_assignments)
ON_HOST(place_assignments)
"""
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=alignment", "-fno-sanitize-recover", "-x", "c++")


def compiler_for_host(folder):
    """Make what compiles a kernel for the host, in a folder -> function(source, name, options) -> launch."""
    if not shutil.which("g++"):
        skip("needs g++")

    def compile_kernel(source, name, options):
        library = folder / f"rows{''.join(options)}.so"
        if not library.exists():
            (folder / "rows.cu").write_text(source)
            command = ["g++", *FLAGS, *options, f"-I{folder}", "-", "-o", library]
            subprocess.run(command, input=HOST, text=True, check=True)
        run = getattr(ctypes.CDLL(library), f"{name}_on_host")

        def launch(grid, block, arguments):
            run(*grid, *block, (ctypes.c_int64 * len(arguments))(*arguments), len(arguments))

        return launch

    return compile_kernel
