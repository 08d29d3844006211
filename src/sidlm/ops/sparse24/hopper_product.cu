// C = A B' on sm_90a, where A may be 2:4 sparse; a CUDA kernel, because Triton has no sparse products.
//
// hopper_product.py compiles it with these constants, and puts the function `multiply`, one wgmma, before it:
//   SPARSE    whether A (M, K) is packed: values (M, K / 2), plain metadata (M, K / 8) bytes
//   BYTES     of an element: 2, or 1 for e4m3
//   FP16      whether 16-bit elements are float16, not bfloat16
//   TURNED    whether B lies as (K, N), not (N, K); of 16 bits alone
//   SCALED    whether C is multiplied by a factor for each row and one for each column
//   PACK      whether C leaves as relu(C)^2, 2:4 sparse along its rows and packed, instead of as it is; of bfloat16
//   BN, WARPGROUPS, BLOCKS, STAGES, SLOTS, CLUSTER, GROUP   how: see below
//
// A block makes tiles of BM x BN, one after another. One warp loads, by the copy engine; each of the other warpgroups
// has BLOCKS times 64 rows of the tile in its registers. Blocks of a cluster have neighbouring rows and the same columns: each loads
// a part of B's tile for all. Rows of 128 bytes of B, a stage, go through memory at a time.

constexpr int BM = 64 * BLOCKS * WARPGROUPS;
constexpr int B_ROW = 128, A_ROW = SPARSE ? 64 : 128;        // bytes a stage has of a row
constexpr int BK = B_ROW / BYTES;                            // columns of A and B in a stage
constexpr int A_STAGE = BM * A_ROW, B_STAGE = BN * B_ROW;
constexpr int MULTIPLIES = SPARSE ? 2 : 4;                   // wgmma's in a stage, each 32 bytes of a row of A
constexpr int B_BOX = BK * 128, B_BOXES = BN / 64;           // of a turned B: 64 columns; blocks load them in turn
constexpr int B_STEP = (TURNED ? B_BOX : B_ROW) / MULTIPLIES;
constexpr int PERIOD = 256 / BK;                             // stages that share a slot of metadata: 32 bytes of a row
constexpr int E_SLOT = SPARSE ? BM * 32 : 0;
constexpr int A_AT = STAGES * B_STAGE, E_AT = A_AT + STAGES * A_STAGE, BARRIERS_AT = E_AT + SLOTS * E_SLOT;

// wgmma's description of a matrix in shared memory: rows of 64 or 128 bytes, swizzled by the copy engine, along K or,
// turned, along N; there `box` bytes lie between one 64 columns and the next
DEVICE u64 descriptor(u32 at, int row, int box = 16) {
  u64 swizzle = row == 128 ? 1 : 2;
  return swizzle << 62 | (u64)(8 * row >> 4) << 32 | (u64)(box >> 4) << 16 | (at & 0x3FFFF) >> 4;
}

// Which tile is the n-th: GROUP rows of tiles at a time, so that both operands stay in the L2 cache for a while.
struct Tile { int m, n; };
DEVICE Tile tile_at(int i, int rows, int columns) {
  int first = i / (GROUP * columns) * GROUP;
  int height = min(GROUP, rows - first);
  i -= first * columns;
  return {first + i % height, i / height};
}

// Of four neighbouring threads the k-th gives the i-th its x[i], and gets the i-th's x[k] as x[i].
DEVICE void trade(u32 (&x)[4]) {
  bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    u32 other = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
    if (odd) x[i] = other; else x[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + 2], 2);
    if (upper) x[i] = other; else x[i + 2] = other;
  }
}

#if SPARSE
// What the tensor cores want of a slot's metadata, for step `step` of it: 64 columns of 8 bits (a thread has the 8 groups
// of half a row), or a pair of products of 32 columns of 16 bits (4 groups of rows r and r + 8; every other pair of
// threads has those of the second product).
DEVICE u32 slot_word(u32 slot, int row, int word) {
  u32 x, at = slot + row * 32 + ((word >> 2 ^ (row >> 2 & 1)) << 4) + (word & 3) * 4;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at));
  return x;
}
DEVICE u32 metadata(u32 slot, int step) {
  int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4, odd = thread & 1, upper = thread >> 1 & 1;
#if BYTES == 1
  return slot_word(slot, row + 8 * odd, 2 * step + upper);
#else
  return __byte_perm(slot_word(slot, row, 2 * step + upper), slot_word(slot, row + 8, 2 * step + upper),
                     odd ? 0x7632 : 0x5410);
#endif
}
#endif

#if PACK
DEVICE u32 halves_relu(float low, float high) {
  u32 x;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// Four neighbours, relu'd, two of them in each of x and y: the two largest, squared and rounded, in their order, and the
// nibble that says which. Keys are a value's bits above 3 - its index: of equal values the first is the larger key, and
// NaN is larger than all numbers. `low`, `high`: 3 - index of x's and of y's two, as they go below the value.
struct Pair { u32 values, nibble; };
DEVICE Pair two_of_four(u32 x, u32 y, u32 x_low, u32 y_low) {
  u32 a = __byte_perm(x, x_low, 0x1054), b = __byte_perm(x, x_low, 0x3276);
  u32 c = __byte_perm(y, y_low, 0x1054), d = __byte_perm(y, y_low, 0x3276);
  u32 p = max(a, b), q = max(c, d), low = max(min(a, b), min(c, d));
  u32 one = max(p, q), two = max(min(p, q), low);
  bool swapped = (one & 3) < (two & 3);
  u32 first = swapped ? two : one, second = swapped ? one : two;
  u32 nibble = (~first & 3) | (~second & 3) << 2;
  float u = __uint_as_float(first & 0xFFFF0000), v = __uint_as_float(second & 0xFFFF0000);
  return {halves(u * u, v * v), nibble};
}

// relu^2 of 64 rows of accumulators, packed: values (M, N / 2) and metadata (M, N / 8).
// Of 16 neighbours of a row four threads have 2 + 2 each; they trade, so that each has a whole group of four.
DEVICE void write_tile(float (&c)[BN / 2], u8* values, u8* meta, int m, int n, int M, int N) {
  int lane = threadIdx.x % 4, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, odd = lane & 1, upper = lane >> 1;
  u32 mine_low = odd ? 0x00000001u : 0x00020003u, other_low = odd ? 0x00020003u : 0x00000001u;
  int place = upper + 2 * odd;  // of this thread's group in the four
#pragma unroll
  for (int i = 0; i < 2; i++) {  // rows r and r + 8
    int y = m + row + 8 * i;
    u32 e[4][2] = {};  // nibbles of 64 columns each, for the thread that will write them
#pragma unroll
    for (int box = 0; box < BN / 64; box++) {
      u32 x[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {  // 16 columns
        int at = 32 * box + 8 * p + 2 * i;
        u32 near = halves_relu(c[at], c[at + 1]), far = halves_relu(c[at + 4], c[at + 5]);
        u32 other = __shfl_xor_sync(~0u, odd ? near : far, 1);
        Pair pair = two_of_four(odd ? far : near, other, mine_low, other_low);
        e[box][p / 2] |= pair.nibble << (16 * (p % 2) + 4 * place);
        x[p] = pair.values;
      }
      trade(x);
      if (y < M && n + 64 * box < N)
        *(uint4*)(values + ((u64)y * N + n + 64 * box + 16 * lane)) = make_uint4(x[0], x[2], x[1], x[3]);
    }
    // thread t of the four gets the nibbles of columns 64 t ..
    u32 f[2][2], g[2];
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int w = 0; w < 2; w++) {
        u32 send = upper ? e[k][w] : e[2 + k][w], keep = upper ? e[2 + k][w] : e[k][w];
        f[k][w] = keep | __shfl_xor_sync(~0u, send, 2);
      }
#pragma unroll
    for (int w = 0; w < 2; w++) {
      u32 send = odd ? f[0][w] : f[1][w], keep = odd ? f[1][w] : f[0][w];
      g[w] = keep | __shfl_xor_sync(~0u, send, 1);
    }
    int x = 64 * (2 * upper + odd);
    if (y < M && x < BN && n + x < N) *(uint2*)(meta + (u64)y * (N / 8) + (n + x) / 8) = make_uint2(g[0], g[1]);
  }
}
#else
// 64 rows of accumulators, scaled and rounded to 16 bits. Four threads have two columns each of every eight of a row;
// they trade, so that each writes eight neighbours.
DEVICE void write_tile(float (&c)[BN / 2], u8* out, const float* rows, const float* columns, int m, int n, int M, int N) {
  int lane = threadIdx.x % 4, row = m + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  float row_scale[2] = {1.0f, 1.0f};
#if SCALED
  row_scale[0] = row < M ? rows[row] : 0.0f, row_scale[1] = row + 8 < M ? rows[row + 8] : 0.0f;
#endif
#pragma unroll
  for (int box = 0; box < BN / 32; box++) {
    u32 x[2][4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float2 t = make_float2(1.0f, 1.0f);
      int column = n + 32 * box + 8 * k + 2 * lane, at = 16 * box + 4 * k;
#if SCALED
      if (column < N) t = *(const float2*)(columns + column);
#endif
#pragma unroll
      for (int i = 0; i < 2; i++)
        x[i][k] = halves(c[at + 2 * i] * row_scale[i] * t.x, c[at + 2 * i + 1] * row_scale[i] * t.y);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      trade(x[i]);
      int y = row + 8 * i, column = n + 32 * box + 8 * lane;
      if (y < M && column < N)
        *(uint4*)(out + ((u64)y * N + column) * 2) = make_uint4(x[i][0], x[i][1], x[i][2], x[i][3]);
    }
  }
}
#endif

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 * (WARPGROUPS + 1), 1)
product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
        const __grid_constant__ TensorMap e_map, const float* rows, const float* columns, u8* out, u8* meta, int M,
        int N, int K) {
  extern __shared__ __align__(1024) u8 shared[];
  u32 base = address(shared), full = base + BARRIERS_AT, empty = full + 8 * STAGES;
  int warpgroup = threadIdx.x / 128, block = CLUSTER > 1 ? block_of_cluster() : 0;
  int tiles_m = (M + BM * CLUSTER - 1) / (BM * CLUSTER), tiles_n = (N + BN - 1) / BN, tiles = tiles_m * tiles_n;
  int steps = (K + BK - 1) / BK, first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPGROUPS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  }
  if (CLUSTER > 1) cluster_sync(); else __syncthreads();

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 3 ? 32 : 40));
    if (threadIdx.x == 0) {
      int stage = 0, phase = 1, slot = 0;
      for (int i = first; i < tiles; i += stride) {
        Tile tile = tile_at(i, tiles_m, tiles_n);
        int m = (tile.m * CLUSTER + block) * BM, n = tile.n * BN;
        for (int step = 0; step < steps; step++) {
          bool more = SPARSE && step % PERIOD == 0;
          u32 barrier = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase);
          barrier_expect(barrier, A_STAGE + B_STAGE + (more ? E_SLOT : 0));
          load_box(base + A_AT + stage * A_STAGE, &a_map, step * A_ROW, m, barrier);
          if (more) {
            load_box(base + E_AT + slot * E_SLOT, &e_map, step / PERIOD * 32, m, barrier);
            slot = slot + 1 == SLOTS ? 0 : slot + 1;
          }
#if TURNED
#pragma unroll
          for (int box = block; box < B_BOXES; box += CLUSTER) {
            load_box_for_all(base + stage * B_STAGE + box * B_BOX, &b_map, (n + 64 * box) * BYTES, step * BK, barrier);
          }
#else
          int part = BN / CLUSTER * block;
          load_box_for_all(base + stage * B_STAGE + part * B_ROW, &b_map, step * B_ROW, n + part, barrier);
#endif
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 3 ? 160 : 232));
    int mine = (warpgroup - 1) * BLOCKS, thread = threadIdx.x % 128;
    u64 a_first = descriptor(base + A_AT + mine * 64 * A_ROW, A_ROW), b_first = descriptor(base, B_ROW, TURNED ? B_BOX : 16);
    int stage = 0, phase = 0, slot = 0;
    float c[BLOCKS][BN / 2];
    for (int i = first; i < tiles; i += stride) {
      Tile tile = tile_at(i, tiles_m, tiles_n);
      u32 e_slot = 0;
      int previous = 0;
      // the tensor cores may still read the metadata of a stage when the next one's is loaded: two sets of registers
      u32 even[BLOCKS][2] = {}, odd[BLOCKS][2] = {};
      auto multiply_stage = [&](int step, u32 (&e)[BLOCKS][2], u32 (&before)[BLOCKS][2]) {
        barrier_wait(full + 8 * stage, phase);
        u64 a = a_first + stage * (A_STAGE >> 4), b = b_first + stage * (B_STAGE >> 4);
#if SPARSE
        if (step % PERIOD == 0) {
          e_slot = base + E_AT + slot * E_SLOT + mine * 64 * 32;
          slot = slot + 1 == SLOTS ? 0 : slot + 1;
        }
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
          e[j][0] = metadata(e_slot + j * 64 * 32, BYTES == 1 ? step % PERIOD * 2 : step % PERIOD);
          e[j][1] = BYTES == 1 ? metadata(e_slot + j * 64 * 32, step % PERIOD * 2 + 1) : e[j][0];
        }
#endif
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < MULTIPLIES; k++)
#pragma unroll
          for (int j = 0; j < BLOCKS; j++) {
            u64 a_k = a + 2 * k + j * (64 * A_ROW >> 4), b_k = b + (B_STEP * k >> 4);
#if SPARSE
            if (BYTES == 2 && k) multiply<1>(c[j], a_k, b_k, e[j][k], 1);
            else multiply<0>(c[j], a_k, b_k, e[j][k], step + k);
#else
            multiply(c[j], a_k, b_k, step + k);
#endif
          }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) asm volatile("" ::"r"(before[j][0]), "r"(before[j][1]));  // until here
        if (step && thread < CLUSTER) barrier_arrive(empty + 8 * previous, thread);
        previous = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      };
      for (int step = 0; step < steps; step += 2) {
        multiply_stage(step, even, odd);
        if (step + 1 < steps) multiply_stage(step + 1, odd, even);
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int j = 0; j < BLOCKS; j++)
        asm volatile("" ::"r"(even[j][0]), "r"(even[j][1]), "r"(odd[j][0]), "r"(odd[j][1]));
#pragma unroll
      for (int k = 0; k < BLOCKS * BN / 2; k++) asm volatile("" : "+f"(c[k / (BN / 2)][k % (BN / 2)])::"memory");
      if (thread < CLUSTER) barrier_arrive(empty + 8 * previous, thread);
#pragma unroll
      for (int j = 0; j < BLOCKS; j++) {
        int m = (tile.m * CLUSTER + block) * BM + (mine + j) * 64, n = tile.n * BN;
#if PACK
        write_tile(c[j], out, meta, m, n, M, N);
#else
        write_tile(c[j], out, rows, columns, m, n, M, N);
#endif
      }
    }
  }
  if (CLUSTER > 1) cluster_sync();  // no block leaves while another may still write to it
}
