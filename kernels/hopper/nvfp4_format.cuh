// The prepacked NVFP4 layout and its arithmetic; kernels/hopper/layout.py is the same in PyTorch.
//
// A unit is 64 output channels x 64 input channels: 2048 bytes of codes and 256 bytes of scales.
// Units lie in groups of 4 in N (256 channels; the last group may have fewer), in a group by K
// first: [N / 256][K / 64][4]. Inside a unit, warp w of a warpgroup owns channels 16 w .. 16 w + 15
// and lane l = 4 g + t owns 16 bytes, one 32-bit word for each of the four 16-wide steps in k: the
// eight codes that the lane holds as a wgmma A fragment. A word's four pairs (two neighbouring k of
// one channel) are scattered over its bits such that at most two shifted copies and one or two
// masks bring a pair's sign, exponent and mantissa bits to where bfloat16 has them.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace qerl {

constexpr int kUnit = 64;             // rows and columns of a unit
constexpr int kUnitCodeBytes = 2048;  // 64 * 64 / 2
constexpr int kUnitScaleBytes = 256;  // 64 * 64 / 16
constexpr int kUnitLoraBytes = 2048;  // 64 output channels x 16 columns of a LoRA B, bfloat16 fragments

constexpr int kGroupUnits = 4;

__device__ __forceinline__ size_t unit_index(int row_unit, int k_unit, int row_units, int k_units) {
  const int first = row_unit / kGroupUnits * kGroupUnits;
  const int rows = row_units - first < kGroupUnits ? row_units - first : kGroupUnits;
  return static_cast<size_t>(first) * k_units + static_cast<size_t>(k_unit) * rows + (row_unit - first);
}

// Rows g and g + 8 of a fragment hold these of its 16 channels, so that four neighbouring channels
// of the result, two from each half, meet in one lane after the transposition.
__device__ __forceinline__ int fragment_channel(int g, int half) { return 4 * (g >> 1) + 2 * half + (g & 1); }

// The fragments hold e2m1 * scale * 2^-7, and the accumulator is multiplied by 2^7.
constexpr float kFragmentUnit = 128.0f;

__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Scale bytes (5 exponent bits, 3 mantissa bits) 2 I and 2 I + 1 of `word` as a bfloat16 pair,
// times 2^119. The codes below carry 2^-126, so that no value leaves bfloat16's normal range.
template <int I>
__device__ __forceinline__ uint32_t scale_pair(uint32_t word) {
  return __byte_perm(word, 0, 0x4140 + I * 0x0202) * 16u + 0x6F806F80u;
}
__device__ __forceinline__ uint32_t mul_low(uint32_t a, uint32_t s) {
  uint32_t d;
  asm("{\n.reg .b16 low, high;\n.reg .b32 both;\n"
      "mov.b32 {low, high}, %2;\nmov.b32 both, {low, low};\nmul.bf16x2 %0, %1, both;\n}"
      : "=r"(d) : "r"(a), "r"(s));
  return d;
}
__device__ __forceinline__ uint32_t mul_high(uint32_t a, uint32_t s) {
  uint32_t d;
  asm("{\n.reg .b16 low, high;\n.reg .b32 both;\n"
      "mov.b32 {low, high}, %2;\nmov.b32 both, {high, high};\nmul.bf16x2 %0, %1, both;\n}"
      : "=r"(d) : "r"(a), "r"(s));
  return d;
}

// Eight codes to four bfloat16 pairs. The low half of `s` is the scale of a[0] and a[2] (channel
// g), the high half that of a[1] and a[3] (channel g + 8).
__device__ __forceinline__ void decode8(uint32_t q, uint32_t s, uint32_t (&a)[4]) {
  const uint32_t r4 = __funnelshift_r(q, q, 4);
  const uint32_t r6 = __funnelshift_r(q, q, 6);
  a[0] = mul_low((q << 6) & 0x81C081C0u, s);
  a[1] = mul_high(r4 & 0x81C081C0u, s);
  a[2] = mul_low(((q << 2) & 0x00400040u) | (r6 & 0x81808180u), s);
  a[3] = mul_high(q & 0x81C081C0u, s);
}

// The four 16-wide steps of one lane's 64 columns.
__device__ __forceinline__ void decode_unit(const uint4& q, const uint2& s, uint32_t (&a)[4][4]) {
  decode8(q.x, scale_pair<0>(s.x), a[0]);
  decode8(q.y, scale_pair<1>(s.x), a[1]);
  decode8(q.z, scale_pair<0>(s.y), a[2]);
  decode8(q.w, scale_pair<1>(s.y), a[3]);
}

}  // namespace qerl
