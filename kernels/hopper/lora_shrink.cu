// u = factor x A^T, the first half of a LoRA adapter: x [m, k] and A [rows, k] in bfloat16, rows = rank times the number of
// fused projections, u [m, rows] in bfloat16.
//
// A block has 16 or 32 tokens and 32 rows of A; the inner dimension is divided among the eight warps of a block and the blocks of
// a cluster, whose float32 parts are added through shared memory in a fixed order. Operands go from global memory to
// registers: a lane takes 8 neighbouring k of a row, which serve two tensor core steps in an order of k that x and A share.
//
// With programmatic dependent launch the kernel that follows may start once every block has seen the kernels before
// this one complete, so it may read x at once and has to wait for u alone (`early` 0), or at once, to fetch what no kernel
// writes (`early` 1).
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qerl {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 32;
constexpr int kColumns = 32;  // of k, for one load of 8 by each of 4 lanes
constexpr int kDepth = 2;     // loads in flight

__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int kTokens>
__global__ void __launch_bounds__(kWarps * 32, 2) shrink_kernel(const __nv_bfloat16* x, const __nv_bfloat16* __restrict__ a,
                                                            __nv_bfloat16* u, float factor, int m, int k,
                                                            int rows, int cluster, int early) {
  constexpr int kStride = kRows + 4;  // of a token's results in shared memory: no two lanes of a store in one bank
  __shared__ __align__(16) float parts[kWarps][kTokens * kStride];
  __shared__ __align__(16) float part[kRows * kTokens];
  constexpr int kTiles = kTokens / 8;
  constexpr int kEach = kRows * kTokens / (kWarps * 32);  // results that a thread adds up: 2 or 4
  if (early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int warp = threadIdx.x >> 5;
  const int lane = threadIdx.x & 31;
  const int g = lane >> 2;
  const int t = lane & 3;
  const int rank = blockIdx.x % cluster;
  const int token0 = blockIdx.x / cluster * kTokens;
  const int row0 = blockIdx.y * kRows;

  const int chunks = k / kColumns;
  const int share = rank * kWarps + warp;
  const int shares = cluster * kWarps;
  const int begin = static_cast<int>(static_cast<long long>(chunks) * share / shares);
  const int end = static_cast<int>(static_cast<long long>(chunks) * (share + 1) / shares);

  const __nv_bfloat16* a_row[4];
  bool a_there[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + i * 8 + g;
    a_there[i] = row < rows;
    a_row[i] = a + static_cast<size_t>(a_there[i] ? row : 0) * k + t * 8;
  }
  const __nv_bfloat16* x_row[kTiles];
  bool x_there[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = token0 + i * 8 + g;
    x_there[i] = token < m;
    x_row[i] = x + static_cast<size_t>(x_there[i] ? token : 0) * k + t * 8;
  }
  const uint4 zero = make_uint4(0, 0, 0, 0);

  float acc[2][kTiles][4] = {};  // [16 rows][8 tokens]
  uint4 qa[kDepth][4], qx[kDepth][kTiles];
  auto load_a = [&](int chunk, int d) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      qa[d][i] = chunk < end && a_there[i] ? __ldg(reinterpret_cast<const uint4*>(a_row[i] + chunk * kColumns)) : zero;
  };
  auto load_x = [&](int chunk, int d) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      qx[d][i] = chunk < end && x_there[i] ? *reinterpret_cast<const uint4*>(x_row[i] + chunk * kColumns) : zero;
  };
  // A does not depend on the kernel before this one.
#pragma unroll
  for (int d = 0; d < kDepth; ++d) load_a(begin + d, d);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (!early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#pragma unroll
  for (int d = 0; d < kDepth; ++d) load_x(begin + d, d);

  for (int chunk = begin; chunk < end; chunk += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          mma(acc[r][n], qa[d][2 * r].x, qa[d][2 * r + 1].x, qa[d][2 * r].y, qa[d][2 * r + 1].y, qx[d][n].x, qx[d][n].y);
          mma(acc[r][n], qa[d][2 * r].z, qa[d][2 * r + 1].z, qa[d][2 * r].w, qa[d][2 * r + 1].w, qx[d][n].z, qx[d][n].w);
        }
      load_a(chunk + kDepth + d, d);
      load_x(chunk + kDepth + d, d);
    }
  }

  // element (row, token) of the tile at token * kStride + row
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[warp][(n * 8 + 2 * t + (i & 1)) * kStride + r * 16 + g + (i >> 1) * 8] = acc[r][n][i];
  __syncthreads();
  const int my_token = threadIdx.x * kEach / kRows;
  const int my_row = threadIdx.x * kEach % kRows;
  float sum[kEach] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
#pragma unroll
    for (int e = 0; e < kEach; e += 2) {
      const float2 v = *reinterpret_cast<const float2*>(&parts[w][my_token * kStride + my_row + e]);
      sum[e] += v.x, sum[e + 1] += v.y;
    }
  if (cluster > 1) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) part[threadIdx.x * kEach + e] = sum[e];
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const bool mine = threadIdx.x / (kWarps * 32 / cluster) == rank;  // each block adds up one share of the tile
    if (mine) {
      const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&part[threadIdx.x * kEach]));
      float2 v[8][kEach / 2];  // all loads before the first use
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        uint32_t remote;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(r < cluster ? r : 0));
#pragma unroll
        for (int e = 0; e < kEach / 2; ++e)
          asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v[r][e].x), "=f"(v[r][e].y) : "r"(remote + e * 8));
      }
#pragma unroll
      for (int e = 0; e < kEach / 2; ++e) {
        sum[2 * e] = sum[2 * e + 1] = 0.0f;
#pragma unroll
        for (int r = 0; r < 8; ++r)
          if (r < cluster) sum[2 * e] += v[r][e].x, sum[2 * e + 1] += v[r][e].y;
      }
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (!mine) return;
  }
  const int token = token0 + my_token;
  const int row = row0 + my_row;
  if (token < m && row < rows)
#pragma unroll
    for (int e = 0; e < kEach; e += 2)
      *reinterpret_cast<__nv_bfloat162*>(u + static_cast<size_t>(token) * rows + row + e) =
          __floats2bfloat162_rn(sum[e] * factor, sum[e + 1] * factor);
}

}  // namespace
}  // namespace qerl

// rows a multiple of 16, k of 32; cluster 1, 2, 4 or 8.
extern "C" int qerl_lora_shrink(const void* x, const void* a, void* u, float factor, int m, int k, int rows, int cluster,
                                int early, int pdl, cudaStream_t stream) {
  using namespace qerl;
  if (m < 1 || rows % 16 || k % kColumns || (cluster != 1 && cluster != 2 && cluster != 4 && cluster != 8)) return -1;
  cudaLaunchConfig_t config = {};
  const int tokens = m > 64 ? 32 : 16;
  config.gridDim = dim3((m + tokens - 1) / tokens * cluster, (rows + kRows - 1) / kRows);
  config.blockDim = dim3(kWarps * 32);
  config.stream = stream;
  cudaLaunchAttribute attribute[2];
  config.attrs = attribute;
  if (pdl) {
    attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
  attribute[config.numAttrs].val.clusterDim.x = cluster;
  attribute[config.numAttrs].val.clusterDim.y = 1;
  attribute[config.numAttrs++].val.clusterDim.z = 1;
  return cudaLaunchKernelEx(&config, tokens == 32 ? shrink_kernel<32> : shrink_kernel<16>,
                            static_cast<const __nv_bfloat16*>(x), static_cast<const __nv_bfloat16*>(a),
                            static_cast<__nv_bfloat16*>(u), factor, m, k, rows, cluster, early);
}
