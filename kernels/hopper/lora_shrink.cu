// Computes u = factor x A^T, the first half of a LoRA adapter. x [m, k], A [rows, k] and u [m,
// rows] are bfloat16, and rows is the rank times the number of fused projections.
//
// A block has 16 or 32 tokens and 32 rows of A; the inner dimension is divided among the warps of a
// block and the blocks of a cluster, whose float32 parts are added through shared memory in a fixed
// order. Operands go from global memory to registers: a lane takes 8 neighbouring k of a row, which
// serve two tensor core steps in an order of k that x and A share.
//
// With programmatic dependent launch the kernel that follows starts as soon as the blocks of this
// one have, and fetches weights, which no kernel writes. It may read x when `flag` is set: the
// kernels before this one are complete then. It has to wait for this kernel's end before it reads
// u.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "lora_flag.cuh"

namespace qerl {
namespace {

constexpr int kRows = 32;
constexpr int kColumns = 32;  // of k, for one load of 8 by each of 4 lanes
constexpr int kMaxCluster = 8;

// TOKENS a block, WARPS, DEPTH loads of 32 columns in flight, BLOCKS of them that an SM's registers
// must hold.
template <int TOKENS, int WARPS, int DEPTH, int BLOCKS>
struct Shape {
  static constexpr int kTokens = TOKENS, kWarps = WARPS, kDepth = DEPTH, kBlocks = BLOCKS, kThreads = WARPS * 32;
};
using Deep = Shape<16, 8, 5, 1>;  // many loads at once
using Wide = Shape<32, 8, 2, 2>;  // many tokens

__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) shrink_kernel(const __nv_bfloat16* x, const __nv_bfloat16* __restrict__ a,
                                                            __nv_bfloat16* u, float factor, int m, int k,
                                                            int rows, int cluster, unsigned int* flag) {
  constexpr int kTokens = S::kTokens, kWarps = S::kWarps, kDepth = S::kDepth;
  constexpr int kStride = kRows + 4;  // of a token's results in shared memory: no two lanes of a store in one bank
  __shared__ __align__(16) float parts[kWarps][kTokens * kStride];
  __shared__ __align__(16) float part[kRows * kTokens];
  constexpr int kTiles = kTokens / 8;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int warp = threadIdx.x >> 5;
  const int lane = threadIdx.x & 31;
  if (flag != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && warp == 0) {  // before a load delays it
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (lane < kFlagCopies) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag + lane * kFlagLine) : "memory");
  }
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
  constexpr int kResults = kRows * kTokens;
  auto address_of = [&](int result) { return result / kRows * kStride + result % kRows; };
  auto write = [&](int result, float2 sum) {
    const int token = token0 + result / kRows;
    const int row = row0 + result % kRows;
    if (token < m && row < rows)
      *reinterpret_cast<__nv_bfloat162*>(u + static_cast<size_t>(token) * rows + row) =
          __floats2bfloat162_rn(sum.x * factor, sum.y * factor);
  };
#pragma unroll
  for (int result = threadIdx.x * 2; result < kResults; result += S::kThreads * 2) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 v = *reinterpret_cast<const float2*>(&parts[w][address_of(result)]);
      sum.x += v.x, sum.y += v.y;
    }
    if (cluster > 1)
      *reinterpret_cast<float2*>(&part[result]) = sum;
    else
      write(result, sum);
  }
  if (cluster > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const int share_of_block = kResults / cluster;
    for (int i = threadIdx.x * 2; i < share_of_block; i += S::kThreads * 2) {
      const int result = rank * share_of_block + i;
      const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&part[result]));
      float2 v[kMaxCluster];  // all loads before the first use
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        uint32_t remote;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(r < cluster ? r : 0));
        asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v[r].x), "=f"(v[r].y) : "r"(remote));
      }
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r)
        if (r < cluster) sum.x += v[r].x, sum.y += v[r].y;
      write(result, sum);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
}

}  // namespace
}  // namespace qerl

namespace qerl {
namespace {

template <typename S>
int launch_shrink(const void* x, const void* a, void* u, float factor, int m, int k, int rows, int cluster, unsigned int* flag,
                  int pdl, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((m + S::kTokens - 1) / S::kTokens * cluster, (rows + kRows - 1) / kRows);
  config.blockDim = dim3(S::kThreads);
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
  return cudaLaunchKernelEx(&config, shrink_kernel<S>, static_cast<const __nv_bfloat16*>(x),
                            static_cast<const __nv_bfloat16*>(a), static_cast<__nv_bfloat16*>(u), factor, m, k, rows, cluster,
                            pdl ? flag : nullptr);
}

}  // namespace
}  // namespace qerl

// rows a multiple of 16, k of 32; cluster 1, 2, 4 or 8; shape 0 Deep, 1 Wide.
extern "C" int qerl_lora_shrink(const void* x, const void* a, void* u, float factor, int m, int k, int rows, int shape,
                                int cluster, unsigned int* flag, int pdl, cudaStream_t stream) {
  using namespace qerl;
  if (m < 1 || rows % 16 || k % kColumns || cluster < 1 || cluster > kMaxCluster || (cluster & (cluster - 1))) return -1;
  if (shape == 0) return launch_shrink<Deep>(x, a, u, factor, m, k, rows, cluster, flag, pdl, stream);
  return launch_shrink<Wide>(x, a, u, factor, m, k, rows, cluster, flag, pdl, stream);
}
