// The forward pass over virtual queries for groups of 16, 32, ... heads: hopper_wide.cuh says how rows are laid out.
//
// A tile is flash attention of 64 rows a warpgroup, the scores of a block beside the values of the block before, across
// tiles and queries. All rows of a head share one reference for the exponential, from the first block of a query on: where
// the weights stay below LARGE, nothing is compared and nothing rescaled. At the end of a tile its result times v2 is
// added to this thread's sum over offsets, in shared memory; at the end of a query the sums of four warps are put together.

constexpr float LARGE = 1 << 14;

// Keys one block ahead of values, as they are multiplied.
DEVICE void stream_keys(const Arguments& a, const TensorMap* k_map, const TensorMap* v_map, u32 base, int me, int sets) {
  Barriers barriers(base);
  Ring<SLOTS> ring;
  int part = KEYS / CLUSTER * me;
  auto load = [&](const TensorMap* map, int row, int column) {
    u32 full = barriers.full + 8 * ring.slot;
    barrier_wait(barriers.empty + 8 * ring.slot, ring.phase ^ 1);
    barrier_expect(full, SLOT);
#pragma unroll
    for (int box = 0; box < BOXES; box++)
      load_box_for_all(base + ring.slot * SLOT + box * BOX + part * 128, map, column + box * 128, row + part, full);
    ring.next();
  };
  int old_row = 0, old_column = -1;
  for (int n = blockIdx.x / CLUSTER; n < a.jobs; n += gridDim.x / CLUSTER) {
    Job job(n, a, me, sets);
    int row = job.b * a.S1 + job.start, column = job.group * 2 * D;
    for (int tile = 0; tile < job.tiles; tile++)
      for (int i = 0; i < job.blocks; i++) {
        load(k_map, row + KEYS * i, column);
        if (old_column >= 0) load(v_map, old_row, old_column);
        old_row = row + KEYS * i, old_column = column;
      }
  }
  if (old_column >= 0) load(v_map, old_row, old_column);
}

struct Consumer : Warpgroup {
  float s[64], o[D / 2];
  u32 p[32], u[D / 4];
  float top, sum, sums_top;  // the reference of the exponentials, their sum, the reference of the sums in shared memory

  DEVICE Consumer(const Arguments& arguments, u32 base_) : Warpgroup(arguments, base_) {}

  // The next tile, with u of this thread's two rows in the order of wgmma's first operand.
  DEVICE Tile next_tile() {
    Tile tile = read_tile();
    u32 q = q_at(rows.slot);
#pragma unroll
    for (int k = 0; k < D / 8; k++) {  // two words of 8 columns: one a row
      u32 word = 16 * k, q_a = read_word(q + word), q_b = DETERMINANT ? read_word(q + HEADS * PITCH + word) : q_a;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        u32 k2 = k2_at(rows.slot, i) + word, k2_a = read_word(k2), k2_b = DETERMINANT ? read_word(k2 + OFFSETS * PITCH) : k2_a;
        u[2 * k + i] = virtual_word(q_a, q_b, k2_a, k2_b, a.k2_bias);
      }
    }
    rows.next();
    return tile;
  }
  DEVICE void scores() {
    u64 keys = descriptor(slot(ring.slot));
    settled(u);
    products_begin();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      multiply_keys<0>(s, u[4 * k], u[4 * k + 1], u[4 * k + 2], u[4 * k + 3], keys + along(k), k > 0);
    products_end();
    ring.next();
  }
  DEVICE void values(bool add) {
    u64 values = descriptor(slot(ring.slot));
    settled(p);
    products_begin();
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
      multiply_d<1>(o, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], values + turned(k), add || k > 0);
    products_end();
    ring.next();
  }

  // The reference of the exponentials follows the largest logit. Returns by what that multiplies all sums so far.
  DEVICE float raise() {
    float most[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < 64; i++) most[i % 4] = fmaxf(most[i % 4], s[i]);
    float largest = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)), top);
    float factor = exp2_of((top - largest) * a.scale_log2);
    sum *= factor;
    top = largest;
    return factor;
  }
  // Scores to weights. The reference is that of the blocks before, unless the weights are then too large: their sum tells
  // that afterwards, and no maximum is needed. Returns by what is to be multiplied what was summed so far.
  DEVICE float weigh(const Tile& tile, int block) {
    if (tile.before > 0 && block == 0)
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (8 * (i / 4) + 2 * column + i % 2 < tile.before) s[i] = -INFINITE;
    if (tile.hidden(OFFSETS - 1))
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (tile.hidden(offset(i / 2 % 2))) s[i] = -INFINITE;
    float factor = 1;
    bool exact = tile.first() && block == 0;
    while (true) {
      if (exact) factor = raise();
      float zero = top * a.scale_log2, sums[4] = {};
#pragma unroll
      for (int i = 0; i < 32; i++) {
        float x = exp2_of(s[2 * i] * a.scale_log2 - zero), y = exp2_of(s[2 * i + 1] * a.scale_log2 - zero);
        sums[i % 2] += x, sums[2 + i % 2] += y;
        p[i] = halves(x, y);
      }
      float all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      if (exact || !__any_sync(~0u, all > LARGE)) {
        sum += all;
        return factor;
      }
      exact = true;
    }
  }

  // The result of a tile onto the sums of its query; after the last tile the output.
  DEVICE void merge(const Tile& tile) {
    add_rows<V2_BIAS>(o, k2_at(merged.slot, 0) + V2_AT, a.v2_bias, tile.first(), exp2_of((sums_top - top) * a.scale_log2));
    sums_top = top;
    release_stage();
    if (tile.last()) finish(tile.row + 8 * warpgroup + head);
  }
  // Output and LSE of a query: a joint softmax over the offsets that the four warps have.
  DEVICE void finish(int row) {
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    u32 numbers = base + NUMBERS_AT + warpgroup * 256 + head * 8;
    if (column == 0)
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(numbers + warp * 64), "f"(top), "f"(sum) : "memory");
    warpgroup_sync(warpgroup);
    float tops[4], factors[4], most = HIDDEN, total = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(tops[w]), "=f"(factors[w]) : "r"(numbers + w * 64));
      most = fmaxf(most, tops[w]);
    }
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float factor = exp2_of((tops[w] - most) * a.scale_log2);
      total += factors[w] * factor;
      factors[w] = factor;
    }
    float inverse = total > 0 ? 1 / total : 0;
    if (warp == 0 && column == 0) a.lse[row] = total > 0 ? (most * a.scale_log2 + log2f(total)) * LN2 : -INFINITE;
#pragma unroll
    for (int w = 0; w < 4; w++) factors[w] *= inverse;
    write_row(row, factors);
    warpgroup_sync(warpgroup);  // before the next query's sums are written there
    top = HIDDEN, sum = 0;
  }

  DEVICE void run() {
    Tile tile = next_tile(), next{};  // next: of which u is, once the last block of `tile` has its scores
    if (!tile.blocks) return;
    int block = 0;  // of `tile`: p holds its weights, s before that its scores
    if (warpgroup == 1) your_turn();
    int k_slot = ring.slot;
    await(ring);
    scores();
    products_wait<0>();
    settled(s);
    release(k_slot);
    top = HIDDEN, sum = 0;
    weigh(tile, 0);
    if (tile.blocks == 1) next = next_tile();
    while (true) {
      bool ends = block + 1 == tile.blocks;
      if (ends && !next.blocks) break;
      Ring<SLOTS> next_slot = ring;
      next_slot.next();
      await(ring);
      await(next_slot);
      if (block == 0) clear(slot(next_slot.slot), tile.before);
      my_turn();
      k_slot = ring.slot;
      scores();  // of the next block
      int v_slot = ring.slot;
      values(block > 0);
      your_turn();
      Tile old = tile;
      if (ends) tile = next, block = 0; else block++;
      products_wait<1>();
      settled(s);
      release(k_slot);
      if (block + 1 == tile.blocks) next = next_tile();
      products_wait<0>();
      settled(o);
      settled(p);
      release(v_slot);
      if (ends) merge(old);
      float factor = weigh(tile, block);
      if (block > 0 && __any_sync(~0u, factor != 1))
#pragma unroll
        for (int j = 0; j < D / 2; j++) o[j] *= factor;
    }
    await(ring);
    if (block == 0) clear(slot(ring.slot), tile.before);
    values(block > 0);
    products_wait<0>();
    settled(o);
    merge(tile);
  }
};
