// Decodes a prepacked NVFP4 weight to row-major bfloat16 [N, K], exactly e2m1 * scale. Memory is
// the bound: the kernel reads 0.56 bytes and writes 2 for each weight.
#include <cuda_runtime.h>

#include "nvfp4_format.cuh"

namespace qerl {
namespace {

constexpr int kWarps = 8;
constexpr int kUnitsPerWarp = 4;  // 16 rows x 64 columns each, neighbours in k: 16-byte loads in flight before the first use

// Different for the eight rows that one matrix of stmatrix writes.
__device__ __forceinline__ int swizzle(int row) { return (row >> 2) * 2 + (row & 1); }

__global__ void __launch_bounds__(kWarps * 32) block_values_kernel(const uint8_t* __restrict__ packed,
                                                                const uint8_t* __restrict__ scale,
                                                                __nv_bfloat16* __restrict__ out, int row_units, int k_units,
                                                                int groups, int k, int total) {
  __shared__ __align__(128) uint8_t tile_store[kWarps][16 * 128];
  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  const int work = blockIdx.x * kWarps + warp;  // (row block, quarter of it, group of units along k)
  if (work >= total) return;
  const int group = work % groups;
  const int quarter = (work / groups) & 3;
  const int row_block = work / groups / 4;
  const int first = group * kUnitsPerWarp;

  uint4 q[kUnitsPerWarp];
  uint2 s[kUnitsPerWarp];
#pragma unroll
  for (int u = 0; u < kUnitsPerWarp; ++u) {
    if (first + u < k_units) {
      const size_t unit = unit_index(row_block, first + u, row_units, k_units);
      q[u] = __ldcs(reinterpret_cast<const uint4*>(packed + unit * kUnitCodeBytes + quarter * 512) + lane);
      s[u] = __ldcs(reinterpret_cast<const uint2*>(scale + unit * kUnitScaleBytes + quarter * 64) + (lane >> 2));
    }
  }

  uint8_t* tile = tile_store[warp];
  const uint32_t tile_address = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  // stmatrix: lane l gives the address of row l % 8 of matrix l / 8; matrix i is a[i]: half i & 1,
  // 16-byte column i >> 1
  const int st_row = fragment_channel(lane & 7, (lane >> 3) & 1);
  const int st_chunk = lane >> 4;
  const int ld_chunk = lane & 7;
  const int row0 = row_block * kUnit + quarter * 16;
#pragma unroll
  for (int u = 0; u < kUnitsPerWarp; ++u) {
    if (first + u >= k_units) break;
    uint32_t a[4][4];
    decode_unit(q[u], s[u], a);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[j][i] = mul_bf16x2(a[j][i], 0x43004300u);  // 2^7
      const uint32_t address = tile_address + st_row * 128 + (((2 * j + st_chunk) ^ swizzle(st_row)) << 4);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a[j][0]),
                   "r"(a[j][1]), "r"(a[j][2]), "r"(a[j][3])
                   : "memory");
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = r * 4 + (lane >> 3);
      const uint4 v = *reinterpret_cast<const uint4*>(tile + row * 128 + ((ld_chunk ^ swizzle(row)) << 4));
      __stcs(reinterpret_cast<uint4*>(out + static_cast<size_t>(row0 + row) * k + (first + u) * kUnit) + ld_chunk, v);
    }
  }
}

}  // namespace
}  // namespace qerl

extern "C" int qerl_nvfp4_block_values(const void* packed, const void* scale, void* out, int n, int k, cudaStream_t stream) {
  using namespace qerl;
  const int k_units = k / kUnit;
  const int groups = (k_units + kUnitsPerWarp - 1) / kUnitsPerWarp;
  const int total = n / kUnit * 4 * groups;
  block_values_kernel<<<(total + kWarps - 1) / kWarps, kWarps * 32, 0, stream>>>(
      static_cast<const uint8_t*>(packed), static_cast<const uint8_t*>(scale), static_cast<__nv_bfloat16*>(out), n / kUnit,
      k_units, groups, k, total);
  return cudaGetLastError();
}
