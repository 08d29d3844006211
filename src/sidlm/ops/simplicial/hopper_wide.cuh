// What the CUDA kernels over virtual queries share (hopper_wide.py compiles them): a block of three warpgroups owns an SM.
//
// Two warpgroups multiply, each 64 rows: eight heads of one query and eight offsets s at a time. In the fragments of wgmma a
// thread has the rows lane / 4 and lane / 4 + 8 of its warp's 16: here lane / 4 is the head, and the two rows and four warps
// are the offsets. So a thread forms its part of u = q o k2 in registers, as the tensor cores want it, and sums over offsets
// what comes out without asking a neighbour. The third warpgroup loads: one warp keys and values, one the few rows of q,
// k2, v2 and so on of a tile.
//
// Constants that are put before: D (64 or 128), FP16, OUT_FP16, DETERMINANT, K2_BIAS and V2_BIAS (whether there are any),
// HAS_DOCS, BACKWARD, CLUSTER (1 or 2 blocks of threads that share keys and values: each loads half of them for both),
// KEYS (of a block of keys), SLOTS (for these), and functions `multiply_..`, one wgmma.

constexpr int OFFSETS = 8;                      // of a tile
constexpr int HEADS = 16;                       // of a block: eight a warpgroup
constexpr int BOXES = D / 64, BOX = KEYS * 128; // a block of keys: for each 64 columns rows of 128 bytes
constexpr int SLOT = BOXES * BOX * (BACKWARD ? 2 : 1);  // keys or values; in the backward pass keys and values
constexpr int PITCH = 2 * D + 16;               // bytes from one row of a stage to the next: no bank conflicts
constexpr int COPIES = DETERMINANT ? 2 : 1;     // of q and k2: see prepare.py
constexpr float HIDDEN = -1.0e30f, LN2 = 0.6931471805599453f, LOG2E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7F800000)

// 128 threads of a warpgroup wait for each other
DEVICE void warpgroup_sync(int warpgroup) { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory"); }
DEVICE void load_row(u32 to, const u16* from, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "n"(2 * D), "r"(barrier) : "memory");
}

DEVICE u32 read_word(u32 at) { u32 x; asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at)); return x; }
DEVICE float4 read_four(u32 at) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at));
  return x;
}
DEVICE void write_four(u32 at, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

DEVICE float exp2_of(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 out_halves(float low, float high) {
  u32 x;
#if OUT_FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#endif
  return x;
}
DEVICE float2 widen(u32 x) {
#if FP16
  float2 y;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(y.x), "=f"(y.y) : "r"(x));
  return y;
#else
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000));
#endif
}
// Two columns of a product of inputs, rounded once.
DEVICE u32 product(u32 x, u32 y) {
  u32 z;
#if FP16
  asm("mul.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
#else
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
#endif
  return z;
}
DEVICE u32 product(u32 x, u32 y, float bias) {  // x o (y + bias)
  float2 a = widen(x), b = widen(y);
  return halves(a.x * (b.x + bias), a.y * (b.y + bias));
}
// Two columns of u: every kernel of this operation forms the same u, since the LSE of one is for all.
DEVICE u32 virtual_word(u32 q, u32 qb, u32 k2, u32 k2b, float k2_bias) {
#if DETERMINANT
  u32 x;
#if FP16
  asm("{.reg .b32 t; mul.f16x2 t, %3, %4; neg.f16x2 t, t; fma.rn.f16x2 %0, %1, %2, t;}"
#else
  asm("{.reg .b32 t; mul.bf16x2 t, %3, %4; neg.bf16x2 t, t; fma.rn.bf16x2 %0, %1, %2, t;}"
#endif
      : "=r"(x) : "r"(k2), "r"(qb), "r"(k2b), "r"(q));
  return x;
#else
  return K2_BIAS ? product(q, k2, k2_bias) : product(q, k2);
#endif
}

// wgmma's description of a slot; of its columns 16 k .. along its rows, or turned, of its rows 16 k ..
DEVICE u64 descriptor(u32 at) { return 1ull << 62 | 64ull << 32 | (u64)(BOX >> 4) << 16 | (at & 0x3FFFF) >> 4; }
DEVICE constexpr int along(int k) { return (k / 4 * BOX + k % 4 * 32) >> 4; }
DEVICE constexpr int turned(int k) { return k * 16 * 128 >> 4; }

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int N> DEVICE void settled(float (&x)[N]) {  // nothing that is made of x moves before here
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> DEVICE void settled(u32 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// A ring of slots of shared memory, seen from one side.
template <int N> struct Ring {
  int slot = 0, phase = 0;
  DEVICE void next() { if (++slot == N) slot = 0, phase ^= 1; }
};

// The visible rows of an axis of length S for a query: `seen` of them, up to `last`.
struct Axis {
  int last, seen;
  DEVICE Axis(int query, int S, int w, int T, const int* reach) {
    last = query + S - T;
    seen = min(w, last + 1);
    if (HAS_DOCS) seen = min(seen, *reach);
  }
};

struct Arguments {
  const u16 *q, *second, *k2, *k2b, *v2;  // second: qb, or in the backward pass the gradient of the output
  u16* out;                               // or the gradient of q
  float* lse;
  const float* delta;
  const int* reach;
  int T, S1, S2, w1, w2, R, G, jobs;
  float scale_log2, scale, k2_bias, v2_bias;
};

// What a cluster does at a time: one query, CLUSTER times 16 heads of a group, all offsets, all keys.
struct Job {
  int b, group, query, head;  // head: the first of this block's, within the group
  Axis first, second;
  int tiles, blocks, start;   // tiles of offsets; blocks of keys, and where the first block starts
  DEVICE Job(int n, const Arguments& a, int me, int sets)
      : b(n / sets / a.T / a.G), group(n / sets / a.T % a.G), query(n / sets % a.T),
        head((n % sets * CLUSTER + me) * HEADS),
        first(query, a.S1, a.w1, a.T, a.reach + (HAS_DOCS ? b * a.T + query : 0)),
        second(query, a.S2, a.w2, a.T, a.reach + (HAS_DOCS ? b * a.T + query : 0)) {
    tiles = max((second.seen + OFFSETS - 1) / OFFSETS, 1);
    blocks = max((first.seen + KEYS - 1) / KEYS, 1);
    start = first.last + 1 - KEYS * blocks;
  }
  DEVICE int row(const Arguments& a) const { return ((b * a.T + query) * a.G + group) * a.R + head; }  // of q: (query, head)
};

// 8 offsets of a query: what its rows are merged into, and what is out of sight. No blocks: there are no more tiles.
struct Tile {
  int blocks, row;  // of keys; the first head's row of q
  int before;       // keys of the first block that lie before the window
  int marks;        // offsets in sight, at most 8, and whether this is the first or the last tile of its query
  static constexpr int FIRST = 16, LAST = 32;
  DEVICE bool first() const { return marks & FIRST; }
  DEVICE bool last() const { return marks & LAST; }
  DEVICE bool hidden(int offset) const { return offset >= (marks & 15); }
};

// A stage has the rows of a tile: k2, k2b, v2, q and `second`; then the tile; in the backward pass each head's LSE and delta.
constexpr int SETS = DETERMINANT || BACKWARD ? 2 : 1, STAGES = 3;
constexpr int STAGE_ROWS = OFFSETS * (COPIES + 1) + HEADS * SETS;
constexpr int V2_AT = OFFSETS * COPIES * PITCH, Q_AT = V2_AT + OFFSETS * PITCH, TILE_AT = STAGE_ROWS * PITCH;
constexpr int STATISTICS_AT = TILE_AT + 16, STAGE = STATISTICS_AT + (BACKWARD ? 8 * HEADS : 0);
// Shared memory: slots of keys and values; D / 4 sums of each thread that multiplies; stages; a few numbers; barriers.
constexpr int SUMS_AT = SLOTS * SLOT, STAGES_AT = SUMS_AT + 256 * D, NUMBERS_AT = STAGES_AT + STAGES * STAGE;
constexpr int BARRIERS_AT = NUMBERS_AT + 512;
struct Barriers {
  u32 full, empty, row_full, row_empty;
  DEVICE Barriers(u32 base) : full(base + BARRIERS_AT), empty(full + 8 * SLOTS), row_full(empty + 8 * SLOTS),
                              row_empty(row_full + 8 * STAGES) {}
  DEVICE void init() const {
    for (int i = 0; i < SLOTS; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 2 * CLUSTER);
    for (int i = 0; i < STAGES; i++) barrier_init(row_full + 8 * i, 1), barrier_init(row_empty + 8 * i, 8);
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  }
};

// One warp: the few rows of every tile, and what the warpgroups need to know of it.
__device__ u16 nothing[128];  // instead of rows that are out of sight
DEVICE void stream_rows(const Arguments& a, u32 base, int me, int sets) {
  Barriers barriers(base);
  Ring<STAGES> ring;
  int lane = threadIdx.x % 32;
  auto begin = [&](const Tile& tile, int bytes) {
    u32 stage = base + STAGES_AT + ring.slot * STAGE;
    barrier_wait(barriers.row_empty + 8 * ring.slot, ring.phase ^ 1);
    if (BACKWARD && bytes) {
      int i = tile.row + lane % HEADS;
      float lse = a.lse[i], x = lane < HEADS ? (lse == -INFINITE ? INFINITE : lse * LOG2E) : a.delta[i];
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(stage + STATISTICS_AT + 4 * lane), "f"(x) : "memory");
      __syncwarp();
    }
    if (lane == 0) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(stage + TILE_AT),
                   "r"(tile.blocks), "r"(tile.row), "r"(tile.before), "r"(tile.marks) : "memory");
      barrier_expect(barriers.row_full + 8 * ring.slot, bytes);
    }
    __syncwarp();
  };
  for (int n = blockIdx.x / CLUSTER; n < a.jobs; n += gridDim.x / CLUSTER) {
    Job job(n, a, me, sets);
    int row = job.row(a), before = job.first.last - job.first.seen + 1 - job.start;
    for (int t = 0; t < job.tiles; t++) {
      int marks = min(max(job.second.seen - t * OFFSETS, 0), OFFSETS);
      marks |= (t == 0 ? Tile::FIRST : 0) | (t == job.tiles - 1 ? Tile::LAST : 0);
      begin({job.blocks, row, before, marks}, STAGE_ROWS * 2 * D);
      for (int r = lane; r < STAGE_ROWS; r += 32) {
        const u16* from = nothing;
        if (r < OFFSETS * (COPIES + 1)) {
          int offset = t * OFFSETS + r % OFFSETS;
          const u16* x = r < OFFSETS ? a.k2 : r < OFFSETS * COPIES ? a.k2b : a.v2;
          if (offset < job.second.seen)
            from = x + (((u64)job.b * a.S2 + job.second.last - offset) * a.G + job.group) * D;
        } else {
          int i = r - OFFSETS * (COPIES + 1);
          from = (i < HEADS ? a.q : a.second) + (u64)(row + i % HEADS) * D;
        }
        load_row(base + STAGES_AT + ring.slot * STAGE + r * PITCH, from, barriers.row_full + 8 * ring.slot);
      }
      ring.next();
    }
  }
  begin({}, 0);
}

// A warpgroup that multiplies: what both passes have in common.
struct Warpgroup {
  const Arguments& a;
  u32 base;
  Barriers barriers;
  int warpgroup, warp, lane, head, column;  // column: of this thread, in words
  Ring<SLOTS> ring;
  Ring<STAGES> rows, merged;

  DEVICE Warpgroup(const Arguments& arguments, u32 base_)
      : a(arguments), base(base_), barriers(base_), warpgroup(threadIdx.x / 128), warp(threadIdx.x % 128 / 32),
        lane(threadIdx.x % 32), head(lane / 4), column(lane % 4) {}
  DEVICE int offset(int i) const { return 2 * warp + i; }  // of this thread's two rows, within the tile
  DEVICE u32 slot(int i) const { return base + i * SLOT; }
  DEVICE u32 stage(int i) const { return base + STAGES_AT + i * STAGE; }
  // of this thread's column in this thread's head's row of q, or in the row of k2 of one of its offsets
  DEVICE u32 q_at(int i) const { return stage(i) + Q_AT + (8 * warpgroup + head) * PITCH + 4 * column; }
  DEVICE u32 k2_at(int i, int row) const { return stage(i) + offset(row) * PITCH + 4 * column; }
  DEVICE u32 sums_at(int i, int thread) const { return base + SUMS_AT + ((warpgroup * (D / 16) + i) * 128 + thread) * 16; }
  DEVICE void release(int i) {
    if (threadIdx.x % 128 < CLUSTER) {
      if (CLUSTER == 1) barrier_arrive(barriers.empty + 8 * i); else barrier_arrive(barriers.empty + 8 * i, threadIdx.x % 128);
    }
  }
  DEVICE void release_stage() {
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.row_empty + 8 * merged.slot);
    merged.next();
  }
  // The warpgroups multiply in turns: the products of one while the other weighs.
  DEVICE void my_turn() { asm volatile("bar.sync %0, 256;" ::"r"(4 + warpgroup) : "memory"); }
  DEVICE void your_turn() { asm volatile("bar.arrive %0, 256;" ::"r"(5 - warpgroup) : "memory"); }
  DEVICE void await(const Ring<SLOTS>& at) { barrier_wait(barriers.full + 8 * at.slot, at.phase); }
  DEVICE Tile read_tile() {
    barrier_wait(barriers.row_full + 8 * rows.slot, rows.phase);
    Tile x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.blocks), "=r"(x.row), "=r"(x.before), "=r"(x.marks)
                 : "r"(stage(rows.slot) + TILE_AT));
    return x;
  }
  // Rows of a block of keys or values that lie before the window, of another document perhaps: 0 * NaN is NaN.
  DEVICE void clear(u32 block, int before) {
    if (before > 0) {
      if ((int)threadIdx.x % 128 < before)
#pragma unroll
        for (int i = 0; i < BOXES * 8; i++)
          write_four(block + i / 8 * BOX + threadIdx.x % 128 * 128 + i % 8 * 16, make_float4(0, 0, 0, 0));
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      warpgroup_sync(warpgroup);
    }
  }
  // r o x, summed over this thread's two rows, onto its sums times `old`; x: k2 or v2 of its first row in shared memory.
  template <bool BIAS> DEVICE void add_rows(const float (&r)[D / 2], u32 x, float bias, bool first, float old) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      float z[4];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float2 a = widen(read_word(x + 16 * (2 * i + j))), b = widen(read_word(x + PITCH + 16 * (2 * i + j)));
        if (BIAS) a.x += bias, a.y += bias, b.x += bias, b.y += bias;
        const float* y = r + 4 * (2 * i + j);
        z[2 * j] = y[0] * a.x + y[2] * b.x;
        z[2 * j + 1] = y[1] * a.y + y[3] * b.y;
      }
      float4 all = make_float4(z[0], z[1], z[2], z[3]);
      if (!first) {
        float4 w = read_four(sums_at(i, threadIdx.x % 128));
        all = make_float4(all.x + w.x * old, all.y + w.y * old, all.z + w.z * old, all.w + w.w * old);
      }
      write_four(sums_at(i, threadIdx.x % 128), all);
    }
  }
  // The sums of the four warps, which have other offsets of the same heads, times a factor each: a row of the output.
  DEVICE void write_row(int row, const float (&factors)[4]) {
#pragma unroll
    for (int k = 0; k < D / 64; k++) {
      int i = D / 64 * warp + k;
      float4 all = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int w = 0; w < 4; w++) {
        float4 x = read_four(sums_at(i, 32 * w + lane));
        all = make_float4(all.x + x.x * factors[w], all.y + x.y * factors[w], all.z + x.z * factors[w], all.w + x.w * factors[w]);
      }
      u32* to = (u32*)(a.out + (u64)row * D + 16 * i + 2 * column);
      to[0] = out_halves(all.x, all.y);
      to[4] = out_halves(all.z, all.w);
    }
  }
};
