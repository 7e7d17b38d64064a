// Row kernels on a GPU, with a gate value beside each row: move (gather, scatter), permute, weighted sum; and the sort of
// assignments by slot that comes before.
//
// blockDim.x threads share a row, blockDim.y rows a block. A thread takes CHUNK scalars of a row at once: 16 bytes of the
// narrower type, or less where rows are not aligned for it. NVRTC compiles this with FROM, TO and CHUNK defined and without
// any header; tests compile it for the host.

struct bfloat16 { unsigned short bits; };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void put(float x, float &to) { to = x; }
__device__ inline void put(bfloat16 x, bfloat16 &to) { to = x; }
__device__ inline void put(bfloat16 x, float &to) { to = widen(x); }
__device__ inline void put(float x, bfloat16 &to)  // the nearest, of two as near the even one
{
    unsigned bits = __float_as_uint(x);
    to.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}

template <class T> struct alignas(sizeof(T) * CHUNK < 16 ? sizeof(T) * CHUNK : 16) Chunk { T at[CHUNK]; };

template <class T, class F> __device__ inline Chunk<T> cast(Chunk<F> numbers)
{
    Chunk<T> result;
    for (int n = 0; n < CHUNK; n++) put(numbers.at[n], result.at[n]);
    return result;
}

typedef long long int64;  // of all arguments that are no pointers: CuPy and ctypes pass Python's numbers so

// Row order[i] of `from`, or i, becomes row order[i] of `to`, or i. Pitches count scalars.
extern "C" __global__ void move_rows(
    const FROM *__restrict__ from, int64 from_pitch, const float *__restrict__ from_beside, int64 from_beside_pitch,
    const int64 *__restrict__ from_order,
    TO *__restrict__ to, int64 to_pitch, float *__restrict__ to_beside, int64 to_beside_pitch,
    const int64 *__restrict__ to_order, int64 num_rows, int64 width)
{
    int64 i = (int64)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= num_rows) return;
    int64 source = from_order ? from_order[i] : i, target = to_order ? to_order[i] : i;
    const Chunk<FROM> *in = (const Chunk<FROM> *)(from + source * from_pitch);
    Chunk<TO> *out = (Chunk<TO> *)(to + target * to_pitch);

    for (int c = threadIdx.x; c < width / CHUNK; c += blockDim.x) out[c] = cast<TO>(in[c]);
    if (from_beside && threadIdx.x == 0) to_beside[target * to_beside_pitch] = from_beside[source * from_beside_pitch];
}

// Row i of `from` becomes row entries[i, k] of `to` for each k, with gate value numbers[i, k]; an entry below 0 is none.
extern "C" __global__ void permute_rows(
    const FROM *__restrict__ from, int64 from_pitch, const float *__restrict__ numbers,
    const int64 *__restrict__ entries, int64 top_k,
    TO *__restrict__ to, int64 to_pitch, float *__restrict__ beside, int64 beside_pitch, int64 num_rows, int64 width)
{
    int64 i = (int64)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= num_rows) return;
    const Chunk<FROM> *in = (const Chunk<FROM> *)(from + i * from_pitch);

    for (int c = threadIdx.x; c < width / CHUNK; c += blockDim.x) {
        Chunk<TO> row = cast<TO>(in[c]);
        for (int64 entry = i * top_k; entry < (i + 1) * top_k; entry++)
            if (entries[entry] >= 0) ((Chunk<TO> *)(to + entries[entry] * to_pitch))[c] = row;
    }
    for (int64 k = threadIdx.x; k < top_k; k += blockDim.x)
        if (entries[i * top_k + k] >= 0) beside[entries[i * top_k + k] * beside_pitch] = numbers[i * top_k + k];
}

// Row i of `sums` becomes the sum over k of row entries[i, k] of `from`, times weights[i, k], in float32.
extern "C" __global__ void sum_rows(
    const FROM *__restrict__ from, int64 from_pitch, const int64 *__restrict__ entries,
    const float *__restrict__ weights, int64 top_k, TO *__restrict__ sums, int64 num_rows, int64 width)
{
    int64 i = (int64)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= num_rows) return;
    Chunk<TO> *out = (Chunk<TO> *)(sums + i * width);

    for (int c = threadIdx.x; c < width / CHUNK; c += blockDim.x) {
        Chunk<float> total = {};
        for (int64 entry = i * top_k; entry < (i + 1) * top_k; entry++) {
            if (entries[entry] < 0) continue;
            Chunk<FROM> read = ((const Chunk<FROM> *)(from + entries[entry] * from_pitch))[c];
            for (int n = 0; n < CHUNK; n++) total.at[n] += weights[entry] * widen(read.at[n]);
        }
        out[c] = cast<TO>(total);
    }
}

// A thread of the next two reads the entries of one chunk and one slot, the slot changing the fastest. Entries are read by
// all threads of a warp at once, and in their order: so equal ones keep it, and no thread waits for another. Without
// `kept` all are.

// counts[s, c] becomes how many entries of chunk c go to slot s.
extern "C" __global__ void count_assignments(
    const int64 *__restrict__ slots, const bool *__restrict__ kept, int64 num_entries, int64 num_slots,
    int64 *__restrict__ counts, int64 num_chunks, int64 chunk_entries)
{
    int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x, slot = i % num_slots, chunk = i / num_slots;
    if (chunk >= num_chunks) return;
    int64 end = (chunk + 1) * chunk_entries, count = 0;

    for (int64 entry = chunk * chunk_entries; entry < end && entry < num_entries; entry++)
        count += slots[entry] == slot && (!kept || kept[entry]);
    counts[slot * num_chunks + chunk] = count;
}

// rows[entry] becomes its place among all that are kept, by slot, or -1; those of slot s and chunk c end at ends[s, c].
extern "C" __global__ void place_assignments(
    const int64 *__restrict__ slots, const bool *__restrict__ kept, int64 num_entries, int64 num_slots,
    const int64 *__restrict__ ends, int64 num_chunks, int64 chunk_entries, int64 *__restrict__ rows)
{
    int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x, slot = i % num_slots, chunk = i / num_slots;
    if (chunk >= num_chunks) return;
    int64 end = (chunk + 1) * chunk_entries, own = slot * num_chunks + chunk, row = own ? ends[own - 1] : 0;

    for (int64 entry = chunk * chunk_entries; entry < end && entry < num_entries; entry++) {
        if (slots[entry] == slot) rows[entry] = !kept || kept[entry] ? row++ : -1;
    }
}
