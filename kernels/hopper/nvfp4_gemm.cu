// Computes y = inverse_scale (x (e2m1 * scale)^T + u B^T) + bias on Hopper. Activations are
// bfloat16, and the NVFP4 weight is prepacked (nvfp4_format.cuh). The second half of one LoRA
// adapter is optional: u = x A^T comes from lora_shrink.cu, and B lies in bfloat16 fragments.
// inverse_scale is 1 / global_scale of the weight.
//
// The GEMM is computed transposed, y^T = W x^T: 64 output channels are the M of a wgmma and the
// tokens its N, so the weight is the register operand. It goes from shared memory to registers
// once, is decoded there, two weights an instruction, and never exists in 16 bits in any memory;
// the activations go from the copy engine to the tensor cores untouched. One producer warp keeps
// all stages of the pipeline in flight, consumer warpgroups own 64 * MW output channels each.
//
// Work is divided into equal shares of consecutive (tile, step along k) pairs, one share a thread
// block, whatever the shape. A tile that is cut by a border between shares is finished by the block
// that comes last, which adds the other blocks' float32 partial tiles in a fixed order: the result
// does not depend on timing.
//
// The adapter's B is the end of the inner dimension: after the steps along k a tile has a few more,
// whose weights are loaded as they are. Output channels of fused projections (q, k, v) each have an
// A of their own, so a tile takes its own columns of u.
#include <cuda.h>
#include <cuda_runtime.h>

#include "lora_flag.cuh"
#include "nvfp4_format.cuh"
#include "wgmma.cuh"

namespace qerl {
namespace {

constexpr int kCounterSlots = 64;     // streams that may run the kernel at the same time
constexpr int kCountersPerSlot = 2048;
constexpr int kGenerations = 8;       // launches of a stream that may overlap, with room to spare
__device__ unsigned int counters[kCounterSlots * kCountersPerSlot];  // zero between launches
// Per launch: a ready flag for x in each of several cache lines, and in one more line a counter of
// the blocks that have seen it.
constexpr int kFlagWords = (kFlagCopies + 1) * kFlagLine;
__device__ unsigned int flags[kCounterSlots * kGenerations * kFlagWords];  // likewise zero

struct Params {
  const uint8_t* packed;
  const uint8_t* scale;
  const uint8_t* lora_b;  // null: no adapter
  const __nv_bfloat16* bias;
  __nv_bfloat16* y;
  float* workspace;
  unsigned int* counter;
  float inverse_scale;  // 1 / global_scale, times kFragmentUnit
  int m, n, k;
  int row_units;    // n / 64
  int k_units;      // k / 64
  int token_tiles;  // innermost in the tile order
  int w_steps;      // k / (64 * KB)
  int k_steps;      // w_steps and the steps of the adapter
  int total;        // tiles * k_steps
  int lora_units;   // rank / 16
  int shard_end[2]; // row units where the second and the third of fused projections begin
  // The kernel before this one, which writes u, sets these kFlagCopies flags when x is complete.
  // Null: this kernel waits for the end of that one.
  unsigned int* flag;
  int keep_weights; // tiles of several token ranges read them again
  int cluster;      // blocks of a cluster that share a tile, 0: no clusters
};

// ----------------------------------------------------------------------------------- instructions
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n}" ::"r"(bar), "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, int bytes, uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}
// Slabs of BT tokens x 64 columns, as many as the map's box has
__device__ __forceinline__ void tensor_load(uint32_t dst, const CUtensorMap* map, int column, int token, int k_unit,
                                            uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst),
      "l"(map), "r"(column), "r"(token), "r"(k_unit), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void named_barrier(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 load_from_block(uint32_t address, int rank) {
  float4 v;
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(remote)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}
// Keeps the compiler from computing `v` again wherever it is used.
__device__ __forceinline__ uint32_t opaque(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}
__device__ __forceinline__ void hold(const uint32_t (&a)[4]) {
  asm volatile("" ::"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
}
__device__ __forceinline__ void hold(const uint32_t (&a)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) hold(a[i]);
}
// K-major operand in shared memory with 128-byte rows and swizzle: groups of 8 rows are 1024 bytes
// apart.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) | (static_cast<uint64_t>(1) << 16) |
         ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ int share_begin(int block, int total, int blocks) {
  return static_cast<int>(static_cast<long long>(total) * block / blocks);
}
__device__ __forceinline__ int share_owner(int unit, int total, int blocks) {
  return static_cast<int>((static_cast<long long>(unit + 1) * blocks - 1) / total);
}

// ----------------------------------------------------------------------------------------- kernel
// BT tokens a tile, NWG consumer warpgroups of MW * 64 channels each, KB * 64 columns and one
// barrier pair a stage. FINE commits every wgmma by itself and keeps three in flight while the next
// fragment is decoded; otherwise the four of a unit go together and two units alternate.
template <int BT_, int NWG_, int MW_, int KB_, int STAGES_, int BLOCKS_PER_SM_, bool FINE_ = false>
struct Config {
  static constexpr bool FINE = FINE_;
  static constexpr int BT = BT_, NWG = NWG_, MW = MW_, KB = KB_, STAGES = STAGES_, BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr int ROW_UNITS = NWG * MW;
  static constexpr int X_BYTES = KB * BT * 128;
  static constexpr int W_BYTES = ROW_UNITS * KB * kUnitCodeBytes;
  static constexpr int S_BYTES = ROW_UNITS * KB * kUnitScaleBytes;
  static constexpr int SHARED = 1024 + STAGES * (X_BYTES + W_BYTES + S_BYTES + 16);
  static constexpr int THREADS = (NWG + 1) * 128;
  // Registers a thread at launch, and how setmaxnreg divides them between the roles.
  static constexpr int LAUNCH_REGS = 65536 / (THREADS * BLOCKS_PER_SM) / 8 * 8;
  static constexpr int PRODUCER_REGS = 24;
  static constexpr int CONSUMER_REGS_FREE = (LAUNCH_REGS * (NWG + 1) - PRODUCER_REGS) / NWG / 8 * 8;
  static constexpr int CONSUMER_REGS = CONSUMER_REGS_FREE > 240 ? 240 : CONSUMER_REGS_FREE;
  static constexpr int ACC = BT / 2;
  static_assert(ROW_UNITS <= kGroupUnits && kGroupUnits % ROW_UNITS == 0, "a tile lies in one group of rows");
  static_assert(SHARED * BLOCKS_PER_SM + BLOCKS_PER_SM * 1024 <= 228 * 1024, "stages do not fit");
};

template <int V>
struct Constant {
  static constexpr int value = V;
};

template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap u_map, const Params p) {
  extern __shared__ uint8_t shared_raw[];
  __shared__ int last_flag[C::NWG];
  const uint32_t base = opaque((shared_address(shared_raw) + 1023u) & ~1023u);
  const uint32_t x_base = base;
  const uint32_t w_base = x_base + C::STAGES * C::X_BYTES;
  const uint32_t s_base = w_base + C::STAGES * C::W_BYTES;
  const uint32_t full_base = s_base + C::STAGES * C::S_BYTES;
  const uint32_t empty_base = full_base + C::STAGES * 8;

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);  // known to be the same in all lanes
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");
    for (int i = 0; i < C::STAGES; ++i) {
      barrier_init(full_base + i * 8, 1);
      barrier_init(empty_base + i * 8, C::NWG);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  const int begin = share_begin(blockIdx.x, p.total, gridDim.x);
  const int end = share_begin(blockIdx.x + 1, p.total, gridDim.x);

  if (warp >= C::NWG * 4) {
    // ------------------------------------------------------------------------------------ producer
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::PRODUCER_REGS));
    if (threadIdx.x == C::NWG * 128) {
      uint64_t policy;
      if (p.keep_weights)
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
      else
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));

      auto load_weights = [&](int unit, int stage) {
        const int tile = unit / p.k_steps;
        const int step = unit - tile * p.k_steps;
        const int kb = step * C::KB;
        const int row_unit = tile / p.token_tiles * C::ROW_UNITS;
        const uint32_t full = full_base + stage * 8;
        const int rows = min(C::ROW_UNITS, p.row_units - row_unit);
        if (step >= p.w_steps) {
          const int first = (step - p.w_steps) * C::KB;
          const int count = min(C::KB, p.lora_units - first);
          const int group = min(kGroupUnits, p.row_units - row_unit / kGroupUnits * kGroupUnits);
          const size_t u = unit_index(row_unit, first, p.row_units, p.lora_units);
          barrier_expect(full, C::BT * 128 + rows * count * kUnitLoraBytes);
#pragma unroll 1
          for (int i = 0; i < count; ++i)
            bulk_load(w_base + stage * C::W_BYTES + i * C::ROW_UNITS * kUnitLoraBytes, p.lora_b + (u + i * group) * kUnitLoraBytes,
                      rows * kUnitLoraBytes, full, policy);
          return;
        }
        barrier_expect(full, C::X_BYTES + rows * C::KB * (kUnitCodeBytes + kUnitScaleBytes));
        const int group = min(kGroupUnits, p.row_units - row_unit / kGroupUnits * kGroupUnits);
        const size_t u = unit_index(row_unit, kb, p.row_units, p.k_units);
        const uint32_t w = w_base + stage * C::W_BYTES;
        const uint32_t s = s_base + stage * C::S_BYTES;
        if (C::ROW_UNITS == kGroupUnits && group == kGroupUnits) {  // the copy engine likes few large copies
          bulk_load(w, p.packed + u * kUnitCodeBytes, C::W_BYTES, full, policy);
          bulk_load(s, p.scale + u * kUnitScaleBytes, C::S_BYTES, full, policy);
        } else {
#pragma unroll 1
          for (int i = 0; i < C::KB; ++i) {
            bulk_load(w + i * C::ROW_UNITS * kUnitCodeBytes, p.packed + (u + i * group) * kUnitCodeBytes, rows * kUnitCodeBytes,
                      full, policy);
            bulk_load(s + i * C::ROW_UNITS * kUnitScaleBytes, p.scale + (u + i * group) * kUnitScaleBytes,
                      rows * kUnitScaleBytes, full, policy);
          }
        }
      };
      bool waited = false;
      auto wait_for_kernel_before = [&] {
        if (!waited) asm volatile("griddepcontrol.wait;" ::: "memory");
        waited = true;
      };
      auto load_tokens = [&](int unit, int stage) {
        const int tile = unit / p.k_steps;
        const int step = unit - tile * p.k_steps;
        const int token = tile % p.token_tiles * C::BT;
        if (step >= p.w_steps) {
          wait_for_kernel_before();
          const int row_unit = tile / p.token_tiles * C::ROW_UNITS;
          const int shard = (row_unit >= p.shard_end[0]) + (row_unit >= p.shard_end[1]);
          const int column = (shard * p.lora_units + (step - p.w_steps) * C::KB) * 16;
          tensor_load(x_base + stage * C::X_BYTES, &u_map, column, token, 0, full_base + stage * 8);
        } else {
          tensor_load(x_base + stage * C::X_BYTES, &x_map, 0, token, step * C::KB, full_base + stage * 8);
        }
      };

      // The weights of the first stages do not depend on the kernel before this one; the
      // activations do.
      const int ahead = min(end - begin, C::STAGES);
      for (int i = 0; i < ahead; ++i) load_weights(begin + i, i);
      if (p.flag != nullptr) {
        const unsigned int* mine = p.flag + blockIdx.x % kFlagCopies * kFlagLine;
        unsigned int there;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(mine) : "memory");
        while (!there);
        asm volatile("fence.proxy.async.global;" ::: "memory");  // the copy engine reads x
      } else {
        wait_for_kernel_before();
      }
      for (int i = 0; i < ahead; ++i) load_tokens(begin + i, i);
      int stage = 0;
      uint32_t parity = 0;
      for (int unit = begin + ahead; unit < end; ++unit) {
        barrier_wait(empty_base + stage * 8, parity);
        load_weights(unit, stage);
        load_tokens(unit, stage);
        if (++stage == C::STAGES) stage = 0, parity ^= 1;
      }
      if (p.flag != nullptr) {  // the last block to have seen the flag takes it down
        unsigned int before;
        asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(p.flag + kFlagCopies * kFlagLine), "r"(gridDim.x - 1) : "memory");
        if (before == gridDim.x - 1)
          for (int i = 0; i < kFlagCopies; ++i) p.flag[i * kFlagLine] = 0;
      }
    }
  } else {
    // ----------------------------------------------------------------------------------- consumers
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::CONSUMER_REGS));
    const int wg = warp >> 2;
    const int tid = threadIdx.x & 127;
    const int lane = threadIdx.x & 31;
    const int g = lane >> 2;
    const int t = lane & 3;
    const uint32_t w_mine = opaque(w_base + wg * C::MW * kUnitCodeBytes + tid * 16);
    const uint32_t s_mine = opaque(s_base + wg * C::MW * kUnitScaleBytes + (warp & 3) * 64 + g * 8);

    int stage = 0;
    uint32_t parity = 0;
    bool first_result = true;
    // Two sets of fragments: the tensor cores read one while the other is decoded. `hold` after the
    // wait for a wgmma keeps the compiler from reusing the registers that the wgmma still reads.
    uint32_t a[C::FINE ? 1 : 2][4][4] = {};
    for (int unit = begin; unit < end;) {
      const int tile = unit / p.k_steps;
      const int k_begin = unit - tile * p.k_steps;
      const int k_end = min(p.k_steps, k_begin + end - unit);
      unit += k_end - k_begin;

      float acc[C::MW][C::ACC];
#pragma unroll
      for (int m = 0; m < C::MW; ++m)
#pragma unroll
        for (int i = 0; i < C::ACC; ++i) acc[m][i] = 0.0f;

      int release = -1;
      auto load = [&](int kb, int m, uint4& q, uint2& s) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                     : "r"(w_mine + stage * C::W_BYTES + (kb * C::ROW_UNITS + m) * kUnitCodeBytes));
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(s.x), "=r"(s.y)
                     : "r"(s_mine + stage * C::S_BYTES + (kb * C::ROW_UNITS + m) * kUnitScaleBytes));
      };
      auto x_operand = [&](int kb) { return operand_descriptor(x_base + stage * C::X_BYTES + kb * C::BT * 128); };
      auto release_previous = [&] {
        if (release >= 0 && tid == 0) barrier_arrive(empty_base + release * 8);
      };
      auto next_stage = [&] {
        release = stage;
        if (++stage == C::STAGES) stage = 0, parity ^= 1;
      };
      // One stage, beginning with fragment set FIRST.
      auto consume = [&](auto first) {
        barrier_wait(full_base + stage * 8, parity);
#pragma unroll
        for (int kb = 0; kb < C::KB; ++kb) {
          const uint64_t operand = x_operand(kb);
#pragma unroll
          for (int m = 0; m < C::MW; ++m) {
            uint4 q;
            uint2 s;
            load(kb, m, q, s);
            const int set = (decltype(first)::value + kb * C::MW + m) % 2;
            decode_unit(q, s, a[set]);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 4; ++j) Wgmma<C::BT>::mma(acc[m], a[set][j], operand + j * 2);
            wgmma_commit();
            wgmma_wait<1>();
            hold(a[set ^ 1]);
            if (kb == 0 && m == 0) release_previous();
          }
        }
        next_stage();
      };
      auto consume_fine = [&] {
        barrier_wait(full_base + stage * 8, parity);
#pragma unroll
        for (int kb = 0; kb < C::KB; ++kb) {
          const uint64_t operand = x_operand(kb);
#pragma unroll
          for (int m = 0; m < C::MW; ++m) {
            uint4 q;
            uint2 s;
            load(kb, m, q, s);
            const uint32_t words[4] = {q.x, q.y, q.z, q.w};
            const uint32_t scales[4] = {scale_pair<0>(s.x), scale_pair<1>(s.x), scale_pair<0>(s.y), scale_pair<1>(s.y)};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              wgmma_wait<3>();
              hold(a[0][j]);
              if (kb == 0 && m == 0 && j == 3) release_previous();
              decode8(words[j], scales[j], a[0][j]);
              wgmma_fence();
              Wgmma<C::BT>::mma(acc[m], a[0][j], operand + j * 2);
              wgmma_commit();
            }
          }
        }
        next_stage();
      };
      // One stage of the adapter: up to KB fragments of 16 columns for each unit, nothing to
      // decode.
      auto consume_lora = [&](int count) {
        wgmma_wait<0>();
        release_previous();
        barrier_wait(full_base + stage * 8, parity);
        const uint64_t operand = x_operand(0);
#pragma unroll
        for (int kb = 0; kb < C::KB; ++kb) {
          if (kb < count) {
#pragma unroll
            for (int m = 0; m < C::MW; ++m) {
              uint32_t(&b)[4] = a[0][m];
              asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                           : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                           : "r"(w_mine + stage * C::W_BYTES + (kb * C::ROW_UNITS + m) * kUnitLoraBytes));
            }
            wgmma_fence();
#pragma unroll
            for (int m = 0; m < C::MW; ++m) Wgmma<C::BT>::mma(acc[m], a[0][m], operand + kb * 2);
            wgmma_commit();
            wgmma_wait<0>();
            hold(a[0]);
          }
        }
        next_stage();
      };
      const int w_end = min(k_end, p.w_steps);
      if constexpr (C::FINE) {
        for (int step = k_begin; step < w_end; ++step) consume_fine();
      } else if constexpr (C::KB * C::MW % 2 == 0) {
        for (int step = k_begin; step < w_end; ++step) consume(Constant<0>());
      } else {
        int step = k_begin;
        for (; step + 1 < w_end; step += 2) {
          consume(Constant<0>());
          consume(Constant<1>());
        }
        if (step < w_end) consume(Constant<0>());
      }
      for (int step = max(k_begin, p.w_steps); step < k_end; ++step)
        consume_lora(p.lora_units - (step - p.w_steps) * C::KB);
      wgmma_wait<0>();
      if (tid == 0) barrier_arrive(empty_base + release * 8);

      if (first_result) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        first_result = false;
      }

      const int token0 = tile % p.token_tiles * C::BT;
      const int row_unit = tile / p.token_tiles * C::ROW_UNITS + wg * C::MW;
      // Eight tokens of unit m: fragment rows g and g + 8 of tokens 2 t, 2 t + 1 -> channels 4 t ..
      // 4 t + 3 of token g
      auto store = [&](int m, int i, float4 v) {
        if (row_unit + m >= p.row_units) return;
        const int channel = (row_unit + m) * kUnit + (warp & 3) * 16;
        float bias0 = 0.0f, bias1 = 0.0f;
        if (p.bias != nullptr) {
          bias0 = __bfloat162float(p.bias[channel + fragment_channel(g, 0)]);
          bias1 = __bfloat162float(p.bias[channel + fragment_channel(g, 1)]);
        }
        __nv_bfloat162 lo = __floats2bfloat162_rn(fmaf(v.x, p.inverse_scale, bias0), fmaf(v.y, p.inverse_scale, bias0));
        __nv_bfloat162 hi = __floats2bfloat162_rn(fmaf(v.z, p.inverse_scale, bias1), fmaf(v.w, p.inverse_scale, bias1));
        const uint32_t out_lo = transpose8x8(*reinterpret_cast<uint32_t*>(&lo));
        const uint32_t out_hi = transpose8x8(*reinterpret_cast<uint32_t*>(&hi));
        const int token = token0 + i * 8 + g;
        if (token < p.m)
          *reinterpret_cast<uint2*>(p.y + static_cast<size_t>(token) * p.n + channel + 4 * t) = make_uint2(out_lo, out_hi);
      };
      constexpr int kVectors = C::MW * C::ACC / 4;
      constexpr int kParts = 8;  // of other blocks, loaded together; also the largest cluster

      // ------------------------------------------------- a tile shared by the blocks of a cluster
      if (p.cluster) {
        // Every block leaves its part in its shared memory, where the stages were, and adds up one
        // share of the tile.
        static_assert(C::NWG * kVectors * 2048 <= C::STAGES * (C::X_BYTES + C::W_BYTES), "no room for the part");
        asm volatile("bar.sync 8, %0;" ::"n"(C::NWG * 128) : "memory");
        const uint32_t part = base + (wg * kVectors * 128 + tid) * 16;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const float* from = &acc[v * 4 / C::ACC][v * 4 % C::ACC];
          asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(part + v * 2048), "f"(from[0]), "f"(from[1]),
                       "f"(from[2]), "f"(from[3])
                       : "memory");
        }
        cluster_barrier();
        const int rank = blockIdx.x % p.cluster;
        for (int v = rank; v < kVectors; v += p.cluster) {
          float4 add[kParts];
#pragma unroll
          for (int r = 0; r < kParts; ++r)
            add[r] = r < p.cluster ? load_from_block(part + v * 2048, r) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          float4 sum = add[0];
#pragma unroll
          for (int r = 1; r < kParts; ++r) sum.x += add[r].x, sum.y += add[r].y, sum.z += add[r].z, sum.w += add[r].w;
          store(v / (C::BT / 8), v % (C::BT / 8), sum);
        }
        cluster_barrier();  // no block leaves while others read from it
        break;
      }

      // ---------------------------------------------------------------------------- partial tiles
      if (k_begin != 0 || k_end != p.k_steps) {
        const int first_block = share_owner(tile * p.k_steps, p.total, gridDim.x);
        const int last_block = share_owner(tile * p.k_steps + p.k_steps - 1, p.total, gridDim.x);
        const unsigned int others = last_block - first_block;
        unsigned int* counter = p.counter + first_block * C::NWG + wg;
        auto slot = [&](int block) {  // a block's piece that begins its tile has slot 1, any other slot 0
          return reinterpret_cast<float4*>(p.workspace) +
                 (static_cast<size_t>(2 * block + (block == first_block)) * C::NWG + wg) * kVectors * 128 + tid;
        };
        // Of two parts the later one need not be written, and their order does not matter. A block
        // that comes second to a small part does not ask first: that costs more than the writing.
        bool last = false;
        if (kVectors >= 8 && others == 1) {
          if (tid == 0) {
            unsigned int arrived;
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
            if (arrived == others) *counter = 0;
            last_flag[wg] = arrived == others;
          }
          named_barrier(1 + wg);
          last = last_flag[wg];
        }
        if (!last) {
          float4* mine = slot(blockIdx.x);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const float* from = &acc[v * 4 / C::ACC][v * 4 % C::ACC];
            __stcg(mine + v * 128, make_float4(from[0], from[1], from[2], from[3]));
          }
          named_barrier(1 + wg);
          if (tid == 0) {  // release: what the barrier collected; acquire: the other blocks' parts
            unsigned int arrived;
            asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(arrived) : "l"(counter) : "memory");
            if (arrived == others) *counter = 0;
            last_flag[wg] = arrived == others;
          }
          named_barrier(1 + wg);
          if (!last_flag[wg]) continue;
        }
        if (others == 1) {
          constexpr int kGroup = kVectors < 4 ? kVectors : 4;
          const float4* other = slot(first_block + last_block - blockIdx.x);
#pragma unroll
          for (int v0 = 0; v0 < kVectors; v0 += kGroup) {
            float4 add[kGroup];
#pragma unroll
            for (int v = 0; v < kGroup; ++v) add[v] = __ldcg(other + (v0 + v) * 128);
#pragma unroll
            for (int v = 0; v < kGroup; ++v) {
              float* to = &acc[(v0 + v) * 4 / C::ACC][(v0 + v) * 4 % C::ACC];
              to[0] += add[v].x, to[1] += add[v].y, to[2] += add[v].z, to[3] += add[v].w;
            }
          }
        } else {
          constexpr int kGroup = kVectors >= 8 ? 4 : kVectors < 2 ? kVectors : 2;
          constexpr int kAtOnce = kVectors >= 8 ? 2 : kParts;
#pragma unroll
          for (int v0 = 0; v0 < kVectors; v0 += kGroup) {
            float4 sum[kGroup];
#pragma unroll
            for (int v = 0; v < kGroup; ++v) sum[v] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int block = first_block; block <= last_block; block += kAtOnce) {
              float4 add[kAtOnce][kGroup];  // all loads before the first use
#pragma unroll
              for (int i = 0; i < kAtOnce; ++i) {
                const float4* other = slot(block + i) + v0 * 128;
#pragma unroll
                for (int v = 0; v < kGroup; ++v)
                  add[i][v] = block + i <= last_block ? __ldcg(other + v * 128) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
              }
#pragma unroll
              for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int v = 0; v < kGroup; ++v)
                  sum[v].x += add[i][v].x, sum[v].y += add[i][v].y, sum[v].z += add[i][v].z, sum[v].w += add[i][v].w;
            }
#pragma unroll
            for (int v = 0; v < kGroup; ++v) {
              float* to = &acc[(v0 + v) * 4 / C::ACC][(v0 + v) * 4 % C::ACC];
              to[0] = sum[v].x, to[1] = sum[v].y, to[2] = sum[v].z, to[3] = sum[v].w;
            }
          }
        }
      }

      // ----------------------------------------------------------------------------------- output
#pragma unroll
      for (int m = 0; m < C::MW; ++m)
#pragma unroll
        for (int i = 0; i < C::BT / 8; ++i) {
          const float* v = &acc[m][i * 4];
          store(m, i, make_float4(v[0], v[1], v[2], v[3]));
        }
    }
  }
}

// ------------------------------------------------------------------------------------------- host
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
EncodeTiled encode_tiled = nullptr;
constexpr int kDevices = 64;
unsigned int* counter_base[kDevices] = {};
unsigned int* flag_base[kDevices] = {};

int current_device() {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess && device >= 0 && device < kDevices ? device : -1;
}

template <typename C>
int prepare() {
  return cudaFuncSetAttribute(gemm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SHARED);
}

template <typename C>
int launch(const void* x, const void* u, int u_columns, Params p, int blocks, int pdl, cudaStream_t stream) {
  if (p.cluster && p.k / (kUnit * C::KB) < p.cluster) return -3;
  p.w_steps = p.k / (kUnit * C::KB);
  p.k_steps = p.w_steps + (p.lora_units + C::KB - 1) / C::KB;
  for (int end : p.shard_end)  // a tile lies in one of the fused projections
    if (p.lora_units && end < p.row_units && end % C::ROW_UNITS) return -4;
  p.token_tiles = (p.m + C::BT - 1) / C::BT;
  p.total = (p.row_units + C::ROW_UNITS - 1) / C::ROW_UNITS * p.token_tiles * p.k_steps;
  p.keep_weights = p.token_tiles > 1;
  if (p.cluster && static_cast<long long>(blocks) * p.k_steps != static_cast<long long>(p.total) * p.cluster) return -3;

  CUtensorMap map;
  const cuuint64_t dims[3] = {kUnit, static_cast<cuuint64_t>(p.m), static_cast<cuuint64_t>(p.k_units)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.k) * 2, kUnit * 2};
  const cuuint32_t box[3] = {kUnit, static_cast<cuuint32_t>(C::BT), static_cast<cuuint32_t>(C::KB)};
  const cuuint32_t steps[3] = {1, 1, 1};
  if (encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(x), dims, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return -2;
  CUtensorMap u_map = map;
  if (p.lora_units) {
    const cuuint64_t u_dims[3] = {static_cast<cuuint64_t>(u_columns), static_cast<cuuint64_t>(p.m), 1};
    const cuuint64_t u_strides[2] = {static_cast<cuuint64_t>(u_columns) * 2, static_cast<cuuint64_t>(u_columns) * p.m * 2};
    const cuuint32_t u_box[3] = {kUnit, static_cast<cuuint32_t>(C::BT), 1};
    if (encode_tiled(&u_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(u), u_dims, u_strides, u_box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
      return -2;
  }

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(C::THREADS);
  config.dynamicSmemBytes = C::SHARED;
  config.stream = stream;
  cudaLaunchAttribute attribute[2];
  config.attrs = attribute;
  if (pdl) {
    attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (p.cluster) {
    attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attribute[config.numAttrs].val.clusterDim.x = p.cluster;
    attribute[config.numAttrs].val.clusterDim.y = 1;
    attribute[config.numAttrs++].val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, gemm_kernel<C>, map, u_map, p);
}

struct Entry {
  int bt, nwg, mw, kb, stages, blocks_per_sm, fine;
  int (*prepare)();
  int (*launch)(const void*, const void*, int, Params, int, int, cudaStream_t);
};
template <typename C>
constexpr Entry entry() {
  return {C::BT, C::NWG, C::MW, C::KB, C::STAGES, C::BLOCKS_PER_SM, C::FINE, prepare<C>, launch<C>};
}
const Entry entries[] = {  // CONFIGS in tuning.py lists the same
    // BT, NWG, MW, KB, stages, blocks per SM, FINE
    entry<Config<8, 2, 1, 2, 9, 2, false>>(),     // 0
    entry<Config<8, 2, 2, 2, 5, 2, false>>(),     // 1
    entry<Config<16, 2, 1, 2, 8, 2, false>>(),    // 2
    entry<Config<16, 2, 2, 2, 5, 2, false>>(),    // 3
    entry<Config<32, 4, 1, 2, 8, 1, false>>(),    // 4
    entry<Config<32, 2, 1, 2, 6, 2, false>>(),    // 5
    entry<Config<64, 4, 1, 2, 6, 1, false>>(),    // 6
    entry<Config<64, 2, 1, 2, 4, 2, true>>(),     // 7
    entry<Config<128, 2, 2, 2, 4, 1, false>>(),   // 8
    entry<Config<128, 2, 1, 2, 5, 1, true>>(),    // 9
    entry<Config<256, 2, 1, 1, 6, 1, false>>(),   // 10
    entry<Config<64, 4, 1, 1, 12, 1, false>>(),   // 11
};
constexpr int kEntries = sizeof(entries) / sizeof(entries[0]);

}  // namespace
}  // namespace qerl

// Called once for each device before the first launch (and before any graph capture).
extern "C" int qerl_nvfp4_prepare() {
  using namespace qerl;
  cudaDriverEntryPointQueryResult found;
  void* function = nullptr;
#if CUDART_VERSION >= 12050
  int error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else  // the toolkits before 12.5 have the unversioned function alone
  int error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorInsufficientDriver;
  encode_tiled = reinterpret_cast<EncodeTiled>(function);
  const int device = current_device();
  if (device < 0) return cudaErrorInvalidDevice;
  error = cudaGetSymbolAddress(reinterpret_cast<void**>(&counter_base[device]), counters);
  if (error != cudaSuccess) return error;
  error = cudaGetSymbolAddress(reinterpret_cast<void**>(&flag_base[device]), flags);
  if (error != cudaSuccess) return error;
  for (const Entry& e : entries)
    if ((error = e.prepare()) != cudaSuccess) return error;
  return 0;
}

extern "C" const char* qerl_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// The flag of a launch on the current device, by its stream's slot and its number.
extern "C" unsigned int* qerl_nvfp4_flag(int slot, int launch) {
  using namespace qerl;
  return flag_base[current_device()] + (slot % kCounterSlots * kGenerations + launch % kGenerations) * kFlagWords;
}

extern "C" int qerl_nvfp4_config_count() { return qerl::kEntries; }

// BT, NWG, MW, KB, stages, blocks per SM, FINE
extern "C" void qerl_nvfp4_config(int index, int* out) {
  const qerl::Entry& e = qerl::entries[index];
  const int v[7] = {e.bt, e.nwg, e.mw, e.kb, e.stages, e.blocks_per_sm, e.fine};
  for (int i = 0; i < 7; ++i) out[i] = v[i];
}

// u [m, shards * rank] and lora_b: null without an adapter. shard_end: rows where the second and
// third projection begin. flag: what qerl_lora_shrink, the kernel before this one, was given; null
// if something else computed u.
extern "C" int qerl_nvfp4_gemm(const void* x, const void* packed, const void* scale, float inverse_scale, const void* bias, void* y,
                               const void* u, const void* lora_b, int rank, int shards, int shard_end0, int shard_end1,
                               unsigned int* flag, int m, int n, int k, int config, int blocks, int cluster, void* workspace, int counter_slot, int pdl,
                               cudaStream_t stream) {
  using namespace qerl;
  if (config < 0 || config >= kEntries || counter_slot < 0 || counter_slot >= kCounterSlots || cluster > 8) return -1;
  if (n % kUnit || k % (kUnit * entries[config].kb) || blocks * entries[config].nwg > kCountersPerSlot * (workspace ? 1 : 1 << 12))
    return -1;
  Params p = {};
  p.packed = static_cast<const uint8_t*>(packed);
  p.scale = static_cast<const uint8_t*>(scale);
  p.bias = static_cast<const __nv_bfloat16*>(bias);
  p.y = static_cast<__nv_bfloat16*>(y);
  p.workspace = static_cast<float*>(workspace);
  const int device = current_device();
  if (device < 0 || counter_base[device] == nullptr) return -1;
  p.counter = counter_base[device] + counter_slot * kCountersPerSlot;
  p.inverse_scale = inverse_scale * kFragmentUnit;
  p.m = m, p.n = n, p.k = k;
  p.cluster = cluster > 1 ? cluster : 0;
  p.row_units = n / kUnit;
  p.k_units = k / kUnit;
  p.shard_end[0] = p.shard_end[1] = p.row_units;
  if (lora_b != nullptr) {
    if (rank % 16 || rank < 16 || shards < 1 || shards > 3 || shard_end0 % kUnit || shard_end1 % kUnit) return -4;
    p.lora_b = static_cast<const uint8_t*>(lora_b);
    p.lora_units = rank / 16;
    if (shards > 1) p.shard_end[0] = shard_end0 / kUnit;
    if (shards > 2) p.shard_end[1] = shard_end1 / kUnit;
    p.flag = pdl ? flag : nullptr;
  }
  return entries[config].launch(x, u, rank * shards, p, blocks, pdl, stream);
}
