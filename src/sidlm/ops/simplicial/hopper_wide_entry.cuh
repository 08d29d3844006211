
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
run(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const u16* q, const u16* second,
    const u16* k2, const u16* k2b, const u16* v2, u16* out, float* lse, const float* delta, const int* reach, int T, int S1,
    int S2, int w1, int w2, int R, int G, int jobs, float scale_log2, float scale, float k2_bias, float v2_bias) {
  extern __shared__ __align__(1024) u8 shared[];
  Arguments a{q, second, k2, k2b, v2, out, lse, delta, reach, T, S1, S2, w1, w2, R, G, jobs, scale_log2, scale, k2_bias, v2_bias};
  u32 base = address(shared);
  int me = CLUSTER > 1 ? block_of_cluster() : 0, sets = R / (HEADS * CLUSTER);
  if (threadIdx.x == 0) Barriers(base).init();
  if (CLUSTER > 1) cluster_sync(); else __syncthreads();
  if (threadIdx.x >= 256) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(BACKWARD ? 24 : 40));
    if (threadIdx.x == 256) stream_keys(a, &k_map, &v_map, base, me, sets);
    if (threadIdx.x >= 288 && threadIdx.x < 320) stream_rows(a, base, me, sets);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(BACKWARD ? 240 : 232));
    Consumer consumer(a, base);
    consumer.run();
  }
  if (CLUSTER > 1) cluster_sync();  // no block leaves while another may still write to it
}
