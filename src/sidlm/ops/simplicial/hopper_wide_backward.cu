// The gradient of q over virtual queries for groups of 16, 32, ... heads, of the trilinear form; hopper_wide.cuh says how
// rows are laid out.
//
// With dO' = dO o v2 it takes three products a pair, S = U K', dP = dO' V' and dU = dS K, and at the end of a tile
// dq += dU o k2. A block's S and dP run beside the dU of the block before, and the weights are known from the LSE; dS is made
// in place of S while that dU is still multiplied.

DEVICE void stream_keys(const Arguments& a, const TensorMap* k_map, const TensorMap* v_map, u32 base, int me, int sets) {
  Barriers barriers(base);
  Ring<SLOTS> ring;
  int part = KEYS / CLUSTER * me;
  for (int n = blockIdx.x / CLUSTER; n < a.jobs; n += gridDim.x / CLUSTER) {
    Job job(n, a, me, sets);
    for (int i = 0; i < job.tiles * job.blocks; i++) {
      u32 full = barriers.full + 8 * ring.slot, to = base + ring.slot * SLOT + part * 128;
      int row = job.b * a.S1 + job.start + i % job.blocks * KEYS + part;
      barrier_wait(barriers.empty + 8 * ring.slot, ring.phase ^ 1);
      barrier_expect(full, SLOT);
#pragma unroll
      for (int box = 0; box < 2 * BOXES; box++)
        load_box_for_all(to + box * BOX, box < BOXES ? k_map : v_map, job.group * 2 * D + box % BOXES * 128, row, full);
      ring.next();
    }
  }
}

struct Consumer : Warpgroup {
  float s[32], dp[32], du[D / 2];
  u32 ds[16], u[D / 4], w[D / 4];  // w: the virtual output gradients dO'
  float lse, delta;                // of this thread's head, the LSE in powers of two

  DEVICE Consumer(const Arguments& arguments, u32 base_) : Warpgroup(arguments, base_) {}

  // The next tile, with u and w of this thread's two rows in the order of wgmma's first operand.
  DEVICE Tile next_tile(float& next_lse, float& next_delta) {
    Tile tile = read_tile();
    u32 q = q_at(rows.slot), numbers = stage(rows.slot) + STATISTICS_AT + 4 * (8 * warpgroup + head);
    next_lse = __uint_as_float(read_word(numbers)), next_delta = __uint_as_float(read_word(numbers + 4 * HEADS));
#pragma unroll
    for (int k = 0; k < D / 8; k++) {  // two words of 8 columns: one a row
      u32 word = 16 * k, q_a = read_word(q + word), grad = read_word(q + HEADS * PITCH + word);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        u32 k2 = k2_at(rows.slot, i) + word, v2 = read_word(k2 + V2_AT);
        u[2 * k + i] = virtual_word(q_a, 0, read_word(k2), 0, a.k2_bias);
        w[2 * k + i] = V2_BIAS ? product(grad, v2, a.v2_bias) : product(grad, v2);
      }
    }
    rows.next();
    return tile;
  }
  // S and dP of the block in a slot
  DEVICE void scores() {
    u64 keys = descriptor(slot(ring.slot)), values = descriptor(slot(ring.slot) + BOXES * BOX);
    settled(u);
    settled(w);
    products_begin();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      multiply_keys<0>(s, u[4 * k], u[4 * k + 1], u[4 * k + 2], u[4 * k + 3], keys + along(k), k > 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      multiply_keys<0>(dp, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3], values + along(k), k > 0);
    products_end();
    ring.next();
  }
  DEVICE void gradients(int i, bool add) {
    u64 keys = descriptor(slot(i));
    settled(ds);
    products_begin();
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
      multiply_d<1>(du, ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3], keys + turned(k), add || k > 0);
    products_end();
  }
  // dS = P o (dP - delta), in place of S
  DEVICE void weigh(const Tile& tile, int block) {
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = exp2_of(s[i] * a.scale_log2 - lse) * (dp[i] - delta);
    if (tile.before > 0 && block == 0)
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (8 * (i / 4) + 2 * column + i % 2 < tile.before) s[i] = 0;
    if (tile.hidden(OFFSETS - 1))
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (tile.hidden(offset(i / 2 % 2))) s[i] = 0;
  }
  DEVICE void round_gradients() {
#pragma unroll
    for (int i = 0; i < 16; i++) ds[i] = halves(s[2 * i], s[2 * i + 1]);
  }
  DEVICE void merge(const Tile& tile) {
    add_rows<K2_BIAS>(du, k2_at(merged.slot, 0), a.k2_bias, tile.first(), 1);
    release_stage();
    if (tile.last()) {
      warpgroup_sync(warpgroup);
      write_row(tile.row + 8 * warpgroup + head, {a.scale, a.scale, a.scale, a.scale});
      warpgroup_sync(warpgroup);  // before the next query's sums are written there
    }
  }

  DEVICE void run() {
    float next_lse, next_delta;
    Tile tile = next_tile(lse, delta), next{};  // next: of which u and w are, once the last block of `tile` has its scores
    if (!tile.blocks) return;
    int block = 0, old_slot = ring.slot;  // of `tile`: ds holds its gradients, s and dp before that its scores
    if (warpgroup == 1) your_turn();
    await(ring);
    scores();
    products_wait<0>();
    settled(s);
    settled(dp);
    weigh(tile, 0);
    round_gradients();
    if (tile.blocks == 1) next = next_tile(next_lse, next_delta);
    while (true) {
      bool ends = block + 1 == tile.blocks;
      if (ends && !next.blocks) break;
      await(ring);
      if (block == 0) clear(slot(old_slot), tile.before);
      my_turn();
      int new_slot = ring.slot;
      scores();  // of the next block
      gradients(old_slot, block > 0);
      your_turn();
      Tile old = tile;
      if (ends) tile = next, block = 0, lse = next_lse, delta = next_delta; else block++;
      products_wait<1>();
      settled(s);
      settled(dp);
      weigh(tile, block);
      settled(s);  // made before the product is waited for
      if (block + 1 == tile.blocks) next = next_tile(next_lse, next_delta);
      products_wait<0>();
      settled(du);
      settled(ds);
      release(old_slot);
      old_slot = new_slot;
      if (ends) merge(old);
      round_gradients();
    }
    if (block == 0) clear(slot(old_slot), tile.before);
    gradients(old_slot, block > 0);
    products_wait<0>();
    settled(du);
    merge(tile);
  }
};
